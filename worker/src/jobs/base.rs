//! Models from elsewhere: what a plan names as a base to begin from, or as a model to measure.
//!
//! An address is a model folder or a checkpoint of CoreNet (`.pt`) on the worker's machine, a model on the hub
//! (`hf://ORG/NAME[@REVISION]`), or a model of another run that is kept beside this one: `run:NAME/STEP` for the
//! checkpoint after that step, `run:NAME/average` for the average.

use std::path::{Path, PathBuf};

use ulmus_evaluator::{adds_bos, fitting_tokenizer, model_folder, read_model, tokenizer_place};
use ulmus_model::hf::{HfModel, SpecialTokens};
use ulmus_model::{Layout, weights_from_safetensors};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{CheckpointId, StageName, Step};

use super::average::average_file;
use crate::WorkerError;
use crate::run::Run;
use crate::snapshot::weights;

/// How addresses of models of other runs begin.
const OF_RUN: &str = "run:";
/// The name of the average in such an address.
const AVERAGE: &str = "average";

/// A model from elsewhere.
pub(super) struct Base {
    pub(super) model: HfModel,
    origin: Origin,
}

enum Origin {
    /// A model folder or a checkpoint.
    Place(PathBuf),
    /// Another run, with its tokenizer.
    Run(Tokenizer),
}

impl Base {
    /// Reads the model at an address.
    ///
    /// # Errors
    /// When there is no model, it is damaged or not supported, or its store does not answer.
    pub(super) fn read(run: &Run, address: &str) -> Result<Self, WorkerError> {
        if let Some(of_run) = address.strip_prefix(OF_RUN) {
            let (name, model) = of_run.split_once('/').ok_or_else(|| {
                WorkerError::Plan(format!(
                    "{address} names no model of the run; write {address}/average, or a step"
                ))
            })?;
            return read_of_run(&run.beside(name)?, address, model);
        }
        let place = model_folder(address)?;
        Ok(Self { model: read_model(&place)?, origin: Origin::Place(place) })
    }

    /// The model's tokenizer, or that in the folder or file `named`, and whether texts begin with BOS.
    ///
    /// # Errors
    /// When there is none, or it does not fit the model.
    pub(super) fn tokenizer(&self, named: Option<&Path>) -> Result<(Tokenizer, bool), WorkerError> {
        let place = match (&self.origin, named) {
            (_, Some(named)) => named,
            (Origin::Place(place), None) => tokenizer_place(place),
            (Origin::Run(tokenizer), None) => return Ok((tokenizer.clone(), true)),
        };
        let tokenizer = fitting_tokenizer(place, &self.model.config, self.model.tokens)?;
        Ok((tokenizer, adds_bos(place)?.unwrap_or(true)))
    }
}

fn read_of_run(other: &Run, address: &str, model: &str) -> Result<Base, WorkerError> {
    let config = other.plan.model.clone();
    let layout = Layout::new(&config);
    let weights = if model == AVERAGE {
        weights_from_safetensors(&layout, &average_file(other)?)?
    } else {
        other.wait(weights(&other.store, checkpoint(other, address, model)?, &layout))?
    };
    let tokenizer = other.tokenizer()?;
    let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.eos() };
    Ok(Base { model: HfModel { config, weights, tokens }, origin: Origin::Run(tokenizer) })
}

/// The checkpoint after a step. If groups of several generations have saved it, their weights are the same.
fn checkpoint(other: &Run, address: &str, step: &str) -> Result<CheckpointId, WorkerError> {
    let there = other.wait(ulmus_checkpoint::checkpoints(&other.store, StageName::pretraining()))?;
    let wanted = step.parse().ok().map(Step::new);
    there.iter().rev().find(|id| Some(id.step()) == wanted).copied().ok_or_else(|| {
        let mut steps: Vec<String> = there.iter().map(|id| id.step().to_string()).collect();
        steps.dedup();
        let steps = if steps.is_empty() { "none".to_owned() } else { steps.join(", ") };
        WorkerError::Plan(format!(
            "{address}: there is no checkpoint after step {step} in {}; it has {steps}; write one of these, or average",
            other.store
        ))
    })
}
