//! The state of a run, and what follows from it whatever has happened.
//!
//! The transitions stand in the files that are named after what they are about: `joining`, `training`, `checkpoints`,
//! `work` (jobs) and `deadlines`. What a worker may say, and when, is decided in `check`, before any of them.

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

/// Reports in a row that may contradict the record before the run stops.
const CONTRADICTIONS: u32 = 3;
/// Generations whose members are remembered.
const ROSTERS: usize = 256;
/// The longest text of a worker that is shown to a person.
pub(crate) const TEXT_LIMIT: usize = 2000;

/// What the coordinator is told once, when it starts.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The run.
    pub run: RunName,
    /// Tells it from every other run.
    pub id: RunId,
    /// What its workers prove with that they are themselves.
    pub secret: RunSecret,
    /// Its resolved plan, as TOML.
    pub plan: String,
    /// The run's folder, as workers reach it.
    pub store: String,
    /// What a worker answers that sees it.
    pub nonce: Digest,
    /// The only version that workers may have.
    pub version: String,
    /// Workers that the first group waits for, within `rejoin_window`.
    pub expected_workers: usize,
    /// Workers that a group needs.
    pub min_workers: usize,
    /// Micro-batches per update; more workers than this cannot help.
    pub micro_batches: u64,
    /// Updates of the whole run.
    pub iterations: u64,
    /// The most tokens that an update can count.
    pub tokens_per_step: u64,
    /// Updates between two milestones.
    pub milestone_every: u64,
    /// Files of a checkpoint, in the order in which workers announce them.
    pub checkpoint_files: Vec<String>,
    /// Milestones that are averaged.
    pub average: u64,
    /// Whether the average is exported.
    pub export: bool,
    /// Names of the sources that are read.
    pub sources: BTreeSet<String>,
    /// Whether training may begin anew where every checkpoint is damaged.
    pub from_start: bool,
    /// Whether a source can be used up before the last update.
    pub may_exhaust: bool,
    /// A worker not heard of for so long is dead.
    pub dead_after: Duration,
    /// How long to wait for known or expected workers.
    pub rejoin_window: Duration,
    /// Time between two recovery checkpoints.
    pub recovery: Duration,
    /// How old the newest stored state may become while nothing can be stored.
    pub max_age: Duration,
    /// Units that may be left out because they cannot be read; one more ends the run.
    pub bad_units: usize,
}

/// What the store remembers of the run; the default is a run that has not begun.
#[derive(Debug, Clone, Default)]
pub struct PersistentState {
    /// The last generation that was assigned.
    pub generation: Generation,
    /// Its members, unless its group has ended.
    pub group: Vec<WorkerId>,
    /// The members of the last generations, ended or not: nobody else may speak of them.
    pub rosters: BTreeMap<Generation, Vec<WorkerId>>,
    /// The fingerprint of the run.
    pub fingerprint: Option<Digest>,
    /// Committed checkpoints.
    pub checkpoints: BTreeMap<CheckpointId, CheckpointKind>,
    /// Units that are left out, and why.
    pub quarantine: BTreeMap<BadUnit, String>,
    /// Set when every update is done.
    pub trained: Option<Step>,
    /// Whether a checkpoint was ever committed, whatever became of it.
    pub had_checkpoints: bool,
    /// Names of finished jobs.
    pub jobs: BTreeSet<JobKind>,
    /// The worker that each job was given to last.
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
    /// What members of the last group said of each other.
    pub(crate) suspicions: Vec<Suspicion>,
    /// The members of the last group that did an update.
    pub(crate) proven: Vec<WorkerId>,
    pub(crate) snapshots: Snapshots,
    pub(crate) jobs: Jobs,
    pub(crate) checkpoints: BTreeMap<CheckpointId, CheckpointKind>,
    pub(crate) fingerprint: Option<Digest>,
    pub(crate) quarantine: BTreeMap<BadUnit, String>,
    /// Set when every update is done; training is over once the milestones that are needed are stored too.
    pub(crate) trained: Option<Step>,
    pub(crate) step: Step,
    /// Whether this coordinator has heard of an update.
    pub(crate) has_heard_steps: bool,
    /// Seconds per micro-batch of the last updates.
    pub(crate) pace: VecDeque<Duration>,
    pub(crate) futile_groups: u32,
    /// Whether there ever was a checkpoint: then training does not begin anew without a word.
    pub(crate) had_checkpoints: bool,
    /// Reports since the last update that contradict the record.
    pub(crate) contradictions: u32,
    /// Whether this coordinator has led a group; the first one waits for the expected workers.
    pub(crate) had_a_group: bool,
    /// When a worker that may take part was last there.
    pub(crate) admitted_at: Option<Duration>,
    /// Workers on which training failed since the last update, and what was said of it.
    pub(crate) failures: BTreeMap<WorkerId, (ErrorKind, String)>,
    /// When the last checkpoint was asked for.
    pub(crate) saved_at: Duration,
    /// When the last checkpoint was committed.
    pub(crate) committed_at: Duration,
    /// Whether the operator was told that nothing can be stored.
    pub(crate) storing_alarmed: bool,
    /// Why the last worker could not take up the run.
    pub(crate) unfit: Option<(ErrorKind, String)>,
    pub(crate) stopping_since: Option<Duration>,
    pub(crate) last_tick: Option<Duration>,
    /// Time that this process did not run in, while nobody can be expected to have been heard.
    pub(crate) slept: Duration,
    exited: bool,
    effects: Vec<Effect>,
}

impl Coordinator {
    /// Takes up a run where the store says it was. `now` is any monotonic time.
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
            has_heard_steps: false,
            pace: VecDeque::new(),
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

    /// Takes an event and tells what to do about it.
    pub fn on(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        let now = self.awake(now, &event);
        match event {
            Event::Ticked => self.on_tick(now),
            Event::Said { worker, message: ToCoordinator::Hello(hello), .. } => {
                debug_assert_eq!(worker, hello.worker);
                self.on_hello(hello, now);
            }
            Event::Said { worker, run, message } => self.on_said(&worker, run, message, now),
            Event::Contradicted(worker, why) => self.on_contradicted(&worker, &why, now),
            Event::SaidImpossible(worker, why) => self.expel(&worker, &why, now),
            Event::Disconnected(worker) => self.lose(&worker, "its connection ended", Fault::Died, now),
            Event::CheckpointCommitted(checkpoint) => self.on_committed(checkpoint, now),
            Event::CommitFailed(checkpoint, kind, why) => self.on_commit_failed(checkpoint, kind, &why, now),
            Event::PartsDamaged(checkpoint, files, why) => {
                self.emit(Notification::Alarm(format!("{why}; it is stored once more")));
                self.snapshots.parts_damaged(checkpoint, &files, &why, now);
            }
            Event::CheckpointDamaged(checkpoint, why) => self.on_damaged(checkpoint, &why),
            Event::StopRequested => self.stopping_since = self.stopping_since.or(Some(now)),
            Event::LocalWorkersFailed(why) => self.on_local_workers_failed(&why, now),
        }
        if !self.exited {
            self.advance(now);
        }
        // A run that has ended is left as it was, half-way through whatever ended it.
        debug_assert_eq!(invariants::broken(self).filter(|_| !self.exited), None);
        std::mem::take(&mut self.effects)
    }

    /// The last update that was reported.
    pub const fn step(&self) -> Step {
        self.step
    }

    /// Time as far as this process was there to hear anybody: after a pause of the whole process, or of its machine, nobody
    /// is late because of it.
    fn awake(&mut self, now: Duration, event: &Event) -> Duration {
        const LONGEST_TICK: Duration = Duration::from_secs(1);
        if *event == Event::Ticked {
            let passed = self.last_tick.map_or(Duration::ZERO, |last| now.saturating_sub(last));
            if passed > LONGEST_TICK {
                self.slept += passed;
            }
            self.last_tick = Some(now);
        }
        // Between two ticks the clock of what follows stands still, so that a message that waited is no proof of silence.
        let last = self.last_tick.unwrap_or(now);
        let passed = now.saturating_sub(last);
        let passed = if passed > LONGEST_TICK { Duration::ZERO } else { passed };
        (last + passed).saturating_sub(self.slept)
    }

    fn on_said(&mut self, worker: &WorkerId, run: Option<RunId>, message: ToCoordinator, now: Duration) {
        // Only those that were welcomed are heard; a fenced life of a worker is not.
        let Some(member) = self.members.get_mut(worker) else { return };
        member.last_seen = now;
        if run != Some(self.settings.id) {
            // Until it has read its welcome a worker has nothing to say but that it lives.
            if run.is_some() || !matches!(message, ToCoordinator::Heartbeat(_)) {
                let of = run.map_or("no run".to_owned(), |run| format!("run {}", run.short()));
                let why = format!(
                    "its {} is of {of}, and this is run {}",
                    message.name(),
                    self.settings.id.short()
                );
                self.expel(worker, &why, now);
            }
            return;
        }
        match self.check(worker, &message) {
            Verdict::Heard => self.take(worker, message, now),
            Verdict::Stale => {}
            Verdict::Impossible(why) => {
                let why = format!("its {} cannot be: {why}", message.name());
                self.expel(worker, &why, now);
            }
            Verdict::Ahead(generation) => self.refuse_ahead(worker, generation),
        }
    }

    /// Acts on a message that its sender may say now.
    fn take(&mut self, worker: &WorkerId, message: ToCoordinator, now: Duration) {
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
                self.snapshots.written(checkpoint, worker, files, now);
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

    /// A worker reports a step otherwise than it is recorded. It may be that worker's machine; when several do so, nothing
    /// that follows could be trusted.
    fn on_contradicted(&mut self, worker: &WorkerId, why: &str, now: Duration) {
        self.contradictions += 1;
        let machines = "the machines of this run do not compute alike, or one of them is broken";
        if self.contradictions == CONTRADICTIONS {
            let message = format!("{why}, as {} says; {machines}", worker.name());
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

    /// What follows from the state alone, whatever the event was.
    fn advance(&mut self, now: Duration) {
        if matches!(&self.group, Group::Dissolving { waiting, .. } if waiting.is_empty()) {
            self.group = Group::ABSENT;
            self.effects.push(Effect::SaveGroupEnded(self.generation));
            self.judge_suspicions(now);
        }
        self.adopt(now);
        self.request(now);
        self.assign_parts(now);
        self.dismiss_drained();
        self.form(now);
        self.start_jobs(now);
        if self.jobs.all_done(self.is_trained_and_stored(), &self.checkpoints) {
            self.exit(ExitStatus::Done, "every phase is done".to_owned());
        } else if self.stopping_since.is_some()
            && matches!(self.group, Group::Absent { .. })
            && self.snapshots.is_empty()
        {
            let message = match self.checkpoints.keys().last() {
                Some(last) => format!("interrupted; {last} is stored, the same command goes on from there"),
                None => "interrupted; the same command begins where this one stopped".to_owned(),
            };
            self.exit(ExitStatus::Interrupted, message);
        }
    }

    // ---- who may speak, and who is out

    /// Ends the session of a worker that said what cannot be. It is no part of anything until it has connected anew.
    pub(crate) fn expel(&mut self, worker: &WorkerId, why: &str, now: Duration) {
        if self.members.get(worker).is_none() {
            return;
        }
        let reason = format!("the coordinator ended this session: {why}");
        self.send(worker, ToWorker::Refused { kind: ErrorKind::Retry, reason });
        self.drop_worker(worker, why, Fault::Unworkable, now);
    }

    /// A worker gets no work for a while.
    pub(crate) fn sit_out(&mut self, worker: &WorkerId, fault: Fault, why: &str, now: Duration) {
        let pause = self.members.punish(worker, fault, now);
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

    pub(crate) fn emit(&mut self, note: Notification) {
        self.effects.push(Effect::Notify(note));
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
