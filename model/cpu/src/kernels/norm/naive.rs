//! RMS norm as an eager framework computes it without a fused kernel: every operation goes over a whole tensor and
//! leaves its result in memory, where the next operation and the backward pass read it.
//!
//! OpenELM's authors trained with such norms and found that they made the model slow. This module exists to measure
//! that, so nothing takes fewer passes than in an eager framework. Because squares are rounded before they are summed,
//! results differ from those of the fused norm by rounding.

use ulmus_backend::RMS_EPSILON;
use ulmus_plan::ROW_BLOCK;

use super::passes::{
    combine, fill_rows, map, mean_of_rows, multiply_columns, multiply_rows, sum_columns, update,
};

/// Intermediate results for the norm of R rows of D elements. The forward pass leaves `normed` and `scale` for the
/// backward pass.
pub(super) struct Scratch<'a> {
    /// Temporary results, `[R, D]`.
    pub terms: &'a mut [f32],
    /// More temporary results, `[R, D]`.
    pub other: &'a mut [f32],
    /// Rows times their scale, `[R, D]`.
    pub normed: &'a mut [f32],
    /// Mean squares of rows, or their gradients, `[R]`.
    mean: &'a mut [f32],
    /// The factors that rows are multiplied by, `[R]`.
    scale: &'a mut [f32],
    /// Sums over blocks of rows, `[blocks, D]`.
    partial: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    /// Splits a buffer of [`ulmus_plan::NormKind::row_scratch`] elements.
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

/// Computes the gradients of the norm.
pub(super) fn norm_backward(
    x_gradient: &mut [f32],
    weight_gradient: Option<&mut [f32]>,
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

/// Goes back through the operations of [`norm`], last to first. The gradient of `x` is the sum of what this leaves in
/// `normed` (through the product) and in `terms` (through the scale).
pub(super) fn summands<'a>(
    weight_gradient: Option<&mut [f32]>,
    gradient: &[f32],
    x: &[f32],
    weight: &[f32],
    scratch: &'a mut [f32],
) -> Scratch<'a> {
    let d = weight.len();
    let Scratch { terms, other, normed, mean, scale, partial } = Scratch::new(scratch, x.len() / d, d);
    if let Some(weight_gradient) = weight_gradient {
        combine(terms, gradient, normed, |gradient, normed| gradient * normed);
        sum_columns(weight_gradient, terms, partial);
    }
    // From here on, `other` is the gradient of `normed`, and `normed` itself is no longer needed.
    multiply_columns(other, gradient, weight);
    combine(terms, other, x, |gradient, x| gradient * x);
    multiply_rows(normed, other, scale, d);
    // The gradient of a row's scale is the sum of the row. Taking the mean instead includes the division by D that
    // belongs to the gradient of the mean square.
    mean_of_rows(mean, terms, d);
    update(mean, scale, |gradient, scale| -0.5 * gradient * scale * scale * scale);
    fill_rows(terms, mean, d);
    map(other, x, |x| 2.0 * x);
    update(terms, other, |gradient, slope| gradient * slope);
    Scratch { terms, other, normed, mean, scale, partial }
}
