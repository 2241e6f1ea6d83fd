//! The coordinator against simulated workers: random joins, deaths, restarts of the coordinator, stops and lost
//! parts of checkpoints, from seeds that proptest shrinks. Debug builds check the invariants after every event.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;
use ulmus_coord_core::{Coordinator, Effect, Event, Outcome, Saved, Settings};
use ulmus_types::{
    Assignment, CheckpointId, CheckpointKind, Digest, ExitStatus, FileEntry, Generation, Hello, Incarnation,
    Job, LeaveReason, Snapshot, Step, StepReport, ToCoordinator, ToWorker, Wish, WorkerId, WorkerStatus,
};

const ITERATIONS: u64 = 12;
const GRID: u64 = 3;
const VERSION: &str = "1.0.0";

fn settings() -> Settings {
    Settings {
        run: "sim".parse().unwrap(),
        plan: String::new(),
        store: "store".into(),
        nonce_path: "nonce".into(),
        nonce: "secret".into(),
        version: VERSION.into(),
        expected_workers: 2,
        min_workers: 1,
        micro_batches: 4,
        iterations: ITERATIONS,
        average: 2,
        export: true,
        dead_after: Duration::from_secs(3),
        rejoin_window: Duration::from_secs(10),
        recovery: Duration::from_mins(1),
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
    wish: Option<Wish>,
    reports: Vec<StepReport>,
    held: BTreeSet<CheckpointId>,
    job: Option<Job>,
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
}

struct World {
    core: Option<Coordinator>,
    saved: Saved,
    workers: BTreeMap<WorkerId, Worker>,
    commits: VecDeque<CheckpointId>,
    now: Duration,
    incarnations: u64,
    kinds: BTreeMap<CheckpointId, CheckpointKind>,
    outcome: Option<Outcome>,
    recorded: BTreeMap<Step, f64>,
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
        let core = Coordinator::new(settings(), Saved::default(), Duration::ZERO);
        Self {
            core: Some(core),
            saved: Saved::default(),
            workers: BTreeMap::new(),
            commits: VecDeque::new(),
            now: Duration::ZERO,
            incarnations: 0,
            kinds: BTreeMap::new(),
            outcome: None,
            recorded: BTreeMap::new(),
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
                    assert!(earlier.is_none_or(|loss| loss == report.loss));
                    self.saved.step = self.saved.step.max(report.step);
                }
            }
            Effect::SaveQuarantine(quarantine) => self.saved.quarantine = quarantine,
            Effect::SaveTrained(step) => self.saved.trained = Some(step),
            Effect::SaveJob(job, _) => {
                self.saved.jobs.insert(job.name().to_owned());
            }
            Effect::Send(worker, message) => self.receive(&worker, message),
            Effect::Disconnect(_) | Effect::Tell(_) | Effect::SaveReading(..) => {}
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
            ToWorker::Welcome { .. } => {
                worker.caught_up = true;
                worker.outbox.push_back(ToCoordinator::StoreRead(Ok("secret".into())));
                worker.outbox.extend(worker.unconfirmed());
                for checkpoint in worker.held.clone() {
                    worker.outbox.push_back(snapshot(checkpoint));
                }
                worker.outbox.push_back(ToCoordinator::Ready(Digest::of(b"arithmetic")));
            }
            ToWorker::Refused { reason, .. } => panic!("{id} refused: {reason}"),
            ToWorker::Assign(assignment) => {
                assert!(worker.group.is_none(), "{id} is in a group already");
                assert!(worker.job.is_none(), "{id} is busy");
                worker.generation = Some(assignment.generation);
                worker.group = Some(assignment);
                worker.stage = Stage::Assigned;
                worker.aborted = false;
                worker.wish = None;
            }
            ToWorker::Abort(generation) => {
                worker.aborted |= worker.group.as_ref().is_some_and(|group| group.generation <= generation);
            }
            ToWorker::Wish(generation, wish) => {
                if worker.group.as_ref().is_some_and(|group| group.generation == generation) {
                    worker.wish = Some(wish);
                }
            }
            ToWorker::Acknowledge(step) => worker.reports.retain(|report| report.step > step),
            ToWorker::Write { checkpoint, files } => {
                assert!(worker.held.contains(&checkpoint), "{id} does not hold {checkpoint}");
                let entry = FileEntry { bytes: 1, digest: Digest::of(b"part") };
                let files = files.into_iter().map(|file| (file, entry)).collect();
                worker.outbox.push_back(ToCoordinator::Written { checkpoint, files });
            }
            ToWorker::Release(checkpoint) => {
                worker.held.remove(&checkpoint);
            }
            ToWorker::Run(job) => worker.job = Some(job),
            ToWorker::Finish => {}
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
            status,
        }));
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
            wish: None,
            reports: Vec::new(),
            held: BTreeSet::new(),
            job: None,
            caught_up: false,
            outbox: VecDeque::new(),
        };
        self.workers.insert(id.clone(), worker);
        self.hello(&id);
    }

    fn kill(&mut self, index: usize) {
        let Some(id) = self.workers.keys().nth(index % self.workers.len().max(1)).cloned() else { return };
        self.workers.remove(&id);
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
            self.saved.checkpoints.insert(checkpoint, self.kinds[&checkpoint]);
            self.event(Event::CheckpointCommitted(checkpoint));
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
        if let Some(message) = self.workers.get_mut(id).and_then(|worker| worker.outbox.pop_front()) {
            self.event(Event::Said(id.clone(), message));
        }
    }

    fn tick(&mut self) {
        self.now += Duration::from_millis(500);
        for id in self.workers.keys().cloned().collect::<Vec<_>>() {
            self.event(Event::Said(id, ToCoordinator::Beat { collective: 0 }));
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
                    self.leave(id, generation, LeaveReason::Lost("a member is gone".into()));
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
        let stored = self.saved.checkpoints.keys().map(|id| id.step().get()).max().unwrap_or(0);
        let newest = members.iter().filter_map(|id| self.workers[id].step).max().unwrap_or(stored);
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
        let wish =
            members.iter().filter_map(|id| self.workers[id].wish).max_by_key(|wish| *wish == Wish::Stop);
        let finished = newest >= ITERATIONS;
        let step = if finished { newest } else { newest + 1 };
        let due = !finished && (step % GRID == 0 || step == ITERATIONS);
        let kind = if due { CheckpointKind::Milestone } else { CheckpointKind::Recovery };
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
            if due || matches!(wish, Some(Wish::Stop | Wish::Save)) {
                self.kinds.insert(checkpoint, kind);
                worker.held.insert(checkpoint);
                worker.outbox.extend(worker.unconfirmed());
                let ToCoordinator::Snapshot(mut said) = snapshot(checkpoint) else { unreachable!() };
                said.kind = kind;
                worker.outbox.push_back(ToCoordinator::Snapshot(said));
            }
            worker.wish = None;
        }
        if finished || step == ITERATIONS {
            for id in members {
                self.leave(id, generation, LeaveReason::Finished);
            }
        } else if matches!(wish, Some(Wish::Stop | Wish::Pause)) {
            for id in members {
                self.leave(id, generation, LeaveReason::Agreed);
            }
        }
    }

    fn turn(&mut self) {
        self.deliver();
        self.work();
        self.deliver();
        self.commit_all();
        self.tick();
    }
}

fn snapshot(checkpoint: CheckpointId) -> ToCoordinator {
    let kind = if checkpoint.step().get().is_multiple_of(GRID) {
        CheckpointKind::Milestone
    } else {
        CheckpointKind::Recovery
    };
    ToCoordinator::Snapshot(Snapshot {
        checkpoint,
        kind,
        state: Digest::of(&checkpoint.step().get().to_le_bytes()),
        files: vec!["a".into(), "b".into(), "c".into()],
    })
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
        6 => Just(Act::Turn),
    ];
    prop::collection::vec(act, 0..60)
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
        prop_assert_eq!(milestones, (GRID..=ITERATIONS).step_by(GRID as usize).collect());
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
    let hello = |version: &str| Hello {
        worker: WorkerId::new("w", Incarnation::new(1)).unwrap(),
        version: version.into(),
        address: String::new(),
        device: String::new(),
        threads: 1,
        pid: 1,
        status: WorkerStatus::Idle,
    };
    let refused = |effects: &[Effect]| {
        effects.iter().find_map(|effect| match effect {
            Effect::Send(_, ToWorker::Refused { reason, .. }) => Some(reason.clone()),
            _ => None,
        })
    };
    let start = |saved: Saved| Coordinator::new(settings(), saved, Duration::ZERO);
    let say = |core: &mut Coordinator, message| {
        core.on(Duration::ZERO, Event::Said(WorkerId::new("w", Incarnation::new(1)).unwrap(), message))
    };

    let mut core = start(Saved::default());
    let reason = refused(&say(&mut core, ToCoordinator::Hello(hello("0.9")))).unwrap();
    assert!(reason.contains("version 0.9"), "{reason}");

    let mut core = start(Saved::default());
    say(&mut core, ToCoordinator::Hello(hello(VERSION)));
    let reason = refused(&say(&mut core, ToCoordinator::StoreRead(Err("no such folder".into())))).unwrap();
    assert!(reason.contains("no such folder") && reason.contains("store.url"), "{reason}");

    let mut core = start(Saved { fingerprint: Some(Digest::of(b"the run's")), ..Saved::default() });
    say(&mut core, ToCoordinator::Hello(hello(VERSION)));
    say(&mut core, ToCoordinator::StoreRead(Ok("secret".into())));
    let reason = refused(&say(&mut core, ToCoordinator::Ready(Digest::of(b"another")))).unwrap();
    assert!(reason.contains("computes other bits"), "{reason}");
}
