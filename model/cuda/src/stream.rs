//! Streams beside the one of the device's kernels, and events that order their work.

use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::driver::Device;
use super::handle::{Address, must};

/// A stream beside the one of the device's kernels, with a higher priority.
pub(super) struct Stream {
    raw: sys::CUstream,
    device: Arc<Device>,
}

// SAFETY: driver handles may be used from any thread that has bound the context, which every method here ensures.
unsafe impl Send for Stream {}
// SAFETY: driver handles may be used from several threads at the same time.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(device: &Arc<Device>) -> Self {
        device.bind();
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is valid, and the call writes the handle. A priority out of range is clamped.
        let created = unsafe { sys::cuStreamCreateWithPriority(&raw mut raw, flags, i32::MIN) }.result();
        must("create a stream", created);
        Self { raw, device: Arc::clone(device) }
    }

    /// The handle, for libraries that put work on the stream.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Work that is put on the stream from now on begins after `event`.
    pub(super) fn wait_for(&self, event: &Event) {
        event.precede(self.raw);
    }

    /// Copies to the host, after all earlier work of the stream. The copy may still be in progress when this returns.
    pub(super) fn download<T: bytemuck::Pod>(&self, from: Address, to: &mut [T]) {
        self.device.bind();
        // SAFETY: the caller owns as many bytes on the device, and waits for the copy before it uses `to`.
        must("copy from it", unsafe { result::memcpy_dtoh_async(to, from.0, self.raw) });
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.device.try_bind();
        // SAFETY: the stream was created in `new`, and is destroyed only here. Its remaining work still completes.
        unsafe { result::stream::destroy(self.raw) }.ok();
    }
}

/// A point in the order of a device's work (a CUDA event).
pub(super) struct Event {
    event: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: driver handles may be used from any thread that has bound the context, which every method here ensures.
unsafe impl Send for Event {}
// SAFETY: driver handles may be used from several threads at the same time.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(device: &Arc<Device>) -> Self {
        device.bind();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = must("create an event", result::event::create(flags));
        Self { event, device: Arc::clone(device) }
    }

    /// Moves the event after all kernels that were launched so far.
    pub(super) fn record(&self) {
        self.record_on(self.device.stream());
    }

    /// Moves the event after all earlier work of `stream`.
    pub(super) fn record_behind(&self, stream: &Stream) {
        self.record_on(stream.raw);
    }

    fn record_on(&self, stream: sys::CUstream) {
        self.device.bind();
        // SAFETY: the event lives as long as `self`, and the callers borrow the stream's owner.
        must("record an event", unsafe { result::event::record(self.event, stream) });
    }

    /// Kernels that are launched from now on begin after the event.
    pub(super) fn precede_kernels(&self) {
        self.device.bind();
        self.precede(self.device.stream());
    }

    fn precede(&self, stream: sys::CUstream) {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event lives as long as `self`, and the callers borrow the stream's owner.
        must("let work wait", unsafe { result::stream::wait_event(stream, self.event, flags) });
    }

    /// Waits until everything before the event is done.
    pub(super) fn wait(&self) {
        must("finish its work", self.try_wait());
    }

    /// Like [`Event::wait`], but returns an error if the device cannot be used any more.
    pub(super) fn try_wait(&self) -> Result<(), DriverError> {
        self.device.try_bind();
        // SAFETY: the event lives as long as `self`.
        unsafe { result::event::synchronize(self.event) }
    }

    /// Whether everything before the event is done.
    pub(super) fn is_reached(&self) -> bool {
        // SAFETY: the event lives as long as `self`.
        match unsafe { result::event::query(self.event) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => false,
            done => {
                must("finish its work", done);
                true
            }
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.device.try_bind();
        // SAFETY: the event was created in `new`, and is destroyed only here. It need not have been reached.
        unsafe { result::event::destroy(self.event) }.ok();
    }
}
