//! Runs in an object store give the same bits as on a disk, whatever is killed. The store is versitygw, which `.ci/run stores`
//! installs.

use rustix::process::{Signal, kill_process};
use ulmus_tests::{Cloud, Sandbox};

#[test]
#[ignore = "needs versitygw: .ci/run stores"]
fn a_run_in_an_object_store_has_the_same_bits_whatever_is_killed() {
    let on_disk = Sandbox::new();
    on_disk.coordinator(&[]).succeeds();

    let mut cloud = Cloud::beside(Sandbox::new());
    let coordinator = cloud.coordinator(&["--set", "local.workers=2"]);
    coordinator.says("checkpoint step-00000010-g1 stored");
    // Forming a group reads the store, and waits for it.
    cloud.stop_server();
    kill_process(cloud.run("tiny").local_workers()["local-1"], Signal::KILL).expect("it trains");
    coordinator.says("worker local-1 is lost");
    cloud.start_server();
    coordinator.says("checkpoint step-00000020");
    coordinator.kill();
    for pid in cloud.run("tiny").local_workers().into_values() {
        kill_process(pid, Signal::KILL).expect("it outlives its coordinator");
    }
    let said = cloud.coordinator(&["--set", "local.workers=2"]).succeeds();
    assert!(
        said.contains("/s3://runs/of/a team/tiny/export") || said.contains("s3://runs/of/a team/tiny/export"),
        "{said}"
    );
    cloud.run("tiny").bits().assert_equal(&on_disk.run("tiny").bits());
    // The coordinator's disk has only its own files; everything else is only in the store.
    let own = cloud.sandbox.run("tiny");
    assert!(cloud.run("tiny").generations().len() > 1 && !own.path().join("checkpoints").exists());
    // `explain` works with the store.
    let explain = |sandbox: &Sandbox, url: &str| {
        let step = ["explain", "--plan", "plan.toml", "--step", "42", "--sequence", "3", "--set", url];
        sandbox.dataloader(&step).succeeds()
    };
    assert_eq!(explain(&cloud.sandbox, "store.url=s3://runs/of/a team"), explain(&on_disk, "store.url=runs"));
    for other in ["runs", "s3://runs/of/another team"] {
        let moved = cloud.coordinator(&["--set", &format!("store.url={other}")]).ends();
        assert_eq!(moved.code, Some(3), "{}", moved.output);
        assert!(moved.output.contains("runs/tiny has a run that is not kept in"), "{}", moved.output);
    }
}

#[test]
#[ignore = "needs versitygw: .ci/run stores"]
fn whoever_cannot_reach_the_store_or_comes_second_is_refused() {
    let mut cloud = Cloud::beside(Sandbox::new());
    let coordinator = cloud.coordinator(&["--set", "local.workers=0"]);
    let address = coordinator.address();
    // Another coordinator with its own files elsewhere would start over the run in the store.
    let second = cloud.coordinator(&["--set", "store.local=elsewhere"]).ends();
    assert_eq!(second.code, Some(3), "{}", second.output);
    assert!(
        second.output.contains("has its own files elsewhere than in elsewhere/tiny"),
        "{}",
        second.output
    );
    let bucket = ["--set", "store.url=s3://no-such-bucket", "--set", "run.name=other"];
    let nowhere = cloud.sandbox.coordinator(&bucket).ends();
    assert_eq!(nowhere.code, Some(2), "{}", nowhere.output);
    assert!(nowhere.output.contains("there is no such bucket"), "{}", nowhere.output);
    // That does not prevent a run with the same name from being kept elsewhere.
    for _ in 0..2 {
        cloud.sandbox.coordinator(&["--set", "run.name=other"]).succeeds();
    }

    cloud.admit(false);
    let refused = cloud.sandbox.worker(&address, "stranger").ends();
    assert_ne!(refused.code, Some(0), "{}", refused.output);
    assert!(
        refused.output.contains("no access to s3://runs/of/a team/tiny/coordinator.nonce"),
        "{}",
        refused.output
    );
    assert!(refused.output.contains("SignatureDoesNotMatch"), "{}", refused.output);
    cloud.admit(true);
    let member = cloud.sandbox.worker(&address, "member");
    coordinator.says("1 worker trains from step 0 of 60");
    coordinator.succeeds();
    member.succeeds();
}
