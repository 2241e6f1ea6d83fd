//! Files that vanish during a run.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use ulmus_tests::{Process, Sandbox, TINY};

/// A sandbox whose plan reads the files of its corpus directly, in about 40 units.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    let golden = ulmus_tests::repository().join("tests/golden/tiny/tokenizer.model");
    let (head, tail) = TINY.split_once("[tokenizer]").expect("the plan has this section");
    let (_, tail) = tail.split_once("[data]").expect("the plan has this section");
    let source =
        "\n[[data.source]]\nname = \"prose\"\nurl = \"corpus\"\nfiles = [\"*.md\"]\ntext = \"text\"\n";
    let plan = format!("{head}[tokenizer]\nfile = \"{}\"\n\n[data]{tail}{source}", golden.display());
    sandbox.write("plan.toml", plan);
    sandbox
}

/// A run with two workers, some of whose files vanish after the first step.
fn vanishing(sandbox: &Sandbox, more: &[&str]) -> Process {
    let coordinator = sandbox.coordinator(&[&["--set", "local.workers=2"], more].concat());
    coordinator.says("2 workers train from step 0 of 60");
    for file in (5..400).step_by(20) {
        std::fs::remove_file(sandbox.path(&format!("corpus/{file:04}.md"))).expect("the file is there");
    }
    coordinator
}

#[test]
fn a_unit_that_vanishes_stops_the_run_with_its_name() {
    let sandbox = sandbox();
    let ended = vanishing(&sandbox, &[]).ends();
    assert_eq!(ended.code, Some(5), "{}", ended.output);
    for words in ["corpus/", ".md does not exist", "of source \"prose\"", "data.on_bad_unit = \"quarantine\""]
    {
        assert!(ended.output.contains(words), "{words}: {}", ended.output);
    }
}

#[test]
fn units_that_vanish_are_left_out_and_recorded() {
    let sandbox = sandbox();
    let quarantine = ["--set", "data.on_bad_unit=quarantine", "--set", "data.max_bad_units=20"];
    let said = vanishing(&sandbox, &quarantine).succeeds();
    assert!(said.contains("is skipped from now on"), "{said}");
    let page = said.lines().filter(|line| line.starts_with("skipped: unit")).count();

    let run = sandbox.run("tiny");
    let recorded: Vec<(Value, String)> =
        serde_json::from_str(&run.read("quarantine.json")).expect("what is called JSON is JSON");
    assert!(!recorded.is_empty() && recorded.len() == page, "{recorded:?}, {page} on the page");
    assert!(recorded.iter().all(|(unit, why)| unit["source"] == "prose" && why.contains("does not exist")));
    assert_eq!(run.bits().steps(), 60);

    // The last checkpoint lists the units that were found before it.
    let last = run.checkpoints().pop().expect("there are checkpoints");
    let state: Value =
        serde_json::from_str(&run.read(&format!("checkpoints/{last}/state.json"))).expect("JSON");
    let kept = state["quarantine"].as_array().expect("a list");
    assert!(
        !kept.is_empty() && kept.iter().all(|unit| recorded.iter().any(|(known, _)| known == unit)),
        "{state}"
    );

    // Reading statistics of both workers are recorded at each checkpoint, including skipped units.
    let rows = run.sources();
    let of_last = |row: &&BTreeMap<String, String>| row["step"] == "60" && row["source"] == "prose";
    let workers: BTreeSet<&str> = rows.iter().filter(of_last).map(|row| row["worker"].as_str()).collect();
    assert_eq!(workers.len(), 2, "{rows:?}");
    for row in rows.iter().filter(of_last) {
        let number = |column: &str| row[column].parse::<f64>().expect("a number");
        assert_eq!(row["bad_units"], kept.len().to_string());
        assert!(number("tokens") > 10_000.0 && number("text_mb_per_second") > 0.0, "{row:?}");
        assert!(number("epochs") > 0.0 && number("streams") >= number("streams_ready"), "{row:?}");
    }

    // Running the command again repeats nothing and forgets nothing.
    let again = sandbox.coordinator(&quarantine).succeeds();
    assert_eq!(again.lines().filter(|line| line.starts_with("skipped: unit")).count(), page);
}

#[test]
fn no_more_units_are_left_out_than_the_plan_allows() {
    let sandbox = sandbox();
    let ended =
        vanishing(&sandbox, &["--set", "data.on_bad_unit=quarantine", "--set", "data.max_bad_units=1"])
            .ends();
    assert_eq!(ended.code, Some(5), "{}", ended.output);
    assert!(ended.output.contains("data.max_bad_units = 1 allows no more"), "{}", ended.output);
}
