//! What training needs of a device, beside what inference needs of it: backward kernels, the optimizer, exact sums, and
//! sums over a group of devices.
//!
//! Shape letters: R rows (positions of all sequences), D model width, H head width, V vocabulary.

use std::fmt::Debug;
use std::ops::Range;

use super::{Acts, ActsMut, Backend, Element, Heads, In, Norm, Out, Rope, View, ViewMut};
use crate::{BackendError, CommunicatorError, CommunicatorId, GiveUp, Quantum};

/// Elements per block of [`TrainingBackend::block_squares`]. Shard boundaries are block boundaries.
pub const BLOCK: usize = 65_536;

/// For [`TrainingBackend::choose_algorithms`]: no names, so that what the library proposes first is taken, which is
/// always the same.
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

/// Numbers of a device in memory of the host, which may still be on their way there.
pub trait HostCopy: Debug + Send + Sync {
    /// The numbers; waits until all are there.
    fn values(&self) -> &[f32];
}

impl HostCopy for Vec<f32> {
    fn values(&self) -> &[f32] {
        self
    }
}

/// A device that trains.
pub trait TrainingBackend: Backend {
    /// Rows of which the logits exist at one time while a loss is computed.
    const HEAD_ROWS: usize;

    /// Weights in training: in f32, and as matrix products read them.
    type Parameters: Debug + Send + Sync;

    /// A group of devices of several processes that sum among themselves. All its members call the same operations in the
    /// same order; after an error it is of no more use, and what the buffers of the operation hold is not known.
    type Communicator: Debug + Send;

    /// Bytes of one parameter.
    fn parameter_bytes(&self) -> usize;

    /// `len` parameters of 0.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn parameters(&self, len: usize) -> Result<Self::Parameters, BackendError>;

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

    /// Lets the host work on a buffer: in place where it is the host's memory, else on a copy that is put back.
    fn on_host<T: Element, R>(&self, buffer: Out<'_, Self, T>, work: impl FnOnce(&mut [T]) -> R) -> R;

    /// Begins to copy to the host, after the kernels called so far and beside those called from now on, which must not
    /// write `from` until [`TrainingBackend::finish_copies`].
    fn begin_copy(&self, from: In<'_, Self>) -> Box<dyn HostCopy>;

    /// What is called from now on comes after all copies that were begun.
    fn finish_copies(&self);

    /// Whether the device can be in a [`TrainingBackend::Communicator`]; if not, its sums are for the host.
    ///
    /// # Errors
    /// When it could, but for what is missing here.
    fn communicates(&self) -> Result<bool, CommunicatorError>;

    /// An id that no other group has. Who makes it must live until the group is formed.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    fn communicator_id(&self) -> Result<CommunicatorId, CommunicatorError>;

    /// Joins the group of that id as one of `size` members, and waits for the others.
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

    /// Begins to replace what this member owns of `data` ([`Partition::equal`](ulmus_types::Partition::equal)) by its sum over all members, modulo 2^64; the rest
    /// holds anything then. Comes after the kernels called so far, and beside those called from now on, which must leave
    /// `data` alone until [`TrainingBackend::finish_reductions`].
    ///
    /// # Errors
    /// [`CommunicatorError`].
    fn begin_reduce_scatter(
        &self,
        communicator: &mut Self::Communicator,
        data: Out<'_, Self, i64>,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError>;

    /// Waits for all that [`TrainingBackend::begin_reduce_scatter`] has begun.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    fn finish_reductions(
        &self,
        communicator: &mut Self::Communicator,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError>;

    /// Replaces what other members own of each of these parts of `data` by what they hold there.
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

    /// Replaces `data` by what member `root` holds.
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

    /// From now on waits for each kernel, so that the spans around kernels have their times; says whether that
    /// makes a difference. Only for measuring.
    fn serialize_kernels(&self) -> bool;

    /// Does `work`, choosing the fastest of several algorithms for each product of matrices that it needs; gives their names,
    /// if there was a choice. Another may be the fastest the next time, and has other bits: `known` are the names that an
    /// earlier call gave on a device that describes itself alike, whose choice is taken, or [`FIRST_PROPOSALS`]. Products
    /// that `work` did not need, and all if there never was such a call, are made by the library's first proposal.
    ///
    /// # Errors
    /// [`BackendError::Algorithms`] if `known` are no such names.
    fn choose_algorithms<R>(
        &self,
        known: Option<&str>,
        work: impl FnOnce() -> R,
    ) -> Result<(R, Option<String>), BackendError>;

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

    /// Replaces `x`, rows of `2 · width`, by its gradient, and the gradient of the output by the output.
    fn swiglu_backward(&self, x: ActsMut<'_, Self>, gradient: ActsMut<'_, Self>, width: usize);

    /// Output head and loss in one: per row, `cross_entropy = logsumexp(logits) − logits[target]` and `lse` =
    /// logsumexp, both 0 where the target is [`IGNORE`](super::IGNORE). `gradients`, if asked for, are those of
    /// `Σ cross_entropy + z_loss · lse²`.
    /// `logits` is scratch for up to [`TrainingBackend::HEAD_ROWS`] rows of `[V]`: logits of the whole batch never
    /// exist.
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

    /// What [`TrainingBackend::quantise`] and [`TrainingBackend::dequantise`] make of a gradient, in its place;
    /// `outside` as there.
    fn quantise_mean(
        &self,
        gradient: Out<'_, Self>,
        outside: Out<'_, Self, u32>,
        quantum: &Quantum,
        scale: f64,
    );

    /// `mean = sums · scale`: to f64, scaled, rounded once to f32.
    fn dequantise(&self, mean: Out<'_, Self>, sums: In<'_, Self, i64>, scale: f64);
}
