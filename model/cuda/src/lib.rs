//! The CUDA backend for NVIDIA GPUs, which needs no CUDA toolkit.
//!
//! Kernels are CUDA C, compiled by NVRTC for the device at hand ([`program`] defines the variants). cublasLt computes
//! large matrix products. With [`Precision::Bf16`], activations, their gradients and a copy of the weights are in
//! bfloat16, and sums, gradients of weights, weights and moments in f32. With [`Precision::F32`], everything is in f32.
//!
//! This module chooses kernels, their variants and their grids. It does not access memory itself.

#[expect(unsafe_code, reason = "the layout of kernel arguments; see the module")]
mod arguments;
#[expect(unsafe_code, reason = "calls of a foreign library; see the module")]
mod compiler;
#[expect(unsafe_code, reason = "calls of a foreign library; see the module")]
mod driver;
#[expect(unsafe_code, reason = "calls of a foreign library; see the module")]
mod graph;
#[expect(unsafe_code, reason = "calls of a foreign library; see the module")]
mod handle;
#[expect(unsafe_code, reason = "calls of a foreign library; see the module")]
mod matmul;
#[expect(unsafe_code, reason = "calls of a foreign library; see the module")]
mod nccl;
mod norm;
#[expect(unsafe_code, reason = "calls of a foreign library; see the module")]
mod pinned;
mod program;
#[expect(unsafe_code, reason = "calls of a foreign library; see the module")]
mod stream;
mod training;
mod weights;

use std::marker::PhantomData;
use std::sync::Arc;

use arguments::HeadRows;
use driver::{Device, Memory};
pub(crate) use graph::Graph;
use handle::Address;
use matmul::Operand;
pub use nccl::Communicator;
use pinned::Copies;
use program::{Format, Program, Tiling, Variant};
use tracing::trace_span;
use ulmus_plan::Precision;
pub(crate) use weights::{Cache, Weights};

use ulmus_backend::{
    Acts, ActsMut, Backend, BackendError, CacheFormat, Element, Forks, Heads, In, Norm, Out, Rope, Spans,
    View, ViewMut, WeightFormat,
};

/// A GPU. Results are bit-identical on devices of the same kind with the same libraries.
#[derive(Debug, Clone)]
pub struct Cuda {
    device: Arc<Device>,
    copies: Arc<Copies>,
    /// Format of activations.
    format: Format,
}

impl Cuda {
    /// Number of GPUs that the driver shows to this process, or 0 without a driver.
    pub fn devices() -> usize {
        driver::count()
    }

    /// Bytes of memory that the GPU has.
    pub fn memory(&self) -> u64 {
        self.device.total_memory()
    }

    /// Opens the GPU with the number `ordinal`.
    ///
    /// # Errors
    /// [`BackendError::Device`] if there is no such GPU, it is too old, or a library is missing.
    pub fn new(ordinal: usize) -> Result<Self, BackendError> {
        let device = Device::open(ordinal)?;
        Ok(Self { copies: Arc::new(Copies::new(&device)), device, format: Format::F32 })
    }
}

/// A buffer of numbers on the device.
#[derive(Debug)]
pub struct Buffer<T> {
    memory: Memory,
    element: PhantomData<T>,
}

/// Activations, in the format of the backend that allocated them.
#[derive(Debug)]
pub struct Activations {
    memory: Memory,
    format: Format,
}

/// A view of memory on the device.
trait DeviceView {
    /// Address of the first element.
    fn address(&self) -> Address;
}

impl<T> DeviceView for View<'_, Buffer<T>> {
    fn address(&self) -> Address {
        self.buffer.memory.address().add(self.range.start * size_of::<T>())
    }
}

impl<T> DeviceView for ViewMut<'_, Buffer<T>> {
    fn address(&self) -> Address {
        self.buffer.memory.address().add(self.range.start * size_of::<T>())
    }
}

impl DeviceView for View<'_, Activations> {
    fn address(&self) -> Address {
        self.buffer.memory.address().add(self.range.start * self.buffer.format.bytes())
    }
}

impl DeviceView for ViewMut<'_, Activations> {
    fn address(&self) -> Address {
        self.buffer.memory.address().add(self.range.start * self.buffer.format.bytes())
    }
}

/// Launches a kernel: `launch!(cuda, program, vector, "name", blocks, threads, shared; arguments)`.
macro_rules! launch {
    ($cuda:expr, $program:expr, $vector:expr, $kernel:literal, $blocks:expr, $threads:expr, $shared:expr;
     $($argument:expr),+ $(,)?) => {{
        let variant = Variant { program: $program, activation: $cuda.format, vector: $vector };
        $cuda.device.launch(
            variant,
            $kernel,
            [$blocks, $threads],
            $shared,
            [$(&$argument as &dyn crate::arguments::Argument),+],
        );
    }};
}
use launch;

/// The span of a kernel. If kernels are serialized, it ends when the kernel is done.
struct Kernel<'a> {
    device: &'a Device,
    _span: tracing::span::EnteredSpan,
}

impl Drop for Kernel<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.device.wait_if_serialized();
        }
    }
}

/// A grid or block of one dimension.
fn line(blocks: usize) -> [usize; 3] {
    [blocks, 1, 1]
}

/// Number of threads per block in kernels with one thread per vector.
const THREADS: usize = 256;

impl Cuda {
    /// Enters the span of a kernel, which ends when the kernel is launched or, if kernels are serialized, done.
    fn kernel(&self, span: tracing::Span) -> Kernel<'_> {
        Kernel { device: &self.device, _span: span.entered() }
    }

    /// Number of activations to load at once: 16 bytes of them, if all widths and addresses allow it, or else one.
    fn vector(&self, widths: &[usize], addresses: &[Address]) -> usize {
        let most = 16 / self.format.bytes();
        let wide = widths.iter().all(|width| width.is_multiple_of(most))
            && addresses.iter().all(|address| address.0.is_multiple_of(16));
        if wide { most } else { 1 }
    }

    fn operand(&self, address: Address, stride: usize) -> Operand {
        Operand { address, format: self.format, stride }
    }

    /// `out = Σ partial[row]`.
    fn sum_rows(&self, out: Address, partial: Address, rows: usize, width: usize) {
        launch!(self, Program::Sums, 1, "sum_rows", line(width.div_ceil(32)), [32, 32, 1], 0;
            out, partial, rows as i32, width as i32);
    }
}

/// The block shapes of the kernels in attention.cu.
#[derive(Debug, Clone, Copy)]
struct Tilings {
    forward: Tiling,
    /// Block shape for the gradient of queries.
    queries: Tiling,
    /// Block shape for the gradients of keys and values.
    keys: Tiling,
}

/// The block shapes for heads of width `head`, or `None` if attention.cu does not support that width. With two tiles of
/// rows per warp, data from shared memory is used twice, so that products are the bottleneck on an H100; gradients of
/// wide keys need too many registers for this. A multiprocessor runs two blocks of 4 warps at a time.
fn tilings(head: usize) -> Option<Tilings> {
    let of = |tiles, warps, columns| Tiling { tiles, warps, columns };
    match head {
        64 => Some(Tilings { forward: of(2, 4, 64), queries: of(2, 4, 64), keys: of(2, 4, 32) }),
        128 => Some(Tilings { forward: of(2, 4, 32), queries: of(2, 4, 32), keys: of(1, 8, 32) }),
        _ => None,
    }
}

/// The rows of queries, keys and values within packed rows.
fn packed_heads(packed: Address, heads: Heads, length: usize, format: Format) -> [HeadRows; 3] {
    let width = heads.packed_width();
    let at = |column: usize| HeadRows {
        base: packed.add(column * format.bytes()),
        sequence: (length * width) as i64,
        head: heads.width as i64,
        row: width as i64,
    };
    [at(0), at(heads.query_width()), at(heads.query_width() + heads.key_value_width())]
}

/// The rows of heads within rows that hold only queries.
fn query_heads(rows: Address, heads: Heads, length: usize) -> HeadRows {
    let width = heads.query_width();
    HeadRows { base: rows, sequence: (length * width) as i64, head: heads.width as i64, row: width as i64 }
}

/// The factor for attention scores.
fn score_scale(heads: Heads) -> f32 {
    1.0 / (heads.width as f32).sqrt()
}

/// Number of rows per block in `attention_any.cu`.
const ANY_ROWS: usize = 4;

impl Backend for Cuda {
    type Buffer<T: Element> = Buffer<T>;
    type Activations = Activations;
    type Graph = Graph;
    type Weights = Weights;
    type Cache = Cache;

    fn describe(&self) -> String {
        self.device.describe()
    }

    fn with_precision(self, precision: Precision) -> Self {
        let format = match precision {
            Precision::F32 => Format::F32,
            Precision::Bf16 => Format::Bf16,
        };
        Self { format, ..self }
    }

    fn allocate<T: Element>(&self, len: usize) -> Result<Buffer<T>, BackendError> {
        let memory = Memory::zeroed(&self.device, len * size_of::<T>())?;
        Ok(Buffer { memory, element: PhantomData })
    }

    fn activation_bytes(&self) -> usize {
        self.format.bytes()
    }

    fn activations(&self, len: usize) -> Result<Activations, BackendError> {
        let memory = Memory::zeroed(&self.device, len * self.format.bytes())?;
        Ok(Activations { memory, format: self.format })
    }

    fn set_activations(&self, to: ActsMut<'_, Self>, from: &[f32]) {
        assert_eq!(to.len(), from.len(), "both sides of a copy have the same length");
        match self.format {
            Format::F32 => self.device.upload(to.address(), from),
            Format::Bf16 => {
                let rounded: Vec<half::bf16> = from.iter().map(|x| half::bf16::from_f32(*x)).collect();
                self.device.upload(to.address(), &rounded);
            }
            Format::F16 => unreachable!("no precision has f16 activations"),
        }
    }

    fn read_activations(&self, from: Acts<'_, Self>, to: &mut [f32]) {
        assert_eq!(to.len(), from.len(), "both sides of a copy have the same length");
        match self.format {
            Format::F32 => self.device.download(from.address(), to),
            Format::Bf16 => {
                let mut rounded = vec![half::bf16::ZERO; to.len()];
                self.device.download(from.address(), &mut rounded);
                to.iter_mut().zip(rounded).for_each(|(to, from)| *to = from.to_f32());
            }
            Format::F16 => unreachable!("no precision has f16 activations"),
        }
    }

    fn upload<T: Element>(&self, to: Out<'_, Self, T>, from: &[T]) {
        assert_eq!(to.len(), from.len(), "both sides of a copy have the same length");
        self.device.upload(to.address(), from);
    }

    fn download<T: Element>(&self, from: In<'_, Self, T>, to: &mut [T]) {
        assert_eq!(to.len(), from.len(), "both sides of a copy have the same length");
        self.device.download(from.address(), to);
    }

    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    fn replay(&self, graph: &mut Graph, work: impl FnOnce() + Send) {
        graph.replay(&self.device, work);
    }

    fn norm(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, norm: Norm<'_, Buffer<f32>>) {
        let _kernel = self.kernel(trace_span!("norm"));
        self.norm_rows(out.address(), x.address(), x.len(), &norm);
    }

    fn add_norm(
        &self,
        sum: ActsMut<'_, Self>,
        out: ActsMut<'_, Self>,
        x: Acts<'_, Self>,
        delta: Acts<'_, Self>,
        norm: Norm<'_, Buffer<f32>>,
    ) {
        let _kernel = self.kernel(trace_span!("norm"));
        let len = x.len();
        self.add_norm_rows([sum.address(), out.address()], [x.address(), delta.address()], len, &norm);
    }

    fn qk_norm_rope(
        &self,
        out: ActsMut<'_, Self>,
        packed: Acts<'_, Self>,
        norm: Norm<'_, Buffer<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    ) {
        let _kernel = self.kernel(trace_span!("qk_norm_rope"));
        self.norm_heads(
            out.address(),
            packed.address(),
            packed.len() / heads.packed_width(),
            &norm,
            &rope,
            heads,
        );
    }

    fn swiglu(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, width: usize) {
        let _kernel = self.kernel(trace_span!("swiglu"));
        let rows = out.len() / width;
        let (out, x) = (out.address(), x.address());
        let vector = self.vector(&[width], &[out, x]);
        let blocks = [rows, width.div_ceil(THREADS * vector), 1];
        launch!(self, Program::Swiglu, vector, "swiglu", blocks, line(THREADS), 0; out, x, width as i32);
    }

    fn weights(&self, values: &[f32], outputs: usize, format: WeightFormat) -> Result<Weights, BackendError> {
        Weights::new(&self.device, values, outputs, format)
    }

    fn gather(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, rows: In<'_, Self, u32>, width: usize) {
        let _kernel = self.kernel(trace_span!("gather"));
        self.gather_rows(out.address(), x.address(), rows.address(), rows.len(), width);
    }

    fn embed_weights(&self, out: ActsMut<'_, Self>, table: &Weights, ids: In<'_, Self, u32>) {
        let _kernel = self.kernel(trace_span!("embed"));
        self.embed_rows(out.address(), table, ids.address(), ids.len());
    }

    fn linear_weights(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, weights: &Weights, rows: usize) {
        let _kernel = self.kernel(trace_span!("linear"));
        self.times_weights(out.address(), self.format, x.address(), weights, rows);
    }

    fn logits(&self, out: Out<'_, Self>, x: Acts<'_, Self>, table: &Weights, rows: usize) {
        let _kernel = self.kernel(trace_span!("linear"));
        self.times_weights(out.address(), Format::F32, x.address(), table, rows);
    }

    fn cache(
        &self,
        sequences: usize,
        capacity: usize,
        heads: Heads,
        format: CacheFormat,
    ) -> Result<Cache, BackendError> {
        Cache::new(&self.device, sequences, capacity, heads, format.into())
    }

    fn fork(&self, cache: &mut Cache, forks: Forks<'_, Self>) {
        let _kernel = self.kernel(trace_span!("fork"));
        self.fork_cache(cache, &forks);
    }

    fn cached_attention(
        &self,
        out: ActsMut<'_, Self>,
        cache: &mut Cache,
        packed: Acts<'_, Self>,
        spans: Spans<'_, Self>,
    ) {
        let _kernel = self.kernel(trace_span!("attention"));
        self.attend_cached(out.address(), cache, packed.address(), &spans);
    }

    fn greedy(&self, out: Out<'_, Self, u32>, logits: In<'_, Self>) {
        let _kernel = self.kernel(trace_span!("greedy"));
        let (rows, vocabulary) = (out.len(), logits.len() / out.len());
        launch!(self, Program::Loss, 1, "greedy", line(rows), line(512), 0;
            out.address(), logits.address(), vocabulary as i32);
    }

    fn cross_entropy(&self, out: Out<'_, Self>, logits: Out<'_, Self>, targets: In<'_, Self, u32>) {
        let _kernel = self.kernel(trace_span!("cross_entropy"));
        let (rows, vocabulary) = (targets.len(), logits.len() / targets.len().max(1));
        let (out, logits, targets) = (out.address(), logits.address(), targets.address());
        self.loss_of_rows(out, Address::NULL, logits, targets, rows, vocabulary);
    }
}

/// The arguments of a forward pass of attention, over packed rows or over cached keys and values.
struct AttentionPass {
    out: HeadRows,
    lse: Address,
    queries: HeadRows,
    keys: HeadRows,
    values: HeadRows,
    /// Format of keys and values.
    cached: Format,
    doc_starts: Address,
    sequences: Address,
    first: Address,
    spans: usize,
    length: usize,
    heads: Heads,
}

impl Cuda {
    /// The block shapes of attention.cu for these heads, if it supports them: it needs bfloat16, and rows that begin at
    /// multiples of 16 bytes.
    fn tiled(&self, heads: Heads, rows: &[HeadRows]) -> Option<Tilings> {
        let aligned = |rows: &HeadRows| {
            let strides = [rows.sequence, rows.head, rows.row];
            rows.base.0.is_multiple_of(16) && strides.iter().all(|stride| stride % 8 == 0)
        };
        if self.format == Format::Bf16 && rows.iter().all(aligned) { tilings(heads.width) } else { None }
    }

    fn attention_pass(&self, pass: &AttentionPass) {
        let AttentionPass { out, lse, queries, keys, values, cached, .. } = *pass;
        let AttentionPass { doc_starts, sequences, first, spans, length, heads, .. } = *pass;
        let (length_, group, scale) = (length as i32, heads.group() as i32, score_scale(heads));
        match self.tiled(heads, &[out, queries, keys, values]) {
            Some(Tilings { forward: tiling, .. }) if cached == Format::Bf16 => {
                let program = Program::Attention { head: heads.width, tiling };
                let shared = tiling.shared(heads.width, 1);
                let all = [heads.query, length.div_ceil(tiling.rows()), spans];
                launch!(self, program, 8, "attention", all, line(tiling.warps * 32), shared;
                    out, lse, queries, keys, values, doc_starts, sequences, first, length_, group, scale);
            }
            _ => {
                let program = Program::AttentionAny { head: heads.width, cached };
                let all = [length.div_ceil(ANY_ROWS), heads.query, spans];
                launch!(self, program, 1, "attention", all, line(ANY_ROWS * 32), 0;
                    out, lse, queries, keys, values, doc_starts, sequences, first, length_, group, scale);
            }
        }
    }

    fn loss_of_rows(
        &self,
        out: Address,
        lse: Address,
        logits: Address,
        targets: Address,
        rows: usize,
        vocabulary: usize,
    ) {
        let vector = if vocabulary.is_multiple_of(4) && logits.0.is_multiple_of(16) { 4 } else { 1 };
        launch!(self, Program::Loss, vector, "cross_entropy", line(rows), line(512), 0;
            out, lse, logits, targets, vocabulary as i32);
    }
}
