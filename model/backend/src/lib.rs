//! The seam between the model and the device that computes it.
//!
//! A [`Backend`] owns typed buffers and the kernels of inference; a [`TrainingBackend`] has those of training as well. What
//! is above plans every buffer once and never looks inside one; transfers between host and device are explicit. Kernels
//! take *views*: a buffer and a range of it, so that all parameters (and all gradients) can be one flat buffer each. What
//! passes from layer to layer are *activations*, whose number format is the device's business.
//!
//! Contract of every kernel: what it writes depends only on the contents and shapes of its arguments, never on
//! the number of threads or on timing: reductions are cut by shape and joined in a fixed order. Kernels may run
//! asynchronously, but in the order of the calls; [`Backend::download`] waits for what it reads.
//!
//! Shape letters: R rows (positions of all sequences), D model width, H head width, V vocabulary, F FFN width.

#![forbid(unsafe_code)]

mod communicator;
mod error;
mod exact;
mod format;
mod greedy;
mod training;

use std::fmt::Debug;
use std::ops::Range;

pub use communicator::{CommunicatorError, CommunicatorId, GiveUp};
pub use error::BackendError;
pub use exact::Quantum;
pub use format::{CacheFormat, WeightFormat};
pub use greedy::{greedy, greedy_rows};
pub use training::{
    AdamW, AttentionShape, BLOCK, FIRST_PROPOSALS, HeadGradients, HostCopy, LinearShape, Params,
    TrainingBackend,
};
use ulmus_plan::{NormKind, Precision};
pub use ulmus_types::IGNORE;

/// What a buffer can hold.
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

/// Added to the variance of a layer norm, as is usual.
pub const LAYER_EPSILON: f32 = 1e-5;

/// A part of a buffer, to read from.
#[derive(Debug)]
pub struct View<'a, T> {
    /// The buffer.
    pub buffer: &'a T,
    /// Elements of it.
    pub range: Range<usize>,
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

    /// Whether there is no element.
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
    /// Elements of it.
    pub range: Range<usize>,
}

impl<'a, T> ViewMut<'a, T> {
    /// Elements `range` of `buffer`.
    #[inline]
    pub fn new(buffer: &'a mut T, range: Range<usize>) -> Self {
        Self { buffer, range }
    }

    /// Number of elements.
    #[inline]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is no element.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

impl<'a, T> View<'a, Vec<T>> {
    /// What is seen of memory of the host.
    #[inline]
    pub fn slice(self) -> &'a [T] {
        &self.buffer[self.range]
    }
}

impl<'a, T> ViewMut<'a, Vec<T>> {
    /// What is seen of memory of the host.
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

/// Heads of one attention layer. A packed row is all query heads, all key heads, all value heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads; head h reads key/value head `h / (query / key_value)`.
    pub query: usize,
    /// Key heads, and as many value heads.
    pub key_value: usize,
    /// H, the width of one head; even.
    pub width: usize,
}

impl Heads {
    /// Query heads that read one key/value head.
    pub fn group(&self) -> usize {
        self.query / self.key_value
    }

    /// Width of all query heads, which is that of the attention's output.
    pub fn query_width(&self) -> usize {
        self.query * self.width
    }

    /// Width of all key heads, or of all value heads.
    pub fn key_value_width(&self) -> usize {
        self.key_value * self.width
    }

    /// Width of a packed row.
    pub fn packed_width(&self) -> usize {
        self.query_width() + 2 * self.key_value_width()
    }
}

/// A norm of rows, or of the query and key heads in packed rows.
#[derive(Debug)]
pub struct Norm<'a, T> {
    /// What is computed, and how.
    pub kind: NormKind,
    /// `[D]`; of heads `[2, H]`: queries, keys.
    pub weight: View<'a, T>,
    /// [`NormKind::row_scratch`] elements, or of heads [`NormKind::head_scratch`], at least. A backward finds here what
    /// the forward of the same rows has left.
    pub scratch: ViewMut<'a, T>,
}

/// Rotary tables, and the positions of the rows that they are applied to.
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

/// Spans of rows, each of which continues one sequence. They are on the device, so that a pass over other positions is
/// the same pass.
#[derive(Debug)]
pub struct Spans<'a, B: Backend> {
    /// The sequence of each span; all different.
    pub sequences: In<'a, B, u32>,
    /// Position of the first row of each span.
    pub first: In<'a, B, u32>,
    /// Rows per span.
    pub length: usize,
}

/// A device that decodes. Cloning gives another handle to the same one.
pub trait Backend: Clone + Debug + Send + Sync + 'static {
    /// Memory of the device.
    type Buffer<T: Element>: Debug + Send + Sync;

    /// What passes between layers, and its gradients, in the format that suits the precision.
    type Activations: Debug + Send + Sync;

    /// A pass that was recorded, to be done again.
    type Graph: Debug + Default + Send + Sync;

    /// A matrix `[outputs, inputs]` for inference: read only, and stored as this device reads it best.
    type Weights: Debug + Send + Sync;

    /// Keys and values that one layer has seen, of several sequences.
    type Cache: Debug + Send + Sync;

    /// One line about the device for reports, for instance `cpu, 2 threads`.
    fn describe(&self) -> String;

    /// The same device, with another precision of matrix products.
    #[must_use]
    fn with_precision(self, precision: Precision) -> Self;

    /// `len` zeros.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn allocate<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>, BackendError>;

    /// Bytes of one activation.
    fn activation_bytes(&self) -> usize;

    /// `len` activations of 0.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn activations(&self, len: usize) -> Result<Self::Activations, BackendError>;

    /// Replaces activations, rounded to their format; lengths are equal.
    fn set_activations(&self, to: ActsMut<'_, Self>, from: &[f32]);

    /// Copies activations to the host; lengths are equal.
    fn read_activations(&self, from: Acts<'_, Self>, to: &mut [f32]);

    /// Copies `from` to the device; lengths are equal.
    fn upload<T: Element>(&self, to: Out<'_, Self, T>, from: &[T]);

    /// Copies to the host what all kernels called so far have made; lengths are equal.
    fn download<T: Element>(&self, from: In<'_, Self, T>, to: &mut [T]);

    /// Does `work` close to the device. A whole pass goes through one call, so that entering the device's
    /// threads is paid once and not once per kernel.
    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R;

    /// Does `work`, which may only call kernels, or what it was the last time with this graph: it must be the same
    /// kernels on the same views, whose contents may be others.
    fn replay(&self, graph: &mut Self::Graph, work: impl FnOnce() + Send);

    /// `out = norm(x)` over rows of as many elements as the norm has weights.
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

    /// Packed rows with query and key heads normed and rotated; values copied.
    fn qk_norm_rope(
        &self,
        out: ActsMut<'_, Self>,
        packed: Acts<'_, Self>,
        norm: Norm<'_, Self::Buffer<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    );

    /// `out = silu(first half of the row) · second half`; `out` has rows of `width`, `x` of `2 · width`.
    fn swiglu(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, width: usize);

    /// Converts a row-major matrix with that many outputs, whose values are finite in the format.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn weights(
        &self,
        values: &[f32],
        outputs: usize,
        format: WeightFormat,
    ) -> Result<Self::Weights, BackendError>;

    /// `out[r] = table[ids[r]]`.
    fn embed_weights(&self, out: ActsMut<'_, Self>, table: &Self::Weights, ids: In<'_, Self, u32>);

    /// `out = x · weightsᵀ` for that many rows. A row of the result has the same bits whatever the other rows are, but for
    /// devices that say otherwise.
    fn linear_weights(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, weights: &Self::Weights, rows: usize);

    /// As [`Backend::linear_weights`], with the result in f32: the logits of that many rows.
    fn logits(&self, out: Out<'_, Self>, x: Acts<'_, Self>, table: &Self::Weights, rows: usize);

    /// Room for texts of up to `capacity` tokens.
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

    /// Puts keys and values of the packed rows of all spans into the cache, and lets each query attend to the keys of
    /// its sequence up to its own position: `out` is `[R, query_width]`. A row has the same bits whatever the other
    /// rows are.
    fn cached_attention(
        &self,
        out: ActsMut<'_, Self>,
        cache: &mut Self::Cache,
        packed: Acts<'_, Self>,
        spans: Spans<'_, Self>,
    );

    /// The likeliest token of each row of logits; of equal ones the first.
    fn greedy(&self, out: Out<'_, Self, u32>, logits: In<'_, Self>);

    /// Cross-entropy of each row of logits, 0 where the target is [`IGNORE`]. The logits are scratch afterwards.
    fn cross_entropy(&self, out: Out<'_, Self>, logits: Out<'_, Self>, targets: In<'_, Self, u32>);
}
