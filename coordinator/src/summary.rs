//! The last page of a run: loss curve, results, and where things are.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde_json::Value;
use textplots::{Chart, Plot, Shape};
use ulmus_plan::Plan;
use ulmus_types::BadUnit;

use crate::check::grouped;
use crate::database::MetricsRow;
use crate::folder::RunFolder;
use crate::run::Options;

/// Everything that a finished run has to tell.
pub(crate) fn page(
    plan: &Plan,
    options: &Options,
    folder: &RunFolder,
    metrics: &[MetricsRow],
    results: &BTreeMap<String, Value>,
    left_out: &BTreeMap<BadUnit, String>,
) -> String {
    let mut page = String::new();
    write_page(&mut page, plan, options, folder, metrics, results, left_out)
        .expect("writing to a string cannot fail");
    page
}

fn write_page(
    page: &mut String,
    plan: &Plan,
    options: &Options,
    folder: &RunFolder,
    metrics: &[MetricsRow],
    results: &BTreeMap<String, Value>,
    left_out: &BTreeMap<BadUnit, String>,
) -> std::fmt::Result {
    if let (Some(first), Some(last)) = (metrics.first(), metrics.last()) {
        writeln!(page, "\nloss over {} steps, nats per token", last.report.step)?;
        writeln!(page, "{}", curve(metrics))?;
        let (from, to) = (first.report.loss, last.report.loss);
        let tokens = grouped(last.report.tokens);
        writeln!(page, "from {from:.3} to {to:.3} ({:.0} %) in {tokens} tokens", 100.0 * to / from)?;
        let held_out: Vec<String> = metrics
            .iter()
            .filter_map(|row| Some((row.report.step, row.report.held_out_loss?)))
            .map(|(step, loss)| format!("{loss:.3} at {step}"))
            .collect();
        if !held_out.is_empty() {
            writeln!(page, "held-out loss {}", held_out.join(", "))?;
        }
    }
    if let Some(continuations) = results.get("continuations").filter(|result| result["skipped"].is_null()) {
        writeln!(page, "\nheld-out text: {}", quoted(&continuations["prompt"]))?;
        for entry in continuations["continuations"].as_array().into_iter().flatten() {
            writeln!(page, "  {}: {}", entry["checkpoint"].as_str().unwrap_or("?"), quoted(&entry["text"]))?;
        }
    }
    writeln!(page, "\n{}", table(plan, results))?;
    for line in remarks(results) {
        writeln!(page, "{line}")?;
    }
    for (unit, why) in left_out {
        writeln!(page, "left out: {unit}: {why}")?;
    }
    let (at, own) = (folder.shown(), folder.path().display());
    writeln!(page)?;
    if plan.checkpoint.export {
        writeln!(page, "model for transformers, mlx-lm, llama.cpp   {at}/export")?;
    }
    writeln!(page, "checkpoints                                  {at}/checkpoints")?;
    writeln!(page, "metrics, one row per step                    {own}/metrics.csv")?;
    writeln!(page, "results as JSON                              {at}/results")?;
    writeln!(page, "\ntry next")?;
    if plan.checkpoint.export && folder.store().directory().is_some() {
        writeln!(
            page,
            "  cargo run --release --bin evaluator -- generate --model {at}/export --prompt \"The\" --greedy"
        )?;
    }
    if plan.local.workers > 0 && !options.demo_failure {
        let plan = options.plan.display();
        writeln!(page, "  cargo run --release --bin coordinator -- --plan {plan} --demo-failure")?;
    }
    writeln!(page, "  cargo run --release --bin coordinator -- init --from openelm-270m > pretrain.toml")?;
    Ok(())
}

/// What was not measured, or on less than all, and why; each reason once.
fn remarks(results: &BTreeMap<String, Value>) -> BTreeSet<String> {
    let mut remarks = BTreeSet::new();
    for (name, result) in results {
        let what = if name == "continuations" { "continued" } else { "evaluated" };
        remarks.extend(result["skipped"].as_str().map(|why| format!("not {what}: {why}")));
        remarks.extend(
            result["left_out"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned),
        );
    }
    remarks
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

fn table(plan: &Plan, results: &BTreeMap<String, Value>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["result", "average", "last"]);
    let (average, last) = (results.get("evaluate-average"), results.get("evaluate-last"));
    let cell = |result: Option<&Value>, key: &str, digits: usize| {
        result
            .and_then(|result| result[key].as_f64())
            .map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    };
    for (name, key) in [
        ("held-out loss, nats per token", "loss"),
        ("held-out perplexity", "perplexity"),
        ("bits per byte", "bits_per_byte"),
    ] {
        table.add_row([name.to_owned(), cell(average, key, 4), cell(last, key, 4)]);
    }
    let zstd = cell(average, "zstd_bits_per_byte", 4);
    table.add_row(["bits per byte of zstd -19".to_owned(), zstd.clone(), zstd]);
    if let Some(benchmark) = results.get("benchmark") {
        let speed = |key: &str| format!("{:.0}", benchmark[key].as_f64().unwrap_or_default());
        table.add_row([
            format!("prompt of {}, tokens/s", plan.benchmark.prompt),
            speed("prompt_tokens_per_second"),
            "-".to_owned(),
        ]);
        table.add_row([
            format!("generation of {}, tokens/s", plan.benchmark.generate),
            speed("generate_tokens_per_second"),
            "-".to_owned(),
        ]);
    }
    table.add_row([
        "parameters".to_owned(),
        grouped(plan.model.parameters()),
        grouped(plan.model.parameters()),
    ]);
    table
}

/// Text on one line.
fn quoted(value: &Value) -> String {
    format!("{:?}", value.as_str().unwrap_or_default())
}

/// Held-out losses of the variants of one plan, side by side.
pub(crate) fn comparison(variants: &[(String, u64, BTreeMap<String, Value>)]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["variant", "parameters", "held-out loss (average)", "held-out loss (last)"]);
    for (name, parameters, results) in variants {
        let loss = |name: &str| {
            results
                .get(name)
                .and_then(|result| result["loss"].as_f64())
                .map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"))
        };
        table.add_row([name.clone(), grouped(*parameters), loss("evaluate-average"), loss("evaluate-last")]);
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_not_measured_is_told_once() {
        let results = [
            ("average", json!({"checkpoints": []})),
            ("continuations", json!({"skipped": "no text"})),
            ("evaluate-average", json!({"loss": 1.0, "left_out": ["unit 3 is left out"]})),
            ("evaluate-last", json!({"loss": 1.0, "left_out": ["unit 3 is left out"]})),
        ];
        let results = results.map(|(name, result)| (name.to_owned(), result)).into();
        assert_eq!(Vec::from_iter(remarks(&results)), ["not continued: no text", "unit 3 is left out"]);
        let none =
            ["evaluate-average", "evaluate-last"].map(|name| (name.to_owned(), json!({"skipped": "x"})));
        assert_eq!(Vec::from_iter(remarks(&none.into())), ["not evaluated: x"]);
    }
}
