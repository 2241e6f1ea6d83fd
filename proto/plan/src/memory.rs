//! What a worker's memory holds: the same sums that the model crate makes when it plans its buffers.
//!
//! It lets `--check` answer before anything starts, without any compute crate. A test of the model crate
//! compares both; only small scratch per thread (attention scores, matrix packing) is left out.

use crate::model::ModelConfig;

/// Rows whose logits exist at one time: the head and its loss go through the batch in chunks of so many rows.
pub const HEAD_ROWS: usize = 512;

/// Rows per partial sum of a norm weight's gradient.
const ROW_BLOCK: u64 = 64;

/// Bytes that a worker plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights in f32.
    pub parameters: u64,
    /// Gradient in f32.
    pub gradients: u64,
    /// Both moments in f32.
    pub optimizer: u64,
    /// Integer sums of the exact reduction.
    pub reduction: u64,
    /// Activations, their gradients and scratch for one micro-batch.
    pub activations: u64,
    /// All of it.
    pub total: u64,
}

/// The plan for micro-batches of `sequences` × `length` positions.
pub fn worker_memory(model: &ModelConfig, sequences: usize, length: usize) -> MemoryPlan {
    let rows = (sequences * length) as u64;
    let (d, head) = (model.model_dim as u64, model.head_dim as u64);
    let (mut layers, mut query, mut packed, mut ffn) = (0, 0, 0, 0);
    for dims in model.layers() {
        let (q_heads, kv_heads) = (dims.q_heads as u64, dims.kv_heads as u64);
        let own = (q_heads * head, (q_heads + 2 * kv_heads) * head, dims.ffn_dim as u64);
        // Stream and norm before attention and before the FFN; packed heads before and after rotation; attention
        // output and its logsumexp; both halves of the FFN and their product.
        layers += 4 * d + 2 * own.1 + own.0 + q_heads + 3 * own.2;
        query = query.max(own.0);
        packed = packed.max(own.1);
        ffn = ffn.max(own.2);
    }
    let after_layers = 2 * d + 2;
    let tokens = 3;
    let backward = d.max(query) + d + 2 * packed + 3 * ffn;
    let per_row = layers + after_layers + tokens + backward;
    let partial = rows.div_ceil(ROW_BLOCK) * d.max(2 * head);
    let logits = rows.min(HEAD_ROWS as u64) * model.vocab_size as u64;
    let rope = length as u64 * head;
    let activations = 4 * (rows * per_row + partial + logits + rope);
    let count = model.parameters();
    let (parameters, gradients, optimizer, reduction) = (4 * count, 4 * count, 8 * count, 8 * count);
    let total = parameters + gradients + optimizer + reduction + activations;
    MemoryPlan { parameters, gradients, optimizer, reduction, activations, total }
}
