//! Stages that a plan adds: evaluations and benchmarks, done by whoever has nothing to train.

use ulmus_tests::{Process, Sandbox, TINY, repository, until, write_examples};

/// Which text comes next, for every milestone and the average.
const NEXT: &str = r#"
[[evaluation]]
name = "next"
of = ["milestones", "average"]
tasks = ["next_text"]
"#;

/// A sandbox with the tiny plan and more stages.
fn with(stages: &str) -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("plan.toml", [TINY, stages].concat());
    sandbox
}

/// Starts a coordinator for a run with enough held-out text.
fn coordinator(sandbox: &Sandbox, more: &[&str]) -> Process {
    sandbox.coordinator(&[&["--set", "evaluate.text=64KiB"], more].concat())
}

/// Starts a worker that only serves jobs.
fn server(sandbox: &Sandbox, address: &str, name: &str) -> Process {
    let first = ["--join", address, "--name", name, "--threads", "1", "--device", "cpu"];
    sandbox.worker_bare(&[&first[..], &["--only", "jobs"]].concat())
}

#[test]
fn milestones_are_measured_and_drawn() {
    let sandbox = with(NEXT);
    let said = coordinator(&sandbox, &[]).succeeds();
    let run = sandbox.run("tiny");
    let found = run.json("results/next/average.json");
    let accuracy = found["results"]["next_text"]["acc,none"].as_f64().expect("an accuracy");
    assert!((0.0..=1.0).contains(&accuracy), "{found}");
    assert!(said.contains("next_text, acc "), "{said}");
    let figure = run.json("results/next/milestones.json");
    let points = figure["tasks"]["next_text"]["acc"].as_array().expect("a list of milestones");
    let steps: Vec<u64> = points.iter().filter_map(|point| point["step"].as_u64()).collect();
    assert_eq!(steps, [10, 20, 30, 40, 50, 60], "{figure}");
    let svg = run.read("results/next/milestones.svg");
    assert!(svg.starts_with("<svg") && svg.contains("next_text, acc_norm"), "{svg}");
    // The same numbers, whoever computes them.
    let other = with(NEXT);
    coordinator(&other, &["--set", "local.workers=2"]).succeeds();
    assert_eq!(other.run("tiny").json("results/next/milestones.json"), figure);
}

#[test]
fn models_are_exported_where_a_stage_names_them() {
    let sandbox = with(
        "[[export]]\nname = \"same\"\nof = \"average\"\n[[export]]\nname = \"release\"\nof = [\"last\", \"average\"]\ndtype = \"bf16\"\n",
    );
    sandbox.coordinator(&[]).succeeds();
    let run = sandbox.run("tiny");
    let weights =
        |folder: &str| std::fs::read(run.path().join(folder).join("model.safetensors")).expect("it is there");
    assert!(weights("exports/same/average") == weights("export"), "the average is the average");
    let (whole, half) = (weights("export").len(), weights("exports/release/average").len());
    assert!(half < whole * 6 / 10, "{half} of {whole} bytes");
    assert_eq!(run.json("exports/release/last/config.json")["torch_dtype"], "bfloat16");
    let card = run.read("exports/release/last/README.md");
    assert!(card.contains("Its weights are those after step 60."), "{card}");
    assert!(
        card.contains("\n## Results\n\n| measure | value |\n|---|---|\n| loss on held-out text, "),
        "{card}"
    );
    let generate =
        ["generate", "--model", "runs/tiny/exports/release/last", "--prompt", "a", "--max-tokens", "4"];
    sandbox.evaluator(&generate).succeeds();
}

#[test]
fn a_finished_run_does_the_stages_that_its_plan_gets_later() {
    let sandbox = with("");
    coordinator(&sandbox, &[]).succeeds();
    let before = sandbox.run("tiny").bits();
    sandbox.write("plan.toml", [TINY, NEXT].concat());
    let said = coordinator(&sandbox, &[]).succeeds();
    assert!(said.contains("next/average done") && !said.contains("workers train"), "{said}");
    sandbox.run("tiny").bits().assert_equal(&before);
    let again = coordinator(&sandbox, &[]).succeeds();
    assert!(!again.contains("next/average done"), "{again}");
}

/// Two kinds of arithmetic: the run has the bits of the one that trains, and the other measures its models.
#[test]
fn who_only_serves_jobs_measures_what_others_train() {
    let bench = "[[bench]]\nname = \"speed\"\nof = \"average\"\nprompt = 4\ngenerate = 4\nruns = 1\n";
    let plan = [NEXT, bench].concat();
    let bf16 = ["--set", "local.workers=0", "--set", "train.precision=bf16"];
    let alone = with("");
    alone.coordinator(&["--set", "train.precision=bf16"]).succeeds();

    let mut sandbox = with(&plan);
    let coordinator = sandbox.coordinator(&bf16);
    let address = coordinator.address();
    let trains = sandbox.worker(&address, "trainer");
    coordinator.says("worker trainer joined");
    sandbox.set_environment(&[("ULMUS_SIMD", "baseline")]);
    let serves = server(&sandbox, &address, "server");
    // It computes other bits where the processor has instructions for bf16, and is not admitted for training then. Elsewhere it
    // would train, slowly.
    let mut stranger = sandbox.worker(&address, "stranger");
    let is_admitted = until("whether the stranger is admitted", || {
        let joined = coordinator.said().contains("worker stranger joined");
        (joined || stranger.has_ended().is_some()).then_some(joined)
    });
    if is_admitted {
        stranger.kill();
    } else {
        let refused = stranger.ends();
        assert_eq!(refused.code, Some(3), "{}", refused.output);
        assert!(refused.output.contains("let it serve jobs alone with --only jobs"), "{}", refused.output);
    }
    let said = coordinator.succeeds();
    for stage in ["next/average on ", "next/step-00000060 on ", "speed/average on ", "benchmark on "] {
        let by: Vec<&str> = said.lines().filter(|line| line.starts_with(stage)).collect();
        assert!(by.len() == 1 && by[0].contains(" on server: "), "{stage}: {by:?}\n{said}");
    }
    assert!(serves.succeeds().contains("for jobs alone"));
    trains.succeeds();
    sandbox.run("tiny").bits().assert_equal(&alone.run("tiny").bits());
}

/// The parts are put together to the same numbers.
#[test]
fn workers_that_have_nothing_else_to_do_share_an_evaluation() {
    let stage = NEXT.replace(r#"["milestones", "average"]"#, "\"last\"");
    let alone = with(&stage);
    coordinator(&alone, &[]).succeeds();
    let sandbox = with(&stage);
    let shared = coordinator(&sandbox, &["--set", "local.workers=0"]);
    let address = shared.address();
    let servers = ["one", "two"].map(|name| server(&sandbox, &address, name));
    for name in ["one", "two"] {
        shared.says(&format!("worker {name} joined"));
    }
    let trainer = sandbox.worker(&address, "trainer");
    let said = shared.succeeds();
    for part in ["next/last/part-1-of-2 done", "next/last/part-2-of-2 done", "next/last done"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(
        sandbox.run("tiny").json("results/next/last.json"),
        alone.run("tiny").json("results/next/last.json")
    );
    trainer.succeeds();
    for server in servers {
        server.succeeds();
    }
}

/// Of an evaluation that is shared, too.
#[test]
fn without_held_out_text_its_task_is_skipped() {
    let sandbox = with(&NEXT.replace(r#"["milestones", "average"]"#, "\"last\""));
    let said = sandbox.coordinator(&["--set", "evaluate.text=0", "--set", "local.workers=2"]).succeeds();
    assert!(said.contains("next/last is skipped: evaluate.text is 0"), "{said}");
}

#[test]
fn a_stage_that_nobody_can_serve_is_pending_and_then_skipped() {
    let stage = NEXT.replace("next_text\"]", "next_text\"]\ndevice = \"*RTX 4090*\"\nwait = \"1s\"");
    let sandbox = with(&stage);
    let said = sandbox.coordinator(&[]).succeeds();
    let pending = "next is pending: no worker with a device like \"*RTX 4090*\"; connected: cpu, 1 thread, ";
    assert!(said.contains(pending), "{said}");
    assert!(
        said.contains("next/average is skipped: no worker with a device like \"*RTX 4090*\" came within 1 s"),
        "{said}"
    );
    assert!(said.contains("benchmark done"), "{said}");
    let of = |name: &str| said.find(name).unwrap_or_else(|| panic!("{name}: {said}"));
    assert!(of("benchmark done") < of("ALARM: next is skipped"), "{said}");
}

#[test]
fn an_evaluation_that_fails_costs_nothing_else() {
    let data = repository().join("tests/golden/evaluation/data");
    let data = data.to_str().expect("a path of tests is text");
    let stage = "[[evaluation]]\nname = \"tasks\"\nof = \"last\"\ntasks = [\"boolq\"]\nlimit = 2\ndata = [\"nowhere\"]\n";
    let sandbox = with(stage);
    std::fs::create_dir(sandbox.path("nowhere")).expect("a folder can be made");
    let checked = sandbox.coordinator_bare(&["--plan", "plan.toml", "--check", "sources"]).ends();
    assert_eq!(checked.code, Some(2), "{}", checked.output);
    assert!(checked.output.contains("evaluation.0.data"), "{}", checked.output);
    let failed = sandbox.coordinator(&[]).ends();
    assert_eq!(failed.code, Some(2), "{}", failed.output);
    for told in ["boolq has no rows", "everything else is done", "benchmark done"] {
        assert!(failed.output.contains(told), "{told}: {}", failed.output);
    }
    let said = sandbox.coordinator(&["--set", &format!("evaluation.tasks.data=[{data:?}]")]).succeeds();
    assert!(said.contains("tasks/last done") && !said.contains("benchmark done"), "{said}");
}

/// The first is found by who makes the examples, before anything trains.
#[test]
fn an_adapter_to_go_on_from_must_fit_and_may_not_change() {
    let sandbox = Sandbox::new();
    write_examples(&sandbox.path(""));
    let golden = repository().join("tests/golden");
    std::fs::create_dir(sandbox.path("adapter")).expect("a folder can be made");
    let copy = |from: &str| {
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let from = golden.join("tune/peft/lora").join(from).join(name);
            std::fs::copy(from, sandbox.path("adapter").join(name)).expect("a file can be copied");
        }
    };
    copy("initial");
    let base = golden.join("tiny").display().to_string();
    let plan = |rank: usize| {
        let stage = |more: &str| {
            format!(
                "[[tune]]\nof = \"base\"\nbatch = 8\nmax_length = 96\n{more}\n[[tune.data]]\nurl = \"answers.jsonl\"\n"
            )
        };
        let (before, on) = (stage("name = \"before\"\nsteps = 400"), stage("name = \"on\""));
        format!(
            "[run]\nname = \"on\"\n[local]\nworkers = 1\n[base]\nmodel = {base:?}\n{before}{on}\
             [tune.adapter]\nrank = {rank}\nalpha = 16\nfrom = \"adapter\"\n"
        )
    };
    sandbox.write("plan.toml", plan(4));
    let refused = sandbox.coordinator(&[]).ends();
    assert_eq!(refused.code, Some(2), "{}", refused.output);
    let told = "tune on: the adapter in adapter has other ranks, scales or targets than [tune.adapter]";
    assert!(refused.output.contains(told), "{}", refused.output);

    sandbox.write("plan.toml", plan(8));
    let coordinator = sandbox.coordinator(&["--set", "run.name=\"changed\""]);
    coordinator.says("on-examples done");
    copy("final");
    let failed = coordinator.ends();
    assert_eq!(failed.code, Some(2), "{}", failed.output);
    let told = "adapter.from names adapter, and what is there is not what was there when the run began";
    assert!(failed.output.contains(told), "{}", failed.output);
}
