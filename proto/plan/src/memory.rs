//! What the memory of a worker on a processor holds: the same sums that the model crate makes when it plans its buffers.
//!
//! It lets `--check` answer before anything starts. A test of the model crate compares both; only small scratch per
//! thread (attention scores, matrix packing) is left out. Sizes of scratch on which kernels and this estimate must agree
//! are declared here, and not beside the kernels, because a coordinator answers `--check` without any compute crate.

use crate::data::DataConfig;
use crate::model::{LayerDims, ModelConfig};
use crate::norm::NormKind;
use crate::train::TrainConfig;

/// Rows whose logits exist at one time on a processor: the head and its loss go through the batch in chunks of this many
/// rows.
pub const HEAD_ROWS: usize = 512;

/// Rows whose contributions to the gradient of a norm's weights are summed on their own, before the partial sums are
/// added in order.
pub const ROW_BLOCK: usize = 64;

impl NormKind {
    /// Elements of scratch for the norm of rows of that width, forward and backward.
    pub const fn row_scratch(self, rows: usize, width: usize) -> usize {
        let partial = rows.div_ceil(ROW_BLOCK) * width;
        match self {
            Self::Rms | Self::Layer => partial,
            // Three intermediate tensors, and two of one number per row.
            Self::NaiveRms => partial + rows * (3 * width + 2),
        }
    }

    /// Elements of scratch for the norms of the query and key heads of packed rows.
    pub fn head_scratch(self, rows: usize, [query, key]: [usize; 2], width: usize) -> usize {
        match self {
            Self::Rms | Self::Layer => 2 * self.row_scratch(rows, width),
            Self::NaiveRms => self.side_scratch(rows * query, width) + self.side_scratch(rows * key, width),
        }
    }

    /// Queries or keys as a tensor of their own: themselves, normed, and what norming takes.
    pub const fn side_scratch(self, heads: usize, width: usize) -> usize {
        2 * heads * width + self.row_scratch(heads, width)
    }
}

impl ModelConfig {
    /// Elements of scratch that the norms of the model share, for that many rows.
    pub fn norm_scratch(&self, rows: usize) -> usize {
        let heads =
            |layer: LayerDims| self.norm.head_scratch(rows, [layer.q_heads, layer.kv_heads], self.head_dim);
        let stream = self.norm.row_scratch(rows, self.model_dim);
        self.layers().into_iter().map(heads).fold(stream, usize::max)
    }
}

/// Bytes that a worker plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights in f32.
    pub parameters: u64,
    /// Gradient in f32.
    pub gradients: u64,
    /// Both moments in f32.
    pub optimizer: u64,
    /// Integer sums of the exact reduction, if there is more than one micro-batch.
    pub reduction: u64,
    /// Activations, their gradients and scratch for one micro-batch.
    pub activations: u64,
    /// The sum of the fields above.
    pub total: u64,
}

/// Bytes of a compressed file that are read ahead or being decompressed.
const READ_AHEAD: u64 = 4 << 20;

/// An estimate of the most memory, in bytes, that a worker needs to read `lanes` lanes of sequences of `length` tokens.
/// Documents larger than a unit, and text with less than 2.5 bytes per token, take more.
///
/// Each stream holds the window in use and the next one: at least `data.window` sequences, and up to a unit more. A
/// compressed file adds some MiB that are read ahead. Each thread holds a unit of text at up to three stages, and its tokens.
pub fn data_memory(data: &DataConfig, lanes: u64, length: usize) -> u64 {
    let streams = lanes + data.source.len() as u64 - 1;
    // Two fifths of a token per byte of text: English has fewer, source code about as many.
    let tokens = data.window * length as u64 + data.unit.get() * 2 / 5;
    streams.saturating_mul(2 * 4 * tokens + READ_AHEAD).saturating_add(data.threads * 4 * data.unit.get())
}

/// Plans a worker's memory for micro-batches of sequences of `length` tokens.
pub fn worker_memory(model: &ModelConfig, train: &TrainConfig, length: usize) -> MemoryPlan {
    let rows = train.micro_batch * length as u64;
    let (d, head) = (model.model_dim as u64, model.head_dim as u64);
    let layers = model.layers();
    // Per row: packed heads, attention output and its logsumexp, stream before the FFN, both halves of the FFN.
    let kept = |q_heads: u64, packed: u64, ffn: u64| packed + q_heads * head + q_heads + d + 2 * ffn;
    let (mut sum, mut query, mut packed, mut ffn) = (0, 0, 0, 0);
    for dims in &layers {
        let (q_heads, kv_heads) = (dims.q_heads as u64, dims.kv_heads as u64);
        let (own_packed, own_ffn) = ((q_heads + 2 * kv_heads) * head, dims.ffn_dim as u64);
        sum += kept(q_heads, own_packed, own_ffn);
        query = query.max(q_heads);
        packed = packed.max(own_packed);
        ffn = ffn.max(own_ffn);
    }
    let activations = if train.recompute { kept(query, packed, ffn) } else { sum };
    let streams = (layers.len() as u64 + 1) * d;
    let tokens_and_losses = 3 + 2;
    let scratch = 2 * d + d.max(query * head) + 2 * packed + ffn;
    let per_row = activations + streams + tokens_and_losses + scratch;
    let norms = model.norm_scratch(rows as usize) as u64;
    let logits = rows.min(HEAD_ROWS as u64) * model.vocab_size as u64;
    let rope = length as u64 * head;
    // This includes the first position of each sequence.
    let activations =
        4 * (u128::from(rows) * u128::from(per_row) + u128::from(train.micro_batch + norms + logits + rope));
    // A sum that does not fit is more than any machine has.
    let activations = u64::try_from(activations).unwrap_or(u64::MAX);
    let count = model.parameters();
    // A single micro-batch is its own sum, in place.
    let reduction = if train.micro_batches() == 1 { 0 } else { 8 * count };
    let (parameters, gradients, optimizer) = (4 * count, 4 * count, 8 * count);
    let total = (parameters + gradients + optimizer + reduction).saturating_add(activations);
    MemoryPlan { parameters, gradients, optimizer, reduction, activations, total }
}
