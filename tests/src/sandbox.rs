//! A temporary folder for a test, and the programs that run in it.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::plans::{TINY, write_prose};
use crate::process::{Output, Process};
use crate::programs::programs;
use crate::run::RunFolder;

/// Name of the user's runtime folder in a sandbox.
const RUNTIME: &str = "runtime";

/// A temporary folder with `plan.toml` and `corpus/`, in which programs are started.
///
/// When it is dropped, local workers that are still alive are killed. If the test has failed, all output and logs are
/// printed.
#[derive(Debug)]
pub struct Sandbox {
    home: TempDir,
    environment: Vec<(String, String)>,
    outputs: Mutex<Vec<(String, Arc<Output>)>>,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    /// A sandbox with the plan [`TINY`] and text for it.
    ///
    /// # Panics
    /// When its files cannot be written.
    pub fn new() -> Self {
        let sandbox = Self::empty();
        sandbox.write("plan.toml", TINY);
        write_prose(&sandbox.path("corpus"));
        sandbox
    }

    /// A sandbox that begins as a copy of another, to which no program may be writing.
    ///
    /// # Panics
    /// When its files cannot be written.
    pub fn copy_of(other: &Self) -> Self {
        let sandbox = Self::empty();
        copy(other.home.path(), sandbox.home.path());
        // Tokens in the runtime folder belong to coordinators in the other sandbox.
        fs::remove_dir_all(sandbox.path(RUNTIME).join("ulmus")).ok();
        sandbox
    }

    /// A sandbox that begins as a copy of a folder.
    ///
    /// # Panics
    /// When its files cannot be written.
    pub fn with_contents_of(folder: &Path) -> Self {
        let sandbox = Self::empty();
        copy(folder, sandbox.home.path());
        sandbox
    }

    fn empty() -> Self {
        let home = tempfile::tempdir().expect("a temporary folder can be made");
        fs::create_dir(home.path().join(RUNTIME)).expect("a folder can be made in it");
        Self { home, environment: Vec::new(), outputs: Mutex::default() }
    }

    /// A path in the sandbox.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Sets environment variables for programs that are started from now on.
    pub fn set_environment(&mut self, variables: &[(&str, &str)]) {
        self.environment =
            variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    }

    /// Writes a file in the sandbox.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).expect("a file of the sandbox can be written");
    }

    /// The folder of the run with this name.
    pub fn run(&self, name: &str) -> RunFolder {
        RunFolder::new(self.path("runs").join(name))
    }

    /// Starts `coordinator --plan plan.toml` with more arguments. It listens on a free port.
    pub fn coordinator(&self, arguments: &[&str]) -> Process {
        let first = ["--plan", "plan.toml", "--listen", "127.0.0.1:0"];
        self.coordinator_bare(&[&first[..], arguments].concat())
    }

    /// Starts the coordinator with only these arguments.
    pub fn coordinator_bare(&self, arguments: &[&str]) -> Process {
        self.start(&programs().coordinator, arguments)
    }

    /// Starts a program in the given network namespace, or in that of the test.
    pub fn start_in(&self, namespace: Option<&str>, program: &Path, arguments: &[&str]) -> Process {
        let Some(namespace) = namespace else { return self.start(program, arguments) };
        let program = program.to_str().expect("programs are built where names are text");
        // `ip netns exec` becomes the program rather than its parent.
        self.start(Path::new("ip"), &[&["netns", "exec", namespace, program], arguments].concat())
    }

    /// Starts a program for which everything in `folder` is read-only. Returns `None`, with a message on standard
    /// error, if the system does not permit that.
    #[expect(clippy::print_stderr, reason = "a person must see what was not tested")]
    pub fn start_read_only(&self, folder: &Path, program: &Path, arguments: &[&str]) -> Option<Process> {
        if !Command::new("unshare").args(["--mount", "true"]).status().is_ok_and(|status| status.success()) {
            eprintln!("not tested: a mount namespace takes root");
            return None;
        }
        let mount = r#"mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@""#;
        let text = |path: &Path| path.to_str().expect("paths of tests are text").to_owned();
        let (folder, program) = (text(folder), text(program));
        // The shell becomes the program rather than its parent.
        let first = ["--mount", "sh", "-c", mount, &folder, &program];
        Some(self.start(Path::new("unshare"), &[&first[..], arguments].concat()))
    }

    /// Starts a worker with one thread that joins a coordinator.
    pub fn worker(&self, address: &str, name: &str) -> Process {
        self.worker_bare(&["--join", address, "--name", name, "--threads", "1", "--device", "cpu"])
    }

    /// Starts a worker with only these arguments.
    pub fn worker_bare(&self, arguments: &[&str]) -> Process {
        self.start(&programs().worker, arguments)
    }

    /// Starts the evaluator.
    pub fn evaluator(&self, arguments: &[&str]) -> Process {
        self.start(&programs().evaluator, arguments)
    }

    /// Starts the data loader.
    pub fn dataloader(&self, arguments: &[&str]) -> Process {
        self.start(&programs().dataloader, arguments)
    }

    fn start(&self, program: &Path, arguments: &[&str]) -> Process {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.home.path());
        // Variables of the environment would change what is tested.
        for (name, _) in std::env::vars_os() {
            if name == "RUST_LOG" || name.as_encoded_bytes().starts_with(b"ULMUS_") {
                command.env_remove(name);
            }
        }
        // Each sandbox has its own runtime folder, in which workers find their coordinator's token.
        command.env("XDG_RUNTIME_DIR", self.path(RUNTIME));
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let process = Process::start(&mut command);
        let name = program.file_name().unwrap_or(OsStr::new("?")).to_string_lossy();
        let title = format!("{name} {}", arguments.join(" "));
        self.outputs().push((title, process.output()));
        process
    }

    fn outputs(&self) -> std::sync::MutexGuard<'_, Vec<(String, Arc<Output>)>> {
        self.outputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn runs(&self) -> Vec<RunFolder> {
        let entries = fs::read_dir(self.path("runs")).into_iter().flatten().filter_map(Result::ok);
        entries.map(|entry| RunFolder::new(entry.path())).collect()
    }

    /// Whether a process belongs to the sandbox. Its id may have been reused by another process.
    fn is_ours(&self, pid: Pid) -> bool {
        let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        let home = self.home.path().as_os_str().as_encoded_bytes();
        command.windows(home.len()).any(|part| part == home)
    }

    #[expect(clippy::print_stderr, reason = "what a person needs when a test fails")]
    fn print_everything(&self) {
        for (title, output) in self.outputs().iter() {
            eprintln!("\n==== {title}\n{}", output.text());
        }
        for run in self.runs() {
            for entry in fs::read_dir(run.path().join("logs")).into_iter().flatten().filter_map(Result::ok) {
                let text = fs::read_to_string(entry.path()).unwrap_or_default();
                eprintln!("\n==== {}\n{text}", entry.path().display());
            }
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_everything();
        }
        for pid in self.runs().iter().flat_map(|run| run.local_workers().into_values()) {
            if self.is_ours(pid) {
                // It may just have ended by itself.
                kill_process(pid, Signal::KILL).ok();
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder can be made");
    for entry in fs::read_dir(from).expect("a folder can be read").filter_map(Result::ok) {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).expect("a file can be copied");
        }
    }
}
