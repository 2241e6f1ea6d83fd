//! The constants of AdamW in a stage of training.

use ulmus_backend::AdamW;
use ulmus_plan::{TrainConfig, TuneConfig};

/// Added to the gradient's norm before the clipping threshold is divided by it, as in the reference.
const CLIP_EPSILON: f64 = 1e-6;

/// What a stage says about its optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Optimizer {
    beta1: f64,
    beta2: f64,
    /// 1 − β1 and 1 − β2.
    shares: [f32; 2],
    epsilon: f64,
    weight_decay: f64,
    clip: f64,
}

impl From<&TrainConfig> for Optimizer {
    /// Shares are differences of rounded numbers. The bits of every run from before tuning depend on that.
    fn from(recipe: &TrainConfig) -> Self {
        let TrainConfig { beta1, beta2, epsilon, weight_decay, clip, .. } = *recipe;
        let shares = [beta1, beta2].map(|beta| 1.0 - beta as f32);
        Self { beta1, beta2, shares, epsilon, weight_decay, clip }
    }
}

impl From<&TuneConfig> for Optimizer {
    /// Shares are rounded once. With β2 = 0.999, the difference of rounded numbers would be wrong by a part in 10^5, and
    /// make each update as much too large.
    fn from(recipe: &TuneConfig) -> Self {
        let TuneConfig { beta1, beta2, epsilon, weight_decay, clip, .. } = *recipe;
        let shares = [beta1, beta2].map(|beta| (1.0 - beta) as f32);
        Self { beta1, beta2, shares, epsilon, weight_decay, clip }
    }
}

impl Optimizer {
    /// The numbers of a step with a gradient of this norm, for parameters without and with weight decay. `step` is the
    /// number of updates before it.
    pub(crate) fn step(&self, norm: f64, lr: f64, step: u64) -> [AdamW; 2] {
        let count = i32::try_from(step + 1).unwrap_or(i32::MAX);
        let [first_share, second_share] = self.shares;
        let plain = AdamW {
            gradient_scale: (self.clip / (norm + CLIP_EPSILON)).min(1.0) as f32,
            decay: 1.0,
            first_share,
            beta2: self.beta2 as f32,
            second_share,
            step_size: (lr / (1.0 - self.beta1.powi(count))) as f32,
            second_correction: (1.0 - self.beta2.powi(count)).sqrt() as f32,
            epsilon: self.epsilon as f32,
        };
        [plain, AdamW { decay: (1.0 - lr * self.weight_decay) as f32, ..plain }]
    }
}
