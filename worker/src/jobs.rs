//! Jobs: everything around training that one worker does alone.
//!
//! Each reads its input from the run's folder and writes its output there, whole and under fixed names, so that
//! doing one twice, on whatever worker, gives the same files. Results are also kept as `results/NAME.json`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use ulmus_dataloader::{Corpus, Manifest, Tokenizer, cargo_home};
use ulmus_evaluator::{BenchConfig, bench, continuations, perplexity};
use ulmus_model::hf::{SpecialTokens, config_json, generation_config_json};
use ulmus_model::{Backend, Layout, Model, weights_from_safetensors, weights_to_safetensors};
use ulmus_types::{CheckpointId, Digest, FileEntry, Job};

use crate::WorkerError;
use crate::run::{MANIFEST, Run, TOKENIZER_JSON};
use crate::snapshot::weights;

/// The averaged weights.
const AVERAGE: &str = "average/model.safetensors";
/// What they are the average of.
const AVERAGE_MANIFEST: &str = "average/manifest.json";

/// Does a job; gives its result as JSON.
pub(crate) fn work<B: Backend>(
    run: &Run,
    backend: &B,
    threads: usize,
    job: &Job,
) -> Result<Value, WorkerError> {
    let result = match job {
        Job::Prepare => prepare(run)?,
        Job::Average(checkpoints) => average(run, checkpoints)?,
        Job::EvaluateAverage => evaluate(run, &averaged(run, backend)?)?,
        Job::Evaluate(checkpoint) => evaluate(run, &trained(run, *checkpoint, backend)?)?,
        Job::Continue(checkpoints) => continue_text(run, checkpoints, backend)?,
        Job::Export => export(run)?,
        Job::Benchmark => benchmark(run, backend, threads)?,
    };
    run.write(&format!("results/{}.json", job.name()), pretty(&result))?;
    Ok(result)
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// Shards and tokenizer where the plan asks for them, and the frozen manifest of everything that is read.
fn prepare(run: &Run) -> Result<Value, WorkerError> {
    let plan = &run.plan;
    let shards = match &plan.prepare {
        Some(config) => {
            let shards = run.folder().child("shards");
            let prepared = ulmus_dataloader::prepare(config, &cargo_home(), plan.data.unit.get(), &shards)?;
            json!({
                "shards": prepared.shards,
                "documents": prepared.documents,
                "bytes": prepared.bytes,
                "digest": prepared.digest,
            })
        }
        None => Value::Null,
    };
    let manifest = Manifest::freeze(&plan.data, Some(&run.folder()))?;
    let tokenizer = tokenizer(run, &manifest)?;
    let manifest = manifest.with_tokenizer(&tokenizer);
    let rows = plan.model.vocab_size;
    if tokenizer.pieces() >= rows {
        let pieces = tokenizer.pieces();
        return Err(WorkerError::Plan(format!(
            "the tokenizer has {pieces} pieces, and with the pad id they need {} rows of model.vocab_size = {rows}; set it to {}",
            pieces + 1,
            (pieces + 1).next_multiple_of(128)
        )));
    }
    for (name, contents) in tokenizer_files(&tokenizer) {
        run.write(name, contents)?;
    }
    run.write(MANIFEST, manifest.to_json())?;
    let (pieces, tokenizer_digest) = (tokenizer.pieces(), tokenizer.digest());
    must_hold_text(run, run.corpus_of(&manifest, tokenizer)?)?;
    Ok(json!({
        "prepared": shards,
        "files": manifest.files(),
        "bytes": manifest.bytes(),
        "manifest": manifest.digest(),
        "pieces": pieces,
        "tokenizer": tokenizer_digest,
    }))
}

/// The file that a tokenizer was read from and, where it can be made, its `tokenizer.json`.
fn tokenizer_files(tokenizer: &Tokenizer) -> BTreeMap<&'static str, Vec<u8>> {
    let json = tokenizer.to_json().map(|json| (TOKENIZER_JSON, json.into_bytes()));
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
    Ok(ulmus_dataloader::train(&sample, config.pieces as usize)?)
}

/// Finds out now, and not in the first step, when the filters leave nothing.
fn must_hold_text(run: &Run, corpus: Corpus) -> Result<(), WorkerError> {
    let start = corpus.start();
    let first: Vec<_> = corpus.lanes().take(1).collect();
    let mut loader =
        ulmus_dataloader::Loader::open(Arc::new(corpus), run.plan.sequence_length(), &first, &start)?;
    loader.take(&first, 1)?;
    Ok(())
}

/// The mean of some checkpoints' weights, summed in f64 in the order of their steps and rounded once.
fn average(run: &Run, checkpoints: &[CheckpointId]) -> Result<Value, WorkerError> {
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
    run.write(AVERAGE, file)?;
    let result = json!({
        "checkpoints": checkpoints,
        "files": { "model.safetensors": entry },
        "weights": Digest::of(bytemuck::cast_slice(&mean)),
    });
    run.write(AVERAGE_MANIFEST, pretty(&result))?;
    Ok(result)
}

fn averaged_weights(run: &Run) -> Result<Vec<f32>, WorkerError> {
    Ok(weights_from_safetensors(&Layout::new(&run.plan.model), &run.read(AVERAGE)?)?)
}

fn averaged<B: Backend>(run: &Run, backend: &B) -> Result<Arc<Model<B>>, WorkerError> {
    model(run, &averaged_weights(run)?, backend)
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

/// Held-out documents in their fixed order, up to the plan's limit.
fn held_out_texts(run: &Run, corpus: &Corpus) -> Result<Vec<String>, WorkerError> {
    let limit = run.plan.evaluate.text.get();
    // A token is at least a byte of text, so this many sequences hold enough.
    let length = run.plan.sequence_length();
    let sequences = (limit as usize).div_ceil(length);
    let mut bytes = 0;
    let texts = corpus.held_out(length, sequences)?.texts;
    Ok(texts
        .into_iter()
        .take_while(|text| {
            let fits = bytes == 0 || bytes + text.len() as u64 <= limit;
            bytes += text.len() as u64;
            fits
        })
        .collect())
}

fn evaluate<B: Backend>(run: &Run, model: &Arc<Model<B>>) -> Result<Value, WorkerError> {
    let corpus = run.corpus()?;
    let texts = held_out_texts(run, &corpus)?;
    let result = perplexity(model, corpus.tokenizer(), &texts, run.plan.sequence_length())?;
    Ok(json!(result))
}

/// What the model wrote at several points of its training, after the same held-out text.
fn continue_text<B: Backend>(
    run: &Run,
    checkpoints: &[CheckpointId],
    backend: &B,
) -> Result<Value, WorkerError> {
    let corpus = run.corpus()?;
    let texts = held_out_texts(run, &corpus)?;
    let first = texts.get(..1).unwrap_or_default();
    let config = &run.plan.evaluate;
    let mut prompt = String::new();
    let mut written = Vec::new();
    for checkpoint in checkpoints {
        let model = trained(run, *checkpoint, backend)?;
        let (start, length) = (config.prompt as usize, config.continuation as usize);
        for continuation in continuations(&model, corpus.tokenizer(), first, start, length)? {
            prompt = continuation.prompt;
            written.push(json!({ "checkpoint": checkpoint, "text": continuation.text }));
        }
    }
    Ok(json!({ "prompt": prompt, "continuations": written }))
}

/// The average in Hugging Face layout.
fn export(run: &Run) -> Result<Value, WorkerError> {
    let tokenizer = run.tokenizer()?;
    let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.eos() };
    let mut files = serde_json::Map::new();
    let (bos, eos) = tokenizer.names_of_ends();
    let names = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos });
    let contents = [
        ("config.json", config_json(&run.plan.model, tokens)?.into_bytes()),
        ("generation_config.json", generation_config_json(tokens).into_bytes()),
        ("model.safetensors", run.read(AVERAGE)?),
        ("tokenizer_config.json", pretty(&names)),
    ];
    for (name, contents) in contents.into_iter().chain(tokenizer_files(&tokenizer)) {
        files.insert(name.to_owned(), json!(FileEntry::of(&contents)));
        run.write(&format!("export/{name}"), contents)?;
    }
    Ok(json!({ "folder": "export", "files": files }))
}

fn benchmark<B: Backend>(run: &Run, backend: &B, threads: usize) -> Result<Value, WorkerError> {
    let config = &run.plan.benchmark;
    let config = BenchConfig {
        prompt: config.prompt as usize,
        generate: config.generate as usize,
        runs: config.runs as usize,
        batch: 1,
    };
    let result = bench(&averaged(run, backend)?, config, threads)?;
    Ok(json!({
        "prompt_tokens_per_second": result.median.prompt,
        "generate_tokens_per_second": result.median.generation,
        "details": result,
    }))
}
