//! Errors of reading and training tokenizers.

use ulmus_types::ErrorKind;

/// Why a tokenizer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// The file is only a Git LFS pointer.
    #[error("{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")]
    Pointer {
        /// The name of the file.
        file: String,
    },
    /// The text is too little or too uniform for a tokenizer of that size.
    #[error(
        "the text gives a tokenizer of {found} pieces, not of {wanted}; set tokenizer.pieces to at most {found}, or train it on \
         more text (tokenizer.sample bounds how much of the text is read)"
    )]
    FewPieces {
        /// The pieces that it gives.
        found: usize,
        /// The pieces that are asked for.
        wanted: usize,
    },
    /// The file is not a tokenizer, or one of an unsupported kind; or training failed.
    #[error("{what} is not a usable tokenizer: {reason}")]
    Unusable {
        /// The name of the file, or of the training sample.
        what: String,
        /// What is wrong, and what to do about it.
        reason: String,
    },
}

impl TokenizerError {
    /// What the caller can do about the error.
    pub const fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidInput
    }
}
