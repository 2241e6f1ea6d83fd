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

/// How long a worker must have lived for its end not to count as a failed start.
const SETTLED: Duration = Duration::from_secs(30);
/// Starts in a row that may fail.
const FAILED_STARTS: u32 = 5;

/// One worker.
#[derive(Debug)]
struct Slot {
    name: String,
    process: Option<Process>,
    started: Instant,
    failed_starts: u32,
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
    config: LocalConfig,
    slots: Vec<Slot>,
}

impl LocalWorkers {
    /// Takes over the workers that an earlier coordinator left, and starts those that are missing.
    ///
    /// # Errors
    /// When a worker cannot be started.
    pub(crate) fn start(folder: &Path, address_file: PathBuf, config: &LocalConfig) -> io::Result<Self> {
        let mut workers =
            Self { folder: folder.to_path_buf(), address_file, config: config.clone(), slots: Vec::new() };
        for index in 0..config.workers {
            let name = format!("local-{index}");
            let process = workers.left_behind(&name).map(Process::Adopted);
            workers.slots.push(Slot { name, process, started: Instant::now(), failed_starts: 0 });
        }
        workers.maintain()?;
        Ok(workers)
    }

    /// Starts again what has ended.
    ///
    /// # Errors
    /// When a worker cannot be started, or ended several times right after its start.
    pub(crate) fn maintain(&mut self) -> io::Result<()> {
        for index in 0..self.slots.len() {
            if self.slots[index].is_alive()? {
                continue;
            }
            let slot = &mut self.slots[index];
            if slot.process.take().is_some() {
                slot.failed_starts =
                    if slot.started.elapsed() > SETTLED { 0 } else { slot.failed_starts + 1 };
            }
            if slot.failed_starts == FAILED_STARTS {
                let log = self.log_file(&self.slots[index].name);
                return Err(io::Error::other(format!(
                    "worker {} ended {FAILED_STARTS} times right after its start; see {}",
                    self.slots[index].name,
                    log.display()
                )));
            }
            let child = self.spawn(index, &self.slots[index].name)?;
            fs::write(self.pid_file(&self.slots[index].name), format!("{}\n", child.id()))?;
            let slot = &mut self.slots[index];
            slot.process = Some(Process::Child(child));
            slot.started = Instant::now();
        }
        Ok(())
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
        while self.slots.iter_mut().any(|slot| slot.is_alive().unwrap_or(false)) {
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
        self.folder.join("logs").join(format!("{name}.log"))
    }

    fn pid_file(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.pid"))
    }
}

impl Slot {
    fn pid(&self) -> Option<Pid> {
        match self.process.as_ref()? {
            Process::Child(child) => Pid::from_raw(i32::try_from(child.id()).ok()?),
            Process::Adopted(pid) => Some(*pid),
        }
    }

    fn is_alive(&mut self) -> io::Result<bool> {
        Ok(match &mut self.process {
            None => false,
            Some(Process::Child(child)) => child.try_wait()?.is_none(),
            Some(Process::Adopted(pid)) => test_kill_process(*pid).is_ok(),
        })
    }
}
