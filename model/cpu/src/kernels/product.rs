//! The matrix product over panels: what is packed when, and who computes which tiles.
//!
//! A *task* is some left panels times some right panels. Within it, the inner dimension is taken in parts, so that the
//! part of a right panel stays in the first-level cache while left panels pass by, and that of all the left panels,
//! and the task's sums, in the second. Sums go on from part to part: neither parts nor tasks change a bit.

use std::ops::Range;

use rayon::prelude::*;

use super::aligned::{Line, room, room_lines, with_operands};
use super::matrix::{Matrix, MatrixMut, Output, SharedMatrix, Threads};
use super::panel::{Kernel, LANES, Lanes, LeftPanels, Target, step};

/// Lines of a part of a right panel.
const PART_LINES: usize = 1280;
/// Rows and right panels of a task.
const TASK_ROWS: usize = 112;
const TASK_PANELS: usize = 8;
/// Most words per row of what is packed at once, and most rows and columns: what bounds the scratch.
const DEPTH_WORDS: usize = 640;
const BLOCK_ROWS: usize = 4096;
const BLOCK_COLUMNS: usize = 4096;
/// Multiplications below which a product is not worth waking other threads, and words below which packing is not.
const SERIAL: usize = 1 << 18;
const SERIAL_WORDS: usize = 1 << 16;

/// Left panels times right panels.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub left: LeftPanels,
    pub left_words: &'a [u32],
    pub right: &'a [Line],
    /// Lines from one right panel to the next.
    pub distance: usize,
    /// Lanes of all right panels that belong to the result.
    pub columns: usize,
}

impl Product<'_> {
    /// Computes all of `out`, from zero or adding to what is there.
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
        // A single left panel reads everything once; with more, the second level has to hold what comes again.
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

    /// Nobody else computes these panels.
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
                    let words = &self.left_words[self.left.at(row, start)..][..steps * width * K::WORDS];
                    let (words, right) = (words.as_ptr(), right.as_ptr());
                    // SAFETY: the slices hold these steps; `part` checked that the sums lie in the result, and nobody
                    // else has these panels.
                    unsafe { kernel.multiply(width, steps, words, right, &target) };
                }
            }
        }
    }
}

/// Packs the rows of `from`, as `panels` cuts them.
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

/// `c = a · b`, in place of or added to what `c` held. The shapes agree.
pub(super) fn multiply<K: Kernel>(
    kernel: K,
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
                        kernel.pack_right(to, Lanes::new(b.transposed(), lanes, depths.clone()));
                    };
                    let mut pack_rows = || {
                        // They are those of the columns before.
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

/// The size of as few equal parts of `len` as possible, none larger than `most`.
fn equal_part(len: usize, most: usize) -> usize {
    len.div_ceil(len.div_ceil(most).max(1)).max(1)
}

fn blocks(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}
