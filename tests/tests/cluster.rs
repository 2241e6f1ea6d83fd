//! The first promise: the same plan gives the same bits, for any number of workers, with any process killed at
//! any time. Every test ends with the comparison to one undisturbed run of a single worker.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use rustix::process::{Signal, kill_process};
use ulmus_tests::{Bits, Process, Sandbox};

/// The bits of the tiny plan on one local worker.
fn undisturbed() -> &'static Bits {
    static BITS: OnceLock<Bits> = OnceLock::new();
    BITS.get_or_init(|| {
        let sandbox = Sandbox::new();
        sandbox.coordinator(&[]).succeeds();
        sandbox.run("tiny").bits()
    })
}

fn assert_undisturbed(sandbox: &Sandbox) {
    sandbox.run("tiny").bits().assert_equal(undisturbed());
}

/// A coordinator without workers of its own, and workers that join it.
fn cluster(sandbox: &Sandbox, names: &[&str], more: &[&str]) -> (Process, Vec<Process>) {
    let expected = format!("cluster.min_workers={}", names.len());
    let arguments = ["--set", "local.workers=0", "--set", &expected];
    let coordinator = sandbox.coordinator(&[&arguments[..], more].concat());
    let address = coordinator.address();
    let workers = names.iter().map(|name| sandbox.worker(&address, name)).collect();
    (coordinator, workers)
}

#[test]
fn one_worker_learns() {
    let bits = undisturbed();
    assert_eq!(bits.steps(), 30);
    let (first, last) = bits.losses();
    assert!(last < 0.8 * first, "from {first} to {last}");
}

#[test]
fn two_local_workers_give_the_same_bits() {
    let sandbox = Sandbox::new();
    let said = sandbox.coordinator(&["--set", "local.workers=2"]).succeeds();
    assert!(said.contains("2 workers train from step 0 of 30"), "{said}");
    assert_undisturbed(&sandbox);
}

#[test]
fn three_joined_workers_give_the_same_bits() {
    let sandbox = Sandbox::new();
    let (coordinator, workers) = cluster(&sandbox, &["a", "b", "c"], &[]);
    coordinator.says("3 workers train from step 0 of 30");
    coordinator.succeeds();
    for worker in workers {
        worker.succeeds();
    }
    assert_undisturbed(&sandbox);
}

#[test]
fn four_workers_give_the_same_bits() {
    let sandbox = Sandbox::new();
    let (coordinator, workers) = cluster(&sandbox, &["a", "b", "c", "d"], &[]);
    coordinator.says("4 workers train from step 0 of 30");
    coordinator.succeeds();
    for worker in workers {
        worker.succeeds();
    }
    assert_undisturbed(&sandbox);
}
