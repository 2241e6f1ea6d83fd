//! Single operations over whole tensors, each parallel by itself.

#![expect(clippy::needless_range_loop, reason = "iterator adapters are often not inlined in vectorised code")]

use rayon::prelude::*;
use ulmus_plan::ROW_BLOCK;

use super::super::simd::{sum, vectorised};
use super::rows::{row, row_blocks, row_blocks_mut, row_mut, sum_rows};

/// Number of elements that a thread takes at a time.
const PIECE: usize = 1 << 14;

/// `out = f(a, b)`.
pub(super) fn combine(out: &mut [f32], a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Copy + Sync) {
    out.par_chunks_mut(PIECE)
        .zip(a.par_chunks(PIECE).zip(b.par_chunks(PIECE)))
        .for_each(|(out, (a, b))| combine_piece(out, a, b, f));
}

vectorised! {
    fn combine_piece(out: &mut [f32], a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) {
        let (a, b) = (&a[..out.len()], &b[..out.len()]);
        for i in 0..out.len() {
            out[i] = f(a[i], b[i]);
        }
    }
}

/// `out = f(x)`.
pub(super) fn map(out: &mut [f32], x: &[f32], f: impl Fn(f32) -> f32 + Copy + Sync) {
    combine(out, x, x, |x, _| f(x));
}

/// `x = f(x, by)`.
pub(super) fn update(x: &mut [f32], by: &[f32], f: impl Fn(f32, f32) -> f32 + Copy + Sync) {
    x.par_chunks_mut(PIECE).zip(by.par_chunks(PIECE)).for_each(|(x, by)| update_piece(x, by, f));
}

vectorised! {
    fn update_piece(x: &mut [f32], by: &[f32], f: impl Fn(f32, f32) -> f32) {
        let by = &by[..x.len()];
        for i in 0..x.len() {
            x[i] = f(x[i], by[i]);
        }
    }
}

/// The mean of each row of `x`.
pub(super) fn mean_of_rows(means: &mut [f32], x: &[f32], width: usize) {
    means
        .par_chunks_mut(ROW_BLOCK)
        .zip(row_blocks(x, width))
        .for_each(|(means, x)| mean_of_rows_piece(means, x, width));
}

vectorised! {
    fn mean_of_rows_piece(means: &mut [f32], x: &[f32], width: usize) {
        for r in 0..means.len() {
            means[r] = sum(row(x, r, width)) / width as f32;
        }
    }
}

/// Fills each row with one value.
pub(super) fn fill_rows(out: &mut [f32], values: &[f32], width: usize) {
    row_blocks_mut(out, width).zip(values.par_chunks(ROW_BLOCK)).for_each(|(out, values)| {
        for (out, value) in out.chunks_mut(width).zip(values) {
            out.fill(*value);
        }
    });
}

/// Multiplies each row of `x` by its factor.
pub(super) fn multiply_rows(out: &mut [f32], x: &[f32], factors: &[f32], width: usize) {
    row_blocks_mut(out, width)
        .zip(row_blocks(x, width).zip(factors.par_chunks(ROW_BLOCK)))
        .for_each(|(out, (x, factors))| multiply_rows_piece(out, x, factors, width));
}

vectorised! {
    fn multiply_rows_piece(out: &mut [f32], x: &[f32], factors: &[f32], width: usize) {
        for r in 0..factors.len() {
            let (out, x, factor) = (row_mut(out, r, width), row(x, r, width), factors[r]);
            for i in 0..width {
                out[i] = x[i] * factor;
            }
        }
    }
}

/// Multiplies each column of `x` by its factor.
pub(super) fn multiply_columns(out: &mut [f32], x: &[f32], factors: &[f32]) {
    row_blocks_mut(out, factors.len())
        .zip(row_blocks(x, factors.len()))
        .for_each(|(out, x)| multiply_columns_piece(out, x, factors));
}

vectorised! {
    fn multiply_columns_piece(out: &mut [f32], x: &[f32], factors: &[f32]) {
        let width = factors.len();
        for r in 0..x.len() / width {
            let (out, x) = (row_mut(out, r, width), row(x, r, width));
            for i in 0..width {
                out[i] = x[i] * factors[i];
            }
        }
    }
}

/// The sum of each column of `x`. `partial` holds the sums of each block of rows.
pub(super) fn sum_columns(sums: &mut [f32], x: &[f32], partial: &mut [f32]) {
    let width = sums.len();
    partial.par_chunks_mut(width).zip(row_blocks(x, width)).for_each(|(partial, x)| sum_rows(partial, x));
    sum_rows(sums, partial);
}
