//! The model that a job works on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ulmus_backend::{Backend, WeightFormat};
use ulmus_evaluator::{LoadedModel, adds_bos, load_model, load_tokenizer, model_folder, tokenizer_place};
use ulmus_model::hf::SpecialTokens;
use ulmus_model::{Layout, Model, weights_from_safetensors};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{CheckpointId, Digest, Job, Subject};

use super::average::average_file;
use crate::WorkerError;
use crate::run::Run;
use crate::snapshot::weights;

/// A model with its tokenizer.
pub(super) struct Ready<B: Backend> {
    pub(super) loaded: LoadedModel<B>,
    pub(super) tokenizer: Tokenizer,
    /// Whether texts begin with BOS.
    pub(super) adds_bos: bool,
    /// Where the model is, for people.
    pub(super) place: String,
}

/// The model that a job works on, with matrices in `format`, and its tokenizer. One from elsewhere that has no tokenizer needs
/// that in the folder or file `tokenizer`.
pub(super) fn ready<B: Backend>(
    run: &Run,
    job: &Job,
    backend: &B,
    format: WeightFormat,
    tokenizer: Option<&Path>,
) -> Result<Ready<B>, WorkerError> {
    let Subject::Model(place) = job.subject() else {
        let tokenizer = run.tokenizer()?;
        let weights = run_weights(run, job)?;
        let model = Model::in_format(backend.clone(), &run.plan.model, &weights, format)?;
        let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.eos() };
        let digest = Digest::of(bytemuck::cast_slice(&weights));
        let place = format!("{}/{}", run.plan.run.name, job.name().model().unwrap_or("average"));
        let loaded = LoadedModel { model: Arc::new(model), tokens, digest };
        return Ok(Ready { loaded, tokenizer, adds_bos: true, place });
    };
    let folder: PathBuf = model_folder(place)?;
    let loaded = load_model(&folder, backend.clone(), format)?;
    let of_tokenizer = tokenizer.unwrap_or_else(|| tokenizer_place(&folder));
    let tokenizer = load_tokenizer(of_tokenizer, &loaded)?;
    let adds_bos = adds_bos(of_tokenizer)?.unwrap_or(true);
    Ok(Ready { loaded, tokenizer, adds_bos, place: place.clone() })
}

/// The model that a job works on, with matrices in `format`, where no tokenizer is needed.
pub(super) fn model<B: Backend>(
    run: &Run,
    job: &Job,
    backend: &B,
    format: WeightFormat,
) -> Result<Arc<Model<B>>, WorkerError> {
    if let Subject::Model(place) = job.subject() {
        return Ok(load_model(&model_folder(place)?, backend.clone(), format)?.model);
    }
    let weights = run_weights(run, job)?;
    Ok(Arc::new(Model::in_format(backend.clone(), &run.plan.model, &weights, format)?))
}

/// The model of a checkpoint, in f32.
pub(super) fn of_checkpoint<B: Backend>(
    run: &Run,
    checkpoint: CheckpointId,
    backend: &B,
) -> Result<Arc<Model<B>>, WorkerError> {
    let weights = run.wait(weights(&run.store, checkpoint, &Layout::new(&run.plan.model)))?;
    Ok(Arc::new(Model::new(backend.clone(), &run.plan.model, &weights)?))
}

/// The weights of the job's checkpoint, or else of the average.
fn run_weights(run: &Run, job: &Job) -> Result<Vec<f32>, WorkerError> {
    let layout = Layout::new(&run.plan.model);
    match job.checkpoints() {
        [checkpoint, ..] => Ok(run.wait(weights(&run.store, *checkpoint, &layout))?),
        [] => Ok(weights_from_safetensors(&layout, &average_file(run)?)?),
    }
}
