//! The run folder: the names of its files ([`paths`]), and the formats of those that one program writes and another
//! reads. This crate does no I/O.
//!
//! `docs/run-folder.md` shows the whole folder. Two formats are defined elsewhere: the manifest of the data in the data
//! loader, which alone reads it, and the manifest of a checkpoint in the checkpoint crate.

#![forbid(unsafe_code)]

pub mod paths;
pub mod quarantine;
pub mod results;
pub mod signed;
mod state;

pub use state::TrainState;
use ulmus_types::ErrorKind;

/// A file whose content is not in its format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file} cannot be read: {reason}")]
pub struct FormatError {
    /// Path of the file, relative to the run folder or to the file's own folder in it.
    pub file: String,
    /// What is wrong with the content.
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
