//! Operations on a finished gradient: exact sums, squared norms, and AdamW.

use rayon::prelude::*;
use ulmus_backend::{AdamW, BLOCK, Quantum};

use super::simd::vectorised;

/// Applies one AdamW step.
pub(crate) fn adamw(
    weights: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    gradient: &[f32],
    step: AdamW,
) {
    weights
        .par_chunks_mut(BLOCK)
        .zip(first.par_chunks_mut(BLOCK).zip(second.par_chunks_mut(BLOCK)))
        .zip(gradient.par_chunks(BLOCK))
        .for_each(|((weights, (first, second)), gradient)| {
            adamw_block(weights, first, second, gradient, step);
        });
}

vectorised! {
    fn adamw_block(weights: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32], step: AdamW) {
        let moments = first.iter_mut().zip(second);
        for ((weight, (first, second)), gradient) in weights.iter_mut().zip(moments).zip(gradient) {
            let gradient = gradient * step.gradient_scale;
            // In variables, because what is read back from the slices waits for what was written there.
            let mean = *first + step.first_share * (gradient - *first);
            let square = step.beta2 * *second + step.second_share * (gradient * gradient);
            (*first, *second) = (mean, square);
            let root = square.sqrt() / step.second_correction + step.epsilon;
            *weight = *weight * step.decay - step.step_size * (mean / root);
        }
    }
}

/// The sum of squares of each block.
pub(crate) fn block_squares(sums: &mut [f64], x: &[f32]) {
    sums.par_iter_mut().zip(x.par_chunks(BLOCK)).for_each(|(sum, block)| *sum = squares(block));
}

vectorised! {
    fn squares(x: &[f32]) -> f64 {
        let mut sums = [0f64; 8];
        let (chunks, rest) = x.as_chunks::<8>();
        for chunk in chunks {
            for i in 0..8 {
                sums[i] += f64::from(chunk[i]) * f64::from(chunk[i]);
            }
        }
        let mut sum = 0.0;
        for lane in sums {
            sum += lane;
        }
        for x in rest {
            sum += f64::from(*x) * f64::from(*x);
        }
        sum
    }
}

/// Adds the gradient, in quanta, to the sums, or overwrites them. `outside` becomes 1 if any element is out of range.
pub(crate) fn quantise(
    sums: &mut [i64],
    outside: &mut u32,
    gradient: &[f32],
    quantum: &Quantum,
    accumulate: bool,
) {
    // The quantum is a power of two, so multiplying by its inverse is exact.
    let (inverse, limit) = (1.0 / quantum.value(), quantum.limit());
    let in_range = sums
        .par_chunks_mut(BLOCK)
        .zip(gradient.par_chunks(BLOCK))
        .map(|(sums, gradient)| quantise_block(sums, gradient, inverse, limit, accumulate))
        .reduce(|| true, |a, b| a & b);
    *outside |= u32::from(!in_range);
}

/// Floats between 2^52 and 2^53 are integers, so adding this rounds half to even and leaves the integer in the low
/// bits.
const ROUNDER: f64 = 6_755_399_441_055_744.0;
const HIGH: f64 = 4_294_967_296.0;

/// Rounds up to 2^62 quanta half to even, and splits them into an upper and a lower part of 32 bits, each with
/// [`ROUNDER`] added, because few processors can convert vectors of f64 to integers. `quanta` comes from a float32 with
/// 24 significant bits, so only the fraction of the lower part is lost.
#[inline(always)]
fn split(quanta: f64) -> (f64, f64) {
    let high = quanta * (1.0 / HIGH) + ROUNDER;
    (high, quanta - (high - ROUNDER) * HIGH + ROUNDER)
}

#[inline(always)]
fn integer(rounded: f64) -> i64 {
    rounded.to_bits().wrapping_sub(ROUNDER.to_bits()) as i64
}

vectorised! {
    fn quantise_block(sums: &mut [i64], gradient: &[f32], inverse: f64, limit: f64, accumulate: bool) -> bool {
        let mut in_range = true;
        for (sum, gradient) in sums.iter_mut().zip(gradient) {
            let gradient = f64::from(*gradient);
            in_range &= gradient.abs() <= limit;
            let before = if accumulate { *sum } else { 0 };
            let (high, low) = split(gradient * inverse);
            // Nothing wraps for values in range, and if any is out of range, the sums are not used.
            *sum = before.wrapping_add(integer(high) << 32).wrapping_add(integer(low));
        }
        in_range
    }
}

/// Replaces the gradient by its integer number of quanta times `scale`. `outside` becomes 1 if any element is out of
/// range.
pub(crate) fn quantise_mean(gradient: &mut [f32], outside: &mut u32, quantum: &Quantum, scale: f64) {
    let (inverse, limit) = (1.0 / quantum.value(), quantum.limit());
    let in_range = gradient
        .par_chunks_mut(BLOCK)
        .map(|block| quantise_mean_block(block, inverse, limit, scale))
        .reduce(|| true, |a, b| a & b);
    *outside |= u32::from(!in_range);
}

vectorised! {
    fn quantise_mean_block(gradient: &mut [f32], inverse: f64, limit: f64, scale: f64) -> bool {
        let mut in_range = true;
        for gradient in gradient {
            let wide = f64::from(*gradient);
            in_range &= wide.abs() <= limit;
            let (high, low) = split(wide * inverse);
            *gradient = (((high - ROUNDER) * HIGH + (low - ROUNDER)) * scale) as f32;
        }
        in_range
    }
}

/// `mean = sums · scale`.
pub(crate) fn dequantise(mean: &mut [f32], sums: &[i64], scale: f64) {
    mean.par_chunks_mut(BLOCK)
        .zip(sums.par_chunks(BLOCK))
        .for_each(|(mean, sums)| dequantise_block(mean, sums, scale));
}

vectorised! {
    fn dequantise_block(mean: &mut [f32], sums: &[i64], scale: f64) {
        for (mean, sum) in mean.iter_mut().zip(sums) {
            *mean = (*sum as f64 * scale) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The numbers have all magnitudes, including some beyond the limit, and include halves between two integers.
        #[test]
        fn sums_and_means_are_those_of_the_quantum(
            numbers in prop::collection::vec((-(1_i32 << 24)..1 << 24, -30..42), 1..70),
            positions in 1_u64..1 << 24,
            valid in 1_u64..1 << 24,
        ) {
            let quantum = Quantum::new(positions, 1);
            let value = |(mantissa, exponent)| f64::from(mantissa) * 2_f64.powi(exponent) * quantum.value();
            let gradient: Vec<f32> = numbers.into_iter().map(|number| value(number) as f32).collect();
            let expected: Vec<Option<i64>> = gradient.iter().map(|x| quantum.quantise(*x)).collect();
            let (mut sums, mut outside) = (vec![7; gradient.len()], 0);
            quantise(&mut sums, &mut outside, &gradient, &quantum, true);
            prop_assert_eq!(outside == 1, expected.contains(&None));
            let scale = quantum.mean_scale(valid);
            let (mut means, mut outside) = (gradient.clone(), 0);
            quantise_mean(&mut means, &mut outside, &quantum, scale);
            prop_assert_eq!(outside == 1, expected.contains(&None));
            for ((sum, mean), expected) in sums.into_iter().zip(means).zip(expected) {
                if let Some(expected) = expected {
                    prop_assert_eq!(sum, expected + 7);
                    prop_assert_eq!(mean.to_bits(), ((expected as f64 * scale) as f32).to_bits());
                }
            }
        }
    }
}
