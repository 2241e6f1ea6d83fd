//! Everything at once: real processes, and faults of every kind at random times. However a run is disturbed, it must
//! end with the bits of an undisturbed run.
//!
//!     just chaos SEEDS=200
//!     CHAOS_FIRST=17 CHAOS_SEEDS=1 cargo test --workspace --test chaos -- --ignored --nocapture
//!
//! A seed determines the faults and their times; how far the processes get in between depends on the machine. Faults
//! that the system does not permit are skipped with a message; those of disks and networks take root.

#![expect(clippy::print_stderr, reason = "a person wants to know what happened")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use ulmus_tests::{
    Bits, Frozen, Network, Process, Random, RunFolder, Sandbox, SmallDisk, freeze_thread, has_thread,
    programs,
};

/// The least number of updates of the run. A fast machine does more, so that there is time for faults.
const STEPS: usize = 700;
/// Number of milestones, all of which have room on the disk.
const MILESTONES: usize = 35;
/// How long one worker takes for the run at the least.
const CALM: Duration = Duration::from_secs(15);
/// The run is left alone after this part of its updates, or after this time if faults keep it from advancing.
const DISTURBED: f64 = 0.85;
const DISTURBED_FOR: Duration = Duration::from_secs(30);
/// Differences from the tiny plan: more and smaller steps. The averaged milestones reach back to steps with faults.
const KEYS: [&str; 11] = [
    "local.workers=0",
    "train.sequences=8",
    "train.micro_batch=2",
    "model.max_context_length=64",
    "checkpoint.average=8",
    "evaluate.text=1KiB",
    "evaluate.continuation=2",
    "checkpoint.recovery=2s",
    "checkpoint.max_age=30s",
    "cluster.dead_after=3s",
    "cluster.rejoin_window=2s",
];
/// Maximum number of workers at a time.
const MOST_WORKERS: usize = 4;
/// Number of machines.
const MACHINES: usize = 4;
/// Size of the disk for the runs, in MiB; several times what the run needs.
const DISK: usize = 192;
/// How long a new step, or the end of a program, may take.
const TIMEOUT: Duration = Duration::from_secs(90);
/// Time between two observations.
const LOOK_EVERY: Duration = Duration::from_millis(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    KillWorker,
    StopWorker,
    EndWorker,
    Join,
    KillAllWorkers,
    EndAllWorkers,
    KillCoordinator,
    StopCoordinator,
    EndCoordinator,
    FreezeTrainer,
    FlipBit,
    FillDisk,
    CutNetwork,
}

/// Kinds of faults. Common ones occur several times.
const KINDS: [Kind; 17] = [
    Kind::KillWorker,
    Kind::KillWorker,
    Kind::KillWorker,
    Kind::StopWorker,
    Kind::EndWorker,
    Kind::EndWorker,
    Kind::Join,
    Kind::KillAllWorkers,
    Kind::EndAllWorkers,
    Kind::KillCoordinator,
    Kind::KillCoordinator,
    Kind::StopCoordinator,
    Kind::EndCoordinator,
    Kind::FreezeTrainer,
    Kind::FlipBit,
    Kind::FillDisk,
    Kind::CutNetwork,
];

/// Something to do later: it ends a fault, or follows one.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Later {
    ContinueWorker(String),
    ContinueCoordinator,
    Thaw(String),
    FreeDisk,
    Heal(usize),
    StartCoordinator,
    StartWorker,
}

/// A worker, or the coordinator.
struct Program {
    // Dropped before the process is waited for, which could not end otherwise.
    frozen: Option<Frozen>,
    process: Process,
    name: String,
    machine: usize,
    asked_to_leave: Option<Instant>,
    stopped: bool,
}

/// The time from a fault to the next new step.
struct Pause {
    kind: Kind,
    began: Instant,
    steps: usize,
    attempt: String,
    /// Whether there was no other fault at the same time.
    alone: bool,
}

/// Statistics over many seeds.
#[derive(Debug, Default)]
struct Tally {
    faults: BTreeMap<Kind, usize>,
    redone: usize,
    groups: usize,
    pauses: Vec<Duration>,
    /// Times of faults that had no other fault at the same time.
    alone: BTreeMap<Kind, Vec<Duration>>,
    /// Whether the system does not let one process freeze a thread of another.
    cannot_freeze: bool,
}

/// A disturbed run. Programs are ended in the order of these fields.
struct Chaos<'a> {
    workers: Vec<Program>,
    coordinator: Option<Program>,
    sandbox: Sandbox,
    disk: Option<SmallDisk>,
    network: Option<&'a Network>,
    run: RunFolder,
    seed: u64,
    random: Random,
    /// Number of updates of the run.
    iterations: usize,
    began: Instant,
    /// Address of the coordinator, once it was started.
    address: Option<String>,
    started: usize,
    later: Vec<(Instant, Later)>,
    history: Vec<String>,
    /// Damaged bytes, and their original values.
    flipped: Vec<(PathBuf, u64, u8)>,
    damaged: BTreeSet<String>,
    /// The largest number of steps in `metrics.csv` so far, and since when.
    steps: usize,
    new_step: Instant,
    heard: usize,
    pauses: Vec<Pause>,
    tally: &'a mut Tally,
}

impl<'a> Chaos<'a> {
    fn new(seed: u64, iterations: usize, network: Option<&'a Network>, tally: &'a mut Tally) -> Self {
        let sandbox = Sandbox::new();
        let disk = SmallDisk::new(DISK);
        if let Some(disk) = &disk {
            symlink(disk.path(), sandbox.path("runs")).expect("the sandbox has no runs yet");
        }
        let now = Instant::now();
        Self {
            workers: Vec::new(),
            coordinator: None,
            run: sandbox.run("tiny"),
            sandbox,
            disk,
            network,
            seed,
            random: Random::new(seed),
            began: now,
            address: None,
            started: 0,
            later: Vec::new(),
            history: Vec::new(),
            flipped: Vec::new(),
            damaged: BTreeSet::new(),
            iterations,
            steps: 0,
            new_step: now,
            heard: 0,
            pauses: Vec::new(),
            tally,
        }
    }

    fn note(&mut self, what: &str) {
        self.history.push(format!(
            "{:8.3} s, step {:3}: {what}",
            self.began.elapsed().as_secs_f64(),
            self.steps
        ));
    }

    // ---- starting programs

    fn start_coordinator(&mut self) {
        let host = self.network.map_or_else(|| "127.0.0.1".to_owned(), Network::address);
        let listen = self.address.clone().unwrap_or(format!("{host}:0"));
        let first = ["--plan", "plan.toml", "--listen", &listen, "--token-file", "join.token"];
        let keys = keys(self.iterations);
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let namespace = self.network.map(Network::switch);
        let process = self.sandbox.start_in(
            namespace.as_deref(),
            &programs().coordinator,
            &[&first[..], &keys].concat(),
        );
        if self.address.is_none() {
            self.address = Some(process.address());
        }
        self.heard = 0;
        self.note(&format!("the coordinator starts, process {}", process.pid().as_raw_nonzero()));
        self.coordinator = Some(Program::new(process, "coordinator".to_owned(), usize::MAX));
    }

    fn start_worker(&mut self) {
        self.started += 1;
        let (name, machine) = (format!("w{}", self.started), self.started % MACHINES);
        let address = self.address.clone().expect("the coordinator was started first");
        let join = ["--join", &address, "--name", &name, "--threads", "1", "--device", "cpu"];
        let namespace = self.network.map(|network| network.machine(machine));
        let process = self.sandbox.start_in(
            namespace.as_deref(),
            &programs().worker,
            &[&join[..], &["--token-file", "join.token"]].concat(),
        );
        self.note(&format!("{name} starts on machine {machine}, process {}", process.pid().as_raw_nonzero()));
        self.workers.push(Program::new(process, name, machine));
    }

    // ---- observing

    /// Observes the run, does what is due, and sleeps for a moment.
    fn look(&mut self) {
        self.look_at_steps();
        self.look_at_processes();
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.later).into_iter().partition(|(at, _)| *at <= now);
        self.later = later;
        for (_, what) in due {
            self.act(&what);
        }
        std::thread::park_timeout(LOOK_EVERY);
    }

    fn look_at_steps(&mut self) {
        if let Some(coordinator) = &self.coordinator {
            let said = coordinator.process.said();
            let begins: Vec<usize> = said.lines().skip(self.heard).filter_map(begin_of_group).collect();
            self.heard = said.lines().count();
            for begin in begins {
                self.tally.groups += 1;
                self.tally.redone += self.steps.saturating_sub(begin);
            }
        }
        let text = fs::read_to_string(self.run.path().join("metrics.csv")).unwrap_or_default();
        let complete = &text[..text.rfind('\n').unwrap_or_default()];
        let steps = complete.matches('\n').count();
        let now = Instant::now();
        if steps > self.steps {
            (self.steps, self.new_step) = (steps, now);
        }
        let quiet = now - self.new_step;
        assert!(quiet < TIMEOUT, "no new step for {quiet:?}");
        let attempt = complete.rsplit(',').next().unwrap_or_default();
        for pause in std::mem::take(&mut self.pauses) {
            // If the fault hit a member of the group, the next steps belong to another group.
            let is_over = match pause.kind {
                Kind::KillWorker | Kind::StopWorker | Kind::FreezeTrainer | Kind::CutNetwork
                    if pause.alone =>
                {
                    attempt != pause.attempt
                }
                _ => true,
            };
            if steps <= pause.steps || !is_over {
                if steps < pause.steps + 20 {
                    self.pauses.push(pause);
                }
                continue;
            }
            let took = now - pause.began;
            self.tally.pauses.push(took);
            if pause.alone {
                self.tally.alone.entry(pause.kind).or_default().push(took);
            }
        }
    }

    /// Checks that no program ends unless it was asked to.
    fn look_at_processes(&mut self) {
        let mut gone = Vec::new();
        for (number, worker) in self.workers.iter_mut().enumerate() {
            let (name, asked) = (&worker.name, worker.asked_to_leave);
            match worker.process.has_ended() {
                Some(status) => {
                    assert!(
                        asked.is_some() && leaves_well(status, &worker.process),
                        "worker {name} has ended: {status}"
                    );
                    gone.push(number);
                }
                None => {
                    assert!(asked.is_none_or(|at| at.elapsed() < TIMEOUT), "worker {name} does not leave");
                }
            }
        }
        for number in gone.into_iter().rev() {
            let worker = self.workers.remove(number);
            self.note(&format!("{} has left", worker.name));
        }
        let Some(coordinator) = &mut self.coordinator else { return };
        let asked = coordinator.asked_to_leave;
        if let Some(status) = coordinator.process.has_ended() {
            let well = asked.is_some() && leaves_well(status, &coordinator.process);
            assert!(well, "the coordinator has ended: {status}");
            self.coordinator = None;
            self.note("the coordinator has left");
            let pause = self.random.millis(0, 2000);
            self.at(pause, Later::StartCoordinator);
        } else {
            assert!(asked.is_none_or(|at| at.elapsed() < TIMEOUT), "the coordinator does not leave");
        }
    }

    fn at(&mut self, pause: Duration, what: Later) {
        self.later.push((Instant::now() + pause, what));
    }

    fn act(&mut self, what: &Later) {
        let who = match what {
            Later::ContinueWorker(name) | Later::Thaw(name) => {
                self.workers.iter_mut().find(|worker| worker.name == *name)
            }
            _ => self.coordinator.as_mut(),
        };
        match (what, who) {
            (Later::ContinueWorker(_) | Later::ContinueCoordinator, Some(program)) => {
                program.process.signal(Signal::CONT);
                program.stopped = false;
            }
            (Later::Thaw(_), Some(program)) => program.frozen = None,
            (Later::ContinueWorker(_) | Later::ContinueCoordinator | Later::Thaw(_), None) => {}
            (Later::FreeDisk, _) => self.disk.as_ref().expect("it was filled").free(),
            (Later::Heal(machine), _) => {
                assert!(
                    self.network.is_some_and(|network| network.heal(*machine)),
                    "a cut network can be mended"
                );
            }
            (Later::StartCoordinator, _) => return self.start_coordinator(),
            (Later::StartWorker, _) => return self.start_worker(),
        }
        self.note(&format!("{what:?}"));
    }

    fn is_pending(&self, which: impl Fn(&Later) -> bool) -> bool {
        self.later.iter().any(|(_, what)| which(what))
    }

    // ---- disturbing

    /// Causes a fault of this kind. Returns `false` if it is not possible now.
    fn disturb(&mut self, kind: Kind) -> bool {
        let now = Instant::now();
        let stays: Vec<usize> =
            (0..self.workers.len()).filter(|&number| self.workers[number].asked_to_leave.is_none()).collect();
        let chosen = (!stays.is_empty()).then(|| stays[self.random.below(stays.len())]);
        let coordinator = self
            .coordinator
            .as_ref()
            .is_some_and(|coordinator| coordinator.asked_to_leave.is_none() && !coordinator.stopped);
        let pause = Pause {
            kind,
            began: now,
            steps: self.steps,
            attempt: self.attempt(),
            alone: self.later.is_empty() && self.pauses.is_empty() && stays.len() > 1,
        };
        let what = match (kind, chosen) {
            (Kind::KillWorker, Some(number)) => {
                let name = self.kill_worker(number);
                format!("{name} is killed")
            }
            (Kind::StopWorker, Some(number)) if !self.workers[number].stopped => {
                let time = self.random.millis(500, 6000);
                let worker = &mut self.workers[number];
                worker.process.signal(Signal::STOP);
                worker.stopped = true;
                let name = worker.name.clone();
                self.at(time, Later::ContinueWorker(name.clone()));
                format!("{name} is stopped for {time:?}")
            }
            (Kind::EndWorker, Some(number)) => {
                let name = self.end_worker(number);
                format!("{name} is asked to leave")
            }
            (Kind::Join, _) if self.workers.len() < MOST_WORKERS => {
                self.start_worker();
                "another worker joins".to_owned()
            }
            (Kind::KillAllWorkers, Some(_)) => {
                for number in (0..self.workers.len()).rev() {
                    self.kill_worker(number);
                }
                "all workers are killed".to_owned()
            }
            (Kind::EndAllWorkers, Some(_)) => {
                for number in stays {
                    self.end_worker(number);
                }
                "all workers are asked to leave".to_owned()
            }
            (Kind::KillCoordinator, _) if coordinator => {
                self.coordinator.take().expect("it runs").process.kill();
                let time = self.random.millis(0, 2000);
                self.at(time, Later::StartCoordinator);
                format!("the coordinator is killed, and started again after {time:?}")
            }
            (Kind::StopCoordinator, _) if coordinator => {
                let time = self.random.millis(500, 6000);
                let program = self.coordinator.as_mut().expect("it runs");
                program.process.signal(Signal::STOP);
                program.stopped = true;
                self.at(time, Later::ContinueCoordinator);
                format!("the coordinator is stopped for {time:?}")
            }
            (Kind::EndCoordinator, _) if coordinator => {
                let program = self.coordinator.as_mut().expect("it runs");
                program.process.signal(Signal::TERM);
                program.asked_to_leave = Some(now);
                "the coordinator is asked to leave".to_owned()
            }
            (Kind::FreezeTrainer, Some(number))
                if !self.tally.cannot_freeze && self.workers[number].frozen.is_none() =>
            {
                let pid = self.workers[number].process.pid();
                if !has_thread(pid, "trainer") {
                    return false;
                }
                let Some(frozen) = freeze_thread(pid, "trainer") else {
                    self.tally.cannot_freeze = true;
                    return false;
                };
                let time = self.random.millis(2000, 8000);
                let worker = &mut self.workers[number];
                worker.frozen = Some(frozen);
                let name = worker.name.clone();
                self.at(time, Later::Thaw(name.clone()));
                format!("the trainer of {name} stands still for {time:?}")
            }
            (Kind::FlipBit, _) => match self.flip_bit() {
                Some(what) => what,
                None => return false,
            },
            (Kind::FillDisk, _) if !self.is_pending(|what| *what == Later::FreeDisk) => {
                let Some(disk) = &self.disk else { return false };
                disk.fill();
                let time = self.random.millis(500, 4000);
                self.at(time, Later::FreeDisk);
                format!("the disk is full for {time:?}")
            }
            (Kind::CutNetwork, Some(number)) => {
                let Some(network) = self.network else { return false };
                let machine = self.workers[number].machine;
                if self.is_pending(|what| *what == Later::Heal(machine)) {
                    return false;
                }
                assert!(network.cut(machine), "a network that was made can be cut");
                let time = self.random.millis(500, 6000);
                self.at(time, Later::Heal(machine));
                format!("machine {machine} is cut off for {time:?}")
            }
            _ => return false,
        };
        self.note(&what);
        *self.tally.faults.entry(kind).or_default() += 1;
        // The faults that are still pending are no longer alone.
        for earlier in &mut self.pauses {
            earlier.alone = false;
        }
        self.pauses.push(pause);
        let more = self.workers.iter().any(|worker| worker.asked_to_leave.is_none());
        if !more && !self.is_pending(|what| *what == Later::StartWorker) {
            for _ in 0..=self.random.below(3) {
                let time = self.random.millis(0, 2000);
                self.at(time, Later::StartWorker);
            }
        }
        true
    }

    fn attempt(&self) -> String {
        let text = fs::read_to_string(self.run.path().join("metrics.csv")).unwrap_or_default();
        let complete = &text[..text.rfind('\n').unwrap_or_default()];
        complete.rsplit(',').next().unwrap_or_default().to_owned()
    }

    fn kill_worker(&mut self, number: usize) -> String {
        let worker = self.workers.remove(number);
        worker.process.signal(Signal::KILL);
        // A frozen thread would keep the process from ending.
        drop(worker.frozen);
        worker.process.kill();
        worker.name
    }

    fn end_worker(&mut self, number: usize) -> String {
        let worker = &mut self.workers[number];
        worker.process.signal(Signal::TERM);
        worker.asked_to_leave = Some(Instant::now());
        worker.name.clone()
    }

    /// Flips a bit of a checkpoint, but never of the oldest, so that an intact one remains.
    fn flip_bit(&mut self) -> Option<String> {
        let checkpoints = self.run.path().join("checkpoints");
        let mut names: Vec<String> = if checkpoints.exists() { self.run.checkpoints() } else { Vec::new() };
        names.retain(|name| !self.damaged.contains(name));
        if names.len() < 2 {
            return None;
        }
        let name = names.swap_remove(1 + self.random.below(names.len() - 1));
        let mut files: Vec<PathBuf> = fs::read_dir(checkpoints.join(&name))
            .ok()?
            .filter_map(Result::ok)
            .map(|file| file.path())
            .collect();
        files.sort();
        let path = files.swap_remove(self.random.below(files.len()));
        let file = OpenOptions::new().read(true).write(true).open(&path).ok()?;
        let at = self.random.below(file.metadata().ok()?.len().max(1) as usize) as u64;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).ok()?;
        let flipped = byte[0] ^ (1 << self.random.below(8));
        file.write_all_at(&[flipped], at).ok()?;
        self.flipped.push((path.clone(), at, byte[0]));
        self.damaged.insert(name.clone());
        Some(format!("a bit of byte {at} of {name}/{} is flipped", path.file_name()?.display()))
    }

    // ---- the whole run

    fn run_disturbed(&mut self) {
        self.start_coordinator();
        for _ in 0..2 + self.random.below(2) {
            self.start_worker();
        }
        let mut next = Instant::now() + self.random.millis(0, 6000);
        let disturbed = (self.iterations as f64 * DISTURBED) as usize;
        while self.steps < disturbed && self.began.elapsed() < DISTURBED_FOR {
            self.look();
            if Instant::now() < next {
                continue;
            }
            // If this kind of fault is not possible now, draw another.
            let kind = KINDS[self.random.below(KINDS.len())];
            if self.disturb(kind) {
                next = Instant::now() + self.random.millis(100, 3000);
            }
        }
        self.note("left alone");
        for (_, what) in std::mem::take(&mut self.later) {
            self.act(&what);
        }
        self.finish();
    }

    /// Waits until the run and all programs have ended, and checks that they ended well.
    fn finish(&mut self) {
        let left_alone = Instant::now();
        loop {
            // A coordinator that was asked to leave needs a successor.
            if self.coordinator.as_ref().is_some_and(|coordinator| coordinator.asked_to_leave.is_none()) {
                break;
            }
            self.look();
        }
        let status = loop {
            let coordinator = self.coordinator.as_mut().expect("it runs");
            if let Some(status) = coordinator.process.has_ended() {
                break status;
            }
            assert!(left_alone.elapsed() < 2 * TIMEOUT, "the run does not end");
            std::thread::park_timeout(LOOK_EVERY);
        };
        self.note("the coordinator has ended");
        assert!(status.success(), "the coordinator has ended: {status}");
        for mut worker in std::mem::take(&mut self.workers) {
            let mut asked = worker.asked_to_leave.is_some();
            let waited = Instant::now();
            let status = loop {
                if let Some(status) = worker.process.has_ended() {
                    break status;
                }
                // It was cut off when the run ended, and still looks for its coordinator.
                if !asked && waited.elapsed() > Duration::from_secs(10) {
                    asked = true;
                    worker.process.signal(Signal::TERM);
                }
                assert!(waited.elapsed() < TIMEOUT, "worker {} does not end", worker.name);
                std::thread::park_timeout(LOOK_EVERY);
            };
            let fine = status.success() || asked && leaves_well(status, &worker.process);
            assert!(fine, "worker {} has ended: {status}", worker.name);
        }
        // Repair damaged milestones that nobody has read since.
        for (path, at, byte) in &self.flipped {
            if let Ok(file) = File::options().write(true).open(path) {
                file.write_all_at(&[*byte], *at).expect("it was written before");
            }
        }
    }
}

impl Drop for Chaos<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("\nseed {} fails:\n{}", self.seed, self.history.join("\n"));
        }
        if let Some(network) = self.network {
            for machine in 0..network.machines() {
                // This can only fail for a network that is already gone.
                network.heal(machine);
            }
        }
    }
}

impl Program {
    const fn new(process: Process, name: String, machine: usize) -> Self {
        Self { frozen: None, process, name, machine, asked_to_leave: None, stopped: false }
    }
}

/// Whether a program that was asked to leave has ended well. One that has not printed anything yet did not handle
/// signals yet.
fn leaves_well(status: ExitStatus, process: &Process) -> bool {
    status.code() == Some(130) || status.signal() == Some(Signal::TERM.as_raw()) && process.said().is_empty()
}

/// The step from which a group begins, if a line of the console is about that.
fn begin_of_group(line: &str) -> Option<usize> {
    let (_, rest) = line.split_once(" from step ")?;
    line.starts_with("generation ").then(|| rest.split(' ').next()?.parse().ok())?
}

/// What the command line says of the run.
fn keys(iterations: usize) -> Vec<String> {
    let every = format!("checkpoint.every={}", iterations / MILESTONES);
    let iterations = format!("train.iterations={iterations}");
    let all = KEYS.into_iter().chain([&every[..], &iterations[..]]);
    all.flat_map(|key| ["--set".to_owned(), key.to_owned()]).collect()
}

/// One worker does the run, and nothing happens to it. Returns how long that took.
fn run_calmly(iterations: usize, sandbox: &Sandbox) -> Duration {
    let began = Instant::now();
    let keys = keys(iterations);
    let keys = keys.iter().map(String::as_str).chain(["--set", "local.workers=1"]);
    sandbox.coordinator(&keys.collect::<Vec<_>>()).succeeds();
    began.elapsed()
}

/// The results of a run.
fn outcome(run: &RunFolder) -> (Bits, BTreeMap<PathBuf, Vec<u8>>) {
    let export = run.path().join("export");
    let files = fs::read_dir(&export).expect("the run has exported its model").filter_map(Result::ok);
    let read = |path: &Path| fs::read(path).expect("an exported file can be read");
    (run.bits(), files.map(|file| (file.file_name().into(), read(&file.path()))).collect())
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn median_and_most(times: &mut [Duration]) -> String {
    times.sort();
    let Some(most) = times.last() else { return "none".to_owned() };
    let median = times[times.len() / 2];
    format!("median {:.2} s, most {:.2} s, of {}", median.as_secs_f64(), most.as_secs_f64(), times.len())
}

#[test]
#[ignore = "takes a minute for each seed"]
fn a_run_that_is_disturbed_ends_with_the_same_bits() {
    let (first, seeds) = (from_environment("CHAOS_FIRST", 1), from_environment("CHAOS_SEEDS", 5));
    let (mut iterations, mut calm) = (STEPS, Sandbox::new());
    let mut took = run_calmly(iterations, &calm);
    while took < CALM {
        let factor = (CALM.as_secs_f64() / took.as_secs_f64()).min(8.0);
        iterations = (iterations as f64 * factor) as usize / MILESTONES * MILESTONES + MILESTONES;
        calm = Sandbox::new();
        took = run_calmly(iterations, &calm);
    }
    eprintln!("{iterations} updates, which one worker does in {:.0} s", took.as_secs_f64());
    let undisturbed = outcome(&calm.run("tiny"));

    let network = Network::new(MACHINES);
    if network.is_none() {
        eprintln!("skipped: cut networks (network namespaces take root and `ip`)");
    }
    if SmallDisk::new(1).is_none() {
        eprintln!("skipped: full disks (a mount takes root)");
    }
    let (mut tally, mut failed) = (Tally::default(), Vec::new());
    for seed in first..first + seeds {
        let began = Instant::now();
        let before: usize = tally.faults.values().sum();
        let went = catch_unwind(AssertUnwindSafe(|| {
            let mut chaos = Chaos::new(seed, iterations, network.as_ref(), &mut tally);
            chaos.run_disturbed();
            let (bits, exported) = outcome(&chaos.run);
            bits.assert_equal(&undisturbed.0);
            assert!(exported == undisturbed.1, "the exported files differ");
        }));
        let faults = tally.faults.values().sum::<usize>() - before;
        let how = if went.is_ok() { "the same bits" } else { "FAILED" };
        eprintln!("seed {seed}: {faults} faults in {:.0} s, {how}", began.elapsed().as_secs_f64());
        failed.extend(went.is_err().then_some(seed));
    }
    let Tally { faults, redone, groups, mut pauses, alone, .. } = tally;
    eprintln!(
        "{seeds} seeds, {} faults {faults:?}; {groups} groups, {redone} steps redone; from a fault to the next new step: {}",
        faults.values().sum::<usize>(),
        median_and_most(&mut pauses),
    );
    for (kind, mut times) in alone {
        eprintln!("{kind:?} alone: {}", median_and_most(&mut times));
    }
    assert!(failed.is_empty(), "failing seeds: {failed:?}");
}
