//! The forward and backward of OpenELM over buffers planned once.
//!
//! There is no tape: each layer's activations have their place, and the backward walks the layers from last to
//! first. Nothing is allocated after [`Network::new`]. Every range of the gradient is written exactly once per
//! pass (the tied embedding: by the head, then added to by the input side), so it is never cleared; the gradient
//! of a layer is complete when the loop has passed it.
//!
//! `x` is the residual stream: `x = embedding`, per layer `x += attention(norm(x))`, `x += ffn(norm(x))`.

use ulmus_plan::{HEAD_ROWS, ModelConfig};

use crate::backend::{
    AttentionShape, Backend, Columns, Element, HeadGradients, Heads, LinearShape, ROW_BLOCK, Rope, View,
    ViewMut,
};
use crate::batch::MicroBatch;
use crate::error::ModelError;
use crate::params::{LayerLayout, Layout};

/// Allocates buffers and counts their bytes.
pub(crate) struct Planner<'a, B> {
    pub backend: &'a B,
    pub bytes: u64,
}

impl<'a, B: Backend> Planner<'a, B> {
    pub(crate) fn new(backend: &'a B) -> Self {
        Self { backend, bytes: 0 }
    }

    pub(crate) fn buffer<T: Element>(&mut self, len: usize) -> Result<B::Buffer<T>, ModelError> {
        self.bytes += (len * size_of::<T>()) as u64;
        self.backend.allocate(len)
    }
}

/// The first `len` elements of a buffer.
pub(crate) fn read<T>(buffer: &T, len: usize) -> View<'_, T> {
    View::new(buffer, 0..len)
}

/// The first `len` elements of a buffer, to write.
pub(crate) fn write<T>(buffer: &mut T, len: usize) -> ViewMut<'_, T> {
    ViewMut::new(buffer, 0..len)
}

/// Rotary tables on the device.
#[derive(Debug)]
pub(crate) struct RopeTables<B: Backend> {
    cos: B::Buffer<f32>,
    sin: B::Buffer<f32>,
    len: usize,
}

impl<B: Backend> RopeTables<B> {
    pub(crate) fn new(
        plan: &mut Planner<'_, B>,
        config: &ModelConfig,
        positions: usize,
    ) -> Result<Self, ModelError> {
        let (cos, sin) = rope_tables(config.head_dim, config.rope_freq_constant, positions);
        let len = cos.len();
        let mut tables = Self { cos: plan.buffer(len)?, sin: plan.buffer(len)?, len };
        plan.backend.upload(write(&mut tables.cos, len), &cos);
        plan.backend.upload(write(&mut tables.sin, len), &sin);
        Ok(tables)
    }

    /// For rows of sequences of `length` whose first position is `first`.
    pub(crate) fn at(&self, first: usize, length: usize) -> Rope<'_, B::Buffer<f32>> {
        Rope { cos: read(&self.cos, self.len), sin: read(&self.sin, self.len), first, length }
    }
}

/// Cosines and sines `[positions, head_dim / 2]`. Exponents, powers, frequencies and angles are each rounded to f32,
/// as in the reference: at position 2047 the last bit of a frequency is 1e-4 of a radian.
fn rope_tables(head_dim: usize, base: f64, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let frequency = |j: usize| {
        let exponent = (2 * j) as f32 / head_dim as f32;
        1.0 / base.powf(f64::from(exponent)) as f32
    };
    let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
    let angles = (0..positions)
        .flat_map(|position| frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency)));
    angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip()
}

/// What the backward of one layer needs from its forward. R rows, D model width, F FFN width.
#[derive(Debug)]
struct Activations<B: Backend> {
    /// Residual stream before the layer, `[R, D]`.
    x: B::Buffer<f32>,
    /// Its norm, the input of the attention, `[R, D]`.
    attention_input: B::Buffer<f32>,
    /// Queries, keys, values, `[R, packed]`.
    packed: B::Buffer<f32>,
    /// The same after norm and rotation.
    rotated: B::Buffer<f32>,
    /// Output of the attention, `[R, query width]`.
    attended: B::Buffer<f32>,
    /// Logsumexp of the scores, `[sequences, query heads, length]`.
    lse: B::Buffer<f32>,
    /// Residual stream between attention and FFN, `[R, D]`.
    middle: B::Buffer<f32>,
    /// Its norm, `[R, D]`.
    ffn_input: B::Buffer<f32>,
    /// Both halves of `proj_1`, `[R, 2F]`.
    gate_up: B::Buffer<f32>,
    /// After SwiGLU, `[R, F]`.
    gated: B::Buffer<f32>,
}

/// Buffers that every layer uses in turn.
#[derive(Debug)]
struct Scratch<B: Backend> {
    /// Output of a branch before it joins the stream; in the backward the gradient of a branch's input.
    branch: B::Buffer<f32>,
    /// Gradient of the residual stream.
    stream: B::Buffer<f32>,
    packed: B::Buffer<f32>,
    rotated: B::Buffer<f32>,
    gate_up: B::Buffer<f32>,
    gated: B::Buffer<f32>,
    /// Partial sums of the gradients of norm weights.
    partial: B::Buffer<f32>,
    /// Logits of some rows.
    logits: B::Buffer<f32>,
    logits_len: usize,
}

/// A model's forward and backward for micro-batches of one shape.
#[derive(Debug)]
pub(crate) struct Network<B: Backend> {
    backend: B,
    layout: Layout,
    sequences: usize,
    length: usize,
    model_dim: usize,
    head_dim: usize,
    vocabulary: usize,
    rope: RopeTables<B>,
    inputs: B::Buffer<u32>,
    targets: B::Buffer<u32>,
    doc_starts: B::Buffer<u32>,
    layers: Vec<Activations<B>>,
    /// Residual stream after the last layer, and its norm.
    last: B::Buffer<f32>,
    hidden: B::Buffer<f32>,
    cross_entropy: B::Buffer<f32>,
    lse: B::Buffer<f32>,
    scratch: Scratch<B>,
    planned_bytes: u64,
}

impl<B: Backend> Network<B> {
    pub(crate) fn new(
        backend: B,
        config: &ModelConfig,
        layout: &Layout,
        sequences: usize,
        length: usize,
    ) -> Result<Self, ModelError> {
        let (rows, d) = (sequences * length, config.model_dim);
        let plan = &mut Planner::new(&backend);
        let mut layers = Vec::new();
        let (mut widest_query, mut widest_packed, mut widest_ffn) = (0, 0, 0);
        for layer in layout.layers() {
            let heads = heads(layer, config.head_dim);
            let ffn = layer.dims.ffn_dim;
            widest_query = widest_query.max(heads.query_width());
            widest_packed = widest_packed.max(heads.packed_width());
            widest_ffn = widest_ffn.max(ffn);
            layers.push(Activations {
                x: plan.buffer(rows * d)?,
                attention_input: plan.buffer(rows * d)?,
                packed: plan.buffer(rows * heads.packed_width())?,
                rotated: plan.buffer(rows * heads.packed_width())?,
                attended: plan.buffer(rows * heads.query_width())?,
                lse: plan.buffer(rows * heads.query)?,
                middle: plan.buffer(rows * d)?,
                ffn_input: plan.buffer(rows * d)?,
                gate_up: plan.buffer(rows * 2 * ffn)?,
                gated: plan.buffer(rows * ffn)?,
            });
        }
        let logits_len = rows.min(HEAD_ROWS) * config.vocab_size;
        let scratch = Scratch {
            branch: plan.buffer(rows * d.max(widest_query))?,
            stream: plan.buffer(rows * d)?,
            packed: plan.buffer(rows * widest_packed)?,
            rotated: plan.buffer(rows * widest_packed)?,
            gate_up: plan.buffer(rows * 2 * widest_ffn)?,
            gated: plan.buffer(rows * widest_ffn)?,
            partial: plan.buffer(rows.div_ceil(ROW_BLOCK) * d.max(2 * config.head_dim))?,
            logits: plan.buffer(logits_len)?,
            logits_len,
        };
        Ok(Self {
            layout: layout.clone(),
            sequences,
            length,
            model_dim: d,
            head_dim: config.head_dim,
            vocabulary: config.vocab_size,
            rope: RopeTables::new(plan, config, length)?,
            inputs: plan.buffer(rows)?,
            targets: plan.buffer(rows)?,
            doc_starts: plan.buffer(rows)?,
            layers,
            last: plan.buffer(rows * d)?,
            hidden: plan.buffer(rows * d)?,
            cross_entropy: plan.buffer(rows)?,
            lse: plan.buffer(rows)?,
            scratch,
            planned_bytes: plan.bytes,
            backend,
        })
    }

    /// Bytes of all activations and scratch.
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

    /// Residual stream to final norm of the loaded batch.
    pub(crate) fn forward(&mut self, weights: &B::Buffer<f32>) {
        let (rows, d) = (self.rows(), self.model_dim);
        let Self { backend, layout, layers, scratch, rope, .. } = self;
        let weight = |range: &std::ops::Range<usize>| View::new(weights, range.clone());
        let mut previous: Option<&Activations<B>> = None;
        for (at, layer) in layout.layers().iter().zip(layers.iter_mut()) {
            let heads = heads(at, self.head_dim);
            let (packed, query, ffn) =
                (rows * heads.packed_width(), rows * heads.query_width(), at.dims.ffn_dim);
            match previous {
                None => {
                    let table = weight(&layout.embedding());
                    backend.embed(write(&mut layer.x, rows * d), table, read(&self.inputs, rows), d);
                    let x = read(&layer.x, rows * d);
                    backend.norm(write(&mut layer.attention_input, rows * d), x, weight(&at.attn_norm));
                }
                Some(previous) => backend.add_norm(
                    write(&mut layer.x, rows * d),
                    write(&mut layer.attention_input, rows * d),
                    read(&previous.middle, rows * d),
                    read(&scratch.branch, rows * d),
                    weight(&at.attn_norm),
                ),
            }
            backend.linear(
                write(&mut layer.packed, packed),
                read(&layer.attention_input, rows * d),
                weight(&at.qkv),
                LinearShape { rows, inputs: d, outputs: heads.packed_width() },
            );
            backend.qk_norm_rope(
                write(&mut layer.rotated, packed),
                read(&layer.packed, packed),
                weight(&at.qk_norm),
                rope.at(0, self.length),
                heads,
            );
            let columns =
                |column| Columns { rows: read(&layer.rotated, packed), stride: heads.packed_width(), column };
            backend.attention(
                write(&mut layer.attended, query),
                write(&mut layer.lse, rows * heads.query),
                columns(0),
                columns(heads.query_width()),
                columns(heads.query_width() + heads.key_value_width()),
                Some(read(&self.doc_starts, rows)),
                attention_shape(self.sequences, self.length, heads),
            );
            backend.linear(
                write(&mut scratch.branch, rows * d),
                read(&layer.attended, query),
                weight(&at.out_proj),
                LinearShape { rows, inputs: heads.query_width(), outputs: d },
            );
            backend.add_norm(
                write(&mut layer.middle, rows * d),
                write(&mut layer.ffn_input, rows * d),
                read(&layer.x, rows * d),
                read(&scratch.branch, rows * d),
                weight(&at.ffn_norm),
            );
            backend.linear(
                write(&mut layer.gate_up, rows * 2 * ffn),
                read(&layer.ffn_input, rows * d),
                weight(&at.proj_1),
                LinearShape { rows, inputs: d, outputs: 2 * ffn },
            );
            backend.swiglu(write(&mut layer.gated, rows * ffn), read(&layer.gate_up, rows * 2 * ffn), ffn);
            backend.linear(
                write(&mut scratch.branch, rows * d),
                read(&layer.gated, rows * ffn),
                weight(&at.proj_2),
                LinearShape { rows, inputs: ffn, outputs: d },
            );
            previous = Some(layer);
        }
        let previous = previous.expect("a model has at least one layer");
        backend.add_norm(
            write(&mut self.last, rows * d),
            write(&mut self.hidden, rows * d),
            read(&previous.middle, rows * d),
            read(&scratch.branch, rows * d),
            weight(&layout.final_norm()),
        );
    }

    /// Head and loss of the loaded batch, after [`Network::forward`].
    pub(crate) fn loss(&mut self, weights: &B::Buffer<f32>) {
        self.head(weights, None);
    }

    fn head(&mut self, weights: &B::Buffer<f32>, gradient: Option<(&mut B::Buffer<f32>, f32)>) {
        let (rows, d) = (self.rows(), self.model_dim);
        let table = self.layout.embedding();
        let Scratch { branch, logits, logits_len, .. } = &mut self.scratch;
        let gradients = gradient.map(|(gradient, z_loss)| HeadGradients {
            hidden: write(branch, rows * d),
            table: ViewMut::new(gradient, table.clone()),
            z_loss,
        });
        self.backend.head_loss(
            write(&mut self.cross_entropy, rows),
            write(&mut self.lse, rows),
            gradients,
            read(&self.hidden, rows * d),
            View::new(weights, table),
            read(&self.targets, rows),
            write(logits, *logits_len),
            LinearShape { rows, inputs: d, outputs: self.vocabulary },
        );
    }

    /// Loss and gradient of `Σ cross_entropy + z_loss · lse²` of the loaded batch, after [`Network::forward`].
    /// Overwrites all of `gradient`.
    pub(crate) fn loss_backward(
        &mut self,
        weights: &B::Buffer<f32>,
        gradient: &mut B::Buffer<f32>,
        z_loss: f32,
    ) {
        self.head(weights, Some((gradient, z_loss)));
        let (rows, d) = (self.rows(), self.model_dim);
        let Self { backend, layout, layers, scratch, rope, .. } = self;
        let weight = |range: &std::ops::Range<usize>| View::new(weights, range.clone());
        let partial_blocks = rows.div_ceil(ROW_BLOCK);
        backend.norm_backward(
            write(&mut scratch.stream, rows * d),
            ViewMut::new(gradient, layout.final_norm()),
            read(&scratch.branch, rows * d),
            read(&self.last, rows * d),
            weight(&layout.final_norm()),
            false,
            write(&mut scratch.partial, partial_blocks * d),
        );
        for (at, layer) in layout.layers().iter().zip(layers.iter()).rev() {
            let heads = heads(at, self.head_dim);
            let (packed, query, ffn) =
                (rows * heads.packed_width(), rows * heads.query_width(), at.dims.ffn_dim);
            backend.linear_backward(
                write(&mut scratch.gated, rows * ffn),
                ViewMut::new(gradient, at.proj_2.clone()),
                read(&scratch.stream, rows * d),
                read(&layer.gated, rows * ffn),
                weight(&at.proj_2),
                LinearShape { rows, inputs: ffn, outputs: d },
            );
            backend.swiglu_backward(
                write(&mut scratch.gate_up, rows * 2 * ffn),
                read(&scratch.gated, rows * ffn),
                read(&layer.gate_up, rows * 2 * ffn),
                ffn,
            );
            backend.linear_backward(
                write(&mut scratch.branch, rows * d),
                ViewMut::new(gradient, at.proj_1.clone()),
                read(&scratch.gate_up, rows * 2 * ffn),
                read(&layer.ffn_input, rows * d),
                weight(&at.proj_1),
                LinearShape { rows, inputs: d, outputs: 2 * ffn },
            );
            backend.norm_backward(
                write(&mut scratch.stream, rows * d),
                ViewMut::new(gradient, at.ffn_norm.clone()),
                read(&scratch.branch, rows * d),
                read(&layer.middle, rows * d),
                weight(&at.ffn_norm),
                true,
                write(&mut scratch.partial, partial_blocks * d),
            );
            backend.linear_backward(
                write(&mut scratch.branch, query),
                ViewMut::new(gradient, at.out_proj.clone()),
                read(&scratch.stream, rows * d),
                read(&layer.attended, query),
                weight(&at.out_proj),
                LinearShape { rows, inputs: heads.query_width(), outputs: d },
            );
            backend.attention_backward(
                write(&mut scratch.rotated, packed),
                read(&scratch.branch, query),
                read(&layer.attended, query),
                read(&layer.lse, rows * heads.query),
                read(&layer.rotated, packed),
                read(&self.doc_starts, rows),
                attention_shape(self.sequences, self.length, heads),
            );
            backend.qk_norm_rope_backward(
                write(&mut scratch.packed, packed),
                ViewMut::new(gradient, at.qk_norm.clone()),
                read(&scratch.rotated, packed),
                read(&layer.packed, packed),
                weight(&at.qk_norm),
                rope.at(0, self.length),
                heads,
                write(&mut scratch.partial, partial_blocks * 2 * self.head_dim),
            );
            backend.linear_backward(
                write(&mut scratch.branch, rows * d),
                ViewMut::new(gradient, at.qkv.clone()),
                read(&scratch.packed, packed),
                read(&layer.attention_input, rows * d),
                weight(&at.qkv),
                LinearShape { rows, inputs: d, outputs: heads.packed_width() },
            );
            backend.norm_backward(
                write(&mut scratch.stream, rows * d),
                ViewMut::new(gradient, at.attn_norm.clone()),
                read(&scratch.branch, rows * d),
                read(&layer.x, rows * d),
                weight(&at.attn_norm),
                true,
                write(&mut scratch.partial, partial_blocks * d),
            );
        }
        backend.embed_backward(
            ViewMut::new(gradient, layout.embedding()),
            read(&scratch.stream, rows * d),
            read(&self.inputs, rows),
            d,
        );
    }

    /// Per position of the last batch: cross-entropy and logsumexp, 0 where ignored.
    pub(crate) fn losses(&self) -> (Vec<f32>, Vec<f32>) {
        let (mut cross_entropy, mut lse) = (vec![0.0; self.rows()], vec![0.0; self.rows()]);
        self.backend.download(read(&self.cross_entropy, self.rows()), &mut cross_entropy);
        self.backend.download(read(&self.lse, self.rows()), &mut lse);
        (cross_entropy, lse)
    }
}

/// Heads of a layer.
pub(crate) fn heads(layer: &LayerLayout, head_dim: usize) -> Heads {
    Heads { query: layer.dims.q_heads, key_value: layer.dims.kv_heads, width: head_dim }
}

fn attention_shape(sequences: usize, length: usize, heads: Heads) -> AttentionShape {
    AttentionShape { sequences, queries: length, keys: length, heads }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use safetensors::SafeTensors;

    /// Reads the reference's RMS norms and rotations.
    fn pieces() -> impl Fn(&str) -> Vec<f32> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/a/pieces.safetensors");
        let bytes = std::fs::read(path).unwrap();
        move |name| {
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let tensor = tensors.tensor(name).unwrap();
            match tensor.dtype() {
                safetensors::Dtype::F32 => {
                    tensor.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
                }
                _ => tensor
                    .data()
                    .chunks(8)
                    .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32)
                    .collect(),
            }
        }
    }

    fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(found.len(), expected.len());
        let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= tolerance, "{worst:e}");
    }

    #[test]
    fn rotary_tables_are_the_reference_s() {
        let pieces = pieces();
        for head_dim in [64, 128] {
            let of = |name: &str| pieces(&format!("rope{head_dim}.{name}"));
            let positions = of("positions");
            let (cos, sin) = rope_tables(
                head_dim,
                10_000.0,
                positions.iter().fold(0.0, |a: f32, b| a.max(*b)) as usize + 1,
            );
            let half = head_dim / 2;
            for (row, position) in positions.iter().enumerate() {
                let at = *position as usize * half;
                // The reference repeats each table for the second half of the head.
                assert_close(&cos[at..at + half], &of("cos")[row * head_dim..][..half], 1e-6);
                assert_close(&sin[at..at + half], &of("sin")[row * head_dim..][..half], 1e-6);
            }
        }
    }

    #[test]
    fn norm_is_the_reference_s() {
        let pieces = pieces();
        let (x, weight) = (pieces("rmsnorm.x"), pieces("rmsnorm.weight"));
        let mut out = vec![0.0; x.len()];
        Cpu::new(1).norm(write(&mut out, x.len()), read(&x, x.len()), read(&weight, weight.len()));
        assert_close(&out, &pieces("rmsnorm.y"), 1e-6);
    }

    /// The kernel norms each head before it rotates; rotation is linear, so the head's own size undoes the norm.
    #[test]
    fn rotation_is_the_reference_s() {
        let pieces = pieces();
        let cpu = Cpu::new(1);
        let config = ModelConfig { head_dim: 32, ..ModelConfig::default() };
        let rope = RopeTables::new(&mut Planner::new(&cpu), &config, 9).unwrap();
        let heads = Heads { query: 1, key_value: 1, width: 32 };
        // [heads, rows, 32]: queries are the last three of nine positions.
        for (name, count, first) in [("q", 3, 6), ("k", 9, 0)] {
            let expected = pieces(&format!("rope_apply.{name}_out"));
            for (x, expected) in
                pieces(&format!("rope_apply.{name}")).chunks(count * 32).zip(expected.chunks(count * 32))
            {
                let packed: Vec<f32> = x.chunks(32).flat_map(|x| [x, x, x].concat()).collect();
                let mut out = vec![0.0; packed.len()];
                cpu.qk_norm_rope(
                    write(&mut out, packed.len()),
                    read(&packed, packed.len()),
                    read(&vec![1.0; 64], 64),
                    rope.at(first, count),
                    heads,
                );
                for ((x, out), expected) in x.chunks(32).zip(out.chunks(96)).zip(expected.chunks(32)) {
                    let size = (x.iter().map(|x| x * x).sum::<f32>() / 32.0 + 1e-6).sqrt();
                    let rotated: Vec<f32> = out[..64].iter().map(|x| x * size).collect();
                    assert_close(&rotated[..32], expected, 3e-6);
                    assert_close(&rotated[32..], expected, 3e-6);
                }
            }
        }
    }
}
