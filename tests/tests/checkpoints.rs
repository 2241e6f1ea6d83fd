//! The second promise: a damaged checkpoint is never used, and the run continues from the one before it to the same
//! bits.

use std::fs;
use std::path::Path;

use rustix::process::Signal;
use ulmus_tests::{Process, Sandbox};

/// A kind of damage.
struct Damage {
    name: &'static str,
    /// Damages a checkpoint in this folder.
    done: fn(&Path),
    /// What the message about it contains besides the name of the checkpoint.
    told: &'static str,
}

const DAMAGES: [Damage; 4] = [
    Damage {
        name: "a flipped bit in the weights",
        done: |folder| flip_bit(&folder.join("model.safetensors"), 100_000),
        told: "model.safetensors",
    },
    Damage {
        name: "a flipped bit in the manifest",
        done: |folder| flip_bit(&folder.join("manifest.json"), 30),
        told: "manifest.json",
    },
    Damage {
        name: "a missing file",
        done: |folder| fs::remove_file(folder.join("optimizer-00000.safetensors")).expect("it is there"),
        told: "optimizer-00000.safetensors",
    },
    Damage {
        name: "a cut file",
        done: |folder| {
            let path = folder.join("state.json");
            let content = fs::read(&path).expect("it is there");
            fs::write(&path, &content[..content.len() / 2]).expect("it can be written");
        },
        told: "state.json",
    },
];

fn flip_bit(path: &Path, byte: usize) {
    let mut content = fs::read(path).expect("the file is there");
    content[byte] ^= 1;
    fs::write(path, content).expect("it can be written");
}

/// Runs until the third milestone is stored, and stops. Two signals at once are one, which saves.
fn interrupt(coordinator: Process) {
    coordinator.says("checkpoint step-00000030-g1 stored");
    coordinator.signal(Signal::INT);
    coordinator.signal(Signal::INT);
    let ended = coordinator.ends();
    assert_eq!(ended.code, Some(130), "{}", ended.output);
}

#[test]
fn a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used() {
    let whole = Sandbox::new();
    whole.coordinator(&[]).succeeds();
    let undisturbed = whole.run("tiny").bits();

    let stopped = Sandbox::new();
    interrupt(stopped.coordinator(&[]));
    for Damage { name, done, told } in DAMAGES {
        let sandbox = Sandbox::copy_of(&stopped);
        let run = sandbox.run("tiny");
        let mut checkpoints = run.checkpoints();
        let newest = checkpoints.pop().expect("a checkpoint");
        let before = checkpoints.pop().expect("another one");
        done(&run.path().join("checkpoints").join(&newest));

        let said = sandbox.coordinator(&[]).succeeds();
        let names = [told, newest.as_str(), before.as_str()];
        let mut lines = said.lines();
        assert!(lines.any(|line| names.iter().all(|name| line.contains(name))), "{name}: {said}");
        run.bits().assert_equal(&undisturbed);
    }
}

/// Here all milestones of the run are averaged, including those that were damaged and recreated.
#[test]
fn when_every_checkpoint_is_damaged_the_run_begins_anew_if_told_to() {
    let all = ["--set", "checkpoint.average=6"];
    let whole = Sandbox::new();
    whole.coordinator(&all).succeeds();

    let sandbox = Sandbox::new();
    interrupt(sandbox.coordinator(&all));
    let run = sandbox.run("tiny");
    let checkpoints = run.checkpoints();
    assert!(checkpoints.len() > 3, "{checkpoints:?}");
    for name in &checkpoints {
        flip_bit(&run.path().join("checkpoints").join(name).join("model.safetensors"), 100_000);
    }
    let ended = sandbox.coordinator(&all).ends();
    assert_eq!(ended.code, Some(5), "{}", ended.output);
    for name in &checkpoints {
        assert!(
            ended.output.contains(&format!("checkpoint {name}")),
            "{name} is not named: {}",
            ended.output
        );
    }
    let said = sandbox.coordinator(&[&all[..], &["--from-start"]].concat()).succeeds();
    assert!(said.contains("starting over") && said.contains("1 worker trains from step 0"), "{said}");
    run.bits().assert_equal(&whole.run("tiny").bits());
}
