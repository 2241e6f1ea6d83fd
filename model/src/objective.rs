//! What training minimises.

use std::ops::AddAssign;

use ulmus_backend::{ActsMut, HeadGradients, IGNORE, Out, TrainingBackend};

/// Next-token prediction: cross-entropy, and a z-loss that keeps logits from growing.
///
/// Of positions `p` with logits `x[p]`, target `t[p]` and `lse[p] = log Σ_v exp(x[p][v])`, those whose target is
/// [`IGNORE`] count for nothing. Over the others, the *valid* ones,
///
/// ```text
/// ce = Σ_p (lse[p] − x[p][t[p]])        in nats
/// z  = Σ_p lse[p]²                      in nats²
/// ```
///
/// The gradient of a micro-batch is that of the sum `ce + z_loss · z`. The loss of a step is this sum over the global
/// batch, divided by the number of its valid positions: it does not depend on how the batch is cut into micro-batches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    z_loss: f64,
}

impl Objective {
    /// Next-token prediction in which `z_loss` is the weight of the squared logsumexp.
    pub const fn next_token(z_loss: f64) -> Self {
        Self { z_loss }
    }

    /// The z-loss in the mean loss per valid position, its weight included; NaN if there is none.
    pub fn mean_z_loss(self, sum: &LossSum) -> f64 {
        self.z_loss * sum.mean_z()
    }

    /// What the head is asked for: the gradients of the loss by its input and by its weights.
    pub(crate) fn head_gradients<'a, B: TrainingBackend>(
        self,
        hidden: ActsMut<'a, B>,
        table: Out<'a, B>,
    ) -> HeadGradients<'a, B> {
        HeadGradients { hidden, table, z_loss: self.z_loss as f32 }
    }

    /// The sums over positions with these targets, of which the head has made cross-entropy and logsumexp; added up in
    /// order, in f64.
    pub(crate) fn sum(targets: &[u32], cross_entropy: &[f32], lse: &[f32]) -> LossSum {
        let mut sum = LossSum::default();
        for ((target, ce), lse) in targets.iter().zip(cross_entropy).zip(lse) {
            if *target != IGNORE {
                sum += LossSum { ce: f64::from(*ce), z: f64::from(*lse).powi(2), valid: 1 };
            }
        }
        sum
    }
}

/// Sums over the valid positions of a batch, as [`Objective`] defines them; they add up over micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossSum {
    /// Sum of cross-entropies, in nats.
    pub ce: f64,
    /// Sum of squared logsumexps, without the weight of the z-loss.
    pub z: f64,
    /// Number of valid positions.
    pub valid: u64,
}

impl LossSum {
    /// Mean cross-entropy per valid position; NaN if there is none.
    pub fn mean_ce(&self) -> f64 {
        self.ce / self.valid as f64
    }

    /// Mean squared logsumexp per valid position; NaN if there is none.
    pub fn mean_z(&self) -> f64 {
        self.z / self.valid as f64
    }
}

impl AddAssign for LossSum {
    fn add_assign(&mut self, other: Self) {
        self.ce += other.ce;
        self.z += other.z;
        self.valid += other.valid;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_positions_count_for_nothing() {
        let sum = Objective::sum(&[3, IGNORE, 5], &[1.0, f32::NAN, 2.5], &[2.0, f32::NAN, 3.0]);
        assert_eq!(sum, LossSum { ce: 3.5, z: 13.0, valid: 2 });
        assert_eq!((sum.mean_ce(), sum.mean_z()), (1.75, 6.5));
        assert_eq!(Objective::next_token(0.5).mean_z_loss(&sum), 3.25);
        assert!(Objective::next_token(0.5).mean_z_loss(&LossSum::default()).is_nan());
    }
}
