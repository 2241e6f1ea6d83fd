//! The coordinator's core, its stored state, and the workers around it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ulmus_coord_core::{
    Coordinator, Doing, Effect, Event, JobStatus, MemberStatus, Notification, Outcome, PersistentState,
    Phase, Settings, Status, TrainingRecord,
};
use ulmus_types::{
    CheckpointId, CheckpointKind, ExitStatus, Generation, Graph, GroupRequest, Heartbeat, Incarnation,
    LeaveReason, RunId, Section, Stage, StageName, Step, ToCoordinator, ToWorker, WorkerId,
};

use crate::worker::{Group, Progress, Reaction, State, Worker};
use crate::{AVERAGE, FILES, RUN, VERSION, hello_of, origin, settings, training, updates};

pub(crate) struct World {
    settings: Settings,
    pub core: Option<Coordinator>,
    pub saved: PersistentState,
    pub workers: BTreeMap<WorkerId, Worker>,
    pub commits: VecDeque<CheckpointId>,
    pub now: Duration,
    incarnations: u64,
    kinds: BTreeMap<CheckpointId, CheckpointKind>,
    /// The state that was stored as each checkpoint.
    stored: BTreeMap<CheckpointId, State>,
    pub outcome: Option<Outcome>,
    /// Everything that a person was told.
    pub notifications: Vec<Notification>,
    /// The losses of pretraining.
    pub recorded: BTreeMap<Step, f64>,
    /// Those of the stages after it.
    pub tuned: BTreeMap<(StageName, Step), f64>,
    /// Steps of milestones that were damaged.
    pub damaged: BTreeSet<u64>,
    /// Whether the store takes everything that is written; otherwise all writing waits.
    pub stores: bool,
    /// Workers whose session the coordinator has ended.
    pub cut: BTreeSet<WorkerId>,
    /// Whether invalid messages may have been sent in workers' names, so that workers may be expelled.
    pub strangers: bool,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with_stages(Vec::new())
    }

    /// A world whose plan adds stages to those of every run.
    pub(crate) fn with_stages(stages: Vec<Stage>) -> Self {
        Self::of(Graph::new(AVERAGE, true, false, &[], stages))
    }

    /// A world whose run consists of these stages.
    pub(crate) fn of(graph: Graph) -> Self {
        let trainings = graph.trainings().map(|stage| training(stage.name)).collect();
        let settings = Settings { graph, trainings, ..settings() };
        let core = Coordinator::new(settings.clone(), PersistentState::default(), Duration::ZERO);
        Self {
            settings,
            core: Some(core),
            saved: PersistentState::default(),
            workers: BTreeMap::new(),
            commits: VecDeque::new(),
            now: Duration::ZERO,
            incarnations: 0,
            kinds: BTreeMap::new(),
            stored: BTreeMap::new(),
            outcome: None,
            notifications: Vec::new(),
            recorded: BTreeMap::new(),
            tuned: BTreeMap::new(),
            damaged: BTreeSet::new(),
            stores: true,
            cut: BTreeSet::new(),
            strangers: false,
        }
    }

    pub(crate) fn event(&mut self, event: Event) {
        let Some(core) = &mut self.core else { return };
        let effects = core.on(self.now, event);
        assert_consistent(&core.status());
        for effect in effects {
            self.perform(effect);
        }
    }

    pub(crate) fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::SaveGeneration(generation, roster) => {
                assert!(generation > self.saved.generation, "{generation} was assigned before");
                self.saved.generation = generation;
                self.saved.group.clone_from(&roster.members);
                self.saved.rosters.insert(generation, roster);
            }
            Effect::SaveGroupEnded(generation) => {
                assert_eq!(generation, self.saved.generation);
                self.saved.group.clear();
            }
            Effect::SaveFingerprint(fingerprint) => self.saved.fingerprint = Some(fingerprint),
            Effect::SaveSteps(training, generation, reports) => {
                assert!(generation <= self.saved.generation);
                for report in reports {
                    if training == StageName::pretraining() {
                        self.recorded.insert(report.step, report.loss);
                    } else {
                        self.tuned.insert((training, report.step), report.loss);
                    }
                    // Whatever happened, the loss must be that of an undisturbed run.
                    let undisturbed = State::after(training, report.step.get()).report().loss;
                    assert!(self.strangers || report.loss == undisturbed, "{report:?}");
                    let record = self.record_mut(training);
                    record.step = record.step.max(report.step);
                }
            }
            Effect::SaveQuarantine(quarantine) => self.saved.quarantine = quarantine,
            Effect::SaveTrained(training, step) => self.record_mut(training).trained = Some(step),
            Effect::SaveCommitted(checkpoint) => self.save_committed(checkpoint),
            Effect::SaveDamaged(checkpoint) => {
                let record = self.record_mut(checkpoint.training());
                assert!(record.checkpoints.remove(&checkpoint).is_some());
                record.damaged.insert(checkpoint.step());
            }
            Effect::SaveJobStarted(job, worker) => {
                self.saved.owners.insert(job, worker);
            }
            Effect::SaveJobUndone(name) => {
                self.saved.jobs.remove(&name);
            }
            Effect::SaveJob(job, _) => {
                self.saved.jobs.insert(job.name());
                let graph = &self.settings.graph;
                let made = |stage: &&Stage| graph.examples_of(stage.name) == *job.stage();
                let made =
                    graph.trainings().find(made).map(|stage| stage.name).filter(|_| job.part().is_none());
                if let Some(training) = made {
                    self.record_mut(training).updates = Some(updates(training));
                    self.event(Event::ExamplesMade(training, updates(training)));
                }
            }
            Effect::SaveJobSkipped(job, _) => {
                self.saved.jobs.insert(job.name());
            }
            Effect::Send(worker, message) => self.receive(&worker, message),
            Effect::Disconnect(worker) => {
                if self.workers.contains_key(&worker) {
                    self.cut.insert(worker);
                }
            }
            Effect::Notify(notification) => self.notifications.push(notification),
            Effect::SaveReading(..) | Effect::Verify(_) => {}
            Effect::Commit { checkpoint, kind, state, files } => {
                let (training, step) = (checkpoint.training(), checkpoint.step().get());
                let stored = State { training, step, digest: state };
                let parts = FILES.map(|file| (file.to_owned(), stored.part(file)));
                assert!(self.strangers || files == parts.into(), "a manifest names every part: {files:?}");
                assert!(self.strangers || stored == State::after(training, step), "{checkpoint}");
                self.stored.insert(checkpoint, stored);
                self.kinds.insert(checkpoint, kind);
                self.commits.push_back(checkpoint);
            }
            Effect::Delete(checkpoint) => {
                let record = self.record_mut(checkpoint.training());
                assert_eq!(record.checkpoints.remove(&checkpoint), Some(CheckpointKind::Recovery));
            }
            Effect::Exit(outcome) => self.outcome = Some(outcome),
        }
    }

    /// What is remembered of a training stage.
    pub(crate) fn record_mut(&mut self, training: StageName) -> &mut TrainingRecord {
        self.saved.trainings.entry(training).or_default()
    }

    /// What is remembered of pretraining.
    pub(crate) fn pretraining(&self) -> TrainingRecord {
        self.saved.trainings.get(&StageName::pretraining()).cloned().unwrap_or_default()
    }

    fn save_committed(&mut self, checkpoint: CheckpointId) {
        let kind = self.kinds[&checkpoint];
        let record = self.record_mut(checkpoint.training());
        record.checkpoints.insert(checkpoint, kind);
        record.had_checkpoints = true;
    }

    pub(crate) fn receive(&mut self, id: &WorkerId, message: ToWorker) {
        let Some(worker) = self.workers.get_mut(id) else { return };
        match &message {
            ToWorker::Assign(assignment) => {
                let begins = origin(assignment.training);
                assert_eq!(assignment.from, begins, "{} begins from that", assignment.training);
                assert!(self.strangers || worker.group.is_none(), "{id} is in a group already");
                assert!(self.strangers || worker.job.is_none(), "{id} is busy");
            }
            ToWorker::Write { checkpoint, .. } => {
                let held = worker.held.contains(checkpoint);
                assert!(self.strangers || held, "{id} does not hold {checkpoint}");
            }
            _ => {}
        }
        match worker.receive(message) {
            Reaction::Exits(ExitStatus::Interrupted) if worker.draining => {
                assert!(self.strangers || worker.group.is_none(), "{id} was let go while it trains");
                self.workers.remove(id);
                self.cut.remove(id);
            }
            Reaction::Continues | Reaction::Exits(_) => {}
            Reaction::Refused(reason) => {
                assert!(self.strangers, "{id} refused: {reason}");
                self.workers.remove(id);
                self.cut.remove(id);
            }
        }
    }

    /// Workers whose session was ended reconnect.
    pub(crate) fn reconnect(&mut self) {
        for id in std::mem::take(&mut self.cut) {
            assert!(self.strangers, "{id} was cut off though it did nothing wrong");
            if let Some(worker) = self.workers.get_mut(&id) {
                worker.hello();
            }
        }
    }

    /// A stranger sends a message. One that was `greeted` has sent a hello, and got no further.
    pub(crate) fn babble(&mut self, greeted: bool, this_run: bool, message: ToCoordinator) {
        let Some(core) = &self.core else { return };
        let name = if greeted { "stranger" } else { "nobody" };
        let id = WorkerId::new(name, Incarnation::new(1)).unwrap();
        if greeted {
            let hello = hello_of(&id, VERSION);
            if core.check_hello(&hello).is_ok() {
                self.event(Event::Received {
                    worker: id.clone(),
                    run: None,
                    message: ToCoordinator::Hello(hello),
                });
            }
        }
        let run = if this_run { RUN } else { RunId::from_bytes([9; 16]) };
        self.event(Event::Received { worker: id, run: Some(run), message });
    }

    /// A worker is asked to leave.
    pub(crate) fn drain(&mut self, index: usize) {
        let Some(id) = self.workers.keys().nth(index % self.workers.len().max(1)).cloned() else { return };
        self.workers.get_mut(&id).unwrap().drain();
    }

    /// A stored milestone is found to be damaged.
    pub(crate) fn damage(&mut self, index: usize) {
        let record = self.pretraining();
        let milestones: Vec<CheckpointId> = record
            .checkpoints
            .iter()
            .filter(|(_, kind)| **kind == CheckpointKind::Milestone)
            .map(|(id, _)| *id)
            .collect();
        let mut read = self
            .settings
            .graph
            .stages()
            .iter()
            .filter(|stage| stage.reads_milestones_of() == Some(StageName::pretraining()));
        let is_done = |stage: &Stage| self.saved.jobs.iter().any(|job| job.stage() == stage.name.as_str());
        // No job reads the milestones any more.
        if self.core.is_none() || read.all(is_done) {
            return;
        }
        // A run all of whose checkpoints are damaged stops, which is another test.
        if milestones.len() < 2 {
            return;
        }
        let id = milestones[index % milestones.len()];
        self.damaged.insert(id.step().get());
        self.event(Event::CheckpointDamaged(id, "a bit was flipped".into()));
    }

    pub(crate) fn join(&mut self, name: u8) {
        let name = format!("w{name}");
        if self.workers.keys().any(|id| id.name() == name) {
            return;
        }
        self.admit(name, |_| {});
    }

    /// A worker comes that only serves jobs, with this device.
    pub(crate) fn join_for_jobs(&mut self, name: &str, device: &str) {
        if self.workers.keys().any(|id| id.name() == name) {
            return;
        }
        self.admit(name.to_owned(), |worker| {
            worker.only_jobs = true;
            device.clone_into(&mut worker.device);
        });
    }

    fn admit(&mut self, name: String, with: impl FnOnce(&mut Worker)) {
        self.incarnations += 1;
        let id = WorkerId::new(name, Incarnation::new(self.incarnations)).unwrap();
        let mut worker = Worker::new(id.clone());
        with(&mut worker);
        worker.hello();
        self.workers.insert(id, worker);
    }

    pub(crate) fn kill(&mut self, index: usize) {
        let Some(id) = self.workers.keys().nth(index % self.workers.len().max(1)).cloned() else { return };
        self.workers.remove(&id);
        self.cut.remove(&id);
        self.event(Event::Disconnected(id));
    }

    /// The coordinator dies. Workers continue, and nobody receives their messages.
    pub(crate) fn die(&mut self) {
        // All parts of an unfinished commit are stored, so the next start finishes it.
        self.commit_all();
        self.core = None;
    }

    /// The coordinator dies, if it is alive, and restarts. All workers have to say hello again.
    pub(crate) fn restart(&mut self) {
        self.die();
        self.core = Some(Coordinator::new(self.settings.clone(), self.saved.clone(), self.now));
        self.workers.values_mut().for_each(Worker::hello);
    }

    pub(crate) fn commit_all(&mut self) {
        while let Some(checkpoint) = self.commits.pop_front() {
            match self.core {
                Some(_) => self.event(Event::CheckpointCommitted(checkpoint)),
                None => self.save_committed(checkpoint),
            }
        }
    }

    /// Delivers every waiting message. Each worker's own messages stay in order.
    pub(crate) fn deliver(&mut self) {
        while let Some(id) = self.workers.iter().find(|(_, w)| !w.outbox.is_empty()).map(|(id, _)| id.clone())
        {
            self.deliver_one(&id);
        }
    }

    /// Delivers some messages of one worker before those of any other.
    pub(crate) fn deliver_some(&mut self, index: usize, count: usize) {
        let Some(id) = self.workers.keys().nth(index % self.workers.len().max(1)).cloned() else { return };
        for _ in 0..count {
            self.deliver_one(&id);
        }
    }

    pub(crate) fn deliver_one(&mut self, id: &WorkerId) {
        let Some((run, message)) = self.workers.get_mut(id).and_then(|worker| worker.outbox.pop_front())
        else {
            return;
        };
        let Some(core) = &self.core else { return };
        if let ToCoordinator::Hello(hello) = &message {
            if let Err((_, reason)) = core.check_hello(hello) {
                assert!(self.strangers, "{id} refused: {reason}");
                self.workers.remove(id);
                return;
            }
            self.cut.remove(id);
        }
        self.event(Event::Received { worker: id.clone(), run, message });
    }

    pub(crate) fn tick(&mut self) {
        self.now += Duration::from_millis(500);
        for (id, generation) in
            self.workers.iter().map(|(id, worker)| (id.clone(), worker.generation())).collect::<Vec<_>>()
        {
            let heartbeat = Heartbeat {
                generation: generation.unwrap_or_default(),
                section: if generation.is_some() { Section::Computing } else { Section::Idle },
                busy: self.now,
                ..Heartbeat::default()
            };
            let message = ToCoordinator::Heartbeat(heartbeat);
            self.event(Event::Received { worker: id, run: Some(RUN), message });
        }
        self.event(Event::Ticked);
    }

    /// Parts are stored; states are hashed; groups form and do an update; aborted members leave; jobs are done.
    pub(crate) fn work(&mut self) {
        if self.stores {
            self.workers.values_mut().for_each(Worker::finish_writing);
        }
        self.workers.values_mut().for_each(Worker::finish_hashing);
        let mut groups: BTreeMap<Generation, Vec<WorkerId>> = BTreeMap::new();
        for (id, worker) in &self.workers {
            if let Some(generation) = worker.generation() {
                groups.entry(generation).or_default().push(id.clone());
            }
        }
        for (generation, mut members) in groups {
            members.sort_by_key(|id| self.group(id).assignment.rank);
            let size = self.group(&members[0]).assignment.size as usize;
            if members.len() < size || members.iter().any(|id| self.workers[id].is_aborted()) {
                let message = "a member is gone".to_owned();
                self.leave(&members, &LeaveReason::Lost { suspect: None, message });
            } else {
                self.advance(generation, &members);
            }
        }
        self.finish_jobs();
    }

    pub(crate) fn finish_jobs(&mut self) {
        for worker in self.workers.values_mut() {
            if let Some(job) = worker.job.take() {
                worker.say(ToCoordinator::JobDone { job, result: "{}".into() });
            }
        }
    }

    pub(crate) fn group(&self, id: &WorkerId) -> &Group {
        self.workers[id].group.as_ref().unwrap()
    }

    pub(crate) fn each(&mut self, members: &[WorkerId], mut work: impl FnMut(&mut Worker)) {
        for id in members {
            work(self.workers.get_mut(id).unwrap());
        }
    }

    pub(crate) fn leave(&mut self, members: &[WorkerId], reason: &LeaveReason) {
        self.each(members, |worker| worker.leave(reason.clone()));
    }

    /// The state with which a group begins: the newest held by its members, otherwise the newest stored one, otherwise
    /// that of the seed. A repairing group begins before the first milestone that it recreates.
    pub(crate) fn newest(
        &self,
        training: StageName,
        members: &[WorkerId],
        repair: Option<(u64, u64)>,
    ) -> State {
        let is_usable =
            |state: &State| state.training == training && repair.is_none_or(|(first, _)| state.step < first);
        let held = members.iter().filter_map(|id| self.workers[id].state).filter(is_usable);
        let checkpoints = self.saved.trainings.values().flat_map(|record| record.checkpoints.keys());
        let stored = || checkpoints.map(|id| self.stored[id]).filter(is_usable);
        held.max_by_key(|state| state.step)
            .or_else(|| stored().max_by_key(|state| state.step))
            .unwrap_or_else(|| State::begin(training))
    }

    pub(crate) fn advance(&mut self, generation: Generation, members: &[WorkerId]) {
        let first = &members[0];
        let repair = self.group(first).repair();
        let training = self.group(first).assignment.training;
        match self.group(first).stage {
            Progress::Assigned => {
                return self.each(members, |worker| {
                    worker.group.as_mut().unwrap().stage = Progress::Connected;
                    worker.say(ToCoordinator::Connected(generation));
                });
            }
            Progress::Connected => {
                let newest = self.newest(training, members, repair);
                return self.each(members, |worker| worker.form(generation, newest));
            }
            Progress::Formed => {}
        }
        let state = self.workers[first].state.unwrap();
        let last = repair.map_or(updates(training), |(_, last)| last);
        if state.step >= last {
            return self.leave(members, &LeaveReason::Finished);
        }
        let next = state.advanced();
        let requests = members.iter().filter_map(|id| self.group(id).request);
        let request = requests.max_by_key(|request| *request == GroupRequest::Stop);
        let keeps = next.is_milestone() && self.group(first).recreates(next.step)
            || matches!(request, Some(GroupRequest::Stop | GroupRequest::Save));
        if keeps {
            let kind = if next.is_milestone() { CheckpointKind::Milestone } else { CheckpointKind::Recovery };
            self.kinds.insert(CheckpointId::new(training, Step::new(next.step), generation), kind);
        }
        self.each(members, |worker| worker.advance(generation, &next.report(), keeps));
        if next.step == last {
            self.leave(members, &LeaveReason::Finished);
        } else if matches!(request, Some(GroupRequest::Stop | GroupRequest::Pause)) {
            self.leave(members, &LeaveReason::Agreed);
        }
    }

    pub(crate) fn turn(&mut self) {
        self.reconnect();
        self.deliver();
        self.work();
        self.deliver();
        self.commit_all();
        self.tick();
    }
}

/// A snapshot of the run contradicts itself nowhere, whatever has happened.
fn assert_consistent(status: &Status) {
    let of = |doing: fn(&Doing) -> bool| status.members.iter().filter(|member| doing(&member.doing)).count();
    let running: Vec<_> = status
        .jobs
        .iter()
        .filter_map(|(kind, job)| match job {
            JobStatus::Running(worker) => Some((kind, worker)),
            JobStatus::Waiting | JobStatus::Pending(_) | JobStatus::Failed | JobStatus::Done => None,
        })
        .collect();
    for (kind, worker) in &running {
        let does = |member: &MemberStatus| {
            member.worker == **worker && member.doing == Doing::Working((*kind).clone())
        };
        assert!(status.members.iter().any(does), "{worker} does not work on {kind}: {status:?}");
    }
    match status.phase {
        Phase::Training => assert!(of(|doing| matches!(doing, Doing::Training(_))) > 0, "{status:?}"),
        Phase::Storing => assert!(!status.pending_checkpoints.is_empty(), "{status:?}"),
        Phase::Waiting { ready, needed } => {
            assert!(ready < needed && ready <= of(|doing| *doing == Doing::Idle), "{status:?}");
        }
        Phase::Forming | Phase::Jobs | Phase::Stopping | Phase::Ended => {}
    }
}
