//! A device with its stream, memory and kernels, through the CUDA driver.
//!
//! All computations of a process on a device go through one stream, so they happen in the order of the calls. If a
//! device fails, its results are lost and nothing on it can be used again. The error, with the driver's message, ends
//! the process, and the run continues without it.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, DriverError, result, sys};
use ulmus_backend::BackendError;

use super::arguments::Argument;
use super::compiler::Compiler;
use super::handle::{Address, lost, must};
use super::matmul::{self, Matmul};
use super::program::Variant;

/// A device of this process.
pub(super) struct Device {
    stream: sys::CUstream,
    name: String,
    compiler: Compiler,
    modules: Mutex<BTreeMap<Variant, Module>>,
    matmul: Mutex<Matmul>,
    /// Memory for the duration of single calls. It grows but is never freed, because graphs contain its addresses.
    scratch: Mutex<Vec<Raw>>,
    /// Whether the host waits for each kernel.
    serialized: AtomicBool,
    /// Whether kernels wait for earlier ones by themselves (programmatic dependent launch).
    programmatic_launch: bool,
    /// Whether passes are captured as CUDA graphs.
    cuda_graphs: bool,
    /// Whether the device itself reads pageable memory of the host, possibly after a call has returned.
    reads_host: bool,
    // This field is last, because all others are freed within the context.
    context: Arc<CudaContext>,
}

// SAFETY: driver handles may be used from any thread that has bound the context, which every method here ensures.
unsafe impl Send for Device {}
// SAFETY: driver handles may be used from several threads at the same time, and all other mutable state is behind
// locks.
unsafe impl Sync for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("name", &self.name).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of devices, or 0 without a driver.
pub(super) fn count() -> usize {
    // SAFETY: the function only checks whether the library can be loaded.
    let present = unsafe { sys::is_culib_present() };
    let count = || result::init().and_then(|()| result::device::get_count());
    if present { count().map_or(0, |count| count.max(0) as usize) } else { 0 }
}

impl Device {
    pub(super) fn open(ordinal: usize) -> Result<Arc<Self>, BackendError> {
        let refused = |problem: String| BackendError::Device { ordinal, problem };
        let driver = |error: DriverError| refused(format!("the driver reports {error:?}"));
        if count() == 0 {
            return Err(refused("there is no NVIDIA driver, or it has no device".to_owned()));
        }
        let context = CudaContext::new(ordinal).map_err(driver)?;
        let name = context.name().map_err(driver)?;
        let capability = context.compute_capability().map_err(driver)?;
        if capability < (8, 0) {
            let (major, minor) = capability;
            return Err(refused(format!(
                "{name} has compute capability {major}.{minor}; 8.0 or higher is needed"
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

    /// Name of the device, and versions of the libraries that its results depend on.
    pub(super) fn describe(&self) -> String {
        let (major, minor) = self.compiler.version();
        let [blas_major, blas_minor, blas_patch] = matmul::version();
        format!("{}, CUDA {major}.{minor}, cuBLAS {blas_major}.{blas_minor}.{blas_patch}", self.name)
    }

    /// Bytes of memory that the device has.
    pub(super) fn total_memory(&self) -> u64 {
        // SAFETY: the device exists as long as its context.
        must("tell its memory", unsafe { result::device::total_mem(self.context.cu_device()) }) as u64
    }

    pub(super) fn bind(&self) {
        must("be used by a thread", self.context.bind_to_thread());
    }

    /// Like [`Device::bind`], but returns whether it was successful.
    pub(super) fn try_bind(&self) -> bool {
        self.context.bind_to_thread().is_ok()
    }

    /// Waits until everything that was launched so far is done.
    fn synchronise(&self) {
        self.bind();
        // SAFETY: the stream lives as long as the device.
        must("finish its work", unsafe { result::stream::synchronize(self.stream) });
    }

    /// From now on, the host waits for each kernel.
    pub(super) fn serialize(&self) {
        self.serialized.store(true, Ordering::Relaxed);
    }

    /// The stream of all kernels.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Whether passes may be captured as graphs now.
    pub(super) fn captures_graphs(&self) -> bool {
        self.cuda_graphs && !self.serialized.load(Ordering::Relaxed)
    }

    pub(super) fn wait_if_serialized(&self) {
        if self.serialized.load(Ordering::Relaxed) {
            self.synchronise();
        }
    }

    /// The library for matrix products, for exclusive use.
    pub(super) fn matmul(&self) -> MutexGuard<'_, Matmul> {
        self.bind();
        lock(&self.matmul)
    }

    /// At least `bytes` bytes of memory for the kernels of one call.
    ///
    /// # Panics
    /// If the device does not have enough memory.
    pub(super) fn scratch(self: &Arc<Self>, bytes: usize) -> Address {
        let mut scratch = lock(&self.scratch);
        if let Some(raw) = scratch.iter().find(|raw| raw.bytes >= bytes) {
            return Address(raw.address);
        }
        let raw = Raw::new(self, bytes.next_power_of_two())
            .unwrap_or_else(|error| lost("allocate scratch memory", error));
        let address = Address(raw.address);
        scratch.push(raw);
        address
    }

    /// Launches a kernel: a grid of `blocks` blocks of `threads` threads, which share `shared` bytes of memory. The
    /// arguments must be those of the kernel's definition, in number, order and type.
    pub(super) fn launch<const N: usize>(
        &self,
        variant: Variant,
        kernel: &'static str,
        grid: [[usize; 3]; 2],
        shared: usize,
        arguments: [&dyn Argument; N],
    ) {
        let mut pointers = arguments.map(|argument| std::ptr::from_ref(argument).cast::<c_void>().cast_mut());
        // SAFETY: the pointers are to values that the caller borrows for the call. All callers are in this crate, next
        // to the kernels, and pass the arguments of the kernel's definition, with addresses of views that they borrow.
        unsafe { self.launch_raw(variant, kernel, grid, shared, &mut pointers) };
    }

    /// Launches a kernel with pointers to its arguments.
    ///
    /// # Safety
    /// `arguments` must be pointers to valid values for the kernel's arguments, in number, order and type. Addresses among
    /// them must stay valid until the kernel is done, in the order of the stream.
    unsafe fn launch_raw(
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
        // The kernel may be started while earlier ones still run, because it waits for them itself.
        let mut programmatic = sys::CUlaunchAttribute {
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
            attrs: &raw mut programmatic,
            numAttrs: u32::from(self.programmatic_launch),
        };
        // SAFETY: the function belongs to a module that is loaded, and the driver copies the arguments before it
        // returns.
        let result = unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        }
        .result();
        if result.is_err() {
            tracing::error!(kernel, ?blocks, ?threads, shared, "the driver refused a launch");
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
            // SAFETY: the image is a complete cubin.
            let handle = must("load a module", unsafe { result::module::load_data(image.as_ptr().cast()) });
            Module { handle, functions: BTreeMap::new() }
        });
        *module.functions.entry(kernel).or_insert_with(|| {
            let name = CString::new(kernel).expect("kernel names have no zero byte");
            // SAFETY: the module is loaded, and stays so as long as the device lives.
            let function = must(kernel, unsafe { result::module::get_function(module.handle, name) });
            // More than 48 KiB, including what the kernel declares, must be requested explicitly.
            if shared > 0 {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function belongs to a module that is loaded.
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
        // Resources that cannot be freed now are freed with the process.
        if self.context.bind_to_thread().is_ok() {
            lock(&self.scratch).clear();
            for (_, module) in std::mem::take(&mut *lock(&self.modules)) {
                // SAFETY: buffers and graphs keep the device alive, so none of them can use the module any more.
                unsafe { result::module::unload(module.handle) }.ok();
            }
            // SAFETY: the stream was created by `open`, and is destroyed only here.
            unsafe { result::stream::destroy(self.stream) }.ok();
        }
    }
}

/// A compiled file of kernels.
struct Module {
    handle: sys::CUmodule,
    functions: BTreeMap<&'static str, sys::CUfunction>,
}

/// Memory whose owner must keep the device alive.
struct Raw {
    address: u64,
    bytes: usize,
}

impl Raw {
    fn new(device: &Device, bytes: usize) -> Result<Self, BackendError> {
        device.bind();
        // SAFETY: the context is bound. The driver would refuse 0 bytes, so an empty buffer has one.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => Ok(Self { address, bytes }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(BackendError::OutOfMemory { bytes })
            }
            Err(error) => must("allocate memory", Err(error)),
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: the memory was allocated in `new` and is freed only here, and freeing waits for work that uses it. If
        // it fails, the memory is freed with the process.
        unsafe { result::free_sync(self.address) }.ok();
    }
}

/// Memory on a device. Clones share it, and the last one frees it.
#[derive(Clone)]
pub(super) struct Memory(Arc<Owned>);

struct Owned {
    // This field is before the device, because freeing the memory needs the context.
    raw: Raw,
    device: Arc<Device>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("bytes", &self.0.raw.bytes).finish_non_exhaustive()
    }
}

impl Memory {
    /// Allocates `bytes` bytes of zeros.
    pub(super) fn zeroed(device: &Arc<Device>, bytes: usize) -> Result<Self, BackendError> {
        let raw = Raw::new(device, bytes)?;
        device.fill_zero(Address(raw.address), bytes);
        Ok(Self(Arc::new(Owned { raw, device: Arc::clone(device) })))
    }

    pub(super) fn address(&self) -> Address {
        Address(self.0.raw.address)
    }

    /// Whether the memory belongs to `device`.
    pub(super) fn is_of(&self, device: &Arc<Device>) -> bool {
        Arc::ptr_eq(&self.0.device, device)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // The context must be bound to this thread for `Raw`, which frees the memory next.
        self.device.context.bind_to_thread().ok();
    }
}

impl Device {
    /// Sets `bytes` bytes to 0.
    pub(super) fn fill_zero(&self, to: Address, bytes: usize) {
        if bytes > 0 {
            self.bind();
            // SAFETY: the caller owns this memory on the device.
            must("clear memory", unsafe { result::memset_d8_async(to.0, 0, bytes, self.stream) });
        }
    }

    /// Copies from the host. The caller may change the data as soon as this returns.
    pub(super) fn upload<T: bytemuck::Pod>(&self, to: Address, from: &[T]) {
        if !from.is_empty() {
            self.bind();
            // SAFETY: the caller owns as many bytes on the device. Pageable memory is read before the driver returns
            // or, if the device reads it itself, before this function returns.
            must("copy to it", unsafe { result::memcpy_htod_async(to.0, from, self.stream) });
            if self.reads_host {
                self.synchronise();
            }
        }
    }

    /// Copies to the host, after everything that was launched so far.
    pub(super) fn download<T: bytemuck::Pod>(&self, from: Address, to: &mut [T]) {
        if !to.is_empty() {
            self.bind();
            // SAFETY: the caller owns as many bytes on the device, and the call below waits until `to` is written.
            must("copy from it", unsafe { result::memcpy_dtoh_async(to, from.0, self.stream) });
            self.synchronise();
        }
    }
}
