//! Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The files that are written have the fields that PEFT 0.10 and 0.21 both load. Files that are read may come from anywhere,
//! so a field that would change what is computed is refused by name, and tensors are taken under the names of PEFT or of
//! CoreNet. The shapes of all tensors are those of PEFT; [`AdapterShape::layout`] says which of them differs in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use ulmus_plan::{AdapterConfig, AdapterKind, ModelConfig};
use ulmus_types::Digest;

use crate::adapter::AdapterShape;
use crate::error::ModelError;
use crate::hf;
use crate::params::{Layout, Tensor};
use crate::tensors::{Names, WeightReader, metadata, views, with_note, without_prefix};

/// Name of the file that says what an adapter is.
pub const CONFIG: &str = "adapter_config.json";
/// Name of the file with its tensors.
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// The prefix that PEFT puts before the names of modules.
const PREFIX: &str = "base_model.model.";
/// The end of the name of the tensor that is transposed in memory.
const EMBEDDING_A: &str = ".lora_embedding_A";

/// The key of the hash of the base model's weights in the metadata of [`WEIGHTS`], which other programs ignore.
const BASE: &str = "base_weights_blake3";

/// A trained adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// What it adapts.
    pub shape: AdapterShape,
    /// Its flat weights, in the order of [`AdapterShape::layout`].
    pub weights: Vec<f32>,
    /// [`Digest::of`] the flat float32 weights of the model that it was trained on, if its file says so.
    pub base: Option<Digest>,
}

/// Modules as PEFT names them: a list of names, or one regular expression.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Targets {
    Regex(String),
    Names(Vec<String>),
}

/// Every field that is understood, and all others.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    peft_type: String,
    r: u64,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Targets,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    rank_pattern: BTreeMap<String, u64>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// Fields that say nothing about what is computed, whatever they hold.
const NOTES: [&str; 8] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
];

impl ConfigFile {
    fn resolve(self) -> Result<AdapterConfig, String> {
        if self.peft_type != "LORA" {
            return Err(format!("not supported: peft_type {:?} (only \"LORA\")", self.peft_type));
        }
        for (field, value) in self.others {
            let is_accepted = NOTES.contains(&field.as_str())
                || match (field.as_str(), &value) {
                    // How an adapter began is over, unless its beginning was taken from the weights of the base model.
                    (_, Value::Null | Value::Bool(false)) | ("init_lora_weights", Value::Bool(_)) => true,
                    ("init_lora_weights", Value::String(how)) => how == "gaussian",
                    ("bias", Value::String(which)) => which == "none",
                    (_, Value::Array(list)) => list.is_empty(),
                    (_, Value::Object(map)) => map.is_empty(),
                    _ => false,
                };
            if !is_accepted {
                return Err(format!("not supported: {field} {value}"));
            }
        }
        Ok(AdapterConfig {
            kind: if self.use_dora { AdapterKind::Dora } else { AdapterKind::Lora },
            rank: self.r,
            alpha: self.lora_alpha,
            dropout: self.lora_dropout,
            targets: match self.target_modules {
                Targets::Regex(regex) => vec![regex],
                Targets::Names(names) => names,
            },
            rank_pattern: self.rank_pattern,
            alpha_pattern: self.alpha_pattern,
            rank_stabilised: self.use_rslora,
            from: None,
        })
    }
}

/// The name of a tensor in PEFT's or CoreNet's files, as that of the layout without `transformer.`.
fn plain(name: &str) -> String {
    let name = without_prefix(name.strip_prefix(PREFIX).unwrap_or(name));
    let Some((module, rest)) = name.split_once(".lora_") else { return name.to_owned() };
    // Between the kind of the tensor and `weight` there may be the name of the adapter, and `weight` may be left out.
    let kind = rest.split('.').next().unwrap_or(rest);
    let end = if matches!(kind, "A" | "B") { ".weight" } else { "" };
    format!("{module}.lora_{kind}{end}")
}

/// The layout of a file: PEFT's names and shapes for the places of an adapter's tensors.
fn file_layout(shape: &AdapterShape) -> Layout {
    shape.layout().described(|Tensor { name, shape, .. }| {
        let mut shape = shape.clone();
        if name.ends_with(EMBEDDING_A) {
            shape.reverse();
        }
        (format!("{PREFIX}{name}"), shape)
    })
}

/// Transposes the tensors that are transposed in memory, from the shapes of `from`.
fn transpose(from: &Layout, weights: &mut [f32]) {
    for Tensor { shape, range, .. } in
        from.tensors().iter().filter(|tensor| tensor.name.ends_with(EMBEDDING_A))
    {
        let old = weights[range.clone()].to_vec();
        let (rows, columns) = (shape[0], shape[1]);
        for (place, value) in weights[range.clone()].iter_mut().enumerate() {
            *value = old[place % rows * columns + place / rows];
        }
    }
}

/// Reads an adapter for a model of the shape `model`.
///
/// # Errors
/// [`ModelError::File`] if a file cannot be read; [`ModelError::Format`] if it is not that of an adapter that is supported, or
/// if it is that of another model; [`ModelError::Damaged`].
pub fn read(directory: &Path, model: &ModelConfig) -> Result<Adapter, ModelError> {
    let path = directory.join(CONFIG);
    let file: ConfigFile = hf::read_json(&path)?;
    let config = file.resolve().map_err(|problem| ModelError::format(&path, problem))?;
    let shape =
        AdapterShape::new(model, &config).map_err(|error| ModelError::format(&path, error.to_string()))?;
    let layout = file_layout(&shape).described(|tensor| (plain(&tensor.name), tensor.shape.clone()));
    let names = Names {
        plain,
        of: "an adapter of these target_modules for this base model",
        asks: "an adapter of this base model",
    };
    let path = directory.join(WEIGHTS);
    let mut reader = WeightReader::new(&layout, names);
    let file = File::open(&path).map_err(ModelError::file("read", &path))?;
    let header = reader.read(BufReader::new(file)).map_err(|problem| problem.of(&path))?;
    let base = header.metadata().as_ref().and_then(|notes| notes.get(BASE)?.parse().ok());
    let mut weights = reader.finish().map_err(|problem| ModelError::format(&path, problem))?;
    transpose(&layout, &mut weights);
    Ok(Adapter { shape, weights, base })
}

/// The text of `adapter_config.json`; `base` names the base model for people.
pub fn config_json(shape: &AdapterShape, base: &str) -> String {
    let AdapterConfig { kind, rank, alpha, dropout, rank_pattern, alpha_pattern, rank_stabilised, .. } =
        shape.config();
    let number = |value: f64| if value.fract() == 0.0 { json!(value as i64) } else { json!(value) };
    let alphas: BTreeMap<&String, Value> =
        alpha_pattern.iter().map(|(key, alpha)| (key, number(*alpha))).collect();
    let targets = match shape.regex() {
        Some(regex) => json!(regex),
        None => json!(shape.target_names()),
    };
    hf::json(&json!({
        "alpha_pattern": alphas,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": number(*alpha),
        "lora_dropout": dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": *kind == AdapterKind::Dora,
        "use_rslora": rank_stabilised,
    }))
}

/// The contents of `adapter_model.safetensors`; `base` is [`Adapter::base`].
///
/// # Errors
/// [`ModelError::Tensors`] if there is not one weight per parameter of the adapter.
pub fn to_safetensors(
    shape: &AdapterShape,
    weights: &[f32],
    base: Option<Digest>,
) -> Result<Vec<u8>, ModelError> {
    shape.layout().check_len(weights)?;
    let mut weights = weights.to_vec();
    transpose(shape.layout(), &mut weights);
    let layout = file_layout(shape);
    let tensors = safetensors::serialize(views(&layout, &weights)?, Some(metadata()))
        .map_err(|error| ModelError::Tensors(error.to_string()))?;
    match base {
        None => Ok(tensors),
        Some(base) => with_note(&tensors, BASE, &base.to_string()),
    }
}

/// Writes an adapter, creating the directory if necessary and replacing files of the same names.
///
/// # Errors
/// [`ModelError::File`] if a file cannot be written; [`ModelError::Tensors`] if there is not one weight per parameter.
pub fn write(directory: &Path, shape: &AdapterShape, weights: &[f32], base: &str) -> Result<(), ModelError> {
    let tensors = to_safetensors(shape, weights, None)?;
    std::fs::create_dir_all(directory).map_err(ModelError::file("write", directory))?;
    for (name, contents) in [(CONFIG, config_json(shape, base).into_bytes()), (WEIGHTS, tensors)] {
        let path = directory.join(name);
        std::fs::write(&path, contents).map_err(ModelError::file("write", &path))?;
    }
    Ok(())
}
