//! Drives the coordinator by hand: a worker joins, prepares the data, and is assigned to a group. No clock and no network are
//! needed, as both come in as arguments.
//!
//!     cargo run -p ulmus-coord-core --example form_a_group

#![expect(clippy::print_stdout, reason = "an example")]

use std::collections::BTreeSet;
use std::error::Error;
use std::time::Duration;

use ulmus_coord_core::{Coordinator, Effect, Event, PersistentState, Settings, TrainingSettings};
use ulmus_types::{
    Digest, Graph, Hello, Incarnation, Job, Ready, RunId, RunSecret, StageName, Subject, ToCoordinator,
    WorkerId, WorkerStatus,
};

const RUN: RunId = RunId::from_bytes([7; 16]);

fn settings() -> Result<Settings, Box<dyn Error>> {
    Ok(Settings {
        run: "demo".parse()?,
        id: RUN,
        secret: RunSecret::from_bytes([8; 32]),
        plan: String::new(),
        store: "runs/demo".to_owned(),
        nonce: Digest::of(b"nonce"),
        version: "0.1.0".to_owned(),
        expected_workers: 1,
        min_workers: 1,
        graph: Graph::new(2, true, false, &[], Vec::new()),
        trainings: vec![TrainingSettings {
            name: StageName::pretraining(),
            updates: Some(100),
            micro_batches: 4,
            tokens_per_step: 4096,
            milestone_every: 10,
            needed_milestones: 2,
            checkpoint_files: vec!["model.safetensors".to_owned()],
            may_exhaust: false,
            measures: BTreeSet::new(),
        }],
        sources: ["web".to_owned()].into(),
        from_start: false,
        dead_after: Duration::from_secs(3),
        rejoin_window: Duration::from_secs(10),
        recovery: Duration::from_mins(10),
        max_age: Duration::from_mins(30),
        bad_units: 0,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut coordinator = Coordinator::new(settings()?, PersistentState::default(), Duration::ZERO);
    let worker = WorkerId::new("node-7", Incarnation::new(1))?;
    let hello = Hello {
        worker: worker.clone(),
        version: "0.1.0".to_owned(),
        address: "10.0.0.7:41234".to_owned(),
        device: "cpu, 8 threads".to_owned(),
        threads: 8,
        pid: 1234,
        run: None,
        secret: None,
        status: WorkerStatus::Idle,
        host: "node-7".to_owned(),
        memory: 64 << 30,
        only_jobs: false,
    };
    let ready = Ready {
        fingerprint: Some(Digest::of(b"arithmetic")),
        generation: None,
        reports: Vec::new(),
        snapshots: Vec::new(),
    };
    let events = [
        ("it says hello", None, ToCoordinator::Hello(hello)),
        ("it sees the run's store", Some(RUN), ToCoordinator::StoreRead(Ok(Digest::of(b"nonce")))),
        ("it is ready", Some(RUN), ToCoordinator::Ready(ready)),
        (
            "it has prepared the data",
            Some(RUN),
            ToCoordinator::JobDone {
                job: Job::new(StageName::PREPARE.parse()?, Subject::Stage(Vec::new())),
                result: "{}".to_owned(),
            },
        ),
    ];
    for (second, (what, run, message)) in (1..).zip(events) {
        let event = Event::Received { worker: worker.clone(), run, message };
        println!("after {second} s {what}:");
        // A driver performs them in order, and nothing that stands behind a `Save` before that is durable.
        for effect in coordinator.on(Duration::from_secs(second), event) {
            match effect {
                Effect::Send(to, message) => println!("  send to {}: {message:?}", to.name()),
                effect => println!("  {effect:?}"),
            }
        }
    }
    Ok(())
}
