//! The forward and backward passes of OpenELM over buffers planned once.
//!
//! There is no tape: each layer's activations have their place, and the backward pass walks the layers from last to
//! first. Results that cost no matrix product (norms, rotations, SwiGLU) are computed again instead of kept; so are
//! whole layers, if the batch's shape says so. Nothing is allocated after [`Network::new`]. Each pass overwrites every
//! range of the gradient exactly once, so the gradient is never cleared; only the tied embedding is written by the head
//! and then added to by the input side. A pass is cut into *segments*. After each segment another part of the gradient
//! is complete and can be summed while the next one is computed; where the device records passes, each segment is one
//! recording.
//!
//! `x` is the residual stream: `x = embedding`, and in each layer `x += attention(norm(x))`, then `x += ffn(norm(x))`.

use std::ops::Range;

use ulmus_backend::{AttentionShape, LinearShape, TrainingBackend, View, ViewMut};
use ulmus_plan::ModelConfig;

use crate::batch::{BatchShape, MicroBatch};
use crate::buffers::{Norms, Planner, RopeTables, heads, read, write};
use crate::error::ModelError;
use crate::objective::{LossSum, Objective};
use crate::params::{LayerLayout, Layout, Trainable};

/// Results of one layer's forward pass that its backward pass needs and cannot cheaply compute again.
#[derive(Debug)]
struct Activations<B: TrainingBackend> {
    /// Queries, keys and values, `[R, packed]`; their gradient in the backward pass.
    packed: B::Activations,
    /// The attention's output, `[R, query width]`.
    attended: B::Activations,
    /// Logsumexp of the scores, `[sequences, query heads, length]`.
    lse: B::Buffer<f32>,
    /// The residual stream between attention and FFN, `[R, D]`.
    middle: B::Activations,
    /// Both halves of `proj_1`'s output, `[R, 2F]`; their gradient in the backward pass.
    gate_up: B::Activations,
}

impl<B: TrainingBackend> Activations<B> {
    fn new(plan: &mut Planner<'_, B>, rows: usize, d: usize, widths: Widths) -> Result<Self, ModelError> {
        Ok(Self {
            packed: plan.activations(rows * widths.packed)?,
            attended: plan.activations(rows * widths.query)?,
            lse: plan.buffer(rows * widths.query_heads)?,
            middle: plan.activations(rows * d)?,
            gate_up: plan.activations(rows * 2 * widths.ffn)?,
        })
    }
}

/// The widths of one layer, or the largest of all layers.
#[derive(Debug, Clone, Copy, Default)]
struct Widths {
    packed: usize,
    query: usize,
    query_heads: usize,
    ffn: usize,
}

impl Widths {
    fn of(layer: &LayerLayout, head_dim: usize) -> Self {
        let heads = heads(layer, head_dim);
        Self {
            packed: heads.packed_width(),
            query: heads.query_width(),
            query_heads: heads.query,
            ffn: layer.dims.ffn_dim,
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            packed: self.packed.max(other.packed),
            query: self.query.max(other.query),
            query_heads: self.query_heads.max(other.query_heads),
            ffn: self.ffn.max(other.ffn),
        }
    }
}

/// Buffers that every layer uses in turn. They hold what can be computed from kept activations without a matrix
/// product; the backward pass computes it again and then puts its gradient in the same place.
#[derive(Debug)]
struct Scratch<B: TrainingBackend> {
    /// The normed stream: the input of attention, FFN or head, `[R, D]`.
    normed: B::Activations,
    /// Queries and keys after norm and rotation, and the values, `[R, packed]`.
    rotated: B::Activations,
    /// The gradient of `rotated`.
    rotated_gradient: B::Activations,
    /// SwiGLU's output, `[R, F]`.
    gated: B::Activations,
    /// A branch's output before it joins the stream, or the gradient of the attention's output.
    branch: B::Activations,
    /// The gradient of the residual stream.
    stream: B::Activations,
    norms: Norms<B>,
    /// The logits of some of the rows.
    logits: B::Buffer<f32>,
    logits_len: usize,
}

/// The fewest trainable parameters of any segment but the last: their sums take 32 MiB, enough to keep a network busy.
const SEGMENT: usize = 1 << 22;

/// A part of a pass: the backward pass of some layers. The first segment begins with the forward pass and the head, the
/// last one ends with the embedding.
#[derive(Debug)]
struct Segment<B: TrainingBackend> {
    layers: Range<usize>,
    /// The elements of the gradient that this segment completes.
    gradient: Range<usize>,
    graph: B::Graph,
}

/// All segments, from the last layer to the first.
fn segments<B: TrainingBackend>(layout: &Layout, trainable: &Trainable) -> Vec<Segment<B>> {
    let (mut behind, mut end) = (layout.layers().len(), trainable.parameters());
    let mut segments = Vec::new();
    for (layer, at) in layout.layers().iter().enumerate().rev() {
        let start = if layer == 0 { 0 } else { trainable.before(at.qkv.start) };
        if layer == 0 || end - start >= SEGMENT {
            let (layers, gradient) = (layer..behind, start..end);
            segments.push(Segment { layers, gradient, graph: B::Graph::default() });
            (behind, end) = (layer, start);
        }
    }
    segments
}

/// A model's forward and backward passes for micro-batches of one shape.
#[derive(Debug)]
pub(crate) struct Network<B: TrainingBackend> {
    backend: B,
    layout: Layout,
    trainable: Trainable,
    objective: Objective,
    sequences: usize,
    length: usize,
    model_dim: usize,
    head_dim: usize,
    vocabulary: usize,
    rope: RopeTables<B>,
    /// The position at which each sequence begins: always 0.
    first: B::Buffer<u32>,
    inputs: B::Buffer<u32>,
    targets: B::Buffer<u32>,
    doc_starts: B::Buffer<u32>,
    /// The residual stream before each layer and after the last, `[R, D]` each.
    x: Vec<B::Activations>,
    /// One per layer; or a single one for all, if layers are computed again in the backward pass.
    activations: Vec<Activations<B>>,
    cross_entropy: B::Buffer<f32>,
    lse: B::Buffer<f32>,
    /// Cross-entropy and logsumexp on the host.
    losses: [Vec<f32>; 2],
    segments: Vec<Segment<B>>,
    scratch: Scratch<B>,
    planned_bytes: u64,
}

impl<B: TrainingBackend> Network<B> {
    pub(crate) fn new(
        backend: B,
        config: &ModelConfig,
        layout: &Layout,
        trainable: &Trainable,
        objective: Objective,
        shape: BatchShape,
    ) -> Result<Self, ModelError> {
        let BatchShape { sequences, length, recompute } = shape;
        let (rows, d) = (sequences * length, config.model_dim);
        let plan = &mut Planner::new(&backend);
        let widths: Vec<Widths> =
            layout.layers().iter().map(|layer| Widths::of(layer, config.head_dim)).collect();
        let widest = widths.iter().copied().fold(Widths::default(), Widths::max);
        let kept = if recompute { vec![widest] } else { widths };
        let logits_len = rows.min(B::HEAD_ROWS) * config.vocab_size;
        let scratch = Scratch {
            normed: plan.activations(rows * d)?,
            rotated: plan.activations(rows * widest.packed)?,
            rotated_gradient: plan.activations(rows * widest.packed)?,
            gated: plan.activations(rows * widest.ffn)?,
            branch: plan.activations(rows * d.max(widest.query))?,
            stream: plan.activations(rows * d)?,
            norms: Norms::new(plan, config, rows)?,
            logits: plan.buffer(logits_len)?,
            logits_len,
        };
        Ok(Self {
            layout: layout.clone(),
            trainable: trainable.clone(),
            objective,
            sequences,
            length,
            model_dim: d,
            head_dim: config.head_dim,
            vocabulary: config.vocab_size,
            rope: RopeTables::new(plan, config, length)?,
            first: plan.buffer(sequences)?,
            inputs: plan.buffer(rows)?,
            targets: plan.buffer(rows)?,
            doc_starts: plan.buffer(rows)?,
            x: (0..=layout.layers().len()).map(|_| plan.activations(rows * d)).collect::<Result<_, _>>()?,
            activations: kept
                .into_iter()
                .map(|widths| Activations::new(plan, rows, d, widths))
                .collect::<Result<_, _>>()?,
            cross_entropy: plan.buffer(rows)?,
            lse: plan.buffer(rows)?,
            losses: [vec![0.0; rows], vec![0.0; rows]],
            segments: segments(layout, trainable),
            scratch,
            planned_bytes: plan.bytes,
            backend,
        })
    }

    /// Bytes of all buffers: activations, scratch and inputs.
    pub(crate) fn planned_bytes(&self) -> u64 {
        self.planned_bytes
    }

    fn rows(&self) -> usize {
        self.sequences * self.length
    }

    /// Puts a batch on the device.
    pub(crate) fn load(&mut self, batch: &MicroBatch) -> Result<(), ModelError> {
        batch.check(self.sequences, self.length, self.vocabulary)?;
        let rows = self.rows();
        self.backend.upload(write(&mut self.inputs, rows), &batch.inputs);
        self.backend.upload(write(&mut self.targets, rows), &batch.targets);
        self.backend.upload(write(&mut self.doc_starts, rows), &batch.doc_starts);
        Ok(())
    }

    /// The forward pass of the loaded batch, up to the final norm.
    pub(crate) fn forward(&mut self, weights: &B::Parameters) {
        let (rows, d) = (self.rows(), self.model_dim);
        let table = View::new(weights, self.layout.embedding());
        self.backend.embed(write(&mut self.x[0], rows * d), table, read(&self.inputs, rows), d);
        self.norm_input(weights, 0);
        for layer in 0..self.layout.layers().len() {
            self.layer(weights, layer);
            let Self { backend, layout, x, activations, scratch, .. } = self;
            let at = &layout.layers()[layer];
            let ffn = at.dims.ffn_dim;
            let kept = kept(activations, layer);
            backend.swiglu(write(&mut scratch.gated, rows * ffn), read(&kept.gate_up, rows * 2 * ffn), ffn);
            backend.linear(
                write(&mut scratch.branch, rows * d),
                read(&scratch.gated, rows * ffn),
                View::new(weights, at.proj_2.clone()),
                LinearShape { rows, inputs: ffn, outputs: d },
            );
            let next_norm =
                layout.layers().get(layer + 1).map_or(layout.final_norm(), |at| at.attn_norm.clone());
            backend.add_norm(
                write(&mut x[layer + 1], rows * d),
                write(&mut scratch.normed, rows * d),
                read(&kept.middle, rows * d),
                read(&scratch.branch, rows * d),
                scratch.norms.of(backend.values(View::new(weights, next_norm))),
            );
        }
    }

    /// Computes a layer's normed input from the stream before it.
    fn norm_input(&mut self, weights: &B::Parameters, layer: usize) {
        let len = self.rows() * self.model_dim;
        let attn_norm = self.layout.layers()[layer].attn_norm.clone();
        self.backend.norm(
            write(&mut self.scratch.normed, len),
            read(&self.x[layer], len),
            self.scratch.norms.of(self.backend.values(View::new(weights, attn_norm))),
        );
    }

    /// Computes everything that a layer's backward pass needs: from its normed input to both halves of `proj_1`.
    fn layer(&mut self, weights: &B::Parameters, layer: usize) {
        let (rows, d) = (self.rows(), self.model_dim);
        let Self { backend, layout, scratch, rope, x, activations, .. } = self;
        let weight = |range: &Range<usize>| View::new(weights, range.clone());
        let at = &layout.layers()[layer];
        let heads = heads(at, self.head_dim);
        let (packed, query, ffn) = (rows * heads.packed_width(), rows * heads.query_width(), at.dims.ffn_dim);
        let kept = kept(activations, layer);
        backend.linear(
            write(&mut kept.packed, packed),
            read(&scratch.normed, rows * d),
            weight(&at.qkv),
            LinearShape { rows, inputs: d, outputs: heads.packed_width() },
        );
        backend.qk_norm_rope(
            write(&mut scratch.rotated, packed),
            read(&kept.packed, packed),
            scratch.norms.of(backend.values(weight(&at.qk_norm))),
            rope.at(read(&self.first, self.sequences), self.length),
            heads,
        );
        backend.attention(
            write(&mut kept.attended, query),
            write(&mut kept.lse, rows * heads.query),
            read(&scratch.rotated, packed),
            read(&self.doc_starts, rows),
            AttentionShape { sequences: self.sequences, length: self.length, heads },
        );
        backend.linear(
            write(&mut scratch.branch, rows * d),
            read(&kept.attended, query),
            weight(&at.out_proj),
            LinearShape { rows, inputs: heads.query_width(), outputs: d },
        );
        backend.add_norm(
            write(&mut kept.middle, rows * d),
            write(&mut scratch.normed, rows * d),
            read(&x[layer], rows * d),
            read(&scratch.branch, rows * d),
            scratch.norms.of(backend.values(weight(&at.ffn_norm))),
        );
        backend.linear(
            write(&mut kept.gate_up, rows * 2 * ffn),
            read(&scratch.normed, rows * d),
            weight(&at.proj_1),
            LinearShape { rows, inputs: d, outputs: 2 * ffn },
        );
    }

    /// The head and the loss of the loaded batch, after [`Network::forward`].
    pub(crate) fn loss(&mut self, weights: &B::Parameters) {
        self.head(weights, None);
    }

    fn head(&mut self, weights: &B::Parameters, gradient: Option<&mut B::Buffer<f32>>) {
        let (rows, d) = (self.rows(), self.model_dim);
        let table = self.layout.embedding();
        let Scratch { normed, branch, logits, logits_len, .. } = &mut self.scratch;
        let gradients = gradient.map(|gradient| {
            let table = ViewMut::new(gradient, self.trainable.place_or_spare(&table));
            self.objective.head_gradients(write(branch, rows * d), table)
        });
        self.backend.head_loss(
            write(&mut self.cross_entropy, rows),
            write(&mut self.lse, rows),
            gradients,
            read(normed, rows * d),
            View::new(weights, table),
            read(&self.targets, rows),
            write(logits, *logits_len),
            LinearShape { rows, inputs: d, outputs: self.vocabulary },
        );
    }

    /// The loss and the gradient of the loaded batch. Overwrites all of `gradient`, and the activations. Calls
    /// `complete` with the gradient and each range of it as soon as that is complete. All calls pass the same two
    /// buffers.
    pub(crate) fn forward_backward(
        &mut self,
        weights: &B::Parameters,
        gradient: &mut B::Buffer<f32>,
        mut complete: impl FnMut(&B::Buffer<f32>, Range<usize>),
    ) {
        let backend = self.backend.clone();
        let mut segments = std::mem::take(&mut self.segments);
        for Segment { layers, gradient: range, graph } in &mut segments {
            backend.replay(graph, || {
                if layers.end == self.layout.layers().len() {
                    self.forward(weights);
                    self.head_backward(weights, gradient);
                }
                self.layers_backward(weights, gradient, layers.clone());
                if layers.start == 0 {
                    self.embed_backward(gradient);
                }
            });
            complete(gradient, range.clone());
        }
        self.segments = segments;
    }

    /// From the final norm's output to the loss, and back to the stream's gradient.
    fn head_backward(&mut self, weights: &B::Parameters, gradient: &mut B::Buffer<f32>) {
        self.head(weights, Some(gradient));
        let (len, layers) = (self.rows() * self.model_dim, self.layout.layers().len());
        let Scratch { stream, branch, norms, .. } = &mut self.scratch;
        self.backend.norm_backward(
            write(stream, len),
            ViewMut::new(gradient, self.trainable.place_or_spare(&self.layout.final_norm())),
            read(branch, len),
            read(&self.x[layers], len),
            norms.of(self.backend.values(View::new(weights, self.layout.final_norm()))),
            false,
        );
    }

    fn layers_backward(
        &mut self,
        weights: &B::Parameters,
        gradient: &mut B::Buffer<f32>,
        layers: Range<usize>,
    ) {
        for layer in layers.rev() {
            // The forward pass has just left the last layer's activations.
            if self.activations.len() == 1 && layer + 1 < self.layout.layers().len() {
                self.norm_input(weights, layer);
                self.layer(weights, layer);
            }
            self.ffn_backward(weights, gradient, layer);
            self.attention_backward(weights, gradient, layer);
        }
    }

    fn embed_backward(&mut self, gradient: &mut B::Buffer<f32>) {
        let Some(table) = self.trainable.place(&self.layout.embedding()) else { return };
        let (rows, d) = (self.rows(), self.model_dim);
        self.backend.embed_backward(
            ViewMut::new(gradient, table),
            read(&self.scratch.stream, rows * d),
            read(&self.inputs, rows),
            d,
        );
    }

    /// Takes the stream's gradient from the output of a layer's FFN to its input.
    fn ffn_backward(&mut self, weights: &B::Parameters, gradient: &mut B::Buffer<f32>, layer: usize) {
        let (rows, d) = (self.rows(), self.model_dim);
        let Self { backend, layout, trainable, activations, scratch, .. } = self;
        let at = &layout.layers()[layer];
        let ffn = at.dims.ffn_dim;
        let kept = kept(activations, layer);
        let weight = |range: &Range<usize>| View::new(weights, range.clone());

        let shape = LinearShape { rows, inputs: ffn, outputs: d };
        backend.linear_backward_input(
            write(&mut scratch.gated, rows * ffn),
            read(&scratch.stream, rows * d),
            weight(&at.proj_2),
            shape,
        );
        backend.swiglu_backward(
            write(&mut kept.gate_up, rows * 2 * ffn),
            write(&mut scratch.gated, rows * ffn),
            ffn,
        );
        if let Some(place) = trainable.place(&at.proj_2) {
            backend.linear_backward_weight(
                ViewMut::new(gradient, place),
                read(&scratch.stream, rows * d),
                read(&scratch.gated, rows * ffn),
                shape,
            );
        }

        let shape = LinearShape { rows, inputs: d, outputs: 2 * ffn };
        let middle = || read(&kept.middle, rows * d);
        let norm = scratch.norms.of(backend.values(weight(&at.ffn_norm)));
        backend.norm(write(&mut scratch.normed, rows * d), middle(), norm);
        if let Some(place) = trainable.place(&at.proj_1) {
            backend.linear_backward_weight(
                ViewMut::new(gradient, place),
                read(&kept.gate_up, rows * 2 * ffn),
                read(&scratch.normed, rows * d),
                shape,
            );
        }
        backend.linear_backward_input(
            write(&mut scratch.normed, rows * d),
            read(&kept.gate_up, rows * 2 * ffn),
            weight(&at.proj_1),
            shape,
        );
        backend.norm_backward(
            write(&mut scratch.stream, rows * d),
            ViewMut::new(gradient, trainable.place_or_spare(&at.ffn_norm)),
            read(&scratch.normed, rows * d),
            middle(),
            scratch.norms.of(backend.values(weight(&at.ffn_norm))),
            true,
        );
    }

    /// Takes the stream's gradient from the output of a layer's attention to its input.
    fn attention_backward(&mut self, weights: &B::Parameters, gradient: &mut B::Buffer<f32>, layer: usize) {
        let (rows, d) = (self.rows(), self.model_dim);
        let Self { backend, layout, trainable, x, activations, scratch, rope, .. } = self;
        let at = &layout.layers()[layer];
        let heads = heads(at, self.head_dim);
        let (packed, query) = (rows * heads.packed_width(), rows * heads.query_width());
        let kept = kept(activations, layer);
        let weight = |range: &Range<usize>| View::new(weights, range.clone());

        let shape = LinearShape { rows, inputs: heads.query_width(), outputs: d };
        if let Some(place) = trainable.place(&at.out_proj) {
            backend.linear_backward_weight(
                ViewMut::new(gradient, place),
                read(&scratch.stream, rows * d),
                read(&kept.attended, query),
                shape,
            );
        }
        backend.linear_backward_input(
            write(&mut scratch.branch, query),
            read(&scratch.stream, rows * d),
            weight(&at.out_proj),
            shape,
        );
        backend.qk_norm_rope(
            write(&mut scratch.rotated, packed),
            read(&kept.packed, packed),
            scratch.norms.of(backend.values(weight(&at.qk_norm))),
            rope.at(read(&self.first, self.sequences), self.length),
            heads,
        );
        backend.attention_backward(
            write(&mut scratch.rotated_gradient, packed),
            read(&scratch.branch, query),
            read(&kept.attended, query),
            read(&kept.lse, rows * heads.query),
            read(&scratch.rotated, packed),
            read(&self.doc_starts, rows),
            AttentionShape { sequences: self.sequences, length: self.length, heads },
        );
        backend.qk_norm_rope_backward(
            write(&mut kept.packed, packed),
            ViewMut::new(gradient, trainable.place_or_spare(&at.qk_norm)),
            read(&scratch.rotated_gradient, packed),
            scratch.norms.of(backend.values(weight(&at.qk_norm))),
            rope.at(read(&self.first, self.sequences), self.length),
            heads,
        );

        let shape = LinearShape { rows, inputs: d, outputs: heads.packed_width() };
        let x = || read(&x[layer], rows * d);
        let norm = scratch.norms.of(backend.values(weight(&at.attn_norm)));
        backend.norm(write(&mut scratch.normed, rows * d), x(), norm);
        if let Some(place) = trainable.place(&at.qkv) {
            backend.linear_backward_weight(
                ViewMut::new(gradient, place),
                read(&kept.packed, packed),
                read(&scratch.normed, rows * d),
                shape,
            );
        }
        backend.linear_backward_input(
            write(&mut scratch.normed, rows * d),
            read(&kept.packed, packed),
            weight(&at.qkv),
            shape,
        );
        backend.norm_backward(
            write(&mut scratch.stream, rows * d),
            ViewMut::new(gradient, trainable.place_or_spare(&at.attn_norm)),
            read(&scratch.normed, rows * d),
            x(),
            scratch.norms.of(backend.values(weight(&at.attn_norm))),
            true,
        );
    }

    /// What is minimised.
    pub(crate) fn objective(&self) -> &Objective {
        &self.objective
    }

    /// The losses of `batch`, the one loaded, after [`Network::loss`] or [`Network::forward_backward`].
    pub(crate) fn loss_sum(&mut self, batch: &MicroBatch) -> LossSum {
        let rows = self.rows();
        let [cross_entropy, lse] = &mut self.losses;
        self.backend.download(read(&self.cross_entropy, rows), cross_entropy);
        self.backend.download(read(&self.lse, rows), lse);
        Objective::sum(&batch.targets, cross_entropy, lse)
    }
}

/// The place of a layer's activations.
fn kept<B: TrainingBackend>(activations: &mut [Activations<B>], layer: usize) -> &mut Activations<B> {
    let index = layer % activations.len();
    &mut activations[index]
}

#[cfg(test)]
mod tests {
    use super::*;
    use ulmus_cpu::Cpu;

    #[test]
    fn segments_complete_every_gradient_once() {
        for preset in ulmus_plan::Preset::ALL {
            let layout = Layout::new(&preset.config());
            let segments = segments::<Cpu>(&layout, &Trainable::all(&layout));
            let (mut layer, mut end) = (layout.layers().len(), layout.parameters());
            for Segment { layers, gradient, .. } in &segments {
                assert_eq!((layers.end, gradient.end), (layer, end), "{preset:?}");
                (layer, end) = (layers.start, gradient.start);
            }
            assert_eq!((layer, end), (0, 0), "{preset:?}");
            let (last, others) = segments.split_last().unwrap();
            assert!(others.iter().all(|segment| segment.gradient.len() >= SEGMENT), "{preset:?}");
            assert!(last.gradient.end > layout.embedding().end && others.len() >= 10, "{preset:?}");
        }
        // A small model is one segment.
        let config = ModelConfig { model_dim: 64, vocab_size: 100, ..ModelConfig::default() };
        let layout = Layout::new(&config);
        assert_eq!(segments::<Cpu>(&layout, &Trainable::all(&layout)).len(), 1);
    }
}
