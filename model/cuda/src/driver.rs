//! The driver: a device with one stream, its memory, kernels and recorded passes.
//!
//! Everything that a process does on a device goes through one stream and so happens in the order of the calls.
//! A device that fails in the middle of a pass has lost what it was computing, and nothing on it can be used again: the
//! error ends the process, with the driver's words, and the run goes on without it.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, DriverError, result, sys};
use ulmus_backend::BackendError;

use super::compiler::Compiler;
use super::matmul::{self, Matmul};
use super::program::Variant;

/// A device of this process.
pub(super) struct Device {
    stream: sys::CUstream,
    name: String,
    compiler: Compiler,
    modules: Mutex<BTreeMap<Variant, Module>>,
    matmul: Mutex<Matmul>,
    /// What kernels need for the length of a call; grown, never given back, as recorded passes know its addresses.
    scratch: Mutex<Vec<Raw>>,
    /// Whether each kernel is waited for.
    serialized: AtomicBool,
    /// Whether kernels can wait for the ones before themselves.
    programmatic_launch: bool,
    /// Whether passes are recorded.
    cuda_graphs: bool,
    /// Whether the device reads the host's memory by itself, and so maybe later.
    reads_host: bool,
    // The last, as all of the above is given back within it.
    context: Arc<CudaContext>,
}

// SAFETY: handles of the driver may be used from any thread that has the context bound, which every call here sees to.
unsafe impl Send for Device {}
// SAFETY: as above; what is changed is behind locks.
unsafe impl Sync for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Ends this thread, and so the process: what the device was computing is lost.
#[expect(clippy::panic, reason = "kernels have no way to fail, as nothing could go on after it")]
pub(super) fn lost(act: &str, problem: impl fmt::Display) -> ! {
    panic!("the GPU failed to {act}: {problem}; what it was computing is lost, so this process cannot go on")
}

fn must<T>(act: &str, result: Result<T, DriverError>) -> T {
    result.unwrap_or_else(|error| lost(act, format_args!("{error:?}")))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of devices; 0 without a driver.
pub(super) fn count() -> usize {
    // SAFETY: only looks whether the library can be loaded.
    let present = unsafe { sys::is_culib_present() };
    let count = || result::init().and_then(|()| result::device::get_count());
    if present { count().map_or(0, |count| count.max(0) as usize) } else { 0 }
}

impl Device {
    pub(super) fn open(ordinal: usize) -> Result<Arc<Self>, BackendError> {
        let refused = |problem: String| BackendError::Device { ordinal, problem };
        let driver = |error: DriverError| refused(format!("the driver says {error:?}"));
        if count() == 0 {
            return Err(refused("there is no NVIDIA driver, or it has no device".to_owned()));
        }
        let context = CudaContext::new(ordinal).map_err(driver)?;
        let name = context.name().map_err(driver)?;
        let capability = context.compute_capability().map_err(driver)?;
        if capability < (8, 0) {
            let (major, minor) = capability;
            return Err(refused(format!(
                "{name} has compute capability {major}.{minor}; 8.0 or more is needed"
            )));
        }
        let compiler = Compiler::new(capability).map_err(refused)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(driver)?;
        let matmul = Mutex::new(Matmul::new(stream).map_err(refused)?);
        let (modules, scratch, serialized) = (Mutex::default(), Mutex::default(), AtomicBool::default());
        let cuda_graphs = std::env::var_os("ULMUS_GPU_SERIAL").is_none_or(|set| set.is_empty());
        let programmatic_launch = cuda_graphs && capability >= (9, 0);
        let host_tables =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES;
        let reads_host = context.attribute(host_tables).map_err(driver)? != 0;
        Ok(Arc::new(Self {
            stream,
            name,
            compiler,
            modules,
            matmul,
            scratch,
            serialized,
            programmatic_launch,
            cuda_graphs,
            reads_host,
            context,
        }))
    }

    /// Name of the device, and versions of the libraries that decide what it computes.
    pub(super) fn describe(&self) -> String {
        let (major, minor) = self.compiler.version();
        let [blas_major, blas_minor, blas_patch] = matmul::version();
        format!("{}, CUDA {major}.{minor}, cuBLAS {blas_major}.{blas_minor}.{blas_patch}", self.name)
    }

    pub(super) fn bind(&self) {
        must("be used by a thread", self.context.bind_to_thread());
    }

    /// Like [`Device::bind`]; says whether it is done.
    pub(super) fn try_bind(&self) -> bool {
        self.context.bind_to_thread().is_ok()
    }

    /// Waits until everything called so far is done.
    fn synchronise(&self) {
        self.bind();
        // SAFETY: the stream lives as long as the device.
        must("finish its work", unsafe { result::stream::synchronize(self.stream) });
    }

    /// From now on each kernel is waited for.
    pub(super) fn serialize(&self) {
        self.serialized.store(true, Ordering::Relaxed);
    }

    pub(super) fn wait_if_serialized(&self) {
        if self.serialized.load(Ordering::Relaxed) {
            self.synchronise();
        }
    }

    /// Products of matrices.
    pub(super) fn matmul(&self) -> MutexGuard<'_, Matmul> {
        self.bind();
        lock(&self.matmul)
    }

    /// At least that many bytes for kernels of one call.
    ///
    /// # Panics
    /// If the device has not so much.
    pub(super) fn scratch(self: &Arc<Self>, bytes: usize) -> Address {
        let mut scratch = lock(&self.scratch);
        if let Some(raw) = scratch.iter().find(|raw| raw.bytes >= bytes) {
            return Address(raw.address);
        }
        let raw =
            Raw::new(self, bytes.next_power_of_two()).unwrap_or_else(|error| lost("give out scratch", error));
        let address = Address(raw.address);
        scratch.push(raw);
        address
    }

    /// Starts a kernel: `blocks` of `threads`, which share `shared` bytes of memory. Arguments are those of its
    /// definition, in number, order and size.
    pub(super) fn launch(
        &self,
        variant: Variant,
        kernel: &'static str,
        [blocks, threads]: [[usize; 3]; 2],
        shared: usize,
        arguments: &mut [*mut c_void],
    ) {
        if blocks.contains(&0) {
            return;
        }
        self.bind();
        let function = self.function(variant, kernel, shared);
        // The kernel may be brought on its way while the ones before still run: it waits for them itself.
        let mut ahead = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let [blocks_x, blocks_y, blocks_z] = blocks.map(|count| count as u32);
        let [threads_x, threads_y, threads_z] = threads.map(|count| count as u32);
        let config = sys::CUlaunchConfig {
            gridDimX: blocks_x,
            gridDimY: blocks_y,
            gridDimZ: blocks_z,
            blockDimX: threads_x,
            blockDimY: threads_y,
            blockDimZ: threads_z,
            sharedMemBytes: shared as u32,
            hStream: self.stream,
            attrs: &raw mut ahead,
            numAttrs: u32::from(self.programmatic_launch),
        };
        // SAFETY: the arguments point to values that live through the call, which copies them; addresses among them are
        // of views that the caller borrows, and the stream's order keeps them valid until the kernel is done.
        let result = unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        }
        .result();
        if result.is_err() {
            tracing::error!(kernel, ?blocks, ?threads, shared, "launch refused");
        }
        must(&format!("start {kernel}"), result);
    }

    fn function(&self, variant: Variant, kernel: &'static str, shared: usize) -> sys::CUfunction {
        let mut modules = lock(&self.modules);
        let module = modules.entry(variant).or_insert_with(|| {
            let image = self
                .compiler
                .compile(variant)
                .unwrap_or_else(|problem| lost(&format!("compile {}", variant.program.file()), problem));
            // SAFETY: the image is a whole cubin.
            let handle = must("load a module", unsafe { result::module::load_data(image.as_ptr().cast()) });
            Module { handle, functions: BTreeMap::new() }
        });
        *module.functions.entry(kernel).or_insert_with(|| {
            let name = CString::new(kernel).expect("names of kernels have no zero byte");
            // SAFETY: the module is loaded.
            let function = must(kernel, unsafe { result::module::get_function(module.handle, name) });
            // More than 48 KiB have to be asked for, together with what the kernel declares.
            if shared > 0 {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function is loaded.
                let set =
                    unsafe { result::function::set_function_attribute(function, attribute, shared as i32) };
                must(kernel, set);
            }
            function
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // What cannot be given back now goes with the process.
        if self.context.bind_to_thread().is_ok() {
            lock(&self.scratch).clear();
            for (_, module) in std::mem::take(&mut *lock(&self.modules)) {
                // SAFETY: nothing runs any more: buffers and graphs keep the device alive.
                unsafe { result::module::unload(module.handle) }.ok();
            }
            // SAFETY: as above.
            unsafe { result::stream::destroy(self.stream) }.ok();
        }
    }
}

/// A compiled file of kernels.
struct Module {
    handle: sys::CUmodule,
    functions: BTreeMap<&'static str, sys::CUfunction>,
}

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

/// What a kernel takes by value.
///
/// # Safety
/// The type has the layout that the kernel's definition gives it.
pub(super) unsafe trait Argument {}

// SAFETY: a pointer of 8 bytes.
unsafe impl Argument for Address {}
// SAFETY: `int`.
unsafe impl Argument for i32 {}
// SAFETY: `long long`.
unsafe impl Argument for i64 {}
// SAFETY: `float`.
unsafe impl Argument for f32 {}
// SAFETY: `double`.
unsafe impl Argument for f64 {}

/// Rows of heads, as in attention.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct HeadRows {
    /// First row of the first head of the first sequence.
    pub base: Address,
    /// Elements from a sequence to the next.
    pub sequence: i64,
    /// Elements from a head to the next.
    pub head: i64,
    /// Elements from a row to the next.
    pub row: i64,
}
// SAFETY: a pointer and three `long long`.
unsafe impl Argument for HeadRows {}

/// Some columns of rows, as in naive.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct ColumnRows {
    /// First column of the first row.
    pub base: Address,
    /// Elements from a row to the next.
    pub stride: i32,
}
// SAFETY: a pointer and an `int`.
unsafe impl Argument for ColumnRows {}

/// A matrix for inference, as in matvec.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct MatrixData {
    pub values: Address,
    pub scales: Address,
}
// SAFETY: two pointers.
unsafe impl Argument for MatrixData {}

/// As in optimizer.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AdamWStep {
    pub gradient_scale: f32,
    pub decay: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub step_size: f32,
    pub second_correction: f32,
    pub epsilon: f32,
}
// SAFETY: seven `float`.
unsafe impl Argument for AdamWStep {}

/// Where an argument is, for the driver.
pub(super) fn argument<T: Argument>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// Memory without an owner that keeps the device.
struct Raw {
    address: u64,
    bytes: usize,
}

impl Raw {
    fn new(device: &Device, bytes: usize) -> Result<Self, BackendError> {
        device.bind();
        // SAFETY: the context is bound; the driver refuses 0 bytes, which an empty buffer need not have.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => Ok(Self { address, bytes }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(BackendError::OutOfMemory { bytes })
            }
            Err(error) => must("give out memory", Err(error)),
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once; freeing waits for what uses it. What fails goes with the process.
        unsafe { result::free_sync(self.address) }.ok();
    }
}

/// Memory of a device. Clones are the same memory, which is given back with the last of them.
#[derive(Clone)]
pub(super) struct Memory(Arc<Owned>);

struct Owned {
    // Before the device, whose context it needs.
    raw: Raw,
    device: Arc<Device>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("bytes", &self.0.raw.bytes).finish_non_exhaustive()
    }
}

impl Memory {
    /// That many bytes of 0.
    pub(super) fn zeroed(device: &Arc<Device>, bytes: usize) -> Result<Self, BackendError> {
        let raw = Raw::new(device, bytes)?;
        device.fill_zero(Address(raw.address), bytes);
        Ok(Self(Arc::new(Owned { raw, device: Arc::clone(device) })))
    }

    pub(super) fn address(&self) -> Address {
        Address(self.0.raw.address)
    }

    /// Whether this is what its work is ordered by.
    pub(super) fn is_of(&self, device: &Arc<Device>) -> bool {
        Arc::ptr_eq(&self.0.device, device)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // The context may be bound to another thread; `Raw` frees next.
        self.device.context.bind_to_thread().ok();
    }
}

impl Device {
    /// Makes bytes 0.
    pub(super) fn fill_zero(&self, to: Address, bytes: usize) {
        if bytes > 0 {
            self.bind();
            // SAFETY: the caller owns these bytes of the device.
            must("clear memory", unsafe { result::memset_d8_async(to.0, 0, bytes, self.stream) });
        }
    }

    /// Copies from the host; the data may change as soon as this returns.
    pub(super) fn upload<T: bytemuck::Pod>(&self, to: Address, from: &[T]) {
        if !from.is_empty() {
            self.bind();
            // SAFETY: the caller owns as many bytes of the device. Pageable memory is read before the driver returns, or,
            // where the device reads it, before this function does.
            must("copy to it", unsafe { result::memcpy_htod_async(to.0, from, self.stream) });
            if self.reads_host {
                self.synchronise();
            }
        }
    }

    /// Kernels called from now on begin after the mark.
    pub(super) fn wait_for(&self, mark: &Mark) {
        self.bind();
        mark.precede(self.stream);
    }

    /// Copies to the host, after everything called so far.
    pub(super) fn download<T: bytemuck::Pod>(&self, from: Address, to: &mut [T]) {
        if !to.is_empty() {
            self.bind();
            // SAFETY: the caller owns as many bytes of the device; `to` is waited for below.
            must("copy from it", unsafe { result::memcpy_dtoh_async(to, from.0, self.stream) });
            self.synchronise();
        }
    }
}

/// A line of work beside that of the device's kernels, and before it where both want the same multiprocessor.
pub(super) struct Stream {
    raw: sys::CUstream,
    device: Arc<Device>,
}

// SAFETY: as for `Device`.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(device: &Arc<Device>) -> Self {
        device.bind();
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the handle is written. A priority beyond the range is its nearest end.
        let made = unsafe { sys::cuStreamCreateWithPriority(&raw mut raw, flags, i32::MIN) }.result();
        must("make a stream", made);
        Self { raw, device: Arc::clone(device) }
    }

    /// For libraries that put work on it.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// What is put on it from now on begins after the mark.
    pub(super) fn wait_for(&self, mark: &Mark) {
        mark.precede(self.raw);
    }

    /// Copies to the host, after all that the stream was given so far; may go on when this has returned.
    pub(super) fn download<T: bytemuck::Pod>(&self, from: Address, to: &mut [T]) {
        self.device.bind();
        // SAFETY: the caller owns as many bytes of the device, and waits before it uses `to`.
        must("copy from it", unsafe { result::memcpy_dtoh_async(to, from.0, self.raw) });
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.device.try_bind();
        // SAFETY: created once, destroyed once; what is still on it is done nevertheless.
        unsafe { result::stream::destroy(self.raw) }.ok();
    }
}

/// A point in the order of a device's work.
pub(super) struct Mark {
    event: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: as for `Device`.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Mark {
    pub(super) fn new(device: &Arc<Device>) -> Self {
        device.bind();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = must("make an event", result::event::create(flags));
        Self { event, device: Arc::clone(device) }
    }

    /// Puts it after all kernels called so far.
    pub(super) fn record(&self) {
        self.record_on(self.device.stream);
    }

    /// Puts it after all that the stream was given so far.
    pub(super) fn record_behind(&self, stream: &Stream) {
        self.record_on(stream.raw);
    }

    fn record_on(&self, stream: sys::CUstream) {
        self.device.bind();
        // SAFETY: the event and the stream are alive.
        must("record an event", unsafe { result::event::record(self.event, stream) });
    }

    fn precede(&self, stream: sys::CUstream) {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the stream and the event are alive.
        must("let work wait", unsafe { result::stream::wait_event(stream, self.event, flags) });
    }

    /// Waits until everything before it is done.
    pub(super) fn wait(&self) {
        must("finish its work", self.try_wait());
    }

    /// Like [`Mark::wait`]; says whether the device can still be used.
    pub(super) fn try_wait(&self) -> Result<(), DriverError> {
        self.device.try_bind();
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.event) }
    }

    /// Whether everything before it is done.
    pub(super) fn is_reached(&self) -> bool {
        // SAFETY: the event is alive.
        match unsafe { result::event::query(self.event) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => false,
            done => {
                must("finish its work", done);
                true
            }
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.device.try_bind();
        // SAFETY: created once, destroyed once; nobody need have reached it.
        unsafe { result::event::destroy(self.event) }.ok();
    }
}

/// Tells how long the device takes for something.
pub(super) struct Timer([sys::CUevent; 2]);

impl Timer {
    /// The context is bound, here and in what follows.
    pub(super) fn new() -> Self {
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        Self([(); 2].map(|()| must("make an event", event())))
    }

    pub(super) fn start(&self, stream: sys::CUstream) {
        // SAFETY: the event is alive, and so is the stream.
        must("record an event", unsafe { result::event::record(self.0[0], stream) });
    }

    /// Milliseconds for what the stream was given since the start; waits for it.
    pub(super) fn stop(&self, stream: sys::CUstream) -> f32 {
        let [start, end] = self.0;
        // SAFETY: as above; both were recorded.
        unsafe {
            must("record an event", result::event::record(end, stream));
            must("finish its work", result::event::synchronize(end));
            must("tell the time", result::event::elapsed(start, end))
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        for event in self.0 {
            // SAFETY: created once, destroyed once.
            unsafe { result::event::destroy(event) }.ok();
        }
    }
}

/// A pass that is done the first time, recorded the second time, and replayed from then on: what its kernels need once
/// (modules, algorithms, scratch) is there before it is recorded. Another choice of algorithms makes it a new one.
#[derive(Debug, Default)]
pub struct Graph {
    state: State,
    /// How often algorithms had been chosen when it was first done.
    choices: usize,
}

#[derive(Default)]
enum State {
    #[default]
    New,
    Warm,
    Recorded {
        graph: sys::CUgraphExec,
        device: Arc<Device>,
    },
}

// SAFETY: as for `Device`; a graph is launched through `&mut`.
unsafe impl Send for State {}
// SAFETY: as above.
unsafe impl Sync for State {}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "New",
            Self::Warm => "Warm",
            Self::Recorded { .. } => "Recorded",
        })
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Self::Recorded { graph, device } = self {
            device.try_bind();
            // SAFETY: the stream lives as long as the device; recorded once, destroyed once, and done. What fails goes with
            // the process.
            unsafe {
                result::stream::synchronize(device.stream).ok();
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
            // Kernels of a recorded pass cannot be told apart.
            _ if !device.cuda_graphs || device.serialized.load(Ordering::Relaxed) => return work(),
            State::New => {
                work();
                self.state = State::Warm;
                return;
            }
            State::Warm => {
                self.state = State::Recorded { graph: device.record(work), device: Arc::clone(device) };
            }
            State::Recorded { .. } => {}
        }
        if let State::Recorded { graph, .. } = &self.state {
            // SAFETY: recorded on this device; the buffers it names belong to the caller of the same views.
            must("replay a pass", unsafe { result::graph::launch(*graph, device.stream) });
        }
    }
}

impl Device {
    fn record(&self, work: impl FnOnce()) -> sys::CUgraphExec {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this device's, and captures nothing yet.
        must("begin to record a pass", unsafe { result::stream::begin_capture(self.stream, mode) });
        work();
        // SAFETY: begun above.
        let graph = must("record a pass", unsafe { result::stream::end_capture(self.stream) });
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph is whole; it is not needed once it is instantiated.
        unsafe {
            let ready = must("prepare a pass", result::graph::instantiate(graph, flags));
            must("forget a recording", result::graph::destroy(graph));
            ready
        }
    }
}
