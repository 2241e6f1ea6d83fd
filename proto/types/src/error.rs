//! What a caller can do about an error, and how a process tells it to its own caller.

use std::process::ExitCode;

/// Sorts errors by what can be done about them. Every error enum of Ulmus answers `kind()`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// It may work when tried again: a slow store, a lost connection.
    Retry,
    /// Somebody newer has taken over: never try again, leave and rejoin.
    Fenced,
    /// The input is wrong; the message says what to write instead.
    InvalidInput,
    /// The other side says no: another version, another fingerprint, a store that is not shared.
    Refused,
    /// Stored bytes are not what was written.
    Corrupt,
    /// A disk takes nothing: it is full, or may not be written.
    Disk,
    /// A defect of Ulmus or of its machine.
    Internal,
}

/// The exit codes of all programs; `docs/run-folder.md` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExitStatus {
    /// 0: everything that was asked for is done.
    Done,
    /// 1: something failed that is nobody's input: a defect, a full disk.
    Failed,
    /// 2: wrong input; the message says what to write instead.
    InvalidInput,
    /// 3: refused: port in use, run folder locked, worker of another version.
    Refused,
    /// 4: fenced: somebody newer has taken over.
    Fenced,
    /// 5: stored data is damaged, and there is no older good copy to go back to.
    Corrupt,
    /// 6: nothing answered in time; trying again may work.
    Unavailable,
    /// 130: interrupted, and everything was saved.
    Interrupted,
}

impl ExitStatus {
    /// The number that the process returns.
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::InvalidInput => 2,
            Self::Refused => 3,
            Self::Fenced => 4,
            Self::Corrupt => 5,
            Self::Unavailable => 6,
            Self::Interrupted => 130,
        }
    }
}

impl ExitStatus {
    const ALL: [Self; 8] = [
        Self::Done,
        Self::Failed,
        Self::InvalidInput,
        Self::Refused,
        Self::Fenced,
        Self::Corrupt,
        Self::Unavailable,
        Self::Interrupted,
    ];

    /// The status that a number stands for.
    pub fn of_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|status| u32::from(status.code()) == code)
    }
}

impl From<ErrorKind> for ExitStatus {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Retry => Self::Unavailable,
            ErrorKind::Fenced => Self::Fenced,
            ErrorKind::InvalidInput => Self::InvalidInput,
            ErrorKind::Refused => Self::Refused,
            ErrorKind::Corrupt => Self::Corrupt,
            ErrorKind::Disk | ErrorKind::Internal => Self::Failed,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.code())
    }
}
