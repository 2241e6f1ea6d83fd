//! Whole runs that tune the reference's model have the reference's numbers: those of TRL as the paper's recipe used it, of TRL as it is
//! today, and of PEFT. `tests/golden/README.md` says how they were made.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write;

use serde_json::{Value, json};
use ulmus_model::{hf, peft};
use ulmus_tests::{Sandbox, repository};

fn golden(name: &str) -> Value {
    let path = repository().join("tests/golden/tune").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

/// A run of one tuning stage on the rows of the reference's steps, in their order, at its learning rates.
struct Tuned {
    sandbox: Sandbox,
    columns: Vec<String>,
    /// The metrics of each update.
    updates: Vec<Vec<f64>>,
}

impl Tuned {
    fn of(rows: &Value, steps: &Value, settings: &str, adapter: &str) -> Self {
        let sandbox = Sandbox::new();
        let (mut text, mut lrs) = (String::new(), Vec::new());
        for step in list(steps) {
            lrs.push(number(&step["lr"]));
            for row in list(&step["rows"]) {
                writeln!(text, "{}", rows[row.as_u64().unwrap() as usize]).unwrap();
            }
        }
        sandbox.write("rows.jsonl", text);
        let model = repository().join("tests/golden/tiny");
        let plan = format!(
            "[run]\nname = \"golden\"\n[local]\nworkers = 2\n[base]\nmodel = \"{}\"\n[[tune]]\nname = \"t\"\nof = \"base\"\nshuffle = false\n\
             epochs = 1\nbatch = 4\nmicro_batch = 2\non_useless = \"keep\"\nlrs = {lrs:?}\n{settings}\n[[tune.data]]\nurl = \"rows.jsonl\"\n{adapter}",
            model.display()
        );
        sandbox.write("golden.toml", plan);
        sandbox.coordinator_bare(&["--plan", "golden.toml"]).succeeds();
        let metrics = sandbox.run("golden").read("tune/t/metrics.csv");
        let mut lines = metrics.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
        let columns = lines.next().unwrap();
        let updates: Vec<Vec<f64>> =
            lines.map(|line| line.iter().map(|value| value.parse().unwrap_or(f64::NAN)).collect()).collect();
        assert_eq!(updates.len(), list(steps).len());
        Self { sandbox, columns, updates }
    }

    /// A column, and the reference's numbers, may differ by so much, or by that part of the latter.
    fn assert_near(&self, column: &str, expected: impl Iterator<Item = f64>, absolute: f64, relative: f64) {
        let at = self.columns.iter().position(|name| name == column).unwrap();
        for (step, (update, expected)) in self.updates.iter().zip(expected).enumerate() {
            let difference = (update[at] - expected).abs();
            assert!(
                difference <= absolute.max(relative * expected.abs()),
                "{column} of step {step} is {} and not {expected}",
                update[at]
            );
        }
    }
}

#[test]
fn preferences_are_learned_as_the_recipe_s_trl_does() {
    let dpo = golden("dpo.json");
    for run in list(&dpo["runs"]) {
        let settings = format!(
            "method = \"dpo\"\nloss = {}\nbeta = {}\ntokenization = \"recipe\"\ntemplate = \"recipe\"\nmax_length = 96\nmax_prompt = 48",
            run["loss_type"], run["beta"]
        );
        let tuned = Tuned::of(&dpo["rows"], &run["steps"], &settings, "");
        let steps = || list(&run["steps"]).iter();
        tuned.assert_near("loss", steps().map(|step| number(&step["loss"])), 1e-5, 0.0);
        tuned.assert_near("grad_norm", steps().map(|step| number(&step["grad_norm"])), 0.0, 5e-5);
        for column in ["logps/chosen", "logps/rejected"] {
            tuned.assert_near(column, steps().map(|step| number(&step["logged"][column])), 5e-4, 0.0);
        }
        for column in ["rewards/chosen", "rewards/rejected", "rewards/margins"] {
            tuned.assert_near(column, steps().map(|step| number(&step["logged"][column])), 1e-4, 0.0);
        }
    }
}

#[test]
fn preferences_are_learned_as_trl_does_today() {
    let current = golden("dpo_current.json");
    let kept = list(&current["kept"]["conversational"]).iter();
    let rows = golden("dpo.json")["rows"].take();
    // Rows are counted among those that are kept. In these, the prompt is what both answers begin with.
    let rows: Vec<Value> = list(&rows)
        .iter()
        .zip(kept)
        .filter(|(_, is_kept)| **is_kept == true)
        .map(|(row, _)| json!({ "chosen": row["chosen"], "rejected": row["rejected"] }))
        .collect();
    let run = &current["runs"][0];
    let settings = format!(
        "method = \"dpo\"\nloss = {}\nbeta = {}\ntemplate = \"recipe\"\nmax_length = 96\ntruncation = \"keep_start\"",
        run["loss_type"], run["beta"]
    );
    let tuned = Tuned::of(&json!(rows), &run["steps"], &settings, "");
    let steps = || list(&run["steps"]).iter();
    tuned.assert_near("loss", steps().map(|step| number(&step["loss"])), 1e-5, 0.0);
    tuned.assert_near("grad_norm", steps().map(|step| number(&step["grad_norm"])), 0.0, 5e-5);
    for (column, answers) in [("logps/chosen", "policy_chosen"), ("logps/rejected", "policy_rejected")] {
        let mean = |step: &Value| list(&step[answers]).iter().map(number).sum::<f64>() / 4.0;
        tuned.assert_near(column, steps().map(mean), 5e-4, 0.0);
    }
}

#[test]
fn answers_are_learned_as_trl_does() {
    let sft = golden("sft.json");
    for run in list(&sft["runs"]) {
        let settings = format!(
            "method = \"sft\"\nmax_length = 96\ntruncation = \"keep_start\"\nmask_prompt = {}",
            run["prompt_masked"]
        );
        let tuned = Tuned::of(&sft["rows"], &run["steps"], &settings, "");
        let steps = || list(&run["steps"]).iter();
        tuned.assert_near("loss", steps().map(|step| number(&step["loss"])), 1e-5, 0.0);
        tuned.assert_near("grad_norm", steps().map(|step| number(&step["grad_norm"])), 0.0, 5e-5);
    }
}

#[test]
fn adapters_are_learned_as_peft_does() {
    let all = golden("peft.json");
    let (shape, _) = hf::read_config(&repository().join("tests/golden/tiny")).unwrap();
    for case in list(&all["cases"]) {
        let name = case["name"].as_str().unwrap();
        let folder = repository().join("tests/golden/tune/peft").join(name);
        let kind = if case["use_dora"] == true { "dora" } else { "lora" };
        let targets = match &case["target"] {
            Value::String(pattern) => format!("[{pattern:?}]"),
            names => names.to_string(),
        };
        let mut adapter = format!(
            "[tune.adapter]\nkind = \"{kind}\"\nrank = {}\nalpha = {}\ntargets = {targets}\nrank_stabilised = {}\nfrom = \"{}\"\n",
            case["r"],
            case["alpha"],
            case["use_rslora"],
            folder.join("initial").display()
        );
        for pattern in ["rank_pattern", "alpha_pattern"] {
            for (module, value) in case[pattern].as_object().unwrap() {
                writeln!(adapter, "{pattern}.{module} = {value}").unwrap();
            }
        }
        let settings = format!(
            "method = \"sft\"\nmax_length = 256\nmask_prompt = false\nz_loss = {}\nbeta1 = {}\nbeta2 = {}",
            case["z_loss"], case["betas"][0], case["betas"][1]
        );
        let tuned = Tuned::of(&all["rows"], &case["steps"], &settings, &adapter);
        let steps = || list(&case["steps"]).iter();
        tuned.assert_near("loss", steps().map(|step| number(&step["ce"])), 1e-5, 0.0);
        tuned.assert_near("grad_norm", steps().map(|step| number(&step["grad_norm"])), 0.0, 5e-5);
        let found = peft::read(&tuned.sandbox.run("golden").path().join("tune/t/adapter"), &shape).unwrap();
        let expected = peft::read(&folder.join("final"), &shape).unwrap();
        assert_eq!(found.shape.modules(), expected.shape.modules(), "{name}");
        let length = |of: &dyn Fn(usize) -> f32| -> f64 {
            (0..found.weights.len()).map(|at| f64::from(of(at)).powi(2)).sum::<f64>().sqrt()
        };
        let distance = length(&|at| found.weights[at] - expected.weights[at]);
        let whole = length(&|at| expected.weights[at]);
        assert!(distance < 1e-4 * whole, "{name}: the adapters differ by {}", distance / whole);
    }
}
