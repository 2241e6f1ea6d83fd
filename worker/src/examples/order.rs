//! Which examples an update takes: a function of the seed and the update alone, so that a stage goes on anywhere.

use std::ops::Range;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use ulmus_plan::TuneConfig;

/// The order of a stage's examples.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    examples: u64,
    batch: u64,
    shuffle: bool,
    seed: u64,
    /// The order of the last epoch that was asked for.
    epoch: Option<(u64, Vec<u32>)>,
}

/// The examples of an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Update {
    /// Their indices.
    pub(crate) examples: Vec<usize>,
    /// How many examples were trained on before them.
    pub(crate) before: u64,
}

impl Order {
    /// The order of so many examples, at least one.
    pub(crate) fn new(examples: usize, config: &TuneConfig, seed: u64) -> Self {
        let (examples, batch) = (examples as u64, config.batch);
        Self { examples, batch, shuffle: config.shuffle, seed, epoch: None }
    }

    fn updates_per_epoch(&self) -> u64 {
        self.examples.div_ceil(self.batch)
    }

    /// The places in an epoch of the examples of update `step` (0 for the first), and the epoch. The last update of an epoch
    /// takes what is left.
    fn places(&self, step: u64) -> (u64, Range<u64>) {
        let (epoch, within) = (step / self.updates_per_epoch(), step % self.updates_per_epoch());
        let first = within * self.batch;
        (epoch, first..(first + self.batch).min(self.examples))
    }

    /// The number of examples before update `step`.
    pub(crate) fn before(&self, step: u64) -> u64 {
        let (epoch, places) = self.places(step);
        epoch * self.examples + places.start
    }

    /// The examples of update `step`.
    pub(crate) fn update(&mut self, step: u64) -> Update {
        let (epoch, places) = self.places(step);
        let before = epoch * self.examples + places.start;
        if !self.shuffle {
            return Update { examples: (places.start as usize..places.end as usize).collect(), before };
        }
        if self.epoch.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let mut order: Vec<u32> = (0..self.examples as u32).collect();
            let mut random = ChaCha8Rng::seed_from_u64(self.seed);
            random.set_stream(epoch);
            order.shuffle(&mut random);
            self.epoch = Some((epoch, order));
        }
        let order = self.epoch.as_ref().map_or(&[][..], |(_, order)| order);
        let examples = order[places.start as usize..places.end as usize].iter();
        Update { examples: examples.map(|example| *example as usize).collect(), before }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(examples: usize, batch: u64, shuffle: bool) -> Order {
        Order::new(examples, &TuneConfig { batch, shuffle, ..TuneConfig::default() }, 7)
    }

    proptest! {
        #[test]
        fn each_example_comes_once_in_an_epoch(examples in 1_usize..200, batch in 1_u64..40, epochs in 1_u64..4) {
            let mut order = order(examples, batch, true);
            let per_epoch = (examples as u64).div_ceil(batch);
            for epoch in 0..epochs {
                let mut seen = vec![0; examples];
                for step in epoch * per_epoch..(epoch + 1) * per_epoch {
                    let update = order.update(step);
                    prop_assert_eq!(update.before, epoch * examples as u64 + seen.iter().sum::<u64>());
                    prop_assert_eq!(update.before, order.before(step));
                    prop_assert!(!update.examples.is_empty() && update.examples.len() as u64 <= batch);
                    update.examples.iter().for_each(|example| seen[*example] += 1);
                    // Whoever begins here takes the same.
                    prop_assert_eq!(super::tests::order(examples, batch, true).update(step), update);
                }
                prop_assert!(seen.iter().all(|times| *times == 1));
            }
        }
    }

    #[test]
    fn rows_come_in_file_order_unless_they_are_shuffled() {
        let mut in_order = order(5, 2, false);
        let all: Vec<usize> = (0..4).flat_map(|step| in_order.update(step).examples).collect();
        assert_eq!(all, [0, 1, 2, 3, 4, 0, 1]);
        let mut shuffled = order(50, 50, true);
        let (first, second) = (shuffled.update(0).examples, shuffled.update(1).examples);
        assert_ne!(first, (0..50).collect::<Vec<_>>());
        assert_ne!(first, second, "each epoch has an order of its own");
    }
}
