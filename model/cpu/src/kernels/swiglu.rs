//! SwiGLU: `SiLU` of the first half of a row, multiplied by the second half.

use rayon::prelude::*;
use ulmus_plan::ROW_BLOCK;

use super::simd::{exp, vectorised};

/// `out = silu(gate) · up`; `x` has rows `[gate, up]`, each of `width`.
pub(crate) fn swiglu(out: &mut [f32], x: &[f32], width: usize) {
    out.par_chunks_mut(ROW_BLOCK * width)
        .zip(x.par_chunks(ROW_BLOCK * 2 * width))
        .for_each(|(out, x)| swiglu_rows(out, x, width));
}

vectorised! {
    fn swiglu_rows(out: &mut [f32], x: &[f32], width: usize) {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(2 * width)) {
            let (gate, up) = x.split_at(width);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }
}

/// Replaces both halves by their gradients, and the gradient of the output by the output.
pub(crate) fn swiglu_backward(x: &mut [f32], gradient: &mut [f32], width: usize) {
    x.par_chunks_mut(ROW_BLOCK * 2 * width)
        .zip(gradient.par_chunks_mut(ROW_BLOCK * width))
        .for_each(|(x, gradient)| swiglu_backward_rows(x, gradient, width));
}

vectorised! {
    fn swiglu_backward_rows(x: &mut [f32], gradient: &mut [f32], width: usize) {
        for row in 0..gradient.len() / width {
            let gradient = &mut gradient[row * width..][..width];
            let (gate, up) = x[row * 2 * width..][..2 * width].split_at_mut(width);
            for i in 0..width {
                let inverse = 1.0 + exp(-gate[i]);
                let sigmoid = 1.0 / inverse;
                let silu = gate[i] * sigmoid;
                let (slope, out) = (gradient[i], gate[i] / inverse * up[i]);
                gate[i] = slope * up[i] * (sigmoid + silu * (1.0 - sigmoid));
                up[i] = slope * silu;
                gradient[i] = out;
            }
        }
    }
}
