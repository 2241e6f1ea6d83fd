//! The rotary embedding.

use super::super::simd::LANES;

/// Tables of cosines and sines, `[positions, H/2]`. Row r has the position `first[r / length] + r % length`.
#[derive(Clone, Copy)]
pub(crate) struct RopeTables<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub first: &'a [u32],
    pub length: usize,
}

impl<'a> RopeTables<'a> {
    #[inline(always)]
    pub(super) fn row(&self, row: usize, half: usize) -> (&'a [f32], &'a [f32]) {
        let at = (self.first[row / self.length] as usize + row % self.length) * half;
        (&self.cos[at..at + half], &self.sin[at..at + half])
    }
}

/// Rotates the pairs `(x[i], x[i + H/2])` by their angles, or back.
// Chunks are loaded before they are stored, so that the compiler need not consider whether slices overlap.
#[inline(always)]
pub(super) fn rotate<const BACK: bool>(out: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32]) {
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
