//! Exports models in Hugging Face layout: the average, and what tuning stages have made.

use std::collections::BTreeMap;

use serde_json::json;
use ulmus_model::hf::{SpecialTokens, config_json, generation_config_json};
use ulmus_model::{AdapterShape, Layout, peft, weights_to_safetensors};
use ulmus_plan::{ModelConfig, TuneConfig};
use ulmus_run::paths;
use ulmus_run::results::{self, Exported};
use ulmus_types::{FileEntry, Job, Of, StageName, Subject};

use super::average::average_file;
use super::prepare::tokenizer_files;
use super::subject::weights_of;
use crate::WorkerError;
use crate::run::Run;
use crate::snapshot::weights;

/// Writes a model in Hugging Face layout: of a tuning stage its own, and otherwise the average.
pub(super) fn export(run: &Run, job: &Job) -> Result<Exported, WorkerError> {
    let graph = run.plan.graph();
    let tuning = graph.trainings().find(|stage| stage.name.export() == *job.stage());
    let tuning = tuning.and_then(|stage| Some((stage.name, run.plan.tuning(stage.name)?)));
    match tuning {
        Some((name, config)) => tuned(run, job, name, config),
        None => write(run, paths::EXPORT, &run.plan.model, average_file(run)?),
    }
}

/// Writes the model that a tuning stage has made, with its adapter merged, and the adapter in PEFT's layout.
fn tuned(run: &Run, job: &Job, name: StageName, config: &TuneConfig) -> Result<Exported, WorkerError> {
    let [checkpoint, origin @ ..] = job.checkpoints() else { return Err(super::no_stage(job)) };
    let model = run.plan.shape_of(&config.of);
    let (shape, merged) = match &config.adapter {
        None => {
            let layout = Layout::new(&model);
            let weights = run.wait(weights(&run.store, *checkpoint, &layout))?;
            (model, weights)
        }
        Some(adapter) => {
            let shape = AdapterShape::new(&model, adapter)?;
            let adapter = run.wait(weights(&run.store, *checkpoint, shape.layout()))?;
            let folder = paths::adapter(name);
            let base = format!("{}/{}", run.plan.run.name, config.of);
            run.write(&format!("{folder}/{}", peft::CONFIG), peft::config_json(&shape, &base).into_bytes())?;
            run.write(&format!("{folder}/{}", peft::WEIGHTS), peft::to_safetensors(&shape, &adapter)?)?;
            let base = weights_of(run, &begun_from(&config.of, origin))?;
            (shape.merged_config(&model), shape.merge(&model, base, &adapter)?)
        }
    };
    let merged = weights_to_safetensors(&Layout::new(&shape), &merged)?;
    write(run, &paths::tuned(name), &shape, merged)
}

/// The model that a stage began from; of the last milestone, the job names the checkpoint.
fn begun_from(of: &Of, origin: &[ulmus_types::CheckpointId]) -> Subject {
    match (of, origin) {
        (Of::Last | Of::Milestones, [checkpoint, ..]) => Subject::Last(*checkpoint),
        (Of::Base, _) => Subject::Base,
        (Of::Tuned(name), _) => Subject::Tuned(*name),
        (Of::Model(place), _) => Subject::Model(place.clone()),
        (Of::Average | Of::Last | Of::Milestones, _) => Subject::Average,
    }
}

/// Writes a folder that is a model.
fn write(run: &Run, folder: &str, shape: &ModelConfig, weights: Vec<u8>) -> Result<Exported, WorkerError> {
    let tokenizer = run.tokenizer()?;
    let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.eos() };
    let mut files = BTreeMap::new();
    let (bos, eos) = tokenizer.special_names();
    let names = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos });
    let contents = [
        ("config.json", config_json(shape, tokens)?.into_bytes()),
        ("generation_config.json", generation_config_json(tokens).into_bytes()),
        (paths::WEIGHTS, weights),
        ("tokenizer_config.json", results::to_json(&names)),
    ];
    for (name, contents) in contents.into_iter().chain(tokenizer_files(&tokenizer)) {
        files.insert(name.to_owned(), FileEntry::of(&contents));
        run.write(&format!("{folder}/{name}"), contents)?;
    }
    Ok(Exported { folder: folder.to_owned(), files })
}
