//! SwiGLU: the first half of a row goes through `SiLU`, the second half multiplies.

use rayon::prelude::*;

use super::simd::{exp, vectorised};
use crate::backend::ROW_BLOCK;

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

/// Gradients of both halves.
pub(crate) fn swiglu_backward(x_gradient: &mut [f32], gradient: &[f32], x: &[f32], width: usize) {
    x_gradient
        .par_chunks_mut(ROW_BLOCK * 2 * width)
        .zip(gradient.par_chunks(ROW_BLOCK * width))
        .zip(x.par_chunks(ROW_BLOCK * 2 * width))
        .for_each(|((x_gradient, gradient), x)| swiglu_backward_rows(x_gradient, gradient, x, width));
}

vectorised! {
    fn swiglu_backward_rows(x_gradient: &mut [f32], gradient: &[f32], x: &[f32], width: usize) {
        let inputs = gradient.chunks_exact(width).zip(x.chunks_exact(2 * width));
        for (x_gradient, (gradient, x)) in x_gradient.chunks_exact_mut(2 * width).zip(inputs) {
            let (gate_gradient, up_gradient) = x_gradient.split_at_mut(width);
            let (gate, up) = x.split_at(width);
            for i in 0..width {
                let sigmoid = 1.0 / (1.0 + exp(-gate[i]));
                let silu = gate[i] * sigmoid;
                up_gradient[i] = gradient[i] * silu;
                gate_gradient[i] = gradient[i] * up[i] * (sigmoid + silu * (1.0 - sigmoid));
            }
        }
    }
}
