//! The state of a run: what the coordinator was told at its start, and what has happened since.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ulmus_types::{
    BadUnit, CheckpointId, Digest, ErrorKind, ExitStatus, Generation, Graph, Job, JobName, Milestones, RunId,
    RunName, RunSecret, StageName, Step, ToWorker, WorkerId,
};

use crate::effect::{Effect, Notification, Outcome};
use crate::group::{Group, Suspicion};
use crate::jobs::Jobs;
use crate::members::{Members, Roster};
use crate::snapshots::Snapshots;
use crate::trainings::{Training, TrainingRecord, TrainingSettings};

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
    /// The stages of the run.
    pub graph: Graph,
    /// What the plan says of those that train, in their order.
    pub trainings: Vec<TrainingSettings>,
    /// Names of the plan's sources.
    pub sources: BTreeSet<String>,
    /// Whether training may start over if every checkpoint is damaged.
    pub from_start: bool,
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
    pub rosters: BTreeMap<Generation, Roster>,
    /// Fingerprint that every worker of the run must have.
    pub fingerprint: Option<Digest>,
    /// How far each training stage has got.
    pub trainings: BTreeMap<StageName, TrainingRecord>,
    /// Units that are skipped, and why.
    pub quarantine: BTreeMap<BadUnit, String>,
    /// Finished jobs.
    pub jobs: BTreeSet<JobName>,
    /// The worker to which each job was last given.
    pub owners: BTreeMap<Job, WorkerId>,
}

impl PersistentState {
    /// Whether training and every job of these stages are done.
    pub fn is_finished(&self, graph: &Graph) -> bool {
        let checkpoints = self.trainings.values().flat_map(|record| &record.checkpoints);
        let is_trained =
            |name| self.trainings.get(name).is_some_and(|record: &TrainingRecord| record.trained.is_some());
        graph.trainings().all(|stage| is_trained(&stage.name))
            && graph.is_done(&checkpoints.collect(), |name| self.jobs.contains(name))
    }
}

/// Whether a run goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// It does.
    Running,
    /// A person asked it to stop, at this time. It stores what it has, and begins nothing.
    Stopping { since: Duration },
    /// It has said how it ended.
    Ended,
}

/// The state of a run.
#[derive(Debug)]
pub struct Coordinator {
    pub(crate) settings: Settings,
    pub(crate) members: Members,
    pub(crate) generation: Generation,
    pub(crate) rosters: BTreeMap<Generation, Roster>,
    pub(crate) group: Group,
    /// What members of the last group reported about each other.
    pub(crate) suspicions: Vec<Suspicion>,
    /// Members of the last group that completed an update.
    pub(crate) proven: Vec<WorkerId>,
    pub(crate) snapshots: Snapshots,
    pub(crate) jobs: Jobs,
    pub(crate) trainings: Vec<Training>,
    pub(crate) fingerprint: Option<Digest>,
    pub(crate) quarantine: BTreeMap<BadUnit, String>,
    /// The stage of which an update was last reported to this process.
    pub(crate) reported: Option<StageName>,
    /// Time per micro-batch in each of the last updates.
    pub(crate) micro_batch_times: VecDeque<Duration>,
    pub(crate) futile_groups: u32,
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
    pub(crate) life: Life,
    pub(crate) last_tick: Option<Duration>,
    /// Total time in which this process did not run and so could not receive messages.
    pub(crate) slept: Duration,
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
        let mut records = saved.trainings;
        let trainings: Vec<Training> = settings
            .trainings
            .iter()
            .map(|settings| {
                Training::new(settings.clone(), records.remove(&settings.name).unwrap_or_default())
            })
            .collect();
        let milestones = milestones(&trainings);
        for training in trainings.iter().filter(|training| jobs.need_milestones(training.name(), &milestones))
        {
            let last = training.record.checkpoints.keys().next_back();
            let needed = milestones.of(training.name()).iter().rev();
            let needed = needed.take(training.settings.needed_milestones as usize);
            let doubted: BTreeSet<CheckpointId> = last.into_iter().chain(needed).copied().collect();
            if !doubted.is_empty() {
                effects.push(Effect::Verify(doubted.into_iter().collect()));
            }
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
            contradictions: 0,
            trainings,
            fingerprint: saved.fingerprint,
            quarantine: saved.quarantine,
            reported: None,
            micro_batch_times: VecDeque::new(),
            futile_groups: 0,
            had_a_group: false,
            admitted_at: None,
            failures: BTreeMap::new(),
            saved_at: now,
            committed_at: now,
            storing_alarmed: false,
            unfit: None,
            life: Life::Running,
            last_tick: None,
            slept: Duration::ZERO,
            effects,
            settings,
        }
    }

    /// The stages of the run.
    pub const fn graph(&self) -> &Graph {
        &self.settings.graph
    }

    /// The stage that trains now or is the next to do so; `None` if all of them are trained and stored.
    pub(crate) fn current(&self) -> Option<&Training> {
        if self.jobs.all_done(&self.milestones()) && self.trainings.iter().all(|t| t.record.trained.is_some())
        {
            // What a finished run has lost since is not trained again.
            return None;
        }
        let is_over = |(index, training): &(usize, &Training)| {
            // Nor is that from which a later stage has begun.
            let is_passed = || self.trainings[index + 1..].iter().any(Training::has_begun);
            training.record.trained.is_some() && (is_passed() || training.is_stored())
        };
        self.trainings.iter().enumerate().find(|training| !is_over(training)).map(|(_, training)| training)
    }

    /// Whether a training stage is over: every update is done, and every milestone that is still needed is stored.
    pub(crate) fn is_over(&self, name: StageName) -> bool {
        let index = |name| self.trainings.iter().position(|training| training.name() == name);
        let current = self.current().and_then(|training| index(training.name()));
        index(name).is_some_and(|index| current.is_none_or(|current| index < current))
    }

    pub(crate) fn training(&self, name: StageName) -> Option<&Training> {
        self.trainings.iter().find(|training| training.name() == name)
    }

    pub(crate) fn training_mut(&mut self, name: StageName) -> Option<&mut Training> {
        self.trainings.iter_mut().find(|training| training.name() == name)
    }

    /// The stage that the group of a generation trains, unless the plan has no such stage any more.
    pub(crate) fn training_of(&self, generation: Generation) -> Option<&Training> {
        self.training(self.rosters.get(&generation)?.training)
    }

    /// The name of the stage that the group of a generation trains.
    pub fn training_name(&self, generation: Generation) -> Option<StageName> {
        self.training_of(generation).map(Training::name)
    }

    /// The last update that a training stage will have; 0 while that is not known.
    pub fn last_step(&self, training: StageName) -> Step {
        self.training(training).map_or(Step::default(), Training::last_step)
    }

    /// The last recorded update of the stage that trains.
    pub fn step(&self) -> Step {
        let last = || self.trainings.last();
        self.current().or_else(last).map_or(Step::default(), |training| training.record.step)
    }

    /// The milestones that are stored.
    pub(crate) fn milestones(&self) -> Milestones {
        milestones(&self.trainings)
    }

    pub(crate) fn remember_roster(&mut self, generation: Generation, roster: Roster) {
        self.rosters.insert(generation, roster);
        while self.rosters.len() > ROSTERS {
            self.rosters.pop_first();
        }
    }

    pub(crate) fn was_member(&self, worker: &WorkerId, generation: Generation) -> bool {
        self.rosters.get(&generation).is_some_and(|roster| roster.members.contains(worker))
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
        if self.life == Life::Ended {
            return;
        }
        self.life = Life::Ended;
        for worker in self.members.ids() {
            self.send(&worker, ToWorker::Finish(status));
        }
        self.effects.push(Effect::Exit(Outcome { status, message, detached: false }));
    }
}

/// The stored milestones of all training stages.
fn milestones(trainings: &[Training]) -> Milestones {
    trainings.iter().flat_map(|training| &training.record.checkpoints).collect()
}
