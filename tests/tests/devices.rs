//! Workers whose devices sum the gradients directly give the same bits as a single worker, even if one of them is
//! killed in the middle. For machines with a GPU, which all workers may share (`NCCL_MULTI_RANK_GPU_ENABLE=1`, NCCL
//! 2.30 or newer). Without a GPU, `.ci/run cuda` runs this on the emulator.

use rustix::process::{Signal, kill_process};
use ulmus_tests::{Sandbox, until};

/// A small plan: even so, an emulated device takes a second per step.
const SHORT: [&str; 22] = [
    "--set",
    "local.device=cuda",
    "--set",
    "model.max_context_length=64",
    "--set",
    "train.sequences=8",
    "--set",
    "train.micro_batch=2",
    "--set",
    "train.iterations=10",
    "--set",
    "train.warmup=2",
    "--set",
    "train.held_out_every=0",
    "--set",
    "checkpoint.average=1",
    "--set",
    "evaluate.text=1KiB",
    "--set",
    "evaluate.continuation=2",
    "--set",
    "benchmark.generate=2",
];

#[test]
#[ignore = "needs a GPU, or the emulator"]
fn devices_that_lose_one_of_them_give_the_same_bits() {
    let alone = Sandbox::new();
    alone.coordinator(&SHORT).succeeds();

    let sandbox = Sandbox::new();
    let run = sandbox.run("tiny");
    let coordinator = sandbox
        .coordinator(&[&SHORT[..], &["--set", "local.workers=2", "--set", "cluster.min_workers=2"]].concat());
    coordinator.says("generation 1: 2 workers train from step 0 of 10");
    until("a few steps", || {
        (run.path().join("metrics.csv").exists() && run.steps_so_far() >= 3).then_some(())
    });
    kill_process(run.local_workers()["local-1"], Signal::KILL).expect("it trains");
    coordinator.says("worker local-1 is lost");
    coordinator.succeeds();

    let generations = run.generations();
    assert!(generations.len() > 1 && !run.read("logs/local-0.log").contains("through the host"));
    let joined = run.read("logs/local-0.log").matches("devices sum gradients among themselves").count();
    assert!(joined > 1, "{joined} groups of devices in {generations:?}");
    run.bits().assert_equal(&alone.run("tiny").bits());
}

/// Which algorithm is measured to be the fastest is a matter of luck, and workers with different algorithms compute
/// different bits, so they cannot train together.
#[test]
#[ignore = "needs a GPU, or the emulator"]
fn workers_share_the_algorithms_that_one_has_chosen() {
    let sandbox = Sandbox::new();
    let more = ["--set", "local.workers=2", "--set", "cluster.min_workers=2", "--set", "train.iterations=3"];
    let coordinator =
        sandbox.coordinator(&[&SHORT[..], &more, &["--set", "train.algorithms=measured"]].concat());
    coordinator.says("generation 1: 2 workers train from step 0 of 3");
    coordinator.succeeds();
    let run = sandbox.run("tiny");
    let files = std::fs::read_dir(run.path()).expect("the run has a folder");
    let names = files.map(|file| file.expect("it is readable").file_name().into_string().expect("a name"));
    let chosen: Vec<String> = names.filter(|name| name.starts_with("algorithms-")).collect();
    assert_eq!(chosen.len(), 1, "{chosen:?}");
    assert!(run.read(&chosen[0]).contains("ByColumns"));
}
