//! Hugging Face model directories: `config.json`, `model.safetensors` (or shards with an index),
//! `generation_config.json`, `modeling_openelm.py`.
//!
//! Directories written here can be loaded by mlx-lm and llama.cpp, which know OpenELM, and by transformers, which runs the
//! model's code in the directory. A model with layer norms, which the published ones do not have, is of another type by
//! name, so that programs which know RMS norm alone refuse it. Directories read here may come from anywhere, so a config
//! that asks for something that this implementation does not compute is refused, naming the field, rather than computed
//! differently.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ulmus_plan::{ModelConfig, Multipliers, NormKind, WeightType};
use ulmus_types::Problems;

use crate::error::ModelError;
use crate::params::Layout;
use crate::tensors::{Names, WeightReader, metadata, views};

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The name of the file with the model's code for transformers, which `config.json` refers to, and its text.
pub const MODELING: (&str, &str) = ("modeling_openelm.py", include_str!("hf/modeling_openelm.py"));

/// The types of models, and what they are called in `config.json` and in the code beside it.
struct ModelType {
    name: &'static str,
    config_class: &'static str,
    model_class: &'static str,
    normalization: &'static str,
}

/// The published models.
const WITH_RMS_NORM: ModelType = ModelType {
    name: "openelm",
    config_class: "OpenELMConfig",
    model_class: "OpenELMForCausalLM",
    normalization: "rms_norm",
};

/// The same with layer norms.
const WITH_LAYER_NORM: ModelType = ModelType {
    name: "openelm_layer_norm",
    config_class: "OpenELMLayerNormConfig",
    model_class: "OpenELMLayerNormForCausalLM",
    normalization: "layer_norm",
};

impl ModelType {
    fn of(norm: NormKind) -> Self {
        match norm {
            NormKind::Rms | NormKind::NaiveRms => WITH_RMS_NORM,
            NormKind::Layer => WITH_LAYER_NORM,
        }
    }
}

/// The special tokens that a model directory names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialTokens {
    /// The token that begins a document.
    pub bos: u32,
    /// The token that ends a document; generation stops at it.
    pub eos: u32,
}

impl Default for SpecialTokens {
    /// The tokens of the published models' tokenizer.
    fn default() -> Self {
        Self { bos: 1, eos: 2 }
    }
}

/// A model directory in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct HfModel {
    /// The shape of the model.
    pub config: ModelConfig,
    /// Flat weights in the order of [`Layout`].
    pub weights: Vec<f32>,
    /// The special tokens of its tokenizer.
    pub tokens: SpecialTokens,
}

/// Every field that is understood; others are ignored.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    model_type: Option<String>,
    vocab_size: usize,
    max_context_length: usize,
    num_transformer_layers: usize,
    model_dim: usize,
    head_dim: usize,
    qkv_multipliers: Multipliers,
    num_query_heads: Option<Vec<usize>>,
    num_kv_heads: Option<Vec<usize>>,
    num_gqa_groups: usize,
    ffn_multipliers: Multipliers,
    ffn_with_glu: Option<bool>,
    ffn_dim_divisor: usize,
    activation_fn_name: Option<String>,
    normalization_layer_name: Option<String>,
    normalize_qk_projections: Option<bool>,
    share_input_output_layers: Option<bool>,
    rope_freq_constant: Option<f64>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
}

impl ConfigFile {
    /// Refuses fields that change what is computed; of each, a single value is implemented.
    fn check_supported(&self) -> Result<(), String> {
        let is = |field: &Option<String>, accepted: &[&str]| {
            field.as_deref().is_none_or(|value| accepted.contains(&value))
        };
        let yes = |field: Option<bool>| field.unwrap_or(true);
        let types = [WITH_RMS_NORM, WITH_LAYER_NORM].map(|kind| kind.name);
        let norms = [WITH_RMS_NORM, WITH_LAYER_NORM].map(|kind| kind.normalization);
        let unsupported = if !is(&self.model_type, &types) {
            format!(
                "model_type {:?} (only {})",
                self.model_type.as_deref().unwrap_or_default(),
                types.join(", ")
            )
        } else if !is(&self.activation_fn_name, &["swish", "silu"]) {
            format!(
                "activation_fn_name {:?} (only \"swish\")",
                self.activation_fn_name.as_deref().unwrap_or_default()
            )
        } else if !is(&self.normalization_layer_name, &norms) {
            let name = self.normalization_layer_name.as_deref().unwrap_or_default();
            format!("normalization_layer_name {name:?} (only {})", norms.join(", "))
        } else if !yes(self.ffn_with_glu) {
            "ffn_with_glu false (only true)".to_owned()
        } else if !yes(self.normalize_qk_projections) {
            "normalize_qk_projections false (only true)".to_owned()
        } else {
            return Ok(());
        };
        Err(format!("not supported: {unsupported}"))
    }

    fn resolve(self) -> Result<(ModelConfig, SpecialTokens), String> {
        self.check_supported()?;
        let norm = match self.normalization_layer_name.as_deref() {
            Some(name) if name == WITH_LAYER_NORM.normalization => NormKind::Layer,
            _ => NormKind::Rms,
        };
        let config = ModelConfig {
            vocab_size: self.vocab_size,
            max_context_length: self.max_context_length,
            num_transformer_layers: self.num_transformer_layers,
            model_dim: self.model_dim,
            head_dim: self.head_dim,
            num_gqa_groups: self.num_gqa_groups,
            qkv_multipliers: self.qkv_multipliers,
            ffn_multipliers: self.ffn_multipliers,
            ffn_dim_divisor: self.ffn_dim_divisor,
            rope_freq_constant: self.rope_freq_constant.unwrap_or(10_000.0),
            norm,
            share_input_output_layers: self.share_input_output_layers.unwrap_or(true),
        };
        let mut problems = Problems::new();
        config.check("model", &mut problems);
        if !problems.is_empty() {
            return Err(problems.to_string());
        }
        let layers = config.layers();
        let computed =
            |heads: fn(&ulmus_plan::LayerDims) -> usize| layers.iter().map(heads).collect::<Vec<_>>();
        for (name, stated, computed) in [
            ("num_query_heads", self.num_query_heads, computed(|layer| layer.q_heads)),
            ("num_kv_heads", self.num_kv_heads, computed(|layer| layer.kv_heads)),
        ] {
            if let Some(stated) = stated.filter(|stated| *stated != computed) {
                return Err(format!("{name} is {stated:?}, but qkv_multipliers give {computed:?}"));
            }
        }
        let defaults = SpecialTokens::default();
        let tokens = SpecialTokens {
            bos: self.bos_token_id.unwrap_or(defaults.bos),
            eos: self.eos_token_id.unwrap_or(defaults.eos),
        };
        Ok((config, tokens))
    }
}

/// Reads `config.json` of a model directory.
///
/// # Errors
/// [`ModelError::File`] if it cannot be read; [`ModelError::Format`] if it is not the config of an OpenELM that is
/// supported.
pub fn read_config(directory: &Path) -> Result<(ModelConfig, SpecialTokens), ModelError> {
    let path = directory.join(CONFIG);
    let file: ConfigFile = read_json(&path)?;
    file.resolve().map_err(|problem| ModelError::format(&path, problem))
}

/// The files with the weights of a model directory, and the file that names them.
///
/// # Errors
/// [`ModelError::File`] if one is not there; [`ModelError::Format`] if the index of shards is wrong.
pub fn weight_files(directory: &Path) -> Result<(Vec<PathBuf>, PathBuf), ModelError> {
    let (index, single) = (directory.join(INDEX), directory.join(WEIGHTS));
    // With both, transformers reads the single file too: the index belongs to the shards that it was merged from.
    let (files, whole) = if single.exists() {
        if index.exists() {
            tracing::warn!(read = %single.display(), passed_by = %index.display(), "the directory has both model.safetensors and an index");
        }
        (vec![single.clone()], single)
    } else if index.exists() {
        let shards: ShardIndex = read_json(&index)?;
        let names: BTreeSet<String> = shards.weight_map.into_values().collect();
        if let Some(name) = names.iter().find(|name| Path::new(name).components().count() != 1) {
            return Err(ModelError::format(
                &index,
                format!("shard {name:?} is not a file of this directory"),
            ));
        }
        (names.iter().map(|name| directory.join(name)).collect(), index)
    } else {
        (vec![single.clone()], single)
    };
    for path in &files {
        std::fs::metadata(path).map_err(ModelError::file("read", path))?;
    }
    Ok((files, whole))
}

/// Reads a model directory.
///
/// # Errors
/// Those of [`read_config`]; [`ModelError::Damaged`] or [`ModelError::Format`] for weights that are missing, damaged or
/// of another shape.
pub fn read(directory: &Path) -> Result<HfModel, ModelError> {
    let (config, tokens) = read_config(directory)?;
    let layout = Layout::new(&config);
    let mut reader = WeightReader::new(&layout, Names::MODEL);
    let (files, whole) = weight_files(directory)?;
    for path in files {
        let file = File::open(&path).map_err(ModelError::file("read", &path))?;
        reader.read(BufReader::new(file)).map_err(|problem| problem.of(&path))?;
    }
    let weights = reader.finish().map_err(|problem| ModelError::format(&whole, problem))?;
    Ok(HfModel { config, weights, tokens })
}

/// The index of a sharded model: the file of each tensor.
#[derive(Debug, Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    let text = std::fs::read(path).map_err(ModelError::file("read", path))?;
    // Some editors write a byte order mark first.
    let json = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&text);
    serde_json::from_slice(json).map_err(|error| ModelError::format(path, error.to_string()))
}

/// The `config.json` that is written: with one width per layer, as in the published models.
#[derive(Debug, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "the file format has these fields")]
struct ExportedConfig<'a> {
    architectures: [&'a str; 1],
    auto_map: BTreeMap<&'a str, String>,
    model_type: &'a str,
    vocab_size: usize,
    max_context_length: usize,
    num_transformer_layers: usize,
    model_dim: usize,
    head_dim: usize,
    qkv_multipliers: &'a Multipliers,
    num_query_heads: Vec<usize>,
    num_kv_heads: Vec<usize>,
    num_gqa_groups: usize,
    ffn_multipliers: Multipliers,
    ffn_with_glu: bool,
    ffn_dim_divisor: usize,
    activation_fn_name: &'a str,
    normalization_layer_name: &'a str,
    normalize_qk_projections: bool,
    share_input_output_layers: bool,
    rope_freq_constant: f64,
    rope_max_length: usize,
    initializer_range: f64,
    use_cache: bool,
    bos_token_id: u32,
    eos_token_id: u32,
    torch_dtype: &'a str,
}

/// The text of `config.json`, beside weights of type `dtype`.
pub fn config_json(config: &ModelConfig, tokens: SpecialTokens, dtype: WeightType) -> String {
    let layers = config.layers();
    let kind = ModelType::of(config.norm);
    let module = MODELING.0.trim_end_matches(".py");
    let classes = [("AutoConfig", kind.config_class), ("AutoModelForCausalLM", kind.model_class)];
    json(&ExportedConfig {
        architectures: [kind.model_class],
        auto_map: classes.map(|(auto, class)| (auto, format!("{module}.{class}"))).into(),
        model_type: kind.name,
        vocab_size: config.vocab_size,
        max_context_length: config.max_context_length,
        num_transformer_layers: config.num_transformer_layers,
        model_dim: config.model_dim,
        head_dim: config.head_dim,
        qkv_multipliers: &config.qkv_multipliers,
        num_query_heads: layers.iter().map(|layer| layer.q_heads).collect(),
        num_kv_heads: layers.iter().map(|layer| layer.kv_heads).collect(),
        num_gqa_groups: config.num_gqa_groups,
        ffn_multipliers: match &config.ffn_multipliers {
            // A list of two values would be taken for a range, and rounded, by a reader.
            uniform @ Multipliers::Uniform(_) if layers.len() == 2 => uniform.clone(),
            multipliers => Multipliers::Layers(multipliers.expand(layers.len())),
        },
        ffn_with_glu: true,
        ffn_dim_divisor: config.ffn_dim_divisor,
        activation_fn_name: "swish",
        normalization_layer_name: kind.normalization,
        normalize_qk_projections: true,
        share_input_output_layers: config.share_input_output_layers,
        rope_freq_constant: config.rope_freq_constant,
        rope_max_length: 2 * config.max_context_length,
        // Unused, because the weights are there.
        initializer_range: 0.02,
        use_cache: true,
        bos_token_id: tokens.bos,
        eos_token_id: tokens.eos,
        torch_dtype: match dtype {
            WeightType::F16 => "float16",
            WeightType::Bf16 => "bfloat16",
            WeightType::F32 | WeightType::Q8_0 => "float32",
        },
    })
}

/// The text of `generation_config.json`.
pub fn generation_config_json(tokens: SpecialTokens) -> String {
    json(&serde_json::json!({ "bos_token_id": tokens.bos, "eos_token_id": tokens.eos }))
}

/// JSON for people: indented, with a newline at the end.
pub(crate) fn json(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("plain data with finite numbers is valid JSON");
    text.push('\n');
    text
}

/// Writes a model directory, creating it if necessary and replacing files of the same names. The config comes last, so that a
/// directory with one is whole. The caller adds the files of the tokenizer.
///
/// # Errors
/// [`ModelError::File`] if a file cannot be written; [`ModelError::Tensors`] if there is not one weight per
/// parameter.
pub fn write(
    directory: &Path,
    config: &ModelConfig,
    weights: &[f32],
    tokens: SpecialTokens,
) -> Result<(), ModelError> {
    let layout = Layout::new(config);
    layout.check_len(weights)?;
    std::fs::create_dir_all(directory).map_err(ModelError::file("write", directory))?;
    let path = directory.join(WEIGHTS);
    let written = safetensors::serialize_to_file(views(&layout, weights)?, Some(metadata()), &path);
    written.map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => ModelError::file("write", &path)(source),
        other => ModelError::format(&path, other.to_string()),
    })?;
    let (module, code) = MODELING;
    let texts = [
        (module, code.to_owned()),
        (GENERATION_CONFIG, generation_config_json(tokens)),
        (CONFIG, config_json(config, tokens, WeightType::F32)),
    ];
    for (name, text) in texts {
        let path = directory.join(name);
        std::fs::write(&path, text).map_err(ModelError::file("write", &path))?;
    }
    // The file of weights is written as one that only its owner may read.
    let permissions = std::fs::metadata(directory.join(CONFIG)).map(|config| config.permissions());
    permissions
        .and_then(|permissions| std::fs::set_permissions(&path, permissions))
        .map_err(ModelError::file("write", &path))
}
