//! Copies from the device to the host that go on beside its kernels: on a stream of their own, into page-locked memory.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;
use ulmus_backend::HostCopy;

use super::driver::{Address, Device, Mark, Stream};

/// The copies of a device.
pub(super) struct Copies {
    device: Arc<Device>,
    stream: Stream,
    /// The last of the kernels that are copied after.
    before: Mark,
    /// The last copy of those that kernels come after.
    behind: Mark,
    /// All memory that was ever copied to, but what no later copy fitted: locking pages takes longer than copying.
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
            before: Mark::new(device),
            behind: Mark::new(device),
            memory: Mutex::default(),
        }
    }

    /// Begins to copy `len` numbers, after the kernels called so far. `None` if the host locks no more memory.
    pub(super) fn begin(&self, from: Address, len: usize) -> Option<PinnedCopy> {
        let memory = self.memory(len)?;
        self.before.record();
        self.stream.wait_for(&self.before);
        // SAFETY: nobody else has this memory, and whoever gets the copy waits for the mark behind it.
        self.stream.download(from, unsafe { std::slice::from_raw_parts_mut(memory.address, len) });
        let arrived = Mark::new(&self.device);
        arrived.record_behind(&self.stream);
        Some(PinnedCopy { memory, arrived })
    }

    /// Kernels called from now on come after all copies that were begun.
    pub(super) fn finish(&self) {
        self.behind.record_behind(&self.stream);
        self.device.wait_for(&self.behind);
    }

    /// Memory that nobody else has.
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

/// Page-locked memory of the host, which the device fills by itself.
struct Pinned {
    address: *mut f32,
    len: usize,
    device: Arc<Device>,
}

// SAFETY: it is memory like any other for the host.
unsafe impl Send for Pinned {}
// SAFETY: as above; it is written by the device alone, before anybody can read it.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(device: &Arc<Device>, len: usize) -> Option<Self> {
        device.bind();
        // SAFETY: the context is bound. The driver refuses 0 bytes, and what the host does not have.
        let memory = unsafe { result::malloc_host(len * size_of::<f32>(), 0) };
        memory.ok().map(|memory| Self { address: memory.cast(), len, device: Arc::clone(device) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.device.try_bind();
        // SAFETY: allocated in `new`, freed once. What fails goes with the process.
        unsafe { result::free_host(self.address.cast()) }.ok();
    }
}

/// A copy in page-locked memory.
pub(super) struct PinnedCopy {
    memory: Arc<Pinned>,
    arrived: Mark,
}

impl fmt::Debug for PinnedCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedCopy").field("len", &self.memory.len).finish_non_exhaustive()
    }
}

impl HostCopy for PinnedCopy {
    fn values(&self) -> &[f32] {
        self.arrived.wait();
        // SAFETY: the device has written all of it, and nobody else writes as long as this copy has it.
        unsafe { std::slice::from_raw_parts(self.memory.address, self.memory.len) }
    }
}

impl Drop for PinnedCopy {
    fn drop(&mut self) {
        // The memory is free for others afterwards. A device that is lost writes it no more.
        self.arrived.try_wait().ok();
    }
}
