//! Jobs: everything around training that one worker does alone.
//!
//! Each reads its input from the run's folder and writes its output there, whole and under fixed names, so that
//! doing one twice, on whatever worker, gives the same files. Results are also kept as `results/NAME.json`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use serde_json::json;
use ulmus_backend::Backend;
use ulmus_checkpoint::StoreError;
use ulmus_dataloader::{Corpus, Manifest, cargo_home};
use ulmus_evaluator::{BenchConfig, bench, continuations, perplexity};
use ulmus_model::hf::{SpecialTokens, config_json, generation_config_json};
use ulmus_model::{Layout, Model, weights_from_safetensors, weights_to_safetensors};
use ulmus_plan::{OnBadUnit, Plan};
use ulmus_process::with_causes;
use ulmus_run::paths;
use ulmus_run::results::{
    self, Average, Benchmark, Continuation, Continuations, Exported, Measured, Perplexity, Prepared, Shards,
};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{CheckpointId, Digest, FileEntry, Job};

use crate::WorkerError;
use crate::run::Run;
use crate::snapshot::weights;

/// Most text that is looked through for a document that is held out, before training. With the published share one
/// document of 2,000 is.
const LOOK_FOR_HELD_OUT: u64 = 1 << 30;

/// Does a job; gives its result as JSON, of the type that [`ulmus_run::results`] has for it. `say` tells a person what cannot
/// wait for the end of the run.
pub(crate) fn work<B: Backend>(
    run: &Run,
    backend: &B,
    threads: usize,
    job: &Job,
    say: &dyn Fn(String),
) -> Result<String, WorkerError> {
    match job {
        Job::Prepare => {
            let prepared = prepare(run, say)?;
            // What a job has found is told to people at once; its result is for programs.
            for line in prepared.prepared.iter().flat_map(|shards| shards.summary.lines()) {
                say(format!("prepare {line}"));
            }
            keep(run, job, &prepared)
        }
        Job::Average(checkpoints) => keep(run, job, &average(run, checkpoints)?),
        Job::EvaluateAverage => keep(run, job, &evaluate(run, say, || averaged(run, backend))?),
        Job::Evaluate(checkpoint) => {
            keep(run, job, &evaluate(run, say, || trained(run, *checkpoint, backend))?)
        }
        Job::Continue(checkpoints) => keep(run, job, &continue_text(run, say, checkpoints, backend)?),
        Job::Export => keep(run, job, &export(run)?),
        Job::Benchmark => keep(run, job, &benchmark(run, backend, threads)?),
    }
}

/// Writes the result of a job.
fn keep(run: &Run, job: &Job, result: &impl Serialize) -> Result<String, WorkerError> {
    run.write(&paths::result(job), results::to_json(result))?;
    Ok(serde_json::to_string(result).expect("results have text keys"))
}

/// Shards and tokenizer where the plan asks for them, and the frozen manifest of everything that is read.
fn prepare(run: &Run, say: &dyn Fn(String)) -> Result<Prepared, WorkerError> {
    let plan = &run.plan;
    let shards = match &plan.prepare {
        Some(config) => {
            let shards = run.folder().child(paths::SHARDS);
            let prepared = ulmus_dataloader::prepare(config, &cargo_home(), plan.data.unit.get(), &shards)?;
            Some(Shards {
                summary: prepared.summary(),
                shards: prepared.shards,
                documents: prepared.documents,
                bytes: prepared.bytes,
                digest: prepared.digest,
                found: prepared.found,
                taken: prepared.documents,
                passed_by: prepared.passed_by,
            })
        }
        None => None,
    };
    let manifest = Manifest::freeze(&plan.data, Some(&run.folder()))?;
    let tokenizer = tokenizer(run, &manifest)?;
    let manifest = manifest.with_tokenizer(&tokenizer);
    must_fit(&tokenizer, plan)?;
    for (name, contents) in tokenizer_files(&tokenizer) {
        run.write(name, contents)?;
    }
    run.write(paths::DATA_MANIFEST, manifest.to_json())?;
    let (pieces, tokenizer_digest) = (tokenizer.pieces(), tokenizer.digest());
    let corpus = Arc::new(run.corpus_of(&manifest, tokenizer)?);
    must_hold_text(run, &corpus)?;
    let held_out = corpus.holds_out_any(LOOK_FOR_HELD_OUT)?;
    if held_out == Some(false) {
        say(nothing_to_measure(plan));
    }
    Ok(Prepared {
        prepared: shards,
        files: manifest.files(),
        bytes: manifest.bytes(),
        manifest: manifest.digest(),
        pieces,
        tokenizer: tokenizer_digest,
        held_out,
    })
}

/// Makes sure that the model has room for the tokenizer, so that what is exported can be loaded.
fn must_fit(tokenizer: &Tokenizer, plan: &Plan) -> Result<(), WorkerError> {
    let (pieces, rows) = (tokenizer.pieces(), plan.model.vocab_size);
    if pieces < rows {
        return Ok(());
    }
    Err(WorkerError::Plan(format!(
        "the tokenizer has {pieces} pieces, and with the pad id they need {} rows of model.vocab_size = {rows}; set it to {}",
        pieces + 1,
        (pieces + 1).next_multiple_of(128)
    )))
}

/// What a person must know before a run without held-out documents is trained.
fn nothing_to_measure(plan: &Plan) -> String {
    let measures = match plan.train.held_out_every {
        0 => String::new(),
        every => format!("; train.held_out_every is {every}, and there will be no held-out loss"),
    };
    format!(
        "{}: the models will be averaged and timed, but not evaluated, and no text will be continued{measures}; to have them \
         evaluated, stop now and start a run of another name with a larger data.holdout, or with more and smaller documents",
        no_held_out(plan)
    )
}

fn no_held_out(plan: &Plan) -> String {
    match plan.data.holdout {
        0.0 => "no text is held out, as data.holdout is 0".to_owned(),
        share => format!("no document is held out: not one fell into the share of data.holdout = {share}"),
    }
}

/// The file that a tokenizer was read from and, where it can be made, its `tokenizer.json`.
fn tokenizer_files(tokenizer: &Tokenizer) -> BTreeMap<&'static str, Vec<u8>> {
    let json = tokenizer.to_json().map(|json| (paths::TOKENIZER_JSON, json.into_bytes()));
    let (name, contents) = tokenizer.file();
    json.into_iter().chain([(name, contents.to_vec())]).collect()
}

/// The tokenizer that the plan names, or one trained on the run's own text.
fn tokenizer(run: &Run, manifest: &Manifest) -> Result<Tokenizer, WorkerError> {
    let config = &run.plan.tokenizer;
    if let Some(path) = &config.file {
        let bytes = std::fs::read(path).map_err(|error| WorkerError::File { path: path.clone(), error })?;
        return Ok(Tokenizer::read(&bytes, path, config.bos.as_deref(), config.eos.as_deref())?);
    }
    let sources = ulmus_dataloader::Sources::open(&run.plan.data, manifest, Some(&run.folder()))?;
    let sample = sources.sample(config.sample.get())?;
    Ok(ulmus_tokenizer::train(&sample, config.pieces as usize)?)
}

/// Finds out now, and not in the first step, when the filters leave nothing.
fn must_hold_text(run: &Run, corpus: &Arc<Corpus>) -> Result<(), WorkerError> {
    let start = corpus.start();
    let first: Vec<_> = corpus.lanes().take(1).collect();
    let mut loader =
        ulmus_dataloader::Loader::open(Arc::clone(corpus), run.plan.sequence_length(), &first, &start)?;
    loader.take(&first, 1)?;
    Ok(())
}

/// The mean of some checkpoints' weights, summed in f64 in the order of their steps and rounded once.
fn average(run: &Run, checkpoints: &[CheckpointId]) -> Result<Average, WorkerError> {
    let layout = Layout::new(&run.plan.model);
    let mut sum = vec![0_f64; layout.parameters()];
    for checkpoint in checkpoints {
        let weights = run.wait(weights(&run.store, *checkpoint, &layout))?;
        for (sum, weight) in sum.iter_mut().zip(&weights) {
            *sum += f64::from(*weight);
        }
    }
    let count = checkpoints.len() as f64;
    let mean: Vec<f32> = sum.into_iter().map(|sum| (sum / count) as f32).collect();
    let file = weights_to_safetensors(&layout, &mean)?;
    let entry = FileEntry::of(&file);
    run.write(paths::AVERAGE, file)?;
    let result = Average {
        checkpoints: checkpoints.to_vec(),
        files: [(paths::WEIGHTS.to_owned(), entry)].into(),
        weights: Digest::of(bytemuck::cast_slice(&mean)),
    };
    run.write(paths::AVERAGE_MANIFEST, results::to_json(&result))?;
    Ok(result)
}

/// The file of the average, as its manifest has it.
fn average_file(run: &Run) -> Result<Vec<u8>, WorkerError> {
    let damaged = |file: &str, reason: String| WorkerError::Damaged {
        file: file.to_owned(),
        reason,
        act: "put back a copy of it (export/model.safetensors holds the same average, if it was written), or start a run of \
              another name",
    };
    let read = |path: &str| match run.read(path) {
        Err(StoreError::NotFound { .. }) => Err(damaged(path, "it does not exist".to_owned())),
        read => Ok(read?),
    };
    let manifest: Average = serde_json::from_slice(&read(paths::AVERAGE_MANIFEST)?)
        .map_err(|error| damaged(paths::AVERAGE_MANIFEST, error.to_string()))?;
    let expected = manifest
        .files
        .get(paths::WEIGHTS)
        .ok_or_else(|| damaged(paths::AVERAGE_MANIFEST, format!("it does not list {}", paths::WEIGHTS)))?;
    let file = read(paths::AVERAGE)?;
    let found = FileEntry::of(&file);
    if found != *expected {
        let (has, had) = (found, expected);
        let reason = format!(
            "it has {} bytes and hash {}, and was written with {} and {}",
            has.bytes,
            has.digest.short(),
            had.bytes,
            had.digest.short()
        );
        return Err(damaged(paths::AVERAGE, reason));
    }
    Ok(file)
}

fn averaged<B: Backend>(run: &Run, backend: &B) -> Result<Arc<Model<B>>, WorkerError> {
    model(run, &weights_from_safetensors(&Layout::new(&run.plan.model), &average_file(run)?)?, backend)
}

fn trained<B: Backend>(
    run: &Run,
    checkpoint: CheckpointId,
    backend: &B,
) -> Result<Arc<Model<B>>, WorkerError> {
    let layout = Layout::new(&run.plan.model);
    model(run, &run.wait(weights(&run.store, checkpoint, &layout))?, backend)
}

fn model<B: Backend>(run: &Run, weights: &[f32], backend: &B) -> Result<Arc<Model<B>>, WorkerError> {
    Ok(Arc::new(Model::new(backend.clone(), &run.plan.model, weights)?))
}

/// What finished models are measured on.
struct HeldOut {
    tokenizer: Tokenizer,
    /// Held-out documents in their fixed order, up to the plan's limit.
    texts: Vec<String>,
    /// Units that cannot be read, and why.
    left_out: Vec<String>,
}

/// Reads what finished models are measured on; or says why there is nothing.
///
/// A unit that cannot be read is reported as in training while the coordinator may still leave it out. Otherwise it is
/// left out here alone: a run that is trained must not depend for ever on a file that only its evaluation needs.
fn held_out(run: &Run, say: &dyn Fn(String)) -> Result<Result<HeldOut, String>, WorkerError> {
    let limit = run.plan.evaluate.text.get();
    if limit == 0 {
        return Ok(Err("evaluate.text is 0".to_owned()));
    }
    let data = &run.plan.data;
    let quarantined = run.quarantine()?.len() as u64;
    let reports = data.on_bad_unit == OnBadUnit::Quarantine && quarantined < data.max_bad_units;
    // A token is at least a byte of text, so this many sequences hold enough.
    let length = run.plan.sequence_length();
    let sequences = limit.div_ceil(length as u64) as usize;
    let mut corpus = run.corpus()?;
    let mut left_out = Vec::new();
    let texts = loop {
        let error = match corpus.held_out(length, sequences) {
            Ok(held_out) => break held_out.texts,
            Err(error) => WorkerError::from(error),
        };
        let Some(unit) = error.bad_unit().filter(|_| !reports) else { return Err(error) };
        let why = format!("{unit} is left out of the evaluation: {}", with_causes(&error));
        say(why.clone());
        left_out.push(why);
        corpus = corpus.without([&unit]);
    };
    let mut bytes = 0;
    let mut fits = |text: &String| {
        let fits = bytes == 0 || bytes + text.len() as u64 <= limit;
        bytes += text.len() as u64;
        fits
    };
    let texts: Vec<String> =
        texts.into_iter().filter(|text| !text.is_empty()).take_while(&mut fits).collect();
    if texts.is_empty() {
        return Ok(Err([vec![no_held_out(&run.plan)], left_out].concat().join("; ")));
    }
    Ok(Ok(HeldOut { tokenizer: corpus.tokenizer().clone(), texts, left_out }))
}

fn evaluate<B: Backend>(
    run: &Run,
    say: &dyn Fn(String),
    model: impl FnOnce() -> Result<Arc<Model<B>>, WorkerError>,
) -> Result<Measured<Perplexity>, WorkerError> {
    let HeldOut { tokenizer, texts, left_out } = match held_out(run, say)? {
        Ok(held_out) => held_out,
        Err(skipped) => return Ok(Measured::Skipped { skipped }),
    };
    let result = perplexity(&model()?, &tokenizer, &texts, run.plan.sequence_length())?;
    Ok(Measured::Done { result, left_out })
}

/// What the model wrote at several points of its training, after the same held-out text.
fn continue_text<B: Backend>(
    run: &Run,
    say: &dyn Fn(String),
    checkpoints: &[CheckpointId],
    backend: &B,
) -> Result<Measured<Continuations>, WorkerError> {
    let HeldOut { tokenizer, texts, left_out } = match held_out(run, say)? {
        Ok(held_out) => held_out,
        Err(skipped) => return Ok(Measured::Skipped { skipped }),
    };
    let config = &run.plan.evaluate;
    let mut prompt = String::new();
    let mut written = Vec::new();
    for checkpoint in checkpoints {
        let model = trained(run, *checkpoint, backend)?;
        let (start, length) = (config.prompt as usize, config.continuation as usize);
        for continuation in continuations(&model, &tokenizer, &texts[..1], start, length)? {
            prompt = continuation.prompt;
            written.push(Continuation { checkpoint: *checkpoint, text: continuation.text });
        }
    }
    Ok(Measured::Done { result: Continuations { prompt, continuations: written }, left_out })
}

/// The average in Hugging Face layout.
fn export(run: &Run) -> Result<Exported, WorkerError> {
    let tokenizer = run.tokenizer()?;
    let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.eos() };
    let mut files = BTreeMap::new();
    let (bos, eos) = tokenizer.names_of_ends();
    let names = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos });
    let contents = [
        ("config.json", config_json(&run.plan.model, tokens)?.into_bytes()),
        ("generation_config.json", generation_config_json(tokens).into_bytes()),
        (paths::WEIGHTS, average_file(run)?),
        ("tokenizer_config.json", results::to_json(&names)),
    ];
    for (name, contents) in contents.into_iter().chain(tokenizer_files(&tokenizer)) {
        files.insert(name.to_owned(), FileEntry::of(&contents));
        run.write(&paths::export_file(name), contents)?;
    }
    Ok(Exported { folder: paths::EXPORT.to_owned(), files })
}

fn benchmark<B: Backend>(run: &Run, backend: &B, threads: usize) -> Result<Benchmark, WorkerError> {
    let config = &run.plan.benchmark;
    let config = BenchConfig {
        prompt: config.prompt as usize,
        generate: config.generate as usize,
        runs: config.runs as usize,
        batch: 1,
    };
    let result = bench(&averaged(run, backend)?, config, threads)?;
    Ok(Benchmark {
        prompt_tokens_per_second: result.median.prompt,
        generate_tokens_per_second: result.median.generation,
        details: json!(result),
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::path::{Path, PathBuf};

    use serde_json::Value;
    use tempfile::TempDir;
    use tokio::runtime::Runtime;
    use ulmus_backend::WeightFormat;
    use ulmus_checkpoint::Store;
    use ulmus_cpu::Cpu;
    use ulmus_evaluator::{load_model, load_tokenizer, synthetic_weights};
    use ulmus_types::{BadUnit, ErrorKind, Generation, Step};

    use ulmus_types::RunId;

    use super::*;

    /// A plan whose text is in a folder of 40 files; more of it follows.
    const PLAN: &str = r#"
        [run]
        name = "small"
        [tokenizer]
        file = "TOKENIZER"
        [model]
        vocab_size = 640
        max_context_length = 64
        num_transformer_layers = 1
        model_dim = 32
        head_dim = 16
        num_gqa_groups = 1
        ffn_dim_divisor = 16
        [data]
        lanes = 1
        min_characters = 1
        min_tokens = 1
        holdout = 0.5
        [[data.source]]
        name = "texts"
        url = "TEXTS"
        files = ["*.txt"]
        text = "text"
        [train]
        iterations = 10
        warmup = 1
        sequences = 2
        micro_batch = 2
        [checkpoint]
        every = 10
        average = 1
        [evaluate]
        prompt = 4
        continuation = 4
        [benchmark]
        prompt = 2
        generate = 2
        runs = 1
    "#;

    /// A run in a folder of its own, and what its jobs said.
    struct Place {
        run: Run,
        said: RefCell<Vec<String>>,
        home: TempDir,
        _runtime: Runtime,
    }

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny").join(name)
    }

    impl Place {
        fn with_tokenizer(tokenizer: &Path, overrides: &[&str]) -> Self {
            let home = tempfile::tempdir().unwrap();
            let texts = home.path().join("texts");
            std::fs::create_dir(&texts).unwrap();
            for number in 0..40 {
                let text = format!("Text number {number} has some words. ").repeat(12);
                std::fs::write(texts.join(format!("{number:02}.txt")), text).unwrap();
            }
            let plan = PLAN
                .replace("TOKENIZER", tokenizer.to_str().unwrap())
                .replace("TEXTS", texts.to_str().unwrap());
            let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
            let plan = ulmus_plan::read(&plan, &overrides).unwrap_or_else(|problems| panic!("{problems}"));
            let store = Store::create(home.path().join("run").to_str().unwrap()).unwrap();
            let runtime = Runtime::new().unwrap();
            let id = RunId::from_bytes([1; 16]);
            let run = Run::new(id, plan.into_iter().next().unwrap(), store, runtime.handle().clone());
            Self { run, said: RefCell::default(), home, _runtime: runtime }
        }

        fn new(overrides: &[&str]) -> Self {
            Self::with_tokenizer(&golden("tokenizer.model"), overrides)
        }

        fn work(&self, job: &Job) -> Result<Value, WorkerError> {
            let result = work(&self.run, &Cpu::new(1), 1, job, &|text| self.said.borrow_mut().push(text))?;
            results::check(job, &result).unwrap_or_else(|error| panic!("{error}"));
            Ok(serde_json::from_str(&result).unwrap())
        }

        /// Does what is done before models are looked at, with invented weights.
        fn train(&self) -> Value {
            let prepared = self.work(&Job::Prepare).unwrap_or_else(|error| panic!("{error}"));
            let model = &self.run.plan.model;
            let file = weights_to_safetensors(&Layout::new(model), &synthetic_weights(model)).unwrap();
            let manifest = Average {
                checkpoints: vec![last()],
                files: [(paths::WEIGHTS.to_owned(), FileEntry::of(&file))].into(),
                weights: Digest::of(&file),
            };
            self.run.write(paths::AVERAGE, file).unwrap();
            self.run.write(paths::AVERAGE_MANIFEST, results::to_json(&manifest)).unwrap();
            prepared
        }
    }

    fn last() -> CheckpointId {
        CheckpointId::new(Step::new(10), Generation::new(1))
    }

    #[test]
    fn a_run_without_held_out_text_says_so_before_it_trains_and_is_finished() {
        for (overrides, before, why) in [
            (&["data.holdout=0", "train.held_out_every=0"][..], true, "data.holdout is 0"),
            (&["data.holdout=1e-9"], true, "not one fell into the share of data.holdout = 0.000000001"),
            (
                &["data.holdout=0", "train.held_out_every=0", "data.pack=corenet", "data.piece_words=8"],
                true,
                "data.holdout is 0",
            ),
            (&["evaluate.text=0"], false, "evaluate.text is 0"),
        ] {
            let place = Place::new(overrides);
            let prepared = place.train();
            assert_eq!(prepared["held_out"], !before);
            let said = place.said.take();
            assert_eq!(said.len(), usize::from(before), "{said:?}");
            for text in said {
                assert!(text.contains(why) && text.contains("larger data.holdout"), "{text}");
                assert_eq!(text.contains("train.held_out_every is 5000"), overrides.len() == 1, "{text}");
            }
            for job in [Job::EvaluateAverage, Job::Evaluate(last()), Job::Continue(vec![last()])] {
                let result = place.work(&job).unwrap_or_else(|error| panic!("{error}"));
                assert_eq!(result.as_object().unwrap().len(), 1);
                assert!(result["skipped"].as_str().unwrap().contains(why), "{result}");
            }
            place.work(&Job::Export).unwrap();
            place.work(&Job::Benchmark).unwrap();
        }
        let place = Place::new(&[]);
        assert_eq!(place.train()["held_out"], true);
        assert!(place.work(&Job::EvaluateAverage).unwrap()["loss"].as_f64().unwrap() > 0.0);
        assert!(place.said.take().is_empty());
    }

    #[test]
    fn a_unit_that_only_the_evaluation_needs_is_left_out_of_it() {
        let gone = |overrides: &[&str]| {
            let place = Place::new(&[&["data.unit=64KiB", "evaluate.text=256KiB"], overrides].concat());
            let path = |number: usize| place.home.path().join(format!("texts/{number:02}.txt"));
            // Two of them do not fit a unit.
            for number in 0..40 {
                std::fs::write(path(number), format!("Text number {number} has some words. ").repeat(1700))
                    .unwrap();
            }
            place.train();
            (0..40).step_by(3).for_each(|number| std::fs::remove_file(path(number)).unwrap());
            place
        };
        let place = gone(&[]);
        let result = place.work(&Job::EvaluateAverage).unwrap_or_else(|error| panic!("{error}"));
        let left_out = result["left_out"].as_array().unwrap();
        assert!(left_out.len() > 1 && result["documents"].as_u64().unwrap() > 0, "{result}");
        let first = left_out[0].as_str().unwrap();
        assert!(first.starts_with("unit 0 of source \"texts\" is left out of the evaluation: "), "{first}");
        assert!(first.contains("00.txt"), "{first}");
        assert_eq!(json!(place.said.take()), result["left_out"]);
        let left_out = left_out.len();

        // The coordinator leaves units out as in training, while it may.
        let place = gone(&["data.on_bad_unit=quarantine", "data.max_bad_units=1"]);
        let unit = place.work(&Job::EvaluateAverage).unwrap_err().bad_unit().unwrap();
        assert_eq!(unit, BadUnit { source: "texts".to_owned(), unit: 0 });
        place.run.write("quarantine.json", json!([[unit, "it is gone"]]).to_string().into_bytes()).unwrap();
        let result = place.work(&Job::EvaluateAverage).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(result["left_out"].as_array().unwrap().len() + 1, left_out);
    }

    #[test]
    fn a_damaged_average_is_never_used() {
        let place = Place::new(&[]);
        place.train();
        let whole = place.run.read(paths::AVERAGE).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damaged in [flipped, whole[..whole.len() - 4].to_vec()] {
            place.run.write(paths::AVERAGE, damaged).unwrap();
            for job in [Job::EvaluateAverage, Job::Export, Job::Benchmark] {
                let error = place.work(&job).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt);
                assert!(error.to_string().starts_with("average/model.safetensors is damaged"), "{error}");
            }
        }
        place.run.write(paths::AVERAGE, whole.clone()).unwrap();
        place.work(&Job::EvaluateAverage).unwrap();
        let manifest = place.run.read(paths::AVERAGE_MANIFEST).unwrap();
        for (path, contents) in [(paths::AVERAGE, &whole), (paths::AVERAGE_MANIFEST, &manifest)] {
            place.run.wait(place.run.store.delete(path)).unwrap();
            assert_eq!(place.work(&Job::Export).unwrap_err().kind(), ErrorKind::Corrupt, "{path} is gone");
            place.run.write(path, contents.clone()).unwrap();
        }
        place.run.write(paths::AVERAGE_MANIFEST, b"{".to_vec()).unwrap();
        let error = place.work(&Job::Export).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("average/manifest.json"));
    }

    #[test]
    fn a_tokenizer_that_the_model_has_no_room_for_is_refused_before_training() {
        for rows in [512, 300] {
            let error = Place::new(&[&format!("model.vocab_size={rows}")]).work(&Job::Prepare).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            let text = error.to_string();
            assert!(
                text.contains(&format!("513 rows of model.vocab_size = {rows}; set it to 640")),
                "{text}"
            );
        }
    }

    /// A byte-level file with one special token, which ends documents: there is none that begins them.
    fn without_bos() -> Value {
        let plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let spelt = |byte: u8| {
            if plain(byte) {
                return char::from(byte);
            }
            char::from_u32(256 + (0..byte).filter(|byte| !plain(*byte)).count() as u32).unwrap()
        };
        let vocab: serde_json::Map<_, _> =
            (0..=u8::MAX).map(|byte| (spelt(byte).to_string(), json!(byte))).collect();
        let bytes =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false}],
            "pre_tokenizer": bytes, "decoder": bytes,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": []},
        })
    }

    #[test]
    fn whatever_is_exported_can_be_loaded() {
        let place = tempfile::tempdir().unwrap();
        let without_bos_path = place.path().join("tokenizer.json");
        std::fs::write(&without_bos_path, without_bos().to_string()).unwrap();
        let json_named = ["tokenizer.bos=<s>", "tokenizer.eos=</s>"];
        for (tokenizer, overrides) in [
            (golden("tokenizer.model"), &["model.vocab_size=513"][..]),
            (golden("tokenizer.model"), &["model.vocab_size=4096"]),
            (golden("tokenizer.model"), &["model.vocab_size=1792", "tokenizer.bos=<unk>"]),
            (golden("tokenizer.json"), &["model.vocab_size=5003", json_named[0], json_named[1]]),
            (golden("tokenizer.json"), &["model.vocab_size=640", json_named[1], "model.norm=naive_rms"]),
            (without_bos_path.clone(), &["model.vocab_size=258", "model.max_context_length=12"]),
            (without_bos_path, &["model.vocab_size=10000", "model.rope_freq_constant=1e300"]),
            // Widths that two decimals do not tell.
            (
                golden("tokenizer.model"),
                &[
                    "model.num_transformer_layers=2",
                    "model.model_dim=320",
                    "model.ffn_dim_divisor=1",
                    "model.ffn_multipliers=0.3333",
                    "model.qkv_multipliers=0.777",
                ],
            ),
            (
                golden("tokenizer.model"),
                &[
                    "model.num_transformer_layers=3",
                    "model.model_dim=320",
                    "model.ffn_dim_divisor=1",
                    "model.ffn_multipliers=[0.3333, 1.1111, 0.7777]",
                    "model.qkv_multipliers=[0.3333, 1.1111]",
                ],
            ),
        ] {
            let place = Place::with_tokenizer(&tokenizer, overrides);
            place.train();
            place.work(&Job::Export).unwrap_or_else(|error| panic!("{overrides:?}: {error}"));
            let folder = place.home.path().join("run/export");
            let loaded = load_model(&folder, Cpu::new(1), WeightFormat::F32);
            let loaded = loaded.unwrap_or_else(|error| panic!("{overrides:?}: {error}"));
            assert_eq!(loaded.model.config().layers(), place.run.plan.model.layers(), "{overrides:?}");
            let tokenizer = load_tokenizer(&folder, &loaded);
            let tokenizer = tokenizer.unwrap_or_else(|error| panic!("{overrides:?}: {error}"));
            assert_eq!(tokenizer.digest(), place.run.tokenizer().unwrap().digest());
            let texts = ["Some words.".to_owned()];
            continuations(&loaded.model, &tokenizer, &texts, 4, 4).unwrap();
            assert!(perplexity(&loaded.model, &tokenizer, &texts, 12).unwrap().loss > 0.0);
        }
    }
}
