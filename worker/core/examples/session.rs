//! Drives a worker's session by hand: a report that was not confirmed is said again on the next connection.
//!
//!     cargo run -p ulmus-worker-core --example session

#![expect(clippy::print_stdout, reason = "an example")]

use std::time::Duration;

use ulmus_types::{Digest, RunId, SessionSecret, StageName, Step, StepReport, ToCoordinator, ToWorker};
use ulmus_worker_core::{Action, Report, Session};

const RUN: RunId = RunId::from_bytes([7; 16]);

/// What a shell would do. Handles to states are plain names here.
fn show(after: &str, actions: &[Action<&'static str>]) {
    println!("{after}:");
    for action in actions {
        match action {
            Action::Send(ToCoordinator::Ready(ready)) => {
                println!("  say: ready, with {} reports that nobody has confirmed", ready.reports.len());
            }
            Action::Open { plan, store, .. } => println!("  open the run in {store} with the plan {plan:?}"),
            other => println!("  {other:?}"),
        }
    }
}

fn welcome() -> ToWorker {
    ToWorker::Welcome {
        id: RUN,
        secret: SessionSecret::from_bytes([1; 32]),
        run: "demo".parse().expect("it is a name"),
        plan: "…".to_owned(),
        store: "runs/demo".to_owned(),
    }
}

fn main() {
    let mut session = Session::<&'static str>::default();
    println!("the hello says: {:?}", session.greet());
    show("welcomed", &session.on_message(welcome()));
    session.on_opened(false);
    show("the model is built", &session.on_report(RUN, Report::WarmedUp(Some(Digest::of(b"arithmetic")))));

    let report = StepReport {
        step: Step::new(1),
        tokens: 4096,
        loss: 8.8,
        grad_norm: 1.0,
        lr: 1e-3,
        elapsed: Duration::from_millis(400),
        ..StepReport::default()
    };
    let steps = ToCoordinator::Steps { generation: ulmus_types::Generation::new(1), reports: vec![report] };
    show("a step is done", &session.on_report(RUN, Report::Send(steps)));

    // The coordinator is gone, and comes back.
    session.on_disconnected();
    println!("the next hello says: {:?}", session.greet());
    session.on_message(welcome());
    show("welcomed again", &session.on_opened(true).unwrap_or_default());
    show(
        "the step is confirmed",
        &session.on_message(ToWorker::Acknowledge(StageName::pretraining(), Step::new(1))),
    );
}
