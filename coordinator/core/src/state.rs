//! The state of a run: what the coordinator was told at its start, and what has happened since.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ulmus_types::{
    BadUnit, CheckpointId, CheckpointKind, Digest, ErrorKind, ExitStatus, Generation, Graph, Job, JobName,
    RunId, RunName, RunSecret, Step, ToWorker, WorkerId,
};

use crate::effect::{Effect, Notification, Outcome};
use crate::group::{Group, Suspicion};
use crate::jobs::Jobs;
use crate::members::Members;
use crate::snapshots::Snapshots;

/// Number of generations whose members are remembered.
const ROSTERS: usize = 256;
/// The longest text from a worker that is shown to a person, in characters.
pub(crate) const TEXT_LIMIT: usize = 2000;

/// Everything that the coordinator is told once, when it starts.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The name of the run.
    pub run: RunName,
    /// Its id.
    pub id: RunId,
    /// The secret from which those of workers and groups are derived.
    pub secret: RunSecret,
    /// Its resolved plan, as TOML.
    pub plan: String,
    /// The run folder, as workers reach it.
    pub store: String,
    /// The answer of a worker that can read the run folder.
    pub nonce: Digest,
    /// The only version that workers may have.
    pub version: String,
    /// Number of workers for which the first group waits, up to `rejoin_window`.
    pub expected_workers: usize,
    /// Minimum number of workers in a group.
    pub min_workers: usize,
    /// Micro-batches per update, and so the maximum number of workers in a group.
    pub micro_batches: u64,
    /// Updates of the whole run.
    pub iterations: u64,
    /// Maximum number of tokens in an update.
    pub tokens_per_step: u64,
    /// Updates between two milestones.
    pub milestone_every: u64,
    /// Files of a checkpoint, in the order in which workers announce them.
    pub checkpoint_files: Vec<String>,
    /// Number of milestones that are averaged.
    pub average: u64,
    /// The stages of the run.
    pub graph: Graph,
    /// Names of the plan's sources.
    pub sources: BTreeSet<String>,
    /// Whether training may start over if every checkpoint is damaged.
    pub from_start: bool,
    /// Whether a source can run out before the last update.
    pub may_exhaust: bool,
    /// A worker is declared dead after this long without a heartbeat.
    pub dead_after: Duration,
    /// How long to wait for known or expected workers.
    pub rejoin_window: Duration,
    /// Time between two recovery checkpoints.
    pub recovery: Duration,
    /// How old the newest stored state may become while nothing can be stored.
    pub max_age: Duration,
    /// Maximum number of unreadable units that may be skipped; one more ends the run.
    pub bad_units: usize,
}

/// What the database remembers of a run. The default is a run that has not begun.
#[derive(Debug, Clone, Default)]
pub struct PersistentState {
    /// The last assigned generation.
    pub generation: Generation,
    /// Members of the last generation, or empty if its group has ended.
    pub group: Vec<WorkerId>,
    /// Members of recent generations, ended or not. Nobody else may send messages about those generations.
    pub rosters: BTreeMap<Generation, Vec<WorkerId>>,
    /// Fingerprint that every worker of the run must have.
    pub fingerprint: Option<Digest>,
    /// Committed checkpoints.
    pub checkpoints: BTreeMap<CheckpointId, CheckpointKind>,
    /// Checkpoints that were committed and found to be damaged since.
    pub damaged: BTreeSet<CheckpointId>,
    /// The last update whose milestones may be gone for good, because the database was rebuilt from what was there.
    pub recovered: Step,
    /// Units that are skipped, and why.
    pub quarantine: BTreeMap<BadUnit, String>,
    /// Set when every update is done.
    pub trained: Option<Step>,
    /// Whether a checkpoint was ever committed, even if it is gone since.
    pub had_checkpoints: bool,
    /// Finished jobs.
    pub jobs: BTreeSet<JobName>,
    /// The worker to which each job was last given.
    pub owners: BTreeMap<Job, WorkerId>,
    /// The last update that was reported.
    pub step: Step,
}

impl PersistentState {
    /// Whether training and every job of these stages are done.
    pub fn is_finished(&self, graph: &Graph) -> bool {
        let milestones = crate::jobs::milestones(&self.checkpoints);
        self.trained.is_some() && graph.is_done(&milestones, |name| self.jobs.contains(name))
    }
}

/// The state of a run.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Coordinator {
    pub(crate) settings: Settings,
    pub(crate) members: Members,
    pub(crate) generation: Generation,
    pub(crate) rosters: BTreeMap<Generation, Vec<WorkerId>>,
    pub(crate) group: Group,
    /// What members of the last group reported about each other.
    pub(crate) suspicions: Vec<Suspicion>,
    /// Members of the last group that completed an update.
    pub(crate) proven: Vec<WorkerId>,
    pub(crate) snapshots: Snapshots,
    pub(crate) jobs: Jobs,
    pub(crate) checkpoints: BTreeMap<CheckpointId, CheckpointKind>,
    /// Steps of milestones that were committed and found to be damaged since.
    pub(crate) damaged: BTreeSet<Step>,
    /// The last update whose milestones may be gone for good.
    pub(crate) recovered: Step,
    pub(crate) fingerprint: Option<Digest>,
    pub(crate) quarantine: BTreeMap<BadUnit, String>,
    /// Set when every update is done; training is over once the needed milestones are also stored.
    pub(crate) trained: Option<Step>,
    pub(crate) step: Step,
    /// Whether an update was reported to this process.
    pub(crate) steps_reported: bool,
    /// Time per micro-batch in each of the last updates.
    pub(crate) micro_batch_times: VecDeque<Duration>,
    pub(crate) futile_groups: u32,
    /// Whether there ever was a checkpoint: if so, training never silently starts over.
    pub(crate) had_checkpoints: bool,
    /// Reports since the last update that contradict the record.
    pub(crate) contradictions: u32,
    /// Whether this process has led a group; only the first one waits for the expected workers.
    pub(crate) had_a_group: bool,
    /// When an admitted worker was last connected.
    pub(crate) admitted_at: Option<Duration>,
    /// Workers on which training failed since the last update, and the error of each.
    pub(crate) failures: BTreeMap<WorkerId, (ErrorKind, String)>,
    /// When a checkpoint was last requested or announced.
    pub(crate) saved_at: Duration,
    /// When the last checkpoint was committed.
    pub(crate) committed_at: Duration,
    /// Whether the operator was told that nothing can be stored, and not yet that it works again.
    pub(crate) storing_alarmed: bool,
    /// Why the last unfit worker could not join the run.
    pub(crate) unfit: Option<(ErrorKind, String)>,
    pub(crate) stopping_since: Option<Duration>,
    pub(crate) last_tick: Option<Duration>,
    /// Total time in which this process did not run and so could not receive messages.
    pub(crate) slept: Duration,
    pub(crate) exited: bool,
    /// What is to be done about the current event.
    pub(crate) effects: Vec<Effect>,
}

impl Coordinator {
    /// Resumes a run from its stored state. `now` is the current time of any monotonic clock.
    pub fn new(settings: Settings, saved: PersistentState, now: Duration) -> Self {
        let group = if saved.group.is_empty() {
            Group::ABSENT
        } else {
            let until = now + settings.rejoin_window;
            let (back, gone) = (BTreeSet::new(), BTreeSet::new());
            Group::Adopting { members: saved.group, back, gone, until }
        };
        let jobs = Jobs::new(settings.graph.clone(), saved.jobs, saved.owners);
        let mut effects = Vec::new();
        let last: Vec<CheckpointId> = saved.checkpoints.keys().rev().take(1).copied().collect();
        let milestones = crate::jobs::milestones(&saved.checkpoints);
        let averaged = milestones.iter().rev().take(settings.average as usize).copied();
        let doubted: BTreeSet<CheckpointId> = last.into_iter().chain(averaged).collect();
        if !doubted.is_empty() && jobs.need_milestones(&milestones) {
            effects.push(Effect::Verify(doubted.into_iter().collect()));
        }
        Self {
            members: Members::default(),
            generation: saved.generation,
            rosters: saved.rosters,
            group,
            suspicions: Vec::new(),
            proven: Vec::new(),
            snapshots: Snapshots::default(),
            jobs,
            had_checkpoints: saved.had_checkpoints || !saved.checkpoints.is_empty(),
            contradictions: 0,
            checkpoints: saved.checkpoints,
            damaged: saved.damaged.into_iter().map(CheckpointId::step).collect(),
            recovered: saved.recovered,
            fingerprint: saved.fingerprint,
            quarantine: saved.quarantine,
            trained: saved.trained,
            step: saved.step,
            steps_reported: false,
            micro_batch_times: VecDeque::new(),
            futile_groups: 0,
            had_a_group: false,
            admitted_at: None,
            failures: BTreeMap::new(),
            saved_at: now,
            committed_at: now,
            storing_alarmed: false,
            unfit: None,
            stopping_since: None,
            last_tick: None,
            slept: Duration::ZERO,
            exited: false,
            effects,
            settings,
        }
    }

    /// The stages of the run.
    pub const fn graph(&self) -> &Graph {
        &self.settings.graph
    }

    /// The last update that was reported.
    pub const fn step(&self) -> Step {
        self.step
    }

    /// The milestones that are stored, oldest first.
    pub(crate) fn milestones(&self) -> Vec<CheckpointId> {
        crate::jobs::milestones(&self.checkpoints)
    }

    pub(crate) fn remember_roster(&mut self, generation: Generation, members: Vec<WorkerId>) {
        self.rosters.insert(generation, members);
        while self.rosters.len() > ROSTERS {
            self.rosters.pop_first();
        }
    }

    pub(crate) fn was_member(&self, worker: &WorkerId, generation: Generation) -> bool {
        self.rosters.get(&generation).is_some_and(|members| members.contains(worker))
    }

    pub(crate) fn effect(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    pub(crate) fn send(&mut self, worker: &WorkerId, message: ToWorker) {
        self.effects.push(Effect::Send(worker.clone(), message));
    }

    pub(crate) fn emit(&mut self, notification: Notification) {
        self.effects.push(Effect::Notify(notification));
    }

    pub(crate) fn exit(&mut self, status: ExitStatus, message: String) {
        if self.exited {
            return;
        }
        self.exited = true;
        for worker in self.members.ids() {
            self.send(&worker, ToWorker::Finish(status));
        }
        self.effects.push(Effect::Exit(Outcome { status, message, detached: false }));
    }
}
