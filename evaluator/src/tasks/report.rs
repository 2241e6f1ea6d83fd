//! Results in the files and tables of lm-evaluation-harness, so that what reads its output reads ours.

use std::fmt::Write as _;

use minijinja::value::Value;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};
use ulmus_backend::Backend;
use ulmus_model::Model;
use ulmus_tokenizer::Tokenizer;

use super::definition::{Kind, Revision};
use super::measure::{Content, Limit, Measured, Prepared, Row, Settings, asked};
use super::metric::{Estimate, Metric};
use super::scorer::Likelihood;
use crate::folder::LoadedModel;
use crate::python::string::words;

/// The version of the results file.
const FORMAT_VERSION: u32 = 1;

/// A row of the results: a task, or a group of tasks.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Name of the task or group.
    pub name: String,
    /// Its name in tables.
    pub alias: String,
    /// Version of its definition, as the harness writes it.
    pub version: String,
    /// Examples before each question; `None` for a group whose tasks differ, or that has only groups.
    pub shots: Option<usize>,
    /// Rows of the split, and how many of them were used.
    pub rows: [usize; 2],
    /// The numbers.
    pub metrics: Vec<(Metric, Estimate)>,
    /// The tasks and groups of a group.
    pub members: Vec<String>,
    /// What the harness calls the config of a task.
    pub config: Json,
    /// Hash of all that a task asked, which shows whether two results are of the same questions.
    pub hash: String,
    /// How many groups it is in, each inside the other.
    pub depth: usize,
}

impl Outcome {
    /// The outcome of a task.
    pub(crate) fn of_task(prepared: &Prepared, measured: &Measured, hash: String) -> Self {
        let task = &prepared.task;
        let metric = |metric: &Metric| json!({ "metric": metric.name(), "aggregation": "mean", "higher_is_better": metric.higher_is_better() });
        let output = if task.kind == Kind::Rolling { "loglikelihood_rolling" } else { "multiple_choice" };
        let config = json!({
            "task": task.name,
            "dataset_path": task.sources[0],
            "dataset_name": task.config,
            "training_split": task.train,
            "validation_split": task.validation,
            "test_split": task.test,
            "fewshot_split": task.fewshot_split,
            "description": task.description,
            "doc_to_text": task.context,
            "target_delimiter": task.delimiter,
            "fewshot_delimiter": "\n\n",
            "num_fewshot": prepared.shots,
            "output_type": output,
            "metric_list": task.metrics.iter().map(metric).collect::<Vec<_>>(),
            "metadata": { "version": task.version },
        });
        Self {
            name: task.name.clone(),
            alias: task.alias.clone().unwrap_or_else(|| task.name.clone()),
            version: format!("{:?}", task.version),
            shots: Some(prepared.shots),
            rows: [prepared.rows_of_split, prepared.rows.len()],
            metrics: measured.metrics.clone(),
            members: Vec::new(),
            config,
            hash,
            depth: 0,
        }
    }

    fn is_group(&self) -> bool {
        !self.members.is_empty()
    }

    fn result(&self) -> Json {
        let mut result = Map::new();
        result.insert("name".to_owned(), json!(self.name));
        result.insert("alias".to_owned(), json!(self.alias));
        if self.metrics.is_empty() {
            return Json::Object(result);
        }
        result.insert("sample_len".to_owned(), json!(self.rows[1]));
        for (metric, estimate) in &self.metrics {
            let stderr = estimate.stderr.map_or_else(|| json!("N/A"), |stderr| json!(stderr));
            result.insert(format!("{},none", metric.name()), json!(estimate.value));
            result.insert(format!("{}_stderr,none", metric.name()), stderr);
        }
        if self.is_group() {
            let counts = self
                .metrics
                .iter()
                .map(|(metric, _)| (format!("{},none", metric.name()), json!(self.rows[1])));
            result.insert("sample_count".to_owned(), Json::Object(counts.collect()));
        }
        Json::Object(result)
    }
}

/// The results file, without what is known of the model and the command, which `more` adds.
pub fn results_file(outcomes: &[Outcome], more: Map<String, Json>) -> Json {
    let of = |value: &dyn Fn(&Outcome) -> Json| -> Json {
        Json::Object(outcomes.iter().map(|outcome| (outcome.name.clone(), value(outcome))).collect())
    };
    let groups: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.is_group()).collect();
    let of_groups = |value: &dyn Fn(&Outcome) -> Json| -> Json {
        Json::Object(groups.iter().map(|outcome| (outcome.name.clone(), value(outcome))).collect())
    };
    // Of a group, that of the tasks which it has itself.
    let direction = |outcome: &Outcome| {
        let of = |task: &Outcome| task.metrics.iter().map(|(metric, _)| *metric).collect::<Vec<_>>();
        let members = outcomes.iter().filter(|task| !task.is_group() && outcome.members.contains(&task.name));
        let metrics = if outcome.is_group() { members.flat_map(of).collect() } else { of(outcome) };
        let metrics = metrics.into_iter();
        metrics
            .map(|metric| (metric.name().to_owned(), json!(metric.higher_is_better())))
            .collect::<Map<_, _>>()
    };
    let directions = outcomes.iter().map(|outcome| (outcome.name.clone(), direction(outcome)));
    let directions = directions.filter(|(_, metrics)| !metrics.is_empty());
    let directions: Map<_, _> = directions.map(|(name, metrics)| (name, Json::Object(metrics))).collect();
    let tasks = outcomes.iter().filter(|outcome| !outcome.is_group());
    let samples = tasks.map(|outcome| {
        (outcome.name.clone(), json!({ "original": outcome.rows[0], "effective": outcome.rows[1] }))
    });
    let version = |outcome: &Outcome| match outcome.version.parse::<f64>() {
        Ok(version) if !outcome.is_group() => json!(version),
        _ => json!(outcome.version),
    };
    let mut file = Map::new();
    file.insert("results".to_owned(), of(&Outcome::result));
    let summed = groups.iter().filter(|group| !group.metrics.is_empty());
    let summed: Map<_, _> = summed.map(|group| (group.name.clone(), group.result())).collect();
    if !summed.is_empty() {
        file.insert("groups".to_owned(), Json::Object(summed));
    }
    file.insert("group_subtasks".to_owned(), of_groups(&|group| json!(group.members)));
    file.insert("versions".to_owned(), of(&version));
    let shots = outcomes.iter().filter_map(|outcome| Some((outcome.name.clone(), json!(outcome.shots?))));
    let of_tasks = |value: &dyn Fn(&Outcome) -> Json| -> Json {
        let tasks = outcomes.iter().filter(|outcome| !outcome.is_group());
        Json::Object(tasks.map(|outcome| (outcome.name.clone(), value(outcome))).collect())
    };
    file.insert("configs".to_owned(), of_tasks(&|task| task.config.clone()));
    file.insert("task_hashes".to_owned(), of_tasks(&|task| json!(task.hash)));
    file.insert("n-shot".to_owned(), Json::Object(shots.collect()));
    file.insert("higher_is_better".to_owned(), Json::Object(directions));
    file.insert("n-samples".to_owned(), Json::Object(samples.collect()));
    file.extend(more);
    Json::Object(file)
}

/// A line of a samples file.
#[derive(Debug, Serialize)]
struct Sample<'a> {
    doc_id: usize,
    doc: &'a Value,
    target: String,
    arguments: Map<String, Json>,
    resps: Vec<[Json; 1]>,
    filtered_resps: Vec<Json>,
    filter: &'static str,
    metrics: Vec<&'static str>,
    doc_hash: String,
    prompt_hash: String,
    target_hash: String,
    #[serde(flatten)]
    values: Map<String, Json>,
}

/// The lines of a samples file, a row each, with what the model was asked and what it answered; and the hash of all that was
/// asked.
pub(crate) fn samples(
    prepared: &Prepared,
    measured: &Measured,
    likelihoods: &[Likelihood],
) -> (String, String) {
    let (mut lines, mut hashes) = (String::new(), String::new());
    for row in &prepared.rows {
        let sample = sample(prepared, measured, row, &likelihoods[row.requests.clone()]);
        lines += &serde_json::to_string(&sample).expect("plain data is valid JSON");
        lines.push('\n');
        hashes += &[sample.doc_hash, sample.prompt_hash, sample.target_hash].concat();
    }
    (lines, sha256(&hashes))
}

fn sample<'a>(
    prepared: &'a Prepared,
    measured: &Measured,
    row: &'a Row,
    likelihoods: &[Likelihood],
) -> Sample<'a> {
    let metrics: Vec<&'static str> = prepared.task.metrics.iter().map(|metric| metric.name()).collect();
    let (doc, target, texts, values, answers): (&Value, String, Vec<Vec<String>>, Vec<Json>, Vec<Json>) =
        match &row.content {
            Content::Question { question, before } => {
                let pair = |choice| {
                    let (context, continuation) = asked(&prepared.task, question, before, choice);
                    vec![context, continuation]
                };
                let values = measured.of_rows[row.number].iter().map(|value| json!(value)).collect();
                let answer =
                    |one: &Likelihood| json!([python_float(one.log_likelihood), python_bool(one.greedy)]);
                let texts = (0..question.asked.count()).map(pair).collect();
                (&question.row, question.target(), texts, values, likelihoods.iter().map(answer).collect())
            }
            Content::Text { row, original, text } => {
                let sum: f64 = likelihoods.iter().map(|one| one.log_likelihood).sum();
                let of = |metric: &Metric| {
                    let units =
                        if *metric == Metric::WordPerplexity { words(original) } else { original.len() };
                    json!([sum, units])
                };
                let values = prepared.task.metrics.iter().map(of).collect();
                (row, text.clone(), vec![vec![text.clone()]], values, vec![json!(python_float(sum))])
            }
        };
    let prompt = texts.first().and_then(|texts| texts.first()).cloned().unwrap_or_default();
    let arguments = texts.into_iter().enumerate().map(|(index, texts)| {
        let texts =
            texts.into_iter().enumerate().map(|(index, text)| (format!("arg_{index}"), Json::from(text)));
        (format!("gen_args_{index}"), Json::Object(texts.collect()))
    });
    Sample {
        doc_id: row.number,
        doc,
        arguments: arguments.collect(),
        resps: answers.iter().cloned().map(|answer| [answer]).collect(),
        filtered_resps: answers,
        filter: "none",
        doc_hash: sha256(&serde_json::to_string_pretty(doc).expect("plain data is valid JSON")),
        prompt_hash: sha256(&prompt),
        target_hash: sha256(&target),
        target,
        values: metrics.iter().map(|name| (*name).to_owned()).zip(values).collect(),
        metrics,
    }
}

/// `str(number)`, as Python writes it.
fn python_float(number: f64) -> String {
    // Between these limits, Python writes no exponent, as Rust always does.
    if number == 0.0 || (1e-4..1e16).contains(&number.abs()) {
        format!("{number:?}")
    } else if number.is_nan() {
        "nan".to_owned()
    } else if number.is_infinite() {
        if number > 0.0 { "inf" } else { "-inf" }.to_owned()
    } else {
        // At least two digits, and a sign.
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
        format!("{digits}e{sign}{exponent:0>2}")
    }
}

fn python_bool(flag: bool) -> &'static str {
    if flag { "True" } else { "False" }
}

pub(super) fn sha256(text: &str) -> String {
    use sha2::{Digest as _, Sha256};
    let mut hex = String::new();
    for byte in Sha256::digest(text.as_bytes()) {
        write!(hex, "{byte:02x}").expect("a string takes all");
    }
    hex
}

/// Outcomes in the harness's order: groups by name, each with what it has, by name; then other tasks by name.
fn in_order(outcomes: &[Outcome]) -> Vec<Outcome> {
    fn add(outcomes: &[Outcome], outcome: &Outcome, ordered: &mut Vec<Outcome>) {
        ordered.push(outcome.clone());
        let mut members: Vec<&Outcome> =
            outcomes.iter().filter(|other| outcome.members.contains(&other.name)).collect();
        members.sort_by(|a, b| a.name.cmp(&b.name));
        for member in members {
            add(outcomes, member, ordered);
        }
    }
    let is_root = |outcome: &&Outcome| !outcomes.iter().any(|group| group.members.contains(&outcome.name));
    let mut roots: Vec<&Outcome> = outcomes.iter().filter(is_root).collect();
    roots.sort_by(|a, b| (!a.is_group(), &a.name).cmp(&(!b.is_group(), &b.name)));
    let mut ordered = Vec::new();
    for root in roots {
        add(outcomes, root, &mut ordered);
    }
    ordered
}

/// The table that the harness prints, in Markdown: all outcomes, then the groups.
pub fn markdown(outcomes: &[Outcome]) -> String {
    let outcomes = &in_order(outcomes)[..];
    let mut text = table("Tasks", outcomes);
    let groups: Vec<Outcome> = outcomes
        .iter()
        .filter(|outcome| outcome.is_group() && !outcome.metrics.is_empty())
        .cloned()
        .collect();
    if !groups.is_empty() {
        text.push('\n');
        text += &table("Groups", &groups);
    }
    text
}

fn table(first: &'static str, outcomes: &[Outcome]) -> String {
    const HEADER: [&str; 8] = ["Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"];
    let mut rows: Vec<Vec<String>> = Vec::new();
    for outcome in outcomes {
        let mut metrics = outcome.metrics.clone();
        metrics.sort_by_key(|(metric, _)| metric.name());
        for (index, (metric, estimate)) in metrics.iter().enumerate() {
            let (name, version) = if index == 0 {
                let indent = if outcome.depth > 0 {
                    format!("{}- ", " ".repeat(outcome.depth))
                } else {
                    String::new()
                };
                (format!("{indent}{}", outcome.alias), outcome.version.trim_end_matches(".0").to_owned())
            } else {
                (String::new(), String::new())
            };
            let arrow = match outcome.shots {
                None => "",
                Some(_) if metric.higher_is_better() => "↑",
                Some(_) => "↓",
            };
            let stderr = estimate.stderr.map_or_else(|| "N/A".to_owned(), |stderr| format!("{stderr:.4}"));
            rows.push(vec![
                name,
                version,
                "none".to_owned(),
                outcome.shots.map_or_else(String::new, |shots| shots.to_string()),
                metric.name().to_owned(),
                arrow.to_owned(),
                format!("{:.4}", estimate.value),
                "±".to_owned(),
                stderr,
            ]);
        }
    }
    let header: Vec<&str> = std::iter::once(first).chain(HEADER).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([header[column].chars().count(), 3]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let right = |column: usize| matches!(column, 1 | 3 | 6 | 8);
    let line = |cells: &[&str]| {
        let cells = cells.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if right(column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        format!("|{}|\n", cells.collect::<Vec<_>>().join("|"))
    };
    // Titles are centred.
    let titles: Vec<String> =
        header.iter().zip(&widths).map(|(title, width)| format!("{title:^width$}")).collect();
    let mut text = line(&titles.iter().map(String::as_str).collect::<Vec<_>>());
    let rules = widths.iter().enumerate().map(|(column, width)| {
        if right(column) { format!("{}:", "-".repeat(width - 1)) } else { "-".repeat(*width) }
    });
    writeln!(text, "|{}|", rules.collect::<Vec<_>>().join("|")).expect("a string takes all");
    for row in &rows {
        text += &line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    text
}

/// What the results file says of a model, its data and the settings. Nothing in it depends on the time or on the number of
/// threads. `place` is where the model is.
pub fn description<B: Backend>(
    place: &str,
    loaded: &LoadedModel<B>,
    tokenizer: &Tokenizer,
    data: &[String],
    settings: &Settings,
) -> Map<String, Json> {
    let config = loaded.model.config();
    let name = place.trim_end_matches('/').rsplit('/').next();
    let limit = match settings.limit {
        None => Json::Null,
        Some(Limit::Rows(rows)) => json!(rows),
        Some(Limit::Share(share)) => json!(share),
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    let description = json!({
        "format_version": FORMAT_VERSION,
        "evaluator": env!("CARGO_PKG_VERSION"),
        "model": {
            "folder": place,
            "parameters": config.parameters(),
            "weights": loaded.digest,
            "tokenizer": tokenizer.digest(),
            "config": config,
        },
        "data": data,
        "config": {
            "model": "ulmus",
            "model_args": format!("pretrained={place},add_bos_token={}", settings.add_bos),
            "model_num_parameters": config.parameters(),
            "model_dtype": loaded.model.format().to_string(),
            "device": kind_of_device(&loaded.model),
            "limit": limit,
            "fewshot_seed": settings.seed,
        },
        "model_source": "ulmus",
        "model_name": name,
        "model_name_sanitized": name.map(|name| name.replace(|c| !allowed(c), "_")),
        "tokenizer_bos_token": [tokenizer.special_names().0, &tokenizer.bos().to_string()],
        "tokenizer_eos_token": [tokenizer.special_names().1, &tokenizer.eos().to_string()],
        "eot_token_id": tokenizer.eos(),
        "max_length": settings.context,
        "lm_eval_version": match settings.revision {
            Revision::Current => "0.4.13",
            Revision::Dc90fec => "dc90fec",
        },
    });
    let Json::Object(description) = description else { return Map::new() };
    description
}

/// The kind of a model's device, without the number of its threads, which changes no result.
pub fn kind_of_device<B: Backend>(model: &Model<B>) -> String {
    let device = model.backend().describe();
    device.split_once(", ").map_or(device.as_str(), |(kind, _)| kind).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        // From Python 3.11.
        for (number, text) in [
            (-25.820_980_072_021_484, "-25.820980072021484"),
            (1.0, "1.0"),
            (0.0, "0.0"),
            (1e-5, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (1e16, "1e+16"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(python_float(number), text);
        }
    }
}
