//! Faults that an outsider found: wrong results without any attacker, and single bad workers that stopped a healthy
//! run. Each test ends with the bits of an undisturbed run, or with the right exit code and what to do.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Instant;

use rustix::process::Signal;
use ulmus_tests::{Bits, Process, Sandbox, SmallDisk, freeze_thread, programs, until};

const UNDER_WAY: &str = "checkpoint step-00000010-g1 stored";

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

fn lone_coordinator(sandbox: &Sandbox, more: &[&str]) -> Process {
    sandbox.coordinator(&[&["--set", "local.workers=0"], more].concat())
}

fn flip_bit(path: &Path) {
    let mut content = fs::read(path).expect("the file is there");
    let middle = content.len() / 2;
    content[middle] ^= 1;
    fs::write(path, content).expect("it can be written");
}

/// Stops a run of two local workers after its third milestone.
fn interrupted(sandbox: &Sandbox) {
    let coordinator = sandbox.coordinator(&["--set", "local.workers=2"]);
    coordinator.says("checkpoint step-00000030-g1 stored");
    coordinator.signal(Signal::INT);
    assert_eq!(coordinator.ends().code, Some(130));
}

/// D1: a worker carried states and reports of one run into another.
#[test]
fn a_worker_brings_nothing_of_one_run_into_another() {
    let sandbox = Sandbox::new();
    let first = lone_coordinator(&sandbox, &["--set", "run.name=other", "--set", "train.max_lr=0.003"]);
    let address = first.address();
    let worker = sandbox.worker(&address, "wanderer");
    first.says("checkpoint step-00000020-g1 stored");
    first.kill();
    // Its coordinator is gone, and the coordinator of another run has the same address.
    let listen = ["--plan", "plan.toml", "--listen", &address, "--set", "local.workers=1"];
    let second = sandbox.coordinator_bare(&listen);
    second.says("comes from run");
    let said = second.succeeds();
    assert!(said.contains("from step 0 of 60"), "{said}");
    worker.succeeds();
    assert_undisturbed(&sandbox);
}

/// D3: a worker that others cannot reach ended a healthy run.
#[test]
fn a_worker_that_nobody_reaches_sits_out() {
    let sandbox = Sandbox::new();
    let coordinator = lone_coordinator(&sandbox, &["--set", "train.iterations=400"]);
    let address = coordinator.address();
    let well = [sandbox.worker(&address, "a"), sandbox.worker(&address, "b")];
    coordinator.says(": 2 workers train from step");
    // It advertises a host name that does not exist.
    let join = [
        "--join",
        &address,
        "--name",
        "hidden",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--advertise",
        "nowhere.invalid",
    ];
    let hidden = sandbox.worker_bare(&join);
    coordinator.says("worker hidden joined");
    let began = Instant::now();
    let line = coordinator.says("worker hidden sits out");
    coordinator.says(": 2 workers train from step");
    eprintln!("the others trained again {:.1?} after an unreachable worker joined", began.elapsed());
    assert!(line.contains("unreachable"), "{line}");
    let said = coordinator.succeeds();
    assert!(said.contains("2 workers train"), "{said}");
    for worker in well {
        worker.succeeds();
    }
    hidden.ends();
}

/// D4: a worker that cannot store anything stopped training forever.
#[test]
fn a_worker_that_cannot_store_costs_only_itself() {
    let sandbox = Sandbox::new();
    let coordinator = lone_coordinator(&sandbox, &[]);
    let address = coordinator.address();
    let run = sandbox.run("tiny");
    // A run whose only worker cannot store anything has to end.
    let writer = sandbox.worker(&address, "b");
    coordinator.says("worker b joined");
    // Its name sorts first, so it is asked first to do later jobs.
    let join = ["--join", &address, "--name", "a", "--threads", "1", "--device", "cpu"];
    let Some(reader) = sandbox.start_read_only(run.path(), &programs().worker, &join) else { return };
    let said = coordinator.succeeds();
    assert!(said.contains("a could not store its part"), "{said}");
    reader.succeeds();
    writer.succeeds();
    assert_undisturbed(&sandbox);
}

/// A run with a local worker, on a disk that is full after the first milestone; `None` if no disk can be mounted.
fn on_a_full_disk(sandbox: &Sandbox, max_age: &str) -> Option<(SmallDisk, Process)> {
    let disk = SmallDisk::new(64)?;
    symlink(disk.path(), sandbox.path("runs")).expect("the sandbox has no runs yet");
    let coordinator = sandbox.coordinator(&["--set", &format!("checkpoint.max_age={max_age}")]);
    coordinator.says(UNDER_WAY);
    disk.fill();
    coordinator.says("ALARM");
    Some((disk, coordinator))
}

/// D9: a full disk ended the coordinator, and it could not be started on one.
#[test]
fn a_full_disk_is_waited_for() {
    let sandbox = Sandbox::new();
    let Some((disk, coordinator)) = on_a_full_disk(&sandbox, "1min") else { return };
    coordinator.kill();
    let next = sandbox.coordinator(&[]);
    next.says("waiting for it");
    disk.free();
    next.succeeds();
    assert_undisturbed(&sandbox);
}

/// D9: a run does not wait for a full disk forever.
#[test]
fn a_disk_that_stays_full_ends_the_run() {
    let sandbox = Sandbox::new();
    let Some((disk, coordinator)) = on_a_full_disk(&sandbox, "3s") else { return };
    let ended = coordinator.ends();
    assert_eq!(ended.code, Some(1), "{}", ended.output);
    assert!(ended.output.contains("free space"), "{}", ended.output);
    let ended = sandbox.coordinator(&["--set", "checkpoint.max_age=3s"]).ends();
    assert_eq!(ended.code, Some(1), "{}", ended.output);
    disk.free();
    sandbox.coordinator(&[]).succeeds();
    assert_undisturbed(&sandbox);
}

/// D6: a trainer that was stuck while its agent lived was noticed only after ten minutes.
#[test]
fn a_frozen_trainer_is_noticed_within_seconds() {
    let sandbox = Sandbox::new();
    let fast = ["--set", "train.iterations=400", "--set", "cluster.dead_after=4s"];
    let coordinator = lone_coordinator(&sandbox, &fast);
    let address = coordinator.address();
    let well = sandbox.worker(&address, "well");
    let frozen = sandbox.worker(&address, "frozen");
    coordinator.says(": 2 workers train from step");
    coordinator.says("checkpoint step-00000020");
    let Some(freezer) = freeze_thread(frozen.pid(), "trainer") else { return };
    let began = Instant::now();
    let line = coordinator.says("worker frozen is lost");
    assert!(line.contains("stuck") || line.contains("did not leave its group"), "{line}");
    coordinator.says(": 1 worker trains from step");
    eprintln!("the other one trained again {:.1?} after the trainer froze", began.elapsed());
    drop(freezer);
    coordinator.succeeds();
    well.succeeds();
    frozen.ends();
}

/// D6: a frozen trainer of a single worker was never noticed, although another worker was waiting.
#[test]
fn a_waiting_worker_takes_over_from_a_frozen_one() {
    let sandbox = Sandbox::new();
    // One micro-batch per update: the second worker can only wait.
    let one =
        ["--set", "train.iterations=200", "--set", "train.sequences=4", "--set", "cluster.dead_after=4s"];
    let coordinator = lone_coordinator(&sandbox, &one);
    let address = coordinator.address();
    let frozen = sandbox.worker(&address, "a-frozen");
    coordinator.says("checkpoint step-00000010");
    let waiting = sandbox.worker(&address, "b-waiting");
    coordinator.says("worker b-waiting joined");
    let Some(freezer) = freeze_thread(frozen.pid(), "trainer") else { return };
    let began = Instant::now();
    coordinator.says("worker a-frozen is lost");
    coordinator.says(": 1 worker trains from step");
    eprintln!("the waiting one trained {:.1?} after the other's trainer froze", began.elapsed());
    coordinator.succeeds();
    waiting.succeeds();
    drop(freezer);
    frozen.ends();
}

/// D7: a damaged milestone made a run that could not end.
#[test]
fn a_damaged_milestone_is_trained_again() {
    for what in ["a flipped bit", "a folder that is gone"] {
        let sandbox = Sandbox::new();
        let coordinator = sandbox.coordinator(&[]);
        // All milestones exist, but the average does not.
        coordinator.says("checkpoint step-00000060-g1 stored");
        coordinator.kill();
        let run = sandbox.run("tiny");
        until("its worker to be gone", || {
            for pid in run.local_workers().into_values() {
                rustix::process::kill_process(pid, Signal::KILL).ok();
            }
            (!run.path().join("results/average.json").exists()).then_some(())
        });
        let folder = run.path().join("checkpoints/step-00000050-g1");
        match what {
            "a flipped bit" => flip_bit(&folder.join("model.safetensors")),
            _ => fs::remove_dir_all(&folder).expect("it is there"),
        }
        let said = sandbox.coordinator(&["--set", "cluster.rejoin_window=1s"]).succeeds();
        assert!(said.contains("training again for the milestone of step 50"), "{what}: {said}");
        assert_undisturbed_but(&sandbox, "step-00000050-g1");
    }
}

/// Like [`assert_undisturbed`], apart from a damaged checkpoint that is still in its place.
fn assert_undisturbed_but(sandbox: &Sandbox, damaged: &str) {
    fs::remove_dir_all(sandbox.run("tiny").path().join("checkpoints").join(damaged)).ok();
    assert_undisturbed(sandbox);
}

/// D8: a run without its database silently began in the middle.
#[test]
fn a_lost_database_stops_the_run_and_is_rebuilt_when_asked() {
    for truncated in [false, true] {
        let sandbox = Sandbox::new();
        interrupted(&sandbox);
        let run = sandbox.run("tiny");
        for suffix in ["", "-wal", "-shm"] {
            fs::remove_file(run.path().join(format!("run.sqlite{suffix}"))).ok();
        }
        if truncated {
            fs::write(run.path().join("run.sqlite"), []).expect("it can be written");
        }
        let ended = sandbox.coordinator(&[]).ends();
        assert_eq!(ended.code, Some(5), "{}", ended.output);
        assert!(ended.output.contains("coordinator --plan plan.toml --recover"), "{}", ended.output);
        let said = sandbox.coordinator(&["--recover"]).succeeds();
        assert!(said.contains("rebuilt from"), "{said}");
        assert!(!said.contains("from step 0 of"), "{said}");
        assert_undisturbed(&sandbox);
        let generations = run.generations();
        assert!(generations.keys().any(|generation| *generation > 1000), "{generations:?}");
    }
}

/// D14: rebuilding the database of a run without an intact checkpoint silently started the run over.
#[test]
fn a_lost_database_beside_damaged_checkpoints_stops_the_run() {
    let sandbox = Sandbox::new();
    interrupted(&sandbox);
    let run = sandbox.run("tiny");
    for suffix in ["", "-wal", "-shm"] {
        fs::remove_file(run.path().join(format!("run.sqlite{suffix}"))).ok();
    }
    let checkpoints = run.checkpoints().into_iter().map(|name| run.path().join("checkpoints").join(name));
    let checkpoints: Vec<_> = checkpoints.collect();
    for checkpoint in &checkpoints {
        flip_bit(&checkpoint.join("model.safetensors"));
    }
    let ended = sandbox.coordinator(&["--recover"]).ends();
    assert_eq!(ended.code, Some(5), "{}", ended.output);
    assert!(ended.output.contains("--recover --from-start"), "{}", ended.output);
    // A run of which only the metrics are left is not forgotten either.
    let kept = sandbox.path("kept");
    fs::rename(run.path().join("checkpoints"), &kept).expect("they are there");
    let ended = sandbox.coordinator(&[]).ends();
    assert_eq!(ended.code, Some(5), "{}", ended.output);
    assert!(ended.output.contains("metrics.csv has"), "{}", ended.output);
    let said = sandbox.coordinator(&["--from-start"]).succeeds();
    assert!(said.contains("from step 0 of 60"), "{said}");
    assert_undisturbed(&sandbox);
}

/// D10: a worker that was asked to leave died in the middle of a step.
#[test]
fn a_worker_that_is_asked_to_leave_hands_over() {
    let sandbox = Sandbox::new();
    let coordinator = lone_coordinator(&sandbox, &[]);
    let address = coordinator.address();
    let stays = sandbox.worker(&address, "stays");
    let leaves = sandbox.worker(&address, "leaves");
    coordinator.says(": 2 workers train from step");
    leaves.signal(Signal::TERM);
    assert_eq!(leaves.ends().code, Some(130));
    coordinator.says("worker leaves has left as requested");
    let said = coordinator.succeeds();
    assert!(!said.contains("worker leaves is lost"), "{said}");
    stays.succeeds();
    assert_undisturbed(&sandbox);
}

/// D10: all workers that are asked to leave at once save what they have.
#[test]
fn nothing_is_lost_when_all_workers_are_asked_to_leave() {
    let sandbox = Sandbox::new();
    let coordinator =
        lone_coordinator(&sandbox, &["--set", "checkpoint.every=30", "--set", "checkpoint.average=1"]);
    let address = coordinator.address();
    let workers = [sandbox.worker(&address, "a"), sandbox.worker(&address, "b")];
    coordinator.says(": 2 workers train from step");
    coordinator.says("step ");
    for worker in &workers {
        worker.signal(Signal::TERM);
    }
    for worker in workers {
        assert_eq!(worker.ends().code, Some(130));
    }
    let run = sandbox.run("tiny");
    let done = run.steps_so_far();
    let stored = coordinator.says(&format!("checkpoint step-{done:08}"));
    assert!(stored.contains("stored"), "{stored}");
    let next = sandbox.worker(&address, "next");
    coordinator.says(&format!("1 worker trains from step {done} of 60"));
    coordinator.succeeds();
    next.succeeds();
}

/// D10: a coordinator that is asked to leave lets its workers train on.
#[test]
fn workers_train_on_when_the_coordinator_is_replaced() {
    let sandbox = Sandbox::new();
    let coordinator = lone_coordinator(&sandbox, &[]);
    let address = coordinator.address();
    let worker = sandbox.worker(&address, "a");
    coordinator.says(UNDER_WAY);
    coordinator.signal(Signal::TERM);
    let ended = coordinator.ends();
    assert_eq!(ended.code, Some(130), "{}", ended.output);
    assert!(ended.output.contains("left the workers to the next coordinator"), "{}", ended.output);
    let listen = ["--plan", "plan.toml", "--listen", &address, "--set", "local.workers=0"];
    sandbox.coordinator_bare(&listen).succeeds();
    worker.succeeds();
    assert_eq!(sandbox.run("tiny").generations().len(), 1, "the group was not disturbed");
    assert_undisturbed(&sandbox);
}

/// D13: workers ended with 0 when the run had failed.
#[test]
fn workers_end_as_their_run_does() {
    let sandbox = Sandbox::new();
    let coordinator = lone_coordinator(&sandbox, &["--set", "prepare.paths=[\"nowhere\"]"]);
    let worker = sandbox.worker(&coordinator.address(), "a");
    let ended = coordinator.ends();
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert_eq!(worker.ends().code, ended.code);
}

/// D14: a run with only damaged checkpoints started over at step 0.
#[test]
fn a_run_without_a_good_checkpoint_stops_unless_told_otherwise() {
    let sandbox = Sandbox::new();
    interrupted(&sandbox);
    let run = sandbox.run("tiny");
    for checkpoint in run.checkpoints() {
        flip_bit(&run.path().join("checkpoints").join(checkpoint).join("model.safetensors"));
    }
    let ended = sandbox.coordinator(&[]).ends();
    assert_eq!(ended.code, Some(5), "{}", ended.output);
    assert!(ended.output.contains("--from-start"), "{}", ended.output);
    let damaged = run.checkpoints();
    let said = sandbox.coordinator(&["--from-start"]).succeeds();
    assert!(said.contains("from step 0 of 60"), "{said}");
    for checkpoint in damaged {
        fs::remove_dir_all(run.path().join("checkpoints").join(checkpoint)).expect("it is there");
    }
    assert_undisturbed(&sandbox);
}

/// D14: a run with only damaged checkpoints stopped once, and the next start started it over.
#[test]
fn a_run_whose_checkpoints_are_all_damaged_stops_every_time() {
    let sandbox = Sandbox::new();
    interrupted(&sandbox);
    let run = sandbox.run("tiny");
    for name in run.checkpoints() {
        flip_bit(&run.path().join("checkpoints").join(name).join("model.safetensors"));
    }
    for _ in 0..3 {
        let ended = sandbox.coordinator(&[]).ends();
        assert_eq!(ended.code, Some(5), "{}", ended.output);
        assert!(ended.output.contains("--from-start"), "{}", ended.output);
    }
    sandbox.coordinator(&["--from-start"]).succeeds();
    assert_undisturbed(&sandbox);
}

/// D8: an older copy of the database was used, and its generations were assigned a second time.
#[test]
fn an_older_copy_of_the_database_is_refused_and_rebuilt_when_asked() {
    let sandbox = Sandbox::new();
    interrupted(&sandbox);
    let run = sandbox.run("tiny");
    let database = run.path().join("run.sqlite");
    let older = fs::read(&database).expect("it is there");
    let coordinator = sandbox.coordinator(&[]);
    coordinator.says("trains from step");
    coordinator.says("checkpoint step-00000040-g2 stored");
    coordinator.signal(Signal::INT);
    coordinator.ends();
    fs::write(&database, older).expect("it can be written");
    let ended = sandbox.coordinator(&[]).ends();
    assert_eq!(ended.code, Some(5), "{}", ended.output);
    assert!(ended.output.contains("older copy"), "{}", ended.output);
    let said = sandbox.coordinator(&["--recover"]).succeeds();
    assert!(said.contains("it is kept as"), "{said}");
    assert_undisturbed(&sandbox);
}

/// Leftovers of a refused start kept the right plan out, and a plan that had prepared nothing could not be corrected.
#[test]
fn a_start_that_is_refused_changes_no_plan() {
    let sandbox = Sandbox::new();
    let mistaken = ["--set", "prepare.paths=[\"corpsu\"]"];
    let ended = sandbox.coordinator(&mistaken).ends();
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    interrupted(&sandbox);
    let kept = sandbox.run("tiny").path().join("plan.resolved.toml");
    fs::remove_file(&kept).expect("it is there");
    let ended = sandbox.coordinator(&["--set", "run.seed=5"]).ends();
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(!kept.exists(), "it belongs to a plan that was refused");
    sandbox.coordinator(&[]).succeeds();
    assert!(kept.exists());
    assert_undisturbed(&sandbox);
}

/// A finished run named an export that no longer existed.
#[test]
fn what_a_finished_run_has_lost_is_made_again() {
    let sandbox = Sandbox::new();
    sandbox.coordinator(&[]).succeeds();
    let run = sandbox.run("tiny");
    let before = fs::read(run.path().join("export/model.safetensors")).expect("it was exported");
    for lost in ["export", "average"] {
        fs::remove_dir_all(run.path().join(lost)).expect("it is there");
        let said = sandbox.coordinator(&[]).succeeds();
        assert!(said.contains("is done again"), "{said}");
        assert!(run.path().join(lost).join("model.safetensors").exists());
    }
    assert_eq!(fs::read(run.path().join("export/model.safetensors")).expect("it is there"), before);
    let said = sandbox.coordinator(&["--set", "evaluate.text=8KiB"]).succeeds();
    assert!(said.contains("changes of its plan have no effect"), "{said}");
    assert!(run.read("plan.resolved.toml").contains("text = \"16"), "{}", run.read("plan.resolved.toml"));
}

/// After the lock was deleted, a second coordinator could start, and both led the run.
#[test]
fn a_coordinator_without_its_lock_gives_way() {
    let sandbox = Sandbox::new();
    let coordinator = sandbox.coordinator(&["--set", "train.iterations=2000", "--set", "train.warmup=10"]);
    coordinator.says("trains from step");
    fs::remove_file(sandbox.run("tiny").path().join("lock")).expect("it is there");
    let ended = coordinator.ends();
    assert_eq!(ended.code, Some(4), "{}", ended.output);
}
