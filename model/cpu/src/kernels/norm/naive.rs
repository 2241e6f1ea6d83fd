//! RMS norm as an eager framework computes it without a fused kernel: every operation goes over a whole tensor and
//! leaves its result in memory, where the next one and the backward read it.
//!
//! OpenELM's authors trained with it and found that its norms made the model slow. It is here to measure that, so
//! nothing is done in one pass that takes an eager framework two. Sums of rounded squares do not have the bits of the
//! fused norm; results differ by rounding alone.

use ulmus_backend::RMS_EPSILON;
use ulmus_plan::ROW_BLOCK;

use super::passes::{
    combine, fill_rows, map, mean_of_rows, multiply_columns, multiply_rows, sum_columns, update,
};

/// Intermediate results of the norm of R rows of D. The forward leaves `normed` and `scale` for the backward.
pub(super) struct Scratch<'a> {
    /// `[R, D]`.
    pub terms: &'a mut [f32],
    /// `[R, D]`.
    pub other: &'a mut [f32],
    /// Rows times their scale, `[R, D]`.
    pub normed: &'a mut [f32],
    /// Mean squares of rows, `[R]`, or the gradient of that.
    mean: &'a mut [f32],
    /// What rows are multiplied by, `[R]`.
    scale: &'a mut [f32],
    /// Sums over blocks of rows, `[blocks, D]`.
    partial: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    /// Cuts [`ulmus_plan::NormKind::row_scratch`] in pieces.
    fn new(scratch: &'a mut [f32], rows: usize, width: usize) -> Self {
        let (terms, scratch) = scratch.split_at_mut(rows * width);
        let (other, scratch) = scratch.split_at_mut(rows * width);
        let (normed, scratch) = scratch.split_at_mut(rows * width);
        let (mean, scratch) = scratch.split_at_mut(rows);
        let (scale, scratch) = scratch.split_at_mut(rows);
        let partial = &mut scratch[..rows.div_ceil(ROW_BLOCK) * width];
        Self { terms, other, normed, mean, scale, partial }
    }
}

/// `out = norm(x)`.
pub(super) fn norm(out: &mut [f32], x: &[f32], weight: &[f32], scratch: &mut [f32]) {
    let d = weight.len();
    let Scratch { terms, normed, mean, scale, .. } = Scratch::new(scratch, x.len() / d, d);
    map(terms, x, |x| x * x);
    mean_of_rows(mean, terms, d);
    map(scale, mean, |mean| 1.0 / (mean + RMS_EPSILON).sqrt());
    multiply_rows(normed, x, scale, d);
    multiply_columns(out, normed, weight);
}

/// `sum = x + delta`, `out = norm(sum)`.
pub(super) fn add_norm(
    sum: &mut [f32],
    out: &mut [f32],
    x: &[f32],
    delta: &[f32],
    weight: &[f32],
    scratch: &mut [f32],
) {
    combine(sum, x, delta, |x, delta| x + delta);
    norm(out, sum, weight, scratch);
}

/// Gradients of the norm.
pub(super) fn norm_backward(
    x_gradient: &mut [f32],
    weight_gradient: &mut [f32],
    gradient: &[f32],
    x: &[f32],
    weight: &[f32],
    accumulate: bool,
    scratch: &mut [f32],
) {
    let Scratch { terms, other, normed, .. } = summands(weight_gradient, gradient, x, weight, scratch);
    if accumulate {
        combine(other, normed, terms, |a, b| a + b);
        update(x_gradient, other, |before, own| before + own);
    } else {
        combine(x_gradient, normed, terms, |a, b| a + b);
    }
}

/// Goes back through the operations of [`norm`], last to first. What it leaves in `normed` and `terms` adds up to the
/// gradient of `x`: by way of the product, and by way of the scale.
pub(super) fn summands<'a>(
    weight_gradient: &mut [f32],
    gradient: &[f32],
    x: &[f32],
    weight: &[f32],
    scratch: &'a mut [f32],
) -> Scratch<'a> {
    let d = weight.len();
    let Scratch { terms, other, normed, mean, scale, partial } = Scratch::new(scratch, x.len() / d, d);
    combine(terms, gradient, normed, |gradient, normed| gradient * normed);
    sum_columns(weight_gradient, terms, partial);
    // From here `other` is the gradient of `normed`, which itself is not needed any more.
    multiply_columns(other, gradient, weight);
    combine(terms, other, x, |gradient, x| gradient * x);
    multiply_rows(normed, other, scale, d);
    // The gradient of the scale is the sum of a row; that of its mean square is divided by D where it goes to squares.
    mean_of_rows(mean, terms, d);
    update(mean, scale, |gradient, scale| -0.5 * gradient * scale * scale * scale);
    fill_rows(terms, mean, d);
    map(other, x, |x| 2.0 * x);
    update(terms, other, |gradient, slope| gradient * slope);
    Scratch { terms, other, normed, mean, scale, partial }
}
