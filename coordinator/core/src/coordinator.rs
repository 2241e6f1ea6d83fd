//! The state of a run, and what follows from it after every event.
//!
//! The transitions are in files named after their subjects: `joining`, `training`, `checkpoints`, `work` (jobs) and
//! `deadlines`. Before any of them, `check` decides whether a worker may send a message at all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ulmus_types::{
    BadUnit, CheckpointId, CheckpointKind, Digest, ErrorKind, ExitStatus, Generation, Job, JobKind, RunId,
    RunName, RunSecret, Step, ToCoordinator, ToWorker, WorkerId, for_people,
};

use crate::check::Verdict;
use crate::effect::{Effect, Notification, Outcome};
use crate::event::Event;
use crate::group::{Group, Suspicion};
use crate::invariants;
use crate::jobs::Jobs;
use crate::members::{Fault, Members};
use crate::snapshots::Snapshots;

/// After this many reports since the last update that contradict the record, the run stops.
const CONTRADICTIONS: u32 = 3;
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
    /// Whether the average is exported.
    pub export: bool,
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
    /// Units that are skipped, and why.
    pub quarantine: BTreeMap<BadUnit, String>,
    /// Set when every update is done.
    pub trained: Option<Step>,
    /// Whether a checkpoint was ever committed, even if it is gone since.
    pub had_checkpoints: bool,
    /// Finished jobs.
    pub jobs: BTreeSet<JobKind>,
    /// The worker to which each job was last given.
    pub owners: BTreeMap<Job, WorkerId>,
    /// The last update that was reported.
    pub step: Step,
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
    effects: Vec<Effect>,
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
        let jobs = Jobs::new(saved.jobs, saved.owners, settings.average, settings.export);
        let mut effects = Vec::new();
        let last: Vec<CheckpointId> = saved.checkpoints.keys().rev().take(1).copied().collect();
        let milestones = crate::jobs::milestones(&saved.checkpoints);
        let averaged = milestones.iter().rev().take(settings.average as usize).copied();
        let doubted: BTreeSet<CheckpointId> = last.into_iter().chain(averaged).collect();
        if !doubted.is_empty() && jobs.need_milestones() {
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

    /// Handles an event and returns what to do about it.
    pub fn on(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        let now = self.time_awake(now, &event);
        match event {
            Event::Ticked => self.on_tick(now),
            Event::Received { worker, message: ToCoordinator::Hello(hello), .. } => {
                debug_assert_eq!(worker, hello.worker);
                self.on_hello(hello, now);
            }
            Event::Received { worker, run, message } => self.on_message(&worker, run, message, now),
            Event::Contradicted(worker, why) => self.on_contradicted(&worker, &why, now),
            Event::ReceivedInvalid(worker, why) => self.expel(&worker, &why, now),
            Event::Disconnected(worker) => {
                self.lose_worker(&worker, "its connection ended", Fault::Died, now);
            }
            Event::CheckpointCommitted(checkpoint) => self.on_committed(checkpoint, now),
            Event::CommitFailed(checkpoint, kind, why) => self.on_commit_failed(checkpoint, kind, &why, now),
            Event::PartsDamaged(checkpoint, files, why) => {
                self.emit(Notification::Alarm(format!("{why}; it will be stored again")));
                self.snapshots.on_parts_damaged(checkpoint, &files, &why, now);
            }
            Event::CheckpointDamaged(checkpoint, why) => self.on_damaged(checkpoint, &why),
            Event::StopRequested => self.stopping_since = self.stopping_since.or(Some(now)),
            Event::LocalWorkersFailed(why) => self.on_local_workers_failed(&why, now),
        }
        if !self.exited {
            self.advance(now);
        }
        // A run that has ended may be left half-way through a transition.
        debug_assert_eq!(invariants::broken(self).filter(|_| !self.exited), None);
        std::mem::take(&mut self.effects)
    }

    /// The last update that was reported.
    pub const fn step(&self) -> Step {
        self.step
    }

    /// The time for which this process has been running: no worker is late because the coordinator's process or machine
    /// was paused.
    fn time_awake(&mut self, now: Duration, event: &Event) -> Duration {
        const LONGEST_TICK: Duration = Duration::from_secs(1);
        if *event == Event::Ticked {
            let passed = self.last_tick.map_or(Duration::ZERO, |last| now.saturating_sub(last));
            if passed > LONGEST_TICK {
                self.slept += passed;
            }
            self.last_tick = Some(now);
        }
        // The clock also stops if a tick is overdue, so that messages that waited for this process do not look late.
        let last = self.last_tick.unwrap_or(now);
        let passed = now.saturating_sub(last);
        let passed = if passed > LONGEST_TICK { Duration::ZERO } else { passed };
        (last + passed).saturating_sub(self.slept)
    }

    fn on_message(&mut self, worker: &WorkerId, run: Option<RunId>, message: ToCoordinator, now: Duration) {
        // Ignore workers that were not welcomed, and earlier lives of those that were.
        let Some(member) = self.members.get_mut(worker) else { return };
        member.last_seen = now;
        if run != Some(self.settings.id) {
            // A worker that has not read its welcome yet sends only heartbeats.
            if run.is_some() || !matches!(message, ToCoordinator::Heartbeat(_)) {
                let about = run.map_or("no run".to_owned(), |run| format!("run {}", run.short()));
                let why = format!(
                    "its {} message is about {about}, and this is run {}",
                    message.name(),
                    self.settings.id.short()
                );
                self.expel(worker, &why, now);
            }
            return;
        }
        match self.check(worker, &message) {
            Verdict::Accept => self.apply(worker, message, now),
            Verdict::Stale => {}
            Verdict::Impossible(why) => {
                let why = format!("its {} message is invalid: {why}", message.name());
                self.expel(worker, &why, now);
            }
            Verdict::Ahead(generation) => self.refuse_ahead(worker, generation),
        }
    }

    /// Acts on a message that has passed all checks.
    fn apply(&mut self, worker: &WorkerId, message: ToCoordinator, now: Duration) {
        match message {
            ToCoordinator::Hello(_) => {}
            ToCoordinator::Heartbeat(heartbeat) => {
                if let Some(member) = self.members.get_mut(worker) {
                    member.on_heartbeat(heartbeat, now);
                }
            }
            ToCoordinator::StoreRead(read) => self.on_store_read(worker, read, now),
            ToCoordinator::Ready(ready) => self.on_ready(worker, ready, now),
            ToCoordinator::Unfit { kind, message } => self.on_unfit(worker, kind, &message),
            ToCoordinator::Draining => self.on_draining(worker),
            ToCoordinator::Connected(generation) => self.on_connected(worker, generation),
            ToCoordinator::Formed { generation, step } => self.on_formed(worker, generation, step, now),
            ToCoordinator::Steps { generation, reports } => self.on_steps(generation, reports),
            ToCoordinator::Reading { step, sources } => {
                self.effects.push(Effect::SaveReading(worker.clone(), step, sources));
            }
            ToCoordinator::Left { generation, step, reason } => {
                self.on_left(worker, generation, step, reason, now);
            }
            ToCoordinator::Snapshot(snapshot) => self.on_snapshot(worker, &snapshot, now),
            ToCoordinator::Written { checkpoint, files } => {
                self.snapshots.on_written(checkpoint, worker, files, now);
            }
            ToCoordinator::WriteFailed { checkpoint, kind, message } => {
                self.on_write_failed(worker, checkpoint, kind, &message, now);
            }
            ToCoordinator::Notice(text) => self.on_notice(worker, &text, now),
            ToCoordinator::JobDone { job, result } => self.on_job_done(worker, job, result, now),
            ToCoordinator::JobFailed { job, kind, message, bad_unit, damaged } => {
                self.on_job_failed(worker, &job, kind, &message, bad_unit.as_ref(), damaged, now);
            }
        }
    }

    /// A worker's report of a step contradicts the record. That worker's machine may be at fault; after several such
    /// reports, no result could be trusted.
    fn on_contradicted(&mut self, worker: &WorkerId, why: &str, now: Duration) {
        self.contradictions += 1;
        let machines = "the machines of this run compute different results, or one of them is faulty";
        if self.contradictions == CONTRADICTIONS {
            let message = format!("{why}, according to {}; {machines}", worker.name());
            return self.exit(ExitStatus::Corrupt, message);
        }
        self.expel(worker, &format!("{why}; {machines}"), now);
    }

    fn on_notice(&mut self, worker: &WorkerId, text: &str, now: Duration) {
        let Some(member) = self.members.get_mut(worker) else { return };
        if member.may_notify(now) {
            let text = for_people(text, TEXT_LIMIT);
            self.emit(Notification::Info(format!("{}: {text}", worker.name())));
        }
    }

    /// Does what the state calls for, whatever the event was.
    fn advance(&mut self, now: Duration) {
        if matches!(&self.group, Group::Dissolving { waiting, .. } if waiting.is_empty()) {
            self.group = Group::ABSENT;
            self.effects.push(Effect::SaveGroupEnded(self.generation));
            self.judge_suspicions(now);
        }
        self.adopt_group(now);
        self.request_from_group(now);
        self.assign_parts(now);
        self.dismiss_drained();
        self.form_group(now);
        self.start_jobs(now);
        if self.is_trained_and_stored() && self.jobs.all_done() {
            self.exit(ExitStatus::Done, "every phase is done".to_owned());
        } else if self.stopping_since.is_some()
            && matches!(self.group, Group::Absent { .. })
            && self.snapshots.is_empty()
        {
            let message = match self.checkpoints.keys().last() {
                Some(last) => {
                    format!("interrupted; {last} is stored, and the same command resumes from there")
                }
                None => "interrupted; the same command continues where this one stopped".to_owned(),
            };
            self.exit(ExitStatus::Interrupted, message);
        }
    }

    // ---- excluding workers

    /// Ends the session of a worker that sent an invalid message. It takes no part in the run until it reconnects.
    pub(crate) fn expel(&mut self, worker: &WorkerId, why: &str, now: Duration) {
        if self.members.get(worker).is_none() {
            return;
        }
        let reason = format!("the coordinator ended this session: {why}");
        self.send(worker, ToWorker::Refused { kind: ErrorKind::Retry, reason });
        self.drop_worker(worker, why, Fault::Unworkable, now);
    }

    /// Gives a worker no work for a while, if its fault deserves that.
    pub(crate) fn sit_out(&mut self, worker: &WorkerId, fault: Fault, why: &str, now: Duration) {
        let pause = self.members.penalize(worker, fault, now);
        if pause > Duration::ZERO {
            self.emit(Notification::SitsOut(worker.clone(), pause, why.to_owned()));
        }
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

    // ---- effects

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
