//! Workers on the coordinator's own machine, as child processes of its own binary.
//!
//! They join over loopback exactly as remote ones do. They run in their own process group, so that a terminal's
//! Ctrl-C reaches the coordinator alone, and outlive a coordinator that dies: the next one finds them by their
//! process ids and starts only those that are missing.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use ulmus_plan::LocalConfig;
use ulmus_run::paths;
use ulmus_transport::JoinToken;

/// How long a worker must have lived for its end not to count as a failed start.
const SETTLED: Duration = Duration::from_secs(30);
/// Starts in a row that may fail before nobody counts on the worker any more. It is still started again.
const FAILED_STARTS: u32 = 5;
/// Pause before a worker whose last start failed is started again; each further failure doubles it.
const PAUSE: Duration = Duration::from_millis(500);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// One worker.
#[derive(Debug)]
struct Slot {
    name: String,
    process: Option<Process>,
    started: Instant,
    failed_starts: u32,
    not_before: Instant,
}

#[derive(Debug)]
enum Process {
    Child(Child),
    /// Started by an earlier coordinator of the same run.
    Adopted(Pid),
}

/// The local workers of a run.
#[derive(Debug)]
pub(crate) struct LocalWorkers {
    folder: PathBuf,
    address_file: PathBuf,
    token: JoinToken,
    config: LocalConfig,
    slots: Vec<Slot>,
}

impl LocalWorkers {
    /// Takes over the workers that an earlier coordinator left; [`Self::maintain`] starts those that are missing.
    pub(crate) fn start(
        folder: &Path,
        address_file: PathBuf,
        token: JoinToken,
        config: &LocalConfig,
    ) -> Self {
        let (folder, config) = (folder.to_path_buf(), config.clone());
        let mut workers = Self { folder, address_file, token, config, slots: Vec::new() };
        for index in 0..workers.config.workers {
            let name = format!("local-{index}");
            let process = workers.left_behind(&name).map(Process::Adopted);
            let now = Instant::now();
            workers.slots.push(Slot { name, process, started: now, failed_starts: 0, not_before: now });
        }
        workers
    }

    /// Starts again what has ended, later and later if it ends right after its start; tells what could not be started, once.
    pub(crate) fn maintain(&mut self) -> Vec<String> {
        let now = Instant::now();
        let mut failures = Vec::new();
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            if slot.is_alive() {
                continue;
            }
            if slot.process.take().is_some() {
                slot.has_ended(now);
            }
            if now < slot.not_before {
                continue;
            }
            let name = slot.name.clone();
            let started = self.spawn(index, &name).and_then(|child| {
                let pid = child.id();
                // Kept even if its number cannot be written: a worker that nobody knows could not be stopped.
                self.slots[index].process = Some(Process::Child(child));
                fs::write(self.pid_file(&name), format!("{pid}\n"))
            });
            let slot = &mut self.slots[index];
            slot.started = now;
            if let Err(error) = started {
                if slot.process.is_none() {
                    slot.has_ended(now);
                }
                if slot.failed_starts <= 1 {
                    failures.push(format!("worker {name}: {error}; trying again"));
                }
            }
        }
        failures
    }

    /// Why no local worker can be counted on, if so.
    pub(crate) fn hopeless(&self) -> Option<String> {
        let all = self.slots.iter().all(|slot| slot.failed_starts >= FAILED_STARTS);
        let slot = self.slots.first().filter(|_| all)?;
        let log = self.log_file(&slot.name);
        let name = &slot.name;
        Some(format!(
            "worker {name} ended {FAILED_STARTS} times right after its start; see {}",
            log.display()
        ))
    }

    /// Kills one worker with SIGKILL, and tells which.
    pub(crate) fn kill_one(&mut self) -> Option<String> {
        let slot = self.slots.last_mut()?;
        let pid = slot.pid()?;
        // One that has just ended by itself is as dead as a killed one.
        kill_process(pid, Signal::KILL).ok()?;
        Some(slot.name.clone())
    }

    /// Waits for workers that were told to finish; those that do not are killed.
    pub(crate) async fn finish(mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        while self.slots.iter_mut().any(Slot::is_alive) {
            if Instant::now() > deadline {
                for pid in self.slots.iter().filter_map(Slot::pid) {
                    kill_process(pid, Signal::KILL).ok();
                }
                return;
            }
            tick.tick().await;
        }
    }

    fn spawn(&self, index: usize, name: &str) -> io::Result<Child> {
        let log = OpenOptions::new().create(true).append(true).open(self.log_file(name))?;
        Command::new(std::env::current_exe()?)
            .arg("local-worker")
            .args(["--name", name])
            .args(["--device", &self.config.device.to_string()])
            .args(["--nth", &index.to_string()])
            .args(["--threads", &self.config.threads.to_string()])
            .arg("--join-file")
            .arg(&self.address_file)
            // Only its user can read a process's environment.
            .env("ULMUS_TOKEN", self.token.reveal())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
    }

    /// A worker of this run and name that is still alive though its coordinator is not.
    fn left_behind(&self, name: &str) -> Option<Pid> {
        let pid = fs::read_to_string(self.pid_file(name)).ok()?.trim().parse().ok()?;
        let pid = Pid::from_raw(pid)?;
        test_kill_process(pid).ok()?;
        // The number may belong to another process by now; only ours has the address file on its command line.
        let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        let file = self.address_file.as_os_str().as_encoded_bytes();
        command.windows(file.len()).any(|part| part == file).then_some(pid)
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.folder.join(paths::log(name))
    }

    fn pid_file(&self, name: &str) -> PathBuf {
        self.folder.join(paths::LOGS).join(format!("{name}.pid"))
    }
}

impl Slot {
    fn pid(&self) -> Option<Pid> {
        match self.process.as_ref()? {
            Process::Child(child) => Pid::from_raw(i32::try_from(child.id()).ok()?),
            Process::Adopted(pid) => Some(*pid),
        }
    }

    /// Its process has ended, or could not be started.
    fn has_ended(&mut self, now: Instant) {
        self.failed_starts = if self.started.elapsed() > SETTLED { 0 } else { self.failed_starts + 1 };
        // A worker that was killed once is back at once.
        let pause = match self.failed_starts.checked_sub(2) {
            Some(doublings) => (PAUSE * 2_u32.pow(doublings.min(10))).min(LONGEST_PAUSE),
            None => Duration::ZERO,
        };
        self.not_before = now + pause;
    }

    fn is_alive(&mut self) -> bool {
        match &mut self.process {
            None => false,
            // What cannot be asked about is not started a second time.
            Some(Process::Child(child)) => child.try_wait().map_or(true, |ended| ended.is_none()),
            Some(Process::Adopted(pid)) => test_kill_process(*pid).is_ok(),
        }
    }
}
