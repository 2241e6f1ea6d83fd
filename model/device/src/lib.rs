//! Opens the backend for a device that a person has named.

#![forbid(unsafe_code)]

use ulmus_backend::BackendError;
use ulmus_cpu::Cpu;
use ulmus_cuda::Cuda;
use ulmus_plan::Device;

/// The backend of an open device.
#[derive(Debug, Clone)]
pub enum AnyBackend {
    /// The processor.
    Cpu(Cpu),
    /// A GPU.
    Cuda(Cuda),
}

impl AnyBackend {
    /// Opens a device for worker number `nth` of this machine. The CPU uses `threads` threads.
    ///
    /// # Errors
    /// [`BackendError::Device`] if a GPU was requested, or its driver shows one, but it cannot be used. Nothing falls
    /// back to the CPU silently, because the run would be many times slower.
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
