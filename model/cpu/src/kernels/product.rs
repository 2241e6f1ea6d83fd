//! The matrix product over panels: decides when operands are packed, and which thread computes which tiles.
//!
//! A *task* multiplies a few left panels by a few right panels. It cuts the inner dimension into parts, so that a part
//! of a right panel stays in the first-level cache while it meets all left panels, whose parts stay in the second-level
//! cache together with the sums. Sums continue from part to part, so neither parts nor tasks change a bit.

use std::ops::Range;

use rayon::prelude::*;

use super::aligned::{Line, room, room_lines, with_operands};
use super::panel::{Kernel, LANES, Lanes, LeftPanels, Target, step};
use super::view::{Matrix, MatrixMut, Output, SharedMatrix, Threads};

/// Number of lines in a part of a right panel.
const PART_LINES: usize = 1280;
/// Number of rows in a task.
const TASK_ROWS: usize = 112;
/// Number of right panels in a task.
const TASK_PANELS: usize = 8;
/// Maximum number of words per row that are packed at once. This and the next two limits bound the scratch memory.
const DEPTH_WORDS: usize = 640;
/// Maximum number of rows that are packed at once.
const BLOCK_ROWS: usize = 4096;
/// Maximum number of columns that are packed at once.
const BLOCK_COLUMNS: usize = 4096;
/// With fewer multiplications than this, a product is not worth waking other threads.
const SERIAL: usize = 1 << 18;
/// With fewer words than this, packing is not worth waking other threads.
const SERIAL_WORDS: usize = 1 << 16;

/// The product of packed operands.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub left: LeftPanels,
    pub left_words: &'a [u32],
    pub right: &'a [Line],
    /// Distance from one right panel to the next, in lines.
    pub distance: usize,
    /// Number of lanes, over all right panels, that belong to the result.
    pub columns: usize,
}

impl Product<'_> {
    /// Computes the product into `out`, or adds it to `out`.
    pub(super) fn compute<K: Kernel>(
        &self,
        kernel: K,
        out: &mut MatrixMut<'_>,
        output: Output,
        threads: Threads,
    ) {
        let out = out.shared();
        let (rows, panels) = (self.left.count(), self.columns.div_ceil(LANES));
        let depths = self.left.steps * step(K::FORMAT).0;
        let work = self.left.rows(0).len().max(1) * rows * self.columns * depths;
        let workers = if threads == Threads::One || work < SERIAL { 1 } else { rayon::current_num_threads() };
        // With a single left panel, everything is read once. With more, the second-level cache has to hold what is
        // reread.
        let (height, group) = if rows <= 1 {
            (1, panels.div_ceil(2 * workers))
        } else {
            (equal_part(rows, (TASK_ROWS / self.left.most()).max(1)), equal_part(panels, TASK_PANELS))
        };
        let group = group.max(1);
        let (down, across) = (rows.div_ceil(height), panels.div_ceil(group));
        let task = |index: usize| {
            let (row, panel) = (index % down * height, index / down * group);
            let (left, right) = (row..rows.min(row + height), panel..panels.min(panel + group));
            self.task(kernel, &out, output, left, right);
        };
        if workers == 1 {
            (0..down * across).for_each(task);
        } else {
            (0..down * across).into_par_iter().for_each(task);
        }
    }

    /// Computes the tiles of a range of left panels and a range of right panels, which belong to this task alone.
    fn task<K: Kernel>(
        &self,
        kernel: K,
        out: &SharedMatrix<'_>,
        output: Output,
        left: Range<usize>,
        right: Range<usize>,
    ) {
        let lines = step(K::FORMAT).1;
        let part =
            if left.len() == 1 { self.left.steps } else { equal_part(self.left.steps, PART_LINES / lines) };
        for start in (0..self.left.steps).step_by(part.max(1)) {
            let steps = part.min(self.left.steps - start);
            let resume = output == Output::Accumulate || start > 0;
            for panel in right.clone() {
                let right = &self.right[panel * self.distance + start * lines..][..steps * lines];
                let column = panel * LANES;
                let columns = LANES.min(self.columns - column);
                for row in left.clone() {
                    let (rows, width) = (self.left.rows(row), self.left.width(row));
                    let (data, stride) = out.part(rows.start, column, rows.len(), columns);
                    let next = if row + 1 < left.end {
                        data.wrapping_add(width * stride)
                    } else {
                        data.wrapping_add(LANES).wrapping_sub((left.len() - 1) * self.left.most() * stride)
                    };
                    let target = Target { data, stride, rows: rows.len(), columns, resume, next };
                    let words = &self.left_words[self.left.at(row, start)..][..steps * width * K::STEP_WORDS];
                    let (words, right) = (words.as_ptr(), right.as_ptr());
                    // SAFETY: the slices hold `steps` steps of both panels, `width` is that of the left panel, `part`
                    // has checked that the sums lie in the result, and no other task computes these panels.
                    unsafe { kernel.multiply(width, steps, words, right, &target) };
                }
            }
        }
    }
}

/// Packs `rows` of `from` into the left panels that `panels` describes.
pub(super) fn pack_left<K: Kernel>(
    kernel: K,
    panels: LeftPanels,
    to: &mut [u32],
    from: Matrix<'_>,
    rows: Range<usize>,
    depths: Range<usize>,
    threads: Threads,
) {
    let pack = |(panel, to): (usize, &mut [u32])| {
        let own = panels.rows(panel);
        let lanes = Lanes::new(from, rows.start + own.start..rows.start + own.end, depths.clone());
        kernel.pack(to, panels.width(panel), lanes);
    };
    let size = panels.panel_words().max(1);
    if threads == Threads::All && to.len() >= SERIAL_WORDS {
        to.par_chunks_mut(size).enumerate().for_each(pack);
    } else {
        to.chunks_mut(size).enumerate().for_each(pack);
    }
}

/// `c = a · b` or `c += a · b`, depending on `output`. The shapes must agree.
pub(super) fn multiply<K: Kernel>(
    kernel: K,
    pack_right: impl Fn(&mut [Line], Lanes<'_>) + Sync,
    c: &mut MatrixMut<'_>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    output: Output,
) {
    let (rows, columns, depths) = (a.rows(), b.columns(), a.columns());
    if depths == 0 && output == Output::Overwrite {
        return c.clear();
    }
    let parallel =
        rayon::current_num_threads() > 1 && rows.saturating_mul(columns).saturating_mul(depths) >= SERIAL;
    let threads = if parallel { Threads::All } else { Threads::One };
    let (step_depths, lines) = step(K::FORMAT);
    let part = equal_part(depths, DEPTH_WORDS * step_depths).next_multiple_of(step_depths);
    with_operands(|[left_scratch, right_scratch]| {
        for depths in blocks(depths, part) {
            let output = if depths.start == 0 { output } else { Output::Accumulate };
            let distance = depths.len().div_ceil(step_depths) * lines;
            for rows in blocks(rows, BLOCK_ROWS) {
                let left = LeftPanels::new(kernel, rows.len(), depths.len());
                let left_words = room(left_scratch, left.words());
                for columns in blocks(columns, BLOCK_COLUMNS) {
                    let panels = columns.len().div_ceil(LANES);
                    let right = room_lines(right_scratch, panels * distance);
                    let pack_columns = |(panel, to): (usize, &mut [Line])| {
                        let first = columns.start + panel * LANES;
                        let lanes = first..columns.end.min(first + LANES);
                        pack_right(to, Lanes::new(b.transposed(), lanes, depths.clone()));
                    };
                    let mut pack_rows = || {
                        // For all further columns, the rows are packed already.
                        if columns.start == 0 {
                            pack_left(kernel, left, left_words, a, rows.clone(), depths.clone(), threads);
                        }
                    };
                    if parallel {
                        rayon::join(pack_rows, || {
                            right.par_chunks_exact_mut(distance).enumerate().for_each(pack_columns);
                        });
                    } else {
                        pack_rows();
                        right.chunks_exact_mut(distance).enumerate().for_each(pack_columns);
                    }
                    let product = Product { left, left_words, right, distance, columns: columns.len() };
                    let mut part = c.part_mut(rows.clone(), columns);
                    product.compute(kernel, &mut part, output, threads);
                }
            }
        }
    });
}

/// The size of the parts if `len` is cut into as few equal parts as possible, none larger than `most`.
fn equal_part(len: usize, most: usize) -> usize {
    len.div_ceil(len.div_ceil(most).max(1)).max(1)
}

fn blocks(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}
