//! What training asks of a device beyond inference: backward kernels, adapters, the optimizer, exact sums, and sums over a
//! group of devices.
//!
//! Shape letters: R rows (positions of all sequences), D model width, H head width, V vocabulary.

use std::fmt::Debug;
use std::ops::Range;

use super::{
    Acts, ActsMut, Backend, Dropout, DropoutPart, Element, Heads, In, Norm, Out, Rope, View, ViewMut,
};
use crate::{BackendError, CommunicatorError, CommunicatorId, GiveUp, Quantum};

/// Elements per block of [`TrainingBackend::block_squares`]. Members of a ring own whole blocks.
pub const BLOCK: usize = 65_536;

/// Argument of [`TrainingBackend::choose_algorithms`] that names no algorithm: every product uses the library's first
/// proposal, which is always the same.
pub const FIRST_PROPOSALS: &str = "[]";

/// Parameters of backend `B` to read.
pub type Params<'a, B> = View<'a, <B as TrainingBackend>::Parameters>;

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

/// Where the fused head and loss put their gradients.
#[derive(Debug)]
pub struct HeadGradients<'a, B: Backend> {
    /// `[R, D]`, overwritten.
    pub hidden: ActsMut<'a, B>,
    /// `[V, D]`, overwritten; `None` if the table is frozen.
    pub table: Option<Out<'a, B>>,
    /// The weight of each row's loss, `[R]`; `None` if all are 1.
    pub row_weights: Option<In<'a, B>>,
    /// Weight of the z-loss.
    pub z_loss: f32,
}

/// A matrix `[outputs, inputs]` with the product `scale · B · A` that is added to it.
#[derive(Debug)]
pub struct LowRank<'a, B: TrainingBackend> {
    /// `[outputs, inputs]`
    pub weight: Params<'a, B>,
    /// `[rank, inputs]`
    pub a: Params<'a, B>,
    /// `[outputs, rank]`
    pub b: Params<'a, B>,
    /// The factor of the product.
    pub scale: f32,
    /// Width of the input.
    pub inputs: usize,
}

impl<B: TrainingBackend> LowRank<'_, B> {
    /// Width of the output.
    pub fn outputs(&self) -> usize {
        self.weight.len() / self.inputs
    }

    /// The rank of the product.
    pub fn rank(&self) -> usize {
        self.a.len() / self.inputs
    }
}

/// The numbers of one AdamW step, for parameters that share a weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Factor of the gradient, applied first (clipping).
    pub gradient_scale: f32,
    /// `1 − lr · weight_decay`, the factor of the weight before the step.
    pub decay: f32,
    /// 1 − β1, the share of the gradient in the first moment.
    pub first_share: f32,
    /// β2, the decay of the second moment.
    pub beta2: f32,
    /// 1 − β2, the share of the gradient's square in the second moment.
    pub second_share: f32,
    /// `lr / (1 − β1^t)`.
    pub step_size: f32,
    /// `sqrt(1 − β2^t)`.
    pub second_correction: f32,
    /// Added to the square root of the corrected second moment.
    pub epsilon: f32,
}

/// A copy in host memory of numbers on a device; the copy may still be under way.
pub trait HostCopy: Debug + Send + Sync {
    /// The numbers; waits until the copy is complete.
    fn values(&self) -> &[f32];
}

impl HostCopy for Vec<f32> {
    fn values(&self) -> &[f32] {
        self
    }
}

/// A device that trains.
pub trait TrainingBackend: Backend {
    /// Rows whose logits exist at one time while a loss is computed.
    const HEAD_ROWS: usize;

    /// Weights in training: in f32, and in the format that matrix products read.
    type Parameters: Debug + Send + Sync;

    /// A group of devices, each of its own process, that sum among themselves. All members call the same operations in
    /// the same order. After an error the group is of no more use, and the contents of the operation's buffers are
    /// undefined.
    type Communicator: Debug + Send;

    /// Bytes of one parameter on the device.
    fn parameter_bytes(&self) -> usize;

    /// `len` parameters, all zero.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn parameters(&self, len: usize) -> Result<Self::Parameters, BackendError>;

    /// The parameters in f32.
    fn values<'a>(&self, parameters: Params<'a, Self>) -> In<'a, Self>;

    /// Replaces parameters by `from`; lengths are equal.
    fn set_parameters(&self, to: ViewMut<'_, Self::Parameters>, from: &[f32]) {
        self.write_values(to, |values| self.upload(values, from));
    }

    /// Lets `work` write the parameters in f32, and then rounds them for matrix products.
    fn write_values<R>(
        &self,
        parameters: ViewMut<'_, Self::Parameters>,
        work: impl FnOnce(Out<'_, Self>) -> R,
    ) -> R;

    /// Lets the host work on a buffer: in place if it is host memory, otherwise on a copy that is put back.
    fn on_host<T: Element, R>(&self, buffer: Out<'_, Self, T>, work: impl FnOnce(&mut [T]) -> R) -> R;

    /// Begins to copy to the host, after the kernels called so far and beside those called from now on. These must not
    /// write `from` before [`TrainingBackend::finish_copies`].
    fn begin_copy(&self, from: In<'_, Self>) -> Box<dyn HostCopy>;

    /// Lets everything called from now on come after all copies begun so far.
    fn finish_copies(&self);

    /// Whether this kind of device can be in a [`TrainingBackend::Communicator`]; if not, the host does the sums.
    ///
    /// # Errors
    /// [`CommunicatorError`] if the kind can, but this machine lacks something.
    fn communicates(&self) -> Result<bool, CommunicatorError>;

    /// An id that no other group has. The process that makes it must live until the group is formed.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    fn communicator_id(&self) -> Result<CommunicatorId, CommunicatorError>;

    /// Joins the group `id` as member `rank` of `size`, and waits for the others.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    fn communicator(
        &self,
        id: &CommunicatorId,
        rank: usize,
        size: usize,
        give_up: GiveUp<'_>,
    ) -> Result<Self::Communicator, CommunicatorError>;

    /// Begins to replace what this member owns of `data`, by [`Partition::equal`](ulmus_types::Partition::equal), with
    /// its sum over all members, modulo 2^64. The contents of the rest are undefined afterwards. The sum comes after
    /// the kernels called so far and runs beside those called from now on, which must not touch `data` before
    /// [`TrainingBackend::finish_reductions`].
    ///
    /// # Errors
    /// [`CommunicatorError`].
    fn begin_reduce_scatter(
        &self,
        communicator: &mut Self::Communicator,
        data: Out<'_, Self, i64>,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError>;

    /// Waits for every sum begun by [`TrainingBackend::begin_reduce_scatter`].
    ///
    /// # Errors
    /// [`CommunicatorError`].
    fn finish_reductions(
        &self,
        communicator: &mut Self::Communicator,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError>;

    /// Fills in each of these parts of `data` with what the other members hold in the ranges that they own.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    fn all_gather(
        &self,
        communicator: &mut Self::Communicator,
        data: Out<'_, Self>,
        parts: &[Range<usize>],
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError>;

    /// Replaces `data` by member `root`'s.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    fn broadcast(
        &self,
        communicator: &mut Self::Communicator,
        root: usize,
        data: Out<'_, Self>,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError>;

    /// Waits for each kernel from now on, so that the spans around kernels last as long as the kernels; tells whether
    /// that makes a difference. Only for measuring.
    fn serialize_kernels(&self) -> bool;

    /// Runs `work`, choosing the fastest of several algorithms for each matrix product that it needs. Returns their
    /// names if there was a choice. Algorithms differ in their bits, and another one may be fastest the next time: with
    /// `known`, the names that an earlier call returned on a device of the same description, that choice is repeated;
    /// it may also be [`FIRST_PROPOSALS`]. Products that `work` did not need use the library's first proposal, as do
    /// all products if this is never called.
    ///
    /// # Errors
    /// [`BackendError::Algorithms`] if `known` holds no such names.
    fn choose_algorithms<R>(
        &self,
        known: Option<&str>,
        work: impl FnOnce() -> R,
    ) -> Result<(R, Option<String>), BackendError>;

    /// `out[r] = table[ids[r]]`; rows have `width` elements.
    fn embed(&self, out: ActsMut<'_, Self>, table: Params<'_, Self>, ids: In<'_, Self, u32>, width: usize);

    /// `table_gradient[ids[r]] += gradient[r]`, in the order of the rows; rows have `width` elements. Without
    /// `accumulate`, the gradient is 0 before.
    fn embed_backward(
        &self,
        table_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        ids: In<'_, Self, u32>,
        width: usize,
        accumulate: bool,
    );

    /// `out = x · weightᵀ`, or `out += x · weightᵀ` if `accumulate`.
    fn linear(
        &self,
        out: ActsMut<'_, Self>,
        x: Acts<'_, Self>,
        weight: Params<'_, Self>,
        shape: LinearShape,
        accumulate: bool,
    );

    /// `weight_gradient = gradientᵀ · x`.
    fn linear_backward_weight(
        &self,
        weight_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        x: Acts<'_, Self>,
        shape: LinearShape,
    );

    /// `x_gradient = gradient · weight`, or `x_gradient += gradient · weight` if `accumulate`.
    fn linear_backward_input(
        &self,
        x_gradient: ActsMut<'_, Self>,
        gradient: Acts<'_, Self>,
        weight: Params<'_, Self>,
        shape: LinearShape,
        accumulate: bool,
    );

    /// `x = factor · x`.
    fn scale(&self, x: ActsMut<'_, Self>, factor: f32);

    /// `out[rows[r]] = x[r]`, and 0 in all other rows; rows have `width` elements, and no two of `rows` are equal.
    fn scatter(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, rows: In<'_, Self, u32>, width: usize);

    /// `out[r] += x[rows[r]]`, with rows of `width` elements.
    fn gather_add(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, rows: In<'_, Self, u32>, width: usize);

    /// Puts a part of `x` into `out`, or adds it if `accumulate`; rows have `width` elements.
    fn dropout(
        &self,
        out: ActsMut<'_, Self>,
        x: Acts<'_, Self>,
        dropout: Dropout<'_, Self>,
        width: usize,
        part: DropoutPart,
        accumulate: bool,
    );

    /// `gains = [magnitude / norm, 1 / norm]`, `[2, outputs]`, in which `norm` is the L2 norm of each row of `matrix`, and
    /// `squares` are those norms' squares without the product. Both are 1 and 0 for a row of zeros. `scratch` has at least
    /// `(2 · outputs + rank) · rank` elements; no matrix of the size of the weights is made.
    fn gains(
        &self,
        gains: Out<'_, Self>,
        magnitude: Params<'_, Self>,
        squares: In<'_, Self>,
        matrix: LowRank<'_, Self>,
        scratch: Out<'_, Self>,
    );

    /// `out = x · gains`, column by column, or `out += x · gains` if `accumulate`; a row is as long as `gains`.
    fn scale_columns(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, gains: In<'_, Self>, accumulate: bool);

    /// Gradients of [`TrainingBackend::scale_columns`] by the gains of [`TrainingBackend::gains`], in which norms are
    /// constants: `x_gradient = gradient · gains`, and `magnitude_gradient = Σ_rows gradient · x / norm`, overwritten.
    fn scale_columns_backward(
        &self,
        x_gradient: ActsMut<'_, Self>,
        magnitude_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        x: Acts<'_, Self>,
        gains: In<'_, Self>,
    );

    /// Gradients of the norm. Overwrites `weight_gradient`, if the weights are not frozen; adds to `x_gradient` if `accumulate` (it then holds the
    /// part of the residual path), and otherwise overwrites it.
    fn norm_backward(
        &self,
        x_gradient: ActsMut<'_, Self>,
        weight_gradient: Option<Out<'_, Self>>,
        gradient: Acts<'_, Self>,
        x: Acts<'_, Self>,
        norm: Norm<'_, Self::Buffer<f32>>,
        accumulate: bool,
    );

    /// Replaces `packed` by its gradient, and overwrites the gradients of the two norms' weights (`[2, H]`), if they are
    /// not frozen.
    fn qk_norm_rope_backward(
        &self,
        packed: ActsMut<'_, Self>,
        weights_gradient: Option<Out<'_, Self>>,
        gradient: Acts<'_, Self>,
        norm: Norm<'_, Self::Buffer<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    );

    /// Causal attention with grouped queries over packed rows: `out` is `[R, query_width]`, `lse` the logsumexp of the
    /// scaled scores, `[sequences, query heads, length]`. The query of row r attends to the keys at positions from
    /// `doc_starts[r]` to its own.
    fn attention(
        &self,
        out: ActsMut<'_, Self>,
        lse: Out<'_, Self>,
        packed: Acts<'_, Self>,
        doc_starts: In<'_, Self, u32>,
        shape: AttentionShape,
    );

    /// Overwrites `packed_gradient` with the gradient of the packed rows.
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

    /// Replaces `x`, rows of `2 · width` elements, by its gradient, and the output's gradient by the output.
    fn swiglu_backward(&self, x: ActsMut<'_, Self>, gradient: ActsMut<'_, Self>, width: usize);

    /// Output head and loss in one. Per row, `lse = logsumexp(logits)` and `cross_entropy = lse − logits[target]`, in
    /// nats; both are 0 where the target is [`IGNORE`](super::IGNORE). If `gradients` are asked for, they are those of
    /// `Σ row_weight · (cross_entropy + z_loss · lse²)`. `logits` is scratch for up to [`TrainingBackend::HEAD_ROWS`]
    /// rows of `[V]`: the logits of a whole batch never exist at once.
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

    /// One AdamW step for a range of parameters and their moments.
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

    /// Adds the gradient, in quanta, to `sums` if `accumulate`, and otherwise overwrites them. Sets `outside` to 1 if
    /// an element is NaN or beyond the quantum's limit; the sums are void then.
    fn quantise(
        &self,
        sums: Out<'_, Self, i64>,
        outside: Out<'_, Self, u32>,
        gradient: In<'_, Self>,
        quantum: &Quantum,
        accumulate: bool,
    );

    /// Replaces the gradient by what [`TrainingBackend::quantise`] and then [`TrainingBackend::dequantise`] make of it;
    /// sets `outside` as the former does.
    fn quantise_mean(
        &self,
        gradient: Out<'_, Self>,
        outside: Out<'_, Self, u32>,
        quantum: &Quantum,
        scale: f64,
    );

    /// `mean = sums · scale`, in f64 and rounded once to f32.
    fn dequantise(&self, mean: Out<'_, Self>, sums: In<'_, Self, i64>, scale: f64);
}
