//! A running program, its output, and how it ends.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::wait::DEADLINE;

/// A started program, and everything that it has printed.
///
/// It is killed when the value is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    output: Arc<Output>,
}

/// The result of a program that has ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code; `None` if a signal ended the program.
    pub code: Option<i32>,
    /// Everything that it printed, including standard error, in lines.
    pub output: String,
}

/// The lines that a program has printed so far.
#[derive(Debug, Default)]
pub(crate) struct Output {
    said: Mutex<Said>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Said {
    lines: Vec<String>,
    /// Number of its two outputs that have ended.
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

    /// Waits until `condition` returns a value or the program has closed both outputs.
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

    /// Waits until the program has printed a line that contains `text`, and returns that line.
    ///
    /// # Panics
    /// When the program ends without printing such a line, or takes too long.
    pub fn says(&self, text: &str) -> String {
        let found = self.output.wait(text, |lines| lines.iter().find(|line| line.contains(text)).cloned());
        assert!(found.is_some(), "ended without having said {text:?}");
        found.unwrap_or_default()
    }

    /// Waits until a coordinator listens, and returns its address.
    ///
    /// # Panics
    /// In the same cases as [`Self::says`].
    pub fn address(&self) -> String {
        let line = self.says("workers join at ");
        line.rsplit(' ').next().unwrap_or_default().to_owned()
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends the program a signal.
    ///
    /// # Panics
    /// When the program has ended and was waited for.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("a child can be signalled until it was waited for");
    }

    /// The exit status, if the program has ended.
    ///
    /// # Panics
    /// Never for a child.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Everything that it has printed so far, including standard error, in lines.
    pub fn said(&self) -> String {
        self.output.text()
    }

    /// Kills the program with SIGKILL, and waits until it is gone.
    pub fn kill(mut self) {
        self.end_now();
    }

    /// Waits until the program ends.
    ///
    /// # Panics
    /// When the program does not end in time.
    pub fn ends(mut self) -> Ended {
        self.output.wait("the end of a program", |_| None::<()>);
        let status = self.child.wait().expect("a child can be waited for");
        Ended { code: status.code(), output: self.output.text() }
    }

    /// Waits until the program ends successfully. Returns what it printed.
    ///
    /// # Panics
    /// When the program fails, or does not end in time.
    pub fn succeeds(self) -> String {
        let Ended { code, output } = self.ends();
        assert_eq!(code, Some(0), "{output}");
        output
    }

    fn end_now(&mut self) {
        // These fail only if the program has already ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end_now();
    }
}
