//! The exported model is an ordinary folder in Hugging Face layout, which other programs and our evaluator can load.

use std::fs;

use serde_json::Value;
use ulmus_model::hf;
use ulmus_tests::{Sandbox, TINY};

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("what is called JSON is JSON")
}

#[test]
fn an_exported_model_is_complete_and_can_be_used() {
    let sandbox = Sandbox::new();
    sandbox.coordinator(&["--set", "train.iterations=20", "--set", "checkpoint.average=2"]).succeeds();
    let run = sandbox.run("tiny");
    let export = run.path().join("export");

    // The weights are those of the average, and the shape is that of the plan.
    let model = hf::read(&export).expect("our own reader takes it");
    let plan = ulmus_plan::read(&run.read("plan.resolved.toml"), &[]).expect("a resolved plan is a plan");
    assert_eq!(model.config.layers(), plan[0].model.layers());
    assert_eq!(model.weights.len() as u64, plan[0].model.parameters());
    let file = |path: &str| fs::read(run.path().join(path)).expect("the run wrote it");
    assert_eq!(file("export/model.safetensors"), file("average/model.safetensors"));
    for tokenizer in ["tokenizer.model", "tokenizer.json"] {
        assert_eq!(file(&format!("export/{tokenizer}")), file(tokenizer), "{tokenizer}");
    }

    // Like the reference's config, ours has a value per layer.
    let config = run.json("export/config.json");
    assert_eq!(config["model_type"], "openelm");
    assert_eq!(config["num_query_heads"], json("[2, 4, 4]"));
    assert_eq!(config["num_kv_heads"], json("[1, 2, 2]"));
    assert_eq!(config["ffn_multipliers"], json("[0.5, 1.25, 2.0]"));
    let end = &config["eos_token_id"];
    assert!(end.is_u64() && run.json("export/generation_config.json")["eos_token_id"] == *end);

    // The evaluator measures the model, times it and generates text with it.
    let folder = export.to_str().expect("a sandbox has a name in ASCII");
    let measure = ["run", "--model", folder, "--tasks", "perplexity", "--data", "corpus/0000.md"];
    sandbox.evaluator(&[&measure[..], &["--output", "result.json"]].concat()).succeeds();
    let result = json(&fs::read_to_string(sandbox.path("result.json")).expect("the evaluator wrote it"));
    let measured = &result["results"]["perplexity"]["bits_per_byte"];
    let in_the_run = &run.json("results/evaluate-average.json")["bits_per_byte"];
    let (measured, in_the_run) = (measured.as_f64().expect("bits"), in_the_run.as_f64().expect("bits"));
    assert!((measured / in_the_run - 1.0).abs() < 0.1, "{measured} here, {in_the_run} on held-out text");

    let bench = ["bench", "--model", folder, "--prompt", "8", "--generate", "8", "--threads", "1", "--json"];
    assert!(json(&sandbox.evaluator(&bench).succeeds()).is_object());

    let generate = ["generate", "--model", folder, "--prompt", "pai", "--max-tokens", "12", "--greedy"];
    let text = sandbox.evaluator(&generate).succeeds();
    assert!(!text.trim().is_empty());
    assert_eq!(sandbox.evaluator(&generate).succeeds(), text);
}

#[test]
fn a_model_with_layer_norms_is_exported_as_a_type_of_its_own() {
    let sandbox = Sandbox::new();
    let keys = ["train.iterations=20", "checkpoint.average=2", "model.norm=layer"];
    sandbox.coordinator(&keys.map(|key| ["--set", key]).concat()).succeeds();
    let run = sandbox.run("tiny");
    assert_eq!(run.json("export/config.json")["model_type"], "openelm_layer_norm");
    let model = hf::read(&run.path().join("export")).expect("our own reader takes it");
    assert_eq!(model.config.norm.name(), "layer");
    assert_eq!(run.json("results/benchmark.json")["details"]["norm"], "layer");
}

#[test]
fn a_run_whose_plan_does_not_export_has_no_export() {
    let sandbox = Sandbox::new();
    let keys = ["train.iterations=20", "checkpoint.average=2", "checkpoint.export=false"];
    let said = sandbox.coordinator(&keys.map(|key| ["--set", key]).concat()).succeeds();
    assert!(said.contains("held-out perplexity") && !said.contains("/export"), "{said}");
    assert!(!sandbox.run("tiny").path().join("export").exists());
}

#[test]
fn a_tokenizer_json_is_all_that_another_vocabulary_takes() {
    let sandbox = Sandbox::new();
    let golden = ulmus_tests::repository().join("tests/golden/tiny/tokenizer.json");
    // The plan names the tokenizer in one line, and has no `vocab_size`.
    let plan = TINY.replace("pieces = 600", &format!("file = \"{}\"", golden.display()));
    let plan = plan.replace("vocab_size = 640\n", "");
    sandbox.write("plan.toml", plan);
    sandbox.coordinator(&["--set", "train.iterations=20", "--set", "checkpoint.average=1"]).succeeds();
    let run = sandbox.run("tiny");
    let plan = ulmus_plan::read(&run.read("plan.resolved.toml"), &[]).expect("a resolved plan is a plan");
    assert_eq!(plan[0].model.vocab_size, 640);
    let export = run.path().join("export");
    assert!(!export.join("tokenizer.model").exists());
    assert_eq!(fs::read(export.join("tokenizer.json")).unwrap(), fs::read(golden).unwrap());
    assert_eq!(run.json("export/tokenizer_config.json")["eos_token"], "</s>");

    let folder = export.to_str().expect("a sandbox has a name in ASCII");
    let measure = ["run", "--model", folder, "--tasks", "perplexity", "--data", "corpus/0000.md"];
    sandbox.evaluator(&measure).succeeds();
}
