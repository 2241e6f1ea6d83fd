//! The step consensus: a few integers that are summed over the group in every step.
//!
//! All members see the same sum. So they take every decision of the group (to stop, to save, that an update failed) at
//! the same step, without another barrier.

use ulmus_model::{LossSum, Quantum};

/// One worker's share of the consensus; and the sum, which all members get.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StepConsensus {
    /// The number of tokens with a target.
    pub(super) valid: i64,
    /// The sum of cross-entropies, in fixed point.
    pub(super) loss: i64,
    /// The sum of squared logsumexps, in fixed point.
    pub(super) z: i64,
    /// The number of workers without a usable share, for instance because of a gradient that is not finite or data that
    /// cannot be read.
    pub(super) failed: i64,
    /// The number of workers with a source that is used up.
    pub(super) exhausted: i64,
    /// The number of workers that were asked for a checkpoint.
    pub(super) save: i64,
    /// The number of workers that were asked to pause.
    pub(super) pause: i64,
    /// The number of workers that were asked to stop.
    pub(super) stop: i64,
    /// The cursors of all lanes, each from the worker that hosts the lane and zero from all others.
    pub(super) cursors: Vec<i64>,
}

impl StepConsensus {
    /// Adds a micro-batch's losses in fixed point, so that their sum does not depend on who adds what.
    ///
    /// # Errors
    /// The loss, if it is not finite or too large to be summed.
    pub(super) fn add_loss(&mut self, loss: &LossSum, quantum: &Quantum) -> Result<(), f64> {
        let fixed = |sum: f64| quantum.loss_to_fixed(sum).ok_or(sum);
        let (ce, z) = (fixed(loss.ce)?, fixed(loss.z)?);
        self.valid += loss.valid as i64;
        self.loss += ce;
        self.z += z;
        Ok(())
    }

    /// The sum of the losses that were added.
    pub(super) fn loss_sum(&self) -> LossSum {
        LossSum {
            ce: Quantum::loss_from_fixed(self.loss),
            z: Quantum::loss_from_fixed(self.z),
            valid: self.valid as u64,
            ..LossSum::default()
        }
    }

    pub(super) fn to_vec(&self) -> Vec<i64> {
        let fixed =
            [self.valid, self.loss, self.z, self.failed, self.exhausted, self.save, self.pause, self.stop];
        fixed.into_iter().chain(self.cursors.iter().copied()).collect()
    }

    pub(super) fn from_slice(words: &[i64]) -> Self {
        let (fixed, cursors) = words.split_at(8);
        Self {
            valid: fixed[0],
            loss: fixed[1],
            z: fixed[2],
            failed: fixed[3],
            exhausted: fixed[4],
            save: fixed[5],
            pause: fixed[6],
            stop: fixed[7],
            cursors: cursors.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        let words = StepConsensus {
            valid: 1,
            loss: -2,
            z: 3,
            failed: 4,
            exhausted: 5,
            save: 6,
            pause: 7,
            stop: 8,
            cursors: vec![9, 10],
        };
        assert_eq!(StepConsensus::from_slice(&words.to_vec()), words);
    }
}
