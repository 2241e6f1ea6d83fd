//! The step consensus: a few integers that are summed over the group in every step.
//!
//! All members see the same sum. So they take every decision of the group (to stop, to save, that an update failed) at
//! the same step, without another barrier.

use ulmus_model::{LossSum, Quantum};

/// The number of integers before the cursors.
const FIXED: usize = LossSum::TERMS + 5;

/// One worker's share of the consensus; and the sum, which all members get.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StepConsensus {
    /// The sums of losses, in fixed point.
    pub(super) losses: [i64; LossSum::TERMS],
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
        for (sum, term) in self.losses.iter_mut().zip(loss.to_fixed(quantum)?) {
            *sum += term;
        }
        Ok(())
    }

    /// The sum of the losses that were added.
    pub(super) fn loss_sum(&self) -> LossSum {
        LossSum::from_fixed(&self.losses)
    }

    pub(super) fn to_vec(&self) -> Vec<i64> {
        let flags = [self.failed, self.exhausted, self.save, self.pause, self.stop];
        self.losses.into_iter().chain(flags).chain(self.cursors.iter().copied()).collect()
    }

    pub(super) fn from_slice(words: &[i64]) -> Self {
        let (fixed, cursors) = words.split_at(FIXED);
        let (losses, flags) = fixed.split_at(LossSum::TERMS);
        Self {
            losses: losses.try_into().expect("they were cut to that length"),
            failed: flags[0],
            exhausted: flags[1],
            save: flags[2],
            pause: flags[3],
            stop: flags[4],
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
            losses: [1, -2, 3, 4, 5, 6, 7, 8, 9, 10],
            failed: 11,
            exhausted: 12,
            save: 13,
            pause: 14,
            stop: 15,
            cursors: vec![16, 17],
        };
        assert_eq!(words.to_vec(), (1..=17).map(|n| if n == 2 { -2 } else { n }).collect::<Vec<_>>());
        assert_eq!(StepConsensus::from_slice(&words.to_vec()), words);
    }
}
