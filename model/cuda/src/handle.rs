//! The smallest pieces of the driver: addresses, fatal errors, and a timer.

use std::fmt;

use cudarc::driver::{DriverError, result, sys};

/// An address on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Address(pub u64);

impl Address {
    pub(super) const NULL: Self = Self(0);

    pub(super) fn add(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Ends this thread, and so the process, because the results of the device are lost.
#[expect(clippy::panic, reason = "kernels return no errors, because nothing could continue after one")]
pub(super) fn lost(act: &str, problem: impl fmt::Display) -> ! {
    panic!("the GPU failed to {act}: {problem}; its results are lost, so this process cannot continue")
}

pub(super) fn must<T>(act: &str, result: Result<T, DriverError>) -> T {
    result.unwrap_or_else(|error| lost(act, format_args!("{error:?}")))
}

/// Measures how long the device takes for some work.
pub(super) struct Timer([sys::CUevent; 2]);

impl Timer {
    /// Creates a timer. The context must be bound, here and in all other methods.
    pub(super) fn new() -> Self {
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        Self([(); 2].map(|()| must("create an event", event())))
    }

    pub(super) fn start(&self, stream: sys::CUstream) {
        // SAFETY: the event lives as long as the timer, and the caller's stream is alive.
        must("record an event", unsafe { result::event::record(self.0[0], stream) });
    }

    /// Waits for the work that the stream was given since [`Self::start`], and returns its duration in milliseconds.
    pub(super) fn stop(&self, stream: sys::CUstream) -> f32 {
        let [start, end] = self.0;
        // SAFETY: the events live as long as the timer and both are recorded, and the caller's stream is alive.
        unsafe {
            must("record an event", result::event::record(end, stream));
            must("finish its work", result::event::synchronize(end));
            must("measure the time", result::event::elapsed(start, end))
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        for event in self.0 {
            // SAFETY: the event was created in `new`, and is destroyed only here.
            unsafe { result::event::destroy(event) }.ok();
        }
    }
}
