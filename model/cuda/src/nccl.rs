//! Collective operations between devices of several processes, by NCCL.
//!
//! Operations have their own stream: they come after kernels that were launched before, and run concurrently with later
//! ones. They are waited for by polling, because NCCL does not report that a peer has died; the caller of an operation
//! decides how long it may take. A failed communicator is aborted. The device stays usable, but the contents of the
//! operation's buffers are undefined.

use std::error::Error;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cudarc::nccl::sys::{self, cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t};
use ulmus_backend::{CommunicatorError, CommunicatorId, GiveUp, Out, ViewMut};
use ulmus_types::Partition;

use super::driver::{Device, Memory};
use super::handle::Address;
use super::stream::{Event, Stream};
use super::{Buffer, Cuda};

/// A result code of the library: a number of [`ncclResult_t`], or one that only newer versions have.
type Status = u32;

const SUCCESS: Status = ncclResult_t::ncclSuccess as Status;
const IN_PROGRESS: Status = ncclResult_t::ncclInProgress as Status;

fn is_accepted(status: Status) -> bool {
    matches!(status, SUCCESS | IN_PROGRESS)
}

/// The oldest supported version, 2.18, in the library's own notation.
const OLDEST: c_int = 21_800;

/// File names of the library. That of Python's packages comes first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// Declares the functions of the library that are used, and their symbols.
macro_rules! functions {
    ($($name:ident = $symbol:literal: ($($argument:ty),*) -> $result:ty;)+) => {
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)+
            /// Keeps the library loaded.
            _library: libloading::Library,
        }

        impl Functions {
            fn of(library: libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: these are the functions' types in nccl.h, which are the same in all supported versions.
                unsafe { Ok(Self { $($name: *library.get($symbol)?,)+ _library: library }) }
            }
        }
    };
}

functions! {
    version = b"ncclGetVersion\0": (*mut c_int) -> Status;
    unique_id = b"ncclGetUniqueId\0": (*mut sys::ncclUniqueId) -> Status;
    init = b"ncclCommInitRankConfig\0":
        (*mut ncclComm_t, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> Status;
    async_error = b"ncclCommGetAsyncError\0": (ncclComm_t, *mut Status) -> Status;
    finalize = b"ncclCommFinalize\0": (ncclComm_t) -> Status;
    destroy = b"ncclCommDestroy\0": (ncclComm_t) -> Status;
    abort = b"ncclCommAbort\0": (ncclComm_t) -> Status;
    group_start = b"ncclGroupStart\0": () -> Status;
    group_end = b"ncclGroupEnd\0": () -> Status;
    all_reduce = b"ncclAllReduce\0":
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> Status;
    reduce_scatter = b"ncclReduceScatter\0":
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> Status;
    all_gather = b"ncclAllGather\0":
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, cudaStream_t) -> Status;
    broadcast = b"ncclBroadcast\0":
        (*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> Status;
    error_string = b"ncclGetErrorString\0": (Status) -> *const c_char;
    last_error = b"ncclGetLastError\0": (ncclComm_t) -> *const c_char;
}

/// The system's message for a failure to load the library.
fn reason(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

impl Functions {
    fn load() -> Result<Self, String> {
        let mut problem = String::new();
        for name in NAMES {
            // SAFETY: loading NCCL has no side effects that other code could notice.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => return Self::checked(name, library),
                Err(error) if problem.is_empty() => problem = reason(&error),
                Err(_) => {}
            }
        }
        Err(format!("NCCL was not found ({problem})"))
    }

    fn checked(name: &str, library: libloading::Library) -> Result<Self, String> {
        let functions =
            Self::of(library).map_err(|error| format!("{name} is not usable: {}", reason(&error)))?;
        let mut version = 0;
        // SAFETY: the function writes a number to the pointer, which is valid.
        let status = unsafe { (functions.version)(&raw mut version) };
        if status != SUCCESS {
            return Err(format!("{name} does not state its version: {}", functions.problem(status)));
        }
        if version < OLDEST {
            let (major, minor) = (version / 10_000, version / 100 % 100);
            return Err(format!("{name} has version {major}.{minor}, which is too old"));
        }
        Ok(functions)
    }

    /// The library's message for a failure.
    fn problem(&self, status: Status) -> String {
        let text = |text: *const c_char| {
            // SAFETY: the library returns null or a zero-terminated string that stays valid.
            (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned())
        };
        // SAFETY: the function accepts any number.
        let what = text(unsafe { (self.error_string)(status) });
        // SAFETY: the function ignores the communicator.
        let why = text(unsafe { (self.last_error)(ptr::null_mut()) });
        let said: Vec<String> = [what, why].into_iter().flatten().filter(|text| !text.is_empty()).collect();
        if said.is_empty() { format!("error {status}") } else { said.join(": ") }
    }

    fn refused(&self, act: &'static str, status: Status) -> CommunicatorError {
        CommunicatorError::Refused { act, problem: self.problem(status) }
    }
}

/// The library, which is loaded once.
fn functions() -> Result<&'static Functions, CommunicatorError> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    LOADED
        .get_or_init(Functions::load)
        .as_ref()
        .map_err(|problem| CommunicatorError::Library { problem: problem.clone() })
}

/// Returns an error if the library cannot be used.
pub(super) fn available() -> Result<(), CommunicatorError> {
    functions().map(|_| ())
}

/// Creates an id that no other group has.
pub(super) fn unique_id() -> Result<CommunicatorId, CommunicatorError> {
    let functions = functions()?;
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    // SAFETY: the function writes an id to the pointer, which is valid.
    let status = unsafe { (functions.unique_id)(&raw mut id) };
    if status == SUCCESS {
        Ok(CommunicatorId::from_bytes(id.internal.map(|byte| byte as u8)))
    } else {
        Err(functions.refused("create an id for a group", status))
    }
}

fn raw(id: CommunicatorId) -> sys::ncclUniqueId {
    sys::ncclUniqueId { internal: id.to_bytes().map(|byte| byte as c_char) }
}

/// A member of a group of processes, each with a device. All members must call the same operations in the same order.
///
/// # Errors
/// All operations return [`CommunicatorError::Refused`] or [`CommunicatorError::GivenUp`]. After the first error, the
/// communicator is unusable and returns the same error again. The device and the buffers stay usable, but the contents
/// of the operation's buffers are undefined.
pub struct Communicator {
    functions: &'static Functions,
    /// The library's handle, or null if it was aborted.
    handle: ncclComm_t,
    stream: Stream,
    /// Comes after the kernels that the last operation waits for.
    called: Event,
    /// Comes after the last operation.
    done: Event,
    /// The memory of operations that were begun.
    begun: Vec<Memory>,
    device: Arc<Device>,
    rank: usize,
    size: usize,
    failed: Option<CommunicatorError>,
}

// SAFETY: a communicator may be used from any thread, one at a time, which `&mut` ensures.
unsafe impl Send for Communicator {}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, size, failed, .. } = self;
        f.debug_struct("Communicator")
            .field("rank", rank)
            .field("size", size)
            .field("failed", failed)
            .finish_non_exhaustive()
    }
}

/// The handles that every operation needs.
#[derive(Clone, Copy)]
struct Call {
    functions: &'static Functions,
    handle: ncclComm_t,
    stream: cudaStream_t,
}

#[expect(clippy::missing_errors_doc, reason = "the type documents the errors of all operations")]
impl Communicator {
    /// Joins the group with this id as one of `size` members, and waits for the others.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    pub fn new(
        cuda: &Cuda,
        id: &CommunicatorId,
        rank: usize,
        size: usize,
        give_up: GiveUp<'_>,
    ) -> Result<Self, CommunicatorError> {
        let device = Arc::clone(&cuda.device);
        let mut communicator = Self {
            functions: functions()?,
            handle: ptr::null_mut(),
            stream: Stream::new(&device),
            called: Event::new(&device),
            done: Event::new(&device),
            begun: Vec::new(),
            device,
            rank,
            size,
            failed: None,
        };
        let act = "form a group";
        let formed = communicator.init(*id, act, give_up);
        communicator.settle(formed)?;
        Ok(communicator)
    }

    /// The rank of this member, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of members in the group.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Begins to replace what this member owns of `data` ([`Partition::equal`]) by its sum over all members, modulo 2^64; the rest
    /// holds anything then. Kernels leave `data` alone until [`Communicator::finish`].
    pub fn begin_reduce_scatter(
        &mut self,
        data: Out<'_, Cuda, i64>,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        let slice = self.slice(data);
        let part = self.part(&slice, 0..slice.len);
        self.begin(slice.memory, "sum integers", give_up, |call| {
            let Call { functions, handle, stream } = call;
            let SharedRange { all, own, share, rest, left } = part;
            call.group(|| {
                // SAFETY: the addresses are within the memory, which `begun` keeps alive until the device is done with
                // it.
                let summed = unsafe { (functions.reduce_scatter)(all, own, share, I64, SUM, handle, stream) };
                if left == 0 || !is_accepted(summed) {
                    return summed;
                }
                // SAFETY: the addresses are within the memory, which `begun` keeps alive until the device is done with
                // it.
                unsafe { (functions.all_reduce)(rest, rest, left, I64, SUM, handle, stream) }
            })
        })
    }

    /// Waits for all operations that were begun.
    pub fn finish(&mut self, give_up: GiveUp<'_>) -> Result<(), CommunicatorError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let act = "finish its operations";
        let done = if self.begun.is_empty() {
            Ok(())
        } else {
            poll(act, give_up, || {
                let done = self.done.is_reached();
                // An error counts even if the device is done.
                self.is_idle(act)?;
                Ok(done)
            })
        };
        self.settle(done)
    }

    /// In each of `parts` of `data`, replaces what other members own by their contents.
    ///
    /// # Panics
    /// If a range is not within `data`.
    pub fn all_gather(
        &mut self,
        data: Out<'_, Cuda, f32>,
        parts: &[Range<usize>],
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        let slice = self.slice(data);
        let parts: Vec<SharedRange> = parts.iter().map(|part| self.part(&slice, part.clone())).collect();
        self.begin(slice.memory, "gather numbers", give_up, |call| {
            let Call { functions, handle, stream } = call;
            call.group(|| {
                let gathered = parts.iter().map(|SharedRange { all, own, share, .. }| {
                    // SAFETY: the addresses are within the memory, which `begun` keeps alive until the device is done.
                    unsafe { (functions.all_gather)(*own, *all, *share, F32, handle, stream) }
                });
                // The result is that of the first call that was refused.
                gathered.into_iter().find(|status| !is_accepted(*status)).unwrap_or(SUCCESS)
            })
        })?;
        self.finish(give_up)
    }

    /// Replaces `data` by the contents of the member `root`.
    pub fn broadcast(
        &mut self,
        root: usize,
        data: Out<'_, Cuda, f32>,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        let (slice, root) = (self.slice(data), root as c_int);
        let (SharedRange { all, .. }, len) = (self.part(&slice, 0..slice.len), slice.len);
        self.begin(slice.memory, "broadcast", give_up, |Call { functions, handle, stream }| {
            // SAFETY: the addresses are within the memory, which `begun` keeps alive until the device is done with it.
            unsafe { (functions.broadcast)(all, all, len, F32, root, handle, stream) }
        })?;
        self.finish(give_up)
    }

    fn slice<T>(&self, data: ViewMut<'_, Buffer<T>>) -> DeviceSlice {
        let ViewMut { buffer, range } = data;
        assert!(buffer.memory.is_of(&self.device), "the buffer must be on the communicator's device");
        let width = size_of::<T>();
        let first = buffer.memory.address().add(range.start * width);
        DeviceSlice { memory: buffer.memory.clone(), first, len: range.len(), width }
    }

    /// The addresses of a part of the data, and of what this member owns of it.
    fn part(&self, slice: &DeviceSlice, part: Range<usize>) -> SharedRange {
        assert!(part.end <= slice.len, "a part must be within the data");
        let at = |element: usize| slice.first.add(element * slice.width).0 as *mut c_void;
        let [own, rest] = Partition::equal(part.clone(), self.size).owned(self.rank);
        SharedRange {
            all: at(part.start),
            own: at(own.start),
            share: own.len(),
            rest: at(rest.start),
            left: rest.len(),
        }
    }

    /// Enqueues an operation on `memory`.
    fn begin(
        &mut self,
        memory: Memory,
        act: &'static str,
        give_up: GiveUp<'_>,
        call: impl FnOnce(Call) -> Status,
    ) -> Result<(), CommunicatorError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.begun.push(memory);
        self.device.bind();
        self.called.record();
        self.stream.wait_for(&self.called);
        let status =
            call(Call { functions: self.functions, handle: self.handle, stream: self.stream.raw().cast() });
        let launched = self.launched(status, act, give_up);
        self.done.record_behind(&self.stream);
        if launched.is_err() { self.settle(launched) } else { Ok(()) }
    }

    fn init(
        &mut self,
        id: CommunicatorId,
        act: &'static str,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        // These are the values of the header's initialiser, except that calls must not block.
        let mut config = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: 0xcafe_beef,
            version: OLDEST as u32,
            blocking: 0,
            cgaClusterSize: c_int::MIN,
            minCTAs: c_int::MIN,
            maxCTAs: c_int::MIN,
            netName: ptr::null(),
            splitShare: c_int::MIN,
        };
        let (rank, size) = (self.rank as c_int, self.size as c_int);
        self.device.bind();
        // SAFETY: the library copies the configuration and writes the handle before it returns.
        let status =
            unsafe { (self.functions.init)(&raw mut self.handle, size, raw(id), rank, &raw mut config) };
        self.launched(status, act, give_up)
    }

    /// Waits until the library has handed the operation over to the device.
    fn launched(
        &self,
        status: Status,
        act: &'static str,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        if !is_accepted(status) {
            return Err(self.functions.refused(act, status));
        }
        poll(act, give_up, || self.is_idle(act))
    }

    /// Whether the library has completed its last call.
    fn is_idle(&self, act: &'static str) -> Result<bool, CommunicatorError> {
        let mut state = SUCCESS;
        // SAFETY: the handle is alive, and the function writes a number to the pointer, which is valid.
        let status = unsafe { (self.functions.async_error)(self.handle, &raw mut state) };
        match (status, state) {
            (SUCCESS, SUCCESS) => Ok(true),
            (SUCCESS | IN_PROGRESS, IN_PROGRESS) => Ok(false),
            (SUCCESS, error) | (error, _) => Err(self.functions.refused(act, error)),
        }
    }

    /// Ends the pending operations, and aborts the communicator after an error.
    fn settle(&mut self, done: Result<(), CommunicatorError>) -> Result<(), CommunicatorError> {
        if let Err(error) = &done {
            self.failed = Some(error.clone());
            self.abort();
        }
        self.begun.clear();
        done
    }

    /// Aborts all operations of this member.
    fn abort(&mut self) {
        let handle = std::mem::replace(&mut self.handle, ptr::null_mut());
        if !handle.is_null() {
            // SAFETY: the handle was alive, and is not used again.
            let status = unsafe { (self.functions.abort)(handle) };
            if !is_accepted(status) {
                tracing::warn!(problem = self.functions.problem(status), "NCCL did not abort");
            }
        }
    }

    /// Waits a short while until the others need nothing more from this member, and returns whether that is so.
    fn finalize(&self) -> bool {
        // SAFETY: the handle is alive.
        let status = unsafe { (self.functions.finalize)(self.handle) };
        let mut pause = Pause::default();
        is_accepted(status)
            && (0..FINALIZE_POLLS)
                .find_map(|_| match self.is_idle("finish") {
                    Ok(false) => {
                        pause.pass();
                        None
                    }
                    Ok(true) => Some(true),
                    Err(_) => Some(false),
                })
                .unwrap_or(false)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.handle.is_null() || !self.device.try_bind() {
            return;
        }
        // Operations that were not waited for may never complete.
        if self.begun.is_empty() && self.finalize() {
            // SAFETY: the handle was alive, and is not used again. Nothing is left that the call could wait for.
            unsafe { (self.functions.destroy)(self.handle) };
        } else {
            self.abort();
        }
    }
}

const I64: ncclDataType_t = ncclDataType_t::ncclInt64;
const F32: ncclDataType_t = ncclDataType_t::ncclFloat32;
const SUM: ncclRedOp_t = ncclRedOp_t::ncclSum;

/// The data of an operation.
struct DeviceSlice {
    memory: Memory,
    first: Address,
    /// Number of elements.
    len: usize,
    /// Size of an element in bytes.
    width: usize,
}

/// The addresses and lengths of a part of some data, for the library.
#[derive(Clone, Copy)]
struct SharedRange {
    /// Address of the whole part.
    all: *mut c_void,
    /// Address of this member's share.
    own: *mut c_void,
    /// Number of elements in a share.
    share: usize,
    /// Address of the elements left over, which all members own.
    rest: *mut c_void,
    /// Number of the elements left over.
    left: usize,
}

impl Call {
    /// Combines several calls into one operation.
    fn group(self, calls: impl FnOnce() -> Status) -> Status {
        // SAFETY: the group is ended below, in the same thread.
        let begun = unsafe { (self.functions.group_start)() };
        if begun != SUCCESS {
            return begun;
        }
        let called = calls();
        // SAFETY: the group was begun above, in the same thread.
        let ended = unsafe { (self.functions.group_end)() };
        if is_accepted(called) { ended } else { called }
    }
}

/// Number of polls for a communicator that is no longer needed, which take a second or two.
const FINALIZE_POLLS: usize = 20_000;

/// The pauses between polls: none at first, and then slightly longer each time.
#[derive(Default)]
struct Pause {
    polls: u32,
}

impl Pause {
    /// Number of polls without a pause.
    const SPINS: u32 = 256;
    /// Maximum pause in microseconds.
    const LONGEST: u64 = 50;

    /// Pauses, and returns whether that took any time.
    fn pass(&mut self) -> bool {
        self.polls = self.polls.saturating_add(1);
        let Some(slow) = self.polls.checked_sub(Self::SPINS) else {
            std::thread::yield_now();
            return false;
        };
        let micros = Self::LONGEST.min(1 + u64::from(slow) / 8);
        std::thread::park_timeout(Duration::from_micros(micros));
        true
    }
}

/// Polls `is_done` until it returns true or fails, or `give_up` returns a reason.
fn poll(
    act: &'static str,
    give_up: GiveUp<'_>,
    is_done: impl Fn() -> Result<bool, CommunicatorError>,
) -> Result<(), CommunicatorError> {
    let mut pause = Pause::default();
    while !is_done()? {
        if pause.pass()
            && let Some(reason) = give_up()
        {
            return Err(CommunicatorError::GivenUp { act, reason });
        }
    }
    Ok(())
}
