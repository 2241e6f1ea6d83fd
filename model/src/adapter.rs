//! Adapters: small matrices that are trained in place of a model's weights.
//!
//! The adapter of a matrix `W` stands for `W + s·B·A` (LoRA), or for that with the norm of each row replaced by a trained
//! *magnitude* (DoRA); that of the embedding `E` stands for `E + s·A·Bᵀ`, and leaves a tied head as it was. This module
//! decides which matrices of a model have one, and merges trained adapters into weights. `peft.rs` reads and writes their
//! files.

use ulmus_plan::{ALL_LINEAR, AdaptedModule, AdapterConfig, ModelConfig};

use crate::error::ModelError;
use crate::params::{AdapterPlaces, LayerPlaces, Layout, LinearPlaces, Places, Trainable, check_len};

/// The names of the modules that [`ALL_LINEAR`] stands for.
const LINEAR_NAMES: [&str; 4] = ["qkv_proj", "out_proj", "proj_1", "proj_2"];

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
        let modules = config.modules(model).map_err(|mistake| ModelError::Adapter(mistake.problem))?;
        let mut shape = Self { config: config.clone(), modules, layout: Layout::default() };
        let (layout, places) = Places::new(model, &shape.modules);
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
        let (_, places) = Places::new(model, &self.modules);
        check_len(&weights, places.base)?;
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
        let linears = places.layers.iter().flat_map(LayerPlaces::linears);
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

/// Whether `target` is the name of a module, or the end of it.
fn is_named(name: &str, target: &str) -> bool {
    name == target || name.strip_suffix(target).is_some_and(|rest| rest.ends_with('.'))
}
