//! The operations of the CPU backend that only training needs.

use std::convert::Infallible;
use std::ops::Range;

use tracing::trace_span;
use ulmus_backend::{
    AdamW, AttentionShape, Backend, BackendError, CommunicatorError, CommunicatorId, Dropout, DropoutPart,
    Element, GiveUp, HeadGradients, Heads, HostCopy, In, LinearShape, LowRank, Norm, Out, Quantum, Rope,
    TrainingBackend, View, ViewMut,
};

use super::Cpu;
use super::kernels::attention::{self, Upstream};
use super::kernels::norm::{self, RopeTables};
use super::kernels::view::Output;
use super::kernels::{adapter, head, linear, optimizer, swiglu};

/// What a matrix product does with what its output holds.
fn output(accumulate: bool) -> Output {
    if accumulate { Output::Accumulate } else { Output::Overwrite }
}

impl<'a> From<Dropout<'a, Cpu>> for adapter::Noise<'a> {
    fn from(dropout: Dropout<'a, Cpu>) -> Self {
        let Dropout { sequences, length, positions, key, rate } = dropout;
        Self { sequences: sequences.slice(), length, positions: positions.slice(), key, rate }
    }
}

impl<'a> From<LowRank<'a, Cpu>> for adapter::Matrix<'a> {
    fn from(matrix: LowRank<'a, Cpu>) -> Self {
        let (outputs, rank) = (matrix.outputs(), matrix.rank());
        let LowRank { weight, a, b, scale, inputs } = matrix;
        let (weight, a, b) = (weight.slice(), a.slice(), b.slice());
        Self { weight, a, b, scale, inputs, outputs, rank }
    }
}

impl Cpu {
    fn no_communicators(&self) -> CommunicatorError {
        CommunicatorError::Unsupported { device: self.describe() }
    }
}

impl TrainingBackend for Cpu {
    const HEAD_ROWS: usize = ulmus_plan::HEAD_ROWS;
    type Parameters = Vec<f32>;
    type Communicator = Infallible;

    fn parameter_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn parameters(&self, len: usize) -> Result<Vec<f32>, BackendError> {
        self.allocate(len)
    }

    fn values<'a>(&self, parameters: In<'a, Self>) -> In<'a, Self> {
        parameters
    }

    fn write_values<R>(&self, parameters: Out<'_, Self>, work: impl FnOnce(Out<'_, Self>) -> R) -> R {
        work(parameters)
    }

    fn on_host<T: Element, R>(&self, buffer: Out<'_, Self, T>, work: impl FnOnce(&mut [T]) -> R) -> R {
        work(buffer.slice())
    }

    fn begin_copy(&self, from: In<'_, Self>) -> Box<dyn HostCopy> {
        Box::new(from.slice().to_vec())
    }

    fn finish_copies(&self) {}

    fn communicates(&self) -> Result<bool, CommunicatorError> {
        Ok(false)
    }

    fn communicator_id(&self) -> Result<CommunicatorId, CommunicatorError> {
        Err(self.no_communicators())
    }

    fn communicator(
        &self,
        _: &CommunicatorId,
        _: usize,
        _: usize,
        _: GiveUp<'_>,
    ) -> Result<Infallible, CommunicatorError> {
        Err(self.no_communicators())
    }

    fn begin_reduce_scatter(
        &self,
        communicator: &mut Infallible,
        _: Out<'_, Self, i64>,
        _: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        match *communicator {}
    }

    fn finish_reductions(
        &self,
        communicator: &mut Infallible,
        _: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        match *communicator {}
    }

    fn all_gather(
        &self,
        communicator: &mut Infallible,
        _: Out<'_, Self>,
        _: &[Range<usize>],
        _: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        match *communicator {}
    }

    fn broadcast(
        &self,
        communicator: &mut Infallible,
        _: usize,
        _: Out<'_, Self>,
        _: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        match *communicator {}
    }

    fn serialize_kernels(&self) -> bool {
        false
    }

    fn choose_algorithms<R>(
        &self,
        _: Option<&str>,
        work: impl FnOnce() -> R,
    ) -> Result<(R, Option<String>), BackendError> {
        Ok((work(), None))
    }

    fn embed(&self, out: Out<'_, Self>, table: In<'_, Self>, ids: In<'_, Self, u32>, width: usize) {
        let _span = trace_span!("embed").entered();
        linear::embed(out.slice(), table.slice(), ids.slice(), width);
    }

    fn embed_backward(
        &self,
        table_gradient: Out<'_, Self>,
        gradient: In<'_, Self>,
        ids: In<'_, Self, u32>,
        width: usize,
        accumulate: bool,
    ) {
        let _span = trace_span!("embed").entered();
        let table_gradient = table_gradient.slice();
        if !accumulate {
            table_gradient.fill(0.0);
        }
        linear::embed_backward(table_gradient, gradient.slice(), ids.slice(), width);
    }

    fn linear(
        &self,
        out: Out<'_, Self>,
        x: In<'_, Self>,
        weight: In<'_, Self>,
        shape: LinearShape,
        accumulate: bool,
    ) {
        let (out, x, weight) = (out.slice(), x.slice(), weight.slice());
        self.kernel(trace_span!("linear"), || {
            linear::linear(out, x, weight, shape, output(accumulate), self.precision);
        });
    }

    fn linear_backward_weight(
        &self,
        weight_gradient: Out<'_, Self>,
        gradient: In<'_, Self>,
        x: In<'_, Self>,
        shape: LinearShape,
    ) {
        let (into, gradient, x) = (weight_gradient.slice(), gradient.slice(), x.slice());
        self.kernel(trace_span!("linear"), || {
            linear::linear_backward_weight(into, gradient, x, shape, Output::Overwrite, self.precision);
        });
    }

    fn linear_backward_input(
        &self,
        x_gradient: Out<'_, Self>,
        gradient: In<'_, Self>,
        weight: In<'_, Self>,
        shape: LinearShape,
        accumulate: bool,
    ) {
        let (into, gradient, weight) = (x_gradient.slice(), gradient.slice(), weight.slice());
        self.kernel(trace_span!("linear"), || {
            linear::linear_backward_input(into, gradient, weight, shape, output(accumulate), self.precision);
        });
    }

    fn scale(&self, x: Out<'_, Self>, factor: f32) {
        let x = x.slice();
        self.kernel(trace_span!("adapter"), || adapter::scale(x, factor));
    }

    fn scatter(&self, out: Out<'_, Self>, x: In<'_, Self>, rows: In<'_, Self, u32>, width: usize) {
        let _span = trace_span!("gather").entered();
        linear::scatter(out.slice(), x.slice(), rows.slice(), width);
    }

    fn gather_add(&self, out: Out<'_, Self>, x: In<'_, Self>, rows: In<'_, Self, u32>, width: usize) {
        let _span = trace_span!("gather").entered();
        linear::gather_add(out.slice(), x.slice(), rows.slice(), width);
    }

    fn dropout(
        &self,
        out: Out<'_, Self>,
        x: In<'_, Self>,
        dropout: Dropout<'_, Self>,
        width: usize,
        part: DropoutPart,
        accumulate: bool,
    ) {
        let (out, x) = (out.slice(), x.slice());
        let noise = adapter::Noise::from(dropout);
        self.kernel(trace_span!("adapter"), || adapter::dropout(out, x, &noise, width, part, accumulate));
    }

    fn gains(
        &self,
        gains: Out<'_, Self>,
        magnitude: In<'_, Self>,
        squares: In<'_, Self>,
        matrix: LowRank<'_, Self>,
        scratch: Out<'_, Self>,
    ) {
        let (gains, magnitude, squares, scratch) =
            (gains.slice(), magnitude.slice(), squares.slice(), scratch.slice());
        let matrix = adapter::Matrix::from(matrix);
        self.kernel(trace_span!("adapter"), || adapter::gains(gains, magnitude, squares, &matrix, scratch));
    }

    fn scale_columns(&self, out: Out<'_, Self>, x: In<'_, Self>, gains: In<'_, Self>, accumulate: bool) {
        let (out, x, gains) = (out.slice(), x.slice(), gains.slice());
        self.kernel(trace_span!("adapter"), || adapter::scale_columns(out, x, gains, accumulate));
    }

    fn scale_columns_backward(
        &self,
        x_gradient: Out<'_, Self>,
        magnitude_gradient: Out<'_, Self>,
        gradient: In<'_, Self>,
        x: In<'_, Self>,
        gains: In<'_, Self>,
    ) {
        let (x_gradient, magnitude_gradient) = (x_gradient.slice(), magnitude_gradient.slice());
        let (gradient, x, gains) = (gradient.slice(), x.slice(), gains.slice());
        self.kernel(trace_span!("adapter"), || {
            adapter::scale_columns_backward(x_gradient, magnitude_gradient, gradient, x, gains);
        });
    }

    fn norm_backward(
        &self,
        x_gradient: Out<'_, Self>,
        weight_gradient: Option<Out<'_, Self>>,
        gradient: In<'_, Self>,
        x: In<'_, Self>,
        norm: Norm<'_, Vec<f32>>,
        accumulate: bool,
    ) {
        let (x_gradient, weight_gradient) = (x_gradient.slice(), weight_gradient.map(ViewMut::slice));
        let (gradient, x, norm) = (gradient.slice(), x.slice(), norm::Norm::from(norm));
        self.kernel(trace_span!("norm"), || {
            norm.backward(x_gradient, weight_gradient, gradient, x, accumulate);
        });
    }

    fn qk_norm_rope_backward(
        &self,
        packed: Out<'_, Self>,
        weights_gradient: Option<Out<'_, Self>>,
        gradient: In<'_, Self>,
        norm: Norm<'_, Vec<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    ) {
        let (packed, gradient) = (packed.slice(), gradient.slice());
        let weights_into = weights_gradient.map(ViewMut::slice);
        let (norm, rope) = (norm::Norm::from(norm), RopeTables::from(rope));
        self.kernel(trace_span!("qk_norm_rope"), || {
            norm.heads_backward(packed, weights_into, gradient, rope, heads);
        });
    }

    fn attention(
        &self,
        out: Out<'_, Self>,
        lse: Out<'_, Self>,
        packed: In<'_, Self>,
        doc_starts: In<'_, Self, u32>,
        shape: AttentionShape,
    ) {
        let (out, lse, packed, doc_starts) = (out.slice(), lse.slice(), packed.slice(), doc_starts.slice());
        self.kernel(trace_span!("attention"), || {
            attention::attention(out, lse, packed, doc_starts, shape, self.precision);
        });
    }

    fn attention_backward(
        &self,
        packed_gradient: Out<'_, Self>,
        gradient: In<'_, Self>,
        out: In<'_, Self>,
        lse: In<'_, Self>,
        packed: In<'_, Self>,
        doc_starts: In<'_, Self, u32>,
        shape: AttentionShape,
    ) {
        let (into, packed, doc_starts) = (packed_gradient.slice(), packed.slice(), doc_starts.slice());
        let upstream = Upstream { gradient: gradient.slice(), out: out.slice(), lse: lse.slice() };
        self.kernel(trace_span!("attention"), || {
            attention::attention_backward(into, upstream, packed, doc_starts, shape, self.precision);
        });
    }

    fn swiglu_backward(&self, x: Out<'_, Self>, gradient: Out<'_, Self>, width: usize) {
        let (x, gradient) = (x.slice(), gradient.slice());
        self.kernel(trace_span!("swiglu"), || swiglu::swiglu_backward(x, gradient, width));
    }

    fn head_loss(
        &self,
        cross_entropy: Out<'_, Self>,
        lse: Out<'_, Self>,
        gradients: Option<HeadGradients<'_, Self>>,
        hidden: In<'_, Self>,
        table: In<'_, Self>,
        targets: In<'_, Self, u32>,
        logits: Out<'_, Self>,
        shape: LinearShape,
    ) {
        let (cross_entropy, lse, logits) = (cross_entropy.slice(), lse.slice(), logits.slice());
        let (hidden, table, targets) = (hidden.slice(), table.slice(), targets.slice());
        let gradients = gradients.map(|gradients| head::Gradients {
            hidden: gradients.hidden.slice(),
            table: gradients.table.map(ViewMut::slice),
            row_weights: gradients.row_weights.map(View::slice),
            z_loss: gradients.z_loss,
        });
        self.kernel(trace_span!("head_loss"), || {
            head::head_loss(
                cross_entropy,
                lse,
                gradients,
                hidden,
                table,
                targets,
                logits,
                shape,
                self.precision,
            );
        });
    }

    fn adamw(
        &self,
        weights: Out<'_, Self>,
        first: Out<'_, Self>,
        second: Out<'_, Self>,
        gradient: In<'_, Self>,
        step: AdamW,
    ) {
        let (weights, first, second, gradient) =
            (weights.slice(), first.slice(), second.slice(), gradient.slice());
        self.kernel(trace_span!("adamw"), || optimizer::adamw(weights, first, second, gradient, step));
    }

    fn block_squares(&self, sums: &mut [f64], x: In<'_, Self>) {
        let x = x.slice();
        self.kernel(trace_span!("block_squares"), || optimizer::block_squares(sums, x));
    }

    fn quantise(
        &self,
        sums: Out<'_, Self, i64>,
        outside: Out<'_, Self, u32>,
        gradient: In<'_, Self>,
        quantum: &Quantum,
        accumulate: bool,
    ) {
        let (sums, outside, gradient) = (sums.slice(), &mut outside.slice()[0], gradient.slice());
        self.kernel(trace_span!("quantise"), || {
            optimizer::quantise(sums, outside, gradient, quantum, accumulate);
        });
    }

    fn quantise_mean(
        &self,
        gradient: Out<'_, Self>,
        outside: Out<'_, Self, u32>,
        quantum: &Quantum,
        scale: f64,
    ) {
        let (gradient, outside) = (gradient.slice(), &mut outside.slice()[0]);
        self.kernel(trace_span!("quantise"), || optimizer::quantise_mean(gradient, outside, quantum, scale));
    }

    fn dequantise(&self, mean: Out<'_, Self>, sums: In<'_, Self, i64>, scale: f64) {
        let (mean, sums) = (mean.slice(), sums.slice());
        self.kernel(trace_span!("quantise"), || optimizer::dequantise(mean, sums, scale));
    }
}
