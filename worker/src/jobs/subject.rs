//! The model that a job works on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ulmus_backend::{Backend, WeightFormat};
use ulmus_evaluator::{
    LoadedModel, adds_bos, load_model, load_tokenizer, model_folder, read_model, tokenizer_place,
};
use ulmus_model::hf::{HfModel, SpecialTokens};
use ulmus_model::{Layout, Model, weights_from_safetensors};
use ulmus_plan::ModelConfig;
use ulmus_run::paths;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{CheckpointId, Digest, Job, Of, Subject};

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
        let weights = weights_of(run, job.subject())?;
        let model = Model::in_format(backend.clone(), &shape_of(run, job.subject()), &weights, format)?;
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
    let weights = weights_of(run, job.subject())?;
    let shape = shape_of(run, job.subject());
    Ok(Arc::new(Model::in_format(backend.clone(), &shape, &weights, format)?))
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

/// The shape of a model of the run.
fn shape_of(run: &Run, subject: &Subject) -> ModelConfig {
    match subject {
        Subject::Tuned(name) => run.plan.shape_of(&Of::Tuned(*name)),
        _ => run.plan.model.clone(),
    }
}

/// The weights of a model: one of the run, or one from elsewhere that has its shape.
pub(crate) fn weights_of(run: &Run, subject: &Subject) -> Result<Vec<f32>, WorkerError> {
    let shape = shape_of(run, subject);
    let layout = Layout::new(&shape);
    match (subject, subject.checkpoints()) {
        (_, [checkpoint, ..]) => Ok(run.wait(weights(&run.store, *checkpoint, &layout))?),
        (Subject::Tuned(name), _) => {
            let path = format!("{}/{}", paths::tuned(*name), paths::WEIGHTS);
            Ok(weights_from_safetensors(&layout, &run.read_own(&path)?)?)
        }
        (Subject::Base, _) => {
            let place = run.plan.base.as_ref().map_or("", |base| &base.model[..]);
            of_place(&shape, place)
        }
        (Subject::Model(place), _) => of_place(&shape, place),
        _ => Ok(weights_from_safetensors(&layout, &average_file(run)?)?),
    }
}

/// The weights of a model from elsewhere, which must have this shape.
fn of_place(shape: &ModelConfig, place: &str) -> Result<Vec<f32>, WorkerError> {
    let HfModel { config, weights, .. } = read_model(&model_folder(place)?)?;
    must_be(shape, &config, place)?;
    Ok(weights)
}

/// Refuses a model that has another shape than the plan says.
fn must_be(expected: &ModelConfig, found: &ModelConfig, place: &str) -> Result<(), WorkerError> {
    if expected == found {
        return Ok(());
    }
    let text = |shape: &ModelConfig| serde_json::to_value(shape).expect("a shape has text keys");
    let (expected, found) = (text(expected), text(found));
    let differs =
        expected.as_object().into_iter().flatten().find(|(key, value)| found[key.as_str()] != **value);
    let how = differs.map_or_else(
        || "another shape".to_owned(),
        |(key, value)| format!("{key} = {}, and model.{key} is {value}", found[key.as_str()]),
    );
    Err(WorkerError::Plan(format!(
        "the model at {place} has {how}; leave out [model], so that it follows the base, or name another model"
    )))
}
