//! The seam between the model and the device that computes it.
//!
//! A [`Backend`] owns typed buffers and the kernels of inference; a [`TrainingBackend`] adds those of training. The
//! layers above plan every buffer once and never look inside one; transfers between host and device are explicit.
//! Kernels take *views*: a buffer and a range of its elements, so that all parameters (and all gradients) can share one
//! flat buffer. *Activations* pass from layer to layer; their number format is the device's business.
//!
//! The contract of every kernel: its output depends only on the contents and shapes of its arguments, never on the
//! number of threads or on timing. Reductions are split by shape and joined in a fixed order. Kernels may run
//! asynchronously, but in the order of the calls; [`Backend::download`] waits for the data it reads.
//!
//! Shape letters: R rows (positions of all sequences), D model width, H head width, V vocabulary, F FFN width.

#![forbid(unsafe_code)]

mod communicator;
mod dropout;
mod error;
mod exact;
mod format;
mod greedy;
mod training;

use std::fmt::Debug;
use std::ops::Range;

pub use communicator::{CommunicatorError, CommunicatorId, GiveUp};
pub use dropout::{Dropout, DropoutPart, dropout_keeps, dropout_key, dropout_row, dropout_threshold};
pub use error::BackendError;
pub use exact::Quantum;
pub use format::{CacheFormat, WeightFormat};
pub use greedy::{greedy, greedy_rows};
pub use training::{
    AdamW, AttentionShape, BLOCK, FIRST_PROPOSALS, HeadGradients, HostCopy, LinearShape, LowRank, Params,
    TrainingBackend,
};
use ulmus_plan::{NormKind, Precision};
pub use ulmus_types::IGNORE;

/// A type of element that buffers can hold.
pub trait Element: bytemuck::Pod + Send + Sync + Debug + sealed::Sealed {}

impl Element for f32 {}
impl Element for u32 {}
impl Element for i64 {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for u32 {}
    impl Sealed for i64 {}
}

/// Added to the mean square of an RMS norm, as in the reference.
pub const RMS_EPSILON: f32 = 1e-6;

/// Added to the variance of a layer norm; the customary value.
pub const LAYER_EPSILON: f32 = 1e-5;

/// A part of a buffer, to read from.
#[derive(Debug)]
pub struct View<'a, T> {
    /// The buffer.
    pub buffer: &'a T,
    /// Which of its elements.
    pub range: Range<usize>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        Self { buffer: self.buffer, range: self.range.clone() }
    }
}

impl<'a, T> View<'a, T> {
    /// Elements `range` of `buffer`.
    #[inline]
    pub fn new(buffer: &'a T, range: Range<usize>) -> Self {
        Self { buffer, range }
    }

    /// Number of elements.
    #[inline]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether the range is empty.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// A part of a buffer, to write to.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    /// The buffer.
    pub buffer: &'a mut T,
    /// Which of its elements.
    pub range: Range<usize>,
}

impl<'a, T> ViewMut<'a, T> {
    /// Elements `range` of `buffer`.
    #[inline]
    pub fn new(buffer: &'a mut T, range: Range<usize>) -> Self {
        Self { buffer, range }
    }

    /// The same view for a shorter time, to write to the same elements again.
    #[inline]
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { buffer: self.buffer, range: self.range.clone() }
    }

    /// Number of elements.
    #[inline]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether the range is empty.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

impl<'a, T> View<'a, Vec<T>> {
    /// The elements themselves, where the buffer is host memory.
    #[inline]
    pub fn slice(self) -> &'a [T] {
        &self.buffer[self.range]
    }
}

impl<'a, T> ViewMut<'a, Vec<T>> {
    /// The elements themselves, where the buffer is host memory.
    #[inline]
    pub fn slice(self) -> &'a mut [T] {
        &mut self.buffer[self.range]
    }
}

/// Activations of backend `B` to read.
pub type Acts<'a, B> = View<'a, <B as Backend>::Activations>;
/// Activations of backend `B` to write.
pub type ActsMut<'a, B> = ViewMut<'a, <B as Backend>::Activations>;
/// A view of backend `B` to read `T` from.
pub type In<'a, B, T = f32> = View<'a, <B as Backend>::Buffer<T>>;
/// A view of backend `B` to write `T` to.
pub type Out<'a, B, T = f32> = ViewMut<'a, <B as Backend>::Buffer<T>>;

/// The heads of one attention layer. A packed row holds all query heads, then all key heads, then all value heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Number of query heads; head h reads key/value head `h / (query / key_value)`.
    pub query: usize,
    /// Number of key heads, and of value heads.
    pub key_value: usize,
    /// H, the width of one head; even.
    pub width: usize,
}

impl Heads {
    /// Number of query heads that share one key/value head.
    pub fn group(&self) -> usize {
        self.query / self.key_value
    }

    /// Total width of the query heads, and of the attention's output.
    pub fn query_width(&self) -> usize {
        self.query * self.width
    }

    /// Total width of the key heads, and of the value heads.
    pub fn key_value_width(&self) -> usize {
        self.key_value * self.width
    }

    /// Width of a packed row.
    pub fn packed_width(&self) -> usize {
        self.query_width() + 2 * self.key_value_width()
    }
}

/// A norm over whole rows, or over each query and key head of packed rows.
#[derive(Debug)]
pub struct Norm<'a, T> {
    /// Which norm, and how it is computed.
    pub kind: NormKind,
    /// `[D]`; for heads `[2, H]`: queries, then keys.
    pub weight: View<'a, T>,
    /// At least [`NormKind::row_scratch`] elements, or [`NormKind::head_scratch`] for heads. A backward pass finds here
    /// what the forward pass over the same rows left.
    pub scratch: ViewMut<'a, T>,
}

/// Rotary tables, and the positions of the rows they are applied to.
#[derive(Debug)]
pub struct Rope<'a, B: Backend> {
    /// Cosines, `[positions, H/2]`.
    pub cos: In<'a, B>,
    /// Sines, `[positions, H/2]`.
    pub sin: In<'a, B>,
    /// Position of the first row of each span.
    pub first: In<'a, B, u32>,
    /// Rows per span: row r has position `first[r / length] + r % length`.
    pub length: usize,
}

/// Spans of rows, each of which continues one sequence. The positions are on the device, so that a captured graph can be
/// replayed for other positions.
#[derive(Debug)]
pub struct Spans<'a, B: Backend> {
    /// The sequence of each span; no two are equal.
    pub sequences: In<'a, B, u32>,
    /// Position of the first row of each span.
    pub first: In<'a, B, u32>,
    /// Rows per span.
    pub length: usize,
}

/// Sequences of a cache, and others that begin like them.
#[derive(Debug)]
pub struct Forks<'a, B: Backend> {
    /// The sequences to copy.
    pub from: In<'a, B, u32>,
    /// The sequences that become copies, one for each of `from`.
    pub to: In<'a, B, u32>,
    /// Number of positions of each copy.
    pub positions: In<'a, B, u32>,
    /// The largest of `positions`.
    pub longest: usize,
}

/// A device that decodes. A clone is another handle to the same device.
pub trait Backend: Clone + Debug + Send + Sync + 'static {
    /// A buffer in the device's memory.
    type Buffer<T: Element>: Debug + Send + Sync;

    /// Activations and their gradients, in the number format that suits the precision.
    type Activations: Debug + Send + Sync;

    /// A recording of a pass, to be replayed.
    type Graph: Debug + Default + Send + Sync;

    /// A read-only matrix `[outputs, inputs]` for inference, in the layout that this device reads fastest.
    type Weights: Debug + Send + Sync;

    /// The keys and values that one layer has seen, for several sequences.
    type Cache: Debug + Send + Sync;

    /// One line that describes the device in reports, for instance `cpu, 2 threads`.
    fn describe(&self) -> String;

    /// The same device with another precision of matrix products.
    #[must_use]
    fn with_precision(self, precision: Precision) -> Self;

    /// `len` zeros.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn allocate<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>, BackendError>;

    /// Bytes of one activation.
    fn activation_bytes(&self) -> usize;

    /// `len` activations, all zero.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn activations(&self, len: usize) -> Result<Self::Activations, BackendError>;

    /// Replaces activations by `from`, rounded to their format; lengths are equal.
    fn set_activations(&self, to: ActsMut<'_, Self>, from: &[f32]);

    /// Copies activations to the host; lengths are equal.
    fn read_activations(&self, from: Acts<'_, Self>, to: &mut [f32]);

    /// Copies `from` to the device; lengths are equal.
    fn upload<T: Element>(&self, to: Out<'_, Self, T>, from: &[T]);

    /// Copies to the host, after all kernels called so far; lengths are equal.
    fn download<T: Element>(&self, from: In<'_, Self, T>, to: &mut [T]);

    /// Runs `work` on the device's threads. A whole pass goes through one call, so that entering the threads is paid
    /// for once per pass and not once per kernel.
    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R;

    /// Runs `work`, which may do nothing but call kernels, or replays what it called the last time with this graph. The
    /// kernels and their views must be the same every time; the contents of the views may differ.
    fn replay(&self, graph: &mut Self::Graph, work: impl FnOnce() + Send);

    /// `out = norm(x)`, row by row; a row is as long as the norm's weight.
    fn norm(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, norm: Norm<'_, Self::Buffer<f32>>);

    /// `sum = x + delta`, `out = norm(sum)`.
    fn add_norm(
        &self,
        sum: ActsMut<'_, Self>,
        out: ActsMut<'_, Self>,
        x: Acts<'_, Self>,
        delta: Acts<'_, Self>,
        norm: Norm<'_, Self::Buffer<f32>>,
    );

    /// Norms and rotates the query and key heads of packed rows; copies the values.
    fn qk_norm_rope(
        &self,
        out: ActsMut<'_, Self>,
        packed: Acts<'_, Self>,
        norm: Norm<'_, Self::Buffer<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    );

    /// `out = silu(first half of the row) · second half`; `out` has rows of `width` elements, `x` of `2 · width`.
    fn swiglu(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, width: usize);

    /// Converts a row-major matrix `[outputs, inputs]`, whose values are finite in `format`.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn weights(
        &self,
        values: &[f32],
        outputs: usize,
        format: WeightFormat,
    ) -> Result<Self::Weights, BackendError>;

    /// `out[r] = x[rows[r]]`, with rows of `width` elements.
    fn gather(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, rows: In<'_, Self, u32>, width: usize);

    /// `out[r] = table[ids[r]]`.
    fn embed_weights(&self, out: ActsMut<'_, Self>, table: &Self::Weights, ids: In<'_, Self, u32>);

    /// `out = x · weightsᵀ` for `rows` rows. A row of the result has the same bits whatever the other rows are, unless
    /// the device documents otherwise.
    fn linear_weights(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, weights: &Self::Weights, rows: usize);

    /// The same as [`Backend::linear_weights`] with the result in f32: the logits of `rows` rows.
    fn logits(&self, out: Out<'_, Self>, x: Acts<'_, Self>, table: &Self::Weights, rows: usize);

    /// An empty cache for `sequences` texts of up to `capacity` tokens each.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn cache(
        &self,
        sequences: usize,
        capacity: usize,
        heads: Heads,
        format: CacheFormat,
    ) -> Result<Self::Cache, BackendError>;

    /// Copies the keys and values of sequences to other sequences. No sequence is written twice, or both read and written.
    fn fork(&self, cache: &mut Self::Cache, forks: Forks<'_, Self>);

    /// Puts the keys and values of all spans' packed rows into the cache, and lets each query attend to the keys of its
    /// sequence up to its own position: `out` is `[R, query_width]`. A row has the same bits whatever the other rows
    /// are.
    fn cached_attention(
        &self,
        out: ActsMut<'_, Self>,
        cache: &mut Self::Cache,
        packed: Acts<'_, Self>,
        spans: Spans<'_, Self>,
    );

    /// The likeliest token of each row of logits, the first one where several are equal.
    fn greedy(&self, out: Out<'_, Self, u32>, logits: In<'_, Self>);

    /// Cross-entropy of each row of logits in nats, 0 where the target is [`IGNORE`]. Overwrites the logits.
    fn cross_entropy(&self, out: Out<'_, Self>, logits: Out<'_, Self>, targets: In<'_, Self, u32>);
}
