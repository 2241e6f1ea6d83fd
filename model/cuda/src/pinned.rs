//! Copies from the device to the host that run concurrently with kernels: on their own stream, into page-locked memory.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;
use ulmus_backend::HostCopy;

use super::driver::Device;
use super::handle::Address;
use super::stream::{Event, Stream};

/// The copies of a device.
pub(super) struct Copies {
    device: Arc<Device>,
    stream: Stream,
    /// Comes after the kernels that the latest copy waits for.
    before: Event,
    /// Comes after the copies that the next kernels wait for.
    behind: Event,
    /// Memory of earlier copies, which is reused because locking pages takes longer than copying. Unused memory of
    /// another size is freed.
    memory: Mutex<Vec<Arc<Pinned>>>,
}

impl fmt::Debug for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copies").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Copies {
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            device: Arc::clone(device),
            stream: Stream::new(device),
            before: Event::new(device),
            behind: Event::new(device),
            memory: Mutex::default(),
        }
    }

    /// Begins to copy `len` numbers, after the kernels that were launched so far. `None` if the host cannot lock the
    /// memory.
    pub(super) fn begin(&self, from: Address, len: usize) -> Option<PinnedCopy> {
        let memory = self.memory(len)?;
        self.before.record();
        self.stream.wait_for(&self.before);
        // SAFETY: this memory is used by no other copy, and the copy's owner waits for the event behind it.
        self.stream.download(from, unsafe { std::slice::from_raw_parts_mut(memory.address, len) });
        let arrived = Event::new(&self.device);
        arrived.record_behind(&self.stream);
        Some(PinnedCopy { memory, arrived })
    }

    /// Kernels that are launched from now on run after all copies that were begun.
    pub(super) fn finish(&self) {
        self.behind.record_behind(&self.stream);
        self.behind.precede_kernels();
    }

    /// Memory for `len` numbers that no other copy uses.
    fn memory(&self, len: usize) -> Option<Arc<Pinned>> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |pinned: &mut Arc<Pinned>| Arc::get_mut(pinned).is_some();
        if let Some(at) = memory.iter_mut().position(|pinned| pinned.len == len && idle(pinned)) {
            return Some(Arc::clone(&memory[at]));
        }
        memory.retain_mut(|pinned| !idle(pinned));
        let pinned = Arc::new(Pinned::new(&self.device, len)?);
        memory.push(Arc::clone(&pinned));
        Some(pinned)
    }
}

/// Page-locked memory of the host, which the device writes.
struct Pinned {
    address: *mut f32,
    len: usize,
    device: Arc<Device>,
}

// SAFETY: for the host it is ordinary memory, which may be freed by any thread that has bound the context.
unsafe impl Send for Pinned {}
// SAFETY: only the device writes it, and readers wait until it is done.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(device: &Arc<Device>, len: usize) -> Option<Self> {
        device.bind();
        // SAFETY: the context is bound. The driver returns an error for 0 bytes, or if the host lacks the memory.
        let memory = unsafe { result::malloc_host(len * size_of::<f32>(), 0) };
        memory.ok().map(|memory| Self { address: memory.cast(), len, device: Arc::clone(device) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.device.try_bind();
        // SAFETY: the memory was allocated in `new`, and is freed only here. If that fails, it is freed with the
        // process.
        unsafe { result::free_host(self.address.cast()) }.ok();
    }
}

/// A copy in page-locked memory.
pub(super) struct PinnedCopy {
    memory: Arc<Pinned>,
    arrived: Event,
}

impl fmt::Debug for PinnedCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedCopy").field("len", &self.memory.len).finish_non_exhaustive()
    }
}

impl HostCopy for PinnedCopy {
    fn values(&self) -> &[f32] {
        self.arrived.wait();
        // SAFETY: the device has written all of the memory, and no other copy uses it as long as this one lives.
        unsafe { std::slice::from_raw_parts(self.memory.address, self.memory.len) }
    }
}

impl Drop for PinnedCopy {
    fn drop(&mut self) {
        // Afterwards, other copies may use the memory. A failed device no longer writes to it.
        self.arrived.try_wait().ok();
    }
}
