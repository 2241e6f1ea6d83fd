//! What can go wrong with a device, and what its caller can do about it.

use ulmus_types::ErrorKind;

/// An error of a device.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The device has no room for a buffer.
    #[error("no memory for a buffer of {bytes} bytes; use a smaller train.micro_batch or model")]
    OutOfMemory {
        /// Size of the buffer that did not fit.
        bytes: usize,
    },
    /// The device cannot be used.
    #[error("GPU {ordinal} cannot be used: {problem}")]
    Device {
        /// The number of the GPU.
        ordinal: usize,
        /// Why, and what is needed.
        problem: String,
    },
    /// A text that should name algorithms does not.
    #[error("names of algorithms refused: {0}")]
    Algorithms(String),
}

impl BackendError {
    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::OutOfMemory { .. } | Self::Device { .. } => ErrorKind::InvalidInput,
            Self::Algorithms(_) => ErrorKind::Corrupt,
        }
    }
}
