//! The naive norm of query and key heads, followed by the rotary embedding. Queries and keys are copied to tensors of
//! their own for it, as in an eager framework.

use rayon::prelude::*;
use ulmus_backend::Heads;
use ulmus_plan::{NormKind, ROW_BLOCK};

use super::super::simd::vectorised;
use super::naive::{Scratch, norm, summands};
use super::passes::combine;
use super::rope::{RopeTables, rotate};
use super::rows::{row, row_blocks, row_blocks_mut, row_mut};

/// A range of columns in a matrix.
#[derive(Clone, Copy)]
struct Columns {
    /// Distance from one row to the next, in elements.
    stride: usize,
    first: usize,
    count: usize,
}

/// The queries or the keys, `[R · heads, H]`.
struct Side<'a> {
    /// Their columns in packed rows.
    packed: Columns,
    /// Their columns in `x` and `normed`, which are all columns.
    own: Columns,
    x: &'a mut [f32],
    /// The result of the norm before the rotation, or its gradient.
    normed: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl<'a> Side<'a> {
    /// Splits a buffer of [`NormKind::head_scratch`] elements into both sides.
    fn both(scratch: &'a mut [f32], rows: usize, heads: Heads) -> [Self; 2] {
        let (stride, query, key) = (heads.packed_width(), heads.query_width(), heads.key_value_width());
        let (of_queries, of_keys) =
            scratch.split_at_mut(NormKind::NaiveRms.side_scratch(rows * heads.query, heads.width));
        [
            Self::new(of_queries, rows, Columns { stride, first: 0, count: query }),
            Self::new(of_keys, rows, Columns { stride, first: query, count: key }),
        ]
    }

    fn new(scratch: &'a mut [f32], rows: usize, packed: Columns) -> Self {
        let (x, scratch) = scratch.split_at_mut(rows * packed.count);
        let (normed, scratch) = scratch.split_at_mut(rows * packed.count);
        let own = Columns { stride: packed.count, first: 0, count: packed.count };
        Self { packed, own, x, normed, scratch }
    }
}

fn values(heads: Heads) -> Columns {
    let (query, key_value) = (heads.query_width(), heads.key_value_width());
    Columns { stride: heads.packed_width(), first: query + key_value, count: key_value }
}

/// Normalises and rotates query and key heads, and copies value heads. `weights` is `[2, H]`.
pub(super) fn qk_norm_rope(
    out: &mut [f32],
    packed: &[f32],
    weights: &[f32],
    rope: RopeTables<'_>,
    heads: Heads,
    scratch: &mut [f32],
) {
    let sides = Side::both(scratch, packed.len() / heads.packed_width(), heads);
    for (side, weight) in sides.into_iter().zip(weights.chunks(heads.width)) {
        copy(side.x, side.own, packed, side.packed);
        norm(side.normed, side.x, weight, side.scratch);
        turn::<false>(out, side.packed, side.normed, side.own, rope, heads.width);
    }
    copy(out, values(heads), packed, values(heads));
}

/// Computes the gradients of [`qk_norm_rope`]; that of `packed` replaces it.
pub(super) fn qk_norm_rope_backward(
    packed: &mut [f32],
    weights_gradient: Option<&mut [f32]>,
    gradient: &[f32],
    weights: &[f32],
    rope: RopeTables<'_>,
    heads: Heads,
    scratch: &mut [f32],
) {
    let sides = Side::both(scratch, packed.len() / heads.packed_width(), heads);
    let mut gradients = weights_gradient.map(|gradients| gradients.chunks_mut(heads.width));
    for (side, weight) in sides.into_iter().zip(weights.chunks(heads.width)) {
        let weight_gradient = gradients.as_mut().and_then(Iterator::next);
        turn::<true>(side.normed, side.own, gradient, side.packed, rope, heads.width);
        let Scratch { terms, other, normed, .. } =
            summands(weight_gradient, side.normed, side.x, weight, side.scratch);
        combine(other, normed, terms, |a, b| a + b);
        copy(packed, side.packed, other, side.own);
    }
    copy(packed, values(heads), gradient, values(heads));
}

fn copy(to: &mut [f32], to_columns: Columns, from: &[f32], from_columns: Columns) {
    row_blocks_mut(to, to_columns.stride).zip(row_blocks(from, from_columns.stride)).for_each(
        |(to, from)| {
            let rows = to.chunks_mut(to_columns.stride).zip(from.chunks(from_columns.stride));
            for (to, from) in rows {
                to[to_columns.first..][..to_columns.count]
                    .copy_from_slice(&from[from_columns.first..][..from_columns.count]);
            }
        },
    );
}

/// Copies heads of width `width` from some columns to others, and rotates them forwards or backwards.
fn turn<const BACK: bool>(
    to: &mut [f32],
    to_columns: Columns,
    from: &[f32],
    from_columns: Columns,
    rope: RopeTables<'_>,
    width: usize,
) {
    row_blocks_mut(to, to_columns.stride).zip(row_blocks(from, from_columns.stride)).enumerate().for_each(
        |(block, (to, from))| {
            turn_rows::<BACK>(to, to_columns, from, from_columns, rope, width, block * ROW_BLOCK);
        },
    );
}

vectorised! {
    fn turn_rows<const BACK: bool>(
        to: &mut [f32],
        to_columns: Columns,
        from: &[f32],
        from_columns: Columns,
        rope: RopeTables<'_>,
        width: usize,
        first: usize,
    ) {
        for r in 0..to.len() / to_columns.stride {
            let to = &mut row_mut(to, r, to_columns.stride)[to_columns.first..];
            let from = &row(from, r, from_columns.stride)[from_columns.first..];
            let (cos, sin) = rope.row(first + r, width / 2);
            for head in 0..to_columns.count / width {
                rotate::<BACK>(row_mut(to, head, width), row(from, head, width), cos, sin);
            }
        }
    }
}
