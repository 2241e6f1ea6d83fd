//! Models from elsewhere: what a plan names as a base to begin from, or as a model to measure.
//!
//! An address is a model folder or a checkpoint of CoreNet (`.pt`) on the worker's machine, a model on the hub
//! (`hf://ORG/NAME[@REVISION]`), or a model of another run that is kept beside this one: `run:NAME/STEP` for the
//! checkpoint after that step, `run:NAME/average` for the average.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ulmus_checkpoint::StoreError;
use ulmus_dataloader::{ChatTemplate, Folder, read_template};
use ulmus_evaluator::{adds_bos, fitting_tokenizer, model_folder, read_model, tokenizer_place};
use ulmus_model::hf::{self, HfModel, SpecialTokens};
use ulmus_model::{AdapterShape, Layout, peft, weights_from_safetensors};
use ulmus_plan::ModelConfig;
use ulmus_process::with_causes;
use ulmus_run::paths;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{CheckpointId, RunId, StageName, Step};

use super::average::average_file;
use crate::WorkerError;
use crate::run::Run;
use crate::snapshot::weights;

/// How addresses of models of other runs begin.
const OF_RUN: &str = "run:";
/// The name of the average in such an address.
const AVERAGE: &str = "average";

/// A model from elsewhere.
pub(crate) struct Base {
    pub(crate) model: HfModel,
    origin: Origin,
}

enum Origin {
    /// A model folder or a checkpoint.
    Place(PathBuf),
    /// Another run, with its tokenizer.
    Run(Tokenizer),
}

/// What a model is, without its weights.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) shape: ModelConfig,
    /// The special tokens of its tokenizer, if it does not come with the tokenizer of a run.
    pub(crate) tokens: Option<SpecialTokens>,
}

/// The shape of the model at an address, without its weights where that can be; runs are looked up in `store`. Blocks.
///
/// # Errors
/// Why there is none, in words for a person.
pub fn base_shape(address: &str, store: &str) -> Result<ModelConfig, String> {
    let shape = match address.strip_prefix(OF_RUN) {
        Some(of_run) => {
            let name = of_run.split_once('/').map_or(of_run, |(name, _)| name);
            of_other_run(store, name, |other| Ok(other.plan.model.clone()))
        }
        None => known_of(address).map(|known| known.shape),
    };
    shape.map_err(|error| with_causes(&error))
}

/// Makes sure that there is a model at an address, as far as that can be told without reading its weights. Blocks.
pub(crate) fn look_for(address: &str, store: &str) -> Result<Known, WorkerError> {
    if let Some(of_run) = address.strip_prefix(OF_RUN) {
        let (name, model) = of_run.split_once('/').ok_or_else(|| names_none(address))?;
        return of_other_run(store, name, |other| {
            kept(other, address, model)?;
            Ok(Known { shape: other.plan.model.clone(), tokens: None })
        });
    }
    let known = known_of(address)?;
    if address.starts_with("hf://") {
        let folder = Folder::open_model(address)?;
        if !folder.paths()?.iter().any(|path| path.ends_with(".safetensors")) {
            return Err(WorkerError::Plan(format!(
                "{address} has no weights in safetensors; name another model"
            )));
        }
    } else if Path::new(address).is_dir() {
        hf::weight_files(Path::new(address))?;
    }
    Ok(known)
}

/// What a model is that is no other run's.
fn known_of(address: &str) -> Result<Known, WorkerError> {
    let (shape, tokens) = if address.starts_with("hf://") {
        let folder = Folder::open_model(address)?;
        let file =
            tempfile::tempdir().map_err(|error| WorkerError::File { path: "a folder".into(), error })?;
        folder.download("config.json", &file.path().join("config.json"))?;
        hf::read_config(file.path())?
    } else if Path::new(address).is_file() {
        let HfModel { config, tokens, .. } = read_model(Path::new(address))?;
        (config, tokens)
    } else {
        hf::read_config(Path::new(address))?
    };
    Ok(Known { shape, tokens: Some(tokens) })
}

/// Asks a run of a store.
fn of_other_run<T: Send>(
    store: &str,
    name: &str,
    ask: impl FnOnce(&Run) -> Result<T, WorkerError> + Send,
) -> Result<T, WorkerError> {
    // The caller may be inside of an asynchronous runtime.
    let asked = std::thread::scope(|scope| {
        let read = || {
            let runtime = tokio::runtime::Runtime::new()
                .map_err(|error| WorkerError::Plan(format!("cannot start a runtime: {error}")))?;
            // Nothing here depends on the id of the other run.
            let id = RunId::from_bytes([0; 16]);
            ask(&Run::in_store(id, store, name, runtime.handle().clone())?)
        };
        scope.spawn(read).join()
    });
    asked.unwrap_or_else(|_| Err(WorkerError::Plan(format!("run:{name} cannot be read"))))
}

fn names_none(address: &str) -> WorkerError {
    WorkerError::Plan(format!("{address} names no model of the run; write {address}/average, or a step"))
}

impl Base {
    /// Reads the model at an address.
    ///
    /// # Errors
    /// When there is no model, it is damaged or not supported, or its store does not answer.
    pub(crate) fn read(run: &Run, address: &str) -> Result<Self, WorkerError> {
        if let Some(of_run) = address.strip_prefix(OF_RUN) {
            let (name, model) = of_run.split_once('/').ok_or_else(|| names_none(address))?;
            return read_of_run(&run.beside(name)?, address, model);
        }
        let place = model_folder(address)?;
        let model = read_model(&place)?;
        must_be_finite(address, &model.weights)?;
        Ok(Self { model, origin: Origin::Place(place) })
    }

    /// The model's own chat template, in Jinja, if it has one.
    ///
    /// # Errors
    /// When it cannot be read, or is no template.
    pub(super) fn chat_template(&self, tokenizer: &Tokenizer) -> Result<Option<String>, WorkerError> {
        let Origin::Place(place) = &self.origin else { return Ok(None) };
        let folder = Folder::open(&tokenizer_place(place).display().to_string())?;
        let ChatTemplate { template, .. } =
            read_template("auto", &folder, tokenizer, Some(SystemTime::UNIX_EPOCH))?;
        // Without one of its own it would be the recipe's.
        Ok((template.name() != "recipe").then(|| template.source().to_owned()))
    }

    /// The model's tokenizer, or that in the folder or file `named`, and whether texts begin with BOS.
    ///
    /// # Errors
    /// When there is none, or it does not fit the model.
    pub(crate) fn tokenizer(&self, named: Option<&Path>) -> Result<(Tokenizer, bool), WorkerError> {
        let place = match (&self.origin, named) {
            (_, Some(named)) => named,
            (Origin::Place(place), None) => tokenizer_place(place),
            (Origin::Run(tokenizer), None) => return Ok((tokenizer.clone(), true)),
        };
        let tokenizer = fitting_tokenizer(place, &self.model.config, self.model.tokens)?;
        Ok((tokenizer, adds_bos(place)?.unwrap_or(true)))
    }
}

/// The weights of an adapter to go on from, which must be one of this shape for a model of the shape `model`.
///
/// # Errors
/// When it is not there, is damaged, or is another.
pub(crate) fn read_adapter(
    from: &str,
    shape: &AdapterShape,
    model: &ModelConfig,
) -> Result<Vec<f32>, WorkerError> {
    let adapter = peft::read(Path::new(from), model)?;
    if adapter.shape.modules() != shape.modules() {
        return Err(WorkerError::Plan(format!(
            "the adapter in {from} has other ranks, scales or targets than [tune.adapter]; write there the kind, rank, alpha and targets of its adapter_config.json"
        )));
    }
    must_be_finite(from, &adapter.weights)?;
    Ok(adapter.weights)
}

/// Refuses weights with which no training can begin.
fn must_be_finite(place: &str, weights: &[f32]) -> Result<(), WorkerError> {
    match weights.iter().filter(|weight| !weight.is_finite()).count() {
        0 => Ok(()),
        wrong => Err(WorkerError::Plan(format!(
            "{wrong} of {} weights in {place} are not finite; get them again, or name others",
            weights.len()
        ))),
    }
}

/// Whether there is a model at an address, as far as this machine's disk can tell: stores are not asked.
pub(crate) fn may_be_there(address: &str) -> bool {
    let place = Path::new(address);
    let is_stored = address.contains("://") || address.starts_with(OF_RUN);
    is_stored || place.is_file() || place.join("config.json").is_file()
}

fn read_of_run(other: &Run, address: &str, model: &str) -> Result<Base, WorkerError> {
    let config = other.plan.model.clone();
    let layout = Layout::new(&config);
    let weights = match kept(other, address, model)? {
        Kept::Average => weights_from_safetensors(&layout, &average_file(other)?)?,
        Kept::Checkpoint(id) => other.wait(weights(&other.store, id, &layout))?,
    };
    let tokenizer = other.tokenizer()?;
    let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.eos() };
    Ok(Base { model: HfModel { config, weights, tokens }, origin: Origin::Run(tokenizer) })
}

/// A model that a run has kept.
enum Kept {
    Average,
    Checkpoint(CheckpointId),
}

/// Finds the average, or the checkpoint after a step. If groups of several generations have saved that, their weights are the same.
fn kept(other: &Run, address: &str, model: &str) -> Result<Kept, WorkerError> {
    let checkpoints = other.wait(ulmus_checkpoint::checkpoints(&other.store, StageName::pretraining()))?;
    let has_average = match other.wait(other.store.stat(paths::AVERAGE_MANIFEST)) {
        Ok(_) => true,
        Err(StoreError::NotFound { .. }) => false,
        Err(error) => return Err(error.into()),
    };
    if model == AVERAGE && has_average {
        return Ok(Kept::Average);
    }
    let wanted = model.parse().ok().map(Step::new);
    let found = checkpoints.iter().rev().find(|id| Some(id.step()) == wanted);
    found.map(|id| Kept::Checkpoint(*id)).ok_or_else(|| {
        let mut there: Vec<String> = checkpoints.iter().map(|id| id.step().to_string()).collect();
        there.dedup();
        there.extend(has_average.then(|| AVERAGE.to_owned()));
        let act = if let Some(tuned) = other.plan.tune.last().filter(|_| !other.plan.pretrains()) {
            let folder = tuned.name.parse().map(paths::tuned).unwrap_or_default();
            let at = other.store.location();
            format!("it does not pretrain; name a model that it has tuned, such as {at}/{folder}")
        } else if there.is_empty() {
            "it has kept no model yet; let it train".to_owned()
        } else {
            format!("it has {}; write one of these", there.join(", "))
        };
        let what =
            if model == AVERAGE { AVERAGE.to_owned() } else { format!("checkpoint after step {model}") };
        WorkerError::Plan(format!("{address}: there is no {what} in {}; {act}", other.store))
    })
}
