//! Matrices for inference: packed once, in one of four formats, in the order in which a product reads them.
//!
//! A matrix is cut into *panels* of [`LANES`] outputs. A panel holds all its inputs, one *step* after the other; a
//! step is as many inputs as one instruction of the format takes, for all lanes side by side:
//!
//! | format | inputs of a step | contents |
//! |---|---|---|
//! | f32, f16 | 1 | a number per lane |
//! | bf16 | 2 | two adjacent numbers per lane |
//! | `q8_0` | 32 | a scale (f16) per lane, then for each four inputs four bytes per lane, each the integer + 128 |
//!
//! Lanes and inputs beyond the matrix are zero. The same memory serves prompts, where many rows meet each panel while
//! it is in the cache, and single tokens, where reading it once is all that counts.
//!
//! Every sum is one chain in the order of the inputs, whatever the number of rows and threads: a row's bits do not
//! depend on the rows beside it.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::lines::{Line, room};
use super::matrix::{Matrix, MatrixMut, SharedMatrix};
use super::pages::Pages;
use super::rows;
#[cfg(target_arch = "x86_64")]
use super::rows_avx512;
use crate::error::ModelError;
use crate::format::WeightFormat;

/// Outputs of a panel.
pub(super) const LANES: usize = 32;
/// Inputs that share a scale in `q8_0`.
pub(super) const BLOCK: usize = 32;
/// What is added to an integer of `q8_0`, to make it unsigned.
pub(super) const SHIFT: i32 = 128;
/// Steps of several row panels that are taken at once: with them a part of a weight panel stays in the first-level
/// cache, and that of all rows in the second.
const PART_BYTES: usize = 32 * 1024;
/// Most weight panels of a task when many rows pass: their part of the result stays in the second-level cache.
const TASK_PANELS: usize = 8;

/// Words of activations from which on packing is worth waking other threads.
const PARALLEL_WORDS: usize = 1 << 16;

/// A matrix `[outputs, inputs]` in one format.
#[derive(Debug)]
pub struct Weights {
    format: WeightFormat,
    outputs: usize,
    inputs: usize,
    lines: Pages,
}

/// Inputs and lines of a step.
const fn step(format: WeightFormat) -> (usize, usize) {
    match format {
        WeightFormat::F32 => (1, 2),
        WeightFormat::F16 => (1, 1),
        WeightFormat::Bf16 => (2, 2),
        WeightFormat::Q8_0 => (BLOCK, 1 + BLOCK / 4 * 2),
    }
}

impl Weights {
    /// Converts a row-major matrix with that many outputs.
    pub(crate) fn new(values: &[f32], outputs: usize, format: WeightFormat) -> Result<Self, ModelError> {
        let inputs = values.len() / outputs;
        let (step_inputs, step_lines) = step(format);
        let panel = inputs.div_ceil(step_inputs) * step_lines;
        let lines = Pages::zeroed(panel * outputs.div_ceil(LANES))?;
        let mut weights = Self { format, outputs, inputs, lines };
        weights.lines.par_chunks_exact_mut(panel).zip(values.par_chunks(LANES * inputs)).for_each(
            |(to, rows)| match format {
                WeightFormat::F32 => pack::<1, _>(bytemuck::cast_slice_mut(to), rows, inputs, |x| x),
                WeightFormat::F16 => {
                    pack::<1, _>(bytemuck::cast_slice_mut(to), rows, inputs, |x| f16::from_f32(x).to_bits());
                }
                WeightFormat::Bf16 => {
                    pack::<2, _>(bytemuck::cast_slice_mut(to), rows, inputs, |x| bf16::from_f32(x).to_bits());
                }
                WeightFormat::Q8_0 => {
                    pack_q8(bytemuck::cast_slice_mut(to).as_chunks_mut().0, rows, inputs);
                }
            },
        );
        Ok(weights)
    }

    fn panel_lines(&self) -> usize {
        let (inputs, lines) = step(self.format);
        self.inputs.div_ceil(inputs) * lines
    }

    /// `out[r] = row ids[r]`.
    pub(crate) fn embed(&self, out: &mut [f32], ids: &[u32]) {
        for (out, id) in out.chunks_exact_mut(self.inputs).zip(ids) {
            self.row(out, *id as usize);
        }
    }

    fn row(&self, out: &mut [f32], output: usize) {
        assert!(output < self.outputs, "row {output} of {}", self.outputs);
        let (lane, panel) = (output % LANES, self.panel_lines());
        let lines = &self.lines[output / LANES * panel..][..panel];
        match self.format {
            WeightFormat::F32 => unpack::<1, f32>(out, bytemuck::cast_slice(lines), lane, |x| x),
            WeightFormat::F16 => {
                unpack::<1, u16>(out, bytemuck::cast_slice(lines), lane, |x| f16::from_bits(x).to_f32());
            }
            WeightFormat::Bf16 => {
                unpack::<2, u16>(out, bytemuck::cast_slice(lines), lane, |x| bf16::from_bits(x).to_f32());
            }
            WeightFormat::Q8_0 => {
                let blocks = bytemuck::cast_slice::<Line, u8>(lines).as_chunks::<Q8_STEP>().0;
                for (out, block) in out.chunks_mut(BLOCK).zip(blocks) {
                    let scale = f16::from_le_bytes([block[2 * lane], block[2 * lane + 1]]).to_f32();
                    for (input, out) in out.iter_mut().enumerate() {
                        *out = (i32::from(block[q8_byte(lane, input)]) - SHIFT) as f32 * scale;
                    }
                }
            }
        }
    }

    /// `out = x · weightsᵀ` for that many rows.
    pub(crate) fn linear(&self, out: &mut [f32], x: &[f32], rows: usize) {
        #[cfg(target_arch = "x86_64")]
        match self.format {
            WeightFormat::F32 | WeightFormat::F16 => {
                if let Some(kernel) = rows_avx512::F32::detect() {
                    return match self.format {
                        WeightFormat::F32 => self.linear_by(kernel, out, x, rows),
                        _ => self.linear_by(rows_avx512::F16(kernel), out, x, rows),
                    };
                }
            }
            WeightFormat::Bf16 => {
                if let Some(kernel) = rows_avx512::Bf16::detect() {
                    return self.linear_by(kernel, out, x, rows);
                }
            }
            WeightFormat::Q8_0 => {
                if let Some(kernel) = rows_avx512::Q8::detect() {
                    return self.linear_by(kernel, out, x, rows);
                }
            }
        }
        match self.format {
            WeightFormat::F32 => self.linear_by(rows::F32, out, x, rows),
            WeightFormat::F16 => self.linear_by(rows::F16, out, x, rows),
            WeightFormat::Bf16 => self.linear_by(rows::Bf16, out, x, rows),
            WeightFormat::Q8_0 => self.linear_by(rows::Q8, out, x, rows),
        }
    }

    pub(super) fn linear_by<K: Kernel>(&self, kernel: K, out: &mut [f32], x: &[f32], rows: usize) {
        let (step_inputs, step_lines) = step(self.format);
        let steps = self.inputs.div_ceil(step_inputs);
        let activations = Activations::new(kernel, rows, steps);
        let mut scratch = PACKED.take();
        let packed = room(&mut scratch, activations.words());
        activations.pack(kernel, packed, Matrix::new(x, rows, self.inputs, self.inputs));

        let panels = self.outputs.div_ceil(LANES);
        let threads = rayon::current_num_threads();
        let (part, most) = if activations.panels() == 1 {
            (steps, panels)
        } else {
            ((PART_BYTES / (step_lines * size_of::<Line>())).max(1), TASK_PANELS)
        };
        let together = activations.together(kernel);
        let group = panels.div_ceil(2 * threads).min(most).next_multiple_of(together);
        let product = Product {
            right: &self.lines,
            distance: self.panel_lines(),
            step_lines,
            columns: self.outputs,
            part,
            activations,
            packed,
        };
        let mut out = MatrixMut::new(out, rows, self.outputs, self.outputs);
        let out = out.shared();
        if threads == 1 {
            for start in (0..panels).step_by(group) {
                product.sum(kernel, &out, start..panels.min(start + group));
            }
        } else {
            (0..panels.div_ceil(group)).into_par_iter().for_each(|index| {
                product.sum(kernel, &out, index * group..panels.min((index + 1) * group));
            });
        }
        PACKED.set(scratch);
    }
}

thread_local! {
    /// Packed activations. Grows to the largest of its thread and is then reused.
    static PACKED: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Bytes of a step of `q8_0`.
const Q8_STEP: usize = step(WeightFormat::Q8_0).1 * size_of::<Line>();

/// Where in a step of `q8_0` the integer of a lane and an input is.
fn q8_byte(lane: usize, input: usize) -> usize {
    2 * LANES + (input / 4 * LANES + lane) * 4 + input % 4
}

/// Packs up to [`LANES`] rows in steps of `STEP` inputs. `to` is zero.
fn pack<const STEP: usize, T>(to: &mut [T], rows: &[f32], inputs: usize, convert: impl Fn(f32) -> T) {
    for (lane, row) in rows.chunks_exact(inputs).enumerate() {
        for (input, value) in row.iter().enumerate() {
            to[(input / STEP * LANES + lane) * STEP + input % STEP] = convert(*value);
        }
    }
}

/// The first inputs of a lane.
fn unpack<const STEP: usize, T: Copy>(out: &mut [f32], from: &[T], lane: usize, convert: impl Fn(T) -> f32) {
    for (input, out) in out.iter_mut().enumerate() {
        *out = convert(from[(input / STEP * LANES + lane) * STEP + input % STEP]);
    }
}

fn pack_q8(to: &mut [[u8; Q8_STEP]], rows: &[f32], inputs: usize) {
    for block in to.iter_mut() {
        block[2 * LANES..].fill(SHIFT as u8);
    }
    for (lane, row) in rows.chunks_exact(inputs).enumerate() {
        for (values, to) in row.chunks(BLOCK).zip(to.iter_mut()) {
            let most = values.iter().fold(0_f32, |most, value| most.max(value.abs()));
            let scale = most / 127.0;
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            to[2 * lane..2 * lane + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            for (input, value) in values.iter().enumerate() {
                // Halves away from zero and the scale before its rounding, as in GGUF's reference.
                to[q8_byte(lane, input)] = ((value * inverse).round() as i32 + SHIFT) as u8;
            }
        }
    }
}

/// How rows of activations meet panels of one format. A value is the proof that this processor can.
pub(super) trait Kernel: Copy + Send + Sync {
    /// Rows that panels of activations can have, ascending.
    const WIDTHS: &'static [usize];
    /// Words of a panel of activations per row and step.
    const WORDS: usize;

    /// Weight panels that are best read at once by a single panel of activations of that many rows.
    fn together(self, width: usize) -> usize;

    /// Packs some rows of `x` as a panel of `width` rows, the rest of which are zero.
    fn pack(self, to: &mut [u32], width: usize, x: Matrix<'_>, rows: Range<usize>);

    /// Adds the products of some steps to the sums.
    ///
    /// # Safety
    /// `left` has `steps · width · WORDS` words; each of `panels` (1, or as many as [`Kernel::together`] says) weight
    /// panels from `right` on, `distance` lines apart, has that many steps. `width` is one of [`Kernel::WIDTHS`]. The
    /// rows and columns of `target` are valid to read and write, and nobody else uses them.
    unsafe fn multiply(
        self,
        width: usize,
        panels: usize,
        steps: usize,
        left: *const u32,
        right: *const Line,
        distance: usize,
        target: &Target,
    );
}

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
}

/// How rows are cut into panels: as many of the largest width as are full, and a last one of the smallest that
/// suffices.
#[derive(Clone, Copy)]
pub(super) struct Activations {
    rows: usize,
    steps: usize,
    step_words: usize,
    widths: &'static [usize],
}

impl Activations {
    pub(super) fn new<K: Kernel>(_: K, rows: usize, steps: usize) -> Self {
        Self { rows, steps, step_words: K::WORDS, widths: K::WIDTHS }
    }

    fn most(&self) -> usize {
        self.widths[self.widths.len() - 1]
    }

    fn panels(&self) -> usize {
        self.rows.div_ceil(self.most())
    }

    /// The rows of a panel.
    fn rows(&self, panel: usize) -> Range<usize> {
        panel * self.most()..self.rows.min((panel + 1) * self.most())
    }

    fn width(&self, panel: usize) -> usize {
        let rows = self.rows(panel).len();
        *self.widths.iter().find(|width| **width >= rows).expect("no panel has more rows than the widest")
    }

    /// Weight panels that are best read at once.
    fn together<K: Kernel>(&self, kernel: K) -> usize {
        if self.panels() == 1 { kernel.together(self.width(0)) } else { 1 }
    }

    /// Where a step of a panel begins.
    fn at(&self, panel: usize, step: usize) -> usize {
        (panel * self.most() * self.steps + self.width(panel) * step) * self.step_words
    }

    /// Words of all panels.
    pub(super) fn words(&self) -> usize {
        if self.rows == 0 { 0 } else { self.at(self.panels() - 1, self.steps) }
    }

    pub(super) fn pack<K: Kernel>(&self, kernel: K, to: &mut [u32], x: Matrix<'_>) {
        let pack = |(panel, to): (usize, &mut [u32])| kernel.pack(to, self.width(panel), x, self.rows(panel));
        let size = (self.most() * self.steps * self.step_words).max(1);
        if to.len() >= PARALLEL_WORDS {
            to.par_chunks_mut(size).enumerate().for_each(pack);
        } else {
            to.chunks_mut(size).enumerate().for_each(pack);
        }
    }
}

/// Packed activations times panels.
pub(super) struct Product<'a> {
    pub right: &'a [Line],
    /// Lines from one panel to the next.
    pub distance: usize,
    /// Lines of a step.
    pub step_lines: usize,
    /// Lanes of all panels that belong to the result.
    pub columns: usize,
    /// Steps taken at once.
    pub part: usize,
    pub activations: Activations,
    pub packed: &'a [u32],
}

impl Product<'_> {
    /// Computes the columns of some panels. Nobody else computes them.
    pub(super) fn sum<K: Kernel>(&self, kernel: K, out: &SharedMatrix<'_>, panels: Range<usize>) {
        let Self { distance, activations, .. } = *self;
        let together = activations.together(kernel);
        for start in (0..activations.steps).step_by(self.part) {
            let steps = self.part.min(activations.steps - start);
            let mut panel = panels.start;
            while panel < panels.end {
                let count = if panel + together <= panels.end { together } else { 1 };
                for left in 0..activations.panels() {
                    let (rows, column, width) =
                        (activations.rows(left), panel * LANES, activations.width(left));
                    let columns = (count * LANES).min(self.columns - column);
                    let (data, stride) = out.part(rows.start, column, rows.len(), columns);
                    let target = Target { data, stride, rows: rows.len(), columns, resume: start > 0 };
                    let words = &self.packed[activations.at(left, start)..][..steps * width * K::WORDS];
                    let first = panel * distance + start * self.step_lines;
                    let right = &self.right[first..][..(count - 1) * distance + steps * self.step_lines];
                    // SAFETY: the slices hold these steps; `part` checked that the sums lie in the result, and nobody
                    // else has these panels.
                    unsafe {
                        kernel.multiply(
                            width,
                            count,
                            steps,
                            words.as_ptr(),
                            right.as_ptr(),
                            distance,
                            &target,
                        );
                    }
                }
                panel += count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..len).map(|_| next()).collect()
    }

    /// Outputs and inputs that are multiples of nothing, and of everything.
    const SHAPES: [(usize, usize); 6] = [(1, 1), (33, 31), (70, 100), (128, 64), (197, 1281), (300, 2100)];

    fn product<K: Kernel>(kernel: K, weights: &Weights, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / weights.inputs;
        let mut out = vec![f32::NAN; rows * weights.outputs];
        weights.linear_by(kernel, &mut out, x, rows);
        out
    }

    /// Compares with f64, rows one by one with rows together, and one thread with three.
    fn agrees<K: Kernel>(kernel: K, format: WeightFormat, round: fn(f32) -> f32, tolerance: f64) {
        let threads = |count| rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
        let (one, three) = (threads(1), threads(3));
        for (outputs, inputs) in SHAPES {
            let weights = Weights::new(&values(outputs * inputs, 1), outputs, format).unwrap();
            let mut table = vec![0.0; outputs * inputs];
            weights.embed(&mut table, &(0..outputs as u32).collect::<Vec<_>>());
            let x = values(31 * inputs, 2);
            let single: Vec<f32> =
                one.install(|| x.chunks_exact(inputs).flat_map(|x| product(kernel, &weights, x)).collect());
            for rows in [1, 2, 3, 5, 6, 8, 13, 15, 31] {
                for pool in [&one, &three] {
                    let out = pool.install(|| product(kernel, &weights, &x[..rows * inputs]));
                    let same = out.iter().zip(&single).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{format}: {rows} rows of {outputs} x {inputs}");
                }
            }
            for (x, out) in x.chunks_exact(inputs).zip(single.chunks_exact(outputs)) {
                for (weights, out) in table.chunks_exact(inputs).zip(out) {
                    let exact: f64 =
                        weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(round(*x))).sum();
                    let error = (f64::from(*out) - exact).abs();
                    assert!(error <= tolerance * (inputs as f64).sqrt(), "{format}: {out}, not {exact}");
                }
            }
        }
    }

    #[test]
    fn every_kernel_agrees_with_f64_and_keeps_the_bits_of_a_row() {
        use WeightFormat::{Bf16, F16, F32, Q8_0};
        let rounded = |x| bf16::from_f32(x).to_f32();
        // Sums of products below 1/4 in float32.
        let sums = 1e-6;
        // A quantised activation is off by up to 1/508, times weights up to 1/2: by 3e-4 on average, and six times
        // that once in many products.
        let quantised = 2e-3;
        agrees(rows::F32, F32, |x| x, sums);
        agrees(rows::F16, F16, |x| x, sums);
        agrees(rows::Bf16, Bf16, rounded, sums);
        agrees(rows::Q8, Q8_0, |x| x, quantised);
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(kernel) = rows_avx512::F32::detect() {
                agrees(kernel, F32, |x| x, sums);
                agrees(rows_avx512::F16(kernel), F16, |x| x, sums);
            }
            if let Some(kernel) = rows_avx512::Bf16::detect() {
                agrees(kernel, Bf16, rounded, sums);
            }
            if let Some(kernel) = rows_avx512::Q8::detect() {
                agrees(kernel, Q8_0, |x| x, quantised);
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn vectors_give_the_bits_of_plain_loops() {
        let same =
            |a: Vec<f32>, b: Vec<f32>| assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()));
        let x = values(5 * 1281, 2);
        let weights = |format| Weights::new(&values(197 * 1281, 1), 197, format).unwrap();
        if let Some(kernel) = rows_avx512::F32::detect() {
            let weights = [weights(WeightFormat::F32), weights(WeightFormat::F16)];
            same(product(kernel, &weights[0], &x), product(rows::F32, &weights[0], &x));
            same(product(rows_avx512::F16(kernel), &weights[1], &x), product(rows::F16, &weights[1], &x));
        }
        if let Some(kernel) = rows_avx512::Q8::detect() {
            let weights = weights(WeightFormat::Q8_0);
            same(product(kernel, &weights, &x), product(rows::Q8, &weights, &x));
        }
    }

    #[test]
    fn rows_come_back_as_near_as_the_format_allows() {
        // Half a step of the last bit that is kept, and in `q8_0` half an integer and the rounding of the scale.
        let relative = |format| match format {
            WeightFormat::F32 => 0.0,
            WeightFormat::F16 => 2.0_f32.powi(-11),
            WeightFormat::Bf16 => 2.0_f32.powi(-8),
            WeightFormat::Q8_0 => 0.5 / 127.0 + 2.0_f32.powi(-11),
        };
        for format in WeightFormat::ALL {
            // From far above to far below what is usual, with subnormal f16 among them.
            for size in [1e4, 1.0, 1e-3, 2e-7] {
                let mut table: Vec<f32> = values(45 * 77, 3).iter().map(|x| x * size).collect();
                table[77..2 * 77].fill(0.0);
                let weights = Weights::new(&table, 45, format).unwrap();
                for (output, row) in table.chunks_exact(77).enumerate() {
                    let mut back = vec![f32::NAN; 77];
                    weights.row(&mut back, output);
                    for (values, back) in row.chunks(BLOCK).zip(back.chunks(BLOCK)) {
                        let most = values.iter().fold(0_f32, |most, x| most.max(x.abs()));
                        for (value, back) in values.iter().zip(back) {
                            let scale = if format == WeightFormat::Q8_0 { most } else { value.abs() };
                            // The smallest f16 is 2^-24, and stands 127 times in a block's largest.
                            let least = match format {
                                WeightFormat::F16 => 2.0_f32.powi(-25),
                                WeightFormat::Q8_0 => 127.0 * 2.0_f32.powi(-25),
                                _ => 0.0,
                            };
                            assert!((value - back).abs() <= scale * relative(format) * 1.001 + least);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn numbers_that_are_not_finite_stay_in_their_row() {
        for format in WeightFormat::ALL {
            let weights = Weights::new(&values(40 * 70, 1), 40, format).unwrap();
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = values(3 * 70, 2);
                x[70 + 69] = bad;
                let mut out = vec![0.0; 3 * 40];
                weights.linear(&mut out, &x, 3);
                assert!(out[..40].iter().chain(&out[80..]).all(|out| out.is_finite()), "{format}");
                assert!(out[40..80].iter().all(|out| !out.is_finite()), "{format}");
            }
        }
    }
}
