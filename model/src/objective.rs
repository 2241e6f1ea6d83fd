//! What training minimises.

use std::ops::AddAssign;

use ulmus_backend::{IGNORE, Quantum};
use ulmus_plan::PreferenceLoss;

/// The loss of a stage of training.
///
/// Of positions `p` with logits `x[p]`, target `t[p]` and `lse[p] = log Σ_v exp(x[p][v])`, those whose target is
/// [`IGNORE`] count for nothing. Over the others, the *valid* ones,
///
/// ```text
/// ce = Σ_p (lse[p] − x[p][t[p]])        in nats
/// z  = Σ_p lse[p]²                      in nats²
/// ```
///
/// The gradient of a micro-batch is that of a sum over its positions or pairs, and the loss of a step is that sum over the
/// global batch, divided by [`Objective::divisor`]: it does not depend on how the batch is cut into micro-batches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// Next-token prediction: the sum is `ce + z_loss · z`. The logits of all positions are computed.
    NextToken {
        /// The weight of the z-loss, which keeps logits from growing.
        z_loss: f64,
    },
    /// The same loss for batches in which many positions are not valid: only the logits of those that are exist.
    Answers {
        /// The weight of the z-loss.
        z_loss: f64,
    },
    /// Preferences between two answers to a prompt: the sum of the losses of pairs. Sequences 2i and 2i + 1 of a batch are
    /// the chosen and the rejected answer of pair i, each behind the prompt. Dropout is off, as in TRL.
    Preferences(Preference),
}

impl Objective {
    /// Next-token prediction in which `z_loss` is the weight of the squared logsumexp.
    pub const fn next_token(z_loss: f64) -> Self {
        Self::NextToken { z_loss }
    }

    /// Whether only the rows of valid positions go through the head.
    pub(crate) fn is_sparse(self) -> bool {
        !matches!(self, Self::NextToken { .. })
    }

    /// The weight of the z-loss.
    pub(crate) fn z_loss(self) -> f64 {
        match self {
            Self::NextToken { z_loss } | Self::Answers { z_loss } => z_loss,
            Self::Preferences(_) => 0.0,
        }
    }

    /// The z-loss in the mean loss per valid position, its weight included; NaN if there is none.
    pub fn mean_z_loss(self, sum: &LossSum) -> f64 {
        self.z_loss() * sum.mean_z()
    }

    /// What the sums of a step's loss and gradient are divided by: the number of valid positions or of pairs.
    pub fn divisor(self, sum: &LossSum) -> u64 {
        match self {
            Self::NextToken { .. } | Self::Answers { .. } => sum.valid,
            Self::Preferences(_) => sum.pairs.count,
        }
    }

    /// The mean loss per valid position, without the z-loss, or per pair; NaN if there is none.
    pub fn mean_loss(self, sum: &LossSum) -> f64 {
        match self {
            Self::NextToken { .. } | Self::Answers { .. } => sum.mean_ce(),
            Self::Preferences(_) => sum.pairs.loss / sum.pairs.count as f64,
        }
    }

    /// The names of what [`Objective::metrics`] answers: those of TRL.
    pub const fn metric_names(self) -> &'static [&'static str] {
        match self {
            Self::NextToken { .. } | Self::Answers { .. } => &[],
            Self::Preferences(_) => &[
                "rewards/chosen",
                "rewards/rejected",
                "rewards/margins",
                "rewards/accuracies",
                "logps/chosen",
                "logps/rejected",
            ],
        }
    }

    /// Means over the pairs of a step, in the order of [`Objective::metric_names`]; NaN if there is no pair.
    pub fn metrics(self, sum: &LossSum) -> Vec<f64> {
        let PairSum { count, chosen_reward, rejected_reward, wins, chosen, rejected, .. } = sum.pairs;
        let sums =
            [chosen_reward, rejected_reward, chosen_reward - rejected_reward, wins as f64, chosen, rejected];
        sums.iter().take(self.metric_names().len()).map(|sum| sum / count as f64).collect()
    }

    /// The sums over positions with these targets, of which the head has made cross-entropy and logsumexp; added up in
    /// order, in f64.
    pub(crate) fn sum(targets: &[u32], cross_entropy: &[f32], lse: &[f32]) -> LossSum {
        let mut sum = LossSum::default();
        for ((target, ce), lse) in targets.iter().zip(cross_entropy).zip(lse) {
            if *target != IGNORE {
                sum.ce += f64::from(*ce);
                sum.z += f64::from(*lse).powi(2);
                sum.valid += 1;
            }
        }
        sum
    }
}

/// How likely a model finds the valid targets of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SequenceScore {
    /// The sum of their log-probabilities, in nats.
    pub log_probability: f64,
    /// Their number.
    pub tokens: u64,
}

/// One answer of a pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer {
    /// Its score under the model that is trained.
    pub policy: SequenceScore,
    /// Its log-probability under the reference model, in nats.
    pub reference: f64,
}

impl Answer {
    /// How much likelier the answer has become, in nats.
    fn gain(&self) -> f64 {
        self.policy.log_probability - self.reference
    }
}

/// The loss of a pair, and its derivatives by the log-probabilities of both answers under the trained model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// The loss.
    pub loss: f64,
    /// The derivative by the chosen answer's.
    pub chosen: f64,
    /// The derivative by the rejected answer's.
    pub rejected: f64,
}

/// The loss of a pair as a function of the *margin* h: how much likelier than the reference the model finds the chosen
/// answer, minus the same for the rejected one. All of it is computed in f64.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preference {
    /// The function.
    pub loss: PreferenceLoss,
    /// How much log-probabilities count.
    pub beta: f64,
    /// The share of pairs that are assumed to be labelled the wrong way round: the loss becomes
    /// `(1 − ε) · loss(h) + ε · loss(−h)`.
    pub label_smoothing: f64,
    /// Whether margins are of means over tokens. Those of [`PreferenceLoss::Ipo`] always are.
    pub length_normalised: bool,
}

impl Preference {
    /// The loss of one pair.
    pub fn pair(&self, chosen: Answer, rejected: Answer) -> PairLoss {
        let means = self.length_normalised || self.loss == PreferenceLoss::Ipo;
        // An answer without a token adds nothing to any sum.
        let count = |answer: Answer| if means { answer.policy.tokens.max(1) as f64 } else { 1.0 };
        let (n_chosen, n_rejected) = (count(chosen), count(rejected));
        let margin = chosen.gain() / n_chosen - rejected.gain() / n_rejected;
        let epsilon = self.label_smoothing;
        let ((right, slope), (wrong, back)) = (self.of_margin(margin), self.of_margin(-margin));
        let slope = (1.0 - epsilon) * slope - epsilon * back;
        PairLoss {
            loss: (1.0 - epsilon) * right + epsilon * wrong,
            chosen: slope / n_chosen,
            rejected: -slope / n_rejected,
        }
    }

    /// The value and the derivative at a margin, without smoothing.
    fn of_margin(&self, margin: f64) -> (f64, f64) {
        let (beta, scaled) = (self.beta, self.beta * margin);
        match self.loss {
            PreferenceLoss::Sigmoid => {
                // −log σ(x) = log(1 + exp(−x)), written so that no exponential overflows.
                let softplus = (-scaled).max(0.0) + (-scaled.abs()).exp().ln_1p();
                (softplus, -beta / (1.0 + scaled.exp()))
            }
            PreferenceLoss::Hinge if scaled < 1.0 => (1.0 - scaled, -beta),
            PreferenceLoss::Hinge => (0.0, 0.0),
            PreferenceLoss::Ipo => {
                let distance = margin - 1.0 / (2.0 * beta);
                (distance * distance, 2.0 * distance)
            }
        }
    }

    /// The sums over one pair, beside those over its positions.
    pub(crate) fn sum(&self, chosen: Answer, rejected: Answer) -> PairSum {
        let (chosen_reward, rejected_reward) = (self.beta * chosen.gain(), self.beta * rejected.gain());
        PairSum {
            count: 1,
            loss: self.pair(chosen, rejected).loss,
            chosen_reward,
            rejected_reward,
            wins: u64::from(chosen_reward > rejected_reward),
            chosen: chosen.policy.log_probability,
            rejected: rejected.policy.log_probability,
        }
    }
}

/// Sums over the pairs of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PairSum {
    /// Number of pairs.
    pub count: u64,
    /// Sum of losses.
    pub loss: f64,
    /// Sum of the chosen answers' rewards: β times how much likelier than the reference the model finds them.
    pub chosen_reward: f64,
    /// Sum of the rejected answers' rewards.
    pub rejected_reward: f64,
    /// Number of pairs whose chosen answer has the larger reward.
    pub wins: u64,
    /// Sum of the chosen answers' log-probabilities, in nats.
    pub chosen: f64,
    /// Sum of the rejected answers' log-probabilities, in nats.
    pub rejected: f64,
}

/// Sums over the valid positions of a batch, and over its pairs, as [`Objective`] defines them; they add up over
/// micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossSum {
    /// Sum of cross-entropies, in nats.
    pub ce: f64,
    /// Sum of squared logsumexps, without the weight of the z-loss.
    pub z: f64,
    /// Number of valid positions.
    pub valid: u64,
    /// Sums over pairs; all 0 if there are none.
    pub pairs: PairSum,
}

impl LossSum {
    /// Number of integers that [`LossSum::to_fixed`] makes.
    pub const TERMS: usize = 10;

    /// Mean cross-entropy per valid position; NaN if there is none.
    pub fn mean_ce(&self) -> f64 {
        self.ce / self.valid as f64
    }

    /// Mean squared logsumexp per valid position; NaN if there is none.
    pub fn mean_z(&self) -> f64 {
        self.z / self.valid as f64
    }

    /// The sums as integers, which can be added exactly, in any order.
    ///
    /// # Errors
    /// The first sum that is not finite or beyond [`Quantum::loss_to_fixed`].
    pub fn to_fixed(&self, quantum: &Quantum) -> Result<[i64; Self::TERMS], f64> {
        let pairs = &self.pairs;
        let fixed = |sum: f64| quantum.loss_to_fixed(sum).ok_or(sum);
        Ok([
            fixed(self.ce)?,
            fixed(self.z)?,
            self.valid.cast_signed(),
            pairs.count.cast_signed(),
            fixed(pairs.loss)?,
            fixed(pairs.chosen_reward)?,
            fixed(pairs.rejected_reward)?,
            pairs.wins.cast_signed(),
            fixed(pairs.chosen)?,
            fixed(pairs.rejected)?,
        ])
    }

    /// The sums of integers that [`LossSum::to_fixed`] made, or of sums of such integers.
    pub fn from_fixed(terms: &[i64; Self::TERMS]) -> Self {
        let [ce, z, valid, count, loss, chosen_reward, rejected_reward, wins, chosen, rejected] = *terms;
        let sum = Quantum::loss_from_fixed;
        Self {
            ce: sum(ce),
            z: sum(z),
            valid: valid.cast_unsigned(),
            pairs: PairSum {
                count: count.cast_unsigned(),
                loss: sum(loss),
                chosen_reward: sum(chosen_reward),
                rejected_reward: sum(rejected_reward),
                wins: wins.cast_unsigned(),
                chosen: sum(chosen),
                rejected: sum(rejected),
            },
        }
    }
}

impl AddAssign for PairSum {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.loss += other.loss;
        self.chosen_reward += other.chosen_reward;
        self.rejected_reward += other.rejected_reward;
        self.wins += other.wins;
        self.chosen += other.chosen;
        self.rejected += other.rejected;
    }
}

impl AddAssign for LossSum {
    fn add_assign(&mut self, other: Self) {
        self.ce += other.ce;
        self.z += other.z;
        self.valid += other.valid;
        self.pairs += other.pairs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOSSES: [PreferenceLoss; 3] = [PreferenceLoss::Sigmoid, PreferenceLoss::Hinge, PreferenceLoss::Ipo];

    fn answer(log_probability: f64, tokens: u64, reference: f64) -> Answer {
        Answer { policy: SequenceScore { log_probability, tokens }, reference }
    }

    #[test]
    fn ignored_positions_count_for_nothing() {
        let sum = Objective::sum(&[3, IGNORE, 5], &[1.0, f32::NAN, 2.5], &[2.0, f32::NAN, 3.0]);
        assert_eq!(sum, LossSum { ce: 3.5, z: 13.0, valid: 2, ..LossSum::default() });
        assert_eq!((sum.mean_ce(), sum.mean_z()), (1.75, 6.5));
        assert_eq!(Objective::next_token(0.5).mean_z_loss(&sum), 3.25);
        assert!(Objective::next_token(0.5).mean_z_loss(&LossSum::default()).is_nan());
    }

    #[test]
    fn slopes_are_those_of_the_losses() {
        for loss in LOSSES {
            for (label_smoothing, length_normalised) in [(0.0, false), (0.2, false), (0.0, true), (0.3, true)]
            {
                let preference = Preference { loss, beta: 0.3, label_smoothing, length_normalised };
                for (chosen, rejected) in [(-21.0, -24.5), (-30.0, -11.0), (-20.0, -20.5)] {
                    let of = |chosen, rejected| {
                        preference.pair(answer(chosen, 7, -20.0), answer(rejected, 4, -19.0))
                    };
                    let (found, step) = (of(chosen, rejected), 1e-5);
                    let by_chosen = of(chosen + step, rejected).loss - of(chosen - step, rejected).loss;
                    let by_rejected = of(chosen, rejected + step).loss - of(chosen, rejected - step).loss;
                    for (slope, difference) in [(found.chosen, by_chosen), (found.rejected, by_rejected)] {
                        let expected = difference / (2.0 * step);
                        assert!((slope - expected).abs() < 1e-6, "{preference:?}: {slope} for {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn equal_answers_teach_nothing_and_extreme_ones_stay_finite() {
        for loss in LOSSES {
            let preference = Preference { loss, beta: 0.1, label_smoothing: 0.0, length_normalised: false };
            let same = answer(-12.0, 3, -11.0);
            let PairLoss { chosen, rejected, .. } = preference.pair(same, same);
            assert_eq!(chosen + rejected, 0.0);
            for far in [-1e6, 1e6] {
                let PairLoss { loss, chosen, rejected } =
                    preference.pair(answer(far, 3, 0.0), answer(0.0, 0, 0.0));
                assert!(loss.is_finite() && chosen.is_finite() && rejected.is_finite());
            }
        }
    }

    #[test]
    fn integers_add_up_to_the_sums() {
        let preference = Preference {
            loss: PreferenceLoss::Sigmoid,
            beta: 0.5,
            label_smoothing: 0.0,
            length_normalised: false,
        };
        let quantum = Quantum::new(1 << 10, 4);
        let (mut sum, mut fixed) = (LossSum::default(), [0; LossSum::TERMS]);
        for shift in [0.0, -3.25, 8.5] {
            let pairs = preference.sum(answer(-20.0 + shift, 5, -20.0), answer(-30.0, 6, -29.5));
            let part = LossSum { ce: 3.5, z: 2.0, valid: 11, pairs };
            sum += part;
            fixed.iter_mut().zip(part.to_fixed(&quantum).unwrap()).for_each(|(sum, term)| *sum += term);
        }
        let found = LossSum::from_fixed(&fixed);
        assert_eq!((found.valid, found.pairs.count, found.pairs.wins), (33, 3, 2));
        let objective = Objective::Preferences(preference);
        assert!((objective.mean_loss(&found) - objective.mean_loss(&sum)).abs() < 1e-9);
        assert_eq!(objective.metrics(&found)[2], 0.5 * (0.5 * 3.0 + 5.25) / 3.0);
        assert_eq!((objective.divisor(&found), Objective::next_token(0.0).divisor(&found)), (3, 33));
        let lost = LossSum { ce: f64::NAN, ..sum };
        assert!(lost.to_fixed(&quantum).unwrap_err().is_nan());
    }
}
