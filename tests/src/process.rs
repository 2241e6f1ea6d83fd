//! A running program, everything that it says, and how it ends.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::wait::DEADLINE;

/// A program that was started, with both of its outputs kept.
///
/// It is killed when the value is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    output: Arc<Output>,
}

/// What a program that has ended leaves.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Everything that it said, standard error included, in lines.
    pub output: String,
}

/// The lines of a program so far.
#[derive(Debug, Default)]
pub(crate) struct Output {
    said: Mutex<Said>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Said {
    lines: Vec<String>,
    /// Outputs that have ended, of two.
    ended: usize,
}

impl Output {
    pub(crate) fn text(&self) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).lines.join("\n")
    }

    fn read(self: &Arc<Self>, stream: impl Read + Send + 'static) {
        let output = Arc::clone(self);
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                output.change(|said| said.lines.push(line));
            }
            output.change(|said| said.ended += 1);
        });
    }

    fn change(&self, change: impl FnOnce(&mut Said)) {
        change(&mut self.said.lock().unwrap_or_else(PoisonError::into_inner));
        self.more.notify_all();
    }

    /// Waits until `condition` gives something or the program has closed both outputs.
    fn wait<T>(&self, what: &str, mut condition: impl FnMut(&[String]) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + DEADLINE;
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = condition(&said.lines) {
                return Some(found);
            }
            if said.ended == 2 {
                return None;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {DEADLINE:?} in vain for {what}");
            said = self.more.wait_timeout(said, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program can be started");
        let output = Arc::new(Output::default());
        output.read(child.stdout.take().expect("standard output is piped"));
        output.read(child.stderr.take().expect("standard error is piped"));
        Self { child, output }
    }

    pub(crate) fn output(&self) -> Arc<Output> {
        Arc::clone(&self.output)
    }

    /// Waits until the program has said a line with `text` in it, and gives that line.
    ///
    /// # Panics
    /// When it ends without, or says nothing of the kind for too long.
    pub fn says(&self, text: &str) -> String {
        let found = self.output.wait(text, |lines| lines.iter().find(|line| line.contains(text)).cloned());
        assert!(found.is_some(), "ended without having said {text:?}");
        found.unwrap_or_default()
    }

    /// Waits until a coordinator listens, and gives its address.
    ///
    /// # Panics
    /// As [`Self::says`].
    pub fn address(&self) -> String {
        let line = self.says("workers join at ");
        line.rsplit(' ').next().unwrap_or_default().to_owned()
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it has ended and was waited for.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("a child can be signalled until it was waited for");
    }

    /// How it has ended, if it has.
    ///
    /// # Panics
    /// Never for a child.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Everything that it has said so far, standard error included, in lines.
    pub fn said(&self) -> String {
        self.output.text()
    }

    /// Kills it with SIGKILL, and waits until it is gone.
    pub fn kill(mut self) {
        self.end_now();
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn ends(mut self) -> Ended {
        self.output.wait("the end of a program", |_| None::<()>);
        let status = self.child.wait().expect("a child can be waited for");
        Ended { code: status.code(), output: self.output.text() }
    }

    /// Waits for its end, which must be a success; gives what it said.
    ///
    /// # Panics
    /// When it fails, or does not end in time.
    pub fn succeeds(self) -> String {
        let Ended { code, output } = self.ends();
        assert_eq!(code, Some(0), "{output}");
        output
    }

    fn end_now(&mut self) {
        // One that has ended already is what was wanted.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end_now();
    }
}
