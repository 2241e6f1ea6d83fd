//! Models from elsewhere: what a plan names as a base to begin from, or as a model to measure.
//!
//! An address is a model folder or a checkpoint of CoreNet (`.pt`) on the worker's machine, a model on the hub
//! (`hf://ORG/NAME[@REVISION]`), or a model of another run that is kept beside this one: `run:NAME/STEP` for the
//! checkpoint after that step, `run:NAME/average` for the average.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ulmus_checkpoint::{Access, OpenOptions, Store};
use ulmus_dataloader::{ChatTemplate, Folder, read_template};
use ulmus_evaluator::{adds_bos, fitting_tokenizer, model_folder, read_model, tokenizer_place};
use ulmus_model::hf::{self, HfModel, SpecialTokens};
use ulmus_model::{Layout, weights_from_safetensors};
use ulmus_plan::ModelConfig;
use ulmus_process::with_causes;
use ulmus_run::paths;
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

/// The shape of the model at an address, without its weights where that can be; runs are looked up in `store`. Blocks.
///
/// # Errors
/// Why there is none, in words for a person.
pub fn base_shape(address: &str, store: &str) -> Result<ModelConfig, String> {
    if let Some(of_run) = address.strip_prefix(OF_RUN) {
        let name = of_run.split_once('/').map_or(of_run, |(name, _)| name);
        let place = format!("{}/{name}", store.trim_end_matches('/'));
        // The caller may be inside of an asynchronous runtime.
        let read = std::thread::spawn(move || -> Result<ModelConfig, String> {
            let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
            let options = OpenOptions { access: Access::Read, ..OpenOptions::default() };
            let store = Store::open_with(&place, options).map_err(|error| with_causes(&error))?;
            let text = runtime.block_on(store.get(paths::PLAN)).map_err(|error| with_causes(&error))?;
            let text = String::from_utf8_lossy(&text);
            let plan = ulmus_plan::read(&text, &[]).map_err(|problems| problems.to_string())?;
            plan.into_iter().next().map(|plan| plan.model).ok_or_else(|| "it has no plan".to_owned())
        });
        return read.join().unwrap_or_else(|_| Err("it cannot be read".to_owned()));
    }
    let of_hub = || -> Result<ModelConfig, WorkerError> {
        let folder = Folder::open_model(address)?;
        let file =
            tempfile::tempdir().map_err(|error| WorkerError::File { path: "a folder".into(), error })?;
        folder.download("config.json", &file.path().join("config.json"))?;
        Ok(hf::read_config(file.path())?.0)
    };
    let shape = if address.starts_with("hf://") {
        of_hub()
    } else if Path::new(address).is_file() {
        read_model(Path::new(address)).map(|model| model.config).map_err(WorkerError::from)
    } else {
        hf::read_config(Path::new(address)).map(|(config, _)| config).map_err(WorkerError::from)
    };
    shape.map_err(|error| with_causes(&error))
}

impl Base {
    /// Reads the model at an address.
    ///
    /// # Errors
    /// When there is no model, it is damaged or not supported, or its store does not answer.
    pub(crate) fn read(run: &Run, address: &str) -> Result<Self, WorkerError> {
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

    /// The files beside the tokenizer that say how it is used, its chat template above all.
    ///
    /// # Errors
    /// When one cannot be read.
    pub(super) fn template_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, WorkerError> {
        let Origin::Place(place) = &self.origin else { return Ok(Vec::new()) };
        let mut files = Vec::new();
        for name in ["chat_template.jinja", "tokenizer_config.json"] {
            let path = tokenizer_place(place).join(name);
            match std::fs::read(&path) {
                Ok(contents) => files.push((name, contents)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(WorkerError::File { path: path.display().to_string(), error }),
            }
        }
        Ok(files)
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

/// Whether there is a model at an address, as far as this machine's disk can tell: stores are not asked.
pub(crate) fn may_be_there(address: &str) -> bool {
    let place = Path::new(address);
    let is_stored = address.contains("://") || address.starts_with(OF_RUN);
    is_stored || place.is_file() || place.join("config.json").is_file()
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
