//! The transitions: one method per event, in the order of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ulmus_types::{
    Assignment, BadUnit, CheckpointId, CheckpointKind, Digest, ErrorKind, ExitStatus, FileEntry, Generation,
    Hello, Job, LeaveReason, RunName, Snapshot, Step, StepReport, ToCoordinator, ToWorker, Wish, WorkerId,
    WorkerStatus,
};

use crate::effect::{Effect, Note, Outcome};
use crate::event::Event;
use crate::group::{self, Group};
use crate::invariants;
use crate::jobs::{Jobs, milestones};
use crate::members::{Activity, Members};
use crate::snapshots::Snapshots;

/// How long a new group may take to connect. Members give up a little earlier.
const FORM_WITHIN: Duration = Duration::from_secs(15);
/// How long members may take to leave a group before they count as hung.
const LEAVE_WITHIN: Duration = Duration::from_secs(30);
/// Groups that may fail in a row without one update before the run stops.
const FUTILE_GROUPS: u32 = 10;
/// How long a stop may take before the process ends without having saved.
const STOP_WITHIN: Duration = Duration::from_mins(2);

/// What the coordinator is told once, when it starts.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The run.
    pub run: RunName,
    /// Its resolved plan, as TOML.
    pub plan: String,
    /// The run's folder, as workers reach it.
    pub store: String,
    /// A file there, and what it contains.
    pub nonce_path: String,
    /// What that file contains.
    pub nonce: String,
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
    /// Milestones that are averaged.
    pub average: u64,
    /// Whether the average is exported.
    pub export: bool,
    /// A worker not heard of for so long is dead.
    pub dead_after: Duration,
    /// How long to wait for known or expected workers.
    pub rejoin_window: Duration,
    /// Time between two recovery checkpoints.
    pub recovery: Duration,
    /// Units that may be left out because they cannot be read; one more ends the run.
    pub bad_units: usize,
}

/// What the store remembers of the run; the default is a run that has not begun.
#[derive(Debug, Clone, Default)]
pub struct Saved {
    /// The last generation that was assigned.
    pub generation: Generation,
    /// Its members.
    pub group: Vec<WorkerId>,
    /// The fingerprint of the run.
    pub fingerprint: Option<Digest>,
    /// Committed checkpoints.
    pub checkpoints: BTreeMap<CheckpointId, CheckpointKind>,
    /// Units that are left out, and why.
    pub quarantine: BTreeMap<BadUnit, String>,
    /// Set when every update is done.
    pub trained: Option<Step>,
    /// Names of finished jobs.
    pub jobs: BTreeSet<String>,
    /// The last update that was reported.
    pub step: Step,
}

/// The state of a run.
#[derive(Debug)]
pub struct Coordinator {
    pub(crate) settings: Settings,
    pub(crate) members: Members,
    pub(crate) generation: Generation,
    pub(crate) group: Group,
    pub(crate) snapshots: Snapshots,
    pub(crate) jobs: Jobs,
    checkpoints: BTreeMap<CheckpointId, CheckpointKind>,
    fingerprint: Option<Digest>,
    quarantine: BTreeMap<BadUnit, String>,
    /// Set when every update is done; training is over once the checkpoint of that step is stored too.
    trained: Option<Step>,
    step: Step,
    futile_groups: u32,
    /// Whether this coordinator has led a group; the first one waits for the expected workers.
    had_a_group: bool,
    /// When the last checkpoint was asked for.
    saved_at: Duration,
    stopping_since: Option<Duration>,
    exited: bool,
    effects: Vec<Effect>,
}

impl Coordinator {
    /// Takes up a run where the store says it was. `now` is any monotonic time.
    pub fn new(settings: Settings, saved: Saved, now: Duration) -> Self {
        let group = if saved.group.is_empty() || saved.trained.is_some() {
            Group::ABSENT
        } else {
            let until = now + settings.rejoin_window;
            Group::Adopting { members: saved.group, back: BTreeSet::new(), until }
        };
        Self {
            members: Members::default(),
            generation: saved.generation,
            group,
            snapshots: Snapshots::default(),
            jobs: Jobs::new(saved.jobs, settings.average, settings.export),
            checkpoints: saved.checkpoints,
            fingerprint: saved.fingerprint,
            quarantine: saved.quarantine,
            trained: saved.trained,
            step: saved.step,
            futile_groups: 0,
            had_a_group: false,
            saved_at: now,
            stopping_since: None,
            exited: false,
            effects: Vec::new(),
            settings,
        }
    }

    /// Takes an event and tells what to do about it.
    pub fn on(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        match event {
            Event::Ticked => self.ticked(now),
            Event::Said(_, ToCoordinator::Hello(hello)) => self.hello(hello, now),
            Event::Said(worker, message) => {
                // Only those that were welcomed are heard; a fenced life of a worker is not.
                if let Some(member) = self.members.get_mut(&worker) {
                    member.heard = now;
                    self.said(&worker, message, now);
                }
            }
            Event::Disconnected(worker) => self.lost(&worker, "its connection ended", now),
            Event::CheckpointCommitted(checkpoint) => self.committed(checkpoint),
            Event::CommitFailed(checkpoint, why) => {
                self.snapshots.commit_failed(checkpoint, now);
                self.tell(Note::Remark(format!("manifest of {checkpoint} not stored, trying again: {why}")));
            }
            Event::StopRequested => self.stopping_since = self.stopping_since.or(Some(now)),
        }
        if !self.exited {
            self.advance(now);
        }
        // Whoever has ended leaves everything as it was.
        debug_assert_eq!(invariants::broken(self).filter(|_| !self.exited), None);
        std::mem::take(&mut self.effects)
    }

    /// The last update that was reported.
    pub const fn step(&self) -> Step {
        self.step
    }

    /// The membership number.
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Committed checkpoints.
    pub const fn checkpoints(&self) -> &BTreeMap<CheckpointId, CheckpointKind> {
        &self.checkpoints
    }

    fn said(&mut self, worker: &WorkerId, message: ToCoordinator, now: Duration) {
        match message {
            ToCoordinator::Hello(_) | ToCoordinator::Beat { .. } => {}
            ToCoordinator::StoreRead(read) => self.store_read(worker, read),
            ToCoordinator::Ready(fingerprint) => self.ready(worker, fingerprint),
            ToCoordinator::Connected(generation) => self.connected(worker, generation),
            ToCoordinator::Formed { generation, step } => self.formed(worker, generation, step),
            ToCoordinator::Steps { generation, reports } => self.steps(generation, reports),
            ToCoordinator::Reading { step, sources } => {
                self.effects.push(Effect::SaveReading(worker.clone(), step, sources));
            }
            ToCoordinator::Left { generation, step, reason } => {
                self.left(worker, generation, step, reason, now);
            }
            ToCoordinator::Snapshot(snapshot) => self.snapshot(worker, &snapshot, now),
            ToCoordinator::Written { checkpoint, files } => self.written(checkpoint, files),
            ToCoordinator::WriteFailed { checkpoint, message } => {
                self.snapshots.write_failed(checkpoint, worker, now);
                self.tell(Note::Remark(format!(
                    "{worker} could not store its part of {checkpoint}: {message}"
                )));
            }
            ToCoordinator::Notice(text) => self.tell(Note::Remark(format!("{}: {text}", worker.name()))),
            ToCoordinator::JobDone { job, result } => self.job_done(worker, job, result),
            ToCoordinator::JobFailed { job, kind, message, bad_unit } => {
                self.job_failed(worker, &job, kind, &message, bad_unit.as_ref());
            }
        }
    }

    // ---- joining

    fn hello(&mut self, hello: Hello, now: Duration) {
        let worker = hello.worker.clone();
        if hello.version != self.settings.version {
            let reason = format!(
                "worker {} is version {} and the coordinator {}; install the same version on both",
                worker.name(),
                hello.version,
                self.settings.version
            );
            return self.refuse(&worker, ErrorKind::Refused, reason);
        }
        if let Some(other) = self.members.namesake(&worker) {
            let reason =
                format!("a worker named {} is connected already; give this one another --name", other.name());
            return self.refuse(&worker, ErrorKind::Retry, reason);
        }
        if self.members.get(&worker).is_some() {
            self.lost(&worker, "it connected anew", now);
        }
        self.members.welcome(hello, now);
        let welcome = ToWorker::Welcome {
            run: self.settings.run.clone(),
            plan: self.settings.plan.clone(),
            store: self.settings.store.clone(),
            nonce_path: self.settings.nonce_path.clone(),
        };
        self.send(&worker, welcome);
    }

    fn store_read(&mut self, worker: &WorkerId, read: Result<String, String>) {
        let store = &self.settings.store;
        let why = match read {
            Ok(nonce) if nonce == self.settings.nonce => {
                self.members.set(worker, Activity::Warming);
                return;
            }
            Ok(_) => format!("what it finds at {store} is another folder"),
            Err(error) => format!("it cannot read {store}: {error}"),
        };
        let reason = format!(
            "worker {} does not share the run's store: {why}; set store.url in the plan to a folder or URL that every worker reaches",
            worker.name()
        );
        self.refuse(worker, ErrorKind::Refused, reason);
    }

    fn ready(&mut self, worker: &WorkerId, fingerprint: Digest) {
        let Some(member) = self.members.get_mut(worker) else { return };
        if member.activity != Activity::Warming {
            return;
        }
        member.fingerprint = Some(fingerprint);
        let status = member.hello.status.clone();
        match self.fingerprint {
            None => {
                self.fingerprint = Some(fingerprint);
                self.effects.push(Effect::SaveFingerprint(fingerprint));
            }
            Some(expected) if expected != fingerprint => {
                let reason = format!(
                    "worker {} computes other bits than this run: its fingerprint is {}, the run's {}; exact reduction needs machines of one kind, with one version of Ulmus",
                    worker.name(),
                    fingerprint.short(),
                    expected.short()
                );
                return self.refuse(worker, ErrorKind::Refused, reason);
            }
            Some(_) => {}
        }
        self.tell(Note::Joined(worker.clone()));
        match status {
            WorkerStatus::Idle => self.members.set(worker, Activity::Idle),
            WorkerStatus::Training(generation) => {
                self.members.set(worker, Activity::InGroup(generation));
                self.came_back(worker, generation);
            }
            WorkerStatus::Working(job) => {
                self.members.set(worker, Activity::Working(job.clone()));
                self.jobs.resumed(job, worker.clone());
            }
        }
    }

    /// A worker that was training while the coordinator, or its connection, was gone.
    fn came_back(&mut self, worker: &WorkerId, generation: Generation) {
        if generation == self.generation
            && let Group::Adopting { members, back, .. } = &mut self.group
            && members.contains(worker)
        {
            back.insert(worker.clone());
            if back.len() == members.len() {
                let size = members.len();
                self.group = Group::Training { members: members.clone(), pausing: false };
                self.had_a_group = true;
                self.tell(Note::GroupFormed { generation, size, step: self.step });
            }
            return;
        }
        self.send(worker, ToWorker::Abort(generation));
    }

    fn refuse(&mut self, worker: &WorkerId, kind: ErrorKind, reason: String) {
        self.tell(Note::Remark(format!("refused: {reason}")));
        self.send(worker, ToWorker::Refused { kind, reason });
        self.effects.push(Effect::Disconnect(worker.clone()));
        // One that is refused after its welcome has no part in anything yet.
        self.members.remove(worker);
    }

    fn lost(&mut self, worker: &WorkerId, why: &str, now: Duration) {
        if self.members.remove(worker).is_none() {
            return;
        }
        self.tell(Note::Lost(worker.clone(), why.to_owned()));
        self.jobs.lost(worker);
        self.snapshots.lost(worker);
        if !self.group.contains(worker) {
            return;
        }
        match &mut self.group {
            Group::Dissolving { waiting, .. } => {
                waiting.remove(worker);
            }
            // It may come back with the state that it has, as long as the window is open.
            Group::Adopting { back, .. } => {
                back.remove(worker);
            }
            _ => self.dissolve(&format!("{} is lost", worker.name()), true, now),
        }
    }

    // ---- the group

    fn dissolve(&mut self, why: &str, abort: bool, now: Duration) {
        let waiting: BTreeSet<WorkerId> = self
            .group
            .members()
            .into_iter()
            .filter(|id| {
                self.members.get(id).is_some_and(|m| m.activity == Activity::InGroup(self.generation))
            })
            .collect();
        if abort {
            for worker in &waiting {
                self.send(worker, ToWorker::Abort(self.generation));
            }
        }
        self.tell(Note::GroupEnded(self.generation, why.to_owned()));
        self.group = Group::Dissolving { waiting, until: now + LEAVE_WITHIN };
    }

    fn connected(&mut self, worker: &WorkerId, generation: Generation) {
        if generation == self.generation
            && let Group::Forming { members, connected, .. } = &mut self.group
            && members.contains(worker)
        {
            connected.insert(worker.clone());
        }
    }

    fn formed(&mut self, worker: &WorkerId, generation: Generation, step: Step) {
        if generation != self.generation {
            return;
        }
        let Group::Forming { members, formed, .. } = &mut self.group else { return };
        if members.contains(worker) {
            formed.insert(worker.clone());
        }
        if formed.len() == members.len() {
            let size = members.len();
            self.group = Group::Training { members: std::mem::take(members), pausing: false };
            self.tell(Note::GroupFormed { generation, size, step });
        }
    }

    /// Files reports, those of groups that have ended too: whoever has them was there when the step was done.
    fn steps(&mut self, generation: Generation, reports: Vec<StepReport>) {
        let Some(last) = reports.last().map(|report| report.step) else { return };
        if last > self.step {
            self.futile_groups = 0;
        }
        self.step = self.step.max(last);
        self.effects.push(Effect::SaveSteps(generation, reports));
        for member in self.members.ids() {
            self.send(&member, ToWorker::Acknowledge(last));
        }
    }

    fn left(
        &mut self,
        worker: &WorkerId,
        generation: Generation,
        step: Step,
        reason: LeaveReason,
        now: Duration,
    ) {
        match self.members.get(worker).map(|member| &member.activity) {
            Some(Activity::InGroup(of)) if *of == generation => self.members.set(worker, Activity::Idle),
            // It rejoined while it was training, and left before it was ready again.
            Some(Activity::Greeted | Activity::Warming) => {
                if let Some(member) = self.members.get_mut(worker) {
                    member.hello.status = WorkerStatus::Idle;
                }
                return;
            }
            _ => return,
        }
        if generation != self.generation {
            return;
        }
        match &reason {
            LeaveReason::Finished | LeaveReason::Exhausted(_) => {
                if let LeaveReason::Exhausted(source) = &reason {
                    self.tell(Note::Remark(format!(
                        "the run ends at step {step} of {}: {source}",
                        self.settings.iterations
                    )));
                }
                self.trained = Some(step);
                self.effects.push(Effect::SaveTrained(step));
            }
            LeaveReason::Failed { kind, message } => {
                let message = format!("training stopped after step {step} on {}: {message}", worker.name());
                return self.exit((*kind).into(), message);
            }
            LeaveReason::BadUnit(unit, why) => {
                if !self.leave_out(unit, why) {
                    let most = self.settings.bad_units;
                    let message = match most {
                        0 => {
                            format!("{why}; or set data.on_bad_unit = \"quarantine\" to leave such units out")
                        }
                        _ => format!(
                            "{why}; {most} units are left out already, and data.max_bad_units allows no more"
                        ),
                    };
                    return self
                        .exit(ExitStatus::Corrupt, format!("training stopped after step {step}: {message}"));
                }
            }
            LeaveReason::Agreed | LeaveReason::Lost(_) => {}
        }
        match &mut self.group {
            Group::Dissolving { waiting, .. } => {
                waiting.remove(worker);
            }
            Group::Absent { .. } => {}
            _ => {
                let (why, abort) = match reason {
                    LeaveReason::Lost(what) => (format!("{}: {what}", worker.name()), true),
                    LeaveReason::BadUnit(unit, _) => (format!("{unit} is left out from now on"), true),
                    LeaveReason::Agreed => (format!("paused at step {step}"), false),
                    _ => (format!("finished at step {step}"), false),
                };
                self.dissolve(&why, abort, now);
            }
        }
    }

    /// Leaves a unit out from now on, if there may be another one.
    fn leave_out(&mut self, unit: &BadUnit, why: &str) -> bool {
        // Several members of a group may have found it.
        if self.quarantine.contains_key(unit) {
            return true;
        }
        if self.quarantine.len() >= self.settings.bad_units {
            return false;
        }
        // The next group will come further, and there is an end to it.
        self.futile_groups = 0;
        self.quarantine.insert(unit.clone(), why.to_owned());
        self.effects.push(Effect::SaveQuarantine(self.quarantine.clone()));
        self.tell(Note::Remark(format!("{unit} is left out from now on: {why}")));
        true
    }

    /// Forms a group when training is due and there are enough idle workers.
    fn form(&mut self, now: Duration) {
        if !self.training_is_due() {
            return;
        }
        let Group::Absent { enough_since } = &mut self.group else { return };
        let mut idle = self.members.idle();
        if idle.len() < self.settings.min_workers {
            *enough_since = None;
            return;
        }
        let since = *enough_since.get_or_insert(now);
        // Later groups are of whoever is there: the survivors of a loss do not wait for a replacement.
        let first = !self.had_a_group;
        if first && idle.len() < self.settings.expected_workers && now < since + self.settings.rejoin_window {
            return;
        }
        if self.futile_groups == FUTILE_GROUPS {
            let message = format!("{FUTILE_GROUPS} groups in a row did no update; see the workers' logs");
            return self.exit(ExitStatus::Failed, message);
        }
        self.futile_groups += 1;
        self.had_a_group = true;
        idle.truncate(self.settings.micro_batches as usize);
        self.generation = self.generation.next();
        self.effects.push(Effect::SaveGeneration(self.generation, idle.clone()));
        let assignments: Vec<(WorkerId, Assignment)> =
            group::assignments(self.generation, &idle, &self.members, self.settings.micro_batches);
        for (worker, assignment) in assignments {
            self.members.set(&worker, Activity::InGroup(self.generation));
            self.send(&worker, ToWorker::Assign(assignment));
        }
        self.group = Group::Forming {
            members: idle,
            connected: BTreeSet::new(),
            formed: BTreeSet::new(),
            until: now + FORM_WITHIN,
        };
    }

    fn training_is_due(&self) -> bool {
        self.jobs.is_done("prepare")
            && !self.trained_and_stored()
            && self.stopping_since.is_none()
            && (self.trained.is_none() || self.snapshots.is_empty())
    }

    /// Whether every update is done and the state after the last one is stored.
    fn trained_and_stored(&self) -> bool {
        self.trained.is_some_and(|step| self.checkpoints.keys().any(|id| id.step() == step))
    }

    // ---- checkpoints

    fn snapshot(&mut self, worker: &WorkerId, snapshot: &Snapshot, now: Duration) {
        let checkpoint = snapshot.checkpoint;
        if self.checkpoints.contains_key(&checkpoint) {
            return self.send(worker, ToWorker::Release(checkpoint));
        }
        self.saved_at = now;
        if let Err(others) = self.snapshots.announced(worker, snapshot, now) {
            let others: Vec<&str> = others.iter().map(WorkerId::name).collect();
            let message = format!(
                "{} holds another state of {checkpoint} than {}: one of them computes wrongly; check their memory and start again from the checkpoint before",
                worker.name(),
                others.join(", ")
            );
            self.exit(ExitStatus::Corrupt, message);
        }
    }

    fn written(&mut self, checkpoint: CheckpointId, files: BTreeMap<String, FileEntry>) {
        self.snapshots.written(checkpoint, files);
    }

    fn committed(&mut self, checkpoint: CheckpointId) {
        let Some((kind, holders)) = self.snapshots.committed(checkpoint) else { return };
        self.checkpoints.insert(checkpoint, kind);
        for worker in holders {
            self.send(&worker, ToWorker::Release(checkpoint));
        }
        self.tell(Note::Checkpoint(checkpoint, kind));
        self.retire_recovery();
    }

    /// Keeps the newest two recovery checkpoints.
    fn retire_recovery(&mut self) {
        let recovery: Vec<CheckpointId> = self
            .checkpoints
            .iter()
            .filter(|(_, kind)| **kind == CheckpointKind::Recovery)
            .map(|(id, _)| *id)
            .collect();
        for id in &recovery[..recovery.len().saturating_sub(2)] {
            self.checkpoints.remove(id);
            self.effects.push(Effect::Delete(*id));
        }
    }

    // ---- jobs

    /// The worker can take other work. Whether its result counts: not if another was given the job meanwhile.
    fn job_ended(&mut self, worker: &WorkerId, job: &Job) -> bool {
        if self.members.get(worker).is_some_and(|m| m.activity == Activity::Working(job.clone())) {
            self.members.set(worker, Activity::Idle);
        }
        self.jobs.ended(job, worker)
    }

    fn job_done(&mut self, worker: &WorkerId, job: Job, result: String) {
        if !self.job_ended(worker, &job) {
            return;
        }
        self.jobs.succeeded(&job);
        self.effects.push(Effect::SaveJob(job.clone(), result));
        self.tell(Note::JobDone(job));
    }

    fn job_failed(
        &mut self,
        worker: &WorkerId,
        job: &Job,
        kind: ErrorKind,
        message: &str,
        bad_unit: Option<&BadUnit>,
    ) {
        if !self.job_ended(worker, job) {
            return;
        }
        // Preparing freezes the units, so none has a number before it is done.
        let bad_unit = bad_unit.filter(|_| *job != Job::Prepare);
        // It may have begun before the unit was left out.
        let was_known = bad_unit.is_some_and(|unit| self.quarantine.contains_key(unit));
        if !was_known && bad_unit.is_some_and(|unit| self.leave_out(unit, message)) {
            return;
        }
        let worth_another_try = was_known || matches!(kind, ErrorKind::Retry | ErrorKind::Internal);
        if worth_another_try && self.jobs.failed(job) {
            self.tell(Note::Remark(format!(
                "{} failed on {}, trying again: {message}",
                job.name(),
                worker.name()
            )));
        } else {
            self.exit(kind.into(), format!("{} failed on {}: {message}", job.name(), worker.name()));
        }
    }

    fn start_jobs(&mut self) {
        if self.stopping_since.is_some() {
            return;
        }
        let ready = self.jobs.ready(self.trained_and_stored(), &self.checkpoints);
        for (job, worker) in ready.into_iter().zip(self.members.idle()) {
            self.members.set(&worker, Activity::Working(job.clone()));
            self.jobs.started(job.clone(), worker.clone());
            self.send(&worker, ToWorker::Run(job.clone()));
            self.tell(Note::JobStarted(job, worker));
        }
    }

    // ---- time

    fn ticked(&mut self, now: Duration) {
        for worker in self.members.silent(now, self.settings.dead_after) {
            self.effects.push(Effect::Disconnect(worker.clone()));
            self.lost(&worker, "it fell silent", now);
        }
        let late = match &self.group {
            Group::Adopting { until, .. } => *until <= now,
            Group::Forming { members, connected, until, .. } => {
                *until <= now && connected.len() < members.len()
            }
            Group::Dissolving { waiting, until } if *until <= now => {
                for worker in waiting.clone() {
                    self.effects.push(Effect::Disconnect(worker.clone()));
                    self.lost(&worker, "it did not leave its group", now);
                }
                false
            }
            _ => false,
        };
        if late {
            self.dissolve("not everybody came in time", true, now);
        }
        if self.stopping_since.is_some_and(|since| now > since + STOP_WITHIN) {
            self.exit(
                ExitStatus::Failed,
                "stopped without saving: the group did not pause in time".to_owned(),
            );
        }
    }

    /// What follows from the state alone, whatever the event was.
    fn advance(&mut self, now: Duration) {
        if matches!(&self.group, Group::Dissolving { waiting, .. } if waiting.is_empty()) {
            self.group = Group::ABSENT;
            self.effects.push(Effect::SaveGroupEnded(self.generation));
        }
        // A last state that died with its holders has to be trained again.
        if self.trained.is_some() && !self.trained_and_stored() && self.snapshots.is_empty() {
            self.trained = None;
        }
        self.wish(now);
        let training = match &self.group {
            Group::Training { members, .. } => members.clone(),
            _ => Vec::new(),
        };
        for (worker, checkpoint, files) in self.snapshots.assign(&training, now) {
            self.send(&worker, ToWorker::Write { checkpoint, files });
        }
        for complete in self.snapshots.complete(now) {
            let crate::snapshots::Complete { checkpoint, kind, state, files } = complete;
            self.effects.push(Effect::Commit { checkpoint, kind, state, files });
        }
        self.form(now);
        self.start_jobs();
        if self.jobs.all_done(self.trained_and_stored(), &self.checkpoints) {
            self.exit(ExitStatus::Done, "every phase is done".to_owned());
        } else if self.stopping_since.is_some()
            && matches!(self.group, Group::Absent { .. })
            && self.snapshots.is_empty()
        {
            let message = match milestones(&self.checkpoints).last().max(self.checkpoints.keys().last()) {
                Some(last) => format!("interrupted; {last} is stored, the same command goes on from there"),
                None => "interrupted; the same command begins where this one stopped".to_owned(),
            };
            self.exit(ExitStatus::Interrupted, message);
        }
    }

    /// Asks a training group for what can wait until the end of a step.
    fn wish(&mut self, now: Duration) {
        let waiting_to_join = !self.members.idle().is_empty();
        let stopping = self.stopping_since.is_some();
        let Group::Training { members, pausing } = &mut self.group else { return };
        let room = (members.len() as u64) < self.settings.micro_batches;
        let wish = if *pausing {
            return;
        } else if stopping {
            Wish::Stop
        } else if waiting_to_join && room {
            Wish::Pause
        } else if now >= self.saved_at + self.settings.recovery {
            Wish::Save
        } else {
            return;
        };
        *pausing = wish != Wish::Save;
        self.saved_at = now;
        for member in members.clone() {
            self.send(&member, ToWorker::Wish(self.generation, wish));
        }
    }

    // ---- effects

    fn send(&mut self, worker: &WorkerId, message: ToWorker) {
        self.effects.push(Effect::Send(worker.clone(), message));
    }

    fn tell(&mut self, note: Note) {
        self.effects.push(Effect::Tell(note));
    }

    fn exit(&mut self, status: ExitStatus, message: String) {
        if self.exited {
            return;
        }
        self.exited = true;
        for worker in self.members.ids() {
            self.send(&worker, ToWorker::Finish);
        }
        self.effects.push(Effect::Exit(Outcome { status, message }));
    }
}
