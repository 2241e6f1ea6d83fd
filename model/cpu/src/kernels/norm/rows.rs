//! Rows of a matrix, alone and in blocks.

use rayon::prelude::*;
use ulmus_plan::ROW_BLOCK;

use super::super::simd::vectorised;

/// A parallel iterator over blocks of [`ROW_BLOCK`] rows of width `width`.
pub(super) fn row_blocks(rows: &[f32], width: usize) -> rayon::slice::Chunks<'_, f32> {
    rows.par_chunks(ROW_BLOCK * width)
}

/// A parallel iterator over mutable blocks of [`ROW_BLOCK`] rows of width `width`.
pub(super) fn row_blocks_mut(rows: &mut [f32], width: usize) -> rayon::slice::ChunksMut<'_, f32> {
    rows.par_chunks_mut(ROW_BLOCK * width)
}

/// Row number `row` of rows of width `width`.
// Vectorised code uses indices and ranges, because iterator adapters are often not inlined there.
#[inline(always)]
pub(super) fn row(rows: &[f32], row: usize, width: usize) -> &[f32] {
    &rows[row * width..][..width]
}

#[inline(always)]
pub(super) fn row_mut(rows: &mut [f32], row: usize, width: usize) -> &mut [f32] {
    &mut rows[row * width..][..width]
}

vectorised! {
    /// Adds all rows, each of `total.len()` elements, to `total`, first to last.
    pub(super) fn sum_rows(total: &mut [f32], rows: &[f32]) {
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
