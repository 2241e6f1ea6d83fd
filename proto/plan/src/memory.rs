//! What the memory of a worker on a processor holds: the same sums that the model crate makes when it plans its buffers.
//!
//! It lets `--check` answer before anything starts. A test of the model crate compares both; only small scratch per
//! thread (attention scores, matrix packing) is left out. Sizes of scratch on which kernels and this estimate must agree
//! are declared here, and not beside the kernels, because a coordinator answers `--check` without any compute crate.

use std::collections::BTreeMap;

use crate::adapter::AdaptedModule;
use crate::data::DataConfig;
use crate::model::{LayerDims, ModelConfig};
use crate::norm::NormKind;
use crate::train::TrainConfig;
use crate::tune::{Method, TuneConfig};

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
    /// Gradient of what is trained, in f32.
    pub gradients: u64,
    /// Both moments of what is trained, in f32.
    pub optimizer: u64,
    /// Integer sums of the exact reduction, if there is more than one micro-batch.
    pub reduction: u64,
    /// Activations, their gradients and scratch for one micro-batch.
    pub activations: u64,
    /// The weights of the model that a stage begins from, as they are read. Nothing but parameters and moments is in use then.
    pub loading: u64,
    /// The most at one time: as the model is read, or as it is trained.
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

/// Sequences that go through the model at once.
struct Batch {
    sequences: u64,
    length: usize,
    recompute: bool,
}

impl Batch {
    const fn rows(&self) -> u64 {
        self.sequences.saturating_mul(self.length as u64)
    }
}

/// Plans a worker's memory for micro-batches of sequences of `length` tokens.
pub fn worker_memory(model: &ModelConfig, train: &TrainConfig, length: usize) -> MemoryPlan {
    let batch = Batch { sequences: train.micro_batch, length, recompute: train.recompute };
    let count = model.parameters();
    planned([count, count, 0], train.micro_batches(), network_elements(model, &batch))
}

/// Plans a worker's memory for a tuning stage that begins from a model of this shape. An adapter leaves the model's weights as they
/// are, so that these have neither gradient nor moments nor sums.
pub fn tuning_memory(model: &ModelConfig, tune: &TuneConfig) -> MemoryPlan {
    let sequences = tune.micro_batch.saturating_mul(tune.sequences_per_example());
    let batch = Batch { sequences, length: tune.positions(), recompute: tune.recompute };
    // The number of each row that goes through the head and, for preferences, the weight of its loss.
    let of_rows = u128::from(batch.rows()) * u128::from(tune.sequences_per_example());
    let network = network_elements(model, &batch) + of_rows;
    let (count, trained) = (model.parameters(), tune.trainable(model));
    let Some(adapter) = &tune.adapter else {
        return planned([count; 3], tune.micro_batches(), network);
    };
    // A plan whose adapter is not sound does not run.
    let modules = adapter.modules(model).unwrap_or_default();
    // In preference training there is no noise.
    let drops = adapter.dropout > 0.0 && tune.method != Method::Dpo;
    let adapters = adapter_elements(&modules, drops, &batch);
    planned([count.saturating_add(trained), trained, count], tune.micro_batches(), network + adapters)
}

/// The memory for numbers of weights, of those that are trained and of those that are read, and for so many elements beside them.
fn planned([weights, trained, read]: [u64; 3], micro_batches: u64, elements: u128) -> MemoryPlan {
    // A sum that does not fit is more than any machine has.
    let activations = u64::try_from(elements.saturating_mul(4)).unwrap_or(u64::MAX);
    // A single micro-batch is its own sum, in place.
    let reduction = if micro_batches == 1 { 0 } else { 8 * trained };
    let (parameters, gradients, optimizer, loading) = (4 * weights, 4 * trained, 8 * trained, 4 * read);
    let training = (parameters + gradients + optimizer + reduction).saturating_add(activations);
    let total = training.max(parameters + optimizer + loading);
    MemoryPlan { parameters, gradients, optimizer, reduction, activations, loading, total }
}

/// Elements of activations, their gradients and scratch.
fn network_elements(model: &ModelConfig, batch: &Batch) -> u128 {
    let rows = batch.rows();
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
    let activations = if batch.recompute { kept(query, packed, ffn) } else { sum };
    let streams = (layers.len() as u64 + 1) * d;
    // Tokens, targets and documents; rows and positions of each other; losses.
    let tokens_and_losses = 3 + 3 + 2;
    let scratch = 2 * d + d.max(query * head) + 2 * packed + ffn;
    let per_row = activations + streams + tokens_and_losses + scratch;
    let norms = model.norm_scratch(rows as usize) as u64;
    let logits = rows.min(HEAD_ROWS as u64) * model.vocab_size as u64;
    let rope = batch.length as u64 * head;
    // This includes the first position of each sequence.
    u128::from(rows) * u128::from(per_row) + u128::from(batch.sequences + norms + logits + rope)
}

/// Elements that adapters of these modules take: what their forward pass keeps, what they use in turn, and with magnitudes the norms
/// of rows.
fn adapter_elements(modules: &[AdaptedModule], drops: bool, batch: &Batch) -> u128 {
    let largest = |of: &dyn Fn(&AdaptedModule) -> usize| modules.iter().map(of).max().unwrap_or_default();
    // Of matrices with magnitudes alone.
    let scaled = |module: &AdaptedModule, elements: usize| if module.has_magnitude { elements } else { 0 };
    let inputs = |module: &AdaptedModule| if drops && !module.is_embedding { module.inputs } else { 0 };
    let in_turn =
        largest(&|module| module.rank) + largest(&|module| scaled(module, module.outputs)) + largest(&inputs);
    let kept = |module: &AdaptedModule| [module.rank, scaled(module, module.outputs)];
    let kept: usize = if batch.recompute {
        // Of matrices of one kind, the largest of all layers; the embedding is a kind of its own.
        let mut kinds = BTreeMap::<&str, [usize; 2]>::new();
        for module in modules {
            let [rank, outputs] = kinds.entry(module.kind()).or_default();
            let [own_rank, own_outputs] = kept(module);
            (*rank, *outputs) = ((*rank).max(own_rank), (*outputs).max(own_outputs));
        }
        kinds.into_values().flatten().sum()
    } else {
        modules.iter().flat_map(kept).sum()
    };
    let norms: usize = modules.iter().map(|module| scaled(module, 3 * module.outputs)).sum();
    let products = largest(&|module| scaled(module, (2 * module.outputs + module.rank) * module.rank));
    // The number of each sequence in two words.
    let noise = if drops { 2 * batch.sequences } else { 0 };
    u128::from(batch.rows()) * (in_turn + kept) as u128 + (norms + products) as u128 + u128::from(noise)
}
