//! RMS norm, alone, after a residual add, and over heads followed by the rotary embedding.

use rayon::prelude::*;

use super::simd::{LANES, dot, vectorised};
use crate::backend::{Heads, ROW_BLOCK};

/// Added to the mean square, as in the reference.
const EPSILON: f32 = 1e-6;

/// `1 / sqrt(mean(x²) + ε)`.
#[inline(always)]
fn inverse_rms(x: &[f32]) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + EPSILON).sqrt()
}

/// Blocks of [`ROW_BLOCK`] rows of that width, in parallel.
macro_rules! row_blocks {
    ($slice:expr, mut $width:expr) => {
        $slice.par_chunks_mut(ROW_BLOCK * $width)
    };
    ($slice:expr, $width:expr) => {
        $slice.par_chunks(ROW_BLOCK * $width)
    };
}

/// `out = norm(x)`.
pub(crate) fn norm(out: &mut [f32], x: &[f32], weight: &[f32]) {
    let d = weight.len();
    row_blocks!(out, mut d).zip(row_blocks!(x, d)).for_each(|(out, x)| norm_rows(out, x, weight));
}

vectorised! {
    fn norm_rows(out: &mut [f32], x: &[f32], weight: &[f32]) {
        let d = weight.len();
        for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            norm_row(out, x, weight);
        }
    }
}

#[inline(always)]
fn norm_row(out: &mut [f32], x: &[f32], weight: &[f32]) {
    let scale = inverse_rms(x);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// `sum = x + delta`, `out = norm(sum)`.
pub(crate) fn add_norm(sum: &mut [f32], out: &mut [f32], x: &[f32], delta: &[f32], weight: &[f32]) {
    let d = weight.len();
    row_blocks!(sum, mut d)
        .zip(row_blocks!(out, mut d))
        .zip(row_blocks!(x, d).zip(row_blocks!(delta, d)))
        .for_each(|((sum, out), (x, delta))| add_norm_rows(sum, out, x, delta, weight));
}

vectorised! {
    fn add_norm_rows(sum: &mut [f32], out: &mut [f32], x: &[f32], delta: &[f32], weight: &[f32]) {
        let d = weight.len();
        let inputs = x.chunks_exact(d).zip(delta.chunks_exact(d));
        for ((sum, out), (x, delta)) in sum.chunks_exact_mut(d).zip(out.chunks_exact_mut(d)).zip(inputs) {
            for ((sum, x), delta) in sum.iter_mut().zip(x).zip(delta) {
                *sum = x + delta;
            }
            norm_row(out, sum, weight);
        }
    }
}

/// Gradients of the norm. `partial` holds one row of `D` per block of rows.
pub(crate) fn norm_backward(
    x_gradient: &mut [f32],
    weight_gradient: &mut [f32],
    gradient: &[f32],
    x: &[f32],
    weight: &[f32],
    accumulate: bool,
    partial: &mut [f32],
) {
    let d = weight.len();
    row_blocks!(x_gradient, mut d)
        .zip(partial.par_chunks_mut(d))
        .zip(row_blocks!(gradient, d).zip(row_blocks!(x, d)))
        .for_each(|((x_gradient, partial), (gradient, x))| {
            norm_backward_rows(x_gradient, partial, gradient, x, weight, accumulate);
        });
    sum_rows(weight_gradient, &partial[..x.len().div_ceil(ROW_BLOCK * d) * d]);
}

vectorised! {
    fn norm_backward_rows(
        x_gradient: &mut [f32],
        partial: &mut [f32],
        gradient: &[f32],
        x: &[f32],
        weight: &[f32],
        accumulate: bool,
    ) {
        let d = weight.len();
        partial.fill(0.0);
        let inputs = gradient.chunks_exact(d).zip(x.chunks_exact(d));
        for (x_gradient, (gradient, x)) in x_gradient.chunks_exact_mut(d).zip(inputs) {
            if accumulate {
                norm_backward_row::<true>(x_gradient, partial, gradient, x, weight);
            } else {
                norm_backward_row::<false>(x_gradient, partial, gradient, x, weight);
            }
        }
    }
}

/// With s = `inverse_rms(x)`: `dx = s · (g·w − x · s² · mean(g·w·x))`, `dw += g · x · s`.
#[inline(always)]
fn norm_backward_row<const ACCUMULATE: bool>(
    x_gradient: &mut [f32],
    weight_gradient: &mut [f32],
    gradient: &[f32],
    x: &[f32],
    weight: &[f32],
) {
    let scale = inverse_rms(x);
    let pull = dot3(gradient, weight, x) * scale * scale / x.len() as f32;
    let rows = gradient.iter().zip(x).zip(weight);
    for ((x_gradient, weight_gradient), ((gradient, x), weight)) in
        x_gradient.iter_mut().zip(weight_gradient.iter_mut()).zip(rows)
    {
        let own = scale * (gradient * weight - x * pull);
        *x_gradient = if ACCUMULATE { *x_gradient + own } else { own };
        *weight_gradient += gradient * x * scale;
    }
}

/// `Σ a·b·c`, in the order of all reductions.
#[inline(always)]
fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let whole = a.len() / LANES * LANES;
    for ((a, b), c) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)).zip(c.chunks_exact(LANES)) {
        for i in 0..LANES {
            sums[i] = (a[i] * b[i]).mul_add(c[i], sums[i]);
        }
    }
    let mut sum = 0.0;
    for lane in sums {
        sum += lane;
    }
    for i in whole..a.len() {
        sum = (a[i] * b[i]).mul_add(c[i], sum);
    }
    sum
}

vectorised! {
    /// Adds rows of `total.len()`, first to last.
    fn sum_rows(total: &mut [f32], rows: &[f32]) {
        total.fill(0.0);
        for row in rows.chunks_exact(total.len()) {
            for (total, x) in total.iter_mut().zip(row) {
                *total += x;
            }
        }
    }
}

/// Cosines and sines `[positions, H/2]`; row r has position `first + r % length`.
#[derive(Clone, Copy)]
pub(crate) struct RopeTables<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub first: usize,
    pub length: usize,
}

impl<'a> RopeTables<'a> {
    #[inline(always)]
    fn row(&self, row: usize, half: usize) -> (&'a [f32], &'a [f32]) {
        let at = (self.first + row % self.length) * half;
        (&self.cos[at..at + half], &self.sin[at..at + half])
    }
}

/// Query and key heads normed and rotated, value heads copied. `weights` is `[2, H]`.
pub(crate) fn qk_norm_rope(
    out: &mut [f32],
    packed: &[f32],
    weights: &[f32],
    rope: RopeTables<'_>,
    heads: Heads,
) {
    let width = heads.packed_width();
    row_blocks!(out, mut width)
        .zip(row_blocks!(packed, width))
        .enumerate()
        .for_each(|(block, (out, packed))| qk_rows(out, packed, weights, rope, heads, block * ROW_BLOCK));
}

vectorised! {
    fn qk_rows(out: &mut [f32], packed: &[f32], weights: &[f32], rope: RopeTables<'_>, heads: Heads, first: usize) {
        let (width, h, half) = (heads.packed_width(), heads.width, heads.width / 2);
        let rotated = heads.query_width() + heads.key_value_width();
        for (row, (out, packed)) in out.chunks_exact_mut(width).zip(packed.chunks_exact(width)).enumerate() {
            let (cos, sin) = rope.row(first + row, half);
            for (head, (out, x)) in out[..rotated].chunks_exact_mut(h).zip(packed.chunks_exact(h)).enumerate() {
                let weight = if head < heads.query { &weights[..h] } else { &weights[h..2 * h] };
                let scale = inverse_rms(x);
                let ((low, high), (x_low, x_high)) = (out.split_at_mut(half), x.split_at(half));
                let (w_low, w_high) = weight.split_at(half);
                for i in 0..half {
                    let (a, b) = (x_low[i] * scale * w_low[i], x_high[i] * scale * w_high[i]);
                    low[i] = a * cos[i] - b * sin[i];
                    high[i] = b * cos[i] + a * sin[i];
                }
            }
            out[rotated..].copy_from_slice(&packed[rotated..]);
        }
    }
}

/// Gradients of [`qk_norm_rope`]. `partial` holds `2H` elements per block of rows.
pub(crate) fn qk_norm_rope_backward(
    packed_gradient: &mut [f32],
    weights_gradient: &mut [f32],
    gradient: &[f32],
    packed: &[f32],
    weights: &[f32],
    rope: RopeTables<'_>,
    heads: Heads,
    partial: &mut [f32],
) {
    let width = heads.packed_width();
    row_blocks!(packed_gradient, mut width)
        .zip(partial.par_chunks_mut(weights.len()))
        .zip(row_blocks!(gradient, width).zip(row_blocks!(packed, width)))
        .enumerate()
        .for_each(|(block, ((packed_gradient, partial), (gradient, packed)))| {
            qk_backward_rows(
                packed_gradient,
                partial,
                gradient,
                packed,
                weights,
                rope,
                heads,
                block * ROW_BLOCK,
            );
        });
    sum_rows(weights_gradient, &partial[..packed.len().div_ceil(ROW_BLOCK * width) * weights.len()]);
}

/// Widest head that the rotated gradient's place on the stack can hold; plans refuse wider ones.
const WIDEST_HEAD: usize = 512;

vectorised! {
    fn qk_backward_rows(
        packed_gradient: &mut [f32],
        partial: &mut [f32],
        gradient: &[f32],
        packed: &[f32],
        weights: &[f32],
        rope: RopeTables<'_>,
        heads: Heads,
        first: usize,
    ) {
        let (width, h, half) = (heads.packed_width(), heads.width, heads.width / 2);
        let rotated = heads.query_width() + heads.key_value_width();
        let mut turned_back = [0f32; WIDEST_HEAD];
        let turned_back = &mut turned_back[..h];
        partial.fill(0.0);
        let inputs = gradient.chunks_exact(width).zip(packed.chunks_exact(width));
        for (row, (packed_gradient, (gradient, packed))) in
            packed_gradient.chunks_exact_mut(width).zip(inputs).enumerate()
        {
            let (cos, sin) = rope.row(first + row, half);
            for head in 0..heads.query + heads.key_value {
                let part = head * h..(head + 1) * h;
                let side = if head < heads.query { 0..h } else { h..2 * h };
                let (low, high) = gradient[part.clone()].split_at(half);
                for i in 0..half {
                    turned_back[i] = low[i] * cos[i] + high[i] * sin[i];
                    turned_back[half + i] = high[i] * cos[i] - low[i] * sin[i];
                }
                norm_backward_row::<false>(
                    &mut packed_gradient[part.clone()],
                    &mut partial[side.clone()],
                    turned_back,
                    &packed[part],
                    &weights[side],
                );
            }
            packed_gradient[rotated..].copy_from_slice(&gradient[rotated..]);
        }
    }
}
