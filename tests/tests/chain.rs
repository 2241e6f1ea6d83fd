//! A whole chain of one plan: pretraining, its average, tuning by answers, by preferences and of an adapter, and what is measured
//! of all of them. It gives the same bits whoever takes part in it, and whatever is killed.

use std::sync::OnceLock;

use rustix::process::{Signal, kill_process};
use ulmus_tests::{CHAIN, Process, Sandbox, TINY, TUNED, write_examples};

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
        bits(&sandbox)
    })
}

fn bits(sandbox: &Sandbox) -> Vec<Vec<String>> {
    let run = sandbox.run("tiny");
    assert_eq!(run.bits().steps(), 60);
    TUNED.iter().map(|stage| run.tuned(stage)).collect()
}

fn assert_undisturbed(sandbox: &Sandbox) {
    for ((found, expected), stage) in bits(sandbox).iter().zip(undisturbed()).zip(TUNED) {
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
    assert_undisturbed(&sandbox);
    let run = sandbox.run("tiny");
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
    sandbox.evaluator(&merge).succeeds();
    let weights =
        |folder: &str| std::fs::read(sandbox.path(folder).join("model.safetensors")).expect("it is there");
    assert!(weights("merged") == weights("runs/tiny/tune/lora/export"), "the export is the merged model");
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
    assert_undisturbed(&sandbox);
}

/// Kills one of the local workers.
fn kill_one(sandbox: &Sandbox, name: &str) {
    let pid = sandbox.run("tiny").local_workers()[name];
    kill_process(pid, Signal::KILL).expect("it is alive");
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
    assert_undisturbed(&sandbox);
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
    assert!(changed.output.contains("[[tune]] sft has begun"), "{}", changed.output);
    sandbox.coordinator(&[]).succeeds();
    assert_undisturbed(&sandbox);
    // What has not begun may change, and a finished run does the stages that its plan gets later.
    let more = "\n[[tune]]\nname = \"again\"\nof = \"lora\"\nmethod = \"sft\"\nmax_length = 96\nsteps = 2\nbatch = 4\nmicro_batch = 2\n[[tune.data]]\nurl = \"answers.jsonl\"\n";
    sandbox.write("plan.toml", [TINY, CHAIN, more].concat());
    let said = sandbox.coordinator(&[]).succeeds();
    assert!(said.contains("again-export done") && !said.contains("train sft"), "{said}");
    assert_undisturbed(&sandbox);
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
    // The model card alone is another: it says what the model began from.
    let tuned = |run: &str| {
        let card = sandbox.run(run).read("tune/sft/export/README.md");
        let tuned = sandbox.run(run).tuned("sft");
        let but_the_card: Vec<String> =
            tuned.iter().filter(|line| !line.starts_with("README.md ")).cloned().collect();
        assert_eq!(but_the_card.len() + 1, tuned.len());
        (but_the_card, card)
    };
    let (expected, _) = tuned("tiny");
    let (found, card) = tuned("based");
    assert_same(&found, &expected, "the stage of the export");
    assert!(card.contains("runs/tiny/export"), "{card}");
    sandbox.write("based.toml", based("run:tiny/average").replace("\"based\"", "\"beside\""));
    sandbox.coordinator_bare(&plan).succeeds();
    let (found, card) = tuned("beside");
    assert_same(&found, &expected, "the stage of the average");
    assert!(card.contains("run:tiny/average"), "{card}");
    sandbox.write("based.toml", based("no/such/folder").replace("\"based\"", "\"none\""));
    let refused = sandbox.coordinator_bare(&plan).ends();
    assert_eq!(refused.code, Some(2), "{}", refused.output);
    assert!(refused.output.contains("base.model = \"no/such/folder\""), "{}", refused.output);
}
