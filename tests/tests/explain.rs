//! `dataloader explain`: what a step of a finished run was trained on.

use serde_json::Value;
use ulmus_tests::Sandbox;

#[test]
fn a_sequence_of_a_run_leads_to_its_documents() {
    let sandbox = Sandbox::new();
    sandbox.coordinator(&["--set", "train.iterations=25", "--set", "checkpoint.average=1"]).succeeds();
    // With the run's checkpoints, and without them.
    let explain = |step: &str, sequence: &str| -> Value {
        let asked = ["explain", "--json", "--plan", "plan.toml", "--step", step, "--sequence", sequence];
        let told = sandbox.dataloader(&asked).succeeds();
        serde_json::from_str(told.trim()).expect("what is called JSON is JSON")
    };
    let steps = ["1", "11", "23"];
    let with: Vec<Value> = steps.iter().map(|step| explain(step, "6")).collect();
    std::fs::rename(sandbox.path("runs/tiny/checkpoints"), sandbox.path("elsewhere"))
        .expect("they are there");
    let without: Vec<Value> = steps.iter().map(|step| explain(step, "6")).collect();
    assert_eq!(with, without);
    assert!(with[0] != with[1] && with[1] != with[2]);

    // The text is that of the named row, and the shards have it from the corpus.
    let prose: Vec<String> = std::fs::read_dir(sandbox.path("corpus"))
        .expect("the corpus is there")
        .map(|file| std::fs::read_to_string(file.expect("a file").path()).expect("text"))
        .collect();
    for explanation in &with {
        let documents = explanation["documents"].as_array().expect("a list");
        assert!(!documents.is_empty());
        for document in documents {
            assert!(
                document["file"].as_str().is_some_and(|file| file.starts_with("run:shards/")),
                "{document}"
            );
            let text = document["text"].as_str().expect("text").trim();
            assert!(prose.iter().any(|whole| whole.contains(text)), "{text:?}");
        }
    }
    // What the run has made for itself can be looked at as any other source.
    for command in ["inspect", "count"] {
        let told = sandbox.dataloader(&[command, "--json", "--plan", "plan.toml"]).succeeds();
        let sources: Value = serde_json::from_str(told.trim()).expect("what is called JSON is JSON");
        assert!(sources[0]["files"].as_u64().is_some_and(|files| files > 0), "{told}");
    }
    let wrong =
        sandbox.dataloader(&["explain", "--plan", "plan.toml", "--step", "61", "--sequence", "0"]).ends();
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.output.contains("steps 1 to 60"), "{}", wrong.output);
}
