//! From what a person calls a device to a backend.

#![forbid(unsafe_code)]

use ulmus_backend::BackendError;
use ulmus_cpu::Cpu;
use ulmus_cuda::Cuda;
use ulmus_plan::Device;

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
    /// [`BackendError::Device`] if a GPU is asked for, or shown by its driver, and cannot be used: a run that
    /// goes on many times slower unasked serves nobody.
    pub fn new(device: Device, threads: usize, nth: usize) -> Result<Self, BackendError> {
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
