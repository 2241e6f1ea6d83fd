//! Where a [`Network`](crate::network::Network) keeps what it computes: what the backward pass needs of each layer, and what all
//! layers use in turn.

use ulmus_backend::TrainingBackend;
use ulmus_plan::ModelConfig;

use crate::buffers::{Norms, Planner, heads};
use crate::error::ModelError;
use crate::linear::{Adapters, KeptAdapter};
use crate::params::{LINEARS, LayerPlaces};

/// Results of one layer's forward pass that its backward pass needs and cannot cheaply compute again.
#[derive(Debug)]
pub(crate) struct Activations<B: TrainingBackend> {
    /// Queries, keys and values, `[R, packed]`; their gradient in the backward pass.
    pub packed: B::Activations,
    /// The attention's output, `[P, query width]`.
    pub attended: B::Activations,
    /// Logsumexp of the scores, `[sequences, query heads, length]`.
    pub lse: B::Buffer<f32>,
    /// The residual stream between attention and FFN, `[R, D]`.
    pub middle: B::Activations,
    /// Both halves of `proj_1`'s output, `[R, 2F]`; their gradient in the backward pass.
    pub gate_up: B::Activations,
    /// What the adapters of the four matrices keep.
    pub adapters: [Option<KeptAdapter<B>>; LINEARS],
}

impl<B: TrainingBackend> Activations<B> {
    /// Plans the activations of these layers, if they are needed in turn.
    pub(crate) fn new(
        plan: &mut Planner<'_, B>,
        rows: usize,
        config: &ModelConfig,
        layers: &[LayerPlaces],
    ) -> Result<Self, ModelError> {
        let (d, widths) = (config.model_dim, Widths::widest(layers, config.head_dim));
        Ok(Self {
            packed: plan.activations(rows * widths.packed)?,
            attended: plan.activations(rows * widths.query)?,
            lse: plan.buffer(rows * widths.query_heads)?,
            middle: plan.activations(rows * d)?,
            gate_up: plan.activations(rows * 2 * widths.ffn)?,
            adapters: KeptAdapter::of_layers(plan, rows, layers)?,
        })
    }
}

/// The largest widths of some layers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Widths {
    pub packed: usize,
    pub query: usize,
    pub query_heads: usize,
    pub ffn: usize,
}

impl Widths {
    pub(crate) fn widest(layers: &[LayerPlaces], head_dim: usize) -> Self {
        let mut widest = Self::default();
        for layer in layers {
            let heads = heads(layer, head_dim);
            widest.packed = widest.packed.max(heads.packed_width());
            widest.query = widest.query.max(heads.query_width());
            widest.query_heads = widest.query_heads.max(heads.query);
            widest.ffn = widest.ffn.max(layer.dims.ffn_dim);
        }
        widest
    }
}

/// Buffers that every layer uses in turn. They hold what can be computed from kept activations without a matrix
/// product; the backward pass computes it again and then puts its gradient in the same place.
#[derive(Debug)]
pub(crate) struct Scratch<B: TrainingBackend> {
    /// The normed stream: the input of attention, FFN or head, `[R, D]`.
    pub normed: B::Activations,
    /// Queries and keys after norm and rotation, and the values, `[P, packed]`.
    pub rotated: B::Activations,
    /// The gradient of `rotated`.
    pub rotated_gradient: B::Activations,
    /// SwiGLU's output, `[R, F]`.
    pub gated: B::Activations,
    /// A branch's output before it joins the stream, or the gradient of the attention's output.
    pub branch: B::Activations,
    /// The gradient of the residual stream.
    pub stream: B::Activations,
    pub norms: Norms<B>,
    pub adapters: Adapters<B>,
    /// The logits of some of the rows.
    pub logits: B::Buffer<f32>,
    pub logits_len: usize,
}

/// The place of a layer's activations.
pub(crate) fn kept<B: TrainingBackend>(
    activations: &mut [Activations<B>],
    layer: usize,
) -> &mut Activations<B> {
    let index = layer % activations.len();
    &mut activations[index]
}
