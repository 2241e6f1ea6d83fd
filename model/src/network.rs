//! The forward and backward passes of OpenELM over buffers planned once.
//!
//! There is no tape: each layer's activations have their place, and the backward pass walks the layers from last to
//! first. Results that cost no matrix product (norms, rotations, SwiGLU) are computed again instead of kept; so are
//! whole layers, if the batch's shape says so. Nothing is allocated after [`Network::new`]. Each pass overwrites every
//! range of the gradient exactly once, so the gradient is never cleared; only a tied embedding is written by the head
//! and then added to by the input side. What is frozen has no gradient, and the pass ends at the lowest of what is trained
//! (both are in `backward.rs`). A pass is cut into *segments*. After each segment another part of the gradient
//! is complete and can be summed while the next one is computed; where the device records passes, each segment is one
//! recording. Passes over batches of different shapes, or with different numbers of labels, are not recorded.
//! Where only some positions have labels, what no label depends on is not computed at all (`rows.rs`).
//!
//! `x` is the residual stream: `x = embedding`, and in each layer `x += attention(norm(x))`, then `x += ffn(norm(x))`. P
//! is the number of positions of a batch, and R that of its rows, of which there are at most as many.

use std::ops::Range;

use ulmus_backend::{AttentionShape, IGNORE, LinearShape, TrainingBackend, View};
use ulmus_plan::ModelConfig;

use crate::activations::{Activations, Scratch, Widths, kept};
use crate::batch::{BatchShape, MicroBatch};
use crate::buffers::{Norms, Planner, RopeTables, heads, read, write};
use crate::error::ModelError;
use crate::linear::{Adapters, Linear, Noise, Pass};
use crate::objective::{Objective, SequenceScore};
use crate::params::{Places, Trainable};
use crate::rows::Rows;

/// The fewest trainable parameters of any segment but the last: their sums take 32 MiB, enough to keep a network busy.
const SEGMENT: usize = 1 << 22;

/// A part of a pass: the backward pass of some layers. The first segment begins with the forward pass and the head, the
/// last one ends with the embedding.
#[derive(Debug)]
pub(crate) struct Segment<B: TrainingBackend> {
    pub layers: Range<usize>,
    /// The elements of the gradient that this segment completes.
    pub gradient: Range<usize>,
    pub graph: B::Graph,
}

/// All segments, from the last layer to the first.
fn segments<B: TrainingBackend>(places: &Places, trainable: &Trainable) -> Vec<Segment<B>> {
    let trained = trainable.range();
    let (mut behind, mut end) = (places.layers.len(), trained.len());
    let mut segments = Vec::new();
    for layer in (0..places.layers.len()).rev() {
        let start = if layer == 0 { 0 } else { places.first_trained(trained, layer) - trained.start };
        if layer == 0 || end - start >= SEGMENT {
            let (layers, gradient) = (layer..behind, start..end);
            segments.push(Segment { layers, gradient, graph: B::Graph::default() });
            (behind, end) = (layer, start);
        }
    }
    segments
}

/// What an adapter's noise needs.
#[derive(Debug)]
pub(crate) struct NoiseSource<B: TrainingBackend> {
    /// The number of each sequence in two words, `[sequences, 2]`.
    sequences: B::Buffer<u32>,
    words: Vec<u32>,
    seed: u64,
    rate: f32,
    /// Whether the present pass is noisy.
    is_on: bool,
}

/// A model's forward and backward passes for micro-batches up to one shape.
#[derive(Debug)]
pub(crate) struct Network<B: TrainingBackend> {
    pub(crate) backend: B,
    pub(crate) places: Places,
    pub(crate) trainable: Trainable,
    /// How deep the gradient goes; see [`Places::lowest_trained`].
    pub(crate) lowest: usize,
    pub(crate) objective: Objective,
    shape: BatchShape,
    /// Sequences of the loaded batch, and positions in each of them.
    pub(crate) sequences: usize,
    pub(crate) length: usize,
    pub(crate) model_dim: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocabulary: usize,
    pub(crate) rope: RopeTables<B>,
    /// The position at which each sequence begins: always 0.
    pub(crate) first: B::Buffer<u32>,
    pub(crate) rows: Rows<B>,
    /// The token of each row.
    pub(crate) inputs: B::Buffer<u32>,
    inputs_on_host: Vec<u32>,
    /// The targets of the rows that go through the head.
    pub(crate) targets: B::Buffer<u32>,
    pub(crate) doc_starts: B::Buffer<u32>,
    /// The rows that go through the head and their targets, if those are not all positions.
    pub(crate) labels: [Vec<u32>; 2],
    pub(crate) label_rows: B::Buffer<u32>,
    /// The weight of the loss of each row that goes through the head; only for preferences.
    pub(crate) row_weights: B::Buffer<f32>,
    pub(crate) weights_on_host: Vec<f32>,
    pub(crate) noise: Option<NoiseSource<B>>,
    /// `h` of the embedding's adapter, `[R, rank]`.
    pub(crate) embedded: Option<B::Activations>,
    /// The residual stream before each layer and after the last, `[R, D]` each.
    pub(crate) x: Vec<B::Activations>,
    /// One per layer; or a single one for all, if layers are computed again in the backward pass.
    pub(crate) activations: Vec<Activations<B>>,
    pub(crate) cross_entropy: B::Buffer<f32>,
    pub(crate) lse: B::Buffer<f32>,
    /// Cross-entropy and logsumexp on the host.
    pub(crate) losses: [Vec<f32>; 2],
    /// The scores of the sequences of the loaded batch.
    pub(crate) scores: Vec<SequenceScore>,
    segments: Vec<Segment<B>>,
    pub(crate) scratch: Scratch<B>,
    planned_bytes: u64,
}

/// How often the noise of adapters leaves out an element of their input, and the seed of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DropoutRate {
    pub rate: f64,
    pub seed: u64,
}

impl<B: TrainingBackend> Network<B> {
    pub(crate) fn new(
        backend: B,
        config: &ModelConfig,
        places: Places,
        trainable: &Trainable,
        objective: Objective,
        shape: BatchShape,
        dropout: DropoutRate,
    ) -> Result<Self, ModelError> {
        let BatchShape { sequences, length, recompute } = shape;
        let (rows, d) = (sequences * length, config.model_dim);
        let plan = &mut Planner::new(&backend);
        let layers = &places.layers;
        let widest = Widths::widest(layers, config.head_dim);
        let at_once = if recompute { layers.len().max(1) } else { 1 };
        let logits_len = rows.min(B::HEAD_ROWS) * config.vocab_size;
        // In preference training the reference is the model at its beginning, and noise would move it away from there.
        let drops = dropout.rate > 0.0 && !matches!(objective, Objective::Preferences(_));
        let adapters = Adapters::new(plan, rows, &places, drops)?;
        let scratch = Scratch {
            normed: plan.activations(rows * d)?,
            rotated: plan.activations(rows * widest.packed)?,
            rotated_gradient: plan.activations(rows * widest.packed)?,
            gated: plan.activations(rows * widest.ffn)?,
            branch: plan.activations(rows * d.max(widest.query))?,
            stream: plan.activations(rows * d)?,
            norms: Norms::new(plan, config, rows)?,
            adapters,
            logits: plan.buffer(logits_len)?,
            logits_len,
        };
        let noise = drops
            .then(|| {
                Ok::<_, ModelError>(NoiseSource {
                    sequences: plan.buffer(2 * sequences)?,
                    words: Vec::with_capacity(2 * sequences),
                    seed: dropout.seed,
                    rate: dropout.rate as f32,
                    is_on: false,
                })
            })
            .transpose()?;
        let sparse = if objective.is_sparse() { rows } else { 0 };
        let weighted = if matches!(objective, Objective::Preferences(_)) { rows } else { 0 };
        let embedded = places.embedding_adapter.as_ref().map(|adapter| plan.activations(rows * adapter.rank));
        Ok(Self {
            trainable: trainable.clone(),
            lowest: places.lowest_trained(trainable.range()),
            objective,
            shape,
            sequences,
            length,
            model_dim: d,
            head_dim: config.head_dim,
            vocabulary: config.vocab_size,
            rope: RopeTables::new(plan, config, length)?,
            first: plan.buffer(sequences)?,
            rows: Rows::new(plan, rows)?,
            inputs: plan.buffer(rows)?,
            inputs_on_host: Vec::with_capacity(rows),
            targets: plan.buffer(rows)?,
            doc_starts: plan.buffer(rows)?,
            labels: [Vec::with_capacity(sparse), Vec::with_capacity(sparse)],
            label_rows: plan.buffer(sparse)?,
            row_weights: plan.buffer(weighted)?,
            weights_on_host: Vec::with_capacity(weighted),
            noise,
            embedded: embedded.transpose()?,
            x: (0..=layers.len()).map(|_| plan.activations(rows * d)).collect::<Result<_, _>>()?,
            activations: layers
                .chunks(at_once)
                .map(|layers| Activations::new(plan, rows, config, layers))
                .collect::<Result<_, _>>()?,
            cross_entropy: plan.buffer(rows)?,
            lse: plan.buffer(rows)?,
            losses: [vec![0.0; rows], vec![0.0; rows]],
            scores: Vec::with_capacity(sequences),
            segments: segments(&places, trainable),
            scratch,
            places,
            planned_bytes: plan.bytes,
            backend,
        })
    }

    /// What is minimised.
    pub(crate) fn objective(&self) -> &Objective {
        &self.objective
    }

    /// Bytes of all buffers: activations, scratch and inputs.
    pub(crate) fn planned_bytes(&self) -> u64 {
        self.planned_bytes
    }

    /// Number of rows that go through the head.
    pub(crate) fn head_rows(&self) -> usize {
        if self.objective.is_sparse() { self.labels[0].len() } else { self.rows.count() }
    }

    /// Puts a batch on the device, to compute all that its losses depend on.
    pub(crate) fn load(&mut self, batch: &MicroBatch) -> Result<(), ModelError> {
        self.load_rows(batch, self.objective.is_sparse())
    }

    /// Puts a batch on the device, to compute all of its positions, or only what its losses depend on.
    pub(crate) fn load_rows(&mut self, batch: &MicroBatch, only_needed: bool) -> Result<(), ModelError> {
        batch.check(self.shape, self.vocabulary)?;
        (self.sequences, self.length) = (batch.sequences, batch.length);
        let in_pairs = matches!(self.objective, Objective::Preferences(_));
        self.rows.set(&self.backend, batch, only_needed, in_pairs);
        let mut targets = &batch.targets;
        if self.objective.is_sparse() {
            let [label_rows, label_targets] = &mut self.labels;
            label_rows.clear();
            label_targets.clear();
            for (position, target) in targets.iter().enumerate().filter(|(_, target)| **target != IGNORE) {
                label_rows.push(self.rows.of(position));
                label_targets.push(*target);
            }
            // A row without a target makes the gradient of the head zero; no row would leave it as it was.
            if label_rows.is_empty() {
                label_rows.push(0);
                label_targets.push(IGNORE);
            }
            targets = label_targets;
            self.backend.upload(write(&mut self.label_rows, label_rows.len()), label_rows);
        }
        self.backend.upload(write(&mut self.targets, targets.len()), targets);
        let Self { inputs_on_host: inputs, rows, .. } = self;
        inputs.clear();
        inputs.extend(rows.positions().iter().map(|position| batch.inputs[*position as usize]));
        self.backend.upload(write(&mut self.inputs, inputs.len()), inputs);
        self.backend.upload(write(&mut self.doc_starts, batch.doc_starts.len()), &batch.doc_starts);
        if let Some(NoiseSource { sequences, words, .. }) = &mut self.noise {
            words.clear();
            for number in (0..batch.sequences as u64).map(|index| batch.number.wrapping_add(index)) {
                words.extend([number as u32, (number >> 32) as u32]);
            }
            self.backend.upload(write(sequences, words.len()), words);
        }
        Ok(())
    }

    /// Switches the noise of adapters on or off.
    pub(crate) fn set_noise(&mut self, is_on: bool) {
        if let Some(noise) = &mut self.noise {
            noise.is_on = is_on;
        }
    }

    /// The forward pass of the loaded batch, up to the final norm.
    pub(crate) fn forward(&mut self, weights: &B::Parameters) {
        let (rows, d) = (self.rows.count(), self.model_dim);
        self.embed(weights);
        self.norm_input(weights, 0);
        for layer in 0..self.places.layers.len() {
            self.layer(weights, layer);
            self.ffn_output(weights, layer);
            let Self { backend, places, x, activations, scratch, .. } = self;
            let next_norm =
                places.layers.get(layer + 1).map_or(places.final_norm.clone(), |at| at.attn_norm.clone());
            backend.add_norm(
                write(&mut x[layer + 1], rows * d),
                write(&mut scratch.normed, rows * d),
                read(&kept(activations, layer).middle, rows * d),
                read(&scratch.branch, rows * d),
                scratch.norms.of(backend.values(View::new(weights, next_norm))),
            );
        }
    }

    fn embed(&mut self, weights: &B::Parameters) {
        let (rows, d) = (self.rows.count(), self.model_dim);
        let Self { backend, places, x, inputs, embedded, .. } = self;
        let weight = |range: &Range<usize>| View::new(weights, range.clone());
        backend.embed(write(&mut x[0], rows * d), weight(&places.embedding), read(inputs, rows), d);
        let (Some(adapter), Some(embedded)) = (&places.embedding_adapter, embedded) else { return };
        let len = rows * adapter.rank;
        backend.embed(write(embedded, len), weight(&adapter.a), read(inputs, rows), adapter.rank);
        backend.scale(write(embedded, len), adapter.scale);
        let shape = LinearShape { rows, inputs: adapter.rank, outputs: d };
        backend.linear(write(&mut x[0], rows * d), read(embedded, len), weight(&adapter.b), shape, true);
    }

    /// Computes a layer's normed input from the stream before it.
    pub(crate) fn norm_input(&mut self, weights: &B::Parameters, layer: usize) {
        let len = self.rows.count() * self.model_dim;
        let attn_norm = self.places.layers[layer].attn_norm.clone();
        self.backend.norm(
            write(&mut self.scratch.normed, len),
            read(&self.x[layer], len),
            self.scratch.norms.of(self.backend.values(View::new(weights, attn_norm))),
        );
    }

    /// Computes everything that a layer's backward pass needs: from its normed input to both halves of `proj_1`.
    pub(crate) fn layer(&mut self, weights: &B::Parameters, layer: usize) {
        let (rows, d) = (self.rows.count(), self.model_dim);
        let Self { backend, places, scratch, rope, x, activations, noise, sequences, length, .. } = self;
        let (sequences, length) = (*sequences, *length);
        let positions = sequences * length;
        let pass = pass(backend, weights, &self.rows, [sequences, length], noise.as_ref());
        let weight = |range: &Range<usize>| View::new(weights, range.clone());
        let at = &places.layers[layer];
        let heads = heads(at, self.head_dim);
        let (packed, query, ffn) = (heads.packed_width(), heads.query_width(), at.dims.ffn_dim);
        let Activations { packed: kept_packed, attended, lse, middle, gate_up, adapters: kept } =
            kept(activations, layer);
        let [kept_qkv, kept_out, kept_1, _] = kept;
        let Scratch { normed, rotated, rotated_gradient: free, branch, norms, adapters, .. } = scratch;
        let linear = Linear { places: &at.qkv, number: (layer, 0), kept: kept_qkv, adapters: &mut *adapters };
        pass.forward(linear, write(kept_packed, rows * packed), read(normed, rows * d));
        let unrotated = self.rows.at_positions(backend, free, kept_packed, packed);
        backend.qk_norm_rope(
            write(rotated, positions * packed),
            read(unrotated, positions * packed),
            norms.of(backend.values(weight(&at.qk_norm))),
            rope.at(read(&self.first, sequences), length),
            heads,
        );
        backend.attention(
            write(attended, positions * query),
            write(lse, positions * heads.query),
            read(rotated, positions * packed),
            read(&self.doc_starts, positions),
            AttentionShape { sequences, length, heads },
        );
        let attended = self.rows.at_rows(backend, rotated, attended, query);
        let linear =
            Linear { places: &at.out_proj, number: (layer, 1), kept: kept_out, adapters: &mut *adapters };
        pass.forward(linear, write(branch, rows * d), read(attended, rows * query));
        backend.add_norm(
            write(middle, rows * d),
            write(normed, rows * d),
            read(&x[layer], rows * d),
            read(branch, rows * d),
            norms.of(backend.values(weight(&at.ffn_norm))),
        );
        let linear =
            Linear { places: &at.proj_1, number: (layer, 2), kept: kept_1, adapters: &mut *adapters };
        pass.forward(linear, write(gate_up, rows * 2 * ffn), read(normed, rows * d));
    }

    /// Computes what a layer's FFN adds to the stream, from both halves of `proj_1`.
    pub(crate) fn ffn_output(&mut self, weights: &B::Parameters, layer: usize) {
        let (rows, d) = (self.rows.count(), self.model_dim);
        let Self { backend, places, activations, scratch, noise, .. } = self;
        let pass = pass(backend, weights, &self.rows, [self.sequences, self.length], noise.as_ref());
        let at = &places.layers[layer];
        let ffn = at.dims.ffn_dim;
        let Activations { gate_up, adapters: [_, _, _, kept], .. } = kept(activations, layer);
        let Scratch { gated, branch, adapters, .. } = scratch;
        backend.swiglu(write(gated, rows * ffn), read(gate_up, rows * 2 * ffn), ffn);
        let linear = Linear { places: &at.proj_2, number: (layer, 3), kept, adapters };
        pass.forward(linear, write(branch, rows * d), read(gated, rows * ffn));
    }

    /// The loss and the gradient of the loaded batch. Overwrites all of `gradient`, and the activations. Calls
    /// `complete` with the gradient and each range of it as soon as that is complete. All calls pass the same two
    /// buffers.
    pub(crate) fn forward_backward(
        &mut self,
        batch: &MicroBatch,
        weights: &B::Parameters,
        gradient: &mut B::Buffer<f32>,
        mut complete: impl FnMut(&B::Buffer<f32>, Range<usize>),
    ) {
        let backend = self.backend.clone();
        self.set_noise(true);
        let preference = match self.objective {
            Objective::Preferences(preference) => Some(preference),
            Objective::NextToken { .. } | Objective::Answers { .. } => None,
        };
        if let Some(preference) = preference {
            backend.run(|| {
                self.forward(weights);
                self.loss(weights);
            });
            self.weigh(batch, &preference);
        }
        let is_recorded = !self.objective.is_sparse()
            && (self.sequences, self.length) == (self.shape.sequences, self.shape.length);
        let mut segments = std::mem::take(&mut self.segments);
        for Segment { layers, gradient: range, graph } in &mut segments {
            let work = || {
                if layers.end == self.places.layers.len() {
                    if preference.is_none() {
                        self.forward(weights);
                    }
                    self.head_backward(weights, gradient);
                }
                self.layers_backward(weights, gradient, layers.clone());
                if layers.start == 0 {
                    self.embed_backward(weights, gradient);
                }
            };
            if is_recorded {
                backend.replay(graph, work);
            } else {
                backend.run(work);
            }
            complete(gradient, range.clone());
        }
        self.segments = segments;
        self.set_noise(false);
    }
}

/// What the linear layers of a pass over some rows of sequences of that number and length share.
pub(crate) fn pass<'a, B: TrainingBackend>(
    backend: &'a B,
    weights: &'a B::Parameters,
    rows: &'a Rows<B>,
    [sequences, length]: [usize; 2],
    noise: Option<&'a NoiseSource<B>>,
) -> Pass<'a, B> {
    let noise = noise.filter(|noise| noise.is_on).map(|noise| Noise {
        sequences: read(&noise.sequences, 2 * sequences),
        length,
        positions: rows.positions_on_device(),
        seed: noise.seed,
        rate: noise.rate,
    });
    Pass { backend, weights, rows: rows.count(), noise }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::AdapterShape;
    use crate::params::Layout;
    use ulmus_cpu::Cpu;
    use ulmus_plan::AdapterConfig;

    fn segments_of(config: &ModelConfig, adapter: Option<&AdapterShape>) -> (Vec<Segment<Cpu>>, Trainable) {
        let (layout, places) = Places::new(config, adapter.map_or(&[], AdapterShape::modules));
        let first = if adapter.is_some() { places.base } else { 0 };
        let trainable = Trainable::of(&layout, first..layout.parameters());
        (segments(&places, &trainable), trainable)
    }

    #[test]
    fn segments_complete_every_gradient_once() {
        for preset in ulmus_plan::Preset::ALL {
            let config = preset.config();
            let adapter =
                AdapterShape::new(&config, &AdapterConfig { rank: 256, ..AdapterConfig::default() }).unwrap();
            for adapter in [None, Some(&adapter)] {
                let (segments, trainable) = segments_of(&config, adapter);
                let (mut layer, mut end) = (config.num_transformer_layers, trainable.parameters());
                for Segment { layers, gradient, .. } in &segments {
                    assert_eq!((layers.end, gradient.end), (layer, end), "{preset:?}");
                    (layer, end) = (layers.start, gradient.start);
                }
                assert_eq!((layer, end), (0, 0), "{preset:?}");
                let (last, others) = segments.split_last().unwrap();
                assert!(others.iter().all(|segment| segment.gradient.len() >= SEGMENT), "{preset:?}");
                assert!(last.gradient.start == 0 && others.len() >= 5, "{preset:?}");
            }
        }
        // A small model is one segment.
        let config = ModelConfig { model_dim: 64, vocab_size: 100, ..ModelConfig::default() };
        assert_eq!(Layout::new(&config).parameters() as u64, config.parameters());
        assert_eq!(segments_of(&config, None).0.len(), 1);
    }
}
