//! Adapters, and which matrices of a model they belong to.

use std::collections::BTreeMap;

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::model::ModelConfig;

/// The name of a target that stands for all matrices of all layers.
pub const ALL_LINEAR: &str = "all-linear";
/// The module name of the embedding.
const EMBEDDING: &str = "transformer.token_embeddings";
/// The largest rank of an adapter.
const MOST_RANK: u64 = 1 << 16;

/// A kind of adapter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    /// Low-rank adaptation (arXiv 2106.09685): `W + s·B·A`.
    #[default]
    Lora,
    /// Weight-decomposed low-rank adaptation (arXiv 2402.09353): a trained norm for each row of `W + s·B·A`.
    Dora,
}

/// Small matrices that are trained in place of the weights. The defaults are those of OpenELM's published adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterConfig {
    /// The kind of adapter.
    pub kind: AdapterKind,
    /// Rank of the matrices.
    pub rank: u64,
    /// Scale of the update: it counts `alpha / rank` times.
    pub alpha: f64,
    /// Probability with which each input of an adapter is left out of a training step; the others count for more.
    pub dropout: f64,
    /// The matrices that get an adapter: names of modules as Hugging Face or CoreNet call them, such as `qkv_proj`, each of which
    /// stands for all modules whose name ends in it; `all-linear`; or one regular expression that matches whole names. By default
    /// `qkv_proj`, `out_proj`, `proj_1` and `proj_2`.
    pub targets: Vec<String>,
    /// Ranks of modules whose names end in, or are matched by, these keys.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, u64>,
    /// Alphas of such modules.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Rank-stabilised scaling: the update counts `alpha / √rank` times.
    pub rank_stabilised: bool,
    /// A folder with an adapter in PEFT's layout to go on from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            kind: AdapterKind::Lora,
            rank: 32,
            alpha: 32.0,
            dropout: 0.0,
            targets: ["qkv_proj", "out_proj", "proj_1", "proj_2"].map(str::to_owned).to_vec(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            rank_stabilised: false,
            from: None,
        }
    }
}

/// What is wrong with an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterMistake {
    /// The key that is wrong, below the adapter's.
    pub key: String,
    /// What is wrong, and what to write instead.
    pub problem: String,
}

impl AdapterMistake {
    fn new(key: impl Into<String>, problem: String) -> Self {
        Self { key: key.into(), problem }
    }
}

/// A matrix that has an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedModule {
    /// The module's name in Hugging Face's layout, for instance `transformer.layers.0.attn.qkv_proj`.
    pub name: String,
    /// Width of its input; of an embedding, the vocabulary.
    pub inputs: usize,
    /// Width of its output.
    pub outputs: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// The factor s of the product of both matrices.
    pub scale: f64,
    /// Whether it is the embedding.
    pub is_embedding: bool,
    /// Whether each row of its matrix has a trained magnitude.
    pub has_magnitude: bool,
}

impl AdaptedModule {
    /// The name of the module in its layer, such as `qkv_proj`, which modules of other layers share.
    pub fn kind(&self) -> &str {
        self.name.rsplit_once('.').map_or(&self.name, |(_, kind)| kind)
    }

    /// Number of parameters of its adapter.
    pub fn parameters(&self) -> u64 {
        let magnitudes = if self.has_magnitude { self.outputs } else { 0 };
        (self.rank * (self.inputs + self.outputs) + magnitudes) as u64
    }
}

impl AdapterConfig {
    /// The matrices of a model that have an adapter, in the order of the model.
    ///
    /// # Errors
    /// What is wrong, and what to write instead: a name matches no module, or what is asked for cannot be combined.
    pub fn modules(&self, model: &ModelConfig) -> Result<Vec<AdaptedModule>, AdapterMistake> {
        if !(0.0..1.0).contains(&self.dropout) {
            let problem = format!("dropout is {}; set it to at least 0 and below 1", self.dropout);
            return Err(AdapterMistake::new("dropout", problem));
        }
        let all = all_modules(model);
        let mut chosen = vec![false; all.len()];
        for target in &self.targets {
            let matches = matching(target, &all, self.targets.len() == 1)
                .map_err(|problem| AdapterMistake::new("targets", problem))?;
            if matches.is_empty() {
                let problem = format!("target {target:?} matches no module; there are {}", names(model));
                return Err(AdapterMistake::new("targets", problem));
            }
            for index in matches {
                chosen[index] = true;
            }
        }
        let ranks = Pattern::new("rank_pattern", self.rank_pattern.iter(), &all, model)?;
        let alphas = Pattern::new("alpha_pattern", self.alpha_pattern.iter(), &all, model)?;
        let mut modules = Vec::new();
        for (Module { name, inputs, outputs }, _) in all.into_iter().zip(chosen).filter(|(_, chosen)| *chosen)
        {
            let (rank_key, rank) = ranks.of(&name)?.unwrap_or_else(|| ("rank".to_owned(), self.rank));
            let (alpha_key, alpha) = alphas.of(&name)?.unwrap_or_else(|| ("alpha".to_owned(), self.alpha));
            let has_rank = (1..=MOST_RANK).contains(&rank);
            if !has_rank || !alpha.is_finite() {
                let problem = format!(
                    "{name} would have rank {rank} and alpha {alpha}; a rank is from 1 to {MOST_RANK}, and alpha is finite"
                );
                return Err(AdapterMistake::new(if has_rank { alpha_key } else { rank_key }, problem));
            }
            let divisor = if self.rank_stabilised { (rank as f64).sqrt() } else { rank as f64 };
            let is_embedding = name == EMBEDDING;
            let has_magnitude = self.kind == AdapterKind::Dora;
            if is_embedding && has_magnitude {
                let problem = "the embedding has no DoRA; leave token_embeddings out of the targets, or use kind = \"lora\"";
                return Err(AdapterMistake::new("targets", problem.to_owned()));
            }
            let scale = alpha / divisor;
            let rank = rank as usize;
            modules.push(AdaptedModule { name, inputs, outputs, rank, scale, is_embedding, has_magnitude });
        }
        if modules.is_empty() {
            let problem = "it has no targets; name modules, for instance \"all-linear\"";
            return Err(AdapterMistake::new("targets", problem.to_owned()));
        }
        Ok(modules)
    }
}

/// A matrix that can have an adapter.
struct Module {
    name: String,
    inputs: usize,
    outputs: usize,
}

/// All modules that can have an adapter, in the order of the model.
fn all_modules(model: &ModelConfig) -> Vec<Module> {
    let width = model.model_dim;
    let layers = model.layers().into_iter().enumerate().flat_map(|(index, layer)| {
        let attention = layer.q_heads * model.head_dim;
        let packed = attention + 2 * layer.kv_heads * model.head_dim;
        [
            ("attn.qkv_proj", width, packed),
            ("attn.out_proj", attention, width),
            ("ffn.proj_1", width, 2 * layer.ffn_dim),
            ("ffn.proj_2", layer.ffn_dim, width),
        ]
        .map(|(name, inputs, outputs)| Module {
            name: format!("transformer.layers.{index}.{name}"),
            inputs,
            outputs,
        })
    });
    let embedding = Module { name: EMBEDDING.to_owned(), inputs: model.vocab_size, outputs: width };
    [embedding].into_iter().chain(layers).collect()
}

/// What there is to choose from, in a few words.
fn names(model: &ModelConfig) -> String {
    format!(
        "{EMBEDDING}, and attn.qkv_proj, attn.out_proj, ffn.proj_1 and ffn.proj_2 in transformer.layers.0 to \
         transformer.layers.{}; write their names, the ends of their names, or \"{ALL_LINEAR}\"",
        model.num_transformer_layers.saturating_sub(1)
    )
}

/// The indices of the modules that a target names. If nothing bears its name and it `may_be_regex`, it is a regular
/// expression for whole names.
fn matching(target: &str, all: &[Module], may_be_regex: bool) -> Result<Vec<usize>, String> {
    let indices = |matches: &dyn Fn(&str) -> bool| -> Vec<usize> {
        let found = all.iter().enumerate().filter(|(_, module)| matches(&module.name));
        found.map(|(index, _)| index).collect()
    };
    if target == ALL_LINEAR {
        return Ok(indices(&|name| name != EMBEDDING));
    }
    let named =
        indices(&|name| name == target || name.strip_suffix(target).is_some_and(|rest| rest.ends_with('.')));
    if !named.is_empty() || !may_be_regex {
        return Ok(named);
    }
    let regex = whole(target)?;
    Ok(indices(&|name| regex.is_match(name)))
}

/// The regular expression that matches what `pattern` matches from beginning to end.
fn whole(pattern: &str) -> Result<Regex, String> {
    Regex::new(&format!("^(?:{pattern})$"))
        .map_err(|error| format!("{pattern:?} is no regular expression: {error}"))
}

/// Values for modules whose names end in what a key matches.
struct Pattern<'a, T> {
    name: &'static str,
    values: Vec<(&'a str, Regex, &'a T)>,
}

impl<'a, T: PartialEq + Copy> Pattern<'a, T> {
    fn new(
        name: &'static str,
        values: impl Iterator<Item = (&'a String, &'a T)>,
        all: &[Module],
        model: &ModelConfig,
    ) -> Result<Self, AdapterMistake> {
        let mistake = |key: &str, problem| AdapterMistake::new(format!("{name}.{key}"), problem);
        let values = values.map(|(key, value)| {
            let regex = whole(&format!("(?:.*\\.)?(?:{key})")).map_err(|problem| mistake(key, problem))?;
            if all.iter().any(|module| regex.is_match(&module.name)) {
                return Ok((key.as_str(), regex, value));
            }
            let problem = format!("{name} has {key:?}, which matches no module; there are {}", names(model));
            Err(mistake(key, problem))
        });
        Ok(Self { name, values: values.collect::<Result<_, AdapterMistake>>()? })
    }

    /// The value for a module, with the key that gives it, if one matches.
    fn of(&self, module: &str) -> Result<Option<(String, T)>, AdapterMistake> {
        let full = |key: &str| format!("{}.{key}", self.name);
        let mut matching = self.values.iter().filter(|(_, regex, _)| regex.is_match(module));
        let Some((key, _, value)) = matching.next() else { return Ok(None) };
        match matching.find(|(_, _, other)| other != value) {
            None => Ok(Some((full(key), **value))),
            Some((other, _, _)) => {
                let both = format!("{} gives {module} two values, by {key:?} and by {other:?}", self.name);
                Err(AdapterMistake::new(full(other), both + "; leave one of them out"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    fn parameters(preset: Preset, config: &AdapterConfig) -> u64 {
        config.modules(&preset.config()).unwrap().iter().map(AdaptedModule::parameters).sum()
    }

    fn in_millions(parameters: u64) -> f64 {
        (parameters as f64 / 1e4).round() / 100.0
    }

    /// In millions, for rank 32.
    #[test]
    fn adapters_have_the_sizes_that_follow_from_the_published_models() {
        let presets = [Preset::Openelm270m, Preset::Openelm450m, Preset::Openelm1_1b, Preset::Openelm3b];
        let linear = presets.map(|preset| parameters(preset, &AdapterConfig::default()));
        assert_eq!(linear.map(in_millions), [8.38, 12.43, 23.19, 44.76]);
        let dora = AdapterConfig { kind: AdapterKind::Dora, ..AdapterConfig::default() };
        let more = presets.map(|preset| parameters(preset, &dora)).into_iter().zip(linear);
        let more: Vec<f64> = more.map(|(dora, lora)| in_millions(dora - lora)).collect();
        assert_eq!(more, [0.16, 0.23, 0.44, 0.84]);
    }

    #[test]
    fn targets_are_names_ends_of_names_or_one_expression() {
        let model = ModelConfig { num_transformer_layers: 2, ..ModelConfig::default() };
        let of = |targets: &[&str]| {
            let targets = targets.iter().map(|&target| target.to_owned()).collect();
            let modules = AdapterConfig { targets, ..AdapterConfig::default() }.modules(&model);
            modules.map(|modules| modules.into_iter().map(|module| module.name).collect::<Vec<_>>())
        };
        assert_eq!(of(&["all-linear"]).unwrap().len(), 8);
        assert_eq!(of(&["ffn.proj_1", "token_embeddings"]).unwrap().len(), 3);
        assert_eq!(of(&["layers.1.attn.qkv_proj"]).unwrap(), ["transformer.layers.1.attn.qkv_proj"]);
        assert_eq!(of(&[r".*\.(qkv|out)_proj"]).unwrap().len(), 4);
        let told = of(&["q_proj"]).unwrap_err().problem;
        assert!(told.contains("target \"q_proj\" matches no module; there are transformer.token"), "{told}");
        assert!(of(&["(", "qkv_proj"]).unwrap_err().problem.contains("matches no module"));
        assert!(of(&["("]).unwrap_err().problem.contains("is no regular expression"));
        assert!(of(&[]).unwrap_err().problem.contains("it has no targets"));
    }
}
