//! A reward head: how good an answer is, as a vector on the model's last hidden state. It learns from preferences, in which the better
//! answer should have the higher score (Bradley and Terry): the loss of a pair is `−log σ(score(chosen) − score(rejected))`.
//!
//! The hidden states do not change, so this is a logistic regression on their differences. Its loss is convex, and Newton's method
//! with conjugate gradients finds the minimum in a few steps, the same on every machine of a kind.

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// Weight of the squared length of the vector, as a share of the mean square of a component of the differences.
const RIDGE: f64 = 0.01;
/// Newton steps at most.
const STEPS: usize = 30;
/// Conjugate gradients of a step at most.
const INNER_STEPS: usize = 50;
/// The gradient is small enough when it is this part of the first one.
const ENOUGH: f64 = 1e-6;
/// How much smaller the residual of a Newton step becomes.
const INNER_ENOUGH: f64 = 1e-3;
/// The only tensor of a file: `[width]`, float64.
const TENSOR: &str = "reward_head";

/// A vector on the last hidden state.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RewardHead(Vec<f64>);

/// The pairs that a head learns from.
struct Pairs<'a> {
    /// `[pairs, width]`: the last hidden state after the better answer, less that after the other.
    differences: &'a [f32],
    width: usize,
    ridge: f64,
}

impl RewardHead {
    /// Learns from the differences `[pairs, width]` of the last hidden states after the better and the other answer.
    pub(crate) fn learn(differences: &[f32], width: usize) -> Self {
        let squares: f64 = differences.iter().map(|value| f64::from(*value).powi(2)).sum();
        let mean_square = squares / differences.len().max(1) as f64;
        let pairs = Pairs { differences, width, ridge: (RIDGE * mean_square).max(f64::MIN_POSITIVE) };
        let mut head = vec![0.0; width];
        let mut first = None;
        for _ in 0..STEPS {
            let (gradient, curvatures) = pairs.gradient(&head);
            let length = dot(&gradient, &gradient).sqrt();
            if length <= ENOUGH * *first.get_or_insert(length) {
                break;
            }
            let step = pairs.newton_step(&gradient, &curvatures);
            let loss = pairs.loss(&head);
            let moved = |share: f64| -> Vec<f64> {
                head.iter().zip(&step).map(|(weight, step)| weight + share * step).collect()
            };
            let shares = std::iter::successors(Some(1.0), |share| Some(share / 2.0)).take(INNER_STEPS);
            let Some(better) = shares.map(moved).find(|moved| pairs.loss(moved) < loss) else { break };
            head = better;
        }
        Self(head)
    }

    /// The score of an answer after which the last hidden state is this.
    pub(crate) fn score(&self, state: &[f32]) -> f64 {
        self.0.iter().zip(state).map(|(weight, value)| weight * f64::from(*value)).sum()
    }

    /// The share of pairs whose better answer it finds better, of the differences `[pairs, width]`; `None` without pairs.
    pub(crate) fn accuracy(&self, differences: &[f32]) -> Option<f64> {
        let pairs = differences.chunks_exact(self.0.len());
        let count = pairs.len();
        let right = pairs.filter(|difference| self.score(difference) > 0.0).count();
        (count > 0).then(|| right as f64 / count as f64)
    }

    /// Its values.
    pub(crate) fn values(&self) -> &[f64] {
        &self.0
    }

    /// The content of its file.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let view = TensorView::new(Dtype::F64, vec![self.0.len()], bytemuck::cast_slice(&self.0))
            .expect("the shape is that of the values");
        safetensors::serialize([(TENSOR, view)], None).expect("one tensor has a name of its own")
    }

    /// Reads what [`Self::to_bytes`] wrote, if it is a head for this width.
    pub(crate) fn from_bytes(bytes: &[u8], width: usize) -> Option<Self> {
        let tensors = SafeTensors::deserialize(bytes).ok()?;
        let tensor = tensors.tensor(TENSOR).ok().filter(|tensor| tensor.dtype() == Dtype::F64)?;
        let (values, _) = tensor.data().as_chunks::<8>();
        let values: Vec<f64> = values.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
        let is_head = values.len() == width && values.iter().all(|value| value.is_finite());
        is_head.then_some(Self(values))
    }
}

impl Pairs<'_> {
    fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.differences.chunks_exact(self.width)
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.rows().len().max(1) as f64
    }

    fn loss(&self, head: &[f64]) -> f64 {
        // log(1 + exp(−m)), without overflow.
        let of_margin = |margin: f64| (-margin.abs()).exp().ln_1p() + (-margin).max(0.0);
        self.mean(self.rows().map(|row| of_margin(margin(head, row))).sum())
            + 0.5 * self.ridge * dot(head, head)
    }

    /// The gradient, and the second derivative of each pair's loss by its margin.
    fn gradient(&self, head: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let mut sum = vec![0.0; self.width];
        let curvatures = self.rows().map(|row| {
            let wrong = 1.0 / (1.0 + margin(head, row).exp());
            add(&mut sum, -wrong, row);
            wrong * (1.0 - wrong)
        });
        let curvatures: Vec<f64> = curvatures.collect();
        let gradient = sum.iter().zip(head).map(|(sum, weight)| self.mean(*sum) + self.ridge * weight);
        (gradient.collect(), curvatures)
    }

    /// The product of the matrix of second derivatives and a vector.
    fn curved(&self, vector: &[f64], curvatures: &[f64]) -> Vec<f64> {
        let mut sum = vec![0.0; self.width];
        for (row, curvature) in self.rows().zip(curvatures) {
            add(&mut sum, curvature * margin(vector, row), row);
        }
        sum.iter().zip(vector).map(|(sum, value)| self.mean(*sum) + self.ridge * value).collect()
    }

    /// Where the quadratic model of the loss is smallest, by conjugate gradients.
    fn newton_step(&self, gradient: &[f64], curvatures: &[f64]) -> Vec<f64> {
        let mut step = vec![0.0; self.width];
        let mut residual: Vec<f64> = gradient.iter().map(|value| -value).collect();
        let mut direction = residual.clone();
        let mut left = dot(&residual, &residual);
        let enough = left * INNER_ENOUGH.powi(2);
        for _ in 0..INNER_STEPS {
            if left <= enough {
                break;
            }
            let curved = self.curved(&direction, curvatures);
            let length = left / dot(&direction, &curved);
            for at in 0..self.width {
                step[at] += length * direction[at];
                residual[at] -= length * curved[at];
            }
            let before = std::mem::replace(&mut left, dot(&residual, &residual));
            for at in 0..self.width {
                direction[at] = residual[at] + left / before * direction[at];
            }
        }
        step
    }
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

fn margin(head: &[f64], row: &[f32]) -> f64 {
    head.iter().zip(row).map(|(weight, value)| weight * f64::from(*value)).sum()
}

fn add(sum: &mut [f64], share: f64, row: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum += share * f64::from(*value);
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn differences(pairs: usize, truth: &[f64]) -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let mut uniform = move || (random.next_u32() as f64 / f64::from(u32::MAX) - 0.5) as f32;
        let mut all = Vec::new();
        for _ in 0..pairs {
            let mut row: Vec<f32> = truth.iter().map(|_| 4.0 * uniform()).collect();
            // Labels are wrong where the answers hardly differ, as people's are.
            if margin(truth, &row) + f64::from(uniform()) < 0.0 {
                for value in &mut row {
                    *value = -*value;
                }
            }
            all.extend(row);
        }
        all
    }

    #[test]
    fn a_head_finds_what_makes_answers_better() {
        let truth = [1.0, -2.0, 0.5, 0.0, 3.0];
        let all = differences(400, &truth);
        let (learned, others) = all.split_at(300 * truth.len());
        let head = RewardHead::learn(learned, truth.len());
        assert!(head.accuracy(others).unwrap() > 0.9);
        let similarity =
            dot(head.values(), &truth) / (dot(head.values(), head.values()) * dot(&truth, &truth)).sqrt();
        assert!(similarity > 0.98, "{similarity}");
        // It is the minimum: the gradient vanishes there.
        let squares: f64 = learned.iter().map(|value| f64::from(*value).powi(2)).sum();
        let ridge = RIDGE * squares / learned.len() as f64;
        let pairs = Pairs { differences: learned, width: truth.len(), ridge };
        let (gradient, _) = pairs.gradient(head.values());
        let (first, _) = pairs.gradient(&[0.0; 5]);
        assert!(dot(&gradient, &gradient).sqrt() < 1e-5 * dot(&first, &first).sqrt(), "{gradient:?}");
    }

    #[test]
    fn a_head_is_read_as_it_was_written_and_one_of_another_width_is_none() {
        let head = RewardHead(vec![1.5, -2.0]);
        assert_eq!(RewardHead::from_bytes(&head.to_bytes(), 2), Some(head.clone()));
        assert_eq!(RewardHead::from_bytes(&head.to_bytes(), 3), None);
        assert_eq!(RewardHead::from_bytes(&[1, 2], 2), None);
    }

    #[test]
    fn pairs_that_say_nothing_give_a_head_of_zeros() {
        let head = RewardHead::learn(&[0.0; 6], 3);
        assert_eq!((head.values(), head.accuracy(&[])), (&[0.0; 3][..], None));
    }
}
