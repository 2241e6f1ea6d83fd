//! The norm and the rotary embedding of query and key heads, in one pass over packed rows.

use rayon::prelude::*;
use ulmus_backend::Heads;
use ulmus_plan::ROW_BLOCK;

use super::super::simd::vectorised;
use super::rope::{RopeTables, rotate};
use super::row::{norm_backward_row, norm_row};
use super::rows::{row, row_blocks, row_blocks_mut, row_mut, sum_rows};

/// Maximum width of a head, which is kept on the stack. Plans with wider heads are refused.
const WIDEST_HEAD: usize = 512;

/// Normalises and rotates query and key heads, and copies value heads. `weights` is `[2, H]`.
pub(super) fn qk_norm_rope<const CENTRED: bool>(
    out: &mut [f32],
    packed: &[f32],
    weights: &[f32],
    rope: RopeTables<'_>,
    heads: Heads,
) {
    let width = heads.packed_width();
    row_blocks_mut(out, width).zip(row_blocks(packed, width)).enumerate().for_each(
        |(block, (out, packed))| qk_rows::<CENTRED>(out, packed, weights, rope, heads, block * ROW_BLOCK),
    );
}

vectorised! {
    fn qk_rows<const CENTRED: bool>(
        out: &mut [f32],
        packed: &[f32],
        weights: &[f32],
        rope: RopeTables<'_>,
        heads: Heads,
        first: usize,
    ) {
        let (width, h, half) = (heads.packed_width(), heads.width, heads.width / 2);
        let rotated = heads.query_width() + heads.key_value_width();
        let mut normed = [0f32; WIDEST_HEAD];
        for r in 0..packed.len() / width {
            let (out, packed) = (row_mut(out, r, width), row(packed, r, width));
            let (cos, sin) = rope.row(first + r, half);
            for head in 0..heads.query + heads.key_value {
                let (x, side) = (row(packed, head, h), usize::from(head >= heads.query));
                norm_row::<CENTRED>(&mut normed[..h], x, row(weights, side, h));
                rotate::<false>(row_mut(out, head, h), &normed[..h], cos, sin);
            }
            out[rotated..].copy_from_slice(&packed[rotated..]);
        }
    }
}

/// Computes the gradients of [`qk_norm_rope`]; that of `packed` replaces it. `partial` holds 2H elements per block of
/// rows.
pub(super) fn qk_norm_rope_backward<const CENTRED: bool>(
    packed: &mut [f32],
    weights_gradient: Option<&mut [f32]>,
    gradient: &[f32],
    weights: &[f32],
    rope: RopeTables<'_>,
    heads: Heads,
    partial: &mut [f32],
) {
    let width = heads.packed_width();
    let blocks = packed.len().div_ceil(ROW_BLOCK * width);
    row_blocks_mut(packed, width)
        .zip(partial.par_chunks_mut(weights.len()))
        .zip(row_blocks(gradient, width))
        .enumerate()
        .for_each(|(block, ((packed, partial), gradient))| {
            let first = block * ROW_BLOCK;
            qk_backward_rows::<CENTRED>(packed, partial, gradient, weights, rope, heads, first);
        });
    if let Some(weights_gradient) = weights_gradient {
        sum_rows(weights_gradient, &partial[..blocks * weights.len()]);
    }
}

vectorised! {
    fn qk_backward_rows<const CENTRED: bool>(
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
                let (partial, weight) = (row_mut(partial, side, h), row(weights, side, h));
                norm_backward_row::<CENTRED, false>(packed, partial, turned_back, x, weight);
            }
            packed[rotated..].copy_from_slice(&gradient[rotated..]);
        }
    }
}
