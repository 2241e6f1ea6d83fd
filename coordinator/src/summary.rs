//! The final summary of a run: loss curve, results, and where its files are.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde_json::Value;
use textplots::{Chart, Plot, Shape};
use ulmus_plan::Plan;
use ulmus_run::paths;
use ulmus_run::results::{Benchmark, Measured, Perplexity, Results, Tasks};
use ulmus_types::{BadUnit, Digest, Stage, StageKind, for_people};

use crate::check::grouped;
use crate::database::MetricsRow;
use crate::figure::Figure;
use crate::folder::RunFolder;
use crate::options::Options;
use crate::tuned::Tuned;

/// The summary of a finished run.
pub(crate) fn page(
    plan: &Plan,
    options: &Options,
    folder: &RunFolder,
    metrics: &[MetricsRow],
    tuned: &[Tuned],
    results: &Results,
    left_out: &BTreeMap<BadUnit, String>,
    state: Option<Digest>,
) -> String {
    let mut page = String::new();
    write_page(&mut page, plan, options, folder, metrics, tuned, results, left_out, state)
        .expect("writing to a string cannot fail");
    page
}

fn write_page(
    page: &mut String,
    plan: &Plan,
    options: &Options,
    folder: &RunFolder,
    metrics: &[MetricsRow],
    tuned: &[Tuned],
    results: &Results,
    left_out: &BTreeMap<BadUnit, String>,
    state: Option<Digest>,
) -> std::fmt::Result {
    if let (Some(first), Some(last)) = (metrics.first(), metrics.last()) {
        writeln!(page, "\nloss over {} steps, nats per token", last.report.step)?;
        writeln!(page, "{}", curve(metrics))?;
        let (from, to) = (first.report.loss, last.report.loss);
        let tokens = grouped(last.report.tokens);
        writeln!(page, "from {from:.3} to {to:.3} in {tokens} tokens")?;
        let held_out: Vec<String> = metrics
            .iter()
            .filter_map(|row| Some((row.report.step, row.report.held_out_loss?)))
            .map(|(step, loss)| format!("{loss:.3} at {step}"))
            .collect();
        if !held_out.is_empty() {
            let sequences = plan.train.held_out_sequences;
            writeln!(page, "held-out loss on {sequences} sequences: {}", held_out.join(", "))?;
        }
    }
    if let Some(Measured::Done { result, .. }) = results.continuations() {
        writeln!(page, "\nheld-out text: {:?}", result.prompt)?;
        for continuation in result.continuations {
            writeln!(page, "  {}: {:?}", continuation.checkpoint, continuation.text)?;
        }
    }
    if plan.pretrains() {
        writeln!(page, "\n{}", table(plan, results))?;
    }
    let (at, own) = (folder.shown(), folder.path().display());
    if let Some(table) = tunings(tuned) {
        writeln!(page, "{table}")?;
    }
    for stage in plan.graph().stages() {
        write_stage(page, stage, results, &at)?;
    }
    for line in remarks(results) {
        writeln!(page, "{line}")?;
    }
    for (unit, why) in left_out {
        writeln!(page, "skipped: {unit}: {why}")?;
    }
    writeln!(page)?;
    for Tuned { stage, .. } in tuned {
        writeln!(page, "{:44} {at}/{}", format!("model of {stage}"), paths::tuned(*stage))?;
    }
    if plan.checkpoint.export && plan.pretrains() {
        writeln!(page, "model for mlx-lm and llama.cpp               {at}/{}", paths::EXPORT)?;
    }
    if plan.pretrains() {
        writeln!(page, "checkpoints                                  {at}/{}", paths::CHECKPOINTS)?;
    }
    if let Some(state) = state {
        // The same for every number of workers, and for whoever repeats the run.
        writeln!(page, "hash of the final state                      {state}")?;
    }
    if plan.pretrains() {
        writeln!(page, "metrics, one row per step                    {own}/{}", paths::METRICS)?;
    }
    for Tuned { stage, .. } in tuned {
        let metrics = paths::of_training(*stage, paths::METRICS);
        writeln!(page, "{:44} {own}/{metrics}", format!("metrics of {stage}"))?;
    }
    writeln!(page, "results as JSON                              {at}/{}", paths::RESULTS)?;
    writeln!(page, "\ntry next")?;
    let chats = tuned.last().filter(|_| folder.store().directory().is_some());
    if let Some(last) = chats {
        let model = format!("{at}/{}", paths::tuned(last.stage));
        writeln!(page, "  cargo run --release --bin evaluator -- generate --model {model} --chat")?;
    } else if plan.checkpoint.export && folder.store().directory().is_some() {
        writeln!(
            page,
            "  cargo run --release --bin evaluator -- generate --model {at}/export --prompt \"The\" --greedy"
        )?;
    }
    if plan.local.workers > 0 && !options.demo_failure {
        let command = options.command();
        let arguments = command.trim_start_matches("coordinator ");
        writeln!(page, "  cargo run --release --bin coordinator -- {arguments} --demo-failure")?;
    }
    writeln!(page, "  cargo run --release --bin coordinator -- init --from openelm-270m > pretrain.toml")?;
    Ok(())
}

/// What a stage that the plan adds has found, with a column for each model; of milestones only the last has one.
fn write_stage(page: &mut String, stage: &Stage, results: &Results, at: &str) -> std::fmt::Result {
    let rows = match stage.kind {
        StageKind::Evaluation => rows_of_tasks(&shown(results.of_models::<Tasks>(&stage.name))),
        StageKind::Benchmark => rows_of_speeds(&shown(results.of_models::<Benchmark>(&stage.name))),
        _ => return Ok(()),
    };
    if let Some((first, rest)) = rows.split_first() {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        table.set_header(std::iter::once(&stage.name.to_string()).chain(first));
        for row in rest {
            table.add_row(row);
        }
        writeln!(page, "{table}")?;
    }
    if Figure::of(&stage.name, results).is_some_and(|figure| figure.svg().is_some()) {
        writeln!(page, "{} over training: {at}/{}", stage.name, paths::figure(&stage.name, "svg"))?;
    }
    for (model, result) in results.of_models::<Measured<Value>>(&stage.name) {
        if let Some(why) = result.skipped() {
            writeln!(page, "{}/{model} is skipped: {}", stage.name, for_people(why, 500))?;
        }
        for why in result.left_out() {
            writeln!(page, "{}/{model}: {}", stage.name, for_people(why, 500))?;
        }
    }
    Ok(())
}

/// The models that have a column: all but the milestones before the last.
fn shown<T>(models: Vec<(&str, T)>) -> Vec<(&str, T)> {
    // The name of a model from elsewhere ends in a hash.
    let is_milestone =
        |model: &str| model.strip_prefix("step-").is_some_and(|step| step.parse::<u64>().is_ok());
    let last = models.iter().map(|(model, _)| *model).filter(|model| is_milestone(model)).max();
    models.into_iter().filter(|(model, _)| !is_milestone(model) || Some(*model) == last).collect()
}

/// The models; then each metric of each task, with what it is for each model and its standard error.
pub(crate) fn rows_of_tasks(models: &[(&str, Tasks)]) -> Vec<Vec<String>> {
    let metrics = models.iter().flat_map(|(_, tasks)| {
        tasks.results.iter().flat_map(|(task, metrics)| {
            let names = metrics.keys().filter_map(|name| name.strip_suffix(",none"));
            names.filter(|name| !name.ends_with("_stderr")).map(move |name| (task.clone(), name.to_owned()))
        })
    });
    let metrics: BTreeSet<(String, String)> = metrics.collect();
    if metrics.is_empty() {
        return Vec::new();
    }
    let cell = |tasks: &Tasks, task: &String, metric: &str| {
        let of = |name: String| tasks.results.get(task)?.get(&name)?.as_f64();
        match (of(format!("{metric},none")), of(format!("{metric}_stderr,none"))) {
            (Some(value), Some(error)) => format!("{value:.4} ± {error:.4}"),
            (Some(value), None) => format!("{value:.4}"),
            (None, _) => "-".to_owned(),
        }
    };
    let rows = metrics.iter().map(|(task, metric)| {
        let cells = models.iter().map(|(_, tasks)| cell(tasks, task, metric));
        std::iter::once(for_people(&format!("{task}, {metric}"), 200)).chain(cells).collect()
    });
    let averages = models.iter().map(|(_, tasks)| match tasks.average {
        Some(average) => format!("{average:.4}"),
        None => "-".to_owned(),
    });
    let average = std::iter::once("average".to_owned()).chain(averages).collect();
    let has_average = models.iter().any(|(_, tasks)| tasks.average.is_some());
    let header = models.iter().map(|(model, _)| (*model).to_owned()).collect();
    std::iter::once(header).chain(rows).chain(has_average.then_some(average)).collect()
}

/// The models; then their speeds.
fn rows_of_speeds(models: &[(&str, Benchmark)]) -> Vec<Vec<String>> {
    if models.is_empty() {
        return Vec::new();
    }
    let row = |name: &str, speed: fn(&Benchmark) -> f64| {
        let cells = models.iter().map(|(_, benchmark)| format!("{:.0}", speed(benchmark)));
        std::iter::once(name.to_owned()).chain(cells).collect()
    };
    vec![
        models.iter().map(|(model, _)| (*model).to_owned()).collect(),
        row("prompt, tokens/s", |benchmark| benchmark.prompt_tokens_per_second),
        row("generation, tokens/s", |benchmark| benchmark.generate_tokens_per_second),
    ]
}

/// What was not measured, or not on all text, and why; each reason once.
fn remarks(results: &Results) -> BTreeSet<String> {
    fn of<T>(what: &str, measured: Option<&Measured<T>>) -> Vec<String> {
        let Some(measured) = measured else { return Vec::new() };
        let skipped = measured.skipped().map(|why| format!("not {what}: {why}"));
        skipped.into_iter().chain(measured.left_out().iter().cloned()).collect()
    }
    [
        of("evaluated", results.average().as_ref()),
        of("evaluated", results.last().as_ref()),
        of("continued", results.continuations().as_ref()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn curve(metrics: &[MetricsRow]) -> String {
    let points: Vec<(f32, f32)> =
        metrics.iter().map(|row| (row.report.step.get() as f32, row.report.loss as f32)).collect();
    let (first, last) = (points[0].0, points[points.len() - 1].0);
    if first >= last {
        return String::new();
    }
    let mut chart = Chart::new(120, 48, first, last);
    let shape = Shape::Lines(&points);
    let chart = chart.lineplot(&shape);
    chart.axis();
    chart.figures();
    chart.to_string()
}

/// What became of each tuning stage: its first and its last update, and its last evaluation.
fn tunings(tuned: &[Tuned]) -> Option<Table> {
    if tuned.is_empty() {
        return None;
    }
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["tuning", "of", "updates", "examples", "loss", "margin", "eval loss"]);
    for stage in tuned {
        let measured = |name: &str| {
            stage.measures.get(name).map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"))
        };
        table.add_row([
            stage.stage.to_string(),
            stage.of.clone(),
            stage.updates.to_string(),
            grouped(stage.examples),
            format!("{:.4} to {:.4}", stage.first_loss, stage.loss),
            measured("rewards/margins"),
            measured("eval_loss"),
        ]);
    }
    Some(table)
}

fn table(plan: &Plan, results: &Results) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["result", "average", "last"]);
    let (average, last) = (results.average(), results.last());
    let cell = |measured: &Option<Measured<Perplexity>>, value: fn(&Perplexity) -> f64| {
        let result = measured.as_ref().and_then(Measured::result);
        result.map_or_else(|| "-".to_owned(), |result| format!("{:.4}", value(result)))
    };
    let mut row = |name: &str, value: fn(&Perplexity) -> f64| {
        table.add_row([name.to_owned(), cell(&average, value), cell(&last, value)]);
    };
    row("held-out loss, nats per token", |result| result.loss);
    row("held-out perplexity", |result| result.perplexity);
    row("bits per byte", |result| result.bits_per_byte);
    row("bits per byte of zstd -19", |result| result.zstd_bits_per_byte);
    if let Some(benchmark) = results.benchmark() {
        for (name, speed) in [
            (format!("prompt of {}, tokens/s", plan.benchmark.prompt), benchmark.prompt_tokens_per_second),
            (
                format!("generation of {}, tokens/s", plan.benchmark.generate),
                benchmark.generate_tokens_per_second,
            ),
        ] {
            table.add_row([name, format!("{speed:.0}"), "-".to_owned()]);
        }
    }
    table.add_row([
        "parameters".to_owned(),
        grouped(plan.model.parameters()),
        grouped(plan.model.parameters()),
    ]);
    table
}

/// Held-out losses of the variants of one plan, side by side.
pub(crate) fn comparison(variants: &[(String, u64, Results)]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["variant", "parameters", "held-out loss (average)", "held-out loss (last)"]);
    for (name, parameters, results) in variants {
        let loss = |measured: Option<Measured<Perplexity>>| {
            let loss = measured.as_ref().and_then(Measured::result).map(|result| result.loss);
            loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"))
        };
        table.add_row([name.clone(), grouped(*parameters), loss(results.average()), loss(results.last())]);
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use ulmus_types::JobName;

    use super::*;

    #[test]
    fn what_was_not_measured_is_told_once() {
        let evaluated = json!({
            "documents": 1, "bytes": 1, "tokens": 1, "context": 1, "nll": 1.0, "loss": 1.0, "perplexity": 1.0,
            "bits_per_byte": 1.0, "zstd_bits_per_byte": 1.0, "left_out": ["unit 3 is skipped"],
        });
        let told = |results: &[(&str, &Value)]| {
            let stored = |name: &str| JobName::stored(name.to_owned());
            let results = results.iter().map(|(name, result)| (stored(name), (*result).clone())).collect();
            Vec::from_iter(remarks(&Results::new(results)))
        };
        let results = [
            ("continuations", &json!({"skipped": "no text"})),
            ("evaluate-average", &evaluated),
            ("evaluate-last", &evaluated),
        ];
        assert_eq!(told(&results), ["not continued: no text", "unit 3 is skipped"]);
        let none = ["evaluate-average", "evaluate-last"].map(|kind| (kind, json!({"skipped": "x"})));
        assert_eq!(told(&none.each_ref().map(|(kind, result)| (*kind, result))), ["not evaluated: x"]);
    }
}
