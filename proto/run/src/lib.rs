//! The run folder: what its files are called ([`paths`]), and what is in those that one program writes and another
//! reads. It does no I/O.
//!
//! `docs/run-folder.md` shows the whole folder. Two formats have crates of their own: the manifest of the data, which the
//! data loader alone reads, and that of a checkpoint.

#![forbid(unsafe_code)]

pub mod paths;
pub mod quarantine;
pub mod results;
pub mod signed;
mod state;

pub use state::TrainState;
use ulmus_types::ErrorKind;

/// A file that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file} cannot be read: {reason}")]
pub struct FormatError {
    /// Its path in the run folder, or in its part of it.
    pub file: String,
    /// What was expected, and what was found.
    pub reason: String,
}

impl FormatError {
    fn new(file: impl Into<String>, reason: &impl ToString) -> Self {
        Self { file: file.into(), reason: reason.to_string() }
    }

    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Corrupt
    }
}
