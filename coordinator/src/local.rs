//! Workers on the coordinator's own machine, as child processes of its own binary.
//!
//! They join over loopback exactly as remote workers do. They run in their own process group, so that a terminal's
//! Ctrl-C reaches only the coordinator. They outlive a coordinator that dies: the next one finds them by their process
//! ids, and starts only those that are missing.

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

/// A worker that ends earlier than this after its start counts as a failed start.
const SETTLED: Duration = Duration::from_secs(30);
/// After this many failed starts in a row the worker counts as failing. It is still restarted.
const FAILED_STARTS: u32 = 5;
/// Pause before a worker with two failed starts in a row is restarted; each further failure doubles it.
const PAUSE: Duration = Duration::from_millis(500);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// A local worker, whether its process is running or not.
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
    /// A process that was started by an earlier coordinator of the same run.
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
    /// Adopts the workers that an earlier coordinator has left; [`Self::maintain`] starts those that are missing.
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

    /// Restarts workers that have ended, with growing pauses if they end right after their start. Returns messages
    /// about workers that could not be started, once for each.
    pub(crate) fn maintain(&mut self) -> Vec<String> {
        let now = Instant::now();
        let mut failures = Vec::new();
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            if slot.is_alive() {
                continue;
            }
            if slot.process.take().is_some() {
                slot.on_ended(now);
            }
            if now < slot.not_before {
                continue;
            }
            let name = slot.name.clone();
            let started = self.spawn(index, &name).and_then(|child| {
                let pid = child.id();
                // Keep the process even if its id cannot be written: otherwise nobody could stop it.
                self.slots[index].process = Some(Process::Child(child));
                fs::write(self.pid_file(&name), format!("{pid}\n"))
            });
            let slot = &mut self.slots[index];
            slot.started = now;
            if let Err(error) = started {
                if slot.process.is_none() {
                    slot.on_ended(now);
                }
                if slot.failed_starts <= 1 {
                    failures.push(format!("cannot start worker {name}: {error}; trying again"));
                }
            }
        }
        failures
    }

    /// If all local workers keep failing, a message that says so.
    pub(crate) fn failing(&self) -> Option<String> {
        let all = self.slots.iter().all(|slot| slot.failed_starts >= FAILED_STARTS);
        let slot = self.slots.first().filter(|_| all)?;
        let log = self.log_file(&slot.name);
        let name = &slot.name;
        Some(format!(
            "worker {name} exited {FAILED_STARTS} times right after its start; see {}",
            log.display()
        ))
    }

    /// Kills one worker with SIGKILL. Returns its name.
    pub(crate) fn kill_one(&mut self) -> Option<String> {
        let slot = self.slots.last_mut()?;
        let pid = slot.pid()?;
        // A worker that has just exited by itself will do as well.
        kill_process(pid, Signal::KILL).ok()?;
        Some(slot.name.clone())
    }

    /// Waits for workers that were told to finish, and kills those that do not.
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
            // Only the same user can read the environment of a process.
            .env("ULMUS_TOKEN", self.token.reveal())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
    }

    /// The process id of a worker of this run with this name that an earlier coordinator has left running.
    fn left_behind(&self, name: &str) -> Option<Pid> {
        let pid = fs::read_to_string(self.pid_file(name)).ok()?.trim().parse().ok()?;
        let pid = Pid::from_raw(pid)?;
        test_kill_process(pid).ok()?;
        // The id may belong to another process by now; only ours has the address file on its command line.
        let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        let file = self.address_file.as_os_str().as_encoded_bytes();
        command.windows(file.len()).any(|part| part == file).then_some(pid)
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.folder.join(paths::log(name))
    }

    fn pid_file(&self, name: &str) -> PathBuf {
        self.folder.join(paths::pid(name))
    }
}

impl Slot {
    fn pid(&self) -> Option<Pid> {
        match self.process.as_ref()? {
            Process::Child(child) => Pid::from_raw(i32::try_from(child.id()).ok()?),
            Process::Adopted(pid) => Some(*pid),
        }
    }

    /// The process has ended, or could not be started.
    fn on_ended(&mut self, now: Instant) {
        self.failed_starts = if self.started.elapsed() > SETTLED { 0 } else { self.failed_starts + 1 };
        // A worker that was killed once is restarted at once.
        let pause = match self.failed_starts.checked_sub(2) {
            Some(doublings) => (PAUSE * 2_u32.pow(doublings.min(10))).min(LONGEST_PAUSE),
            None => Duration::ZERO,
        };
        self.not_before = now + pause;
    }

    fn is_alive(&mut self) -> bool {
        match &mut self.process {
            None => false,
            // If the state of the process is unknown, assume that it is alive rather than start a second one.
            Some(Process::Child(child)) => child.try_wait().map_or(true, |ended| ended.is_none()),
            Some(Process::Adopted(pid)) => test_kill_process(*pid).is_ok(),
        }
    }
}
