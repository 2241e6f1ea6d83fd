//! From what a person calls a device to a backend.

use ulmus_plan::Device;

use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::error::ModelError;

/// A device that is ready.
#[derive(Debug, Clone)]
pub enum AnyBackend {
    /// The processor.
    Cpu(Cpu),
    /// A GPU.
    Cuda(Cuda),
}

impl AnyBackend {
    /// Opens a device for the `nth` worker of this machine, with that many threads if it is the processor.
    ///
    /// # Errors
    /// [`ModelError::Device`] if a GPU is asked for, or shown by its driver, and cannot be used: a run that
    /// goes on many times slower unasked serves nobody.
    pub fn new(device: Device, threads: usize, nth: usize) -> Result<Self, ModelError> {
        let gpus = || Cuda::devices();
        let ordinal = match device {
            Device::Cpu => None,
            Device::Auto => nth.checked_rem(gpus()),
            Device::Cuda(Some(ordinal)) => Some(ordinal),
            Device::Cuda(None) => Some(nth.checked_rem(gpus()).unwrap_or(0)),
        };
        Ok(match ordinal {
            None => Self::Cpu(Cpu::new(threads)),
            Some(ordinal) => Self::Cuda(Cuda::new(ordinal)?),
        })
    }
}
