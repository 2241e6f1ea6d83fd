//! What a caller can do about an error, and the exit code that reports it.

use std::process::ExitCode;

/// Classifies errors by what can be done about them. Every error enum in Ulmus has a `kind()`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Trying again may work: a slow store, a lost connection.
    Retry,
    /// A newer generation has taken over: do not try again; leave and rejoin.
    Fenced,
    /// The input is wrong; the message says what to write instead.
    InvalidInput,
    /// The other side refuses: different version, different fingerprint, store not shared.
    Refused,
    /// Stored bytes differ from what was written.
    Corrupt,
    /// A disk cannot be written: it is full, or permission is denied.
    Disk,
    /// A bug in Ulmus, or a fault of the machine.
    Internal,
}

/// The exit codes of all programs; `docs/run-folder.md` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExitStatus {
    /// 0: everything requested is done.
    Done,
    /// 1: a failure that wrong input did not cause: a bug, a full disk.
    Failed,
    /// 2: wrong input; the message says what to write instead.
    InvalidInput,
    /// 3: refused: port in use, run folder locked, worker of a different version.
    Refused,
    /// 4: fenced: a newer process has taken over.
    Fenced,
    /// 5: stored data is damaged, and no older intact copy exists.
    Corrupt,
    /// 6: no answer in time; trying again may work.
    Unavailable,
    /// 130: interrupted after saving everything.
    Interrupted,
}

impl ExitStatus {
    /// The exit code as a number.
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

    /// The status with this exit code, if there is one.
    pub fn from_code(code: u32) -> Option<Self> {
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
