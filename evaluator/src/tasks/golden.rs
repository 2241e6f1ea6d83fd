//! Compares with what the harness itself computed of the same rows, for every run of `tests/golden/evaluation`.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use ulmus_backend::WeightFormat;
use ulmus_cpu::Cpu;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::Digest;

use super::definition::{Catalogue, Revision};
use super::journal::Journal;
use super::measure::{Content, Limit, Prepared, Row, Settings};
use super::metric::pooled;
use super::report::{markdown, results_file, sha256};
use super::rows::DataSets;
use super::run::{Evaluation, Progress};
use super::scorer::{Batching, Likelihood, score};
use super::tokens::Request;
use crate::{EvaluatorError, LoadedModel, load_model, load_tokenizer};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/evaluation")
}

struct Bench {
    model: LoadedModel<Cpu>,
    tokenizer: Tokenizer,
    data: DataSets,
}

impl Bench {
    fn new(threads: usize) -> Self {
        let folder = golden().join("../tiny");
        let model = load_model(&folder, Cpu::new(threads), WeightFormat::F32).unwrap();
        let tokenizer = load_tokenizer(&folder, &model).unwrap();
        let data = DataSets::open(&[golden().join("data").display().to_string()]).unwrap();
        Self { model, tokenizer, data }
    }

    fn prepare(&self, task: &str, settings: &Settings) -> Prepared {
        let catalogue = Catalogue::built_in(settings.revision);
        Prepared::new(&catalogue.tasks[task], &self.data, &self.tokenizer, settings).unwrap()
    }

    fn score(&self, requests: &[Request], batching: Batching) -> Vec<Likelihood> {
        let mut likelihoods = vec![None; requests.len()];
        let mut on_scored = |scored: &[(usize, Likelihood)]| {
            for (index, likelihood) in scored {
                assert!(likelihoods[*index].replace(*likelihood).is_none(), "each request is scored once");
            }
            Ok(())
        };
        let requests: Vec<&Request> = requests.iter().collect();
        score(&self.model.model, batching, &requests, &mut on_scored).unwrap();
        likelihoods.into_iter().map(Option::unwrap).collect()
    }
}

fn settings(run: &Json, revision: Revision) -> Settings {
    let number = |key: &str| run[key].as_u64().map(|number| number as usize);
    Settings {
        shots: number("num_fewshot"),
        fewshot_split: run["override"]["fewshot_split"].as_str().map(str::to_owned),
        limit: number("limit").map(Limit::Rows),
        context: number("max_length").unwrap_or(2048),
        add_bos: true,
        revision,
        seed: 1234,
    }
}

/// The first 16 digits of a text's SHA-256.
fn short_sha256(text: &str) -> String {
    sha256(text)[..16].to_owned()
}

fn joined(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn check_requests(name: &str, prepared: &Prepared, row: &Row, likelihoods: &[Likelihood], sample: &Json) {
    let scored = &likelihoods[row.requests.clone()];
    match &row.content {
        Content::Question { question, before } => {
            let requests = sample["requests"].as_array().unwrap();
            assert_eq!(requests.len(), question.asked.count(), "{name}");
            for (choice, expected) in requests.iter().enumerate() {
                let (context, continuation) = question.asked.pair(choice);
                let context = format!("{before}{context}");
                // A context that all choices share stands beside them in some files.
                let of = |key: &str| if expected[key].is_null() { &sample[key] } else { &expected[key] };
                if let Some(whole) = of("context").as_str() {
                    assert_eq!(context, whole, "{name}");
                }
                assert_eq!(short_sha256(&context), *of("ctx_sha256"), "{name}: {context:?}");
                let delimiter = &prepared.task.delimiter;
                assert_eq!(format!("{delimiter}{continuation}"), expected["continuation"], "{name}");
                let request = &prepared.requests[row.requests.start + choice];
                let (context_ids, ids) = request.ids.split_at(request.ids.len() - request.scored);
                assert_eq!(ids.len() as u64, expected["n_cont"], "{name}: {continuation:?}");
                if let Some(expected) = expected.get("cont_ids") {
                    assert_eq!(Json::from(ids), *expected, "{name}: {continuation:?}");
                }
                let whole = expected["n_ctx"].as_u64().unwrap() as usize;
                let most = prepared.context + 1 - ids.len();
                assert_eq!(context_ids.len(), whole.min(most), "{name}");
                if let Some(expected) = expected["ctx_ids_sha256"].as_str().filter(|_| whole <= most) {
                    assert_eq!(short_sha256(&joined(context_ids)), expected, "{name}");
                }
                let tolerance = if request.ids.len() > 1000 { 1e-3 } else { 1e-4 };
                let Likelihood { log_likelihood, greedy } = scored[choice];
                let error = (log_likelihood - expected["ll"].as_f64().unwrap()).abs();
                assert!(error < tolerance, "{name}: {log_likelihood} and {expected}");
                assert_eq!(greedy, expected["greedy"], "{name}");
            }
        }
        Content::Text { text, .. } => {
            let expected = &sample["requests"][0];
            if let Some(expected) = expected["text_sha256"].as_str() {
                assert_eq!(short_sha256(text), expected, "{name}: {text:?}");
            }
            let count: usize = row.requests.clone().map(|index| prepared.requests[index].scored).sum();
            if let Some(expected) = expected["n_tokens"].as_u64() {
                assert_eq!(count as u64, expected, "{name}");
            }
            let sum: f64 = scored.iter().map(|likelihood| likelihood.log_likelihood).sum();
            assert!(
                (sum - expected["ll"].as_f64().unwrap()).abs() < 1e-3 * scored.len() as f64,
                "{name}: {sum}"
            );
        }
    }
}

/// The log-likelihoods that the harness found, for each request.
fn given(prepared: &Prepared, samples: &[Json]) -> Vec<Likelihood> {
    let mut likelihoods = Vec::new();
    for (row, sample) in prepared.rows.iter().zip(samples) {
        let requests = sample["requests"].as_array().unwrap();
        let of = |index: usize| match &row.content {
            Content::Question { .. } => requests[index]["ll"].as_f64().unwrap(),
            // The harness sums the windows of a text itself.
            Content::Text { .. } if index == 0 => requests[0]["ll"].as_f64().unwrap(),
            Content::Text { .. } => 0.0,
        };
        let each =
            (0..row.requests.len()).map(|index| Likelihood { log_likelihood: of(index), greedy: false });
        likelihoods.extend(each);
    }
    likelihoods
}

/// Compares one run of the harness, whose result file is `expected`.
fn check(bench: &Bench, name: &str, expected: &Json, revision: Revision) {
    let settings = settings(&expected["run"], revision);
    let mut of_groups = Vec::new();
    for (task, samples) in expected["samples"].as_object().unwrap() {
        let name = format!("{name}, {task}");
        let prepared = bench.prepare(task, &settings);
        let likelihoods = bench.score(&prepared.requests, Batching::default());
        let samples = samples.as_array().unwrap();
        assert_eq!(prepared.rows.len(), samples.len(), "{name}");
        let measured = prepared.count(&likelihoods);
        for (row, sample) in prepared.rows.iter().zip(samples) {
            let name = format!("{name}, row {}", row.number);
            check_requests(&name, &prepared, row, &likelihoods, sample);
            if let Some(values) = measured.of_rows.get(row.number) {
                for (metric, value) in prepared.task.metrics.iter().zip(values) {
                    let expected = sample["metrics"][metric.name()].as_f64().unwrap();
                    assert!((value - expected).abs() < 1e-4, "{name}: {metric:?} {value} and {expected}");
                }
            }
        }
        for (index, window) in expected["rolling_windows"].as_array().into_iter().flatten().enumerate() {
            let request = &prepared.requests[index];
            let of = |column: usize| window[column].as_f64().unwrap();
            let counts = [request.ids.len() - request.scored, request.scored];
            assert_eq!(counts.map(|count| count as f64), [of(0), of(1)], "{name}, window {index}");
            let error = (likelihoods[index].log_likelihood - of(2)).abs();
            assert!(error < 1e-3, "{name}, window {index}: {error}");
        }
        let results = &expected["results"][task];
        for (metric, estimate) in &measured.metrics {
            let value = results[format!("{},none", metric.name())].as_f64().unwrap();
            // Counts are equal; what depends on the log-likelihoods themselves is as close as these.
            let tolerance =
                if value.fract() == 0.0 || metric.higher_is_better() { 1e-5 } else { 1e-3 * value };
            assert!(
                (estimate.value - value).abs() < tolerance,
                "{name}: {metric:?} {estimate:?} and {value}"
            );
            let stderr = results[format!("{}_stderr,none", metric.name())].as_f64();
            assert_eq!(estimate.stderr.is_some(), stderr.is_some(), "{name}: {metric:?}");
            if let (Some(ours), Some(theirs)) = (estimate.stderr, stderr) {
                assert!(
                    (ours - theirs).abs() < 1e-4 * theirs.max(0.1),
                    "{name}: {metric:?} {ours} and {theirs}"
                );
            }
        }
        let given = prepared.count(&given(&prepared, samples));
        for (row, sample) in prepared.rows.iter().zip(samples) {
            for (metric, value) in
                prepared.task.metrics.iter().zip(given.of_rows.get(row.number).into_iter().flatten())
            {
                let expected = sample["metrics"][metric.name()].as_f64().unwrap();
                assert!(
                    (value - expected).abs() < 1e-9,
                    "{name}, row {}: {metric:?} {value} and {expected}",
                    row.number
                );
            }
        }
        for (metric, estimate) in &given.metrics {
            let number = |kind: &str| results[format!("{}{kind},none", metric.name())].as_f64();
            let value = number("").unwrap();
            assert!(
                (estimate.value - value).abs() <= 1e-9 * value.abs(),
                "{name}: {metric:?} {estimate:?} and {value}"
            );
            let error = estimate.stderr.unwrap_or(0.0) - number("_stderr").unwrap_or(0.0);
            assert!(error.abs() < 1e-9, "{name}: {metric:?} {estimate:?}");
        }
        of_groups.push((given.metrics[0].1, prepared.rows.len()));
    }
    for (group, values) in expected["groups"].as_object().into_iter().flatten() {
        let pool = pooled(&of_groups);
        let number = |key: &str| values[key].as_f64().unwrap();
        assert!((pool.value - number("acc,none")).abs() < 1e-12, "{group}: {pool:?}");
        assert!((pool.stderr.unwrap() - number("acc_stderr,none")).abs() < 1e-12, "{group}: {pool:?}");
    }
}

fn files(folder: &str) -> Vec<(String, Json)> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(golden().join(folder)).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let read = |path: PathBuf| {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        (name, serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
    };
    files.into_iter().map(read).collect()
}

#[test]
fn the_harness_s_numbers_are_met() {
    let bench = Bench::new(2);
    for (name, expected) in files("expected") {
        if expected.get("samples").is_some() {
            check(&bench, &name, &expected, Revision::Current);
        }
    }
}

#[test]
fn the_numbers_of_the_earlier_harness_are_met() {
    let bench = Bench::new(2);
    for (name, expected) in files("expected_dc90fec") {
        check(&bench, &name, &expected, Revision::Dc90fec);
    }
}

#[test]
fn the_numbers_of_corenet_on_llm_adapters_are_met() {
    let bench = Bench::new(2);
    let settings = settings(&serde_json::json!({}), Revision::Current);
    let expected = std::fs::read(golden().join("expected/llm_adapters_corenet.json")).unwrap();
    let expected: Json = serde_json::from_slice(&expected).unwrap();
    for (set, expected) in expected.as_object().unwrap() {
        let prepared = bench.prepare(&format!("llm_adapters_{set}"), &settings);
        let likelihoods = bench.score(&prepared.requests, Batching::default());
        let measured = prepared.count(&likelihoods);
        let samples = expected["samples"].as_array().unwrap();
        for (row, sample) in prepared.rows.iter().zip(samples) {
            let name = format!("{set}, row {}", row.number);
            check_requests(&name, &prepared, row, &likelihoods, sample);
            for (index, key) in ["pred", "pred_norm"].into_iter().enumerate() {
                let right = f64::from(u8::from(sample[key] == sample["answer"]));
                assert!((measured.of_rows[row.number][index] - right).abs() < 1e-12, "{name}: {key}");
            }
        }
    }
}

/// The same bits however many threads compute, whatever is computed at once, and in any order.
#[test]
fn batches_and_threads_change_no_bits() {
    let bench = Bench::new(1);
    let settings = Settings { shots: Some(3), ..settings(&serde_json::json!({}), Revision::Current) };
    for task in ["arc_challenge", "mmlu_anatomy", "truthfulqa_mc2", "winogrande"] {
        let prepared = bench.prepare(task, &settings);
        let digest = |likelihoods: &[Likelihood]| {
            let bits: Vec<u64> = likelihoods.iter().map(|one| one.log_likelihood.to_bits()).collect();
            Digest::of(bytemuck::cast_slice(&bits))
        };
        let alone: Vec<Likelihood> = prepared
            .requests
            .iter()
            .map(|request| bench.score(std::slice::from_ref(request), Batching::default())[0])
            .collect();
        for (threads, remembered, rows) in [(1, 1, 1), (2, 1, 40), (2, 5000, 256), (1, 100_000, 1000)] {
            let bench = Bench::new(threads);
            let likelihoods = bench.score(&prepared.requests, Batching { remembered, rows });
            assert_eq!(digest(&likelihoods), digest(&alone), "{task}: {threads} {remembered} {rows}");
        }
        let mut reversed = prepared.requests.clone();
        reversed.reverse();
        let mut likelihoods = bench.score(&reversed, Batching::default());
        likelihoods.reverse();
        assert_eq!(digest(&likelihoods), digest(&alone), "{task}");
    }
}

/// The files that the harness writes: the table to the letter, and the values of all keys that are not of its own making.
#[test]
fn the_harness_s_files_are_written() {
    let bench = Bench::new(2);
    let settings = settings(&serde_json::json!({ "num_fewshot": 1, "limit": 3 }), Revision::Current);
    let names = ["mmlu_stem", "hellaswag", "winogrande"].map(str::to_owned);
    let selection = Catalogue::built_in(Revision::Current).select(&names).unwrap();
    let evaluation = Evaluation {
        model: &bench.model.model,
        tokenizer: &bench.tokenizer,
        data: &bench.data,
        settings: &settings,
        batching: Batching::default(),
    };
    let mut files = Vec::new();
    let outcomes = evaluation
        .run(&selection, &mut Journal::default(), &mut |progress| {
            if let Progress::Done { task, samples } = progress {
                files.push((task.to_owned(), samples));
            }
            Ok(())
        })
        .unwrap();
    let native = |name: &str| std::fs::read_to_string(golden().join("native_output").join(name)).unwrap();
    assert_eq!(markdown(&outcomes).trim(), native("table.md").trim());

    let theirs: Json = serde_json::from_str(&native("results.json")).unwrap();
    let ours = results_file(&outcomes, serde_json::Map::new());
    for key in ["group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    for key in ["results", "groups"] {
        for (name, expected) in theirs[key].as_object().unwrap() {
            alike(&ours[key][name], expected, 1e-12, &format!("{key} of {name}"));
        }
    }
    for (task, samples) in files.iter().filter(|(task, _)| !task.starts_with("mmlu")) {
        let expected = native(&format!("samples_{task}.jsonl"));
        assert_eq!(samples.lines().count(), expected.lines().count(), "{task}");
        for (ours, theirs) in samples.lines().zip(expected.lines()) {
            let [ours, theirs]: [Json; 2] = [ours, theirs].map(|line| serde_json::from_str(line).unwrap());
            alike(&ours, &theirs, 1e-4, task);
        }
    }
}

/// Compares values, with numbers (also those within texts) up to a tolerance.
fn alike(ours: &Json, theirs: &Json, tolerance: f64, place: &str) {
    let number = |value: &Json| value.as_f64().or_else(|| value.as_str()?.parse().ok());
    match (ours, theirs) {
        (Json::Object(ours), Json::Object(theirs)) => {
            assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{place}");
            for (key, theirs) in theirs {
                alike(&ours[key], theirs, tolerance, &format!("{place}: {key}"));
            }
        }
        (Json::Array(ours), Json::Array(theirs)) => {
            assert_eq!(ours.len(), theirs.len(), "{place}");
            for (ours, theirs) in ours.iter().zip(theirs) {
                alike(ours, theirs, tolerance, place);
            }
        }
        _ => match (number(ours), number(theirs)) {
            (Some(a), Some(b)) => assert!((a - b).abs() <= tolerance, "{place}: {ours} and {theirs}"),
            _ => assert_eq!(ours, theirs, "{place}"),
        },
    }
}

#[test]
fn a_journal_answers_what_was_asked_before() {
    let bench = Bench::new(2);
    let settings = settings(&serde_json::json!({ "limit": 4 }), Revision::Current);
    let selection = Catalogue::built_in(Revision::Current).select(&["arc_easy".to_owned()]).unwrap();
    let evaluation = Evaluation {
        model: &bench.model.model,
        tokenizer: &bench.tokenizer,
        data: &bench.data,
        settings: &settings,
        batching: Batching { remembered: 1, rows: 32 },
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let open = |resume| Journal::open(&path, bench.model.digest, "cpu", "f32", resume);
    // How many requests are asked for, and the outcome unless it is interrupted after `most` answers.
    let run = |journal: &mut Journal, most: usize| {
        let (mut asked, mut answered) = (0, 0);
        let outcome = evaluation.run(&selection, journal, &mut |progress| {
            match progress {
                Progress::Planned(requests) => asked = requests,
                Progress::Answered(requests) => answered += requests,
                Progress::Begun { .. } | Progress::Done { .. } => {}
            }
            if answered >= most { Err(EvaluatorError::NoText("interrupted".to_owned())) } else { Ok(()) }
        });
        (asked, outcome.ok())
    };
    let (all, whole) = run(&mut Journal::default(), usize::MAX);
    assert!(run(&mut open(false).unwrap(), 3).1.is_none());
    // What was being written when the program was killed.
    let mut text = std::fs::read_to_string(&path).unwrap();
    let answered = text.lines().count() - 1;
    text.push_str("{\"request\":\"12");
    std::fs::write(&path, text).unwrap();
    let (asked, resumed) = run(&mut open(true).unwrap(), usize::MAX);
    assert_eq!((asked, resumed), (all - answered, whole.clone()));
    assert_eq!(run(&mut open(true).unwrap(), usize::MAX), (0, whole.clone()));
    // Two evaluators do not write to one journal, and damage in the middle is no end.
    let held = open(true).unwrap();
    assert!(open(true).unwrap_err().to_string().contains("another evaluator writes there"));
    drop(held);
    let text = std::fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("{\"request\"", "{\"requst\""),
        ("\"log_likelihood\":-", "\"log_likelihood\":-1"),
        ("false", "true"),
    ] {
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let error = open(true).unwrap_err().to_string();
        assert!(error.contains("is damaged"), "{to}: {error}");
    }
    // Who does not resume loses nothing by it.
    let mut anew = open(false).unwrap();
    assert_eq!(anew.kept(), Some(&*path.with_extension("journal.old-1")));
    let kept = std::fs::read_to_string(path.with_extension("journal.old-1")).unwrap();
    assert_eq!(kept.lines().count(), text.lines().count());
    assert_eq!(run(&mut anew, usize::MAX), (all, whole));
    drop(anew);
    std::fs::write(folder.path().join("diary"), "dear diary\n").unwrap();
    let foreign = Journal::open(&folder.path().join("diary"), bench.model.digest, "cpu", "f32", false);
    assert!(foreign.unwrap_err().to_string().contains("no journal of an evaluation"));
    let other = Journal::open(&path, bench.model.digest, "cpu", "bf16", true).unwrap_err().to_string();
    assert!(other.contains("bf16") && other.contains("--resume"), "{other}");
}
