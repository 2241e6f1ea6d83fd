//! The model that a job works on.

use std::path::Path;
use std::sync::Arc;

use ulmus_backend::{Backend, WeightFormat};
use ulmus_evaluator::LoadedModel;
use ulmus_model::hf::{HfModel, SpecialTokens};
use ulmus_model::{Layout, Model, weights_from_safetensors};
use ulmus_plan::ModelConfig;
use ulmus_run::paths;
use ulmus_run::results::{Exported, Prepared};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{CheckpointId, Digest, FileEntry, Job, JobName, Of, StageName, Subject};

use super::average::average_file;
use super::base::Base;
use crate::WorkerError;
use crate::examples::result;
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
    let (config, weights, tokens, tokenizer, adds_bos, place) = if let Subject::Model(place) = job.subject() {
        let base = Base::read(run, place)?;
        let (tokenizer, adds_bos) = base.tokenizer(tokenizer)?;
        (base.model.config, base.model.weights, base.model.tokens, tokenizer, adds_bos, place.clone())
    } else {
        let tokenizer = run.tokenizer()?;
        let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.eos() };
        let place = format!("{}/{}", run.plan.run.name, job.name().model().unwrap_or("average"));
        let subject = job.subject();
        (shape_of(run, subject), weights_of(run, subject)?, tokens, tokenizer, true, place)
    };
    let digest = Digest::of(bytemuck::cast_slice(&weights));
    let model = Arc::new(Model::in_format(backend.clone(), &config, &weights, format)?);
    Ok(Ready { loaded: LoadedModel { model, tokens, digest }, tokenizer, adds_bos, place })
}

/// The model that a job works on, with matrices in `format`, where no tokenizer is needed.
pub(super) fn model<B: Backend>(
    run: &Run,
    job: &Job,
    backend: &B,
    format: WeightFormat,
) -> Result<Arc<Model<B>>, WorkerError> {
    Ok(model_and_digest(run, job, backend, format)?.0)
}

/// The same with a hash of its weights.
pub(super) fn model_and_digest<B: Backend>(
    run: &Run,
    job: &Job,
    backend: &B,
    format: WeightFormat,
) -> Result<(Arc<Model<B>>, Digest), WorkerError> {
    let (shape, weights) = if let Subject::Model(place) = job.subject() {
        let HfModel { config, weights, .. } = Base::read(run, place)?.model;
        (config, weights)
    } else {
        (shape_of(run, job.subject()), weights_of(run, job.subject())?)
    };
    let digest = Digest::of(bytemuck::cast_slice(&weights));
    Ok((Arc::new(Model::in_format(backend.clone(), &shape, &weights, format)?), digest))
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
pub(super) fn shape_of(run: &Run, subject: &Subject) -> ModelConfig {
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
            let job = JobName::stored(name.export().to_string());
            let exported: Exported = result(run, &job)?;
            let file = format!("{}/{}", paths::tuned(*name), paths::WEIGHTS);
            let bytes = run.read_own(&file)?;
            if exported.files.get(paths::WEIGHTS) != Some(&FileEntry::of(&bytes)) {
                let reason = format!("its hash is not the one in the result of {job}");
                let act = "put back a copy of it, or give the stage another name";
                return Err(WorkerError::Damaged { file, reason, act });
            }
            Ok(weights_from_safetensors(&layout, &bytes)?)
        }
        (Subject::Base, _) => {
            let place = run.plan.base.as_ref().map_or("", |base| &base.model[..]);
            let weights = of_place(run, &shape, place)?;
            let prepared: Prepared = result(run, &JobName::stored(StageName::PREPARE.to_owned()))?;
            // Runs from before its hash was kept have none.
            if prepared.base.is_some_and(|known| known != Digest::of(bytemuck::cast_slice(&weights))) {
                return Err(WorkerError::Plan(format!(
                    "the model at {place} is not the one any more that the run began with; put that back, or start a run with another name"
                )));
            }
            Ok(weights)
        }
        (Subject::Model(place), _) => of_place(run, &shape, place),
        _ => Ok(weights_from_safetensors(&layout, &average_file(run)?)?),
    }
}

/// The weights of a model from elsewhere, which must have this shape.
fn of_place(run: &Run, shape: &ModelConfig, place: &str) -> Result<Vec<f32>, WorkerError> {
    let HfModel { config, weights, .. } = Base::read(run, place)?.model;
    must_be(shape, &config, place)?;
    Ok(weights)
}

/// Refuses a model that has another shape than the plan says.
pub(crate) fn must_be(expected: &ModelConfig, found: &ModelConfig, place: &str) -> Result<(), WorkerError> {
    if expected == found {
        return Ok(());
    }
    let text = |shape: &ModelConfig| serde_json::to_value(shape).expect("a shape has text keys");
    let (expected, found) = (text(expected), text(found));
    let mut keys =
        [&expected, &found].into_iter().filter_map(|shape| shape.as_object()).flat_map(|shape| shape.keys());
    let differs = keys.find(|key| expected[key.as_str()] != found[key.as_str()]);
    let how = differs.map_or_else(
        || "another shape".to_owned(),
        |key| format!("{key} = {}, and model.{key} is {}", found[key.as_str()], expected[key.as_str()]),
    );
    Err(WorkerError::Plan(format!(
        "the model at {place} has {how}; leave out [model], so that it follows the base, or name another model"
    )))
}
