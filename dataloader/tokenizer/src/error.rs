//! What can be wrong with a tokenizer.

use ulmus_types::ErrorKind;

/// Why a tokenizer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// A file that stands for one in Git LFS.
    #[error("{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository")]
    Pointer {
        /// The file.
        file: String,
    },
    /// It is no tokenizer, or one that is not known.
    #[error("{what} is not a usable tokenizer: {reason}")]
    Unusable {
        /// The file, or the training.
        what: String,
        /// What is wrong, and what to do.
        reason: String,
    },
}

impl TokenizerError {
    /// What can be done about it.
    pub const fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidInput
    }
}
