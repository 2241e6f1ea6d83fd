//! Waiting for several sockets at once, and ending the wait from another thread.
//!
//! Everything about a ring that blocks, blocks in [`wait`], with a deadline and with an [`Interrupt`] or another
//! [`WakeupPipe`] among the sources. So nothing ever has to be interrupted by force.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// A flag that wakes a thread in [`wait`]: a file descriptor that is readable once the flag is raised.
#[derive(Debug)]
pub(crate) struct WakeupPipe {
    raised: UnixStream,
    seen: UnixStream,
}

impl WakeupPipe {
    pub(crate) fn new() -> io::Result<Self> {
        let (raised, seen) = UnixStream::pair()?;
        raised.set_nonblocking(true)?;
        seen.set_nonblocking(true)?;
        Ok(Self { raised, seen })
    }

    /// Raises the flag, until [`WakeupPipe::lower`].
    pub(crate) fn raise(&self) {
        // If the buffer is full, the flag is raised already.
        drop((&self.raised).write(&[1]));
    }

    /// Lowers the flag.
    pub(crate) fn lower(&self) {
        let mut buffer = [0; 64];
        while matches!((&self.seen).read(&mut buffer), Ok(count) if count > 0) {}
    }
}

impl AsFd for WakeupPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.seen.as_fd()
    }
}

/// Ends what other threads wait for, once and for all.
#[derive(Debug)]
pub struct Interrupt {
    raised: AtomicBool,
    wake: WakeupPipe,
}

impl Interrupt {
    /// One that is not raised yet.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { raised: AtomicBool::new(false), wake: WakeupPipe::new()? })
    }

    /// Ends every wait that has this interrupt among its sources, now and later.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::Release);
        self.wake.raise();
    }

    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }
}

/// Readable once it is raised.
impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Blocks until one of `sources` is ready (or broken), or until the time `until`.
///
/// # Errors
/// Those of the system, but for interruption by a signal: then the caller checks its state and waits again.
pub fn wait(sources: &mut [PollFd<'_>], until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
    match poll(sources, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A source that is ready when `source` has something to read.
pub fn readable<Fd: AsFd>(source: &Fd) -> PollFd<'_> {
    PollFd::new(source, PollFlags::IN)
}

/// A source that is ready when `source` has room to write.
pub(super) fn writable<Fd: AsFd>(source: &Fd) -> PollFd<'_> {
    PollFd::new(source, PollFlags::OUT)
}
