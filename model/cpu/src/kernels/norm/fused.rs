//! Norms that read a row from memory once.

use rayon::prelude::*;
use ulmus_plan::ROW_BLOCK;

use super::super::simd::vectorised;
use super::row::{norm_backward_row, norm_row};
use super::rows::{row, row_blocks, row_blocks_mut, row_mut, sum_rows};

/// `out = norm(x)`.
pub(super) fn norm<const CENTRED: bool>(out: &mut [f32], x: &[f32], weight: &[f32]) {
    let d = weight.len();
    row_blocks_mut(out, d).zip(row_blocks(x, d)).for_each(|(out, x)| norm_rows::<CENTRED>(out, x, weight));
}

vectorised! {
    fn norm_rows<const CENTRED: bool>(out: &mut [f32], x: &[f32], weight: &[f32]) {
        let d = weight.len();
        for r in 0..x.len() / d {
            norm_row::<CENTRED>(row_mut(out, r, d), row(x, r, d), weight);
        }
    }
}

/// `sum = x + delta`, `out = norm(sum)`.
pub(super) fn add_norm<const CENTRED: bool>(
    sum: &mut [f32],
    out: &mut [f32],
    x: &[f32],
    delta: &[f32],
    weight: &[f32],
) {
    let d = weight.len();
    row_blocks_mut(sum, d)
        .zip(row_blocks_mut(out, d))
        .zip(row_blocks(x, d).zip(row_blocks(delta, d)))
        .for_each(|((sum, out), (x, delta))| add_norm_rows::<CENTRED>(sum, out, x, delta, weight));
}

vectorised! {
    fn add_norm_rows<const CENTRED: bool>(
        sum: &mut [f32],
        out: &mut [f32],
        x: &[f32],
        delta: &[f32],
        weight: &[f32],
    ) {
        let d = weight.len();
        for r in 0..x.len() / d {
            let (sum, x, delta) = (row_mut(sum, r, d), row(x, r, d), row(delta, r, d));
            for i in 0..d {
                sum[i] = x[i] + delta[i];
            }
            norm_row::<CENTRED>(row_mut(out, r, d), sum, weight);
        }
    }
}

/// Computes the gradients of the norm. `partial` holds one row of D elements per block of rows.
pub(super) fn norm_backward<const CENTRED: bool>(
    x_gradient: &mut [f32],
    weight_gradient: Option<&mut [f32]>,
    gradient: &[f32],
    x: &[f32],
    weight: &[f32],
    accumulate: bool,
    partial: &mut [f32],
) {
    let d = weight.len();
    row_blocks_mut(x_gradient, d)
        .zip(partial.par_chunks_mut(d))
        .zip(row_blocks(gradient, d).zip(row_blocks(x, d)))
        .for_each(|((x_gradient, partial), (gradient, x))| {
            norm_backward_rows::<CENTRED>(x_gradient, partial, gradient, x, weight, accumulate);
        });
    if let Some(weight_gradient) = weight_gradient {
        sum_rows(weight_gradient, &partial[..x.len().div_ceil(ROW_BLOCK * d) * d]);
    }
}

vectorised! {
    fn norm_backward_rows<const CENTRED: bool>(
        x_gradient: &mut [f32],
        partial: &mut [f32],
        gradient: &[f32],
        x: &[f32],
        weight: &[f32],
        accumulate: bool,
    ) {
        let d = weight.len();
        partial.fill(0.0);
        for r in 0..x.len() / d {
            let (x_gradient, gradient, x) = (row_mut(x_gradient, r, d), row(gradient, r, d), row(x, r, d));
            if accumulate {
                norm_backward_row::<CENTRED, true>(x_gradient, partial, gradient, x, weight);
            } else {
                norm_backward_row::<CENTRED, false>(x_gradient, partial, gradient, x, weight);
            }
        }
    }
}
