//! Which elements dropout leaves out, as a function of numbers that do not depend on who computes them.
//!
//! Every device computes the same: a key for each row, in 64 bits, and from it a hash for each element, in 32 bits, which
//! is compared with the rate.

use super::{Backend, In};

/// Elements that are left out of rows, and the factor of those that stay.
#[derive(Debug)]
pub struct Dropout<'a, B: Backend> {
    /// The number of each sequence, `[sequences, 2]`: low word, then high word.
    pub sequences: In<'a, B, u32>,
    /// Positions per sequence.
    pub length: usize,
    /// The position of each row, counted over all sequences.
    pub positions: In<'a, B, u32>,
    /// Tells these elements from those that other seeds and other layers leave out.
    pub key: u64,
    /// The probability with which an element is left out, from 0 to below 1; the others are multiplied by
    /// `1 / (1 − rate)`.
    pub rate: f32,
}

impl<B: Backend> Clone for Dropout<'_, B> {
    fn clone(&self) -> Self {
        Self { sequences: self.sequences.clone(), positions: self.positions.clone(), ..*self }
    }
}

/// What [`TrainingBackend::dropout`](super::TrainingBackend::dropout) makes of its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropoutPart {
    /// Elements that stay, multiplied; 0 elsewhere.
    Kept,
    /// The input minus [`DropoutPart::Kept`].
    Rest,
}

/// The key of a layer's noise, from the seed and the number of the layer.
pub fn dropout_key(seed: u64, layer: u64) -> u64 {
    mix(mix(seed).wrapping_add(layer))
}

/// The key of the row at `position` of a sequence.
#[inline]
pub fn dropout_row(key: u64, sequence: u64, position: u64) -> u64 {
    mix(mix(key.wrapping_add(sequence)).wrapping_add(position))
}

/// Whether the element in a column of a row stays; `threshold` is what [`dropout_threshold`] answers.
#[inline(always)]
#[expect(clippy::inline_always, reason = "vectorised code only calls what is inlined")]
pub fn dropout_keeps(row: u64, column: u32, threshold: u32) -> bool {
    let (low, high) = (row as u32, (row >> 32) as u32);
    let mut x = column.wrapping_mul(0x9e37_79b1).wrapping_add(low);
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x ^= high;
    x = x.wrapping_mul(0x846c_a68b);
    x ^= x >> 16;
    x >= threshold
}

/// The hashes below which an element is left out, and the factor of the others.
pub fn dropout_threshold(rate: f32) -> (u32, f32) {
    ((f64::from(rate) * 2f64.powi(32)) as u32, 1.0 / (1.0 - rate))
}

/// A bijection in which every bit of the result depends on every bit of the argument, after Stafford's variant 13.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `count` independent elements, the share that stays differs from its mean by less than four deviations.
    fn assert_share(kept: u64, count: u64, rate: f64) {
        let (mean, deviation) = (count as f64 * (1.0 - rate), (count as f64 * rate * (1.0 - rate)).sqrt());
        assert!((kept as f64 - mean).abs() < 4.0 * deviation, "{kept} of {count} at {rate}");
    }

    #[test]
    fn elements_are_left_out_independently() {
        for rate in [0.1_f32, 0.5, 0.9] {
            let (threshold, factor) = dropout_threshold(rate);
            assert!((f64::from(factor) * (1.0 - f64::from(rate)) - 1.0).abs() < 1e-6);
            let (rows, columns) = (300, 700);
            let kept = |row: u64, column: u32| {
                let key = dropout_row(dropout_key(7, row % 3), row / 30, row % 10);
                dropout_keeps(key, column, threshold)
            };
            let keeps = |a: &dyn Fn(u64, u32) -> bool| {
                let all = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
                all.filter(|(row, column)| a(*row, *column)).count() as u64
            };
            let count = rows * u64::from(columns);
            assert_share(keeps(&kept), count, f64::from(rate));
            // Neighbours along a row, and in layers, sequences and positions, say nothing about each other.
            let both = 1.0 - (1.0 - f64::from(rate)).powi(2);
            for (rows_on, columns_on) in [(0, 1), (1, 0), (3, 0), (10, 0), (30, 0), (30, 2)] {
                let pairs =
                    keeps(&|row, column| kept(row, column) && kept(row + rows_on, column + columns_on));
                assert_share(pairs, count, both);
            }
        }
    }

    #[test]
    fn a_rate_of_zero_keeps_everything() {
        let (threshold, factor) = dropout_threshold(0.0);
        assert!((0..1000).all(|column| dropout_keeps(dropout_row(1, 2, 3), column, threshold)));
        assert_eq!(factor, 1.0);
    }
}
