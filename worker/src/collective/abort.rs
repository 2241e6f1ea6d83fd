//! Ending a group's operations from another thread, and telling how far they have come.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ulmus_transport::ring::Interrupt;

/// Ends the operations of a group from any thread, and tells how far the group has come.
///
/// A handle is made before its group, so that forming the group can be ended, too. It serves one group only.
#[derive(Debug, Clone)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    interrupt: Interrupt,
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
            interrupt: Interrupt::new()?,
            made: Instant::now(),
            entered: AtomicU64::new(0),
            moved: AtomicU64::new(IDLE),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Makes a blocked call, and every later one, return [`Aborted`](super::CollectiveError::Aborted) at once.
    pub fn abort(&self) {
        self.shared.interrupt.raise();
    }

    /// Whether somebody called [`AbortHandle::abort`].
    pub fn is_aborted(&self) -> bool {
        self.shared.interrupt.is_raised()
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

    /// What ends the forming of the group as well.
    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.shared.interrupt
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
        self.shared.interrupt.as_fd()
    }
}
