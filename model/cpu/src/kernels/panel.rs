//! The operands of a matrix product as its kernels read them, and what a kernel is.
//!
//! The left operand is cut into *left panels* of a few rows, the right one into *right panels* of [`LANES`] columns; a
//! *tile* of the result is what one of each gives, with its sums in registers while the inner dimension runs. A panel
//! holds that dimension in *steps*, as many *depths* as one instruction of the format takes. A step of a right panel:
//!
//! | format | depths | contents |
//! |---|---|---|
//! | f32, f16 | 1 | a number per lane |
//! | bf16 | 2 | two adjacent numbers per lane |
//! | `q8_0` | 32 | a scale (f16) per lane, then for each four depths four bytes per lane, each the integer + 128 |
//!
//! Lanes beyond an operand's edge are zero, so that a tile does not look at edges until it stores its sums.
//!
//! Every sum is one chain of fused multiply-adds in the order of depths, whatever the number of rows and threads, and
//! in float32 on every processor: bits depend on the operands alone.

use std::ops::Range;

use half::{bf16, f16};
use ulmus_backend::WeightFormat;

use super::aligned::Line;
use super::matrix::Matrix;
use super::q8;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Columns of a right panel.
pub(super) const LANES: usize = 32;

/// Depths of a step, and its lines in a right panel.
pub(super) const fn step(format: WeightFormat) -> (usize, usize) {
    match format {
        WeightFormat::F32 => (1, 2),
        WeightFormat::F16 => (1, 1),
        WeightFormat::Bf16 => (2, 2),
        WeightFormat::Q8_0 => (q8::BLOCK, 1 + q8::BLOCK / 4 * 2),
    }
}

/// How left panels meet right panels of one format. A value is the proof that this processor can.
pub(super) trait Kernel: Copy + Send + Sync {
    /// What right panels hold.
    const FORMAT: WeightFormat;
    /// Rows that left panels can have, ascending.
    const WIDTHS: &'static [usize];
    /// Words of a left panel per row and step.
    const WORDS: usize;

    /// Packs lanes as a left panel of `width` rows, the rest of which are zero.
    fn pack(self, to: &mut [u32], width: usize, lanes: Lanes<'_>);

    /// Packs lanes as a right panel.
    fn pack_right(self, to: &mut [Line], lanes: Lanes<'_>) {
        pack_right(Self::FORMAT, to, lanes);
    }

    /// Sums the products of some steps, from zero or from what is there.
    ///
    /// # Safety
    /// `left` has `steps · width · WORDS` words; `right` begins a right panel with that many steps.
    /// `width` is one of [`Kernel::WIDTHS`]. The rows and columns of `target` are valid to read and write, and nobody
    /// else uses them.
    unsafe fn multiply(
        self,
        width: usize,
        steps: usize,
        left: *const u32,
        right: *const Line,
        target: &Target,
    );
}

/// Does `$body` with the kernel of a format, the fastest that this processor has, and returns.
macro_rules! by_kernel {
    (match $format:expr, $formats:ident { $($name:ident),* }, $kernel:ident => $body:expr) => {
        match $format {
            $($formats::$name => {
                #[cfg(target_arch = "x86_64")]
                {
                    if let Some($kernel) = $crate::kernels::avx512::$name::detect() {
                        return $body;
                    }
                    if let Some($kernel) = $crate::kernels::avx2::$name::detect() {
                        return $body;
                    }
                }
                let $kernel = $crate::kernels::portable::$name;
                $body
            })*
        }
    };
}
pub(super) use by_kernel;

/// Where sums are.
pub(super) struct Target {
    pub data: *mut f32,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Rows and columns that belong to the result.
    pub rows: usize,
    pub columns: usize,
    /// Whether sums go on from what is there, or begin at zero.
    pub resume: bool,
    /// Where the next tile's sums are, with the same stride: they come into the cache while these are made.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "other kernels leave it to the processor")
    )]
    pub next: *const f32,
}

impl Target {
    /// Where a sum is; valid to follow if it is one of the target's.
    #[inline(always)]
    pub(super) fn at(&self, row: usize, column: usize) -> *mut f32 {
        self.data.wrapping_add(row * self.stride + column)
    }
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
        depth_stride != 1
    }

    pub(super) fn at(&self, lane: usize, depth: usize) -> *const f32 {
        self.matrix.at(self.first_lane + lane, self.first_depth + depth)
    }

    /// What is adjacent in memory: all lanes of depth `index`, or else all depths of lane `index`.
    pub(super) fn run(&self, index: usize) -> &'a [f32] {
        let (at, count, len) = if self.adjacent() {
            (self.at(0, index), self.depths, self.count)
        } else {
            (self.at(index, 0), self.count, self.depths)
        };
        assert!(index < count, "{index} of {count}");
        // SAFETY: the matrix has these elements, as `new` and the line above checked, one beside the other.
        unsafe { std::slice::from_raw_parts(at, len) }
    }
}

/// Packs lanes as a right panel.
pub(super) fn pack_right(format: WeightFormat, to: &mut [Line], lanes: Lanes<'_>) {
    let (depths, lines) = step(format);
    assert_eq!(to.len(), lanes.depths.div_ceil(depths) * lines, "lines of a panel");
    #[cfg(target_arch = "x86_64")]
    match format {
        WeightFormat::F32 => {
            if let Some(kernel) = avx512::F32::detect() {
                return kernel.pack(bytemuck::cast_slice_mut(to), LANES, lanes);
            }
            if let Some(kernel) = avx2::F32::detect() {
                return kernel.pack(bytemuck::cast_slice_mut(to), LANES, lanes);
            }
        }
        WeightFormat::Bf16 => {
            if let Some(kernel) = avx512::Bf16::detect() {
                return kernel.pack(bytemuck::cast_slice_mut(to), LANES, lanes);
            }
            if let Some(kernel) = avx2::Bf16::detect() {
                return avx2::pack_right(kernel, bytemuck::cast_slice_mut(to), lanes);
            }
        }
        WeightFormat::F16 | WeightFormat::Q8_0 => {}
    }
    match format {
        WeightFormat::F32 => pack::<1, f32>(bytemuck::cast_slice_mut(to), LANES, lanes, |x| x),
        WeightFormat::F16 => {
            pack::<1, u16>(bytemuck::cast_slice_mut(to), LANES, lanes, |x| f16::from_f32(x).to_bits());
        }
        WeightFormat::Bf16 => {
            pack::<2, u16>(bytemuck::cast_slice_mut(to), LANES, lanes, |x| bf16::from_f32(x).to_bits());
        }
        WeightFormat::Q8_0 => q8::pack_right(bytemuck::cast_slice_mut(to), lanes),
    }
}

/// Packs lanes as a panel of `width` lanes whose steps are `STEP` depths.
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

/// Where a number is in a panel of `width` lanes whose steps are `STEP` depths.
#[inline(always)]
pub(super) fn place_of<const STEP: usize>(width: usize, lane: usize, depth: usize) -> usize {
    (depth / STEP * width + lane) * STEP + depth % STEP
}

/// The first depths of a lane of a right panel.
pub(super) fn unpack(format: WeightFormat, out: &mut [f32], panel: &[Line], lane: usize) {
    match format {
        WeightFormat::F32 => unpack_by::<1, f32>(out, bytemuck::cast_slice(panel), lane, |x| x),
        WeightFormat::F16 => {
            unpack_by::<1, u16>(out, bytemuck::cast_slice(panel), lane, |x| f16::from_bits(x).to_f32());
        }
        WeightFormat::Bf16 => {
            unpack_by::<2, u16>(out, bytemuck::cast_slice(panel), lane, |x| bf16::from_bits(x).to_f32());
        }
        WeightFormat::Q8_0 => q8::unpack(out, bytemuck::cast_slice(panel), lane),
    }
}

fn unpack_by<const STEP: usize, T: Copy>(
    out: &mut [f32],
    from: &[T],
    lane: usize,
    convert: impl Fn(T) -> f32,
) {
    for (depth, out) in out.iter_mut().enumerate() {
        *out = convert(from[place_of::<STEP>(LANES, lane, depth)]);
    }
}

/// How rows are cut into left panels: as many of the largest width as are full, and a last one of the smallest that
/// suffices.
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
        Self { rows, steps, step_words: K::WORDS, widths: K::WIDTHS }
    }

    /// Rows of the widest panel.
    pub(super) fn most(&self) -> usize {
        self.widths[self.widths.len() - 1]
    }

    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(self.most())
    }

    /// The rows of a panel.
    pub(super) fn rows(&self, panel: usize) -> Range<usize> {
        panel * self.most()..self.rows.min((panel + 1) * self.most())
    }

    /// The rows that a panel has room for.
    pub(super) fn width(&self, panel: usize) -> usize {
        let rows = self.rows(panel).len();
        *self.widths.iter().find(|width| **width >= rows).expect("no panel has more rows than the widest")
    }

    /// Where a step of a panel begins.
    pub(super) fn at(&self, panel: usize, step: usize) -> usize {
        (panel * self.most() * self.steps + self.width(panel) * step) * self.step_words
    }

    /// Words of all panels but the last.
    pub(super) fn panel_words(&self) -> usize {
        self.most() * self.steps * self.step_words
    }

    /// Words of all panels.
    pub(super) fn words(&self) -> usize {
        if self.rows == 0 { 0 } else { self.at(self.count() - 1, self.steps) }
    }
}
