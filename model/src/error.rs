//! What can go wrong with a model, and what its caller can do about it.

use std::path::{Path, PathBuf};

use ulmus_backend::BackendError;
use ulmus_types::ErrorKind;

/// An error of the model crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A batch or a text does not fit the model or its buffers.
    #[error("micro-batch refused: {0}")]
    Batch(String),
    /// A gradient is NaN, infinite or too large for the exact sum.
    #[error(
        "a gradient is not finite or above {limit:e}, the most that one micro-batch may add; \
         lower max_lr or look at the data of this step"
    )]
    GradientRange {
        /// The largest magnitude that one micro-batch may add.
        limit: f64,
    },
    /// The norm of the mean gradient is NaN or infinite.
    #[error("the gradient norm is {norm}; the weights were left as they were; lower max_lr")]
    GradientNorm {
        /// The norm.
        norm: f64,
    },
    /// A file could not be read or written.
    #[error("cannot {act} {}: {source}", path.display())]
    File {
        /// What was tried: "read" or "write".
        act: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file of a model directory does not have the right contents.
    #[error("{}: {problem}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and what is accepted.
        problem: String,
    },
    /// A file is not complete.
    #[error("{} was cut or damaged: {problem}; fetch it again from its origin", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An adapter cannot be made for the model, or does not belong to it.
    #[error("adapter refused: {0}")]
    Adapter(String),
    /// Tensors do not belong to this model.
    #[error("tensors refused: {0}")]
    Tensors(String),
}

impl ModelError {
    pub(crate) fn format(path: &Path, problem: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), problem: problem.into() }
    }

    /// For `map_err` after an attempt to `act` ("read", "write") on `path`.
    pub(crate) fn file(act: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { act, path: path.to_owned(), source }
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Backend(error) => error.kind(),
            Self::Batch(_)
            | Self::GradientRange { .. }
            | Self::GradientNorm { .. }
            | Self::Format { .. }
            | Self::Adapter(_) => ErrorKind::InvalidInput,
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                ErrorKind::InvalidInput
            }
            Self::File { .. } => ErrorKind::Internal,
            Self::Damaged { .. } | Self::Tensors(_) => ErrorKind::Corrupt,
        }
    }
}
