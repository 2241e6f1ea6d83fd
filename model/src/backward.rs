//! The backward pass of a [`Network`] through its layers, from last to first.
//!
//! It goes as deep as there is something to train: the gradient of an output is computed if the output, or anything below
//! it, depends on a trained parameter.

use std::ops::Range;

use ulmus_backend::{AttentionShape, LinearShape, TrainingBackend, View, ViewMut};

use crate::activations::{Activations, Scratch, kept};
use crate::buffers::{heads, read, write};
use crate::linear::Linear;
use crate::network::{Network, pass};
use crate::params::LINEARS;

impl<B: TrainingBackend> Network<B> {
    pub(crate) fn layers_backward(
        &mut self,
        weights: &B::Parameters,
        gradient: &mut B::Buffer<f32>,
        layers: Range<usize>,
    ) {
        for layer in layers.rev() {
            let end = (layer + 1) * LINEARS;
            if self.lowest > end {
                return;
            }
            // The forward pass has just left the last layer's activations.
            if self.activations.len() == 1 && layer + 1 < self.places.layers.len() {
                self.norm_input(weights, layer);
                self.layer(weights, layer);
                if self.places.layers[layer].proj_2.adapter.is_some() {
                    self.ffn_output(weights, layer);
                }
            }
            self.ffn_backward(weights, gradient, layer);
            if self.lowest < end - 1 {
                self.attention_backward(weights, gradient, layer);
            }
        }
    }

    pub(crate) fn embed_backward(&mut self, weights: &B::Parameters, gradient: &mut B::Buffer<f32>) {
        let (rows, d) = (self.rows.count(), self.model_dim);
        let Self { backend, places, trainable, scratch, inputs, embedded, .. } = self;
        let (stream, ids) = (|| read(&scratch.stream, rows * d), || read(inputs, rows));
        if let Some(place) = trainable.place(&places.embedding) {
            let is_tied = places.head == places.embedding;
            backend.embed_backward(ViewMut::new(gradient, place), stream(), ids(), d, is_tied);
        }
        let (Some(adapter), Some(embedded)) = (&places.embedding_adapter, embedded) else { return };
        let (rank, shape) = (adapter.rank, LinearShape { rows, inputs: adapter.rank, outputs: d });
        let place = |range| trainable.place(range).expect("an adapter is trained");
        let of_b = ViewMut::new(gradient, place(&adapter.b));
        backend.linear_backward_weight(of_b, stream(), read(embedded, rows * rank), shape);
        let b = View::new(weights, adapter.b.clone());
        backend.linear_backward_input(write(embedded, rows * rank), stream(), b, shape, false);
        backend.scale(write(embedded, rows * rank), adapter.scale);
        let of_a = ViewMut::new(gradient, place(&adapter.a));
        backend.embed_backward(of_a, read(embedded, rows * rank), ids(), rank, false);
    }

    /// Takes the stream's gradient from the output of a layer's FFN to its input, or to its lowest trained parameter.
    fn ffn_backward(&mut self, weights: &B::Parameters, gradient: &mut B::Buffer<f32>, layer: usize) {
        let (rows, d) = (self.rows.count(), self.model_dim);
        let Self { backend, places, trainable, activations, scratch, noise, .. } = self;
        let pass = pass(backend, weights, &self.rows, [self.sequences, self.length], noise.as_ref());
        let at = &places.layers[layer];
        let (ffn, depth_of_proj_1) = (at.dims.ffn_dim, (layer + 1) * LINEARS - 1);
        let Activations { middle, gate_up, adapters: [_, _, kept_1, kept_2], .. } = kept(activations, layer);
        let Scratch { normed, gated, stream, norms, adapters, .. } = scratch;
        let mut proj_2 =
            Linear { places: &at.proj_2, number: (layer, 3), kept: kept_2, adapters: &mut *adapters };
        let x_len = rows * ffn;
        let upstream = || read(stream, rows * d);

        pass.begin_backward(&mut proj_2, gradient, trainable, upstream());
        if self.lowest > depth_of_proj_1 {
            backend.swiglu(write(gated, x_len), read(gate_up, 2 * x_len), ffn);
            return pass.backward_weight(&mut proj_2, gradient, trainable, upstream(), read(gated, x_len));
        }
        pass.backward_input(&mut proj_2, write(gated, x_len), upstream());
        backend.swiglu_backward(write(gate_up, 2 * x_len), write(gated, x_len), ffn);
        pass.backward_weight(&mut proj_2, gradient, trainable, upstream(), read(gated, x_len));

        let mut proj_1 =
            Linear { places: &at.proj_1, number: (layer, 2), kept: kept_1, adapters: &mut *adapters };
        let weight = |range: &Range<usize>| View::new(weights, range.clone());
        let upstream = || read(gate_up, 2 * x_len);
        pass.begin_backward(&mut proj_1, gradient, trainable, upstream());
        let norm = norms.of(backend.values(weight(&at.ffn_norm)));
        backend.norm(write(normed, rows * d), read(middle, rows * d), norm);
        pass.backward_weight(&mut proj_1, gradient, trainable, upstream(), read(normed, rows * d));
        if self.lowest >= depth_of_proj_1 {
            return;
        }
        pass.backward_input(&mut proj_1, write(normed, rows * d), upstream());
        backend.norm_backward(
            write(stream, rows * d),
            trainable.place(&at.ffn_norm).map(|place| ViewMut::new(gradient, place)),
            read(normed, rows * d),
            read(middle, rows * d),
            norms.of(backend.values(weight(&at.ffn_norm))),
            true,
        );
    }

    /// Takes the stream's gradient from the output of a layer's attention to its input, or to its lowest trained parameter.
    fn attention_backward(&mut self, weights: &B::Parameters, gradient: &mut B::Buffer<f32>, layer: usize) {
        let (rows, d) = (self.rows.count(), self.model_dim);
        let Self { backend, places, trainable, x, activations, scratch, rope, noise, .. } = self;
        let pass = pass(backend, weights, &self.rows, [self.sequences, self.length], noise.as_ref());
        let at = &places.layers[layer];
        let heads = heads(at, self.head_dim);
        let (packed, query, depth_of_qkv) = (heads.packed_width(), heads.query_width(), layer * LINEARS + 1);
        let positions = self.sequences * self.length;
        let Activations { packed: kept_packed, attended, lse, adapters: [kept_qkv, kept_out, ..], .. } =
            kept(activations, layer);
        let Scratch { normed, rotated, rotated_gradient, branch, stream, norms, adapters, .. } = scratch;
        let weight = |range: &Range<usize>| View::new(weights, range.clone());

        let mut out_proj =
            Linear { places: &at.out_proj, number: (layer, 1), kept: kept_out, adapters: &mut *adapters };
        let upstream = || read(stream, rows * d);
        pass.begin_backward(&mut out_proj, gradient, trainable, upstream());
        let of_rows = self.rows.at_rows(backend, rotated, attended, query);
        pass.backward_weight(&mut out_proj, gradient, trainable, upstream(), read(of_rows, rows * query));
        if self.lowest > depth_of_qkv {
            return;
        }
        if self.rows.are_positions() {
            pass.backward_input(&mut out_proj, write(branch, rows * query), upstream());
        } else {
            pass.backward_input(&mut out_proj, write(rotated, rows * query), upstream());
            self.rows.gradient_at_positions(backend, branch, rotated, query);
        }
        let unrotated = self.rows.at_positions(backend, rotated_gradient, kept_packed, packed);
        backend.qk_norm_rope(
            write(rotated, positions * packed),
            read(unrotated, positions * packed),
            norms.of(backend.values(weight(&at.qk_norm))),
            rope.at(read(&self.first, self.sequences), self.length),
            heads,
        );
        backend.attention_backward(
            write(rotated_gradient, positions * packed),
            read(branch, positions * query),
            read(attended, positions * query),
            read(lse, positions * heads.query),
            read(rotated, positions * packed),
            read(&self.doc_starts, positions),
            AttentionShape { sequences: self.sequences, length: self.length, heads },
        );
        let unrotated = self.rows.at_positions(backend, rotated, kept_packed, packed);
        backend.qk_norm_rope_backward(
            write(unrotated, positions * packed),
            trainable.place(&at.qk_norm).map(|place| ViewMut::new(gradient, place)),
            read(rotated_gradient, positions * packed),
            norms.of(backend.values(weight(&at.qk_norm))),
            rope.at(read(&self.first, self.sequences), self.length),
            heads,
        );
        if !self.rows.are_positions() {
            self.rows.gradient_at_rows(backend, kept_packed, rotated, packed);
        }

        let mut qkv =
            Linear { places: &at.qkv, number: (layer, 0), kept: kept_qkv, adapters: &mut *adapters };
        let upstream = || read(kept_packed, rows * packed);
        pass.begin_backward(&mut qkv, gradient, trainable, upstream());
        let norm = norms.of(backend.values(weight(&at.attn_norm)));
        backend.norm(write(normed, rows * d), read(&x[layer], rows * d), norm);
        pass.backward_weight(&mut qkv, gradient, trainable, upstream(), read(normed, rows * d));
        if self.lowest >= depth_of_qkv {
            return;
        }
        pass.backward_input(&mut qkv, write(normed, rows * d), upstream());
        backend.norm_backward(
            write(stream, rows * d),
            trainable.place(&at.attn_norm).map(|place| ViewMut::new(gradient, place)),
            read(normed, rows * d),
            read(&x[layer], rows * d),
            norms.of(backend.values(weight(&at.attn_norm))),
            true,
        );
    }
}
