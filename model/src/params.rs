//! All parameters of a model as one flat vector of f32 in a fixed order.
//!
//! Order: embedding, layers first to last, final norm; within a layer as the reference's own checkpoints have it.
//! Everything that speaks of "parameter k" (gradients, moments, reductions, checkpoints) means this order, so it
//! must never change. One neighbourhood is relied upon: `q_norm` and `k_norm` of a layer are adjacent, and
//! kernels take both as one range.

use std::ops::Range;

use ulmus_plan::{LayerDims, ModelConfig};

use crate::error::ModelError;

/// One named tensor of the flat vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Hugging Face name, for instance `transformer.layers.0.attn.qkv_proj.weight`.
    pub name: String,
    /// One or two dimensions, row-major; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// Elements of the flat vector.
    pub range: Range<usize>,
    /// Standard deviation of the initial weights; `None` for norm weights, which start at 1.
    pub initial_std: Option<f64>,
}

impl Tensor {
    /// Whether weight decay applies: to every tensor with two dimensions, the embedding too.
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }
}

/// Where the parameters of one layer are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayerLayout {
    pub dims: LayerDims,
    pub qkv: Range<usize>,
    /// `q_norm`, then `k_norm`: `2 · head_dim` elements.
    pub qk_norm: Range<usize>,
    pub out_proj: Range<usize>,
    pub proj_1: Range<usize>,
    pub proj_2: Range<usize>,
    pub ffn_norm: Range<usize>,
    pub attn_norm: Range<usize>,
}

/// Names, shapes and places of all parameters of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    tensors: Vec<Tensor>,
    layers: Vec<LayerLayout>,
    len: usize,
}

impl Layout {
    /// The layout of a model of that shape.
    pub fn new(config: &ModelConfig) -> Self {
        let mut layout = Self { tensors: Vec::new(), layers: Vec::new(), len: 0 };
        let d = config.model_dim;
        // The published initialisation uses model_dim even where the fan-in is another width.
        let std = (d as f64).powf(-0.5);
        let residual_std = std * (2.0 * config.num_transformer_layers as f64).powf(-0.5);
        layout.push("token_embeddings.weight", &[config.vocab_size, d], Some(std));
        for (i, dims) in config.layers().into_iter().enumerate() {
            let attention = dims.q_heads * config.head_dim;
            let qkv = attention + 2 * dims.kv_heads * config.head_dim;
            let at = |name: &str| format!("layers.{i}.{name}.weight");
            let qkv = layout.push(&at("attn.qkv_proj"), &[qkv, d], Some(std));
            let q_norm = layout.push(&at("attn.q_norm"), &[config.head_dim], None);
            let k_norm = layout.push(&at("attn.k_norm"), &[config.head_dim], None);
            let out_proj = layout.push(&at("attn.out_proj"), &[d, attention], Some(residual_std));
            let proj_1 = layout.push(&at("ffn.proj_1"), &[2 * dims.ffn_dim, d], Some(std));
            let proj_2 = layout.push(&at("ffn.proj_2"), &[d, dims.ffn_dim], Some(residual_std));
            let ffn_norm = layout.push(&at("ffn_norm"), &[d], None);
            let attn_norm = layout.push(&at("attn_norm"), &[d], None);
            let qk_norm = q_norm.start..k_norm.end;
            layout.layers.push(LayerLayout {
                dims,
                qkv,
                qk_norm,
                out_proj,
                proj_1,
                proj_2,
                ffn_norm,
                attn_norm,
            });
        }
        layout.push("norm.weight", &[d], None);
        layout
    }

    fn push(&mut self, name: &str, shape: &[usize], initial_std: Option<f64>) -> Range<usize> {
        let range = self.len..self.len + shape.iter().product::<usize>();
        self.len = range.end;
        self.tensors.push(Tensor {
            name: format!("transformer.{name}"),
            shape: shape.to_vec(),
            range: range.clone(),
            initial_std,
        });
        range
    }

    /// All tensors in order; their ranges follow each other without a gap.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of that Hugging Face name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.len
    }

    /// Refuses a flat vector that has not one element per parameter.
    pub(crate) fn check_len(&self, values: &[f32]) -> Result<(), ModelError> {
        if values.len() == self.len {
            Ok(())
        } else {
            Err(ModelError::Tensors(format!(
                "{} values for a model of {} parameters",
                values.len(),
                self.len
            )))
        }
    }

    pub(crate) fn layers(&self) -> &[LayerLayout] {
        &self.layers
    }

    /// The tied embedding, `[vocab_size, model_dim]`.
    pub(crate) fn embedding(&self) -> Range<usize> {
        self.tensors[0].range.clone()
    }

    pub(crate) fn final_norm(&self) -> Range<usize> {
        self.tensors[self.tensors.len() - 1].range.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ulmus_plan::Preset;

    #[test]
    fn ranges_are_gapless_and_count_every_parameter() {
        for preset in Preset::ALL {
            let config = preset.config();
            let layout = Layout::new(&config);
            assert_eq!(layout.parameters() as u64, config.parameters());
            let mut next = 0;
            for tensor in layout.tensors() {
                assert_eq!(tensor.range.start, next, "{}", tensor.name);
                assert_eq!(tensor.range.len(), tensor.shape.iter().product::<usize>());
                assert_eq!(tensor.decays(), tensor.initial_std.is_some(), "{}", tensor.name);
                next = tensor.range.end;
            }
            assert_eq!(next, layout.parameters());
        }
    }

    #[test]
    fn q_norm_and_k_norm_are_neighbours() {
        let layout = Layout::new(&Preset::Openelm270m.config());
        for (i, layer) in layout.layers().iter().enumerate() {
            let q = &layout.tensor(&format!("transformer.layers.{i}.attn.q_norm.weight")).unwrap().range;
            let k = &layout.tensor(&format!("transformer.layers.{i}.attn.k_norm.weight")).unwrap().range;
            assert_eq!(q.end, k.start);
            assert_eq!(layer.qk_norm, q.start..k.end);
        }
    }
}
