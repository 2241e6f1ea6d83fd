//! Opens the backend for a device that a person has named.

#![forbid(unsafe_code)]

use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};
use ulmus_backend::{Backend, BackendError};
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

    /// What the device is, in words for a person, with the name of the processor or of the GPU.
    pub fn describe(&self) -> String {
        match self {
            Self::Cpu(cpu) => format!("{}, {}", cpu.describe(), processor()),
            Self::Cuda(cuda) => cuda.describe(),
        }
    }

    /// Bytes of memory that the device has: those of the GPU, or those of the machine that this process may use; 0 if the
    /// system does not say.
    pub fn memory(&self) -> u64 {
        match self {
            Self::Cpu(_) => {
                let memory = MemoryRefreshKind::nothing().with_ram();
                let Ok(system) = System::new_with_specifics(RefreshKind::nothing().with_memory(memory))
                else {
                    return 0;
                };
                let allowed = system.cgroup_limits().map(|limits| limits.total_memory);
                allowed.unwrap_or(u64::MAX).min(system.total_memory())
            }
            Self::Cuda(cuda) => cuda.memory(),
        }
    }
}

/// The name of the processor, or `unknown processor` where the system does not say.
pub fn processor() -> String {
    let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
    let named = system.ok().and_then(|system| Some(system.cpus().first()?.brand().trim().to_owned()));
    named.filter(|name| !name.is_empty()).unwrap_or_else(|| "unknown processor".to_owned())
}
