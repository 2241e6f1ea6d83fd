//! The recipe: optimizer, schedule, batch and checkpoint grid.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use ulmus_types::Problems;

use crate::model::ModelConfig;
use crate::rules::{range, range_or, sound};

/// Nats that the sum of the losses of one update may reach, as integers carry it round a group.
const MAX_NATS: f64 = (1_u64 << 31) as f64;

/// The format to which the operands of matrix products are rounded. Sums, weights and everything else are float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// float32: not rounded.
    #[default]
    F32,
    /// bfloat16, rounded to nearest even; subnormals may become 0.
    Bf16,
}

impl Precision {
    /// The name used in plans and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// How a GPU library chooses among its algorithms for matrix products, which sum in different orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithms {
    /// The library's first heuristic, which depends on the device and the library alone.
    #[default]
    Library,
    /// The fastest algorithm. The first worker with a given kind of device measures, and shares its choice through the run
    /// folder. Another run may choose differently, and then differs in its bits.
    Measured,
}

/// How the weights are trained. The defaults are the published recipe of OpenELM-270M.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainConfig {
    /// Number of optimizer steps (`max_steps`), exactly.
    pub iterations: u64,
    /// Sequences per step over all workers (global batch size).
    pub sequences: u64,
    /// Sequences that go through the model at once (micro-batch size). Workers take whole micro-batches.
    pub micro_batch: u64,
    /// Peak learning rate, reached at the end of the warm-up.
    pub max_lr: f64,
    /// Learning rate at the end of the cosine schedule.
    pub min_lr: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Learning rate of the first step.
    pub warmup_init_lr: f64,
    /// AdamW: decay of the first moment.
    pub beta1: f64,
    /// AdamW: decay of the second moment.
    pub beta2: f64,
    /// AdamW: added to the root of the second moment.
    pub epsilon: f64,
    /// AdamW: decoupled weight decay of every tensor with two dimensions, the embedding included.
    pub weight_decay: f64,
    /// Gradient clipping: maximum L2 norm of the whole gradient (`grad_clip`).
    pub clip: f64,
    /// Weight of the z-loss, the mean squared log-sum-exp of the logits.
    pub z_loss: f64,
    /// Precision of the operands of matrix products; sums, weights and everything else are float32.
    pub precision: Precision,
    /// Activation checkpointing: recompute layers in the backward pass instead of keeping their activations. A third more
    /// work, less memory, bit-identical.
    pub recompute: bool,
    /// How cuBLASLt chooses matrix multiplication algorithms, which sum in different orders.
    pub algorithms: Algorithms,
    /// Steps between two evaluations of the held-out loss (`eval_interval`); 0 for none.
    pub held_out_every: u64,
    /// Held-out sequences per evaluation.
    pub held_out_sequences: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            iterations: 350_000,
            sequences: 2048,
            micro_batch: 16,
            max_lr: 0.0053,
            min_lr: 0.00053,
            warmup: 5000,
            warmup_init_lr: 1e-6,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
            z_loss: 1e-4,
            precision: Precision::F32,
            recompute: false,
            algorithms: Algorithms::Library,
            held_out_every: 5000,
            held_out_sequences: 1024,
        }
    }
}

impl TrainConfig {
    /// Micro-batches per update, M.
    pub fn micro_batches(&self) -> u64 {
        self.sequences / self.micro_batch.max(1)
    }

    /// The learning rate of update number `step` (0 for the first), rounded to 8 decimals as the reference does.
    ///
    /// It rises linearly from `warmup_init_lr`, then follows a cosine whose period is `iterations - warmup + 1`, so that the
    /// last update is slightly above `min_lr`.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let lr = if step < self.warmup {
            self.warmup_init_lr + step as f64 * (self.max_lr - self.warmup_init_lr) / self.warmup as f64
        } else {
            let period = self.iterations.saturating_sub(self.warmup) + 1;
            let progress = (step - self.warmup) as f64 / period as f64;
            self.min_lr + 0.5 * (self.max_lr - self.min_lr) * (1.0 + (std::f64::consts::PI * progress).cos())
        };
        (lr * 1e8).round_ties_even() / 1e8
    }

    /// Reports every rule that is broken; `model` is checked before.
    pub(crate) fn check(&self, model: &ModelConfig, problems: &mut Problems) {
        range(problems, "train.iterations", self.iterations, 1..=1 << 40);
        range(problems, "train.micro_batch", self.micro_batch, 1..);
        range(problems, "train.sequences", self.sequences, 1..);
        self.check_update(model, problems);
        // Bounds that only keep out what cannot train are no advice.
        for (key, value, least, most, published) in [
            ("train.max_lr", self.max_lr, 0.0, 1.0, 0.0053),
            ("train.beta1", self.beta1, 0.0, 0.999_999, 0.9),
            ("train.beta2", self.beta2, 0.0, 0.999_999_999, 0.95),
            ("train.epsilon", self.epsilon, 1e-15, 1.0, 1e-8),
            ("train.clip", self.clip, 1e-6, 1e6, 1.0),
        ] {
            let advice = format!("set it to {published:?}, as in the published recipe");
            range_or(problems, key, value, least..=most, advice);
        }
        let peak = if sound(problems, &["train.max_lr"]) { self.max_lr } else { 1.0 };
        for (key, value, most) in [
            ("train.min_lr", self.min_lr, peak),
            ("train.warmup_init_lr", self.warmup_init_lr, peak),
            ("train.weight_decay", self.weight_decay, 10.0),
            ("train.z_loss", self.z_loss, 1.0),
        ] {
            range(problems, key, value, 0.0..=most);
        }
        if sound(problems, &["train.iterations"]) {
            problems.check(
                self.warmup < self.iterations,
                "train.warmup",
                self.warmup,
                format!("the warm-up must end before train.iterations = {}", self.iterations),
                format!("set it to {}", self.iterations / 10),
            );
        }
        if self.held_out_every > 0 {
            range(problems, "train.held_out_sequences", self.held_out_sequences, 1..=1 << 24);
        }
    }

    /// An update is whole micro-batches, and no more of them than the sum of their losses has room for.
    fn check_update(&self, model: &ModelConfig, problems: &mut Problems) {
        if !sound(problems, &["train.micro_batch", "train.sequences"]) {
            return;
        }
        let micro = self.micro_batch;
        if sound(problems, &["model.vocab_size", "model.max_context_length"]) {
            // An untrained model has a loss of `ln V` per token, and of the z-loss its square.
            let per_token = (model.vocab_size.max(3) as f64).ln().powi(2);
            let most = ((MAX_NATS / (per_token * model.max_context_length as f64)) as u64).max(1);
            problems.check(
                self.sequences <= most,
                "train.sequences",
                self.sequences,
                format!(
                    "the losses of an update are summed up to 2^31: of {most} sequences of {} tokens at most",
                    model.max_context_length
                ),
                match most / micro {
                    0 => format!("set train.micro_batch to at most {most}, and this to a multiple of it"),
                    batches => format!("set train.sequences to {}", batches * micro),
                },
            );
        }
        if sound(problems, &["train.sequences"]) {
            let below = (self.micro_batches() * micro).max(micro);
            problems.check(
                self.sequences.is_multiple_of(micro),
                "train.sequences",
                self.sequences,
                format!("an update is whole micro-batches of {micro} sequences"),
                format!("set train.sequences to {below} or {}", below.saturating_add(micro)),
            );
        }
    }
}

/// When the state is saved, and which checkpoints are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckpointConfig {
    /// Steps between two milestones, which are kept.
    pub every: u64,
    /// How many of the last milestones are averaged.
    pub average: u64,
    /// Time between two recovery checkpoints, of which the newest two are kept.
    #[serde(with = "humantime_serde")]
    pub recovery: Duration,
    /// Whether to write the average in Hugging Face layout.
    pub export: bool,
    /// How old the newest stored state may become while nothing can be stored, as on a full disk, before the run ends. By
    /// default three times `recovery`.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Duration>,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 5000, average: 5, recovery: Duration::from_mins(10), export: true, max_age: None }
    }
}

impl CheckpointConfig {
    /// How old the newest stored state may become while nothing can be stored.
    pub fn oldest(&self) -> Duration {
        self.max_age.unwrap_or(self.recovery * 3)
    }

    /// Whether the state after `step` updates is a milestone of a run of `iterations`: on the grid, or the last.
    pub fn is_milestone(&self, step: u64, iterations: u64) -> bool {
        step > 0 && (step.is_multiple_of(self.every.max(1)) || step == iterations)
    }

    /// Reports every rule that is broken; `train` is checked before.
    pub(crate) fn check(&self, train: &TrainConfig, problems: &mut Problems) {
        let iterations = train.iterations;
        // The longest grid that still has as many milestones as are averaged.
        let longest = (iterations / self.average.max(1)).max(1);
        range_or(problems, "checkpoint.every", self.every, 1.., format!("set it to {}", longest.min(5000)));
        range(problems, "checkpoint.average", self.average, 1..);
        if sound(problems, &["checkpoint.every", "checkpoint.average", "train.iterations"]) {
            let milestones = iterations.div_ceil(self.every);
            problems.check(
                self.average <= milestones,
                "checkpoint.average",
                self.average,
                format!(
                    "train.iterations = {iterations} with checkpoint.every = {} makes {milestones} milestones",
                    self.every
                ),
                format!("set it to at most {milestones}, or checkpoint.every to at most {longest}"),
            );
        }
        let (least, most) = (Duration::from_secs(1), Duration::from_hours(365 * 24));
        range(problems, "checkpoint.recovery", self.recovery, least..=most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedule_meets_its_corner_values() {
        let recipe = TrainConfig::default();
        assert_eq!(recipe.learning_rate(0), 1e-6);
        assert_eq!(recipe.learning_rate(1), 2.06e-6);
        assert_eq!(recipe.learning_rate(5000), 0.0053);
        assert_eq!(recipe.learning_rate(177_500), 0.002_915_01);
        assert_eq!(recipe.learning_rate(350_000), 0.000_53);
    }

    #[test]
    fn the_last_update_is_a_milestone() {
        let grid = CheckpointConfig { every: 50, ..CheckpointConfig::default() };
        let milestones: Vec<u64> = (0..=120).filter(|step| grid.is_milestone(*step, 120)).collect();
        assert_eq!(milestones, [50, 100, 120]);
    }
}
