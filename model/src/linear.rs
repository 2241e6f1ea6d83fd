//! The linear layers of a network in training, with their adapters.
//!
//! With the input `x`, its noisy version `d` (dropout; `x` itself where there is none) and `h = s · d · Aᵀ`, the output is
//!
//! ```text
//! without an adapter    x · Wᵀ
//! LoRA                  x · Wᵀ + h · Bᵀ
//! DoRA                  (x − d) · Wᵀ + g ∘ u,   u = d · Wᵀ + h · Bᵀ,   g = magnitude / ‖rows of W + s · B · A‖
//! ```
//!
//! and norms count as constants in gradients. `h` and `u` are kept for the backward pass; `d` is made again. The backward
//! pass of a layer is three calls, because a caller may overwrite a layer's input by its gradient.

use ulmus_backend::{
    Acts, ActsMut, Dropout, DropoutPart, LinearShape, LowRank, TrainingBackend, View, ViewMut, dropout_key,
};

use crate::buffers::{Planner, read, write};
use crate::error::ModelError;
use crate::init::row_norm;
use crate::params::{AdapterPlaces, LINEARS, LayerPlaces, LinearPlaces, Places, Trainable};

/// What the forward pass of an adapter keeps for its backward pass.
#[derive(Debug)]
pub(crate) struct KeptAdapter<B: TrainingBackend> {
    /// `h`, `[R, rank]`.
    inner: B::Activations,
    /// `u`, `[R, outputs]`; only for DoRA.
    unscaled: Option<B::Activations>,
}

impl<B: TrainingBackend> KeptAdapter<B> {
    /// Plans what one adapter keeps, or several in turn.
    fn new<'a>(
        plan: &mut Planner<'_, B>,
        rows: usize,
        linears: impl Iterator<Item = &'a LinearPlaces>,
    ) -> Result<Option<Self>, ModelError> {
        let (mut rank, mut outputs) = (0, 0);
        for LinearPlaces { outputs: width, adapter, .. } in linears {
            let Some(adapter) = adapter else { continue };
            rank = rank.max(adapter.rank);
            outputs = outputs.max(if adapter.magnitude.is_some() { *width } else { 0 });
        }
        if rank == 0 {
            return Ok(None);
        }
        let unscaled = (outputs > 0).then(|| plan.activations(rows * outputs)).transpose()?;
        Ok(Some(Self { inner: plan.activations(rows * rank)?, unscaled }))
    }

    /// Plans what the adapters of these layers keep, if they do so in turn.
    pub(crate) fn of_layers(
        plan: &mut Planner<'_, B>,
        rows: usize,
        layers: &[LayerPlaces],
    ) -> Result<[Option<Self>; LINEARS], ModelError> {
        let mut kept = [const { None }; LINEARS];
        for (index, kept) in kept.iter_mut().enumerate() {
            *kept = Self::new(plan, rows, layers.iter().map(|layer| layer.linears()[index]))?;
        }
        Ok(kept)
    }
}

/// The norms of one matrix with magnitudes.
#[derive(Debug)]
pub(crate) struct Norms<B: TrainingBackend> {
    /// The squares of the norms of the frozen rows, `[outputs]`.
    squares: B::Buffer<f32>,
    /// The gains and inverse norms of the present rows, `[2, outputs]`.
    gains: B::Buffer<f32>,
}

/// Buffers that all adapters use in turn, and the norms of each matrix with magnitudes.
#[derive(Debug)]
pub(crate) struct Adapters<B: TrainingBackend> {
    /// By layer and matrix.
    norms: Vec<[Option<Norms<B>>; LINEARS]>,
    /// The gradient of `h`, `[R, rank]`.
    inner: B::Activations,
    /// The gradient of `u`, `[R, outputs]`.
    outer: B::Activations,
    /// `d`, and what is computed in its place, `[R, inputs]`.
    dropped: B::Activations,
    /// Products for the norms.
    products: B::Buffer<f32>,
    products_len: usize,
}

impl<B: TrainingBackend> Adapters<B> {
    /// Plans the buffers that the adapters of a model need, and nothing if there are none.
    pub(crate) fn new(
        plan: &mut Planner<'_, B>,
        rows: usize,
        places: &Places,
        drops: bool,
    ) -> Result<Self, ModelError> {
        let (mut norms, mut products_len) = (Vec::new(), 0);
        let (mut rank, mut outputs, mut inputs) = (0, 0, 0);
        rank = rank.max(places.embedding_adapter.as_ref().map_or(0, |adapter| adapter.rank));
        for layer in &places.layers {
            let mut of_layer = [const { None }; LINEARS];
            for (linear, norms) in layer.linears().into_iter().zip(&mut of_layer) {
                let Some(adapter) = &linear.adapter else { continue };
                rank = rank.max(adapter.rank);
                inputs = inputs.max(if drops { linear.inputs } else { 0 });
                if adapter.magnitude.is_some() {
                    outputs = outputs.max(linear.outputs);
                    products_len = products_len.max((2 * linear.outputs + adapter.rank) * adapter.rank);
                    *norms = Some(Norms {
                        squares: plan.buffer(linear.outputs)?,
                        gains: plan.buffer(2 * linear.outputs)?,
                    });
                }
            }
            norms.push(of_layer);
        }
        Ok(Self {
            norms,
            inner: plan.activations(rows * rank)?,
            outer: plan.activations(rows * outputs)?,
            dropped: plan.activations(rows * inputs)?,
            products: plan.buffer(products_len)?,
            products_len,
        })
    }

    /// Sets the squares of the norms of frozen rows.
    pub(crate) fn set_squares(&mut self, backend: &B, places: &Places, weights: &B::Parameters) {
        let mut matrix = Vec::new();
        for (layer, norms) in places.layers.iter().zip(&mut self.norms) {
            for (linear, norms) in layer.linears().into_iter().zip(norms) {
                let Some(Norms { squares, .. }) = norms else { continue };
                let LinearPlaces { weight, inputs, outputs, .. } = linear;
                matrix.resize(weight.len(), 0.0);
                backend.download(backend.values(View::new(weights, weight.clone())), &mut matrix);
                let values: Vec<f32> = matrix.chunks_exact(*inputs).map(|row| row_norm(row).1).collect();
                backend.upload(write(squares, *outputs), &values);
            }
        }
    }
}

/// The noise of a pass.
#[derive(Debug)]
pub(crate) struct Noise<'a, B: TrainingBackend> {
    /// The number of each sequence in two words.
    pub sequences: View<'a, B::Buffer<u32>>,
    /// Positions per sequence.
    pub length: usize,
    /// The position of each row.
    pub positions: View<'a, B::Buffer<u32>>,
    pub seed: u64,
    pub rate: f32,
}

/// What all linear layers of a pass share.
#[derive(Debug)]
pub(crate) struct Pass<'a, B: TrainingBackend> {
    pub backend: &'a B,
    pub weights: &'a B::Parameters,
    pub rows: usize,
    /// Adapters are noisy in passes with a gradient.
    pub noise: Option<Noise<'a, B>>,
}

/// One linear layer, by its number in the network: `(layer, matrix)`.
#[derive(Debug)]
pub(crate) struct Linear<'a, B: TrainingBackend> {
    pub places: &'a LinearPlaces,
    pub number: (usize, usize),
    /// What its adapter keeps, if it has one.
    pub kept: &'a mut Option<KeptAdapter<B>>,
    pub adapters: &'a mut Adapters<B>,
}

impl<B: TrainingBackend> Linear<'_, B> {
    fn reborrow(&mut self) -> Linear<'_, B> {
        let Self { places, number, kept, adapters } = self;
        Linear { places, number: *number, kept, adapters }
    }
}

impl<'a, B: TrainingBackend> Pass<'a, B> {
    fn weight(&self, range: &std::ops::Range<usize>) -> View<'a, B::Parameters> {
        View::new(self.weights, range.clone())
    }

    fn shape(&self, inputs: usize, outputs: usize) -> LinearShape {
        LinearShape { rows: self.rows, inputs, outputs }
    }

    fn dropout(&self, adapter: &AdapterPlaces) -> Option<Dropout<'a, B>> {
        self.noise.as_ref().map(|noise| Dropout {
            sequences: noise.sequences.clone(),
            length: noise.length,
            positions: noise.positions.clone(),
            key: dropout_key(noise.seed, adapter.number),
            rate: noise.rate,
        })
    }

    /// The output of a layer.
    pub(crate) fn forward(&self, linear: Linear<'_, B>, mut out: ActsMut<'_, B>, x: Acts<'_, B>) {
        let Linear { places, number: (layer, matrix), kept, adapters } = linear;
        let LinearPlaces { weight, inputs, outputs, adapter } = places;
        let (backend, rows, shape) = (self.backend, self.rows, self.shape(*inputs, *outputs));
        let (Some(adapter), Some(KeptAdapter { inner, unscaled })) = (adapter, kept) else {
            return backend.linear(out, x, self.weight(weight), shape, false);
        };
        let Adapters { norms, dropped, products, products_len, .. } = adapters;
        let AdapterPlaces { a, b, magnitude, rank, scale, .. } = adapter;
        let (x_len, out_len, inner_len) = (rows * inputs, rows * outputs, rows * rank);
        let dropout = self.dropout(adapter);
        if let Some(dropout) = dropout.clone() {
            backend.dropout(write(dropped, x_len), x.clone(), dropout, *inputs, DropoutPart::Kept, false);
        }
        let noisy = if dropout.is_some() { read(dropped, x_len) } else { x.clone() };
        backend.linear(
            write(inner, inner_len),
            noisy.clone(),
            self.weight(a),
            self.shape(*inputs, *rank),
            false,
        );
        backend.scale(write(inner, inner_len), *scale);
        let product = self.shape(*rank, *outputs);
        let (Some(magnitude), Some(unscaled)) = (magnitude, unscaled) else {
            backend.linear(out.reborrow(), x, self.weight(weight), shape, false);
            return backend.linear(out, read(inner, inner_len), self.weight(b), product, true);
        };
        let Norms { squares, gains } =
            norms[layer][matrix].as_mut().expect("norms are planned for each matrix with magnitudes");
        let matrix = LowRank {
            weight: self.weight(weight),
            a: self.weight(a),
            b: self.weight(b),
            scale: *scale,
            inputs: *inputs,
        };
        backend.gains(
            write(gains, 2 * outputs),
            self.weight(magnitude),
            read(squares, *outputs),
            matrix,
            write(products, *products_len),
        );
        backend.linear(write(unscaled, out_len), noisy, self.weight(weight), shape, false);
        backend.linear(write(unscaled, out_len), read(inner, inner_len), self.weight(b), product, true);
        let is_noisy = dropout.is_some();
        if let Some(dropout) = dropout {
            backend.dropout(write(dropped, x_len), x, dropout, *inputs, DropoutPart::Rest, false);
            let rest = read(dropped, x_len);
            backend.linear(out.reborrow(), rest, self.weight(weight), shape, false);
        }
        backend.scale_columns(out, read(unscaled, out_len), read(gains, *outputs), is_noisy);
    }

    /// Begins the backward pass of a layer with the gradient of its output: computes the gradients of `u` and `h`, and
    /// those of B and of the magnitudes.
    pub(crate) fn begin_backward(
        &self,
        linear: &mut Linear<'_, B>,
        into: &mut B::Buffer<f32>,
        trainable: &Trainable,
        upstream: Acts<'_, B>,
    ) {
        let Linear { places, number: (layer, matrix), kept, adapters } = linear.reborrow();
        let LinearPlaces { outputs, adapter, .. } = places;
        let (Some(adapter), Some(KeptAdapter { inner, unscaled })) = (adapter, kept) else { return };
        let AdapterPlaces { b, magnitude, rank, scale, .. } = adapter;
        let (backend, rows) = (self.backend, self.rows);
        let place = |range| trainable.place(range).expect("an adapter is trained");
        let Adapters { norms, inner: inner_gradient, outer, .. } = adapters;
        let (out_len, inner_len) = (rows * outputs, rows * rank);
        let upstream = if let (Some(magnitude), Some(unscaled)) = (magnitude, unscaled) {
            let Norms { gains, .. } =
                norms[layer][matrix].as_ref().expect("norms are planned for each matrix with magnitudes");
            backend.scale_columns_backward(
                write(outer, out_len),
                ViewMut::new(into, place(magnitude)),
                upstream,
                read(unscaled, out_len),
                read(gains, 2 * outputs),
            );
            read(outer, out_len)
        } else {
            upstream
        };
        let shape = self.shape(*rank, *outputs);
        let of_b = ViewMut::new(into, place(b));
        backend.linear_backward_weight(of_b, upstream.clone(), read(inner, inner_len), shape);
        let weight = self.weight(b);
        backend.linear_backward_input(write(inner_gradient, inner_len), upstream, weight, shape, false);
        backend.scale(write(inner_gradient, inner_len), *scale);
    }

    /// The gradient of the weights of a layer, or of A, from the gradient of its output and its input.
    pub(crate) fn backward_weight(
        &self,
        linear: &mut Linear<'_, B>,
        into: &mut B::Buffer<f32>,
        trainable: &Trainable,
        upstream: Acts<'_, B>,
        x: Acts<'_, B>,
    ) {
        let Linear { places, adapters, .. } = linear.reborrow();
        let LinearPlaces { weight, inputs, outputs, adapter } = places;
        if let Some(place) = trainable.place(weight) {
            let shape = self.shape(*inputs, *outputs);
            return self.backend.linear_backward_weight(ViewMut::new(into, place), upstream, x, shape);
        }
        let Some(adapter) = adapter else { return };
        let Adapters { inner, dropped, .. } = adapters;
        let x_len = self.rows * inputs;
        let noisy = match self.dropout(adapter) {
            Some(dropout) => {
                self.backend.dropout(write(dropped, x_len), x, dropout, *inputs, DropoutPart::Kept, false);
                read(dropped, x_len)
            }
            None => x,
        };
        let place = trainable.place(&adapter.a).expect("an adapter is trained");
        self.backend.linear_backward_weight(
            ViewMut::new(into, place),
            read(inner, self.rows * adapter.rank),
            noisy,
            self.shape(*inputs, adapter.rank),
        );
    }

    /// The gradient of the input of a layer from that of its output.
    pub(crate) fn backward_input(
        &self,
        linear: &mut Linear<'_, B>,
        mut out: ActsMut<'_, B>,
        upstream: Acts<'_, B>,
    ) {
        let Linear { places, adapters, .. } = linear.reborrow();
        let LinearPlaces { weight, inputs, outputs, adapter } = places;
        let (backend, shape) = (self.backend, self.shape(*inputs, *outputs));
        let weight = || self.weight(weight);
        let Some(adapter) = adapter else {
            return backend.linear_backward_input(out, upstream, weight(), shape, false);
        };
        let Adapters { inner, outer, dropped, .. } = adapters;
        let (x_len, inner) = (self.rows * inputs, read(inner, self.rows * adapter.rank));
        let (a, of_a) = (self.weight(&adapter.a), self.shape(*inputs, adapter.rank));
        let outer = adapter.magnitude.is_some().then(|| read(outer, self.rows * outputs));
        let Some(dropout) = self.dropout(adapter) else {
            backend.linear_backward_input(out.reborrow(), outer.unwrap_or(upstream), weight(), shape, false);
            return backend.linear_backward_input(out.reborrow(), inner, a, of_a, true);
        };
        if let Some(outer) = outer {
            backend.linear_backward_input(write(dropped, x_len), upstream, weight(), shape, false);
            let rest = read(dropped, x_len);
            backend.dropout(out.reborrow(), rest, dropout.clone(), *inputs, DropoutPart::Rest, false);
            backend.linear_backward_input(write(dropped, x_len), outer, weight(), shape, false);
            backend.linear_backward_input(write(dropped, x_len), inner, a, of_a, true);
        } else {
            backend.linear_backward_input(out.reborrow(), upstream, weight(), shape, false);
            backend.linear_backward_input(write(dropped, x_len), inner, a, of_a, false);
        }
        backend.dropout(out.reborrow(), read(dropped, x_len), dropout, *inputs, DropoutPart::Kept, true);
    }
}
