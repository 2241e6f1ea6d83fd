//! What adapters need beyond matrix products: dropout, and the magnitudes of DoRA.

use rayon::prelude::*;
use ulmus_backend::{DropoutPart, LinearShape, dropout_keeps, dropout_row, dropout_threshold};
use ulmus_plan::{Precision, ROW_BLOCK};

use super::linear::linear;
use super::simd::vectorised;
use super::view::Output;

/// Number of elements that a thread takes at a time.
const PIECE: usize = 1 << 14;
/// Number of columns whose sums a thread makes at a time.
const COLUMNS: usize = 64;

/// `x = factor · x`.
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    x.par_chunks_mut(PIECE).for_each(|x| scale_piece(x, factor));
}

vectorised! {
    fn scale_piece(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
}

/// See [`ulmus_backend::Dropout`].
pub(crate) struct Noise<'a> {
    pub sequences: &'a [u32],
    pub length: usize,
    pub positions: &'a [u32],
    pub key: u64,
    pub rate: f32,
}

impl Noise<'_> {
    /// The key of a row.
    fn row(&self, row: usize) -> u64 {
        let position = self.positions[row] as usize;
        let sequence = &self.sequences[2 * (position / self.length)..][..2];
        let sequence = u64::from(sequence[0]) | u64::from(sequence[1]) << 32;
        dropout_row(self.key, sequence, (position % self.length) as u64)
    }
}

/// See [`ulmus_backend::TrainingBackend::dropout`].
pub(crate) fn dropout(
    out: &mut [f32],
    x: &[f32],
    noise: &Noise<'_>,
    width: usize,
    part: DropoutPart,
    accumulate: bool,
) {
    let (threshold, factor) = dropout_threshold(noise.rate);
    let (kept, left_out) = match part {
        DropoutPart::Kept => (factor, 0.0),
        DropoutPart::Rest => (1.0 - factor, 1.0),
    };
    let blocks = out.par_chunks_mut(ROW_BLOCK * width).zip(x.par_chunks(ROW_BLOCK * width));
    blocks.enumerate().for_each(|(block, (out, x))| {
        for (row, (out, x)) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
            let key = noise.row(block * ROW_BLOCK + row);
            dropout_columns(out, x, key, threshold, [left_out, kept], accumulate);
        }
    });
}

vectorised! {
    fn dropout_columns(
        out: &mut [f32],
        x: &[f32],
        key: u64,
        threshold: u32,
        factors: [f32; 2],
        accumulate: bool,
    ) {
        let x = &x[..out.len()];
        for i in 0..out.len() {
            let factor = if dropout_keeps(key, i as u32, threshold) { factors[1] } else { factors[0] };
            let before = if accumulate { out[i] } else { 0.0 };
            out[i] = before + x[i] * factor;
        }
    }
}

/// See [`ulmus_backend::LowRank`].
pub(crate) struct Matrix<'a> {
    pub weight: &'a [f32],
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub scale: f32,
    pub inputs: usize,
    pub outputs: usize,
    pub rank: usize,
}

/// See [`ulmus_backend::TrainingBackend::gains`]. The square of a norm is that of the weights' row, plus the terms
/// `2 · scale · b · (A · weightsᵀ)` and `scale² · b · (A · Aᵀ) · bᵀ`, in which b is a row of B.
pub(crate) fn gains(
    gains: &mut [f32],
    magnitude: &[f32],
    squares: &[f32],
    matrix: &Matrix<'_>,
    scratch: &mut [f32],
) {
    let Matrix { weight, a, b, scale, inputs, outputs, rank } = *matrix;
    let (across, scratch) = scratch.split_at_mut(outputs * rank);
    let (among, scratch) = scratch.split_at_mut(outputs * rank);
    let squared = &mut scratch[..rank * rank];
    let product = |out: &mut [f32], x: &[f32], weight: &[f32], shape| {
        linear(out, x, weight, shape, Output::Overwrite, Precision::F32);
    };
    product(across, weight, a, LinearShape { rows: outputs, inputs, outputs: rank });
    product(squared, a, a, LinearShape { rows: rank, inputs, outputs: rank });
    // The product of A with itself is symmetric.
    product(among, b, squared, LinearShape { rows: outputs, inputs: rank, outputs: rank });
    let (gains, inverse) = gains.split_at_mut(outputs);
    for row in 0..outputs {
        let range = row * rank..(row + 1) * rank;
        let (mut with_weights, mut own) = (0.0, 0.0);
        for ((b, across), among) in b[range.clone()].iter().zip(&across[range.clone()]).zip(&among[range]) {
            with_weights += f64::from(*b) * f64::from(*across);
            own += f64::from(*b) * f64::from(*among);
        }
        let scale = f64::from(scale);
        let square = f64::from(squares[row]) + 2.0 * scale * with_weights + scale * scale * own;
        let norm = (square as f32).max(0.0).sqrt();
        (gains[row], inverse[row]) =
            if norm == 0.0 { (1.0, 0.0) } else { (magnitude[row] / norm, 1.0 / norm) };
    }
}

/// `out = x · gains`, column by column, or `out += x · gains`.
pub(crate) fn scale_columns(out: &mut [f32], x: &[f32], gains: &[f32], accumulate: bool) {
    let size = ROW_BLOCK * gains.len();
    out.par_chunks_mut(size)
        .zip(x.par_chunks(size))
        .for_each(|(out, x)| scale_columns_of_rows(out, x, gains, accumulate));
}

vectorised! {
    fn scale_columns_of_rows(out: &mut [f32], x: &[f32], gains: &[f32], accumulate: bool) {
        let width = gains.len();
        for r in 0..x.len() / width {
            let (out, x) = (&mut out[r * width..][..width], &x[r * width..][..width]);
            for i in 0..width {
                let before = if accumulate { out[i] } else { 0.0 };
                out[i] = before + x[i] * gains[i];
            }
        }
    }
}

/// See [`ulmus_backend::TrainingBackend::scale_columns_backward`].
pub(crate) fn scale_columns_backward(
    x_gradient: &mut [f32],
    magnitude_gradient: &mut [f32],
    gradient: &[f32],
    x: &[f32],
    gains: &[f32],
) {
    let (gains, inverse) = gains.split_at(magnitude_gradient.len());
    scale_columns(x_gradient, gradient, gains, false);
    magnitude_gradient.par_chunks_mut(COLUMNS).zip(inverse.par_chunks(COLUMNS)).enumerate().for_each(
        |(index, (sums, inverse))| {
            sum_columns(sums, gradient, x, [index * COLUMNS, gains.len()]);
            sums.iter_mut().zip(inverse).for_each(|(sum, inverse)| *sum *= inverse);
        },
    );
}

vectorised! {
    /// `Σ_rows a · b` for adjacent columns, block of rows by block of rows; `[first column, width of a row]`.
    fn sum_columns(sums: &mut [f32], a: &[f32], b: &[f32], place: [usize; 2]) {
        let ([first, width], count) = (place, sums.len());
        sums.fill(0.0);
        let rows = a.len() / width;
        let mut start = 0;
        while start < rows {
            let mut block = [0f32; COLUMNS];
            let end = rows.min(start + ROW_BLOCK);
            for r in start..end {
                let (a, b) = (&a[r * width + first..][..count], &b[r * width + first..][..count]);
                for i in 0..count {
                    block[i] = a[i].mul_add(b[i], block[i]);
                }
            }
            for i in 0..count {
                sums[i] += block[i];
            }
            start = end;
        }
    }
}
