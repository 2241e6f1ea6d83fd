//! The packed operands of a matrix product, and the interface of its kernels.
//!
//! The left operand is cut into *left panels* of a few rows, the right one into *right panels* of [`LANES`] columns.
//! The product of one of each is a *tile* of the result, whose sums stay in registers along the whole inner dimension.
//! The rows or columns in a panel are its *lanes*, and the indices of the inner dimension are its *depths*. A panel is
//! stored in *steps* of as many depths as one instruction processes. A step of a right panel contains:
//!
//! | format | depths | contents |
//! |---|---|---|
//! | f32, f16 | 1 | one number per lane |
//! | bf16 | 2 | two adjacent numbers per lane |
//! | `q8_0` | 32 | one scale (f16) per lane, then for every four depths four bytes per lane, each the integer + 128 |
//!
//! Lanes beyond an operand's edge are zero, so that a tile need not consider edges until it stores its sums.
//!
//! Every sum is one chain of fused multiply-adds in the order of depths, for any number of rows and threads. In float32
//! this holds on every processor, so bits depend on the operands alone.

use std::ops::Range;

use ulmus_backend::WeightFormat;

use super::aligned::Line;
use super::view::Matrix;

/// Number of columns in a right panel.
pub(super) const LANES: usize = 32;

/// Numbers in the format `q8_0` that share a scale.
pub(super) const Q8_BLOCK: usize = 32;

/// The number of depths in a step, and of the step's lines in a right panel.
pub(super) const fn step(format: WeightFormat) -> (usize, usize) {
    match format {
        WeightFormat::F32 => (1, 2),
        WeightFormat::F16 => (1, 1),
        WeightFormat::Bf16 => (2, 2),
        WeightFormat::Q8_0 => (Q8_BLOCK, 1 + Q8_BLOCK / 4 * 2),
    }
}

/// Multiplies left panels by right panels of one format. A value proves that this processor has the instructions.
pub(super) trait Kernel: Copy + Send + Sync {
    /// The format of right panels.
    const FORMAT: WeightFormat;
    /// The possible numbers of rows in a left panel, ascending.
    const WIDTHS: &'static [usize];
    /// Number of words in a left panel per row and step.
    const STEP_WORDS: usize;

    /// Packs lanes as a left panel of `width` rows. Rows beyond the lanes become zero.
    fn pack(self, to: &mut [u32], width: usize, lanes: Lanes<'_>);

    /// Computes the sums of a tile over `steps` steps, beginning at zero or at the target's contents.
    ///
    /// # Safety
    /// `left` must point to `steps · width · STEP_WORDS` words, `right` to `steps` steps of a right panel, and `width` must
    /// be one of [`Kernel::WIDTHS`]. The rows and columns of `target` must be valid for reads and writes, and nothing
    /// else may access them during the call.
    unsafe fn multiply(
        self,
        width: usize,
        steps: usize,
        left: *const u32,
        right: *const Line,
        target: &Target,
    );
}

/// The place for the sums of a tile.
pub(super) struct Target {
    pub data: *mut f32,
    /// Distance from one row to the next, in elements.
    pub stride: usize,
    /// Number of rows that belong to the result.
    pub rows: usize,
    /// Number of columns that belong to the result.
    pub columns: usize,
    /// Whether sums continue from the contents, or begin at zero.
    pub resume: bool,
    /// Address of the next tile's sums, with the same stride, which are prefetched during the computation of this tile.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "other kernels leave prefetching to the processor")
    )]
    pub next: *const f32,
}

impl Target {
    /// Address of a sum. It is valid if the row and the column belong to the result.
    #[inline(always)]
    pub(super) fn at(&self, row: usize, column: usize) -> *mut f32 {
        self.data.wrapping_add(row * self.stride + column)
    }
}

/// The part of an operand that becomes a panel. Rows are lanes, and columns are depths.
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
        depth_stride != 1
    }

    pub(super) fn at(&self, lane: usize, depth: usize) -> *const f32 {
        self.matrix.at(self.first_lane + lane, self.first_depth + depth)
    }

    /// A run of adjacent elements: all lanes of depth `index` if lanes are adjacent, or else all depths of lane
    /// `index`.
    pub(super) fn run(&self, index: usize) -> &'a [f32] {
        let (at, count, len) = if self.adjacent() {
            (self.at(0, index), self.depths, self.count)
        } else {
            (self.at(index, 0), self.count, self.depths)
        };
        assert!(index < count, "{index} of {count}");
        // SAFETY: `new` has checked that the matrix has all lanes and depths, the line above has checked `index`, and
        // the elements of a run are adjacent.
        unsafe { std::slice::from_raw_parts(at, len) }
    }
}

/// Packs lanes as a panel of `width` lanes with steps of `STEP` depths.
pub(super) fn pack<const STEP: usize, T: bytemuck::Pod>(
    to: &mut [T],
    width: usize,
    lanes: Lanes<'_>,
    convert: impl Fn(f32) -> T,
) {
    if lanes.count < width || !lanes.depths.is_multiple_of(STEP) {
        to.fill(T::zeroed());
    }
    let adjacent = lanes.adjacent();
    for index in 0..if adjacent { lanes.depths } else { lanes.count } {
        for (place, value) in lanes.run(index).iter().enumerate() {
            let (lane, depth) = if adjacent { (place, index) } else { (index, place) };
            to[place_of::<STEP>(width, lane, depth)] = convert(*value);
        }
    }
}

/// The index of a number in a panel of `width` lanes with steps of `STEP` depths.
#[inline(always)]
pub(super) fn place_of<const STEP: usize>(width: usize, lane: usize, depth: usize) -> usize {
    (depth / STEP * width + lane) * STEP + depth % STEP
}

/// How rows are cut into left panels: all have the largest width, except for a last one of the smallest sufficient
/// width.
#[derive(Clone, Copy)]
pub(super) struct LeftPanels {
    rows: usize,
    pub steps: usize,
    step_words: usize,
    widths: &'static [usize],
}

impl LeftPanels {
    pub(super) fn new<K: Kernel>(_: K, rows: usize, depths: usize) -> Self {
        let steps = depths.div_ceil(step(K::FORMAT).0);
        Self { rows, steps, step_words: K::STEP_WORDS, widths: K::WIDTHS }
    }

    /// Number of rows in the widest panel.
    pub(super) fn most(&self) -> usize {
        self.widths[self.widths.len() - 1]
    }

    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(self.most())
    }

    /// The range of rows in a panel.
    pub(super) fn rows(&self, panel: usize) -> Range<usize> {
        panel * self.most()..self.rows.min((panel + 1) * self.most())
    }

    /// The number of rows that a panel has room for.
    pub(super) fn width(&self, panel: usize) -> usize {
        let rows = self.rows(panel).len();
        *self
            .widths
            .iter()
            .find(|width| **width >= rows)
            .expect("a panel has at most as many rows as the widest")
    }

    /// The index of the first word of a step in a panel.
    pub(super) fn at(&self, panel: usize, step: usize) -> usize {
        (panel * self.most() * self.steps + self.width(panel) * step) * self.step_words
    }

    /// Number of words in a panel of the largest width.
    pub(super) fn panel_words(&self) -> usize {
        self.most() * self.steps * self.step_words
    }

    /// Number of words in all panels.
    pub(super) fn words(&self) -> usize {
        if self.rows == 0 { 0 } else { self.at(self.count() - 1, self.steps) }
    }
}
