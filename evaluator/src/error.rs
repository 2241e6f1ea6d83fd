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
    /// A directory that is no exported model.
    #[error("{} is not a model folder: it has no {missing}; name a folder such as runs/NAME/export", path.display())]
    NotAModel {
        /// What was given.
        path: PathBuf,
        /// The file that a model folder has.
        missing: &'static str,
    },
    /// A file that stands for one in Git LFS.
    #[error("{} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository", path.display())]
    Pointer {
        /// The file.
        path: PathBuf,
    },
    /// Tokenizer and model do not belong together.
    #[error("the tokenizer in {} does not fit its model: {reason}; put the files of one export together", path.display())]
    Mismatch {
        /// The model folder.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
    /// A path of texts that cannot be used.
    #[error("{}: {reason}", path.display())]
    Texts {
        /// What was given.
        path: PathBuf,
        /// Why not, and what to give instead.
        reason: &'static str,
    },
    /// Nothing to score.
    #[error("there is no text to evaluate in {0}; name files with at least one document that is not empty")]
    NoText(String),
    /// A benchmark of lengths that the model cannot process.
    #[error(
        "{prompt} prompt tokens and {generate} generated ones cannot be timed with a context of {context}: \
         use --prompt of at least 1, --generate of at least 2, and {context} together at most"
    )]
    Lengths {
        /// Prompt tokens.
        prompt: usize,
        /// Tokens to generate.
        generate: usize,
        /// Longest text of the model.
        context: usize,
    },
}

impl EvaluatorError {
    /// What can be done about it.
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
