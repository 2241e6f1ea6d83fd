//! Sums of gradients and losses whose bits do not depend on who adds what, or in which order.
//!
//! Floating-point addition is not associative; integer addition is. So each micro-batch's gradient is rounded to a
//! multiple of one fixed *quantum* and added as a 64-bit integer, on every worker and across workers. The invariant of
//! this module: **no sum can wrap, and what cannot be represented is reported, never rounded away**. The module knows
//! nothing of devices; kernels take their constants from here.

/// The unit in which gradients are summed, and the largest gradient that one micro-batch may add.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantum {
    value: f64,
    limit: f64,
    loss_limit: f64,
}

/// Bits of headroom: the mean gradient per position may reach 2^10 before it no longer fits.
const HEADROOM: i32 = 10;
/// Sums stay at or below 2^62 plus rounding, so that they never wrap.
const SUM_BITS: i32 = 62;
/// Fraction bits of a loss sum that travels as an integer.
const LOSS_FRACTION: i32 = 32;

impl Quantum {
    /// The quantum of a run, from the number of positions in its global batch (padding included) and the number of
    /// micro-batches: 2^(10 + ceil(log2(positions)) − 62).
    ///
    /// # Panics
    /// If either number is 0.
    pub fn new(positions_per_global_batch: u64, micro_batches: u64) -> Self {
        assert!(positions_per_global_batch > 0 && micro_batches > 0, "a global batch has positions");
        let log2 = positions_per_global_batch.next_power_of_two().trailing_zeros() as i32;
        let value = 2f64.powi(HEADROOM + log2 - SUM_BITS);
        let micro_batches = micro_batches as f64;
        Self {
            value,
            limit: value * 2f64.powi(SUM_BITS) / micro_batches,
            loss_limit: (2f64.powi(63 - LOSS_FRACTION) - 1.0) / micro_batches,
        }
    }

    /// The quantum itself, a power of two.
    pub fn value(&self) -> f64 {
        self.value
    }

    /// The largest magnitude that an element of one micro-batch's gradient may have.
    pub fn limit(&self) -> f64 {
        self.limit
    }

    /// An element of a gradient in quanta, rounded half to even; `None` if it is NaN, infinite or beyond the limit.
    #[inline]
    pub fn quantise(&self, gradient: f32) -> Option<i64> {
        let gradient = f64::from(gradient);
        (gradient.abs() <= self.limit).then(|| (gradient / self.value).round_ties_even() as i64)
    }

    /// The factor that turns an integer sum into the mean over `valid` tokens; 0 if no token is valid.
    pub fn mean_scale(&self, valid: u64) -> f64 {
        if valid == 0 { 0.0 } else { self.value / valid as f64 }
    }

    /// The mean gradient: each exact sum in f64, times [`Quantum::mean_scale`], rounded once to f32.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn mean_into(&self, sums: &[i64], valid: u64, mean: &mut [f32]) {
        assert_eq!(sums.len(), mean.len(), "one mean per sum");
        let scale = self.mean_scale(valid);
        for (mean, sum) in mean.iter_mut().zip(sums) {
            *mean = (*sum as f64 * scale) as f32;
        }
    }

    /// A micro-batch's loss sum in units of 2^-32; `None` if it is NaN, infinite, or so large that the sum over all
    /// micro-batches could wrap (with 4 Mi positions, a mean of 512 per position).
    pub fn loss_to_fixed(&self, sum: f64) -> Option<i64> {
        (sum.abs() <= self.loss_limit).then(|| (sum * 2f64.powi(LOSS_FRACTION)).round_ties_even() as i64)
    }

    /// The loss of an integer that [`Quantum::loss_to_fixed`] made, or of a sum of such integers.
    pub fn loss_from_fixed(sum: i64) -> f64 {
        sum as f64 * 2f64.powi(-LOSS_FRACTION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantum_follows_its_formula() {
        let quantum = Quantum::new(4_194_304, 256);
        assert_eq!(quantum.value(), 2f64.powi(10 + 22 - 62));
        assert_eq!(quantum.limit(), 2f64.powi(10 + 22 - 8));
        assert_eq!(Quantum::new(4_194_305, 1).value(), 2f64.powi(10 + 23 - 62));
        assert_eq!(Quantum::new(1, 1).value(), 2f64.powi(-52));
    }

    #[test]
    fn rounding_is_half_to_even() {
        let quantum = Quantum::new(1 << 20, 4);
        let at = |quanta: f64| quantum.quantise((quanta * quantum.value()) as f32);
        assert_eq!(
            [at(0.5), at(1.5), at(2.5), at(-0.5), at(-1.5)],
            [Some(0), Some(2), Some(2), Some(0), Some(-2)]
        );
    }

    #[test]
    fn what_is_not_finite_or_too_large_is_caught() {
        let quantum = Quantum::new(1 << 20, 3);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            assert_eq!(quantum.quantise(bad), None, "{bad}");
        }
        let limit = quantum.limit() as f32;
        assert_eq!(quantum.quantise(limit.next_up()), None);
        assert!(quantum.quantise(limit.next_down()).is_some());
    }

    #[test]
    fn the_largest_sum_does_not_wrap() {
        for micro_batches in [1, 2, 3, 7, 512, 1000] {
            let quantum = Quantum::new(1 << 22, micro_batches);
            let limit = (quantum.limit() as f32).next_down();
            let one = quantum.quantise(limit).unwrap();
            let all = one.checked_mul(micro_batches as i64).unwrap();
            assert!(all <= (1 << 62) + micro_batches as i64);
        }
    }

    #[test]
    fn a_mean_over_no_token_is_zero() {
        let mut mean = [1.0];
        Quantum::new(8, 1).mean_into(&[5], 0, &mut mean);
        assert_eq!(mean, [0.0]);
    }

    #[test]
    fn losses_survive_the_fixed_point() {
        let quantum = Quantum::new(1 << 22, 128);
        assert_eq!(Quantum::loss_from_fixed(quantum.loss_to_fixed(1234.5).unwrap()), 1234.5);
        assert_eq!(quantum.loss_to_fixed(f64::NAN), None);
        let largest = 2f64.powi(31) / 128.0;
        assert_eq!(quantum.loss_to_fixed(largest), None);
        assert!(quantum.loss_to_fixed(largest - 1.0).unwrap().checked_mul(128).is_some());
    }

    proptest! {
        /// Any grouping and any order of the micro-batches gives the same bits as one sum from first to last.
        #[test]
        fn grouping_and_order_do_not_matter(
            gradients in prop::collection::vec(-1e3f32..1e3, 1..40),
            order in any::<prop::sample::Index>(),
            workers in 1usize..6,
        ) {
            let quantum = Quantum::new(1 << 16, gradients.len() as u64);
            let integers: Vec<i64> = gradients.iter().map(|g| quantum.quantise(*g).unwrap()).collect();
            let plain: i64 = integers.iter().sum();
            let mut turned = integers.clone();
            turned.rotate_left(order.index(integers.len()));
            let grouped: i64 = turned.chunks(integers.len().div_ceil(workers)).map(|part| part.iter().sum::<i64>()).rev().sum();
            let (mut one, mut other) = ([0.0], [0.0]);
            quantum.mean_into(&[plain], 777, &mut one);
            quantum.mean_into(&[grouped], 777, &mut other);
            prop_assert_eq!(one[0].to_bits(), other[0].to_bits());
            let reference = gradients.iter().map(|g| f64::from(*g)).sum::<f64>() / 777.0;
            prop_assert!((f64::from(one[0]) - reference).abs() <= 1e-6 * reference.abs() + 1e-9);
        }
    }
}
