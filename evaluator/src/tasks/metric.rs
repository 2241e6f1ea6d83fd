//! What is counted for each row, and how rows make a number with its standard error.

use serde::{Deserialize, Serialize};

/// A number that a task is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Share of rows whose likeliest choice is the right one; for tasks with several true choices, their share of the
    /// probability.
    Acc,
    /// The same with the log-likelihood per character of a choice.
    AccNorm,
    /// Difference of the log-likelihoods of two sentences.
    LikelihoodDiff,
    /// Share of pairs whose stereotypical sentence is the likelier one.
    PctStereotype,
    /// Perplexity per word.
    WordPerplexity,
    /// Perplexity per byte.
    BytePerplexity,
    /// Bits per byte.
    BitsPerByte,
}

impl Metric {
    /// Its name in the harness.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
            Self::LikelihoodDiff => "likelihood_diff",
            Self::PctStereotype => "pct_stereotype",
            Self::WordPerplexity => "word_perplexity",
            Self::BytePerplexity => "byte_perplexity",
            Self::BitsPerByte => "bits_per_byte",
        }
    }

    /// Whether it judges whole texts, and not choices.
    pub(crate) const fn is_of_text(self) -> bool {
        matches!(self, Self::WordPerplexity | Self::BytePerplexity | Self::BitsPerByte)
    }

    /// Whether it compares the two choices that a question must have.
    pub(crate) const fn is_of_pairs(self) -> bool {
        matches!(self, Self::LikelihoodDiff | Self::PctStereotype)
    }

    /// Whether more is better.
    pub const fn higher_is_better(self) -> bool {
        matches!(self, Self::Acc | Self::AccNorm)
    }
}

/// A number, and its standard error where there is one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// Its standard error; `None` for one row, and for perplexities.
    pub stderr: Option<f64>,
}

/// The mean of rows, and the standard error of the mean: the sample's standard deviation over √n.
pub(crate) fn mean(rows: &[f64]) -> Estimate {
    let count = rows.len() as f64;
    let value = rows.iter().sum::<f64>() / count;
    let squares: f64 = rows.iter().map(|row| (row - value).powi(2)).sum();
    let stderr = (rows.len() > 1).then(|| (squares / (count - 1.0)).sqrt() / count.sqrt());
    Estimate { value, stderr }
}

/// The mean over all rows of several tasks, each given by its mean and number of rows, and its standard error from the
/// pooled variance.
pub(crate) fn pooled(tasks: &[(Estimate, usize)]) -> Estimate {
    let count: usize = tasks.iter().map(|(_, rows)| rows).sum();
    let weighted = |of: &dyn Fn(Estimate, f64) -> f64| -> f64 {
        tasks.iter().map(|(estimate, rows)| of(*estimate, *rows as f64)).sum()
    };
    let value = weighted(&|estimate, rows| estimate.value * rows) / count as f64;
    let all_known = tasks.iter().all(|(estimate, _)| estimate.stderr.is_some());
    let stderr = all_known.then(|| {
        let squares =
            weighted(&|estimate, rows| (rows - 1.0) * rows * estimate.stderr.unwrap_or_default().powi(2));
        (squares / (count as f64 - tasks.len() as f64) / count as f64).sqrt()
    });
    Estimate { value, stderr }
}

/// A perplexity over a corpus: of its log-likelihood in nats, and its number of units.
pub(crate) fn per_unit(metric: Metric, log_likelihood: f64, units: f64) -> f64 {
    let nats = -log_likelihood / units;
    if metric == Metric::BitsPerByte { nats / std::f64::consts::LN_2 } else { nats.exp() }
}

/// The index of the largest number, the first one if several are; the first NaN if there is one, as numpy has it.
pub(crate) fn argmax(numbers: &[f64]) -> usize {
    let mut best = 0;
    for (index, number) in numbers.iter().enumerate() {
        if numbers[best].is_nan() {
            break;
        }
        if number.is_nan() || *number > numbers[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_the_error_of_a_sample() {
        assert_eq!(mean(&[1.0]), Estimate { value: 1.0, stderr: None });
        let estimate = mean(&[1.0, 0.0, 0.0]);
        assert!((estimate.value - 1.0 / 3.0).abs() < 1e-15);
        assert!((estimate.stderr.unwrap() - 0.333_333_333_333_333_37).abs() < 1e-15);
    }

    #[test]
    fn a_pool_weighs_its_tasks_by_their_rows() {
        let tasks = [(mean(&[1.0, 0.0, 1.0]), 3), (mean(&[0.0, 1.0]), 2)];
        let pool = pooled(&tasks);
        assert!((pool.value - 0.6).abs() < 1e-15);
        // By hand: sqrt((2 · 3 · 1/9 + 1 · 2 · 1/4) / (5 - 2) / 5).
        assert!((pool.stderr.unwrap() - (7.0_f64 / 6.0 / 15.0).sqrt()).abs() < 1e-15);
        assert_eq!(pooled(&[tasks[0], (mean(&[1.0]), 1)]).stderr, None);
    }

    #[test]
    fn the_first_of_equals_wins_and_nan_beats_all() {
        assert_eq!(argmax(&[0.0, 2.0, 2.0]), 1);
        assert_eq!(argmax(&[0.0, f64::NAN, 2.0]), 1);
        assert_eq!(argmax(&[f64::NEG_INFINITY, f64::NEG_INFINITY]), 0);
    }
}
