//! What tuning stages take from each other.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

/// A plan of two stages, of which the second goes on from `of` and has more keys.
fn second(of: &str, more: &str) -> ulmus_plan::TuneConfig {
    let stage = |keys: &str| {
        format!("[[tune]]\nbatch = 4\nmax_length = 64\n{keys}\n[[tune.data]]\nurl = \"rows.jsonl\"\n")
    };
    let first = stage("name = \"a\"\nof = \"base\"\ntemplate = \"own.jinja\"");
    let second = stage(&format!("name = \"b\"\nof = {of:?}\n{more}"));
    let plan = format!("[run]\nname = \"run\"\n[base]\nmodel = \"./model\"\n{first}{second}");
    let plans = ulmus_plan::read(&plan, &[]).unwrap();
    plans.into_iter().next().unwrap().tune.pop().unwrap()
}

#[test]
fn a_stage_speaks_as_the_one_that_it_goes_on_from() {
    assert_eq!(second("a", "").template, "own.jinja");
    assert_eq!(second("a", "template = \"recipe\"").template, "recipe");
    assert_eq!(second("base", "").template, "auto");
}

#[test]
fn a_micro_batch_is_at_most_the_batch() {
    assert_eq!(second("a", "").micro_batch, 4);
    assert_eq!(second("a", "micro_batch = 2").micro_batch, 2);
}
