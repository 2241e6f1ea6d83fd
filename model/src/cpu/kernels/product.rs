//! The matrix product over packed operands: what is packed when, and who computes which tiles.
//!
//! The inner dimension is cut by its length alone, so the order of every sum, and with it every bit of the result, is
//! independent of threads. Both operands are packed one part of the inner dimension at a time, and tiles are then
//! computed in tasks of a few panels each: small enough to spread over threads, large enough that the left panels of
//! a task stay in the second-level cache while the right ones pass by.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::lines::{Line, room};
use super::matrix::{How, Matrix, MatrixMut, Output, Threads};
use super::tile::{Lanes, Target, Tile, panel_words};

/// Most words per lane of a part of the inner dimension.
const DEPTH_WORDS: usize = 640;
/// Rows and columns of the result for which operands are packed at once: what bounds the scratch.
const BLOCK_ROWS: usize = 4096;
const BLOCK_COLUMNS: usize = 4096;
/// Lanes of a task.
const TASK_ROWS: usize = 112;
const TASK_COLUMNS: usize = 256;
/// Multiplications below which a product is not worth waking other threads.
const SERIAL: usize = 1 << 18;

thread_local! {
    /// Packed operands. Grows to the largest product of its thread and is then reused.
    static PACKED: RefCell<[Vec<Line>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// `c = scale · a · b`, added to or in place of what `c` held. The shapes agree.
pub(super) fn multiply<T: Tile>(tile: T, c: &mut MatrixMut<'_>, a: Matrix<'_>, b: Matrix<'_>, how: How) {
    let How { scale, output, threads, .. } = how;
    let (rows, columns, depths) = (a.rows(), b.columns(), a.columns());
    if depths == 0 && output == Output::Overwrite {
        return c.clear();
    }
    let parallel = threads == Threads::All
        && rayon::current_num_threads() > 1
        && rows.saturating_mul(columns).saturating_mul(depths) >= SERIAL;
    // Taken out and put back: a thread that waits in a product may begin another.
    let [mut left_scratch, mut right_scratch] = PACKED.take();
    for depths in parts(depths, DEPTH_WORDS * T::DEPTH) {
        let output = if depths.start == 0 { output } else { Output::Accumulate };
        for rows in blocks(rows, BLOCK_ROWS) {
            for columns in blocks(columns, BLOCK_COLUMNS) {
                let left = Packing::new::<T>(T::ROWS, a, rows.clone(), depths.clone());
                let right = Packing::new::<T>(T::COLUMNS, b.transposed(), columns.clone(), depths.clone());
                let left_to = left.room(&mut left_scratch);
                let right_to = right.room(&mut right_scratch);
                // The left panels are those of the columns before.
                let pack_left = columns.start == 0;
                if parallel && pack_left {
                    rayon::join(|| left.pack(tile, left_to, true), || right.pack(tile, right_to, true));
                } else {
                    if pack_left {
                        left.pack(tile, left_to, parallel);
                    }
                    right.pack(tile, right_to, parallel);
                }
                let (left, right, rows) = (&*left_to, &*right_to, rows.clone());
                let block = Block { left, right, rows, columns, depths: depths.len() };
                block.multiply(tile, c, scale, output, parallel);
            }
        }
    }
    PACKED.set([left_scratch, right_scratch]);
}

/// `len` cut into as few equal parts as possible, none longer than `most`, each but the last of even length for words
/// of two.
fn parts(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = len.div_ceil(most).max(1);
    blocks(len, len.div_ceil(count).next_multiple_of(2))
}

fn blocks(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size.max(1)).map(move |start| start..len.min(start + size))
}

/// What is packed: `lanes` of a matrix at `depths`, in panels of `width` lanes.
struct Packing<'a> {
    from: Matrix<'a>,
    lanes: Range<usize>,
    depths: Range<usize>,
    width: usize,
    /// Words of a panel.
    panel: usize,
}

impl<'a> Packing<'a> {
    fn new<T: Tile>(width: usize, from: Matrix<'a>, lanes: Range<usize>, depths: Range<usize>) -> Self {
        let panel = panel_words::<T>(width, depths.len());
        Self { from, lanes, depths, width, panel }
    }

    /// The words of all panels.
    fn room<'s>(&self, scratch: &'s mut Vec<Line>) -> &'s mut [u32] {
        room(scratch, self.panel * self.lanes.len().div_ceil(self.width))
    }

    fn pack<T: Tile>(&self, tile: T, to: &mut [u32], parallel: bool) {
        let pack = |(index, to): (usize, &mut [u32])| {
            let start = self.lanes.start + index * self.width;
            let lanes = start..self.lanes.end.min(start + self.width);
            tile.pack(to, self.width, Lanes::new(self.from, lanes, self.depths.clone()));
        };
        if parallel {
            to.par_chunks_exact_mut(self.panel).enumerate().for_each(pack);
        } else {
            to.chunks_exact_mut(self.panel).enumerate().for_each(pack);
        }
    }
}

/// Packed operands, and the part of the result that they are summed into.
struct Block<'a> {
    left: &'a [u32],
    right: &'a [u32],
    rows: Range<usize>,
    columns: Range<usize>,
    depths: usize,
}

impl Block<'_> {
    fn multiply<T: Tile>(&self, tile: T, c: &mut MatrixMut<'_>, scale: f32, output: Output, parallel: bool) {
        let (task_rows, task_columns) =
            (TASK_ROWS.next_multiple_of(T::ROWS), TASK_COLUMNS.next_multiple_of(T::COLUMNS));
        let across = self.columns.len().div_ceil(task_columns);
        let tasks = self.rows.len().div_ceil(task_rows) * across;
        let c = c.shared();
        let (left_panel, right_panel) =
            (panel_words::<T>(T::ROWS, self.depths), panel_words::<T>(T::COLUMNS, self.depths));
        let work = |task: usize| {
            let (down, along) = (task / across * task_rows, task % across * task_columns);
            for column in (along..self.columns.len().min(along + task_columns)).step_by(T::COLUMNS) {
                let right = &self.right[column / T::COLUMNS * right_panel..][..right_panel];
                for row in (down..self.rows.len().min(down + task_rows)).step_by(T::ROWS) {
                    let left = &self.left[row / T::ROWS * left_panel..][..left_panel];
                    let rows = T::ROWS.min(self.rows.len() - row);
                    let columns = T::COLUMNS.min(self.columns.len() - column);
                    let (data, stride) =
                        c.part(self.rows.start + row, self.columns.start + column, rows, columns);
                    let target = Target { data, stride, rows, columns, scale, output };
                    // SAFETY: `part` checked that the tile lies in the result; every tile is computed once.
                    unsafe { tile.multiply(left, right, &target) };
                }
            }
        };
        if parallel {
            (0..tasks).into_par_iter().for_each(work);
        } else {
            (0..tasks).for_each(work);
        }
    }
}
