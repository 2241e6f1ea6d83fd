//! The CPU backend: Rust loops on its own thread pool.
//!
//! This module only turns views into slices and enters the pool. The computations are in [`kernels`].

#[expect(
    unsafe_code,
    clippy::inline_always,
    reason = "vectorised versions, disjoint blocks and the matrix product; see the module"
)]
mod kernels;
mod training;

use std::sync::Arc;

use kernels::cache::{self, Cache};
pub use kernels::head::cross_entropy;
use kernels::norm::{self, RopeTables};
pub use kernels::roofline::Memory;
use kernels::weights::Weights;
use kernels::{head, swiglu};
use rayon::ThreadPool;
use tracing::trace_span;
use ulmus_plan::Precision;

use ulmus_backend::{
    Backend, BackendError, CacheFormat, Element, Forks, Heads, In, Norm, Out, Rope, Spans, WeightFormat,
    greedy_rows,
};

/// The CPU as a device. Results are bit-identical for any number of threads.
#[derive(Debug, Clone)]
pub struct Cpu {
    pool: Arc<ThreadPool>,
    precision: Precision,
}

impl Cpu {
    /// Starts a pool of `threads` threads, or of one if `threads` is 0.
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

    /// Runs a kernel on the pool, within its tracing span.
    fn kernel<R: Send>(&self, span: tracing::Span, work: impl FnOnce() -> R + Send) -> R {
        let _entered = span.entered();
        self.pool.install(work)
    }

    /// Multiplies and adds in registers on every thread, as fast as the processor can, for about a tenth of a second.
    /// Returns the number of operations of all threads (the caller measures the time), or `None` if the processor has
    /// no instruction for this precision.
    pub fn saturate(&self, precision: Precision) -> Option<f64> {
        self.pool.broadcast(|_| kernels::roofline::saturate(precision)).into_iter().sum()
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

impl<'a> From<Norm<'a, Vec<f32>>> for norm::Norm<'a> {
    fn from(norm: Norm<'a, Vec<f32>>) -> Self {
        Self { kind: norm.kind, weight: norm.weight.slice(), scratch: norm.scratch.slice() }
    }
}

impl<'a> From<Rope<'a, Cpu>> for RopeTables<'a> {
    fn from(rope: Rope<'a, Cpu>) -> Self {
        Self { cos: rope.cos.slice(), sin: rope.sin.slice(), first: rope.first.slice(), length: rope.length }
    }
}

impl<'a> From<Spans<'a, Cpu>> for cache::Spans<'a> {
    fn from(spans: Spans<'a, Cpu>) -> Self {
        Self { sequences: spans.sequences.slice(), first: spans.first.slice(), length: spans.length }
    }
}

impl Backend for Cpu {
    type Buffer<T: Element> = Vec<T>;
    type Activations = Vec<f32>;
    type Graph = ();
    type Weights = Weights;
    type Cache = Cache;

    fn describe(&self) -> String {
        match self.threads() {
            1 => "cpu, 1 thread".to_owned(),
            threads => format!("cpu, {threads} threads"),
        }
    }

    fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    fn allocate<T: Element>(&self, len: usize) -> Result<Vec<T>, BackendError> {
        let mut buffer = Vec::new();
        buffer
            .try_reserve_exact(len)
            .map_err(|_| BackendError::OutOfMemory { bytes: len * size_of::<T>() })?;
        // Writing the zeros maps the pages now, so that a lack of memory shows at the start and not at some later step.
        buffer.resize(len, T::zeroed());
        Ok(buffer)
    }

    fn activation_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn activations(&self, len: usize) -> Result<Vec<f32>, BackendError> {
        self.allocate(len)
    }

    fn set_activations(&self, to: Out<'_, Self>, from: &[f32]) {
        self.upload(to, from);
    }

    fn read_activations(&self, from: In<'_, Self>, to: &mut [f32]) {
        self.download(from, to);
    }

    fn upload<T: Element>(&self, to: Out<'_, Self, T>, from: &[T]) {
        to.slice().copy_from_slice(from);
    }

    fn download<T: Element>(&self, from: In<'_, Self, T>, to: &mut [T]) {
        to.copy_from_slice(from.slice());
    }

    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    fn replay(&self, (): &mut (), work: impl FnOnce() + Send) {
        self.run(work);
    }

    fn norm(&self, out: Out<'_, Self>, x: In<'_, Self>, norm: Norm<'_, Vec<f32>>) {
        let (out, x, norm) = (out.slice(), x.slice(), norm::Norm::from(norm));
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
        let (x, delta, norm) = (x.slice(), delta.slice(), norm::Norm::from(norm));
        self.kernel(trace_span!("norm"), || norm.add_forward(sum, out, x, delta));
    }

    fn qk_norm_rope(
        &self,
        out: Out<'_, Self>,
        packed: In<'_, Self>,
        norm: Norm<'_, Vec<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    ) {
        let (out, packed, norm, rope) =
            (out.slice(), packed.slice(), norm::Norm::from(norm), RopeTables::from(rope));
        self.kernel(trace_span!("qk_norm_rope"), || norm.heads(out, packed, rope, heads));
    }

    fn swiglu(&self, out: Out<'_, Self>, x: In<'_, Self>, width: usize) {
        let (out, x) = (out.slice(), x.slice());
        self.kernel(trace_span!("swiglu"), || swiglu::swiglu(out, x, width));
    }

    fn weights(&self, values: &[f32], outputs: usize, format: WeightFormat) -> Result<Weights, BackendError> {
        self.pool.install(|| Weights::new(values, outputs, format))
    }

    fn gather(&self, out: Out<'_, Self>, x: In<'_, Self>, rows: In<'_, Self, u32>, width: usize) {
        let _span = trace_span!("gather").entered();
        let x = x.slice();
        for (out, row) in out.slice().chunks_exact_mut(width).zip(rows.slice()) {
            out.copy_from_slice(&x[*row as usize * width..][..width]);
        }
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
    ) -> Result<Cache, BackendError> {
        Cache::new(sequences, capacity, heads, format)
    }

    fn fork(&self, cache: &mut Cache, forks: Forks<'_, Self>) {
        let (from, to, positions) = (forks.from.slice(), forks.to.slice(), forks.positions.slice());
        self.kernel(trace_span!("fork"), || cache.fork(from, to, positions));
    }

    fn cached_attention(
        &self,
        out: Out<'_, Self>,
        cache: &mut Cache,
        packed: In<'_, Self>,
        spans: Spans<'_, Self>,
    ) {
        let (out, packed, spans) = (out.slice(), packed.slice(), spans.into());
        self.kernel(trace_span!("attention"), || cache.attend(out, packed, spans));
    }

    fn greedy(&self, out: Out<'_, Self, u32>, logits: In<'_, Self>) {
        greedy_rows(out.slice(), logits.slice());
    }

    fn cross_entropy(&self, out: Out<'_, Self>, logits: Out<'_, Self>, targets: In<'_, Self, u32>) {
        let (out, logits, targets) = (out.slice(), logits.slice(), targets.slice());
        self.kernel(trace_span!("cross_entropy"), || head::cross_entropy(out, logits, targets));
    }
}
