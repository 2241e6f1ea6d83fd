//! The coordinator's core against real worker sessions with simulated trainers. Proptest generates, and shrinks, random
//! joins, deaths, coordinator restarts, stops, damaged milestones, workers that are asked to leave, and strangers that
//! send arbitrary messages. Debug builds check the invariants after every event. The record and the stored checkpoints
//! must be those of an undisturbed run.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod strangers;
mod worker;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use strangers::anything;
use ulmus_coord_core::{
    Coordinator, Effect, Event, Notification, PersistentState, Settings, TrainingSettings,
};
use ulmus_types::{
    CheckpointKind, Digest, ErrorKind, ExitStatus, Generation, Graph, Heartbeat, Hello, Incarnation, Job,
    JobName, LeaveReason, Of, Reads, Ready, Requirements, Rewards, RunId, RunSecret, Section, SessionSecret,
    Stage, StageKind, StageName, Step, Subject, ToCoordinator, ToWorker, Tuning, WorkerId, WorkerStatus,
};
use worker::{Progress, State, Worker};
use world::World;

const ITERATIONS: u64 = 12;
const GRID: u64 = 3;
const VERSION: &str = "1.0.0";
const AVERAGE: u64 = 2;
const RUN: RunId = RunId::from_bytes([7; 16]);
const FILES: [&str; 3] = ["a", "b", "c"];

fn graph() -> Graph {
    Graph::new(AVERAGE, true, false, &[], Vec::new())
}

/// A run that tunes the average, and then what has come of that.
fn chain() -> Graph {
    let tuning =
        |name: &str, of, compares, rewards| Tuning { name: name.parse().unwrap(), of, compares, rewards };
    let tunings = [
        tuning("sft", Of::Average, false, None),
        tuning("dpo", Of::Tuned("sft".parse().unwrap()), true, Some(Rewards::Head)),
    ];
    Graph::new(
        AVERAGE,
        true,
        false,
        &tunings,
        vec![tasks(&[Of::Average, Of::Tuned("dpo".parse().unwrap())], None, None)],
    )
}

/// The model that a stage of [`chain`] begins from.
fn origin(training: StageName) -> Option<Subject> {
    match training.as_str() {
        "sft" => Some(Subject::Average),
        "dpo" => Some(Subject::Tuned("sft".parse().unwrap())),
        _ => None,
    }
}

/// The number of updates of a stage.
fn updates(training: StageName) -> u64 {
    if training == StageName::pretraining() { ITERATIONS } else { 4 }
}

fn training(name: StageName) -> TrainingSettings {
    let pretrains = name == StageName::pretraining();
    TrainingSettings {
        name,
        // What follows from examples is known when they are made.
        updates: pretrains.then_some(ITERATIONS),
        micro_batches: if pretrains { 4 } else { 2 },
        tokens_per_step: 100,
        milestone_every: if pretrains { GRID } else { 0 },
        needed_milestones: if pretrains { AVERAGE } else { 1 },
        checkpoint_files: FILES.map(str::to_owned).to_vec(),
        may_exhaust: false,
        measures: BTreeSet::new(),
    }
}

/// The job of a stage that reads no checkpoint.
fn job(stage: &str) -> Job {
    Job::new(stage.parse().unwrap(), Subject::Stage(Vec::new()))
}

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
        graph: graph(),
        trainings: vec![training(StageName::pretraining())],
        sources: ["web".to_owned()].into(),
        from_start: false,
        dead_after: Duration::from_secs(3),
        rejoin_window: Duration::from_secs(10),
        recovery: Duration::from_mins(1),
        max_age: Duration::from_mins(3),
        bad_units: 1,
    }
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
        host: "host".into(),
        memory: 1 << 30,
        only_jobs: false,
    }
}

#[derive(Debug, Clone)]
enum Act {
    Join(u8),
    /// A worker joins that only serves jobs.
    Serve(u8),
    Kill(usize),
    Die,
    Restart,
    /// Workers work, and their messages wait.
    Work,
    Deliver(usize, usize),
    /// A worker is asked to leave.
    Drain(usize),
    /// A milestone is damaged.
    Damage(usize),
    /// Somebody sends a message: admitted or not, about this run or not.
    Babble(bool, bool, Box<ToCoordinator>),
    Turn,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        2 => (0_u8..5).prop_map(Act::Join),
        1 => (0_u8..3).prop_map(Act::Serve),
        2 => (0_usize..5).prop_map(Act::Kill),
        1 => Just(Act::Die),
        2 => Just(Act::Restart),
        3 => Just(Act::Work),
        3 => (0_usize..5, 1_usize..4).prop_map(|(worker, messages)| Act::Deliver(worker, messages)),
        1 => (0_usize..5).prop_map(Act::Drain),
        1 => (0_usize..5).prop_map(Act::Damage),
        6 => Just(Act::Turn),
    ];
    prop::collection::vec(act, 0..60)
}

/// Like [`acts`], with messages from strangers in between.
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
            Act::Serve(name) => world.join_for_jobs(&format!("s{name}"), "sim"),
            Act::Kill(index) => world.kill(index),
            Act::Die => world.die(),
            Act::Restart => world.restart(),
            Act::Work => world.work(),
            Act::Deliver(index, count) => world.deliver_some(index, count),
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

    /// Whatever happens to a run of several training stages, each trains once what it should, from the model that it should.
    #[test]
    fn every_chain_finishes_with_nothing_lost(acts in acts(), later in acts()) {
        let mut world = World::of(chain());
        play(&mut world, acts);
        // Pretraining seldom ends within so few acts.
        for _ in 0..30 {
            if world.outcome.is_none() && world.tuned.is_empty() {
                world.join(0);
                world.join(1);
                if world.core.is_none() {
                    world.restart();
                }
                world.turn();
            }
        }
        if world.outcome.is_none() {
            play(&mut world, later);
        }
        finish(&mut world, 400);
        let outcome = world.outcome.clone().unwrap();
        prop_assert_eq!(outcome.status, ExitStatus::Done, "{}", outcome.message);
        let steps: Vec<u64> = world.recorded.keys().map(|step| step.get()).collect();
        prop_assert_eq!(steps, (1..=ITERATIONS).collect::<Vec<_>>());
        for name in ["sft", "dpo"].map(|name| name.parse::<StageName>().unwrap()) {
            let steps: Vec<u64> = world
                .tuned
                .keys()
                .filter(|(training, _)| *training == name)
                .map(|(_, step)| step.get())
                .collect();
            prop_assert_eq!(steps, (1..=updates(name)).collect::<Vec<_>>());
            let record = &world.saved.trainings[&name];
            let last = record.checkpoints.iter().find(|(id, _)| id.step().get() == updates(name));
            prop_assert_eq!(last.map(|(_, kind)| *kind), Some(CheckpointKind::Milestone));
            prop_assert_eq!(record.trained, Some(Step::new(updates(name))));
        }
        let jobs: Vec<&str> = world.saved.jobs.iter().map(JobName::as_str).collect();
        for job in ["sft-export", "dpo-reference/sft", "dpo-export", "tasks/average", "tasks/dpo"] {
            prop_assert!(jobs.contains(&job), "{job} is not among {jobs:?}");
        }
    }

    /// Whatever happens, the run finishes once it is left alone, with every step recorded and every milestone stored.
    #[test]
    fn every_run_finishes_with_nothing_lost(acts in acts()) {
        let of = [Of::Milestones, Of::Average, Of::Last, Of::Model("a/b".to_owned())];
        let mut world = World::with_stages(vec![tasks(&of, None, None)]);
        play(&mut world, acts);
        finish(&mut world, 300);
        let outcome = world.outcome.clone().unwrap();
        prop_assert_eq!(outcome.status, ExitStatus::Done, "{}", outcome.message);
        let steps: Vec<u64> = world.recorded.keys().map(|step| step.get()).collect();
        prop_assert_eq!(steps, (1..=ITERATIONS).collect::<Vec<_>>());
        let milestones: BTreeSet<u64> = world
            .pretraining()
            .checkpoints
            .iter()
            .filter(|(_, kind)| **kind == CheckpointKind::Milestone)
            .map(|(id, _)| id.step().get())
            .collect();
        // Damaged milestones are recreated if the average needs them.
        let averaged = ITERATIONS - (AVERAGE - 1) * GRID;
        let wanted = (GRID..=ITERATIONS)
            .step_by(GRID as usize)
            .filter(|step| *step >= averaged || !world.damaged.contains(step));
        prop_assert!(wanted.clone().all(|step| milestones.contains(&step)), "{milestones:?}");
        let measured = |model: &str| world.saved.jobs.iter().any(|job| job.stage() == "tasks" && job.model() == Some(model));
        prop_assert!(milestones.iter().all(|step| measured(&format!("step-{step:08}"))), "{:?}", world.saved.jobs);
        prop_assert!(measured("average") && measured("last"));
        prop_assert!(world.workers.values().all(Worker::is_free), "{:?}", world.workers);
    }

    /// Messages from strangers change nothing: the run finishes with the same record.
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
        prop_assert!(world.pretraining().checkpoints.keys().all(|id| id.step().get() <= ITERATIONS));
    }

    /// Whatever a member of the run sends, the coordinator survives, or exits with a reason.
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
            // Its claims about its own job or group are believed, so the run may end.
            world.event(Event::Received { worker: id, run: Some(RUN), message });
            world.deliver_some(index, 2);
        }
    }

    /// A stop at any time ends the run, and the next start resumes and finishes it.
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
                // All workers were told to finish.
                world.workers.clear();
                world.restart();
                finish(&mut world, 300);
                prop_assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Done);
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

/// Members that do not connect in time are assigned again. Members that do connect may take long to agree on a state,
/// since it may be large and has to be read and sent.
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
    assert!(world.workers.values().all(Worker::is_aborted), "nobody connects");
    for _ in 0..100 {
        if world.saved.generation > first
            && world.workers.values().all(|worker| worker.stage() == Some(Progress::Connected))
        {
            break;
        }
        world.work();
        world.deliver();
        world.tick();
    }
    wait(&mut world);
    let waits = |worker: &Worker| worker.stage() == Some(Progress::Connected) && !worker.is_aborted();
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
        core.on(Duration::ZERO, Event::Received { worker: worker.clone(), run: Some(RUN), message })
    };
    let hello = || ToCoordinator::Hello(hello_of(&worker, VERSION));

    let (_, reason) = start(PersistentState::default()).check_hello(&hello_of(&worker, "0.9")).unwrap_err();
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
        fingerprint: Some(Digest::of(b"another")),
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
        Event::Received { worker: worker.clone(), run: None, message: ToCoordinator::Hello(hello.clone()) },
    );
    let secret = effects
        .iter()
        .find_map(|effect| match effect {
            Effect::Send(_, ToWorker::Welcome { secret, .. }) => Some(*secret),
            _ => None,
        })
        .unwrap();
    // Name and incarnation prove nothing: they are in every log.
    assert_eq!(core.check_hello(&hello).unwrap_err().0, ErrorKind::Refused);
    let guess = Some(SessionSecret::from_bytes([0; 32]));
    assert!(core.check_hello(&Hello { run: Some(RUN), secret: guess, ..hello.clone() }).is_err());
    assert!(core.check_hello(&Hello { run: Some(RUN), secret: Some(secret), ..hello.clone() }).is_ok());
    // A new name does not help to claim work either.
    let other = WorkerId::new("x", Incarnation::new(2)).unwrap();
    let claims = WorkerStatus::Working(job("export"));
    assert!(core.check_hello(&Hello { status: claims, ..hello_of(&other, VERSION) }).is_err());
}

/// D9 of `docs/faults.md`: jobs wait for a full disk, as training does.
#[test]
fn a_job_waits_for_a_disk_that_takes_nothing() {
    let mut world = World::new();
    world.join(0);
    let averages = |world: &World| {
        let mut workers = world.workers.iter();
        workers.find_map(|(id, worker)| match &worker.job {
            Some(job) if job.stage().as_str() == StageName::AVERAGE => Some((id.clone(), job.clone())),
            _ => None,
        })
    };
    while averages(&world).is_none() {
        world.turn();
    }
    let began = world.now;
    while world.outcome.is_none() {
        if let Some((worker, job)) = averages(&world) {
            let worker = world.workers.get_mut(&worker).unwrap();
            worker.job = None;
            worker.say(ToCoordinator::JobFailed {
                job,
                kind: ErrorKind::Disk,
                message: "no space is left".into(),
                bad_unit: None,
                damaged: None,
            });
        } else {
            // The disk has room for the results of other jobs.
            world.work();
        }
        world.deliver();
        world.tick();
    }
    assert!(world.now >= began + settings().max_age);
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Failed);
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
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Failed);
    assert!(
        world.now + Duration::from_secs(1) > killed + settings().rejoin_window,
        "only its connection may have been lost"
    );
}

/// D7 of `docs/faults.md`: other jobs read the last milestone after it was averaged.
#[test]
fn a_milestone_that_is_damaged_after_it_was_averaged_is_trained_again() {
    let mut world = World::new();
    world.join(0);
    while !world.saved.jobs.contains(&job("average").name()) {
        world.turn();
    }
    let last = *world.pretraining().checkpoints.keys().last().unwrap();
    world.event(Event::CheckpointDamaged(last, "a bit was flipped".into()));
    assert!(!world.pretraining().checkpoints.contains_key(&last));
    finish(&mut world, 200);
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Done);
    assert!(world.pretraining().checkpoints.keys().any(|id| id.step() == last.step()));
}

/// A worker joins and takes over the state; then the only one that held the milestones before that dies.
#[test]
fn milestones_that_died_with_their_holder_are_trained_again() {
    let mut world = World::new();
    world.stores = false;
    world.join(0);
    while world.recorded.len() < 2 * GRID as usize {
        world.turn();
    }
    world.join(1);
    let has_state = |worker: &Worker| worker.stage() == Some(Progress::Formed);
    while world.workers.values().filter(|worker| has_state(worker)).count() < 2 {
        world.turn();
    }
    world.kill(0);
    assert!(world.pretraining().checkpoints.is_empty(), "nothing was stored");
    world.stores = true;
    finish(&mut world, 200);
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Done);
    let milestones: Vec<u64> = world.pretraining().checkpoints.keys().map(|id| id.step().get()).collect();
    assert_eq!(milestones, [3, 6, 9, 12]);
}

/// A stage of tasks for some models, which needs a device.
fn tasks(of: &[Of], device: Option<&str>, wait: Option<Duration>) -> Stage {
    let needs = Requirements { device: device.map(str::to_owned), memory: None, wait };
    let name = "tasks".parse().unwrap();
    Stage { name, kind: StageKind::Evaluation, reads: Reads::Models(of.to_vec()), after: None, needs }
}

fn told(world: &World, text: &str) -> bool {
    let tells = |notification: &Notification| matches!(notification, Notification::Alarm(said) | Notification::Info(said) if said.contains(text));
    world.notifications.iter().any(tells)
}

#[test]
fn who_only_serves_jobs_evaluates_milestones_while_others_train() {
    let mut world = World::with_stages(vec![tasks(&[Of::Milestones], Some("*4090*"), None)]);
    world.join(0);
    world.join(1);
    world.join_for_jobs("jobs", "NVIDIA GeForce RTX 4090, CUDA 13.0");
    let mut during = BTreeSet::new();
    while world.outcome.is_none() {
        world.turn();
        let (_, server) = world.workers.iter().find(|(id, _)| id.name() == "jobs").unwrap();
        assert_eq!(server.generation(), None, "it never trains");
        for (id, worker) in world.workers.iter().filter(|(id, _)| id.name() != "jobs") {
            let job = worker.job.as_ref().map(|job| job.stage().as_str());
            assert!(!job.is_some_and(|stage| ["tasks", "benchmark"].contains(&stage)), "{id} does {job:?}");
        }
        if world.pretraining().trained.is_none() {
            during.extend(world.saved.jobs.iter().filter(|job| job.stage() == "tasks").cloned());
        }
    }
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Done);
    assert!(during.len() >= 2, "{during:?}");
    let done: Vec<&str> = world.saved.jobs.iter().filter_map(JobName::model).collect();
    assert_eq!(done, ["step-00000003", "step-00000006", "step-00000009", "step-00000012"]);
}

#[test]
fn workers_that_have_nothing_else_to_do_share_an_evaluation() {
    let mut world = World::with_stages(vec![tasks(&[Of::Last], None, None)]);
    world.join(0);
    for name in ["one", "two", "three"] {
        world.join_for_jobs(name, "sim");
    }
    // One of them dies with its part, and then the coordinator.
    let with_part = |world: &World| {
        let has = |worker: &Worker| worker.job.as_ref().is_some_and(|job| job.part().is_some());
        world.workers.values().position(has)
    };
    let mut turns = 0..100;
    while with_part(&world).is_none() && turns.next().is_some() {
        world.reconnect();
        world.work();
        world.deliver();
        world.commit_all();
        world.tick();
    }
    world.kill(with_part(&world).unwrap());
    world.restart();
    finish(&mut world, 100);
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Done);
    let done: Vec<&str> =
        world.saved.jobs.iter().map(JobName::as_str).filter(|job| job.starts_with("tasks")).collect();
    let parts = ["tasks/last", "tasks/last/part-1-of-3", "tasks/last/part-2-of-3", "tasks/last/part-3-of-3"];
    assert_eq!(done, parts);
}

/// Its model needs more memory than there is, for instance.
#[test]
fn a_job_that_kills_its_worker_is_given_up() {
    let mut world = World::with_stages(vec![tasks(&[Of::Last], None, None)]);
    let mut deaths = 0;
    while world.outcome.is_none() {
        world.join(0);
        world.reconnect();
        let works = |worker: &Worker| worker.job.as_ref().is_some_and(|job| job.stage().as_str() == "tasks");
        if let Some(index) = world.workers.values().position(works) {
            world.kill(index);
            deaths += 1;
        }
        world.work();
        world.deliver();
        world.commit_all();
        world.tick();
    }
    let outcome = world.outcome.unwrap();
    assert_eq!((outcome.status, deaths), (ExitStatus::Failed, 3), "{}", outcome.message);
    assert!(
        outcome
            .message
            .starts_with("w0 was lost again and again while it did tasks/last; everything else is done")
    );
    assert!(world.saved.jobs.contains(&JobName::stored("benchmark".to_owned())));
}

#[test]
fn who_only_serves_jobs_is_no_other_worker_for_training() {
    let mut world = World::new();
    world.join(0);
    world.join_for_jobs("jobs", "sim");
    while world.recorded.len() < 2 {
        world.turn();
    }
    let trainer = world.workers.values_mut().find(|worker| !worker.only_jobs).unwrap();
    let message = "the loss is not finite".to_owned();
    trainer.leave(LeaveReason::Failed { kind: ErrorKind::InvalidInput, message });
    world.deliver();
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::InvalidInput);
}

#[test]
fn a_stage_that_nobody_can_serve_blocks_nothing_and_is_skipped_after_its_wait() {
    let wait = Some(Duration::from_secs(20));
    let mut world = World::with_stages(vec![tasks(&[Of::Last, Of::Average], Some("*4090*"), wait)]);
    finish(&mut world, 300);
    assert_eq!(world.outcome.clone().unwrap().status, ExitStatus::Done);
    assert!(told(&world, "tasks is pending: no worker with a device like \"*4090*\"; connected: sim"));
    assert!(told(&world, "tasks is skipped: no worker with a device like \"*4090*\" came within 20 s"));
    for job in ["tasks/last", "tasks/average", "benchmark"] {
        assert!(world.saved.jobs.contains(&JobName::stored(job.to_owned())), "{job}");
    }
}

#[test]
fn a_stage_waits_for_the_worker_that_it_needs() {
    let mut world = World::with_stages(vec![tasks(&[Of::Last], Some("*4090*"), None)]);
    world.join(0);
    for _ in 0..400 {
        world.turn();
    }
    assert!(world.outcome.is_none());
    assert!(world.saved.jobs.contains(&JobName::stored("benchmark".to_owned())), "it blocks nothing");
    world.join_for_jobs("jobs", "NVIDIA GeForce RTX 4090");
    finish(&mut world, 20);
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Done);
}

#[test]
fn an_evaluation_that_fails_ends_the_run_only_when_everything_else_is_done() {
    let mut world = World::with_stages(vec![tasks(&[Of::Last], None, None)]);
    world.join(0);
    while world.outcome.is_none() {
        for worker in world.workers.values_mut() {
            if let Some(job) = worker.job.take_if(|job| job.stage().as_str() == "tasks") {
                let (kind, message) = (ErrorKind::InvalidInput, "there are no rows".to_owned());
                worker.say(ToCoordinator::JobFailed { job, kind, message, bad_unit: None, damaged: None });
            }
        }
        world.turn();
    }
    let outcome = world.outcome.clone().unwrap();
    assert_eq!(outcome.status, ExitStatus::InvalidInput);
    assert!(
        outcome.message.contains("there are no rows") && outcome.message.contains("everything else is done")
    );
    assert!(world.saved.jobs.contains(&JobName::stored("benchmark".to_owned())));
    // The next start does what is left.
    world.outcome = None;
    world.workers.clear();
    world.restart();
    finish(&mut world, 100);
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Done);
}

/// The coordinator's last records were lost in a power failure; a worker elsewhere still has them.
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
    world.record_mut(StageName::pretraining()).step = Step::new(2);
    let generation = world.saved.generation;
    world.restart();
    finish(&mut world, 200);
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Done);
    assert!(world.saved.generation.get() <= generation.get() + 2, "{}", world.saved.generation);
}

/// A worker that was asked for its part by the coordinator before its restart reports that the part is stored.
#[test]
fn an_answer_to_an_earlier_coordinator_is_no_offence() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    let held = |world: &World| world.workers.values().find_map(|worker| worker.held.last().copied());
    while held(&world).is_none() {
        world.work();
        world.deliver();
        world.tick();
    }
    let checkpoint = held(&world).unwrap();
    world.restart();
    // The first worker is asked for all parts.
    world.deliver_some(0, 3);
    world.deliver_some(1, 3);
    let second = world.workers.keys().nth(1).unwrap().clone();
    let part = State::after(checkpoint.training(), checkpoint.step().get()).part("a");
    let message = ToCoordinator::Written { checkpoint, files: BTreeMap::from([("a".to_owned(), part)]) };
    world.event(Event::Received { worker: second, run: Some(RUN), message });
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
    // The tick is handled before the waiting heartbeats.
    world.now += Duration::from_mins(10);
    world.event(Event::Ticked);
    world.now += Duration::from_millis(100);
    world.event(Event::Ticked);
    assert!(!world.workers.values().any(Worker::is_aborted), "nobody was silent");
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
    // Everything is killed. New lives of both workers connect before the window is over.
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
        job: job("prepare"),
        kind: ErrorKind::InvalidInput,
        message: "no such folder".into(),
        bad_unit: None,
        damaged: None,
    };
    let say = |world: &mut World, worker: &WorkerId| {
        let worker = world.workers.get_mut(worker).unwrap();
        worker.job = None;
        worker.say(failed.clone());
        world.deliver();
    };
    say(&mut world, &first);
    let second = prepares(&world).unwrap();
    assert_ne!(first, second);
    assert_eq!(world.outcome, None);
    // A job that fails on all workers fails the run.
    say(&mut world, &second);
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::InvalidInput);
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
            let worker = world.workers.get_mut(&id).unwrap();
            if worker.group.is_some() {
                worker.leave(LeaveReason::Lost { suspect: None, message: "no reason".into() });
            }
        }
        if let Some(outcome) = world.outcome {
            assert_eq!(outcome.status, ExitStatus::Failed);
            assert!(outcome.message.contains("10 groups in a row made no progress"), "{}", outcome.message);
            return;
        }
    }
    panic!("the run never ends");
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
    panic!("the stop never ends");
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
    // Its agent keeps sending heartbeats; the other worker waits for it in the next operation.
    while !world.workers.values().any(Worker::is_aborted) {
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
            world.event(Event::Received { worker: id, run: Some(RUN), message });
        }
        world.event(Event::Ticked);
        assert!(world.now < begun + Duration::from_secs(10), "it is not noticed");
    }
    assert!(world.cut.contains(&frozen), "the stuck one is the culprit");
    assert_eq!(world.cut.len(), 1);
}

/// A member was told to leave its group. It sends heartbeats, but does not leave.
#[test]
fn a_member_that_does_not_leave_its_group_is_left_behind() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    while world.recorded.len() < 4 {
        world.turn();
    }
    let generation = world.saved.generation;
    world.kill(0);
    let (begun, stuck) = (world.now, world.workers.keys().next().unwrap().clone());
    while world.cut.is_empty() {
        world.now += Duration::from_millis(500);
        let heartbeat = Heartbeat {
            generation,
            collective: 10,
            section: Section::Collective,
            since: world.now.saturating_sub(begun),
            busy: world.now,
        };
        let message = ToCoordinator::Heartbeat(heartbeat);
        world.event(Event::Received { worker: stuck.clone(), run: Some(RUN), message });
        world.event(Event::Ticked);
        assert!(world.now < begun + Duration::from_secs(10), "it is not noticed");
    }
    let is_told = |notification: &Notification| matches!(notification, Notification::Lost(worker, why) if *worker == stuck && why.contains("did not leave its group"));
    assert!(world.notifications.iter().any(is_told), "{:?}", world.notifications);
}

/// One of two workers has memory that flips bits.
#[test]
fn a_worker_that_computes_wrongly_stops_the_run_before_a_checkpoint_of_it_is_stored() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    while world.recorded.len() < 4 {
        world.turn();
    }
    // Not the one that reports steps, so that the fault shows only when states are compared.
    let wrong = world
        .workers
        .values_mut()
        .find(|worker| worker.group.as_ref().is_some_and(|group| group.assignment.rank.index() == 1));
    let wrong = wrong.unwrap();
    wrong.state = wrong.state.map(State::flipped);
    while world.outcome.is_none() {
        world.turn();
    }
    let outcome = world.outcome.clone().unwrap();
    assert_eq!(outcome.status, ExitStatus::Corrupt);
    assert!(outcome.message.contains("computes wrongly"), "{}", outcome.message);
    let stored: Vec<u64> = world.pretraining().checkpoints.keys().map(|id| id.step().get()).collect();
    assert_eq!(stored, [GRID]);
}

/// All checkpoints were damaged, which was recorded, and then the run is restarted.
#[test]
fn a_run_that_had_checkpoints_never_begins_anew_by_itself() {
    let mut world = World::new();
    world.join(0);
    while world.pretraining().checkpoints.is_empty() {
        world.turn();
    }
    world.die();
    world.record_mut(StageName::pretraining()).checkpoints.clear();
    world.workers.clear();
    world.restart();
    world.join(0);
    let assignment = |world: &World| {
        world.workers.values().find_map(|worker| Some(worker.group.as_ref()?.assignment.clone()))
    };
    while assignment(&world).is_none() {
        world.deliver();
        world.tick();
    }
    assert!(!assignment(&world).unwrap().may_begin);
}

/// The record is an older copy: since then a group was formed, one of whose members is still alive.
#[test]
fn whoever_comes_from_a_group_that_the_record_does_not_have_is_told_so_once() {
    let mut world = World::new();
    world.strangers = true;
    world.join(0);
    while world.recorded.len() < 2 {
        world.turn();
    }
    let (older, id) = (world.saved.clone(), world.workers.keys().next().unwrap().clone());
    world.join(1);
    while world.saved.generation == older.generation {
        world.turn();
    }
    world.turn();
    world.die();
    world.saved = older;
    world.notifications.clear();
    world.restart();
    (0..10).for_each(|_| world.turn());
    assert!(!world.workers.contains_key(&id), "it was not refused");
    let alarms = world.notifications.iter().filter(
        |notification| matches!(notification, Notification::Alarm(why) if why.contains("older copy")),
    );
    assert_eq!(alarms.count(), 2, "{:?}", world.notifications);
    world.strangers = false;
    finish(&mut world, 300);
    assert_eq!(world.outcome.as_ref().unwrap().status, ExitStatus::Done);
}

/// Examples are made before anything is trained, so that what is wrong with them is told at once; and a stage that is to be tuned
/// waits for its model, but not for what is measured of it.
#[test]
fn stages_of_a_chain_follow_each_other() {
    let mut world = World::of(chain());
    world.join(0);
    world.join(1);
    let mut order: Vec<String> = Vec::new();
    for _ in 0..200 {
        world.turn();
        for job in &world.saved.jobs {
            if !order.contains(&job.to_string()) {
                order.push(job.to_string());
            }
        }
        let begun = world.saved.trainings.iter().filter(|(_, record)| record.step > Step::default());
        for name in begun.map(|(name, _)| name.to_string()) {
            if !order.contains(&name) {
                order.push(name);
            }
        }
        if world.outcome.is_some() {
            break;
        }
    }
    let place = |name: &str| order.iter().position(|other| other == name).unwrap();
    let chain = [
        "prepare",
        "sft-examples",
        "train",
        "average",
        "sft",
        "sft-export",
        "dpo-reference/sft",
        "dpo",
        "dpo-export",
        "tasks/dpo",
    ];
    assert!(chain.windows(2).all(|pair| place(pair[0]) < place(pair[1])), "{order:?}");
    assert!(place("dpo-examples") < place("train"), "{order:?}");
    assert!(place("tasks/average") > place("dpo"), "training comes first: {order:?}");
    let groups = world.notifications.iter().filter(|note| matches!(note, Notification::GroupFormed { .. }));
    assert_eq!(groups.count(), 3, "one group for each stage");
}

/// A worker that was away while a stage ended is told nothing wrong, and its reports of the stage before count for that stage.
#[test]
fn late_reports_of_a_stage_before_confirm_nothing_of_the_next() {
    let mut world = World::of(chain());
    world.join(0);
    world.join(1);
    while !world.saved.trainings.contains_key(&"sft".parse().unwrap()) || world.tuned.is_empty() {
        world.turn();
    }
    let old = world.saved.rosters.iter().find(|(_, roster)| roster.training == StageName::pretraining());
    let (generation, member) =
        old.map(|(generation, roster)| (*generation, roster.members[0].clone())).unwrap();
    let report = State::after(StageName::pretraining(), ITERATIONS).report();
    let before = world.pretraining();
    let message = ToCoordinator::Steps { generation, reports: vec![report] };
    world.event(Event::Received { worker: member, run: Some(RUN), message });
    assert_eq!(world.pretraining(), before);
    finish(&mut world, 200);
    assert_eq!(world.tuned.len(), 8);
}
