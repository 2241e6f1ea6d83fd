//! A stage that learns from answers of its own model: they are sampled by all workers, scored, and made pairs, and have the same bits
//! whoever takes part in that.

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use ulmus_tests::{CHAIN, Sandbox, TINY, write_examples};

/// Tunes the average by preferences among its own answers.
const RSO: &str = r#"
[[tune]]
name = "rso"
of = "average"
method = "dpo"
loss = "hinge"
beta = 0.1
max_length = 64
max_prompt = 48
steps = 12
batch = 8
micro_batch = 2
max_lr = 1e-4
[[tune.data]]
url = "preferences.jsonl"
[[tune.eval]]
url = "preferences.jsonl"
[tune.rso]
candidates = 6
accept = 4
"#;

fn sandbox(scores: &str) -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("plan.toml", [TINY, RSO, scores].concat());
    write_examples(&sandbox.path(""));
    sandbox
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

fn answers(line: &Value) -> usize {
    line["answers"].as_array().map_or(0, Vec::len)
}

#[test]
fn a_reward_head_chooses_among_sampled_answers_with_the_same_bits_whatever_is_killed() {
    let head = "reward_head = \"preferences.jsonl\"\n";
    let undisturbed = sandbox(head);
    let said = undisturbed.coordinator(&[]).succeeds();
    assert!(said.contains("the reward head finds the chosen answer better in"), "{said}");
    let run = undisturbed.run("tiny");
    let candidates = run.read("tune/rso/candidates.jsonl");
    let sampled = lines(&candidates);
    assert_eq!(sampled.len(), 61);
    assert!(sampled.iter().all(|line| line["scores"].as_array().map(Vec::len) == Some(answers(line))));
    assert!(sampled.iter().map(answers).sum::<usize>() > 61 * 3, "{candidates}");
    let results = run.json("tune/rso/results.json");
    let rows = &results["rows"];
    // Four accepted answers make two pairs.
    assert!(rows["kept"].as_u64() > Some(80) && rows["rows"].as_u64() <= Some(122), "{results}");
    assert_eq!(rows["held_out"], 61, "{results}");
    assert!(run.read("tune/rso/examples.txt").starts_with("pair 1 of sampled answers: prompt, "));
    let head = run.json("results/rso-reward/average.json");
    assert_eq!((&head["pairs"], &head["held_out"]), (&json!(55), &json!(6)), "{head}");

    let disturbed = sandbox("reward_head = \"preferences.jsonl\"\n");
    let coordinator = disturbed.coordinator(&["--set", "local.workers=3"]);
    coordinator.says("on local-1: answers to choose from");
    let pid = disturbed.run("tiny").local_workers()["local-1"];
    kill_process(pid, Signal::KILL).expect("it is alive");
    coordinator.succeeds();
    let other = disturbed.run("tiny");
    assert!(other.read("tune/rso/candidates.jsonl") == candidates, "the same answers");
    assert_eq!(other.tuned("rso"), run.tuned("rso"));
}

#[test]
fn answers_wait_for_scores_that_somebody_gives_them() {
    let sandbox = sandbox("scores = \"scores.jsonl\"\n");
    let stopped = sandbox.coordinator(&[]).ends();
    assert_eq!(stopped.code, Some(2), "{}", stopped.output);
    for text in
        ["answers to 61 prompts are sampled", "scores.jsonl is not there yet", "tune/rso/candidates.jsonl"]
    {
        assert!(stopped.output.contains(text), "{}", stopped.output);
    }
    let sampled = sandbox.run("tiny").read("tune/rso/candidates.jsonl");
    // The shorter the better; one of them is forgotten at first.
    let scored = |line: &Value| {
        let length = |answer: &Value| -(answer.as_str().map_or(0, str::len) as f64);
        let scores: Vec<f64> = line["answers"].as_array().expect("a list").iter().map(length).collect();
        json!({ "number": line["number"], "scores": scores }).to_string()
    };
    let scores: Vec<String> = lines(&sampled).iter().map(scored).collect();
    sandbox.write("scores.jsonl", scores[1..].join("\n"));
    let refused = sandbox.coordinator(&[]).ends();
    assert_eq!(refused.code, Some(2), "{}", refused.output);
    assert!(refused.output.contains("it has no scores of number 1"), "{}", refused.output);
    sandbox.write("scores.jsonl", scores.join("\n"));
    sandbox.coordinator(&["--set", "local.workers=2"]).succeeds();
    let run = sandbox.run("tiny");
    assert!(run.read("tune/rso/candidates.jsonl") == sampled, "nothing is sampled again");
    let files = &run.json("tune/rso/results.json")["rows"]["files"];
    assert_eq!(files[1]["form"], "scores of sampled answers", "{files}");
}

#[test]
fn answers_of_one_s_own_need_scores_and_preferences_to_be_made_of() {
    let sandbox = sandbox("");
    let refused = sandbox.coordinator(&[]).ends();
    assert_eq!(refused.code, Some(2), "{}", refused.output);
    assert!(
        refused.output.contains("tune.0.rso.scores = missing: sampled answers need scores"),
        "{}",
        refused.output
    );
    let sft = CHAIN.split("[[tune]]").nth(1).expect("there is a stage");
    let wrong = format!("{TINY}[[tune]]{sft}[tune.rso]\nscores = \"a\"\n");
    sandbox.write("plan.toml", wrong);
    let refused = sandbox.coordinator(&[]).ends();
    assert!(refused.output.contains("only preferences have it"), "{}", refused.output);
    sandbox.write("plan.toml", [TINY, RSO, "accept_ = 3\nbeta = -1\nscores = \"a\"\n"].concat());
    let refused = sandbox.coordinator(&[]).ends();
    assert!(refused.output.contains("accept_"), "{}", refused.output);
    sandbox.write("plan.toml", [TINY, RSO, "beta = -1\nscores = \"a\"\n"].concat());
    let refused = sandbox.coordinator(&[]).ends();
    assert!(refused.output.contains("tune.0.rso.beta = -1"), "{}", refused.output);
}
