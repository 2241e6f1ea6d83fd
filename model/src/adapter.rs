//! Adapters: small matrices that are trained in place of a model's weights.
//!
//! The adapter of a matrix `W` stands for `W + s·B·A` (LoRA), or for that with the norm of each row replaced by a trained
//! *magnitude* (DoRA); that of the embedding `E` stands for `E + s·A·Bᵀ`, and leaves a tied head as it was. This module
//! decides which matrices of a model have one, and merges trained adapters into weights. [`crate::peft`] reads and writes
//! their files.

use regex::Regex;
use ulmus_plan::{AdapterConfig, AdapterKind, ModelConfig};

use crate::error::ModelError;
use crate::params::{AdapterPlaces, Layout, LinearPlaces, Places, Trainable};

/// The name that stands for all matrices of all layers.
const ALL_LINEAR: &str = "all-linear";
/// The names of the modules that it stands for.
const LINEAR_NAMES: [&str; 4] = ["qkv_proj", "out_proj", "proj_1", "proj_2"];
/// The module name of the embedding.
const EMBEDDING: &str = "transformer.token_embeddings";

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

/// Which matrices of a model have an adapter, and of which rank.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterShape {
    config: AdapterConfig,
    modules: Vec<AdaptedModule>,
    layout: Layout,
}

impl AdapterShape {
    /// The adapter that a plan asks for.
    ///
    /// # Errors
    /// [`ModelError::Adapter`] if a name matches no module, and for what cannot be combined.
    pub fn new(model: &ModelConfig, config: &AdapterConfig) -> Result<Self, ModelError> {
        let refuse = |problem: String| Err(ModelError::Adapter(problem));
        if !(0.0..1.0).contains(&config.dropout) {
            return refuse(format!("dropout is {}; set it to at least 0 and below 1", config.dropout));
        }
        let all = all_modules(model);
        let mut chosen = vec![false; all.len()];
        for target in &config.targets {
            let matches = matching(target, &all, config.targets.len() == 1)?;
            if matches.is_empty() {
                return refuse(format!("target {target:?} matches no module; there are {}", names(&all)));
            }
            matches.into_iter().for_each(|index| chosen[index] = true);
        }
        let ranks = Pattern::new("rank_pattern", config.rank_pattern.iter(), &all)?;
        let alphas = Pattern::new("alpha_pattern", config.alpha_pattern.iter(), &all)?;
        let mut modules = Vec::new();
        for ((name, [outputs, inputs]), _) in all.into_iter().zip(chosen).filter(|(_, chosen)| *chosen) {
            let rank = *ranks.of(&name)?.unwrap_or(&config.rank);
            let alpha = *alphas.of(&name)?.unwrap_or(&config.alpha);
            if rank == 0 || rank > 1 << 16 || !alpha.is_finite() {
                return refuse(format!(
                    "{name} would have rank {rank} and alpha {alpha}; a rank is from 1 to 65536, and alpha is finite"
                ));
            }
            let divisor = if config.rank_stabilised { (rank as f64).sqrt() } else { rank as f64 };
            let is_embedding = name == EMBEDDING;
            let has_magnitude = config.kind == AdapterKind::Dora;
            if is_embedding && has_magnitude {
                return refuse(
                    "the embedding has no DoRA; leave token_embeddings out of the targets, or use kind = \"lora\""
                        .to_owned(),
                );
            }
            let scale = alpha / divisor;
            let rank = rank as usize;
            modules.push(AdaptedModule { name, inputs, outputs, rank, scale, is_embedding, has_magnitude });
        }
        if modules.is_empty() {
            return refuse("it has no targets; name modules, for instance \"all-linear\"".to_owned());
        }
        let mut shape = Self { config: config.clone(), modules, layout: Layout::default() };
        let (layout, places) = Places::new(model, Some(&shape));
        shape.layout = Trainable::of(&layout, places.base..layout.parameters()).layout().clone();
        Ok(shape)
    }

    /// What was asked for.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The regular expression that chooses the modules, if it is no name.
    pub(crate) fn regex(&self) -> Option<&str> {
        let [target] = self.config.targets.as_slice() else { return None };
        let is_name =
            target == ALL_LINEAR || self.modules.iter().any(|module| is_named(&module.name, target));
        (!is_name).then_some(target)
    }

    /// The names that choose the modules.
    pub(crate) fn target_names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for target in &self.config.targets {
            let own = if target == ALL_LINEAR { &LINEAR_NAMES[..] } else { &[target.as_str()] };
            names.extend(own.iter().filter(|name| !names.contains(*name)).copied().collect::<Vec<_>>());
        }
        names
    }

    /// The matrices that have an adapter, in the order of the model.
    pub fn modules(&self) -> &[AdaptedModule] {
        &self.modules
    }

    /// Names, shapes and places of the adapter's tensors in a flat vector. Names are those of PEFT's files without their
    /// prefix. All shapes are PEFT's, but for `lora_embedding_A`, which is transposed: `[vocabulary, rank]`.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The shape of the merged model. It has a head of its own if the embedding, to which the head was tied, changes.
    pub fn merged_config(&self, model: &ModelConfig) -> ModelConfig {
        let unties = self.modules.iter().any(|module| module.is_embedding);
        let share_input_output_layers = model.share_input_output_layers && !unties;
        ModelConfig { share_input_output_layers, ..model.clone() }
    }

    /// Adds a trained adapter to the flat weights of its base model: the weights of a model of the shape that
    /// [`AdapterShape::merged_config`] answers. Sums are in float64, and each weight is rounded once.
    ///
    /// # Errors
    /// [`ModelError::Tensors`] if there is not one value per parameter of the model or of the adapter.
    pub fn merge(
        &self,
        model: &ModelConfig,
        mut weights: Vec<f32>,
        adapter: &[f32],
    ) -> Result<Vec<f32>, ModelError> {
        let (_, places) = Places::new(model, Some(self));
        crate::params::check_len(&weights, places.base)?;
        self.layout.check_len(adapter)?;
        let merged = self.merged_config(model);
        if merged.share_input_output_layers != model.share_input_output_layers {
            weights.extend_from_within(places.embedding.clone());
        }
        let own =
            |range: &std::ops::Range<usize>| &adapter[range.start - places.base..range.end - places.base];
        if let Some(at) = &places.embedding_adapter {
            let table = weights[places.embedding.clone()].chunks_exact_mut(model.model_dim);
            for (row, a) in table.zip(own(&at.a).chunks_exact(at.rank)) {
                for (value, b) in row.iter_mut().zip(own(&at.b).chunks_exact(at.rank)) {
                    let product: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    *value = (f64::from(*value) + f64::from(at.scale) * product) as f32;
                }
            }
        }
        let linears = places.layers.iter().flat_map(|layer| layer.linears());
        for LinearPlaces { weight, inputs, adapter: at, .. } in linears {
            let Some(AdapterPlaces { a, b, magnitude, rank, scale, .. }) = at else { continue };
            let magnitudes = magnitude.as_ref().map(own);
            let mut sum = vec![0.0; *inputs];
            let rows = weights[weight.clone()].chunks_exact_mut(*inputs).zip(own(b).chunks_exact(*rank));
            for (index, (row, b)) in rows.enumerate() {
                sum.iter_mut().zip(&*row).for_each(|(sum, weight)| *sum = f64::from(*weight));
                for (b, a) in b.iter().zip(own(a).chunks_exact(*inputs)) {
                    let factor = f64::from(*scale) * f64::from(*b);
                    sum.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * f64::from(*a));
                }
                let gain = magnitudes.map_or(1.0, |magnitudes| {
                    let norm = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
                    if norm == 0.0 { 1.0 } else { f64::from(magnitudes[index]) / norm }
                });
                row.iter_mut().zip(&sum).for_each(|(weight, sum)| *weight = (gain * sum) as f32);
            }
        }
        Ok(weights)
    }
}

/// All modules that can have an adapter, with the shapes `[outputs, inputs]` of their matrices, in the order of the model.
fn all_modules(model: &ModelConfig) -> Vec<(String, [usize; 2])> {
    let (_, places) = Places::new(model, None);
    let layers = places.layers.iter().enumerate().flat_map(|(i, layer)| {
        let names = ["attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2"];
        let named = names.into_iter().zip(layer.linears());
        named.map(move |(name, at)| (format!("transformer.layers.{i}.{name}"), [at.outputs, at.inputs]))
    });
    [(EMBEDDING.to_owned(), [model.model_dim, model.vocab_size])].into_iter().chain(layers).collect()
}

/// What there is to choose from, in a few words.
fn names(all: &[(String, [usize; 2])]) -> String {
    let layers = all.len() / crate::params::LINEARS;
    format!(
        "{EMBEDDING}, and attn.qkv_proj, attn.out_proj, ffn.proj_1 and ffn.proj_2 in transformer.layers.0 to \
         transformer.layers.{}; write their names, the ends of their names, or \"{ALL_LINEAR}\"",
        layers - 1
    )
}

/// Whether `target` is the name of a module, or the end of it.
fn is_named(name: &str, target: &str) -> bool {
    name == target || name.strip_suffix(target).is_some_and(|rest| rest.ends_with('.'))
}

/// The indices of the modules that a target names. If nothing bears its name and it `may_be_regex`, it is a regular
/// expression for whole names.
fn matching(
    target: &str,
    all: &[(String, [usize; 2])],
    may_be_regex: bool,
) -> Result<Vec<usize>, ModelError> {
    let indices = |matches: &dyn Fn(&str) -> bool| -> Vec<usize> {
        all.iter().enumerate().filter(|(_, (name, _))| matches(name)).map(|(index, _)| index).collect()
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
fn whole(pattern: &str) -> Result<Regex, ModelError> {
    Regex::new(&format!("^(?:{pattern})$"))
        .map_err(|error| ModelError::Adapter(format!("{pattern:?} is no regular expression: {error}")))
}

/// Values for modules whose names end in what a key matches.
struct Pattern<'a, T> {
    name: &'static str,
    values: Vec<(&'a str, Regex, &'a T)>,
}

impl<'a, T: PartialEq> Pattern<'a, T> {
    fn new(
        name: &'static str,
        values: impl Iterator<Item = (&'a String, &'a T)>,
        all: &[(String, [usize; 2])],
    ) -> Result<Self, ModelError> {
        let values = values.map(|(key, value)| {
            let regex = whole(&format!("(?:.*\\.)?(?:{key})"))?;
            if all.iter().any(|(module, _)| regex.is_match(module)) {
                return Ok((key.as_str(), regex, value));
            }
            Err(ModelError::Adapter(format!(
                "{name} has {key:?}, which matches no module; there are {}",
                names(all)
            )))
        });
        Ok(Self { name, values: values.collect::<Result<_, _>>()? })
    }

    /// The value for a module, if a key matches it.
    fn of(&self, module: &str) -> Result<Option<&'a T>, ModelError> {
        let mut matching = self.values.iter().filter(|(_, regex, _)| regex.is_match(module));
        let Some((key, _, value)) = matching.next() else { return Ok(None) };
        match matching.find(|(_, _, other)| other != value) {
            None => Ok(Some(value)),
            Some((other, _, _)) => Err(ModelError::Adapter(format!(
                "{} gives {module} two values, by {key:?} and by {other:?}; leave one of them out",
                self.name
            ))),
        }
    }
}
