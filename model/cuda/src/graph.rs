//! Passes that are captured as CUDA graphs and replayed.

use std::fmt;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::driver::Device;
use super::handle::must;

/// A pass that runs directly the first time, is captured as a CUDA graph the second time, and replayed from then on. So
/// modules, algorithms and scratch memory exist before the capture. When algorithms are chosen anew, it starts over.
#[derive(Debug, Default)]
pub struct Graph {
    state: State,
    /// How often algorithms had been chosen at the first run.
    choices: usize,
}

#[derive(Default)]
enum State {
    #[default]
    New,
    Warm,
    Captured {
        graph: sys::CUgraphExec,
        device: Arc<Device>,
    },
}

// SAFETY: driver handles may be used from any thread that has bound the context, which every method here ensures.
unsafe impl Send for State {}
// SAFETY: a shared reference gives no access to the handle; a graph is launched through `&mut`.
unsafe impl Sync for State {}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "New",
            Self::Warm => "Warm",
            Self::Captured { .. } => "Captured",
        })
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Self::Captured { graph, device } = self {
            device.try_bind();
            // SAFETY: the stream lives as long as the device, and the graph, which was instantiated once, is destroyed
            // only here, after its work is done. If this fails, it is freed with the process.
            unsafe {
                result::stream::synchronize(device.stream()).ok();
                result::graph::exec_destroy(*graph).ok();
            }
        }
    }
}

impl Graph {
    /// See [`ulmus_backend::Backend::replay`].
    pub(super) fn replay(&mut self, device: &Arc<Device>, work: impl FnOnce()) {
        device.bind();
        let choices = device.matmul().choices();
        if self.choices != choices {
            *self = Self { state: State::New, choices };
        }
        match self.state {
            // The kernels of a graph cannot be timed separately.
            _ if !device.captures_graphs() => return work(),
            State::New => {
                work();
                self.state = State::Warm;
                return;
            }
            State::Warm => {
                self.state =
                    State::Captured { graph: capture(device.stream(), work), device: Arc::clone(device) };
            }
            State::Captured { .. } => {}
        }
        if let State::Captured { graph, .. } = &self.state {
            // SAFETY: the graph was captured on this device, and the caller replays it with views of the same buffers.
            must("replay a pass", unsafe { result::graph::launch(*graph, device.stream()) });
        }
    }
}

/// Captures the kernels that `work` launches on the stream of a device.
fn capture(stream: sys::CUstream, work: impl FnOnce()) -> sys::CUgraphExec {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: the caller's device keeps the stream alive, and no capture is in progress.
    must("begin to capture a pass", unsafe { result::stream::begin_capture(stream, mode) });
    work();
    // SAFETY: the capture was begun above.
    let graph = must("capture a pass", unsafe { result::stream::end_capture(stream) });
    let flags = sys::CUgraphInstantiate_flags(0);
    // SAFETY: the graph is complete, and is not needed once it is instantiated.
    unsafe {
        let ready = must("instantiate a graph", result::graph::instantiate(graph, flags));
        must("destroy a graph", result::graph::destroy(graph));
        ready
    }
}
