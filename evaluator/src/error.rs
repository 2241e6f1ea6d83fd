//! What can go wrong in an evaluation.

use std::path::PathBuf;

use ulmus_backend::BackendError;
use ulmus_dataloader::DataError;
use ulmus_model::ModelError;
use ulmus_tokenizer::TokenizerError;
use ulmus_types::ErrorKind;

/// An error of the evaluator crate.
#[derive(Debug, thiserror::Error)]
pub enum EvaluatorError {
    /// The device cannot be used.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The model cannot be read or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The texts or the tokenizer cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A directory does not hold an exported model.
    #[error("{} is not a model folder: it has no {missing}; name a folder such as runs/NAME/export", path.display())]
    NotAModel {
        /// The directory that was named.
        path: PathBuf,
        /// A file that every model folder has.
        missing: &'static str,
    },
    /// A file is only a Git LFS pointer.
    #[error("{} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository", path.display())]
    Pointer {
        /// The pointer.
        path: PathBuf,
    },
    /// Tokenizer and model do not belong together.
    #[error("the tokenizer in {} does not fit its model: {reason}; use the files of a single export", path.display())]
    Mismatch {
        /// The model folder.
        path: PathBuf,
        /// What differs, with both values.
        reason: String,
    },
    /// No texts can be read from a path.
    #[error("{}: {reason}", path.display())]
    Texts {
        /// The path that was named.
        path: PathBuf,
        /// Why it cannot be read, and what to do about it.
        reason: &'static str,
    },
    /// There is nothing to score.
    #[error("there is no text to evaluate in {0}; name files with at least one document that is not empty")]
    NoText(String),
    /// The model cannot process the lengths of a benchmark.
    #[error(
        "{prompt} prompt tokens and {generate} generated ones cannot be timed with a context of {context}: \
         use --prompt of at least 1, --generate of at least 2, and a sum of at most {context}"
    )]
    Lengths {
        /// Prompt tokens.
        prompt: usize,
        /// Tokens to generate.
        generate: usize,
        /// The model's maximum context length.
        context: usize,
    },
}

impl EvaluatorError {
    /// What the caller can do about the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Backend(error) => error.kind(),
            Self::Model(error) => error.kind(),
            Self::Data(error) => error.kind(),
            Self::Tokenizer(error) => error.kind(),
            _ => ErrorKind::InvalidInput,
        }
    }
}
