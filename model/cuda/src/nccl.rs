//! NCCL: what the processes of a group sum and share, from device to device.
//!
//! Operations have a stream of their own: they come after the kernels called before, and run beside those called later.
//! They are waited for by polling, as NCCL says nothing when a peer has died: whoever calls an operation says how long it
//! may take. What has gone wrong once is aborted, which leaves the device as it was but for what the buffers of the
//! operation hold.

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

use super::driver::{Address, Device, Mark, Memory, Stream};
use super::{Buffer, Cuda};

/// What the library's functions return: a number of [`ncclResult_t`], or one that only newer versions have.
type Status = u32;

const SUCCESS: Status = ncclResult_t::ncclSuccess as Status;
const IN_PROGRESS: Status = ncclResult_t::ncclInProgress as Status;

fn is_accepted(status: Status) -> bool {
    matches!(status, SUCCESS | IN_PROGRESS)
}

/// As the library writes its versions.
const OLDEST: c_int = 21_800;

/// Names of the library. That of Python's packages comes first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// Declares the functions of the library that are used, and how they are found.
macro_rules! functions {
    ($($name:ident = $symbol:literal: ($($argument:ty),*) -> $result:ty;)+) => {
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)+
            /// Keeps them where they are.
            _library: libloading::Library,
        }

        impl Functions {
            fn of(library: libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: these are their types in nccl.h, which are the same in all versions that are accepted.
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

/// What the system says.
fn reason(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

impl Functions {
    fn load() -> Result<Self, String> {
        let mut problem = String::new();
        for name in NAMES {
            // SAFETY: NCCL does nothing when it is loaded that other code could notice.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => return Self::checked(name, library),
                Err(error) if problem.is_empty() => problem = reason(&error),
                Err(_) => {}
            }
        }
        Err(format!("NCCL is not found ({problem})"))
    }

    fn checked(name: &str, library: libloading::Library) -> Result<Self, String> {
        let functions =
            Self::of(library).map_err(|error| format!("{name} is not usable: {}", reason(&error)))?;
        let mut version = 0;
        // SAFETY: writes the number that it is given.
        let status = unsafe { (functions.version)(&raw mut version) };
        if status != SUCCESS {
            return Err(format!("{name} does not say its version: {}", functions.problem(status)));
        }
        if version < OLDEST {
            let (major, minor) = (version / 10_000, version / 100 % 100);
            return Err(format!("{name} is of version {major}.{minor}, which is too old"));
        }
        Ok(functions)
    }

    /// What the library says of a failure.
    fn problem(&self, status: Status) -> String {
        let text = |text: *const c_char| {
            // SAFETY: the library gives null or a string that stays where it is.
            (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned())
        };
        // SAFETY: any number has a text.
        let what = text(unsafe { (self.error_string)(status) });
        // SAFETY: the library does not look at the communicator.
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

/// Whether there is a library to call.
pub(super) fn available() -> Result<(), CommunicatorError> {
    functions().map(|_| ())
}

/// An id that no other group has.
pub(super) fn unique_id() -> Result<CommunicatorId, CommunicatorError> {
    let functions = functions()?;
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    // SAFETY: writes the bytes that it is given.
    let status = unsafe { (functions.unique_id)(&raw mut id) };
    if status == SUCCESS {
        Ok(CommunicatorId::from_bytes(id.internal.map(|byte| byte as u8)))
    } else {
        Err(functions.refused("make an id for a group", status))
    }
}

fn raw(id: CommunicatorId) -> sys::ncclUniqueId {
    sys::ncclUniqueId { internal: id.to_bytes().map(|byte| byte as c_char) }
}

/// A member of a group of processes, each of which has a device. All members call the same operations in the same
/// order.
///
/// # Errors
/// All operations fail alike, with [`CommunicatorError::Refused`] or [`CommunicatorError::GivenUp`]: after the first error the
/// communicator is of no more use, and says the same error again. The device is, and so are the buffers, though it is
/// not known what those of the operation hold.
pub struct Communicator {
    functions: &'static Functions,
    /// Null when it has been given back.
    handle: ncclComm_t,
    stream: Stream,
    /// Before the last operation, among the kernels.
    called: Mark,
    /// Behind the last operation.
    done: Mark,
    /// What operations that were begun work on.
    begun: Vec<Memory>,
    device: Arc<Device>,
    rank: usize,
    size: usize,
    failed: Option<CommunicatorError>,
}

// SAFETY: a communicator may be used by any thread, one at a time.
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

/// What an operation is given besides its data.
#[derive(Clone, Copy)]
struct Call {
    functions: &'static Functions,
    handle: ncclComm_t,
    stream: cudaStream_t,
}

#[expect(clippy::missing_errors_doc, reason = "said once, at the type")]
impl Communicator {
    /// Joins the group of that id as one of `size` members, and waits for the others.
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
            called: Mark::new(&device),
            done: Mark::new(&device),
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

    /// This member's place, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Members of the group.
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
        let place = self.place(data);
        let part = self.part(&place, 0..place.len);
        self.begin(place.memory, "sum integers", give_up, |call| {
            let Call { functions, handle, stream } = call;
            let Part { all, own, share, rest, left } = part;
            call.group(|| {
                // SAFETY: the memory is held until the device is done with it.
                let summed = unsafe { (functions.reduce_scatter)(all, own, share, I64, SUM, handle, stream) };
                if left == 0 || !is_accepted(summed) {
                    return summed;
                }
                // SAFETY: as above.
                unsafe { (functions.all_reduce)(rest, rest, left, I64, SUM, handle, stream) }
            })
        })
    }

    /// Waits for all that was begun.
    pub fn finish(&mut self, give_up: GiveUp<'_>) -> Result<(), CommunicatorError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let act = "finish what was begun";
        let done = if self.begun.is_empty() {
            Ok(())
        } else {
            poll(act, give_up, || {
                let done = self.done.is_reached();
                // An error is one even if the device has nothing more to do.
                self.is_idle(act)?;
                Ok(done)
            })
        };
        self.settle(done)
    }

    /// Replaces what other members own of each of these parts of `data` by what they hold there.
    ///
    /// # Panics
    /// If a range is not a part of `data`.
    pub fn all_gather(
        &mut self,
        data: Out<'_, Cuda, f32>,
        parts: &[Range<usize>],
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        let place = self.place(data);
        let parts: Vec<Part> = parts.iter().map(|part| self.part(&place, part.clone())).collect();
        self.begin(place.memory, "gather numbers", give_up, |call| {
            let Call { functions, handle, stream } = call;
            call.group(|| {
                let gathered = parts.iter().map(|Part { all, own, share, .. }| {
                    // SAFETY: the memory is held until the device is done with it.
                    unsafe { (functions.all_gather)(*own, *all, *share, F32, handle, stream) }
                });
                // The first that is not.
                gathered.into_iter().find(|status| !is_accepted(*status)).unwrap_or(SUCCESS)
            })
        })?;
        self.finish(give_up)
    }

    /// Replaces `data` by what `root` holds.
    pub fn broadcast(
        &mut self,
        root: usize,
        data: Out<'_, Cuda, f32>,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        let (place, root) = (self.place(data), root as c_int);
        let (Part { all, .. }, len) = (self.part(&place, 0..place.len), place.len);
        self.begin(place.memory, "broadcast", give_up, |Call { functions, handle, stream }| {
            // SAFETY: the memory is held until the device is done with it.
            unsafe { (functions.broadcast)(all, all, len, F32, root, handle, stream) }
        })?;
        self.finish(give_up)
    }

    fn place<T>(&self, data: ViewMut<'_, Buffer<T>>) -> Place {
        let ViewMut { buffer, range } = data;
        assert!(buffer.memory.is_of(&self.device), "a buffer is of the communicator's backend");
        let width = size_of::<T>();
        let first = buffer.memory.address().add(range.start * width);
        Place { memory: buffer.memory.clone(), first, len: range.len(), width }
    }

    /// Where a part of the data is, and what of it this member owns.
    fn part(&self, place: &Place, part: Range<usize>) -> Part {
        assert!(part.end <= place.len, "a part of the data");
        let at = |element: usize| place.first.add(element * place.width).0 as *mut c_void;
        let [own, rest] = Partition::equal(part.clone(), self.size).owned(self.rank);
        Part {
            all: at(part.start),
            own: at(own.start),
            share: own.len(),
            rest: at(rest.start),
            left: rest.len(),
        }
    }

    /// Gives an operation on that memory to the device.
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
        // What the header's initialiser has, but that calls must not block.
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
        // SAFETY: the library copies the configuration, and writes the handle before it returns.
        let status =
            unsafe { (self.functions.init)(&raw mut self.handle, size, raw(id), rank, &raw mut config) };
        self.launched(status, act, give_up)
    }

    /// Waits until the library has done what it does before it leaves the rest to the device.
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

    /// Whether the library is not in the middle of a call.
    fn is_idle(&self, act: &'static str) -> Result<bool, CommunicatorError> {
        let mut state = SUCCESS;
        // SAFETY: the handle is alive; the number is written.
        let status = unsafe { (self.functions.async_error)(self.handle, &raw mut state) };
        match (status, state) {
            (SUCCESS, SUCCESS) => Ok(true),
            (SUCCESS | IN_PROGRESS, IN_PROGRESS) => Ok(false),
            (SUCCESS, error) | (error, _) => Err(self.functions.refused(act, error)),
        }
    }

    /// Nothing is under way any more; ends this communicator if something went wrong.
    fn settle(&mut self, done: Result<(), CommunicatorError>) -> Result<(), CommunicatorError> {
        if let Err(error) = &done {
            self.failed = Some(error.clone());
            self.abort();
        }
        self.begun.clear();
        done
    }

    /// Ends whatever is under way, here.
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

    /// Waits for a short while until the others need nothing more of this member; says whether that is so.
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
        // What was begun and not waited for may never be done.
        if self.begun.is_empty() && self.finalize() {
            // SAFETY: the handle was alive, and is not used again. Nothing is left that this could wait for.
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
struct Place {
    memory: Memory,
    first: Address,
    /// Elements.
    len: usize,
    /// Bytes of an element.
    width: usize,
}

/// A part of some data, as the library wants it: where it begins, this member's share of it and how many elements that
/// has, and what is left over at the end.
#[derive(Clone, Copy)]
struct Part {
    all: *mut c_void,
    own: *mut c_void,
    share: usize,
    rest: *mut c_void,
    left: usize,
}

impl Call {
    /// Makes one operation of several calls.
    fn group(self, calls: impl FnOnce() -> Status) -> Status {
        // SAFETY: ended below, in this thread.
        let begun = unsafe { (self.functions.group_start)() };
        if begun != SUCCESS {
            return begun;
        }
        let called = calls();
        // SAFETY: begun above.
        let ended = unsafe { (self.functions.group_end)() };
        if is_accepted(called) { ended } else { called }
    }
}

/// Polls, a second or two in all, for a communicator that is not needed any more.
const FINALIZE_POLLS: usize = 20_000;

/// What is done between polls: nothing at first, then a little longer every time.
#[derive(Default)]
struct Pause {
    polls: u32,
}

impl Pause {
    /// Polls that come at once.
    const SPINS: u32 = 256;
    /// Most microseconds.
    const LONGEST: u64 = 50;

    /// Says whether it took any time.
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

/// Asks `is_done` until it is, it fails, or patience ends.
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
