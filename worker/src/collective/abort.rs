//! Waiting for several sockets at once, and ending the wait from another thread.
//!
//! Everything in the parent module that blocks, blocks in [`wait`], with a deadline and with the [`WakeupPipe`] of an
//! [`AbortHandle`] or another one among the sources. So nothing ever has to be interrupted by force.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// A flag that wakes a thread in [`wait`]: a file descriptor that is readable once the flag is raised.
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

    /// Raises the flag, until [`WakeupPipe::lower`].
    pub(super) fn raise(&self) {
        // If the buffer is full, the flag is raised already.
        drop((&self.raised).write(&[1]));
    }

    /// Lowers the flag.
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

/// Ends the operations of a group from any thread, and tells how far the group has come.
///
/// A handle is made before its group, so that forming the group can be ended, too. It serves one group only.
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
    /// When the present operation last sent or received something, in milliseconds after `made`; [`IDLE`] between two.
    moved: AtomicU64,
}

/// There is no present operation.
const IDLE: u64 = u64::MAX;

impl AbortHandle {
    /// A handle for a group that has yet to be formed.
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

    /// Makes a blocked call, and every later one, return [`Aborted`](super::CollectiveError::Aborted) at once.
    pub fn abort(&self) {
        self.shared.aborted.store(true, Ordering::Release);
        self.shared.wake.raise();
    }

    /// Whether somebody called [`AbortHandle::abort`].
    pub fn is_aborted(&self) -> bool {
        self.shared.aborted.load(Ordering::Acquire)
    }

    /// The number of operations that this member has entered. If a group hangs, the member that lags behind is the
    /// culprit.
    pub fn entered(&self) -> u64 {
        self.shared.entered.load(Ordering::Relaxed)
    }

    /// How long ago the present operation last sent or received a byte, or was entered; `None` between two operations.
    pub fn still_for(&self) -> Option<Duration> {
        let moved = self.shared.moved.load(Ordering::Relaxed);
        let moved = (moved != IDLE).then(|| Duration::from_millis(moved))?;
        Some(self.shared.made.elapsed().saturating_sub(moved))
    }

    /// Records that the group enters operation number `operation`.
    pub(super) fn enter(&self, operation: u64) {
        self.shared.entered.store(operation, Ordering::Relaxed);
        self.moved(Instant::now());
    }

    /// Records that something was sent or received.
    pub(super) fn moved(&self, now: Instant) {
        let since = now.saturating_duration_since(self.shared.made);
        self.shared.moved.store(since.as_millis() as u64, Ordering::Relaxed);
    }

    /// Records that the operation is over.
    pub(super) fn finish(&self) {
        self.shared.moved.store(IDLE, Ordering::Relaxed);
    }
}

impl AsFd for AbortHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }
}

/// Blocks until one of `sources` is ready (or broken), or until the time `until`.
pub(super) fn wait(sources: &mut [PollFd<'_>], until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
    match poll(sources, Some(&timeout)) {
        // After a signal the caller checks its state and waits again.
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A source that is ready when `source` has something to read.
pub(super) fn readable<Fd: AsFd>(source: &Fd) -> PollFd<'_> {
    PollFd::new(source, PollFlags::IN)
}

/// A source that is ready when `source` has room to write.
pub(super) fn writable<Fd: AsFd>(source: &Fd) -> PollFd<'_> {
    PollFd::new(source, PollFlags::OUT)
}
