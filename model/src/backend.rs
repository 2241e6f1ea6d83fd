//! The seam between the model and the device that computes it.
//!
//! A backend owns typed buffers and about ten kernels, each with its backward. The network above it plans every
//! buffer once and never looks inside one; transfers between host and device are explicit. Kernels take *views*:
//! a buffer and a range of it, so that all parameters (and all gradients) can be one flat buffer each. What passes
//! from layer to layer are *activations*, whose number format is the device's business.
//!
//! Contract of every kernel: what it writes depends only on the contents and shapes of its arguments, never on
//! the number of threads or on timing: reductions are cut by shape and joined in a fixed order. Kernels may run
//! asynchronously, but in the order of the calls; [`Backend::download`] waits for what it reads.
//!
//! Shape letters: R rows (positions of all sequences), D model width, H head width, V vocabulary, F FFN width.

use std::fmt::Debug;
use std::ops::Range;

pub use ulmus_plan::ROW_BLOCK;
use ulmus_plan::{NormKind, Precision};

use crate::cuda::{CommunicatorId, NcclError, Patience};
use crate::error::ModelError;
use crate::exact::Quantum;
use crate::format::{CacheFormat, WeightFormat};

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

/// A target that counts for nothing: masked by padding or by a document's end.
pub const IGNORE: u32 = u32::MAX;

/// Elements per block of [`Backend::block_squares`]. Shard boundaries are block boundaries.
pub const BLOCK: usize = 65_536;

/// For [`Backend::choose_algorithms`]: no names, so that what the library proposes first is taken, which is always the same.
pub const FIRST_PROPOSALS: &str = "[]";

/// What member `rank` of `size` owns of a range that is reduced over them: an equal share, and the fewer than `size`
/// elements at the end that are left over, which all own.
///
/// # Panics
/// If there is no such member.
pub fn owned(range: Range<usize>, rank: usize, size: usize) -> [Range<usize>; 2] {
    assert!(rank < size, "member {rank} of {size}");
    let share = range.len() / size;
    let start = range.start + rank * share;
    [start..start + share, range.start + size * share..range.end]
}

/// A part of a buffer, to read from.
#[derive(Debug)]
pub struct View<'a, T> {
    pub(crate) buffer: &'a T,
    pub(crate) range: Range<usize>,
}

impl<'a, T> View<'a, T> {
    /// Elements `range` of `buffer`.
    pub fn new(buffer: &'a T, range: Range<usize>) -> Self {
        Self { buffer, range }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// A part of a buffer, to write to.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    pub(crate) buffer: &'a mut T,
    pub(crate) range: Range<usize>,
}

impl<'a, T> ViewMut<'a, T> {
    /// Elements `range` of `buffer`.
    pub fn new(buffer: &'a mut T, range: Range<usize>) -> Self {
        Self { buffer, range }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// Activations of backend `B` to read.
pub type Acts<'a, B> = View<'a, <B as Backend>::Activations>;
/// Activations of backend `B` to write.
pub type ActsMut<'a, B> = ViewMut<'a, <B as Backend>::Activations>;
/// Parameters of backend `B` to read.
pub type Params<'a, B> = View<'a, <B as Backend>::Parameters>;
/// A view of backend `B` to read `T` from.
pub type In<'a, B, T = f32> = View<'a, <B as Backend>::Buffer<T>>;
/// A view of backend `B` to write `T` to.
pub type Out<'a, B, T = f32> = ViewMut<'a, <B as Backend>::Buffer<T>>;

/// Shape of a linear layer: `[rows, inputs] · [outputs, inputs]ᵀ = [rows, outputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// R.
    pub rows: usize,
    /// Width of the input.
    pub inputs: usize,
    /// Width of the output.
    pub outputs: usize,
}

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

/// Shape of causal attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Independent sequences.
    pub sequences: usize,
    /// Rows per sequence.
    pub length: usize,
    /// Heads.
    pub heads: Heads,
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

/// Where the fused head and loss puts its gradients.
#[derive(Debug)]
pub struct HeadGradients<'a, B: Backend> {
    /// `[R, D]`, overwritten.
    pub hidden: ActsMut<'a, B>,
    /// `[V, D]`, overwritten.
    pub table: Out<'a, B>,
    /// Weight of the z-loss.
    pub z_loss: f32,
}

/// One AdamW step for a range of parameters with one decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// The gradient is multiplied by this first (clipping).
    pub gradient_scale: f32,
    /// `1 − lr · weight_decay`, applied to the weight before the step.
    pub decay: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `lr / (1 − β1^t)`.
    pub step_size: f32,
    /// `sqrt(1 − β2^t)`.
    pub second_correction: f32,
    /// Added to the root of the corrected second moment.
    pub epsilon: f32,
}

/// A device. Cloning gives another handle to the same one.
pub trait Backend: Clone + Debug + Send + Sync + 'static {
    /// Rows of which the logits exist at one time while a loss is computed.
    const HEAD_ROWS: usize;

    /// Memory of the device.
    type Buffer<T: Element>: Debug + Send + Sync;

    /// What passes between layers, and its gradients, in the format that suits the precision.
    type Activations: Debug + Send + Sync;

    /// Weights in training: in f32, and as matrix products read them.
    type Parameters: Debug + Send + Sync;

    /// A pass that was recorded, to be done again.
    type Graph: Debug + Default + Send + Sync;

    /// A matrix `[outputs, inputs]` for inference: read only, and stored as this device reads it best.
    type Weights: Debug + Send + Sync;

    /// Keys and values that one layer has seen, of several sequences.
    type Cache: Debug + Send + Sync;

    /// A group of devices of several processes that sum among themselves. All its members call the same operations in the
    /// same order; after an error it is of no more use, and what the buffers of the operation hold is not known.
    type Communicator: Debug + Send;

    /// One line about the device for reports, for instance `cpu, 2 threads`.
    fn describe(&self) -> String;

    /// The same device, with another precision of matrix products (`linear`, attention and head).
    #[must_use]
    fn with_precision(self, precision: Precision) -> Self;

    /// `len` zeros.
    ///
    /// # Errors
    /// [`ModelError::OutOfMemory`].
    fn allocate<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>, ModelError>;

    /// Bytes of one activation.
    fn activation_bytes(&self) -> usize;

    /// `len` activations of 0.
    ///
    /// # Errors
    /// [`ModelError::OutOfMemory`].
    fn activations(&self, len: usize) -> Result<Self::Activations, ModelError>;

    /// Replaces activations, rounded to their format; lengths are equal.
    fn set_activations(&self, to: ActsMut<'_, Self>, from: &[f32]);

    /// Copies activations to the host; lengths are equal.
    fn read_activations(&self, from: Acts<'_, Self>, to: &mut [f32]);

    /// Bytes of one parameter.
    fn parameter_bytes(&self) -> usize;

    /// `len` parameters of 0.
    ///
    /// # Errors
    /// [`ModelError::OutOfMemory`].
    fn parameters(&self, len: usize) -> Result<Self::Parameters, ModelError>;

    /// The parameters in f32.
    fn values<'a>(&self, parameters: Params<'a, Self>) -> In<'a, Self>;

    /// Replaces parameters; lengths are equal.
    fn set_parameters(&self, to: ViewMut<'_, Self::Parameters>, from: &[f32]) {
        self.write_values(to, |values| self.upload(values, from));
    }

    /// Lets `work` write the parameters in f32, and rounds them for matrix products.
    fn write_values<R>(
        &self,
        parameters: ViewMut<'_, Self::Parameters>,
        work: impl FnOnce(Out<'_, Self>) -> R,
    ) -> R;

    /// Copies `from` to the device; lengths are equal.
    fn upload<T: Element>(&self, to: Out<'_, Self, T>, from: &[T]);

    /// Copies to the host what all kernels called so far have made; lengths are equal.
    fn download<T: Element>(&self, from: In<'_, Self, T>, to: &mut [T]);

    /// Lets the host work on a buffer: in place where it is the host's memory, else on a copy that is put back.
    fn on_host<T: Element, R>(&self, buffer: Out<'_, Self, T>, work: impl FnOnce(&mut [T]) -> R) -> R;

    /// Whether the device can be in a [`Backend::Communicator`]; if not, its sums are for the host.
    ///
    /// # Errors
    /// When it could, but for what is missing here.
    fn communicates(&self) -> Result<bool, NcclError>;

    /// Joins the group of that id as one of `size` members, and waits for the others.
    ///
    /// # Errors
    /// [`NcclError`].
    fn communicator(
        &self,
        id: &CommunicatorId,
        rank: usize,
        size: usize,
        patience: Patience<'_>,
    ) -> Result<Self::Communicator, NcclError>;

    /// Begins to replace what this member owns of `data` ([`owned`]) by its sum over all members, modulo 2^64; the rest
    /// holds anything then. Comes after the kernels called so far, and beside those called from now on, which must leave
    /// `data` alone until [`Backend::finish_reductions`].
    ///
    /// # Errors
    /// [`NcclError`].
    fn begin_reduce_scatter(
        &self,
        communicator: &mut Self::Communicator,
        data: Out<'_, Self, i64>,
        patience: Patience<'_>,
    ) -> Result<(), NcclError>;

    /// Waits for all that [`Backend::begin_reduce_scatter`] has begun.
    ///
    /// # Errors
    /// [`NcclError`].
    fn finish_reductions(
        &self,
        communicator: &mut Self::Communicator,
        patience: Patience<'_>,
    ) -> Result<(), NcclError>;

    /// Replaces what other members own of each of these parts of `data` by what they hold there.
    ///
    /// # Errors
    /// [`NcclError`].
    fn all_gather(
        &self,
        communicator: &mut Self::Communicator,
        data: Out<'_, Self>,
        parts: &[Range<usize>],
        patience: Patience<'_>,
    ) -> Result<(), NcclError>;

    /// Replaces `data` by what member `root` holds.
    ///
    /// # Errors
    /// [`NcclError`].
    fn broadcast(
        &self,
        communicator: &mut Self::Communicator,
        root: usize,
        data: Out<'_, Self>,
        patience: Patience<'_>,
    ) -> Result<(), NcclError>;

    /// Does `work` close to the device. A whole pass goes through one call, so that entering the device's
    /// threads is paid once and not once per kernel.
    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R;

    /// From now on waits for each kernel, so that the spans around kernels have their times; says whether that
    /// makes a difference. Only for measuring.
    fn time_kernels_apart(&self) -> bool;

    /// Does `work`, choosing the fastest of several algorithms for each product of matrices that it needs; gives their names,
    /// if there was a choice. Another may be the fastest the next time, and has other bits: `known` are the names that an
    /// earlier call gave on a device that describes itself alike, whose choice is taken, or [`FIRST_PROPOSALS`]. Products
    /// that `work` did not need, and all if there never was such a call, are made by the library's first proposal.
    ///
    /// # Errors
    /// [`ModelError::Algorithms`] if `known` are no such names.
    fn choose_algorithms<R>(
        &self,
        known: Option<&str>,
        work: impl FnOnce() -> R,
    ) -> Result<(R, Option<String>), ModelError>;

    /// Does `work`, which may only call kernels, or what it was the last time with this graph: it must be the same
    /// kernels on the same views, whose contents may be others.
    fn replay(&self, graph: &mut Self::Graph, work: impl FnOnce() + Send);

    /// `out[r] = table[ids[r]]`, rows of `width`.
    fn embed(&self, out: ActsMut<'_, Self>, table: Params<'_, Self>, ids: In<'_, Self, u32>, width: usize);

    /// `table_gradient[ids[r]] += gradient[r]`, in the order of the rows.
    fn embed_backward(
        &self,
        table_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        ids: In<'_, Self, u32>,
        width: usize,
    );

    /// `out = x · weightᵀ`.
    fn linear(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, weight: Params<'_, Self>, shape: LinearShape);

    /// `weight_gradient = gradientᵀ · x`.
    fn linear_backward_weight(
        &self,
        weight_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        x: Acts<'_, Self>,
        shape: LinearShape,
    );

    /// `x_gradient = gradient · weight`.
    fn linear_backward_input(
        &self,
        x_gradient: ActsMut<'_, Self>,
        gradient: Acts<'_, Self>,
        weight: Params<'_, Self>,
        shape: LinearShape,
    );

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

    /// Gradients of the norm: `weight_gradient` is overwritten, `x_gradient` is added to if `accumulate`
    /// (the residual path has put its part there), else overwritten.
    fn norm_backward(
        &self,
        x_gradient: ActsMut<'_, Self>,
        weight_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        x: Acts<'_, Self>,
        norm: Norm<'_, Self::Buffer<f32>>,
        accumulate: bool,
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

    /// Replaces `packed` by its gradient, and overwrites the gradients of the two norm weights (`[2, H]`).
    fn qk_norm_rope_backward(
        &self,
        packed: ActsMut<'_, Self>,
        weights_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        norm: Norm<'_, Self::Buffer<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    );

    /// Causal attention with grouped queries, of packed rows: `out` is `[R, query_width]`, `lse` the logsumexp of the
    /// scaled scores, `[sequences, query heads, length]`.
    /// A query attends to keys `doc_starts[its row]..=its own position`.
    fn attention(
        &self,
        out: ActsMut<'_, Self>,
        lse: Out<'_, Self>,
        packed: Acts<'_, Self>,
        doc_starts: In<'_, Self, u32>,
        shape: AttentionShape,
    );

    /// Overwrites the gradient of the packed rows.
    fn attention_backward(
        &self,
        packed_gradient: ActsMut<'_, Self>,
        gradient: Acts<'_, Self>,
        out: Acts<'_, Self>,
        lse: In<'_, Self>,
        packed: Acts<'_, Self>,
        doc_starts: In<'_, Self, u32>,
        shape: AttentionShape,
    );

    /// `out = silu(first half of the row) · second half`; `out` has rows of `width`, `x` of `2 · width`.
    fn swiglu(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, width: usize);

    /// Replaces `x`, rows of `2 · width`, by its gradient, and the gradient of the output by the output.
    fn swiglu_backward(&self, x: ActsMut<'_, Self>, gradient: ActsMut<'_, Self>, width: usize);

    /// Output head and loss in one: per row, `cross_entropy = logsumexp(logits) − logits[target]` and `lse` =
    /// logsumexp, both 0 where the target is [`IGNORE`]. `gradients`, if asked for, are those of
    /// `Σ cross_entropy + z_loss · lse²`.
    /// `logits` is scratch for up to [`Backend::HEAD_ROWS`] rows of `[V]`: logits of the whole batch never exist.
    fn head_loss(
        &self,
        cross_entropy: Out<'_, Self>,
        lse: Out<'_, Self>,
        gradients: Option<HeadGradients<'_, Self>>,
        hidden: Acts<'_, Self>,
        table: Params<'_, Self>,
        targets: In<'_, Self, u32>,
        logits: Out<'_, Self>,
        shape: LinearShape,
    );

    /// One AdamW step for one range of parameters and their moments.
    fn adamw(
        &self,
        weights: ViewMut<'_, Self::Parameters>,
        first: Out<'_, Self>,
        second: Out<'_, Self>,
        gradient: In<'_, Self>,
        step: AdamW,
    );

    /// Sum of squares of each [`BLOCK`] of `x`, in f64.
    fn block_squares(&self, sums: &mut [f64], x: In<'_, Self>);

    /// Adds the gradient, in quanta, to `sums`, or puts it in their place. `outside` becomes 1 if an element is NaN or
    /// beyond the quantum's limit; `sums` must not be used then.
    fn quantise(
        &self,
        sums: Out<'_, Self, i64>,
        outside: Out<'_, Self, u32>,
        gradient: In<'_, Self>,
        quantum: &Quantum,
        accumulate: bool,
    );

    /// What [`Backend::quantise`] and [`Backend::dequantise`] make of a gradient, in its place; `outside` as there.
    fn quantise_mean(
        &self,
        gradient: Out<'_, Self>,
        outside: Out<'_, Self, u32>,
        quantum: &Quantum,
        scale: f64,
    );

    /// `mean = sums · scale`: to f64, scaled, rounded once to f32.
    fn dequantise(&self, mean: Out<'_, Self>, sums: In<'_, Self, i64>, scale: f64);

    /// Converts a row-major matrix with that many outputs, whose values are finite in the format.
    ///
    /// # Errors
    /// [`ModelError::OutOfMemory`].
    fn weights(
        &self,
        values: &[f32],
        outputs: usize,
        format: WeightFormat,
    ) -> Result<Self::Weights, ModelError>;

    /// `out[r] = table[ids[r]]`.
    fn embed_weights(&self, out: ActsMut<'_, Self>, table: &Self::Weights, ids: In<'_, Self, u32>);

    /// `out = x · weightsᵀ` for that many rows. A row of the result has the same bits whatever the other rows are.
    fn linear_weights(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, weights: &Self::Weights, rows: usize);

    /// As [`Backend::linear_weights`], with the result in f32: the logits of that many rows.
    fn logits(&self, out: Out<'_, Self>, x: Acts<'_, Self>, table: &Self::Weights, rows: usize);

    /// Room for texts of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`ModelError::OutOfMemory`].
    fn cache(
        &self,
        sequences: usize,
        capacity: usize,
        heads: Heads,
        format: CacheFormat,
    ) -> Result<Self::Cache, ModelError>;

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
