//! The first promise: the same plan gives the same bits, for any number of workers, with any process killed at any
//! time. Every test ends by comparing the run with an undisturbed run of a single worker.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use rustix::process::{Pid, Signal, kill_process};
use ulmus_tests::{Bits, Process, Sandbox, TINY, repository, until, write_examples};

/// What a coordinator prints when training is well under way but far from its end.
const UNDER_WAY: &str = "checkpoint step-00000010-g1 stored";

/// The results of the tiny plan on one local worker.
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

/// A coordinator without local workers.
fn lone_coordinator(sandbox: &Sandbox, more: &[&str]) -> Process {
    sandbox.coordinator(&[&["--set", "local.workers=0"], more].concat())
}

/// A coordinator, and workers that have joined and train together from the first step.
fn cluster(sandbox: &Sandbox, names: &[&str]) -> (Process, Vec<Process>) {
    let all = format!("cluster.min_workers={}", names.len());
    let coordinator = lone_coordinator(sandbox, &["--set", &all]);
    let address = coordinator.address();
    let workers = names.iter().map(|name| sandbox.worker(&address, name)).collect();
    coordinator.says(&format!("{} workers train from step 0 of 60", names.len()));
    (coordinator, workers)
}

/// A coordinator with two local workers, under way.
fn local_pair(sandbox: &Sandbox) -> Process {
    let coordinator = sandbox.coordinator(&["--set", "local.workers=2"]);
    coordinator.says(UNDER_WAY);
    coordinator
}

/// Kills orphaned processes, and waits until they are gone.
fn kill_orphans(pids: impl IntoIterator<Item = Pid>) {
    for pid in pids {
        kill_process(pid, Signal::KILL).expect("it is alive");
        until("the death of an orphan", || (!is_alive(pid)).then_some(()));
    }
}

/// Whether a process is running. A zombie is not.
fn is_alive(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    let state = status.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

#[test]
fn one_worker_learns() {
    let bits = undisturbed();
    assert_eq!(bits.steps(), 60);
    let (first, last) = bits.losses();
    assert!(last < 0.85 * first, "from {first} to {last}");
}

#[test]
fn two_local_workers_give_the_same_bits() {
    let sandbox = Sandbox::new();
    let said = sandbox.coordinator(&["--set", "local.workers=2"]).succeeds();
    assert!(said.contains("2 workers train from step 0 of 60"), "{said}");
    assert_undisturbed(&sandbox);
}

#[test]
fn three_joined_workers_give_the_same_bits() {
    let sandbox = Sandbox::new();
    let (coordinator, workers) = cluster(&sandbox, &["a", "b", "c"]);
    coordinator.succeeds();
    for worker in workers {
        let said = worker.succeeds();
        assert!(said.contains("joined run tiny") && said.contains("run tiny is done"), "{said}");
    }
    assert_undisturbed(&sandbox);
}

#[test]
fn four_joined_workers_give_the_same_bits() {
    let sandbox = Sandbox::new();
    let (coordinator, workers) = cluster(&sandbox, &["a", "b", "c", "d"]);
    coordinator.succeeds();
    for worker in workers {
        worker.succeeds();
    }
    assert_undisturbed(&sandbox);
}

#[test]
fn a_worker_that_joins_in_the_middle_changes_nothing() {
    let sandbox = Sandbox::new();
    let coordinator = lone_coordinator(&sandbox, &[]);
    let first = sandbox.worker(&coordinator.address(), "first");
    coordinator.says(UNDER_WAY);
    let second = sandbox.worker(&coordinator.address(), "second");
    coordinator.says("generation 2: 2 workers train from step");
    coordinator.succeeds();
    first.succeeds();
    second.succeeds();
    assert_eq!(sandbox.run("tiny").generations().len(), 2);
    assert_undisturbed(&sandbox);
}

/// Trains with two workers, one of which is killed in the middle.
fn kill_one_of_two(killed: &str) {
    let sandbox = Sandbox::new();
    let coordinator = lone_coordinator(&sandbox, &[]);
    let mut workers: Vec<Process> =
        ["a", "b"].iter().map(|name| sandbox.worker(&coordinator.address(), name)).collect();
    // They rarely start together; usually one joins the other.
    coordinator.says(": 2 workers train from step");
    let killed_one = workers.remove(usize::from(killed == "b"));
    killed_one.kill();
    coordinator.says(&format!("worker {killed} is lost"));
    coordinator.succeeds();
    workers.remove(0).succeeds();
    assert_undisturbed(&sandbox);
}

#[test]
fn a_killed_worker_changes_nothing() {
    kill_one_of_two("b");
}

/// The first worker of a group reports the steps for all.
#[test]
fn the_first_worker_of_a_group_can_be_killed_too() {
    kill_one_of_two("a");
}

#[test]
fn a_worker_that_hangs_is_left_behind_and_comes_back() {
    let sandbox = Sandbox::new();
    let coordinator = lone_coordinator(&sandbox, &["--set", "cluster.dead_after=3s"]);
    let steady = sandbox.worker(&coordinator.address(), "steady");
    let hanging = sandbox.worker(&coordinator.address(), "hanging");
    coordinator.says(": 2 workers train from step");
    hanging.signal(Signal::STOP);
    coordinator.says("worker hanging is lost");
    hanging.signal(Signal::CONT);
    coordinator.succeeds();
    steady.succeeds();
    // It rejoined, or found the run over. Either way it ends cleanly.
    hanging.signal(Signal::INT);
    let code = hanging.ends().code;
    assert!(matches!(code, Some(0 | 130)), "{code:?}");
    assert_undisturbed(&sandbox);
}

#[test]
fn a_killed_coordinator_finds_its_workers_again() {
    let sandbox = Sandbox::new();
    local_pair(&sandbox).kill();
    let orphans = sandbox.run("tiny").local_workers();
    assert!(orphans.len() == 2 && orphans.values().all(|pid| is_alive(*pid)), "{orphans:?}");

    sandbox.coordinator(&["--set", "local.workers=2"]).succeeds();
    assert_eq!(sandbox.run("tiny").local_workers(), orphans, "none was started again");
    assert_eq!(sandbox.run("tiny").generations().into_iter().collect::<Vec<_>>(), [(1, 60)]);
    assert!(orphans.values().all(|pid| !is_alive(*pid)), "they end with the run");
    assert_undisturbed(&sandbox);
}

#[test]
fn training_that_ends_while_the_coordinator_is_gone_is_complete() {
    let sandbox = Sandbox::new();
    let coordinator = local_pair(&sandbox);
    // So near the end that workers can hold every state that is left to store. A later one may be stored before an earlier one.
    coordinator.says("checkpoint step-00000040-g1 stored");
    coordinator.says("checkpoint step-00000050-g1 stored");
    coordinator.kill();
    let run = sandbox.run("tiny");
    for log in ["logs/local-0.log", "logs/local-1.log"] {
        until("the last step", || run.read(log).contains("every update is done").then_some(()));
    }
    let orphans = run.local_workers();
    let again = ["--set", "local.workers=2", "--set", "cluster.rejoin_window=2s"];
    sandbox.coordinator(&again).succeeds();
    assert_eq!(run.local_workers(), orphans, "none was started again");
    assert_undisturbed(&sandbox);
}

#[test]
fn an_interrupted_run_goes_on_with_the_same_command() {
    let sandbox = Sandbox::new();
    let coordinator = local_pair(&sandbox);
    coordinator.signal(Signal::INT);
    let ended = coordinator.ends();
    assert_eq!(ended.code, Some(130), "{}", ended.output);
    assert!(ended.output.contains("the same command resumes from there"), "{}", ended.output);
    let run = sandbox.run("tiny");
    assert!(run.local_workers().values().all(|pid| !is_alive(*pid)), "nothing is left running");
    let done = run.generations().values().sum::<usize>();
    assert!((10..60).contains(&done), "it stopped at step {done}");
    let newest = run.checkpoints().pop().expect("a state was saved");
    assert!(newest.starts_with(&format!("step-{done:08}-")), "{newest} is not the state after step {done}");

    let said = sandbox.coordinator(&["--set", "local.workers=2"]).succeeds();
    assert!(said.contains(&format!("2 workers train from step {done} of 60")), "{said}");
    assert_undisturbed(&sandbox);
}

#[test]
fn a_run_whose_every_process_was_killed_goes_on_from_its_checkpoint() {
    let sandbox = Sandbox::new();
    local_pair(&sandbox).kill();
    let orphans = sandbox.run("tiny").local_workers();
    kill_orphans(orphans.values().copied());

    let again = ["--set", "local.workers=2", "--set", "cluster.rejoin_window=1s"];
    let said = sandbox.coordinator(&again).succeeds();
    assert!(said.contains("2 workers train from step") && !said.contains("from step 0 of"), "{said}");
    assert_undisturbed(&sandbox);
}

/// Twenty times, all processes are ended after a few more steps, alternately by Ctrl-C and by SIGKILL.
#[test]
fn a_run_that_is_stopped_at_twenty_points_gives_the_same_bits() {
    let long = ["--set", "train.iterations=500", "--set", "cluster.rejoin_window=100ms"];
    let at_once = Sandbox::new();
    at_once.coordinator(&long).succeeds();

    let sandbox = Sandbox::new();
    let run = sandbox.run("tiny");
    let steps = || if run.path().join("metrics.csv").exists() { run.steps_so_far() } else { 0 };
    let (mut points, mut draw) = (BTreeSet::new(), 1_u64);
    for number in 0..20 {
        let before = steps();
        let workers = format!("local.workers={}", 1 + number % 3);
        let coordinator = sandbox.coordinator(&[&long[..], &["--set", &workers]].concat());
        // Pseudo-random numbers, the same in every run of the test.
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let more = 1 + (draw >> 33) as usize % 9;
        until("a few steps more", || (steps() >= before + more).then_some(()));
        points.insert(steps());
        if number % 2 == 0 {
            coordinator.signal(Signal::INT);
            assert_eq!(coordinator.ends().code, Some(130));
        } else {
            coordinator.kill();
            kill_orphans(run.local_workers().into_values().filter(|pid| is_alive(*pid)));
        }
    }
    assert!(points.len() > 15 && steps() < 490, "{points:?}");
    sandbox.coordinator(&long).succeeds();
    run.bits().assert_equal(&at_once.run("tiny").bits());
}

#[test]
fn a_finished_run_is_not_done_again() {
    let sandbox = Sandbox::new();
    sandbox.coordinator(&[]).succeeds();
    let (run, workers) = (sandbox.run("tiny"), sandbox.run("tiny").local_workers());
    let before = run.contents();
    let said = sandbox.coordinator(&[]).succeeds();
    assert!(said.contains("held-out perplexity"), "its summary is shown again: {said}");
    assert!(!said.contains("joined") && !said.contains("train from"), "{said}");
    assert_eq!(run.local_workers(), workers, "no worker was started");
    assert!(run.contents() == before, "no file has changed");
}

#[test]
fn the_demonstration_of_a_failure_ends_with_the_same_bits() {
    let sandbox = Sandbox::new();
    let said = sandbox.coordinator(&["--set", "local.workers=2", "--demo-failure"]).succeeds();
    assert!(said.contains("killed worker local-1 with SIGKILL"), "{said}");
    assert!(said.contains("the same bits: losing a worker changed nothing"), "{said}");
    assert_undisturbed(&sandbox);
    sandbox.run("tiny-failure").bits().assert_equal(undisturbed());
    assert!(sandbox.run("tiny-failure").generations().len() > 1, "the worker was killed while it trained");
}

#[test]
fn a_run_that_only_tunes_can_demonstrate_a_failure_too() {
    let sandbox = Sandbox::new();
    write_examples(&sandbox.path(""));
    let base = repository().join("tests/golden/tiny").display().to_string();
    let stage = "[[tune]]\nname = \"sft\"\nof = \"base\"\nbatch = 8\nmax_length = 96\nsteps = 120";
    sandbox.write(
        "plan.toml",
        format!(
            "[run]\nname = \"on\"\n[local]\nworkers = 2\n[base]\nmodel = {base:?}\n{stage}\n[[tune.data]]\nurl = \"answers.jsonl\"\n"
        ),
    );
    let said = sandbox.coordinator(&["--demo-failure"]).succeeds();
    assert!(said.contains("killed worker local-1 with SIGKILL"), "{said}");
    assert!(said.contains("the same bits: losing a worker changed nothing"), "{said}");
    let again = sandbox.coordinator(&["--demo-failure"]).ends();
    assert_eq!(again.code, Some(2), "{}", again.output);
    assert!(
        again.output.contains("no worker was killed, because on-failure had been trained"),
        "{}",
        again.output
    );
}

#[test]
fn variants_of_a_plan_are_run_one_by_one_and_compared() {
    let sandbox = Sandbox::new();
    let variants =
        "[variants.uniform.model]\nqkv_multipliers = 0.75\nffn_multipliers = 1.25\n[variants.scaled]\n";
    sandbox.write("plan.toml", TINY.to_owned() + variants);
    let said =
        sandbox.coordinator(&["--set", "train.iterations=20", "--set", "checkpoint.average=2"]).succeeds();
    let comparison = said.rsplit("variant").next().expect("a last part");
    for name in ["tiny-scaled", "tiny-uniform"] {
        let loss = sandbox.run(name).json("results/evaluate-average.json")["loss"].as_f64();
        let loss = format!("{:.4}", loss.expect("a loss"));
        let row = comparison.lines().find(|line| line.contains(name)).expect("a row of the comparison");
        assert!(row.contains(&loss), "{loss} is not in {row}");
    }
}
