//! A whole chain of one plan: pretraining, its average, tuning by answers, by preferences and of an adapter, and what is measured
//! of all of them. It gives the same bits whoever takes part in it, and whatever is killed.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use rustix::process::{Signal, kill_process};
use ulmus_tests::{CHAIN, Cloud, Process, RunFolder, Sandbox, TINY, TUNED, write_examples};

/// A sandbox with the plan of a chain, and what it learns from.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("plan.toml", [TINY, CHAIN].concat());
    write_examples(&sandbox.path(""));
    sandbox
}

/// The bits of an undisturbed chain on one worker.
fn undisturbed() -> &'static Vec<Vec<String>> {
    static BITS: OnceLock<Vec<Vec<String>>> = OnceLock::new();
    BITS.get_or_init(|| {
        let sandbox = sandbox();
        sandbox.coordinator(&[]).succeeds();
        bits(&sandbox.run("tiny"))
    })
}

fn bits(run: &RunFolder) -> Vec<Vec<String>> {
    assert_eq!(run.bits().steps(), 60);
    TUNED.iter().map(|stage| run.tuned(stage)).collect()
}

fn assert_undisturbed(run: &RunFolder) {
    for ((found, expected), stage) in bits(run).iter().zip(undisturbed()).zip(TUNED) {
        assert_same(found, expected, stage);
    }
}

fn assert_same(found: &[String], expected: &[String], stage: &str) {
    let differs = found.iter().zip(expected).find(|(found, expected)| found != expected);
    assert_eq!(differs, None, "the first difference in {stage}");
    assert_eq!(found.len(), expected.len(), "{stage}");
}

#[test]
fn a_chain_tunes_and_measures_what_it_has_trained() {
    undisturbed();
    let sandbox = sandbox();
    let said = sandbox.coordinator(&["--set", "local.workers=2", "--set", "evaluate.text=64KiB"]).succeeds();
    let run = sandbox.run("tiny");
    assert_undisturbed(&run);
    // Before the first update, and before the one whose learning rate is 0, no answer is likelier than before.
    let dpo = run.tuned("dpo");
    let margins = dpo[0].split(',').position(|column| column == "rewards/margins").expect("a column");
    let margin = |row: usize| dpo[row].split(',').nth(margins).map(str::to_owned);
    assert_eq!((margin(1).as_deref(), margin(2).as_deref()), (Some("0"), Some("0")), "{}", dpo[1]);
    assert!(margin(3).is_some_and(|margin| margin != "0"), "{}", dpo[3]);
    // An adapter is all that its checkpoints and its updates have.
    let config = run.json("tune/lora/adapter/adapter_config.json");
    assert_eq!((&config["peft_type"], &config["r"]), (&"LORA".into(), &4.into()));
    let size = |name: &str| std::fs::metadata(run.path().join(name)).expect("the file is there").len();
    let latest = run.read("tune/lora/latest");
    let (adapter, model) = (
        size(&format!("tune/lora/checkpoints/{}/model.safetensors", latest.trim())),
        size("average/model.safetensors"),
    );
    assert!(adapter < model / 5, "{adapter} of {model} bytes");
    // The adapted embedding is no longer the head.
    assert_eq!(run.json("tune/lora/export/config.json")["share_input_output_layers"], false);
    let shown = run.read("tune/sft/examples.txt");
    assert!(shown.contains("<|assistant|>") && shown.contains('\u{27e6}'), "{shown}");
    assert!(said.contains("tasks/lora done"), "{said}");
    let generate =
        ["generate", "--model", "runs/tiny/tune/lora/export", "--prompt", "a", "--max-tokens", "4"];
    sandbox.evaluator(&generate).succeeds();
    let chat =
        ["generate", "--model", "runs/tiny/tune/lora/export", "--chat", "--prompt", "a", "--max-tokens", "4"];
    sandbox.evaluator(&chat).succeeds();
    let adapter = "runs/tiny/tune/lora/adapter";
    let merge = ["merge", "--model", "runs/tiny/tune/dpo/export", "--adapter", adapter, "--to", "merged"];
    let said = sandbox.evaluator(&merge).succeeds();
    assert!(!said.contains("warning"), "{said}");
    let other = ["merge", "--model", "runs/tiny/tune/sft/export", "--adapter", adapter, "--to", "other"];
    let said_of_other = sandbox.evaluator(&other).succeeds();
    assert!(said_of_other.contains("was trained on other weights"), "{said_of_other}");
    let weights =
        |folder: &str| std::fs::read(sandbox.path(folder).join("model.safetensors")).expect("it is there");
    assert!(weights("merged") == weights("runs/tiny/tune/lora/export"), "the export is the merged model");
    let template = |folder: &str| {
        std::fs::read(sandbox.path(folder).join("chat_template.jinja")).expect("there is a template")
    };
    assert!(template("merged") == template(adapter), "the merged model speaks as the adapter was taught");
    let card = run.read("tune/lora/export/README.md");
    let learned = ["for 60 steps", "to imitate answers", "by preferences (DPO", "A LoRA adapter was trained"];
    let places = learned.map(|said| card.find(said).unwrap_or_else(|| panic!("{said} in {card}")));
    assert!(places.is_sorted(), "{card}");
    for data in ["answers.jsonl", "preferences.jsonl", "instructions.json"] {
        assert_eq!(card.matches(&format!("| {data} | ")).count(), 1, "{card}");
    }
    let permissions =
        |name: &str| std::fs::metadata(sandbox.path("merged").join(name)).expect("it is there").permissions();
    assert_eq!(permissions("model.safetensors"), permissions("config.json"));
    let results = run.json("tune/lora/results.json");
    assert_eq!((&results["of"], &results["rows"]["kept"]), (&"dpo".into(), &61.into()), "{results}");
}

#[test]
fn four_workers_that_join_give_the_same_bits() {
    let sandbox = sandbox();
    let set = ["--set", "local.workers=0", "--set", "cluster.min_workers=4"];
    let coordinator = sandbox.coordinator(&set);
    let address = coordinator.address();
    let workers: Vec<Process> =
        ["a", "b", "c", "d"].iter().map(|name| sandbox.worker(&address, name)).collect();
    coordinator.succeeds();
    for worker in workers {
        worker.succeeds();
    }
    assert_undisturbed(&sandbox.run("tiny"));
}

/// Kills one of the local workers.
fn kill_one(sandbox: &Sandbox, name: &str) {
    let pid = sandbox.run("tiny").local_workers()[name];
    kill_process(pid, Signal::KILL).expect("it is alive");
}

/// How many groups contributed updates to a training stage.
fn groups(run: &RunFolder, metrics: &str) -> usize {
    let metrics = run.read(metrics);
    let groups: BTreeSet<&str> =
        metrics.lines().skip(1).filter_map(|row| Some(row.rsplit_once(',')?.1)).collect();
    groups.len()
}

#[test]
fn a_worker_dies_in_every_stage_and_the_coordinator_once() {
    let sandbox = sandbox();
    let set = ["--set", "local.workers=3"];
    let coordinator = sandbox.coordinator(&set);
    coordinator.says("checkpoint step-00000010-g1 stored");
    kill_one(&sandbox, "local-1");
    coordinator.says("checkpoint sft/step-00000040");
    kill_one(&sandbox, "local-2");
    coordinator.says("on local-0: log-probabilities of the answers");
    kill_one(&sandbox, "local-0");
    coordinator.says("checkpoint dpo/step-00000040");
    coordinator.signal(Signal::KILL);
    coordinator.ends();
    let coordinator = sandbox.coordinator(&set);
    coordinator.says("checkpoint lora/step-00000040");
    kill_one(&sandbox, "local-1");
    coordinator.succeeds();
    assert_undisturbed(&sandbox.run("tiny"));
}

/// The whole mission in an object store: it has the bits of a run on a disk, and so has everything that is read of it.
#[test]
#[ignore = "needs versitygw: .ci/run chain"]
fn a_chain_in_an_object_store_is_the_same_whatever_is_killed() {
    let on_disk = sandbox();
    on_disk.coordinator(&["--set", "evaluate.text=64KiB"]).succeeds();
    let cloud = Cloud::beside(sandbox());
    let set = ["--set", "local.workers=3", "--set", "evaluate.text=64KiB"];
    let coordinator = cloud.coordinator(&set);
    for (moment, worker) in [
        ("checkpoint step-00000010-g1 stored", "local-1"),
        ("checkpoint sft/step-00000040", "local-2"),
        ("on local-0: log-probabilities of the answers", "local-0"),
        ("checkpoint dpo/step-00000040", "local-1"),
    ] {
        coordinator.says(moment);
        kill_one(&cloud.sandbox, worker);
    }
    coordinator.says("checkpoint dpo/step-00000080");
    coordinator.kill();
    let coordinator = cloud.coordinator(&set);
    coordinator.says("checkpoint lora/step-00000040");
    kill_one(&cloud.sandbox, "local-2");
    coordinator.succeeds();

    let (kept, expected) = (cloud.run("tiny"), on_disk.run("tiny"));
    kept.bits().assert_equal(&expected.bits());
    for (stage, expected) in TUNED.iter().zip(bits(&expected)) {
        assert_same(&kept.tuned(stage), &expected, stage);
        assert!(groups(&kept, &format!("tune/{stage}/metrics.csv")) > 1, "nobody was killed in {stage}");
    }
    assert!(groups(&kept, "metrics.csv") > 1, "nobody was killed in pretraining");
    for name in ["results/tasks/average.json", "results/tasks/lora.json"] {
        let (found, expected) = (kept.json(name), expected.json(name));
        assert_eq!(found["results"], expected["results"], "{name}");
        assert!(expected["results"]["next_text"]["acc,none"].is_number(), "{expected}");
    }
    for (name, expected) in expected.contents() {
        let name = name.to_str().expect("names of a run's files are text");
        // Only the coordinator reads these, and the names of checkpoints say which group has written them.
        let is_own = ["run.sqlite", "coordinator.pem", "join.token"].iter().any(|own| name.starts_with(own));
        if is_own || name.contains("checkpoints/") {
            continue;
        }
        let mut found = kept.stored(name).unwrap_or_else(|| panic!("{name} is not in the store"));
        // An adapter says where its base is.
        if name.ends_with("adapter_config.json") {
            let text = String::from_utf8(found).expect("JSON is text");
            assert!(text.contains("s3://runs/of/a team/tiny/tune/dpo/export"), "{text}");
            found = text.replace("s3://runs/of/a team/", "runs/").into_bytes();
        }
        let tells_of_times_or_groups = [".csv", "latest", "plan.resolved.toml", "average/manifest.json"]
            .iter()
            .any(|end| name.ends_with(end));
        assert!(
            tells_of_times_or_groups || name.starts_with("results/") || found == expected,
            "{name} differs"
        );
    }
}

#[test]
fn an_interrupted_stage_goes_on_and_a_changed_one_is_refused() {
    let sandbox = sandbox();
    let coordinator = sandbox.coordinator(&[]);
    coordinator.says("checkpoint dpo/step-00000040");
    coordinator.signal(Signal::INT);
    assert_eq!(coordinator.ends().code, Some(130));
    let changed = sandbox.coordinator(&["--set", "tune.sft.max_lr=2e-3"]).ends();
    assert_eq!(changed.code, Some(2), "{}", changed.output);
    assert!(changed.output.contains("[[tune]] sft has begun, and its "), "{}", changed.output);
    sandbox.coordinator(&[]).succeeds();
    assert_undisturbed(&sandbox.run("tiny"));
    // What has not begun may change, and a finished run does the stages that its plan gets later.
    let more = "\n[[tune]]\nname = \"again\"\nof = \"lora\"\nmethod = \"sft\"\nmax_length = 96\nsteps = 2\nbatch = 4\nmicro_batch = 2\n[[tune.data]]\nurl = \"answers.jsonl\"\n";
    sandbox.write("plan.toml", [TINY, CHAIN, more].concat());
    let said = sandbox.coordinator(&[]).succeeds();
    assert!(said.contains("again-export done") && !said.contains("train sft"), "{said}");
    assert_undisturbed(&sandbox.run("tiny"));
}

/// A run that begins from a model has its shape, and tunes it without any text.
#[test]
fn a_run_may_begin_from_a_model() {
    let sandbox = sandbox();
    let sft = CHAIN.split("[[tune]]").nth(1).expect("there is a stage").replace("\"average\"", "\"base\"");
    let based = |model: &str| {
        format!("[run]\nname = \"based\"\n[local]\nworkers = 2\n[base]\nmodel = \"{model}\"\n[[tune]]{sft}")
    };
    sandbox.coordinator(&[]).succeeds();
    sandbox.write("based.toml", based("runs/tiny/export"));
    let plan = ["--plan", "based.toml"];
    sandbox.coordinator_bare(&plan).succeeds();
    let expected = sandbox.run("tiny").tuned("sft");
    // The model card alone is another: it says what the model began from.
    let assert_tuned = |run: &str, from: &str| {
        assert_same(&sandbox.run(run).tuned("sft"), &expected, from);
        let card = sandbox.run(run).read("tune/sft/export/README.md");
        assert!(card.contains(from) && card.contains("| loss of the last update | "), "{card}");
    };
    assert_tuned("based", "runs/tiny/export");
    sandbox.write("based.toml", based("run:tiny/average").replace("\"based\"", "\"beside\""));
    sandbox.coordinator_bare(&plan).succeeds();
    assert_tuned("beside", "run:tiny/average");
    let check = ["--plan", "based.toml", "--check", "sources"];
    let said = sandbox.coordinator_bare(&check).succeeds();
    assert!(said.contains("base.model run:tiny/average: there"), "{said}");
    assert!(
        said.contains("61 of 61 rows in 1 file are kept") && said.contains(" learned (between"),
        "{said}"
    );
    sandbox.write("based.toml", based("run:tiny/7").replace("\"based\"", "\"none\""));
    let refused = sandbox.coordinator_bare(&check).ends();
    assert_eq!(refused.code, Some(2), "{}", refused.output);
    assert!(refused.output.contains("there is no checkpoint after step 7"), "{}", refused.output);
    sandbox.write("based.toml", based("no/such/folder").replace("\"based\"", "\"none\""));
    let refused = sandbox.coordinator_bare(&plan).ends();
    assert_eq!(refused.code, Some(2), "{}", refused.output);
    assert!(refused.output.contains("base.model = \"no/such/folder\""), "{}", refused.output);
}

/// Models of other runs are read where those are kept: to begin from, and to measure.
#[test]
#[ignore = "needs versitygw: .ci/run chain"]
fn a_run_may_begin_from_a_model_in_an_object_store() {
    let (on_disk, cloud) = (sandbox(), Cloud::beside(sandbox()));
    let run = |plan: &str| {
        let short =
            ["train.iterations=10", "train.warmup=2", "train.held_out_every=5", "checkpoint.average=1"];
        let set: Vec<&str> = short.iter().flat_map(|key| ["--set", key]).collect();
        let set = if plan == TINY { &[][..] } else { &set[..] };
        for sandbox in [&on_disk, &cloud.sandbox] {
            sandbox.write("plan.toml", plan);
        }
        on_disk.coordinator(set).succeeds();
        cloud.coordinator(set).succeeds();
    };
    run(TINY);
    let sft = CHAIN.split("[[tune]]").nth(1).expect("there is a stage").replace("\"average\"", "\"base\"");
    for (name, model) in [("of-average", "run:tiny/average"), ("of-step", "run:tiny/40")] {
        let tiny = TINY.replace("\"tiny\"", &format!("{name:?}")).replace("16KiB", "64KiB");
        run(&format!(
            "{tiny}[base]\nmodel = {model:?}\n[[tune]]{sft}[[evaluation]]\nname = \"tasks\"\nof = [\"base\", \"run:tiny/20\"]\n\
             tasks = [\"next_text\"]\n"
        ));
        let (found, expected) = (cloud.run(name), on_disk.run(name));
        found.bits().assert_equal(&expected.bits());
        assert_same(&found.tuned("sft"), &expected.tuned("sft"), name);
        let measured = expected.contents().into_keys().filter(|path| path.starts_with("results/tasks"));
        let measured: Vec<String> = measured
            .filter_map(|path| Some(path.to_str()?.to_owned()))
            .filter(|path| {
                std::path::Path::new(path).extension().is_some_and(|extension| extension == "json")
            })
            .collect();
        assert!(measured.len() >= 2, "{measured:?}");
        for result in measured {
            assert_eq!(found.json(&result)["results"], expected.json(&result)["results"], "{result}");
        }
    }
}
