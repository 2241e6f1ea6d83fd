//! Waiting for several sockets at once, and ending the wait from another thread.
//!
//! Everything that blocks in this module blocks in [`wait`], with a deadline, and has an [`AbortHandle`]'s or
//! another [`WakeupPipe`] among the things it waits for. So nothing ever has to be interrupted by force.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// A flag that a thread in [`wait`] can see: readable once it has been raised.
#[derive(Debug)]
pub(super) struct WakeupPipe {
    raised: UnixStream,
    seen: UnixStream,
}

impl WakeupPipe {
    pub(super) fn new() -> io::Result<Self> {
        let (raised, seen) = UnixStream::pair()?;
        raised.set_nonblocking(true)?;
        seen.set_nonblocking(true)?;
        Ok(Self { raised, seen })
    }

    /// Makes it readable, until [`WakeupPipe::lower`].
    pub(super) fn raise(&self) {
        // A full buffer says that it has been raised before.
        drop((&self.raised).write(&[1]));
    }

    /// Makes it unreadable again.
    pub(super) fn lower(&self) {
        let mut buffer = [0; 64];
        while matches!((&self.seen).read(&mut buffer), Ok(count) if count > 0) {}
    }
}

impl AsFd for WakeupPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.seen.as_fd()
    }
}

/// Ends the operations of a group from any thread, and tells how far it has come.
///
/// It is made before the group, so that forming one can be ended too. It serves one group only.
#[derive(Debug, Clone)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    aborted: AtomicBool,
    wake: WakeupPipe,
    made: Instant,
    entered: AtomicU64,
    /// When something moved last in the operation that is going on, in milliseconds after `made`, or [`IDLE`].
    moved: AtomicU64,
}

/// No operation is going on.
const IDLE: u64 = u64::MAX;

impl AbortHandle {
    /// A handle for a group that is yet to be formed.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn new() -> io::Result<Self> {
        let shared = Shared {
            aborted: AtomicBool::new(false),
            wake: WakeupPipe::new()?,
            made: Instant::now(),
            entered: AtomicU64::new(0),
            moved: AtomicU64::new(IDLE),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Makes the blocked call, and every later one, return [`Aborted`](super::CollectiveError::Aborted) at once.
    pub fn abort(&self) {
        self.shared.aborted.store(true, Ordering::Release);
        self.shared.wake.raise();
    }

    /// Whether somebody called [`AbortHandle::abort`].
    pub fn is_aborted(&self) -> bool {
        self.shared.aborted.load(Ordering::Acquire)
    }

    /// Operations that the group has entered. Of a group that hangs, the member that stays behind is the culprit.
    pub fn entered(&self) -> u64 {
        self.shared.entered.load(Ordering::Relaxed)
    }

    /// How long ago the last byte of the operation that is going on was sent or received, or the operation was entered;
    /// `None` between two operations.
    pub fn still_for(&self) -> Option<Duration> {
        let moved = self.shared.moved.load(Ordering::Relaxed);
        let moved = (moved != IDLE).then(|| Duration::from_millis(moved))?;
        Some(self.shared.made.elapsed().saturating_sub(moved))
    }

    /// The group enters its n-th operation.
    pub(super) fn enter(&self, operation: u64) {
        self.shared.entered.store(operation, Ordering::Relaxed);
        self.moved(Instant::now());
    }

    /// Something was sent or received.
    pub(super) fn moved(&self, now: Instant) {
        let since = now.saturating_duration_since(self.shared.made);
        self.shared.moved.store(since.as_millis() as u64, Ordering::Relaxed);
    }

    /// The operation is over.
    pub(super) fn finish(&self) {
        self.shared.moved.store(IDLE, Ordering::Relaxed);
    }
}

impl AsFd for AbortHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }
}

/// Blocks until one of `sources` is ready (or broken), or the time is `until`.
pub(super) fn wait(sources: &mut [PollFd<'_>], until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
    match poll(sources, Some(&timeout)) {
        // After a signal the caller looks at its state and comes back.
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits for `source` to have something to read.
pub(super) fn readable<Fd: AsFd>(source: &Fd) -> PollFd<'_> {
    PollFd::new(source, PollFlags::IN)
}

/// Waits for `source` to have room to write.
pub(super) fn writable<Fd: AsFd>(source: &Fd) -> PollFd<'_> {
    PollFd::new(source, PollFlags::OUT)
}
