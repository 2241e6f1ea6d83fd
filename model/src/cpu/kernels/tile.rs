//! The innermost part of the matrix product: a *tile* of the result, whose sums stay in registers while the inner
//! dimension runs. Both operands are *packed*, that is, in the order in which the tile reads them.
//!
//! A *panel* has as many *lanes* (rows of the left operand, columns of the right one) as a tile is high or wide. It
//! holds the values of all lanes for one depth (place in the inner dimension) after the other. Lanes beyond an
//! operand's edge are zero, so that a tile does not look at edges until it stores its sums.
//!
//! In float32 every tile adds the products of one sum in the order of depths, each with a fused multiply-add: the
//! bits are the same on every processor.

use std::ops::Range;

use half::bf16;

use super::matrix::{Matrix, Output};
use super::simd::vectorised;

/// What a tile's sums become.
pub(super) struct Target {
    /// The tile's place in the result.
    pub data: *mut f32,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Rows and columns that belong to the result, at most those of a tile.
    pub rows: usize,
    pub columns: usize,
    /// The sums are multiplied by this.
    pub scale: f32,
    pub output: Output,
}

/// How a product is computed. A value is the proof that this processor can.
pub(super) trait Tile: Copy + Send + Sync {
    /// Lanes of a left panel.
    const ROWS: usize;
    /// Lanes of a right panel.
    const COLUMNS: usize;
    /// Depths in one packed word.
    const DEPTH: usize;

    /// Packs lanes as a panel of `width` lanes, which are its words per [`Tile::DEPTH`] depths. `to` has
    /// [`panel_words`].
    fn pack(self, to: &mut [u32], width: usize, lanes: Lanes<'_>);

    /// Sums `left · right` over the depths of two panels.
    ///
    /// # Safety
    /// The rows and columns of `target` are valid to write, and to read if it accumulates; nobody else uses them.
    unsafe fn multiply(self, left: &[u32], right: &[u32], target: &Target);
}

/// Words of a panel of `width` lanes and that many depths.
pub(super) fn panel_words<T: Tile>(width: usize, depths: usize) -> usize {
    width * depths.div_ceil(T::DEPTH)
}

/// The part of an operand that becomes a panel: rows are lanes, columns are depths.
#[derive(Clone, Copy)]
pub(super) struct Lanes<'a> {
    matrix: Matrix<'a>,
    first_lane: usize,
    first_depth: usize,
    pub count: usize,
    pub depths: usize,
}

impl<'a> Lanes<'a> {
    pub(super) fn new(matrix: Matrix<'a>, lanes: Range<usize>, depths: Range<usize>) -> Self {
        assert!(lanes.end <= matrix.rows() && depths.end <= matrix.columns());
        let (first_lane, first_depth) = (lanes.start, depths.start);
        Self { matrix, first_lane, first_depth, count: lanes.len(), depths: depths.len() }
    }

    /// Whether the lanes, and not the depths, are adjacent in memory.
    pub(super) fn adjacent(&self) -> bool {
        let (lane_stride, depth_stride) = self.matrix.strides();
        assert!(lane_stride == 1 || depth_stride == 1, "strides {lane_stride} and {depth_stride}");
        lane_stride == 1
    }

    pub(super) fn at(&self, lane: usize, depth: usize) -> *const f32 {
        self.matrix.at(self.first_lane + lane, self.first_depth + depth)
    }
}

/// Loops for any processor, which the compiler vectorises. Operands are float32 or, if `ROUNDED`, float32 values that
/// are bfloat16.
#[derive(Clone, Copy)]
pub(super) struct Plain<const ROUNDED: bool>;

/// With vectors of 8, the sums take 12 of 16 registers; with vectors of 4, 24 of 32.
const ROWS: usize = 6;
const COLUMNS: usize = 16;

impl<const ROUNDED: bool> Tile for Plain<ROUNDED> {
    const ROWS: usize = ROWS;
    const COLUMNS: usize = COLUMNS;
    const DEPTH: usize = 1;

    fn pack(self, to: &mut [u32], width: usize, lanes: Lanes<'_>) {
        assert_eq!(to.len(), panel_words::<Self>(width, lanes.depths), "words of a panel");
        to.fill(0);
        for lane in 0..lanes.count {
            for depth in 0..lanes.depths {
                // SAFETY: `Lanes` checked that both lie in the matrix.
                let value = unsafe { *lanes.at(lane, depth) };
                let value = if ROUNDED { bf16::from_f32(value).to_f32() } else { value };
                to[depth * width + lane] = value.to_bits();
            }
        }
    }

    unsafe fn multiply(self, left: &[u32], right: &[u32], target: &Target) {
        let sums = sum_products(left, right);
        for (row, sums) in sums.iter().enumerate().take(target.rows) {
            for (column, sum) in sums.iter().enumerate().take(target.columns) {
                // SAFETY: promised by the caller.
                let to = unsafe { &mut *target.data.add(row * target.stride + column) };
                *to = match target.output {
                    Output::Overwrite => sum * target.scale,
                    Output::Accumulate => sum.mul_add(target.scale, *to),
                };
            }
        }
    }
}

vectorised! {
    fn sum_products(left: &[u32], right: &[u32]) -> [[f32; COLUMNS]; ROWS] {
        let mut sums = [[0f32; COLUMNS]; ROWS];
        let (left, right) = (left.as_chunks::<ROWS>().0, right.as_chunks::<COLUMNS>().0);
        for depth in 0..left.len().min(right.len()) {
            let (left, right) = (&left[depth], &right[depth]);
            for row in 0..ROWS {
                let value = f32::from_bits(left[row]);
                for column in 0..COLUMNS {
                    sums[row][column] = value.mul_add(f32::from_bits(right[column]), sums[row][column]);
                }
            }
        }
        sums
    }
}

/// Sums products of operands that stay in the first-level cache; gives the number of operations.
pub(super) fn saturate(depths: usize) -> usize {
    const PANEL: usize = 128;
    let (left, right) = ([0_u32; PANEL * ROWS], [0_u32; PANEL * COLUMNS]);
    for _ in 0..depths / PANEL {
        std::hint::black_box(sum_products(std::hint::black_box(&left), std::hint::black_box(&right)));
    }
    depths / PANEL * PANEL * 2 * ROWS * COLUMNS
}
