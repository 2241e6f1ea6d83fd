//! The order in which examples are learned: each once per epoch, in updates of equal size, of which the last takes what is left.
//!
//! The order depends on the seed and the number of examples alone, so an epoch and an update in it are all that a stage has to
//! remember.

use crate::order::examples_in_order;

/// Where a stage is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Update {
    /// The pass over all examples, from 0.
    pub epoch: u64,
    /// The update in it, from 0.
    pub index: u64,
}

/// Passes over examples.
#[derive(Debug, Clone)]
pub struct Epochs {
    examples: usize,
    batch: usize,
    shuffle: bool,
    seed: u64,
    /// The last epoch that was asked for, and its order.
    order: Option<(u64, Vec<u32>)>,
}

impl Epochs {
    /// Passes over a number of examples, of which each update takes `batch`, at least one. Without `shuffle` they come in
    /// their own order.
    pub fn new(examples: usize, batch: usize, shuffle: bool, seed: u64) -> Self {
        Self { examples, batch: batch.max(1), shuffle, seed, order: None }
    }

    /// Number of examples of an update.
    pub const fn batch(&self) -> usize {
        self.batch
    }

    /// Number of updates in an epoch.
    pub const fn updates(&self) -> u64 {
        self.examples.div_ceil(self.batch) as u64
    }

    /// Where a stage is that has made `steps` updates.
    pub const fn after(&self, steps: u64) -> Update {
        let updates = if self.updates() == 0 { 1 } else { self.updates() };
        Update { epoch: steps / updates, index: steps % updates }
    }

    /// The examples of an update, by their number. There are none behind the end of an epoch.
    pub fn examples(&mut self, update: Update) -> &[u32] {
        let Update { epoch, index } = update;
        let Self { examples, shuffle, seed, .. } = *self;
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let order = if shuffle {
                examples_in_order(examples, seed, epoch)
            } else {
                (0..examples as u32).collect()
            };
            self.order = Some((epoch, order));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
        let begin = usize::try_from(index).unwrap_or(usize::MAX).saturating_mul(self.batch).min(examples);
        &order[begin..examples.min(begin + self.batch)]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_example_is_learned_once_per_epoch(examples in 1_usize..300, batch in 1_usize..70, shuffle: bool, seed: u64) {
            let mut epochs = Epochs::new(examples, batch, shuffle, seed);
            let mut orders = Vec::new();
            for epoch in 0..3 {
                let mut order = Vec::new();
                for index in 0..epochs.updates() {
                    let update = Update { epoch, index };
                    prop_assert_eq!(epochs.after(epoch * epochs.updates() + index), update);
                    let taken = epochs.examples(update).to_vec();
                    // Whoever resumes there takes the same.
                    let mut resumed = Epochs::new(examples, batch, shuffle, seed);
                    prop_assert_eq!(&taken[..], resumed.examples(update));
                    let is_last = index + 1 == epochs.updates();
                    prop_assert_eq!(taken.len(), if is_last { examples - index as usize * batch } else { batch });
                    order.extend(taken);
                }
                let behind = Update { epoch, index: epochs.updates() };
                prop_assert!(epochs.examples(behind).is_empty());
                let mut sorted = order.clone();
                sorted.sort_unstable();
                prop_assert!(sorted.iter().copied().eq(0..examples as u32));
                prop_assert!(shuffle || order == sorted);
                orders.push(order);
            }
            prop_assert!(!shuffle || examples < 20 || orders[0] != orders[1] && orders[1] != orders[2]);
        }
    }
}
