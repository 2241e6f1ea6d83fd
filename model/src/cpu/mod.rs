//! The CPU backend: Rust loops on a thread pool of its own.
//!
//! This module only turns views into slices and enters the pool; what is computed is in [`kernels`].

#[expect(
    unsafe_code,
    clippy::inline_always,
    reason = "vectorised versions, disjoint blocks and the matrix product; see the module"
)]
mod kernels;

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use kernels::attention::{self, Upstream};
use kernels::cache::{self, Cache};
use kernels::matrix::Output;
use kernels::norm::{self, RopeTables};
pub use kernels::peak::Memory;
use kernels::weights::Weights;
use kernels::{head, linear, optimizer, swiglu};
use rayon::ThreadPool;
use tracing::trace_span;
use ulmus_plan::Precision;

use crate::backend::{
    AdamW, AttentionShape, Backend, Element, HeadGradients, Heads, In, LinearShape, Norm, Out, Rope, Spans,
    View, ViewMut,
};
use crate::cuda::{CommunicatorId, NcclError, Patience};
use crate::error::ModelError;
use crate::exact::Quantum;
use crate::format::{CacheFormat, WeightFormat};
use crate::generate::greedy;

/// The CPU as a device. Results have the same bits for any number of threads.
#[derive(Debug, Clone)]
pub struct Cpu {
    pool: Arc<ThreadPool>,
    precision: Precision,
}

impl Cpu {
    /// A pool of that many threads, at least one.
    ///
    /// # Panics
    /// If the system refuses to start threads.
    pub fn new(threads: usize) -> Self {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|thread| format!("compute-{thread}"))
            .build()
            .expect("a system that cannot start threads cannot train");
        Self { pool: Arc::new(pool), precision: Precision::default() }
    }

    /// Does the work of a kernel, in a span of its name.
    fn kernel<R: Send>(&self, span: tracing::Span, work: impl FnOnce() -> R + Send) -> R {
        let _entered = span.entered();
        self.pool.install(work)
    }

    /// Multiplies and adds in registers on every thread, as fast as the processor can, for about a tenth of a second;
    /// gives the operations of all threads, and the caller has the clock. Nothing if there is no instruction for it.
    pub fn saturate(&self, precision: Precision) -> Option<f64> {
        self.pool.broadcast(|_| kernels::peak::saturate(precision)).into_iter().sum()
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

impl<'a, T> View<'a, Vec<T>> {
    fn slice(self) -> &'a [T] {
        &self.buffer[self.range]
    }
}

impl<'a, T> ViewMut<'a, Vec<T>> {
    fn slice(self) -> &'a mut [T] {
        &mut self.buffer[self.range]
    }
}

impl<'a> Norm<'a, Vec<f32>> {
    fn slices(self) -> norm::Norm<'a> {
        norm::Norm { kind: self.kind, weight: self.weight.slice(), scratch: self.scratch.slice() }
    }
}

impl<'a> Rope<'a, Cpu> {
    fn tables(self) -> RopeTables<'a> {
        RopeTables {
            cos: self.cos.slice(),
            sin: self.sin.slice(),
            first: self.first.slice(),
            length: self.length,
        }
    }
}

impl<'a> Spans<'a, Cpu> {
    fn slices(self) -> cache::Spans<'a> {
        cache::Spans { sequences: self.sequences.slice(), first: self.first.slice(), length: self.length }
    }
}

impl Backend for Cpu {
    const HEAD_ROWS: usize = ulmus_plan::HEAD_ROWS;

    type Buffer<T: Element> = Vec<T>;
    type Activations = Vec<f32>;
    type Parameters = Vec<f32>;
    type Graph = ();
    type Weights = Weights;
    type Cache = Cache;
    type Communicator = Infallible;

    fn describe(&self) -> String {
        format!("cpu, {} threads", self.threads())
    }

    fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    fn allocate<T: Element>(&self, len: usize) -> Result<Vec<T>, ModelError> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).map_err(|_| ModelError::OutOfMemory { bytes: len * size_of::<T>() })?;
        // Writing the zeros takes the pages now: what does not fit fails at the start, not at some later step.
        buffer.resize(len, T::zeroed());
        Ok(buffer)
    }

    fn activation_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn activations(&self, len: usize) -> Result<Vec<f32>, ModelError> {
        self.allocate(len)
    }

    fn set_activations(&self, to: Out<'_, Self>, from: &[f32]) {
        self.upload(to, from);
    }

    fn read_activations(&self, from: In<'_, Self>, to: &mut [f32]) {
        self.download(from, to);
    }

    fn parameter_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn parameters(&self, len: usize) -> Result<Vec<f32>, ModelError> {
        self.allocate(len)
    }

    fn values<'a>(&self, parameters: In<'a, Self>) -> In<'a, Self> {
        parameters
    }

    fn write_values<R>(&self, parameters: Out<'_, Self>, work: impl FnOnce(Out<'_, Self>) -> R) -> R {
        work(parameters)
    }

    fn upload<T: Element>(&self, to: Out<'_, Self, T>, from: &[T]) {
        to.slice().copy_from_slice(from);
    }

    fn download<T: Element>(&self, from: In<'_, Self, T>, to: &mut [T]) {
        to.copy_from_slice(from.slice());
    }

    fn on_host<T: Element, R>(&self, buffer: Out<'_, Self, T>, work: impl FnOnce(&mut [T]) -> R) -> R {
        work(buffer.slice())
    }

    fn communicates(&self) -> Result<bool, NcclError> {
        Ok(false)
    }

    fn communicator(
        &self,
        _: &CommunicatorId,
        _: usize,
        _: usize,
        _: Patience<'_>,
    ) -> Result<Infallible, NcclError> {
        Err(NcclError::Library { problem: "processors have no communicators".to_owned() })
    }

    fn begin_reduce_scatter(
        &self,
        communicator: &mut Infallible,
        _: Out<'_, Self, i64>,
        _: Patience<'_>,
    ) -> Result<(), NcclError> {
        match *communicator {}
    }

    fn finish_reductions(&self, communicator: &mut Infallible, _: Patience<'_>) -> Result<(), NcclError> {
        match *communicator {}
    }

    fn all_gather(
        &self,
        communicator: &mut Infallible,
        _: Out<'_, Self>,
        _: &[Range<usize>],
        _: Patience<'_>,
    ) -> Result<(), NcclError> {
        match *communicator {}
    }

    fn broadcast(
        &self,
        communicator: &mut Infallible,
        _: usize,
        _: Out<'_, Self>,
        _: Patience<'_>,
    ) -> Result<(), NcclError> {
        match *communicator {}
    }

    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    fn time_kernels_apart(&self) -> bool {
        false
    }

    fn choose_algorithms<R>(
        &self,
        _: Option<&str>,
        work: impl FnOnce() -> R,
    ) -> Result<(R, Option<String>), ModelError> {
        Ok((work(), None))
    }

    fn replay(&self, (): &mut (), work: impl FnOnce() + Send) {
        self.run(work);
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
    ) {
        let _span = trace_span!("embed").entered();
        linear::embed_backward(table_gradient.slice(), gradient.slice(), ids.slice(), width);
    }

    fn linear(&self, out: Out<'_, Self>, x: In<'_, Self>, weight: In<'_, Self>, shape: LinearShape) {
        let (out, x, weight) = (out.slice(), x.slice(), weight.slice());
        self.kernel(trace_span!("linear"), || linear::linear(out, x, weight, shape, self.precision));
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
    ) {
        let (into, gradient, weight) = (x_gradient.slice(), gradient.slice(), weight.slice());
        self.kernel(trace_span!("linear"), || {
            linear::linear_backward_input(into, gradient, weight, shape, self.precision);
        });
    }

    fn norm(&self, out: Out<'_, Self>, x: In<'_, Self>, norm: Norm<'_, Vec<f32>>) {
        let (out, x, norm) = (out.slice(), x.slice(), norm.slices());
        self.kernel(trace_span!("norm"), || norm.forward(out, x));
    }

    fn add_norm(
        &self,
        sum: Out<'_, Self>,
        out: Out<'_, Self>,
        x: In<'_, Self>,
        delta: In<'_, Self>,
        norm: Norm<'_, Vec<f32>>,
    ) {
        let (sum, out) = (sum.slice(), out.slice());
        let (x, delta, norm) = (x.slice(), delta.slice(), norm.slices());
        self.kernel(trace_span!("norm"), || norm.add_forward(sum, out, x, delta));
    }

    fn norm_backward(
        &self,
        x_gradient: Out<'_, Self>,
        weight_gradient: Out<'_, Self>,
        gradient: In<'_, Self>,
        x: In<'_, Self>,
        norm: Norm<'_, Vec<f32>>,
        accumulate: bool,
    ) {
        let (x_gradient, weight_gradient) = (x_gradient.slice(), weight_gradient.slice());
        let (gradient, x, norm) = (gradient.slice(), x.slice(), norm.slices());
        self.kernel(trace_span!("norm"), || {
            norm.backward(x_gradient, weight_gradient, gradient, x, accumulate);
        });
    }

    fn qk_norm_rope(
        &self,
        out: Out<'_, Self>,
        packed: In<'_, Self>,
        norm: Norm<'_, Vec<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    ) {
        let (out, packed, norm, rope) = (out.slice(), packed.slice(), norm.slices(), rope.tables());
        self.kernel(trace_span!("qk_norm_rope"), || norm.heads(out, packed, rope, heads));
    }

    fn qk_norm_rope_backward(
        &self,
        packed: Out<'_, Self>,
        weights_gradient: Out<'_, Self>,
        gradient: In<'_, Self>,
        norm: Norm<'_, Vec<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    ) {
        let (packed, weights_into, gradient) = (packed.slice(), weights_gradient.slice(), gradient.slice());
        let (norm, rope) = (norm.slices(), rope.tables());
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

    fn swiglu(&self, out: Out<'_, Self>, x: In<'_, Self>, width: usize) {
        let (out, x) = (out.slice(), x.slice());
        self.kernel(trace_span!("swiglu"), || swiglu::swiglu(out, x, width));
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
            table: gradients.table.slice(),
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

    fn weights(&self, values: &[f32], outputs: usize, format: WeightFormat) -> Result<Weights, ModelError> {
        self.pool.install(|| Weights::new(values, outputs, format))
    }

    fn embed_weights(&self, out: Out<'_, Self>, table: &Weights, ids: In<'_, Self, u32>) {
        let _span = trace_span!("embed").entered();
        table.embed(out.slice(), ids.slice());
    }

    fn linear_weights(&self, out: Out<'_, Self>, x: In<'_, Self>, weights: &Weights, rows: usize) {
        let (out, x) = (out.slice(), x.slice());
        self.kernel(trace_span!("linear"), || weights.linear(out, x, rows));
    }

    fn logits(&self, out: Out<'_, Self>, x: In<'_, Self>, table: &Weights, rows: usize) {
        self.linear_weights(out, x, table, rows);
    }

    fn cache(
        &self,
        sequences: usize,
        capacity: usize,
        heads: Heads,
        format: CacheFormat,
    ) -> Result<Cache, ModelError> {
        Cache::new(sequences, capacity, heads, format)
    }

    fn cached_attention(
        &self,
        out: Out<'_, Self>,
        cache: &mut Cache,
        packed: In<'_, Self>,
        spans: Spans<'_, Self>,
    ) {
        let (out, packed, spans) = (out.slice(), packed.slice(), spans.slices());
        self.kernel(trace_span!("attention"), || cache.attend(out, packed, spans));
    }

    fn greedy(&self, out: Out<'_, Self, u32>, logits: In<'_, Self>) {
        let (out, logits) = (out.slice(), logits.slice());
        let rows = logits.chunks_exact(logits.len() / out.len());
        out.iter_mut().zip(rows).for_each(|(out, logits)| *out = greedy(logits));
    }

    fn cross_entropy(&self, out: Out<'_, Self>, logits: Out<'_, Self>, targets: In<'_, Self, u32>) {
        let (out, logits, targets) = (out.slice(), logits.slice(), targets.slice());
        self.kernel(trace_span!("cross_entropy"), || head::cross_entropy(out, logits, targets));
    }
}
