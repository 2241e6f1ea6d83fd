//! Loads a model folder, or a checkpoint of CoreNet, into a model that can be run.
//!
//! The tokenizer of another model would give plausible but meaningless numbers, so it is refused where it can be
//! recognised: by its special tokens, and by token ids beyond the model's vocabulary. Rows of the vocabulary without a
//! token prove nothing, because many models have spare ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ulmus_backend::{Backend, WeightFormat};
use ulmus_dataloader::Folder;
use ulmus_model::Model;
use ulmus_model::corenet;
use ulmus_model::hf::{self, HfModel, SpecialTokens};
use ulmus_model::peft::{self, Adapter};
use ulmus_plan::ModelConfig;
use ulmus_run::paths;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{Digest, is_pointer, without_mark};

use crate::error::EvaluatorError;

/// A model on a device, with what its folder says about it.
#[derive(Debug, Clone)]
pub struct LoadedModel<B: Backend> {
    /// The model.
    pub model: Arc<Model<B>>,
    /// The special tokens that its config names.
    pub tokens: SpecialTokens,
    /// Hash of the weights as one flat f32 vector, whatever type they are stored in.
    pub digest: Digest,
}

impl<B: Backend> LoadedModel<B> {
    /// Puts a model on the device of `backend`, with its matrices in `format`.
    ///
    /// # Errors
    /// When a weight is not finite in `format`, or the device has no room.
    pub fn new(read: &HfModel, backend: B, format: WeightFormat) -> Result<Self, EvaluatorError> {
        let digest = Digest::of(bytemuck::cast_slice(&read.weights));
        let model = Arc::new(Model::in_format(backend, &read.config, &read.weights, format)?);
        Ok(Self { model, tokens: read.tokens, digest })
    }
}

/// The folder of a model: a folder on this machine, or a copy of one on the hub (`hf://ORG/NAME[@REVISION]`) in the user's cache.
/// Files that are in the cache are not copied again.
///
/// # Errors
/// When the hub does not have the model or does not answer, or the cache cannot be written.
pub fn model_folder(address: &str) -> Result<PathBuf, EvaluatorError> {
    if !address.starts_with("hf://") {
        return Ok(PathBuf::from(address));
    }
    let folder = Folder::open_model(address)?;
    let name = folder.pinned().unwrap_or(address).trim_start_matches("hf://").replace('/', "--");
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(std::env::home_dir()?.join(".cache")));
    let target = cache.unwrap_or_else(|| PathBuf::from(".")).join("ulmus/models").join(name);
    let is_wanted = |path: &&String| {
        let suffix = Path::new(path).extension().and_then(|suffix| suffix.to_str());
        !path.contains('/')
            && suffix.is_some_and(|suffix| ["jinja", "json", "model", "safetensors"].contains(&suffix))
    };
    for path in folder.paths()?.iter().filter(is_wanted) {
        let file = target.join(path);
        if !file.is_file() {
            folder.download(path, &file)?;
        }
    }
    Ok(target)
}

/// Reads the config and the weights of a model: a folder, or a checkpoint of CoreNet (`.pt`).
///
/// # Errors
/// When `place` is neither, a file is damaged, or the model is not supported.
pub fn read_model(place: &Path) -> Result<HfModel, EvaluatorError> {
    if place.is_file() {
        refuse_pointer(place)?;
        return Ok(corenet::read(place)?);
    }
    require(place, "config.json")?;
    refuse_pointers(place)?;
    Ok(hf::read(place)?)
}

/// Reads a model as [`read_model`] does, and adds an adapter in PEFT's layout to its weights, if there is one. Answers also with a
/// remark if the adapter is known to have been trained on other weights.
///
/// # Errors
/// Those of [`read_model`], and when the adapter is damaged or does not fit the model.
pub fn read_adapted(
    place: &Path,
    adapter: Option<&Path>,
) -> Result<(HfModel, Option<String>), EvaluatorError> {
    let HfModel { config, weights, tokens } = read_model(place)?;
    let Some(directory) = adapter else { return Ok((HfModel { config, weights, tokens }, None)) };
    if !directory.join(peft::CONFIG).is_file() {
        return Err(EvaluatorError::NotAnAdapter { path: directory.to_owned() });
    }
    refuse_pointers(directory)?;
    let Adapter { shape, weights: adapter, base } = peft::read(directory, &config)?;
    let is_other = base.is_some_and(|base| base != Digest::of(bytemuck::cast_slice(&weights)));
    let remark = is_other.then(|| {
        format!(
            "the adapter in {} was trained on other weights than those of {}, or on these in another precision; its \
             {} names its base",
            directory.display(),
            place.display(),
            peft::CONFIG
        )
    });
    let weights = shape.merge(&config, weights, &adapter)?;
    Ok((HfModel { config: shape.merged_config(&config), weights, tokens }, remark))
}

/// Where the tokenizer of a model is if nothing else is said: in its folder, or in that of its checkpoint.
pub fn tokenizer_place(model: &Path) -> &Path {
    match model.parent().filter(|_| model.is_file()) {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => model,
    }
}

/// Reads a model as [`read_model`] does, and keeps the matrices in `format`.
///
/// # Errors
/// Those of [`read_model`], and when a weight is not finite in `format`.
pub fn load_model<B: Backend>(
    place: &Path,
    backend: B,
    format: WeightFormat,
) -> Result<LoadedModel<B>, EvaluatorError> {
    LoadedModel::new(&read_model(place)?, backend, format)
}

/// Reads a tokenizer: a file, or that in a folder.
///
/// # Errors
/// When the folder has no tokenizer, or it cannot be used.
pub fn read_tokenizer(place: &Path) -> Result<Tokenizer, EvaluatorError> {
    let (path, directory) = if place.is_file() {
        (place.to_owned(), folder_of(place))
    } else {
        // Where a folder has both files, the JSON was converted from the model.
        let path = require(place, paths::TOKENIZER_MODEL).or_else(|_| require(place, paths::TOKENIZER_JSON));
        (path.map_err(|_| EvaluatorError::NoTokenizer { path: place.to_owned() })?, place)
    };
    let mismatch = |reason: String| EvaluatorError::Mismatch { path: directory.to_owned(), reason };
    let bytes = std::fs::read(&path).map_err(|error| mismatch(error.to_string()))?;
    let names = special_names(directory).map_err(mismatch)?;
    let [bos, eos] = names.each_ref().map(Option::as_deref);
    Ok(Tokenizer::read(&bytes, &path.display().to_string(), bos, eos)?)
}

/// The folder of a tokenizer: of a file that it lies in, or the folder itself.
pub fn folder_of(place: &Path) -> &Path {
    if place.is_file() { place.parent().unwrap_or(Path::new(".")) } else { place }
}

/// Reads the tokenizer of `model`: a file, or that in a folder.
///
/// # Errors
/// When the folder has no tokenizer, or the tokenizer does not fit the model.
pub fn load_tokenizer<B: Backend>(place: &Path, model: &LoadedModel<B>) -> Result<Tokenizer, EvaluatorError> {
    fitting_tokenizer(place, model.model.config(), model.tokens)
}

/// Reads the tokenizer of a model of this shape, whose special tokens are `tokens`: a file, or that in a folder.
///
/// # Errors
/// Those of [`load_tokenizer`].
pub fn fitting_tokenizer(
    place: &Path,
    config: &ModelConfig,
    tokens: SpecialTokens,
) -> Result<Tokenizer, EvaluatorError> {
    let tokenizer = read_tokenizer(place)?;
    match misfit(&tokenizer, config, tokens) {
        None => Ok(tokenizer),
        Some(reason) => Err(EvaluatorError::Mismatch { path: folder_of(place).to_owned(), reason }),
    }
}

/// Why a tokenizer is not that of a model of this shape, whose special tokens are `tokens`, if it can be told that it is not.
pub fn misfit(tokenizer: &Tokenizer, config: &ModelConfig, tokens: SpecialTokens) -> Option<String> {
    let (pieces, vocabulary) = (tokenizer.pieces(), config.vocab_size);
    if pieces > vocabulary {
        return Some(format!("it has {pieces} pieces, but the model a vocabulary of only {vocabulary}"));
    }
    let (bos, eos) = (tokenizer.bos(), tokenizer.eos());
    let SpecialTokens { bos: model_bos, eos: model_eos } = tokens;
    ((bos, eos) != (model_bos, model_eos)).then(|| {
        format!("its BOS and EOS are {bos} and {eos}, those of the model {model_bos} and {model_eos}")
    })
}

/// Whether the `tokenizer_config.json` beside a tokenizer says that texts begin with BOS; `None` if it says nothing.
///
/// # Errors
/// When the file cannot be read.
pub fn adds_bos(place: &Path) -> Result<Option<bool>, EvaluatorError> {
    let directory = folder_of(place);
    let config = tokenizer_config(directory)
        .map_err(|reason| EvaluatorError::Mismatch { path: directory.to_owned(), reason })?;
    Ok(config["add_bos_token"].as_bool())
}

/// `tokenizer_config.json`, or nothing if the folder does not have it.
fn tokenizer_config(directory: &Path) -> Result<serde_json::Value, String> {
    const FILE: &str = "tokenizer_config.json";
    let path = directory.join(FILE);
    if !path.is_file() {
        return Ok(serde_json::Value::Null);
    }
    let bytes = std::fs::read(&path).map_err(|error| format!("{FILE}: {error}"))?;
    serde_json::from_slice(without_mark(&bytes)).map_err(|error| format!("{FILE} is not JSON: {error}"))
}

/// The names of BOS and EOS in `tokenizer_config.json`, as far as the folder has that file and it has them.
fn special_names(directory: &Path) -> Result<[Option<String>; 2], String> {
    let config = tokenizer_config(directory)?;
    // A token is written as its name, or as an object with its name.
    let name = |key: &str| {
        let token = &config[key];
        token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
    };
    Ok([name("bos_token"), name("eos_token")])
}

/// Refuses a folder in which Git LFS has left a pointer in place of a file.
fn refuse_pointers(directory: &Path) -> Result<(), EvaluatorError> {
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    names.sort();
    names.iter().try_for_each(|path| refuse_pointer(path))
}

fn refuse_pointer(path: &Path) -> Result<(), EvaluatorError> {
    let is_small = path.metadata().is_ok_and(|file| file.is_file() && file.len() < 4096);
    let begin = if is_small { std::fs::read(path).unwrap_or_default() } else { Vec::new() };
    if is_pointer(&begin, begin.len() as u64) {
        return Err(EvaluatorError::Pointer { path: path.to_owned() });
    }
    Ok(())
}

fn require(directory: &Path, file: &'static str) -> Result<PathBuf, EvaluatorError> {
    let path = directory.join(file);
    if path.is_file() {
        Ok(path)
    } else {
        let there = if directory.exists() { "it has" } else { "it does not exist, and so has" };
        Err(EvaluatorError::NotAModel { path: directory.to_owned(), there, missing: file })
    }
}

#[cfg(test)]
mod tests {
    use ulmus_types::ErrorKind;

    use ulmus_cpu::Cpu;

    use super::*;
    use crate::synthetic_weights;

    #[test]
    fn a_tokenizer_that_the_vocabulary_has_no_room_for_is_refused() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny");
        let loaded = load_model(&directory, Cpu::new(1), WeightFormat::F32).unwrap();
        let with_vocabulary = |vocab_size| {
            let config = ulmus_plan::ModelConfig { vocab_size, ..loaded.model.config().clone() };
            let model = Model::new(Cpu::new(1), &config, &synthetic_weights(&config)).unwrap();
            load_tokenizer(&directory, &LoadedModel { model: Arc::new(model), ..loaded.clone() })
        };
        // The tokenizer has 512 pieces; a model may have room for any number more.
        for vocabulary in [512, 513, 640, 768, 769, 1024, 4096] {
            assert!(with_vocabulary(vocabulary).is_ok(), "{vocabulary}");
        }
        for vocabulary in [511, 256] {
            let error = with_vocabulary(vocabulary).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains("512 pieces"), "{error}");
        }
    }
}
