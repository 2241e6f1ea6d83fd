//! The coordinator against simulated workers: random joins, deaths, restarts of the coordinator, stops, lost parts of
//! checkpoints, damaged milestones, workers that are asked to leave and strangers that say anything at all, from seeds
//! that proptest shrinks. Debug builds check the invariants after every event.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;
use ulmus_coord_core::{Coordinator, Effect, Event, Outcome, PersistentState, Settings};
use ulmus_types::{
    Assignment, BadUnit, Blame, CheckpointId, CheckpointKind, Digest, ErrorKind, ExitStatus, FileEntry,
    Generation, GroupRequest, Heartbeat, Hello, Incarnation, Job, LeaveReason, Rank, Ready, RunId, RunSecret,
    Section, SessionSecret, Snapshot, SourceReading, Step, StepReport, ToCoordinator, ToWorker, WorkerId,
    WorkerStatus,
};

const ITERATIONS: u64 = 12;
const GRID: u64 = 3;
const VERSION: &str = "1.0.0";
const AVERAGE: u64 = 2;
const RUN: RunId = RunId::from_bytes([7; 16]);
const FILES: [&str; 3] = ["a", "b", "c"];

fn settings() -> Settings {
    Settings {
        run: "sim".parse().unwrap(),
        id: RUN,
        secret: RunSecret::from_bytes([8; 32]),
        plan: String::new(),
        store: "store".into(),
        nonce: Digest::of(b"secret"),
        version: VERSION.into(),
        expected_workers: 2,
        min_workers: 1,
        micro_batches: 4,
        iterations: ITERATIONS,
        tokens_per_step: 100,
        milestone_every: GRID,
        checkpoint_files: FILES.map(str::to_owned).to_vec(),
        average: AVERAGE,
        export: true,
        sources: ["web".to_owned()].into(),
        from_start: false,
        may_exhaust: false,
        dead_after: Duration::from_secs(3),
        rejoin_window: Duration::from_secs(10),
        recovery: Duration::from_mins(1),
        max_age: Duration::from_mins(3),
        bad_units: 1,
    }
}

/// How far the forming of a group has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Assigned,
    Connected,
    Formed,
}

/// A worker that does what the real one promises.
#[derive(Debug, Clone)]
struct Worker {
    step: Option<u64>,
    group: Option<Assignment>,
    /// Of the last group.
    generation: Option<Generation>,
    stage: Stage,
    aborted: bool,
    request: Option<GroupRequest>,
    reports: Vec<StepReport>,
    held: BTreeSet<CheckpointId>,
    job: Option<Job>,
    secret: Option<SessionSecret>,
    draining: bool,
    /// Whether the coordinator of this connection was told everything that was not confirmed.
    caught_up: bool,
    /// What it has said and the coordinator not yet heard.
    outbox: VecDeque<ToCoordinator>,
}

impl Worker {
    fn unconfirmed(&self) -> Option<ToCoordinator> {
        let generation = self.generation?;
        let reports = self.reports.clone();
        (!reports.is_empty()).then_some(ToCoordinator::Steps { generation, reports })
    }

    fn ready(&self) -> ToCoordinator {
        ToCoordinator::Ready(Ready {
            fingerprint: Digest::of(b"arithmetic"),
            generation: self.generation,
            reports: self.reports.clone(),
            snapshots: self.held.iter().copied().map(state).collect(),
        })
    }

    /// The last milestone that its group makes again, and the first.
    fn repair(&self) -> Option<(u64, u64)> {
        let repair = self.group.as_ref()?.repair.as_ref()?;
        Some((repair.milestones.first()?.get(), repair.milestones.last()?.get()))
    }
}

struct World {
    core: Option<Coordinator>,
    saved: PersistentState,
    workers: BTreeMap<WorkerId, Worker>,
    commits: VecDeque<CheckpointId>,
    now: Duration,
    incarnations: u64,
    kinds: BTreeMap<CheckpointId, CheckpointKind>,
    outcome: Option<Outcome>,
    recorded: BTreeMap<Step, f64>,
    /// Milestones that were damaged.
    damaged: BTreeSet<u64>,
    /// Workers whose session the coordinator has ended.
    cut: BTreeSet<WorkerId>,
    /// Whether workers may have said what cannot be, and be told so.
    strangers: bool,
}

fn hello_of(worker: &WorkerId, version: &str) -> Hello {
    Hello {
        worker: worker.clone(),
        version: version.into(),
        address: String::new(),
        device: String::new(),
        threads: 1,
        pid: 1,
        run: None,
        secret: None,
        status: WorkerStatus::Idle,
    }
}

fn report(step: u64) -> StepReport {
    StepReport {
        step: Step::new(step),
        tokens: step * 100,
        loss: 10.0 / step as f64,
        z_loss: 0.0,
        grad_norm: 1.0,
        lr: 0.1,
        held_out_loss: None,
        elapsed: Duration::ZERO,
        data_wait: Duration::ZERO,
        communication: Duration::ZERO,
    }
}

impl World {
    fn new() -> Self {
        let core = Coordinator::new(settings(), PersistentState::default(), Duration::ZERO);
        Self {
            core: Some(core),
            saved: PersistentState::default(),
            workers: BTreeMap::new(),
            commits: VecDeque::new(),
            now: Duration::ZERO,
            incarnations: 0,
            kinds: BTreeMap::new(),
            outcome: None,
            recorded: BTreeMap::new(),
            damaged: BTreeSet::new(),
            cut: BTreeSet::new(),
            strangers: false,
        }
    }

    fn event(&mut self, event: Event) {
        let Some(core) = &mut self.core else { return };
        for effect in core.on(self.now, event) {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::SaveGeneration(generation, group) => {
                assert!(generation > self.saved.generation, "{generation} was assigned before");
                self.saved.generation = generation;
                self.saved.rosters.insert(generation, group.clone());
                self.saved.group = group;
            }
            Effect::SaveGroupEnded(generation) => {
                assert_eq!(generation, self.saved.generation);
                self.saved.group.clear();
            }
            Effect::SaveFingerprint(fingerprint) => self.saved.fingerprint = Some(fingerprint),
            Effect::SaveSteps(generation, reports) => {
                assert!(generation <= self.saved.generation);
                for report in reports {
                    let earlier = self.recorded.insert(report.step, report.loss);
                    assert!(self.strangers || earlier.is_none_or(|loss| loss == report.loss));
                    self.saved.step = self.saved.step.max(report.step);
                }
            }
            Effect::SaveQuarantine(quarantine) => self.saved.quarantine = quarantine,
            Effect::SaveTrained(step) => self.saved.trained = Some(step),
            Effect::SaveCommitted(checkpoint) => {
                self.saved.checkpoints.insert(checkpoint, self.kinds[&checkpoint]);
            }
            Effect::SaveDamaged(checkpoint) => {
                assert!(self.saved.checkpoints.remove(&checkpoint).is_some());
            }
            Effect::SaveJobStarted(job, worker) => {
                self.saved.owners.insert(job, worker);
            }
            Effect::SaveJobUndone(name) => {
                self.saved.jobs.remove(&name);
            }
            Effect::SaveJob(job, _) => {
                self.saved.jobs.insert(job.name().to_owned());
            }
            Effect::Send(worker, message) => self.receive(&worker, message),
            Effect::Disconnect(worker) => {
                if self.workers.contains_key(&worker) {
                    self.cut.insert(worker);
                }
            }
            Effect::Notify(_) | Effect::SaveReading(..) | Effect::Verify(_) => {}
            Effect::Commit { checkpoint, kind, files, .. } => {
                assert_eq!(files.len(), 3, "a manifest names every part");
                self.kinds.insert(checkpoint, kind);
                self.commits.push_back(checkpoint);
            }
            Effect::Delete(checkpoint) => {
                assert_eq!(self.saved.checkpoints.remove(&checkpoint), Some(CheckpointKind::Recovery));
            }
            Effect::Exit(outcome) => self.outcome = Some(outcome),
        }
    }

    fn receive(&mut self, id: &WorkerId, message: ToWorker) {
        let Some(worker) = self.workers.get_mut(id) else { return };
        match message {
            ToWorker::Welcome { id, secret, .. } => {
                assert_eq!(id, RUN);
                worker.caught_up = true;
                worker.secret = Some(secret);
                worker.outbox.push_back(ToCoordinator::StoreRead(Ok(Digest::of(b"secret"))));
                worker.outbox.push_back(worker.ready());
                if worker.draining {
                    worker.outbox.push_back(ToCoordinator::Draining);
                }
            }
            // Its session ends, and it connects anew.
            ToWorker::Refused { kind: ErrorKind::Retry, .. } => {}
            ToWorker::Refused { reason, .. } => {
                assert!(self.strangers, "{id} refused: {reason}");
                self.workers.remove(id);
                self.cut.remove(id);
            }
            ToWorker::Assign(assignment) => {
                assert!(self.strangers || worker.group.is_none(), "{id} is in a group already");
                assert!(self.strangers || worker.job.is_none(), "{id} is busy");
                worker.generation = Some(assignment.generation);
                worker.group = Some(assignment);
                worker.stage = Stage::Assigned;
                worker.aborted = false;
                worker.request = None;
            }
            ToWorker::Abort(generation) => {
                worker.aborted |= worker.group.as_ref().is_some_and(|group| group.generation <= generation);
            }
            ToWorker::Request(generation, request) => {
                if worker.group.as_ref().is_some_and(|group| group.generation == generation) {
                    worker.request = Some(request);
                }
            }
            ToWorker::Acknowledge(step) => worker.reports.retain(|report| report.step > step),
            ToWorker::Write { checkpoint, files } => {
                assert!(
                    self.strangers || worker.held.contains(&checkpoint),
                    "{id} does not hold {checkpoint}"
                );
                let entry = FileEntry { bytes: 1, digest: Digest::of(b"part") };
                let files = files.into_iter().map(|file| (file, entry)).collect();
                worker.outbox.push_back(ToCoordinator::Written { checkpoint, files });
            }
            ToWorker::Release(checkpoint) => {
                worker.held.remove(&checkpoint);
            }
            ToWorker::Run(job) => worker.job = Some(job),
            ToWorker::Finish(status) => {
                if status == ExitStatus::Interrupted && worker.draining {
                    assert!(self.strangers || worker.group.is_none(), "{id} was let go while it trains");
                    self.workers.remove(id);
                    self.cut.remove(id);
                }
            }
        }
    }

    fn hello(&mut self, id: &WorkerId) {
        let Some(worker) = self.workers.get_mut(id) else { return };
        worker.outbox.clear();
        worker.caught_up = false;
        let status = match (&worker.group, &worker.job) {
            (Some(group), _) => WorkerStatus::Training(group.generation),
            (None, Some(job)) => WorkerStatus::Working(job.clone()),
            (None, None) => WorkerStatus::Idle,
        };
        worker.outbox.push_back(ToCoordinator::Hello(Hello {
            worker: id.clone(),
            version: VERSION.into(),
            address: format!("{id}"),
            device: "sim".into(),
            threads: 1,
            pid: 1,
            run: worker.secret.map(|_| RUN),
            secret: worker.secret,
            status,
        }));
    }

    /// Those whose session was ended connect anew.
    fn reconnect(&mut self) {
        for id in std::mem::take(&mut self.cut) {
            assert!(self.strangers, "{id} was cut off though it did nothing wrong");
            self.hello(&id);
        }
    }

    /// A stranger says something; one that was greeted has got no further.
    fn babble(&mut self, greeted: bool, this_run: bool, message: ToCoordinator) {
        let Some(core) = &self.core else { return };
        let name = if greeted { "stranger" } else { "nobody" };
        let id = WorkerId::new(name, Incarnation::new(1)).unwrap();
        if greeted {
            let hello = hello_of(&id, VERSION);
            if core.judge(&hello).is_ok() {
                self.event(Event::Said {
                    worker: id.clone(),
                    run: None,
                    message: ToCoordinator::Hello(hello),
                });
            }
        }
        let run = if this_run { RUN } else { RunId::from_bytes([9; 16]) };
        self.event(Event::Said { worker: id, run: Some(run), message });
    }

    /// A worker is asked to leave.
    fn drain(&mut self, index: usize) {
        let Some(id) = self.workers.keys().nth(index % self.workers.len().max(1)).cloned() else { return };
        let worker = self.workers.get_mut(&id).unwrap();
        if !std::mem::replace(&mut worker.draining, true) && worker.caught_up {
            worker.outbox.push_back(ToCoordinator::Draining);
        }
    }

    /// A stored milestone is found to be damaged.
    fn damage(&mut self, index: usize) {
        let milestones: Vec<CheckpointId> = self
            .saved
            .checkpoints
            .iter()
            .filter(|(_, kind)| **kind == CheckpointKind::Milestone)
            .map(|(id, _)| *id)
            .collect();
        let read = ["average", "evaluate-last", "continuations"];
        // Nothing reads them any more.
        if self.core.is_none() || read.iter().all(|job| self.saved.jobs.contains(*job)) {
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

    fn join(&mut self, name: u8) {
        let name = format!("w{name}");
        if self.workers.keys().any(|id| id.name() == name) {
            return;
        }
        self.incarnations += 1;
        let id = WorkerId::new(name, Incarnation::new(self.incarnations)).unwrap();
        let worker = Worker {
            step: None,
            group: None,
            generation: None,
            stage: Stage::Assigned,
            aborted: false,
            request: None,
            reports: Vec::new(),
            held: BTreeSet::new(),
            job: None,
            secret: None,
            draining: false,
            caught_up: false,
            outbox: VecDeque::new(),
        };
        self.workers.insert(id.clone(), worker);
        self.hello(&id);
    }

    fn kill(&mut self, index: usize) {
        let Some(id) = self.workers.keys().nth(index % self.workers.len().max(1)).cloned() else { return };
        self.workers.remove(&id);
        self.cut.remove(&id);
        self.event(Event::Disconnected(id));
    }

    /// The coordinator dies. Workers go on; what they say is heard by nobody.
    fn die(&mut self) {
        // Parts that were reported are stored, so an unfinished commit is finished at the next start.
        self.commit_all();
        self.core = None;
    }

    /// The coordinator dies, if it lives, and comes back; everybody has to say hello again.
    fn restart(&mut self) {
        self.die();
        self.core = Some(Coordinator::new(settings(), self.saved.clone(), self.now));
        for id in self.workers.keys().cloned().collect::<Vec<_>>() {
            self.hello(&id);
        }
    }

    fn commit_all(&mut self) {
        while let Some(checkpoint) = self.commits.pop_front() {
            match self.core {
                Some(_) => self.event(Event::CheckpointCommitted(checkpoint)),
                None => {
                    self.saved.checkpoints.insert(checkpoint, self.kinds[&checkpoint]);
                }
            }
        }
    }

    /// Every message that waits is heard, in an order that keeps that of each worker.
    fn deliver(&mut self) {
        while let Some(id) = self.workers.iter().find(|(_, w)| !w.outbox.is_empty()).map(|(id, _)| id.clone())
        {
            self.hear(&id);
        }
    }

    /// Some of the messages of a worker are heard, before anybody else's.
    fn deliver_some(&mut self, index: usize, count: usize) {
        let Some(id) = self.workers.keys().nth(index % self.workers.len().max(1)).cloned() else { return };
        for _ in 0..count {
            self.hear(&id);
        }
    }

    fn hear(&mut self, id: &WorkerId) {
        let Some(message) = self.workers.get_mut(id).and_then(|worker| worker.outbox.pop_front()) else {
            return;
        };
        let Some(core) = &self.core else { return };
        let run = match &message {
            ToCoordinator::Hello(hello) => {
                if let Err((_, reason)) = core.judge(hello) {
                    assert!(self.strangers, "{id} refused: {reason}");
                    self.workers.remove(id);
                    return;
                }
                self.cut.remove(id);
                hello.run
            }
            _ => Some(RUN),
        };
        self.event(Event::Said { worker: id.clone(), run, message });
    }

    fn tick(&mut self) {
        self.now += Duration::from_millis(500);
        for (id, generation) in self
            .workers
            .iter()
            .map(|(id, worker)| (id.clone(), worker.group.as_ref().map(|group| group.generation)))
            .collect::<Vec<_>>()
        {
            let heartbeat = Heartbeat {
                generation: generation.unwrap_or_default(),
                section: if generation.is_some() { Section::Computing } else { Section::Idle },
                busy: self.now,
                ..Heartbeat::default()
            };
            let message = ToCoordinator::Heartbeat(heartbeat);
            self.event(Event::Said { worker: id, run: Some(RUN), message });
        }
        self.event(Event::Ticked);
    }

    /// Groups form and do an update; aborted members leave; jobs are done.
    fn work(&mut self) {
        let mut groups: BTreeMap<Generation, Vec<WorkerId>> = BTreeMap::new();
        for (id, worker) in &self.workers {
            if let Some(group) = &worker.group {
                groups.entry(group.generation).or_default().push(id.clone());
            }
        }
        for (generation, mut members) in groups {
            members.sort_by_key(|id| self.workers[id].group.as_ref().unwrap().rank);
            let size = self.workers[&members[0]].group.as_ref().unwrap().size as usize;
            let broken = members.len() < size || members.iter().any(|id| self.workers[id].aborted);
            if broken {
                for id in &members {
                    let message = "a member is gone".into();
                    self.leave(id, generation, LeaveReason::Lost { suspect: None, message });
                }
            } else {
                self.advance(generation, &members);
            }
        }
        self.finish_jobs();
    }

    fn finish_jobs(&mut self) {
        for worker in self.workers.values_mut().filter(|worker| worker.caught_up) {
            if let Some(job) = worker.job.take() {
                worker.outbox.push_back(ToCoordinator::JobDone { job, result: "{}".into() });
            }
        }
    }

    fn leave(&mut self, id: &WorkerId, generation: Generation, reason: LeaveReason) {
        let worker = self.workers.get_mut(id).unwrap();
        worker.group = None;
        let step = Step::new(worker.step.unwrap_or(0));
        if worker.caught_up {
            worker.outbox.extend(worker.unconfirmed());
        }
        worker.outbox.push_back(ToCoordinator::Left { generation, step, reason });
    }

    fn advance(&mut self, generation: Generation, members: &[WorkerId]) {
        let repair = self.workers[&members[0]].repair();
        let usable = |step: &u64| repair.is_none_or(|(first, _)| *step < first);
        let stored =
            self.saved.checkpoints.keys().map(|id| id.step().get()).filter(usable).max().unwrap_or(0);
        let newest =
            members.iter().filter_map(|id| self.workers[id].step).filter(usable).max().unwrap_or(stored);
        let first = members[0].clone();
        if self.workers[&first].stage == Stage::Assigned {
            for id in members {
                let worker = self.workers.get_mut(id).unwrap();
                worker.stage = Stage::Connected;
                worker.outbox.push_back(ToCoordinator::Connected(generation));
            }
            return;
        }
        if self.workers[&first].stage == Stage::Connected {
            for id in members {
                let worker = self.workers.get_mut(id).unwrap();
                worker.step = Some(newest);
                worker.stage = Stage::Formed;
                let step = Step::new(newest);
                worker.outbox.push_back(ToCoordinator::Formed { generation, step });
            }
            return;
        }
        let newest = self.workers[&first].step.unwrap_or(newest);
        let request = members
            .iter()
            .filter_map(|id| self.workers[id].request)
            .max_by_key(|request| *request == GroupRequest::Stop);
        let last = repair.map_or(ITERATIONS, |(_, last)| last);
        let finished = newest >= last;
        let step = if finished { newest } else { newest + 1 };
        let on_grid = step % GRID == 0 || step == ITERATIONS;
        let asked_again = |step: u64| {
            let repair = self.workers[&first].group.as_ref().and_then(|group| group.repair.clone());
            repair.is_none_or(|repair| repair.milestones.contains(&Step::new(step)))
        };
        let due = !finished && on_grid && asked_again(step);
        let kind = if on_grid { CheckpointKind::Milestone } else { CheckpointKind::Recovery };
        let checkpoint = CheckpointId::new(Step::new(step), generation);
        for id in members {
            let worker = self.workers.get_mut(id).unwrap();
            if finished {
                continue;
            }
            worker.step = Some(step);
            worker.reports.push(report(step));
            if *id == first && worker.caught_up {
                worker.outbox.push_back(ToCoordinator::Steps { generation, reports: vec![report(step)] });
            }
            if due || matches!(request, Some(GroupRequest::Stop | GroupRequest::Save)) {
                self.kinds.insert(checkpoint, kind);
                worker.held.insert(checkpoint);
                worker.outbox.extend(worker.unconfirmed());
                worker.outbox.push_back(ToCoordinator::Snapshot(state(checkpoint)));
            }
            worker.request = None;
        }
        if finished || step == last {
            for id in members {
                self.leave(id, generation, LeaveReason::Finished);
            }
        } else if matches!(request, Some(GroupRequest::Stop | GroupRequest::Pause)) {
            for id in members {
                self.leave(id, generation, LeaveReason::Agreed);
            }
        }
    }

    fn turn(&mut self) {
        self.reconnect();
        self.deliver();
        self.work();
        self.deliver();
        self.commit_all();
        self.tick();
    }
}

fn state(checkpoint: CheckpointId) -> Snapshot {
    let step = checkpoint.step().get();
    let on_grid = step.is_multiple_of(GRID) || step == ITERATIONS;
    Snapshot {
        checkpoint,
        kind: if on_grid { CheckpointKind::Milestone } else { CheckpointKind::Recovery },
        state: Digest::of(&step.to_le_bytes()),
        files: FILES.map(str::to_owned).to_vec(),
    }
}

/// Anything that can be said, with numbers around those that are possible.
fn anything() -> impl Strategy<Value = ToCoordinator> {
    let number = || prop_oneof![0_u64..20, Just(u64::MAX), Just(1 << 63)];
    let step = move || number().prop_map(Step::new);
    let generation = move || prop_oneof![0_u64..6, Just(u64::MAX)].prop_map(Generation::new);
    let text = || {
        prop_oneof![Just(String::new()), Just("\u{1b}[2J".to_owned()), Just("web".to_owned()), "[a-c./]{0,9}"]
    };
    let real = || prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(2.5)];
    let checkpoint =
        move || (step(), generation()).prop_map(|(step, generation)| CheckpointId::new(step, generation));
    let reports = move || {
        prop::collection::vec((step(), number(), real()), 0..3).prop_map(|reports| {
            let of = |(step, tokens, loss)| StepReport { step, tokens, loss, ..report(1) };
            reports.into_iter().map(of).collect::<Vec<_>>()
        })
    };
    let snapshot = move || {
        (checkpoint(), any::<bool>(), prop::collection::vec(text(), 0..4)).prop_map(
            |(checkpoint, milestone, files)| {
                let kind = if milestone { CheckpointKind::Milestone } else { CheckpointKind::Recovery };
                let files = if files.len() == 3 { FILES.map(str::to_owned).to_vec() } else { files };
                Snapshot { checkpoint, kind, state: Digest::of(b"invented"), files }
            },
        )
    };
    let job = move || {
        prop_oneof![
            Just(Job::Prepare),
            Just(Job::Export),
            Just(Job::Benchmark),
            checkpoint().prop_map(|id| Job::Average(vec![id])),
        ]
    };
    let reason = move || {
        prop_oneof![
            Just(LeaveReason::Agreed),
            Just(LeaveReason::Finished),
            text().prop_map(LeaveReason::Exhausted),
            (text(), number(), text())
                .prop_map(|(source, unit, why)| LeaveReason::BadUnit(BadUnit { source, unit }, why)),
            (0_u32..9, text()).prop_map(|(rank, message)| LeaveReason::Lost {
                suspect: Some((Rank::new(rank), Blame::Unreachable)),
                message
            }),
            text().prop_map(|message| LeaveReason::Failed { kind: ErrorKind::Corrupt, message }),
        ]
    };
    let entry = FileEntry { bytes: u64::MAX, digest: Digest::of(b"invented") };
    prop_oneof![
        text().prop_map(|nonce| ToCoordinator::StoreRead(Ok(Digest::of(nonce.as_bytes())))),
        text().prop_map(|error| ToCoordinator::StoreRead(Err(error))),
        (prop::option::of(generation()), reports(), prop::collection::vec(snapshot(), 0..2)).prop_map(
            |(generation, reports, snapshots)| ToCoordinator::Ready(Ready {
                fingerprint: Digest::of(b"other arithmetic"),
                generation,
                reports,
                snapshots,
            })
        ),
        text().prop_map(|message| ToCoordinator::Unfit { kind: ErrorKind::Internal, message }),
        Just(ToCoordinator::Draining),
        (generation(), number()).prop_map(|(generation, collective)| {
            ToCoordinator::Heartbeat(Heartbeat { generation, collective, ..Heartbeat::default() })
        }),
        generation().prop_map(ToCoordinator::Connected),
        (generation(), step()).prop_map(|(generation, step)| ToCoordinator::Formed { generation, step }),
        (generation(), reports())
            .prop_map(|(generation, reports)| ToCoordinator::Steps { generation, reports }),
        (step(), text(), real()).prop_map(|(step, source, epochs)| {
            let reading = SourceReading { source, epochs, ..SourceReading::default() };
            ToCoordinator::Reading { step, sources: vec![reading] }
        }),
        (generation(), step(), reason()).prop_map(|(generation, step, reason)| ToCoordinator::Left {
            generation,
            step,
            reason
        }),
        snapshot().prop_map(ToCoordinator::Snapshot),
        (checkpoint(), text()).prop_map(move |(checkpoint, name)| {
            ToCoordinator::Written { checkpoint, files: [(name, entry)].into() }
        }),
        (checkpoint(), text()).prop_map(|(checkpoint, message)| {
            ToCoordinator::WriteFailed { checkpoint, kind: ErrorKind::Internal, message }
        }),
        text().prop_map(ToCoordinator::Notice),
        (job(), text()).prop_map(|(job, result)| ToCoordinator::JobDone { job, result }),
        (job(), text(), prop::option::of(checkpoint())).prop_map(|(job, message, damaged)| {
            ToCoordinator::JobFailed { job, kind: ErrorKind::Corrupt, message, bad_unit: None, damaged }
        }),
    ]
}

#[derive(Debug, Clone)]
enum Act {
    Join(u8),
    Kill(usize),
    Die,
    Restart,
    /// Workers work, and nobody hears of it yet.
    Work,
    Hear(usize, usize),
    /// A worker is asked to leave.
    Drain(usize),
    /// A milestone is damaged.
    Damage(usize),
    /// Somebody says something, who was let in or not, of this run or not.
    Babble(bool, bool, Box<ToCoordinator>),
    Turn,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        2 => (0_u8..5).prop_map(Act::Join),
        2 => (0_usize..5).prop_map(Act::Kill),
        1 => Just(Act::Die),
        2 => Just(Act::Restart),
        3 => Just(Act::Work),
        3 => (0_usize..5, 1_usize..4).prop_map(|(worker, messages)| Act::Hear(worker, messages)),
        1 => (0_usize..5).prop_map(Act::Drain),
        1 => (0_usize..5).prop_map(Act::Damage),
        6 => Just(Act::Turn),
    ];
    prop::collection::vec(act, 0..60)
}

/// As [`acts`], among strangers.
fn acts_among_strangers() -> impl Strategy<Value = Vec<Act>> {
    let babble = || {
        (any::<bool>(), any::<bool>(), anything())
            .prop_map(|(greeted, this_run, message)| Act::Babble(greeted, this_run, Box::new(message)))
    };
    (acts(), prop::collection::vec((0_usize..80, babble()), 1..40)).prop_map(|(mut acts, babbles)| {
        for (at, babble) in babbles {
            acts.insert(at.min(acts.len()), babble);
        }
        acts
    })
}

fn play(world: &mut World, acts: Vec<Act>) {
    for act in acts {
        match act {
            Act::Join(name) => world.join(name),
            Act::Kill(index) => world.kill(index),
            Act::Die => world.die(),
            Act::Restart => world.restart(),
            Act::Work => world.work(),
            Act::Hear(index, count) => world.deliver_some(index, count),
            Act::Drain(index) => world.drain(index),
            Act::Damage(index) => world.damage(index),
            Act::Babble(greeted, this_run, message) => world.babble(greeted, this_run, *message),
            Act::Turn => world.turn(),
        }
        if world.outcome.is_some() {
            return;
        }
    }
}

fn finish(world: &mut World, turns: usize) {
    if world.core.is_none() {
        world.restart();
    }
    for _ in 0..turns {
        if world.outcome.is_some() {
            return;
        }
        world.join(0);
        world.turn();
    }
    panic!("not finished after {turns} quiet turns");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever happens, the run finishes once it is left alone, with every step recorded and every milestone
    /// stored.
    #[test]
    fn every_run_finishes_with_nothing_lost(acts in acts()) {
        let mut world = World::new();
        play(&mut world, acts);
        finish(&mut world, 300);
        let outcome = world.outcome.clone().unwrap();
        prop_assert_eq!(outcome.status, ExitStatus::Done, "{}", outcome.message);
        let steps: Vec<u64> = world.recorded.keys().map(|step| step.get()).collect();
        prop_assert_eq!(steps, (1..=ITERATIONS).collect::<Vec<_>>());
        let milestones: BTreeSet<u64> = world
            .saved
            .checkpoints
            .iter()
            .filter(|(_, kind)| **kind == CheckpointKind::Milestone)
            .map(|(id, _)| id.step().get())
            .collect();
        // Damaged ones are made again if they are averaged.
        let averaged = ITERATIONS - (AVERAGE - 1) * GRID;
        let wanted = (GRID..=ITERATIONS)
            .step_by(GRID as usize)
            .filter(|step| *step >= averaged || !world.damaged.contains(step));
        prop_assert!(wanted.clone().all(|step| milestones.contains(&step)), "{milestones:?}");
    }

    /// What strangers say changes nothing: the run finishes with the same record.
    #[test]
    fn strangers_change_nothing(acts in acts_among_strangers()) {
        let mut world = World::new();
        play(&mut world, acts);
        finish(&mut world, 300);
        let outcome = world.outcome.clone().unwrap();
        prop_assert_eq!(outcome.status, ExitStatus::Done, "{}", outcome.message);
        let steps: Vec<u64> = world.recorded.keys().map(|step| step.get()).collect();
        prop_assert_eq!(steps, (1..=ITERATIONS).collect::<Vec<_>>());
        prop_assert_eq!(world.saved.fingerprint, Some(Digest::of(b"arithmetic")));
        prop_assert!(world.saved.checkpoints.keys().all(|id| id.step().get() <= ITERATIONS));
    }

    /// Whatever a worker that belongs to the run says, the coordinator is there afterwards, or ends with a reason.
    #[test]
    fn no_message_of_a_member_breaks_the_coordinator(
        acts in acts(),
        messages in prop::collection::vec((0_usize..5, anything()), 1..20),
    ) {
        let mut world = World::new();
        world.strangers = true;
        world.join(0);
        world.join(1);
        play(&mut world, acts);
        for (index, message) in messages {
            if world.outcome.is_some() || world.workers.is_empty() {
                return Ok(());
            }
            world.reconnect();
            let id = world.workers.keys().nth(index % world.workers.len()).cloned().unwrap();
            // What it says of the fate of a job or a group it is believed.
            world.event(Event::Said { worker: id, run: Some(RUN), message });
            world.deliver_some(index, 2);
        }
    }

    /// A stop that is asked for at any time ends the run, and the next start goes on and finishes.
    #[test]
    fn a_stopped_run_goes_on(before in acts()) {
        let mut world = World::new();
        play(&mut world, before);
        if world.outcome.is_none() {
            if world.core.is_none() {
                world.restart();
            }
            world.event(Event::StopRequested);
            finish(&mut world, 300);
            let status = world.outcome.take().unwrap().status;
            prop_assert!(matches!(status, ExitStatus::Interrupted | ExitStatus::Done));
            if status == ExitStatus::Interrupted {
                // Everybody was told to finish.
                world.workers.clear();
                world.restart();
                finish(&mut world, 300);
                prop_assert_eq!(world.outcome.unwrap().status, ExitStatus::Done);
            }
        }
    }
}

#[test]
fn survivors_go_on_without_the_dead() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    while world.recorded.len() < 4 {
        world.turn();
    }
    let generation = world.saved.generation;
    world.kill(1);
    while world.recorded.len() < 6 {
        world.turn();
    }
    assert_eq!(world.saved.generation, generation.next());
    assert_eq!(world.saved.group.len(), 1);
}

#[test]
fn a_coordinator_that_returns_does_not_disturb_a_healthy_group() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    while world.recorded.len() < 4 {
        world.turn();
    }
    let generation = world.saved.generation;
    world.restart();
    while world.recorded.len() < 7 {
        world.turn();
    }
    assert_eq!(world.saved.generation, generation);
}

/// Members that do not reach each other in time get another chance; those that do may take long to agree on a state, as
/// one that has to be read and sent may be large.
#[test]
fn a_group_is_late_until_it_is_connected_and_not_after() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    let wait = |world: &mut World| {
        world.deliver();
        (0..80).for_each(|_| world.tick());
        world.deliver();
    };
    for _ in 0..100 {
        world.deliver();
        world.commit_all();
        if world.saved.generation > Generation::default() {
            break;
        }
        world.tick();
        world.finish_jobs();
    }
    let first = world.saved.generation;
    wait(&mut world);
    assert!(world.workers.values().all(|worker| worker.aborted), "nobody connects");
    for _ in 0..100 {
        if world.saved.generation > first
            && world.workers.values().all(|worker| worker.stage == Stage::Connected)
        {
            break;
        }
        world.work();
        world.deliver();
        world.tick();
    }
    wait(&mut world);
    let waits = |worker: &Worker| worker.stage == Stage::Connected && !worker.aborted;
    assert!(world.workers.values().all(waits));
    (0..5).for_each(|_| world.turn());
    assert!(world.recorded.len() > 1);
    assert_eq!(world.saved.generation, first.next());
}

#[test]
fn workers_that_must_not_join_are_told_why() {
    let worker = WorkerId::new("w", Incarnation::new(1)).unwrap();
    let refused = |effects: &[Effect]| {
        effects.iter().find_map(|effect| match effect {
            Effect::Send(_, ToWorker::Refused { reason, .. }) => Some(reason.clone()),
            _ => None,
        })
    };
    let start = |saved: PersistentState| Coordinator::new(settings(), saved, Duration::ZERO);
    let say = |core: &mut Coordinator, message| {
        core.on(Duration::ZERO, Event::Said { worker: worker.clone(), run: Some(RUN), message })
    };
    let hello = || ToCoordinator::Hello(hello_of(&worker, VERSION));

    let (_, reason) = start(PersistentState::default()).judge(&hello_of(&worker, "0.9")).unwrap_err();
    assert!(reason.contains("version 0.9"), "{reason}");

    let mut core = start(PersistentState::default());
    say(&mut core, hello());
    let reason = refused(&say(&mut core, ToCoordinator::StoreRead(Err("no such folder".into())))).unwrap();
    assert!(reason.contains("no such folder") && reason.contains("store.url"), "{reason}");

    let mut core =
        start(PersistentState { fingerprint: Some(Digest::of(b"the run's")), ..PersistentState::default() });
    say(&mut core, hello());
    say(&mut core, ToCoordinator::StoreRead(Ok(Digest::of(b"secret"))));
    let ready = Ready {
        fingerprint: Digest::of(b"another"),
        generation: None,
        reports: Vec::new(),
        snapshots: Vec::new(),
    };
    let reason = refused(&say(&mut core, ToCoordinator::Ready(ready))).unwrap();
    assert!(reason.contains("computes other bits"), "{reason}");
}

#[test]
fn nobody_takes_the_place_of_a_worker_without_its_secret() {
    let worker = WorkerId::new("w", Incarnation::new(1)).unwrap();
    let mut core = Coordinator::new(settings(), PersistentState::default(), Duration::ZERO);
    let hello = hello_of(&worker, VERSION);
    let effects = core.on(
        Duration::ZERO,
        Event::Said { worker: worker.clone(), run: None, message: ToCoordinator::Hello(hello.clone()) },
    );
    let secret = effects
        .iter()
        .find_map(|effect| match effect {
            Effect::Send(_, ToWorker::Welcome { secret, .. }) => Some(*secret),
            _ => None,
        })
        .unwrap();
    // Name and incarnation are in every log.
    assert_eq!(core.judge(&hello).unwrap_err().0, ErrorKind::Refused);
    let guess = Some(SessionSecret::from_bytes([0; 32]));
    assert!(core.judge(&Hello { run: Some(RUN), secret: guess, ..hello.clone() }).is_err());
    assert!(core.judge(&Hello { run: Some(RUN), secret: Some(secret), ..hello.clone() }).is_ok());
    // Nor does a new name help to claim work.
    let other = WorkerId::new("x", Incarnation::new(2)).unwrap();
    let claims = WorkerStatus::Working(Job::Export);
    assert!(core.judge(&Hello { status: claims, ..hello_of(&other, VERSION) }).is_err());
}

/// D9 of `docs/faults.md`: what is made after training waits for a disk as training does.
#[test]
fn a_job_waits_for_a_disk_that_takes_nothing() {
    let mut world = World::new();
    world.join(0);
    let averages = |world: &World| {
        let mut workers = world.workers.iter();
        workers.find_map(|(id, worker)| match &worker.job {
            Some(job @ Job::Average(_)) => Some((id.clone(), job.clone())),
            _ => None,
        })
    };
    while averages(&world).is_none() {
        world.turn();
    }
    let began = world.now;
    while world.outcome.is_none() {
        if let Some((worker, job)) = averages(&world) {
            world.workers.get_mut(&worker).unwrap().job = None;
            let message = ToCoordinator::JobFailed {
                job,
                kind: ErrorKind::Disk,
                message: "no space is left".into(),
                bad_unit: None,
                damaged: None,
            };
            world.event(Event::Said { worker, run: Some(RUN), message });
        }
        world.tick();
    }
    assert!(world.now >= began + settings().max_age);
    assert_eq!(world.outcome.unwrap().status, ExitStatus::Failed);
}

/// D5 of `docs/faults.md`.
#[test]
fn a_local_worker_that_keeps_dying_ends_no_run_that_others_carry() {
    let hopeless = || Event::LocalWorkersFailed("worker local-0 ended 5 times right after its start".into());
    let mut world = World::new();
    world.join(0);
    while world.recorded.len() < 2 {
        world.turn();
    }
    world.event(hopeless());
    assert_eq!(world.outcome, None, "a remote worker trains");
    world.kill(0);
    let killed = world.now;
    while world.outcome.is_none() {
        world.turn();
        world.event(hopeless());
    }
    assert_eq!(world.outcome.unwrap().status, ExitStatus::Failed);
    assert!(
        world.now + Duration::from_secs(1) > killed + settings().rejoin_window,
        "its connection may have been all that it lost"
    );
}

/// D7 of `docs/faults.md`: what reads the last milestone after it was averaged.
#[test]
fn a_milestone_that_is_damaged_after_it_was_averaged_is_trained_again() {
    let mut world = World::new();
    world.join(0);
    while !world.saved.jobs.contains("average") {
        world.turn();
    }
    let last = *world.saved.checkpoints.keys().last().unwrap();
    world.event(Event::CheckpointDamaged(last, "a bit was flipped".into()));
    assert!(!world.saved.checkpoints.contains_key(&last));
    finish(&mut world, 200);
    assert_eq!(world.outcome.unwrap().status, ExitStatus::Done);
    assert!(world.saved.checkpoints.keys().any(|id| id.step() == last.step()));
}

/// What the coordinator wrote last was lost with the power of its machine; a worker elsewhere knows better.
#[test]
fn whoever_knows_more_than_the_record_is_heard() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    while world.recorded.len() < 5 {
        world.turn();
    }
    world.die();
    world.kill(0);
    world.work();
    world.saved.step = Step::new(2);
    let generation = world.saved.generation;
    world.restart();
    finish(&mut world, 200);
    assert_eq!(world.outcome.unwrap().status, ExitStatus::Done);
    assert!(world.saved.generation.get() <= generation.get() + 2, "{}", world.saved.generation);
}

/// A worker that was asked for its part by the coordinator before says that it is stored.
#[test]
fn an_answer_to_an_earlier_coordinator_is_no_offence() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    let held =
        |world: &World| world.workers.values().flat_map(|worker| worker.held.iter().copied()).next_back();
    while held(&world).is_none() {
        world.work();
        world.deliver();
        world.tick();
    }
    let checkpoint = held(&world).unwrap();
    world.restart();
    // The first is asked for everything.
    world.deliver_some(0, 3);
    world.deliver_some(1, 3);
    let second = world.workers.keys().nth(1).unwrap().clone();
    let entry = FileEntry { bytes: 1, digest: Digest::of(b"part") };
    let message = ToCoordinator::Written { checkpoint, files: BTreeMap::from([("a".to_owned(), entry)]) };
    world.event(Event::Said { worker: second, run: Some(RUN), message });
    assert!(world.cut.is_empty(), "{:?}", world.cut);
    finish(&mut world, 200);
}

/// D12 of `docs/faults.md`.
#[test]
fn a_coordinator_that_slept_loses_nobody() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    while world.recorded.len() < 4 {
        world.turn();
    }
    let generation = world.saved.generation;
    // The tick is served before the heartbeats that wait.
    world.now += Duration::from_mins(10);
    world.event(Event::Ticked);
    world.now += Duration::from_millis(100);
    world.event(Event::Ticked);
    assert!(world.workers.values().all(|worker| !worker.aborted), "nobody was silent");
    while world.recorded.len() < 6 {
        world.turn();
    }
    assert_eq!(world.saved.generation, generation);
}

/// D15 of `docs/faults.md`.
#[test]
fn nobody_waits_for_the_dead() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    while world.recorded.len() < 4 {
        world.turn();
    }
    // Everything is killed; new lives of both workers are there before the window is over.
    world.die();
    world.workers.clear();
    world.restart();
    let restarted = world.now;
    world.join(0);
    world.join(1);
    let generation = world.saved.generation;
    while world.saved.generation == generation {
        world.turn();
        assert!(world.now < restarted + Duration::from_secs(5), "the window is 10 s");
    }
}

/// D16 of `docs/faults.md`.
#[test]
fn a_job_that_failed_on_one_worker_is_tried_on_another() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    world.deliver();
    let prepares = |world: &World| {
        world.workers.iter().find(|(_, worker)| worker.job.is_some()).map(|(id, _)| id.clone())
    };
    let first = prepares(&world).unwrap();
    let failed = ToCoordinator::JobFailed {
        job: Job::Prepare,
        kind: ErrorKind::InvalidInput,
        message: "no such folder".into(),
        bad_unit: None,
        damaged: None,
    };
    let say = |world: &mut World, worker: &WorkerId| {
        world.workers.get_mut(worker).unwrap().job = None;
        world.event(Event::Said { worker: worker.clone(), run: Some(RUN), message: failed.clone() });
    };
    say(&mut world, &first);
    let second = prepares(&world).unwrap();
    assert_ne!(first, second);
    assert_eq!(world.outcome, None);
    // What fails on all of them is wrong everywhere.
    say(&mut world, &second);
    assert_eq!(world.outcome.unwrap().status, ExitStatus::InvalidInput);
}

#[test]
fn groups_that_make_no_progress_end_the_run() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    for _ in 0..200 {
        world.deliver();
        world.finish_jobs();
        world.commit_all();
        world.tick();
        for id in world.workers.keys().cloned().collect::<Vec<_>>() {
            if let Some(group) = world.workers[&id].group.clone() {
                let message = "no reason".into();
                world.leave(&id, group.generation, LeaveReason::Lost { suspect: None, message });
            }
        }
        if let Some(outcome) = world.outcome {
            assert_eq!(outcome.status, ExitStatus::Failed);
            assert!(outcome.message.contains("10 groups in a row made no progress"), "{}", outcome.message);
            return;
        }
    }
    panic!("the run goes on for ever");
}

#[test]
fn a_stop_that_nobody_hears_ends_in_time() {
    let mut world = World::new();
    world.join(0);
    while world.recorded.len() < 2 {
        world.turn();
    }
    world.event(Event::StopRequested);
    for _ in 0..300 {
        world.tick();
        if let Some(outcome) = world.outcome {
            assert_eq!(outcome.status, ExitStatus::Failed);
            assert!(outcome.message.contains("stopped without saving"), "{}", outcome.message);
            return;
        }
    }
    panic!("the stop takes for ever");
}

#[test]
fn a_trainer_that_stands_still_is_left_behind() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    while world.recorded.len() < 4 {
        world.turn();
    }
    let generation = world.saved.generation;
    let frozen = world.workers.keys().next_back().unwrap().clone();
    let begun = world.now;
    // Its agent beats on; the other one waits for it in the next operation.
    while !world.workers.values().any(|worker| worker.aborted) {
        world.now += Duration::from_millis(500);
        for id in world.workers.keys().cloned().collect::<Vec<_>>() {
            let waits = id != frozen;
            let heartbeat = Heartbeat {
                generation,
                collective: if waits { 10 } else { 9 },
                section: if waits { Section::Collective } else { Section::Computing },
                since: world.now.saturating_sub(begun),
                busy: world.now,
            };
            let message = ToCoordinator::Heartbeat(heartbeat);
            world.event(Event::Said { worker: id, run: Some(RUN), message });
        }
        world.event(Event::Ticked);
        assert!(world.now < begun + Duration::from_secs(10), "it is not noticed");
    }
    assert!(world.cut.contains(&frozen), "the one that stands still is the culprit");
    assert_eq!(world.cut.len(), 1);
}
