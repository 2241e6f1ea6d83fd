//! The norm of one row. If the mean is subtracted first (`CENTRED`), it is layer norm, and else RMS norm. Apart from
//! that, only ε differs.

use ulmus_backend::{LAYER_EPSILON, RMS_EPSILON};

use super::super::simd::{LANES, dot, squares_about, sum, total};

/// The value that is subtracted from a row, and the factor that the difference is multiplied by.
#[inline(always)]
fn shift_and_scale<const CENTRED: bool>(x: &[f32]) -> (f32, f32) {
    let width = x.len() as f32;
    // The compiler removes the subtraction of a constant zero.
    let (mean, epsilon) = if CENTRED { (sum(x) / width, LAYER_EPSILON) } else { (0.0, RMS_EPSILON) };
    (mean, 1.0 / (squares_about(mean, x) / width + epsilon).sqrt())
}

#[inline(always)]
pub(super) fn norm_row<const CENTRED: bool>(out: &mut [f32], x: &[f32], weight: &[f32]) {
    let (mean, scale) = shift_and_scale::<CENTRED>(x);
    let (x, weight) = (&x[..out.len()], &weight[..out.len()]);
    for i in 0..out.len() {
        out[i] = (x[i] - mean) * scale * weight[i];
    }
}

/// With c = x − mean and the scale s: `dx = s · (g·w − mean(g·w) − c · s² · mean(g·w·c))`, `dw += g · c · s`.
/// The second term belongs to the mean, so RMS norm does not have it.
#[inline(always)]
pub(super) fn norm_backward_row<const CENTRED: bool, const ACCUMULATE: bool>(
    x_gradient: &mut [f32],
    weight_gradient: &mut [f32],
    gradient: &[f32],
    x: &[f32],
    weight: &[f32],
) {
    let width = x.len();
    let (mean, scale) = shift_and_scale::<CENTRED>(x);
    let pull = dot3(gradient, weight, x, mean) * scale * scale / width as f32;
    let of_mean = if CENTRED { dot(gradient, weight) / width as f32 } else { 0.0 };
    let (gradient, weight) = (&gradient[..width], &weight[..width]);
    let (x_gradient, weight_gradient) = (&mut x_gradient[..width], &mut weight_gradient[..width]);
    for i in 0..width {
        let x = x[i] - mean;
        let own = scale * (gradient[i] * weight[i] - of_mean - x * pull);
        x_gradient[i] = if ACCUMULATE { x_gradient[i] + own } else { own };
        weight_gradient[i] += gradient[i] * x * scale;
    }
}

/// `Σ a·b·(c − mean)`, in the same order as all reductions.
#[inline(always)]
fn dot3(a: &[f32], b: &[f32], c: &[f32], mean: f32) -> f32 {
    let mut sums = [0f32; LANES];
    let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let (c_chunks, c_rest) = c.as_chunks::<LANES>();
    let chunks = a_chunks.len().min(b_chunks.len()).min(c_chunks.len());
    for chunk in 0..chunks {
        let (a, b, c) = (&a_chunks[chunk], &b_chunks[chunk], &c_chunks[chunk]);
        for i in 0..LANES {
            sums[i] = (a[i] * b[i]).mul_add(c[i] - mean, sums[i]);
        }
    }
    let mut sum = total(sums);
    for i in 0..a_rest.len().min(b_rest.len()).min(c_rest.len()) {
        sum = (a_rest[i] * b_rest[i]).mul_add(c_rest[i] - mean, sum);
    }
    sum
}
