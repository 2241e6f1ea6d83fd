//! All parameters of a model as one flat vector of f32 in a fixed order, and which of them training changes.
//!
//! The order is embedding, layers first to last, final norm; within a layer it is that of the reference's checkpoints.
//! Weights are in this order, in memory and for reductions, so it must never change. Gradient, moments, sums and
//! optimizer files have one element for each *trainable* parameter, in the same order. Kernels rely on one adjacency:
//! they take `q_norm` and `k_norm` of a layer as one range.

use std::ops::Range;

use ulmus_plan::{LayerDims, ModelConfig};

use crate::error::ModelError;

/// One named tensor of the flat vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// The Hugging Face name, for instance `transformer.layers.0.attn.qkv_proj.weight`.
    pub name: String,
    /// One or two dimensions, row-major; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// Where its elements are in the flat vector.
    pub range: Range<usize>,
    /// The standard deviation of the initial weights; `None` for norm weights, which start at 1.
    pub initial_std: Option<f64>,
}

impl Tensor {
    /// Whether weight decay applies. It does to every tensor with two dimensions, the embedding included.
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }
}

/// The places of one layer's parameters.
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
    /// The layout of a model of this shape.
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

    /// All tensors in order; their ranges lie end to end.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor with this Hugging Face name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.len
    }

    /// Refuses a flat vector that does not have one element per parameter.
    pub(crate) fn check_len(&self, values: &[f32]) -> Result<(), ModelError> {
        check_len(values, self.len)
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

/// Refuses a flat vector that does not have one element for each of `parameters` parameters.
pub(crate) fn check_len(values: &[f32], parameters: usize) -> Result<(), ModelError> {
    if values.len() == parameters {
        Ok(())
    } else {
        Err(ModelError::Tensors(format!("{} values for {parameters} parameters", values.len())))
    }
}

/// Adjacent trainable parameters that are updated in one go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TrainableRange {
    /// The places of their weights in the vector of all parameters.
    pub parameters: Range<usize>,
    /// The places of their gradient and moments in vectors of the trainable parameters.
    pub elements: Range<usize>,
    /// Whether weight decay applies.
    pub decays: bool,
}

/// The parameters that training changes. They alone have a gradient and moments; all others are frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trainable {
    ranges: Vec<TrainableRange>,
    len: usize,
    spare: usize,
}

impl Trainable {
    /// Trains all parameters.
    pub fn all(layout: &Layout) -> Self {
        Self::of(layout, |_| true)
    }

    /// Trains the tensors that `trains` chooses: of a layer's `q_norm` and `k_norm` both or neither.
    pub(crate) fn of(layout: &Layout, trains: impl Fn(&Tensor) -> bool) -> Self {
        let mut trainable = Self { ranges: Vec::new(), len: 0, spare: 0 };
        for tensor in layout.tensors().iter().filter(|tensor| trains(tensor)) {
            let elements = trainable.len..trainable.len + tensor.range.len();
            trainable.len = elements.end;
            match trainable.ranges.last_mut() {
                Some(last) if last.parameters.end == tensor.range.start && last.decays == tensor.decays() => {
                    (last.parameters.end, last.elements.end) = (tensor.range.end, elements.end);
                }
                _ => trainable.ranges.push(TrainableRange {
                    parameters: tensor.range.clone(),
                    elements,
                    decays: tensor.decays(),
                }),
            }
        }
        let layers = layout.layers().iter().flat_map(|at| [&at.qk_norm, &at.ffn_norm, &at.attn_norm]);
        let fused = layers.cloned().chain([layout.embedding(), layout.final_norm()]);
        let frozen = fused.filter(|parameters| trainable.place(parameters).is_none());
        trainable.spare = frozen.map(|parameters| parameters.len()).max().unwrap_or(0);
        trainable
    }

    /// Number of trainable parameters.
    pub fn parameters(&self) -> usize {
        self.len
    }

    /// Elements of a gradient's buffer. A kernel that computes several gradients at once also computes that of a frozen
    /// embedding or norm; behind the gradient there is spare room for it.
    pub(crate) fn gradient_len(&self) -> usize {
        self.len + self.spare
    }

    /// The ranges that are updated in one go each, in order.
    pub(crate) fn ranges(&self) -> &[TrainableRange] {
        &self.ranges
    }

    /// The number of trainable parameters before parameter `parameter`.
    pub(crate) fn before(&self, parameter: usize) -> usize {
        let index = self.ranges.partition_point(|range| range.parameters.end <= parameter);
        self.ranges
            .get(index)
            .map_or(self.len, |range| range.elements.start + parameter.saturating_sub(range.parameters.start))
    }

    /// The place of these parameters' gradient, or `None` if they are frozen. Either all of them are trainable or none
    /// is.
    pub(crate) fn place(&self, parameters: &Range<usize>) -> Option<Range<usize>> {
        let place = self.before(parameters.start)..self.before(parameters.end);
        assert!(
            place.is_empty() || place.len() == parameters.len(),
            "parameters {parameters:?} train together or not at all"
        );
        (!place.is_empty()).then_some(place)
    }

    /// Where a kernel that computes several gradients at once puts that of these parameters: in its place, or in the
    /// spare room if they are frozen.
    pub(crate) fn place_or_spare(&self, parameters: &Range<usize>) -> Range<usize> {
        self.place(parameters).unwrap_or(self.len..self.len + parameters.len())
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
    fn everything_has_its_own_place_if_all_parameters_train() {
        for preset in Preset::ALL {
            let layout = Layout::new(&preset.config());
            let trainable = Trainable::all(&layout);
            assert_eq!((trainable.parameters(), trainable.gradient_len()), (layout.len, layout.len));
            for tensor in layout.tensors() {
                assert_eq!(trainable.place(&tensor.range), Some(tensor.range.clone()), "{}", tensor.name);
            }
            // Matrices and norms in turn, twice per layer; the embedding is updated with the first matrix.
            let ranges = trainable.ranges();
            assert_eq!(ranges[0].parameters, 0..layout.layers()[0].qkv.end);
            assert_eq!(ranges.len(), 4 * layout.layers().len());
            assert!(ranges.iter().all(|range| range.parameters == range.elements));
        }
    }

    #[test]
    fn trainable_parameters_lie_end_to_end_in_their_order() {
        let layout = Layout::new(&Preset::Openelm270m.config());
        let chosen = |tensor: &Tensor| !tensor.decays() || tensor.name.contains("layers.3.");
        let trainable = Trainable::of(&layout, chosen);
        let mut next = 0;
        for tensor in layout.tensors() {
            assert_eq!(trainable.before(tensor.range.start), next);
            let place = next..next + tensor.range.len();
            if chosen(tensor) {
                assert_eq!(trainable.place(&tensor.range), Some(place.clone()), "{}", tensor.name);
                next = place.end;
            } else {
                assert_eq!(trainable.place(&tensor.range), None, "{}", tensor.name);
            }
        }
        assert_eq!((trainable.parameters(), trainable.before(layout.parameters())), (next, next));
        let embedding = layout.embedding();
        assert_eq!(trainable.place_or_spare(&embedding), next..next + embedding.len());
        assert_eq!(trainable.gradient_len(), next + embedding.len());
        let ranges = trainable.ranges();
        assert!(ranges.windows(2).all(|pair| pair[0].elements.end == pair[1].elements.start));
        assert!(ranges.iter().all(|range| range.parameters.len() == range.elements.len()));
    }

    #[test]
    #[should_panic(expected = "train together")]
    fn half_of_what_a_kernel_takes_as_one_cannot_be_frozen() {
        let layout = Layout::new(&Preset::Openelm270m.config());
        Trainable::of(&layout, |tensor| tensor.name.ends_with("k_norm.weight"));
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
