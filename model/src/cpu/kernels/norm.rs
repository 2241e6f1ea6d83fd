//! RMS norm, alone, after a residual add, and over heads followed by the rotary embedding.

use rayon::prelude::*;

use super::simd::{LANES, dot, total, vectorised};
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

/// Row `row` of rows of that width.
// In vectorised code indices and ranges: iterator adapters are often not inlined there.
#[inline(always)]
fn row(rows: &[f32], row: usize, width: usize) -> &[f32] {
    &rows[row * width..][..width]
}

#[inline(always)]
fn row_mut(rows: &mut [f32], row: usize, width: usize) -> &mut [f32] {
    &mut rows[row * width..][..width]
}

/// `out = norm(x)`.
pub(crate) fn norm(out: &mut [f32], x: &[f32], weight: &[f32]) {
    let d = weight.len();
    row_blocks!(out, mut d).zip(row_blocks!(x, d)).for_each(|(out, x)| norm_rows(out, x, weight));
}

vectorised! {
    fn norm_rows(out: &mut [f32], x: &[f32], weight: &[f32]) {
        let d = weight.len();
        for r in 0..x.len() / d {
            norm_row(row_mut(out, r, d), row(x, r, d), weight);
        }
    }
}

#[inline(always)]
fn norm_row(out: &mut [f32], x: &[f32], weight: &[f32]) {
    let scale = inverse_rms(x);
    let (x, weight) = (&x[..out.len()], &weight[..out.len()]);
    for i in 0..out.len() {
        out[i] = x[i] * scale * weight[i];
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
        for r in 0..x.len() / d {
            let (sum, x, delta) = (row_mut(sum, r, d), row(x, r, d), row(delta, r, d));
            for i in 0..d {
                sum[i] = x[i] + delta[i];
            }
            norm_row(row_mut(out, r, d), sum, weight);
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
        for r in 0..x.len() / d {
            let (x_gradient, gradient, x) = (row_mut(x_gradient, r, d), row(gradient, r, d), row(x, r, d));
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
    let width = x.len();
    let (gradient, weight) = (&gradient[..width], &weight[..width]);
    let (x_gradient, weight_gradient) = (&mut x_gradient[..width], &mut weight_gradient[..width]);
    for i in 0..width {
        let own = scale * (gradient[i] * weight[i] - x[i] * pull);
        x_gradient[i] = if ACCUMULATE { x_gradient[i] + own } else { own };
        weight_gradient[i] += gradient[i] * x[i] * scale;
    }
}

/// `Σ a·b·c`, in the order of all reductions.
#[inline(always)]
fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let (c_chunks, c_rest) = c.as_chunks::<LANES>();
    let chunks = a_chunks.len().min(b_chunks.len()).min(c_chunks.len());
    for chunk in 0..chunks {
        let (a, b, c) = (&a_chunks[chunk], &b_chunks[chunk], &c_chunks[chunk]);
        for i in 0..LANES {
            sums[i] = (a[i] * b[i]).mul_add(c[i], sums[i]);
        }
    }
    let mut sum = total(sums);
    for i in 0..a_rest.len().min(b_rest.len()).min(c_rest.len()) {
        sum = (a_rest[i] * b_rest[i]).mul_add(c_rest[i], sum);
    }
    sum
}

vectorised! {
    /// Adds rows of `total.len()`, first to last.
    fn sum_rows(total: &mut [f32], rows: &[f32]) {
        total.fill(0.0);
        let width = total.len();
        for r in 0..rows.len() / width {
            let x = row(rows, r, width);
            for i in 0..width {
                total[i] += x[i];
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

/// Widest head that has room on the stack, normed or rotated; plans refuse wider ones.
const WIDEST_HEAD: usize = 512;

/// Turns the pairs `(x[i], x[i + H/2])` by their angles, or back.
// Chunks are loaded before they are stored, so that the compiler need not ask whether slices overlap.
#[inline(always)]
fn rotate<const BACK: bool>(out: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let ((low, high), (x_low, x_high)) = (out.split_at_mut(half), x.split_at(half));
    let turn = |a: f32, b: f32, cos: f32, sin: f32| {
        let sin = if BACK { -sin } else { sin };
        (a * cos - b * sin, b * cos + a * sin)
    };
    let whole = half / LANES;
    let (low_chunks, low_rest) = low.as_chunks_mut::<LANES>();
    let (high_chunks, high_rest) = high.as_chunks_mut::<LANES>();
    for chunk in 0..whole {
        let at = |x: &[f32]| x.as_chunks::<LANES>().0[chunk];
        let (a, b, cos, sin) = (at(x_low), at(x_high), at(cos), at(sin));
        let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
        for i in 0..LANES {
            (low[i], high[i]) = turn(a[i], b[i], cos[i], sin[i]);
        }
        low_chunks[chunk] = low;
        high_chunks[chunk] = high;
    }
    for i in 0..low_rest.len() {
        let at = whole * LANES + i;
        (low_rest[i], high_rest[i]) = turn(x_low[at], x_high[at], cos[at], sin[at]);
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
        let mut normed = [0f32; WIDEST_HEAD];
        for r in 0..packed.len() / width {
            let (out, packed) = (row_mut(out, r, width), row(packed, r, width));
            let (cos, sin) = rope.row(first + r, half);
            for head in 0..heads.query + heads.key_value {
                let (x, side) = (row(packed, head, h), usize::from(head >= heads.query));
                norm_row(&mut normed[..h], x, row(weights, side, h));
                rotate::<false>(row_mut(out, head, h), &normed[..h], cos, sin);
            }
            out[rotated..].copy_from_slice(&packed[rotated..]);
        }
    }
}

/// Gradients of [`qk_norm_rope`], that of `packed` in its place. `partial` holds `2H` elements per block of rows.
pub(crate) fn qk_norm_rope_backward(
    packed: &mut [f32],
    weights_gradient: &mut [f32],
    gradient: &[f32],
    weights: &[f32],
    rope: RopeTables<'_>,
    heads: Heads,
    partial: &mut [f32],
) {
    let width = heads.packed_width();
    let blocks = packed.len().div_ceil(ROW_BLOCK * width);
    row_blocks!(packed, mut width)
        .zip(partial.par_chunks_mut(weights.len()))
        .zip(row_blocks!(gradient, width))
        .enumerate()
        .for_each(|(block, ((packed, partial), gradient))| {
            qk_backward_rows(packed, partial, gradient, weights, rope, heads, block * ROW_BLOCK);
        });
    sum_rows(weights_gradient, &partial[..blocks * weights.len()]);
}

vectorised! {
    fn qk_backward_rows(
        packed: &mut [f32],
        partial: &mut [f32],
        gradient: &[f32],
        weights: &[f32],
        rope: RopeTables<'_>,
        heads: Heads,
        first: usize,
    ) {
        let (width, h, half) = (heads.packed_width(), heads.width, heads.width / 2);
        let rotated = heads.query_width() + heads.key_value_width();
        let (mut turned_back, mut x) = ([0f32; WIDEST_HEAD], [0f32; WIDEST_HEAD]);
        let (turned_back, x) = (&mut turned_back[..h], &mut x[..h]);
        partial.fill(0.0);
        for r in 0..gradient.len() / width {
            let (packed, gradient) = (row_mut(packed, r, width), row(gradient, r, width));
            let (cos, sin) = rope.row(first + r, half);
            for head in 0..heads.query + heads.key_value {
                let side = usize::from(head >= heads.query);
                let packed = row_mut(packed, head, h);
                rotate::<true>(turned_back, row(gradient, head, h), cos, sin);
                x.copy_from_slice(packed);
                let partial = row_mut(partial, side, h);
                norm_backward_row::<false>(packed, partial, turned_back, x, row(weights, side, h));
            }
            packed[rotated..].copy_from_slice(&gradient[rotated..]);
        }
    }
}
