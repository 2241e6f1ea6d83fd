//! Freezes a single thread of a process while its others go on, as if the thread waited for a broken disk.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use nix::sys::ptrace;
use rustix::process::Pid;

/// A thread that is frozen until this value is dropped.
#[derive(Debug)]
pub struct Frozen {
    // Only the thread that has seized another can release it.
    release: Option<Sender<()>>,
    holder: Option<JoinHandle<()>>,
}

/// Whether a process currently has a thread with this name.
pub fn has_thread(process: Pid, name: &str) -> bool {
    thread_of(process, name).is_some()
}

/// Freezes the thread with this name. Returns `None`, with a message on standard error, if the system does not let one
/// process do that to another.
///
/// # Panics
/// When the process has no such thread.
#[expect(clippy::print_stderr, reason = "a person must see what was not tested")]
pub fn freeze_thread(process: Pid, name: &str) -> Option<Frozen> {
    let thread = thread_of(process, name).expect("the process has such a thread");
    let (release, released) = channel::<()>();
    let (tell, told) = channel();
    let holder = std::thread::spawn(move || {
        let frozen = ptrace::seize(thread, ptrace::Options::empty()).and_then(|()| ptrace::interrupt(thread));
        let went_well = frozen.is_ok();
        tell.send(frozen).ok();
        if went_well {
            // Ends when the value is dropped.
            released.recv().ok();
            ptrace::detach(thread, None).ok();
        }
    });
    match told.recv().expect("the thread says how it went") {
        Ok(()) => Some(Frozen { release: Some(release), holder: Some(holder) }),
        Err(error) => {
            eprintln!("not tested: a thread cannot be stopped here: {error}");
            None
        }
    }
}

fn thread_of(process: Pid, name: &str) -> Option<nix::unistd::Pid> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).ok()?;
    let found = threads.filter_map(Result::ok).find(|thread| {
        std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    });
    Some(nix::unistd::Pid::from_raw(found?.file_name().to_str()?.parse().ok()?))
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.release.take();
        if let Some(holder) = self.holder.take() {
            holder.join().ok();
        }
    }
}
