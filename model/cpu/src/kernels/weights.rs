//! Matrices for inference, packed once in one of four formats as the right panels of products.
//!
//! The same memory serves prompts, where each panel is multiplied by many rows while it is in the cache, and single
//! tokens, where only the time to read it once matters.

use rayon::prelude::*;
use ulmus_backend::{BackendError, WeightFormat};

use super::aligned::{room, with_operands};
use super::dispatch::{by_kernel, pack_right, unpack};
use super::huge_pages::Pages;
use super::panel::{Kernel, LANES, Lanes, LeftPanels, step};
use super::product::{Product, pack_left};
use super::view::{Matrix, MatrixMut, Output, Threads};

/// A matrix `[outputs, inputs]` in one format.
#[derive(Debug)]
pub struct Weights {
    format: WeightFormat,
    outputs: usize,
    inputs: usize,
    lines: Pages,
}

impl Weights {
    /// Packs a row-major matrix with `outputs` rows.
    pub(crate) fn new(values: &[f32], outputs: usize, format: WeightFormat) -> Result<Self, BackendError> {
        let inputs = values.len() / outputs;
        let (depths, step_lines) = step(format);
        let panel = inputs.div_ceil(depths) * step_lines;
        let mut lines = Pages::zeroed(panel * outputs.div_ceil(LANES))?;
        let matrix = Matrix::new(values, outputs, inputs, inputs);
        lines.par_chunks_exact_mut(panel).enumerate().for_each(|(index, to)| {
            let first = index * LANES;
            pack_right(format, to, Lanes::new(matrix, first..outputs.min(first + LANES), 0..inputs));
        });
        Ok(Self { format, outputs, inputs, lines })
    }

    fn panel_lines(&self) -> usize {
        let (inputs, lines) = step(self.format);
        self.inputs.div_ceil(inputs) * lines
    }

    /// `out[r] = weights[ids[r]]`.
    pub(crate) fn embed(&self, out: &mut [f32], ids: &[u32]) {
        for (out, id) in out.chunks_exact_mut(self.inputs).zip(ids) {
            self.row(out, *id as usize);
        }
    }

    fn row(&self, out: &mut [f32], output: usize) {
        assert!(output < self.outputs, "row {output} of {}", self.outputs);
        let panel = self.panel_lines();
        unpack(self.format, out, &self.lines[output / LANES * panel..][..panel], output % LANES);
    }

    /// `out = x · weightsᵀ` for `rows` rows.
    pub(crate) fn linear(&self, out: &mut [f32], x: &[f32], rows: usize) {
        by_kernel!(
            match self.format,
            WeightFormat { F32, F16, Bf16, Q8_0 },
            kernel => self.linear_by(kernel, out, x, rows)
        );
    }

    fn linear_by<K: Kernel>(&self, kernel: K, out: &mut [f32], x: &[f32], rows: usize) {
        let left = LeftPanels::new(kernel, rows, self.inputs);
        let (x, depths) = (Matrix::new(x, rows, self.inputs, self.inputs), 0..self.inputs);
        let out = &mut MatrixMut::new(out, rows, self.outputs, self.outputs);
        with_operands(|[scratch, _]| {
            let left_words = room(scratch, left.words());
            pack_left(kernel, left, left_words, x, 0..rows, depths, Threads::All);
            let (right, distance) = (&self.lines[..], self.panel_lines());
            let product = Product { left, left_words, right, distance, columns: self.outputs };
            product.compute(kernel, out, Output::Overwrite, Threads::All);
        });
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::kernels::panel::Q8_BLOCK;
    use crate::kernels::portable;
    use crate::kernels::testing::values;
    #[cfg(target_arch = "x86_64")]
    use crate::kernels::{avx2, avx512};

    /// Pairs of outputs and inputs, some of which are multiples of all block sizes.
    const SHAPES: [(usize, usize); 6] = [(1, 1), (33, 31), (70, 100), (128, 64), (197, 1281), (300, 2100)];

    fn product<K: Kernel>(kernel: K, weights: &Weights, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / weights.inputs;
        let mut out = vec![f32::NAN; rows * weights.outputs];
        weights.linear_by(kernel, &mut out, x, rows);
        out
    }

    /// Compares the results with f64, single rows with rows together, and one thread with three.
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
        // This is for sums of products below 1/4 in float32.
        let sums = 1e-6;
        // A quantised activation has an error of up to 1/508, times weights up to 1/2. This is 3e-4 on average, and
        // rarely six times that.
        let quantised = 2e-3;
        agrees(portable::F32, F32, |x| x, sums);
        agrees(portable::F16, F16, |x| x, sums);
        agrees(portable::Bf16, Bf16, rounded, sums);
        agrees(portable::Q8_0, Q8_0, |x| x, quantised);
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(kernel) = avx512::F32::detect() {
                agrees(kernel, F32, |x| x, sums);
                agrees(avx512::F16::detect().unwrap(), F16, |x| x, sums);
            }
            if let Some(kernel) = avx512::Bf16::detect() {
                agrees(kernel, Bf16, rounded, sums);
            }
            if let Some(kernel) = avx512::Q8_0::detect() {
                agrees(kernel, Q8_0, |x| x, quantised);
            }
            if let Some(kernel) = avx2::F32::detect() {
                agrees(kernel, F32, |x| x, sums);
            }
            if let Some(kernel) = avx2::Bf16::detect() {
                agrees(kernel, Bf16, rounded, sums);
            }
            if let Some(kernel) = avx2::F16::detect() {
                agrees(kernel, F16, |x| x, sums);
                agrees(avx2::Q8_0::detect().unwrap(), Q8_0, |x| x, quantised);
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
        if let Some(kernel) = avx512::F32::detect() {
            let weights = [weights(WeightFormat::F32), weights(WeightFormat::F16)];
            same(product(kernel, &weights[0], &x), product(portable::F32, &weights[0], &x));
            let half = avx512::F16::detect().unwrap();
            same(product(half, &weights[1], &x), product(portable::F16, &weights[1], &x));
        }
        let integers = weights(WeightFormat::Q8_0);
        if let Some(kernel) = avx512::Q8_0::detect() {
            same(product(kernel, &integers, &x), product(portable::Q8_0, &integers, &x));
        }
        if let (Some(kernel), Some(half)) = (avx2::F32::detect(), avx2::F16::detect()) {
            let weights = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16].map(weights);
            same(product(kernel, &weights[0], &x), product(portable::F32, &weights[0], &x));
            same(product(half, &weights[1], &x), product(portable::F16, &weights[1], &x));
            if let Some(bf16) = avx2::Bf16::detect() {
                same(product(bf16, &weights[2], &x), product(portable::Bf16, &weights[2], &x));
            }
            let kernel = avx2::Q8_0::detect().unwrap();
            same(product(kernel, &integers, &x), product(portable::Q8_0, &integers, &x));
        }
    }

    #[test]
    fn rows_come_back_as_near_as_the_format_allows() {
        // The error is half a unit in the last place, and in `q8_0` half an integer plus the rounding of the scale.
        let relative = |format| match format {
            WeightFormat::F32 => 0.0,
            WeightFormat::F16 => 2.0_f32.powi(-11),
            WeightFormat::Bf16 => 2.0_f32.powi(-8),
            WeightFormat::Q8_0 => 0.5 / 127.0 + 2.0_f32.powi(-11),
        };
        for format in WeightFormat::ALL {
            // Sizes range from far above to far below the usual, including subnormal f16.
            for size in [1e4, 1.0, 1e-3, 2e-7] {
                let mut table: Vec<f32> = values(45 * 77, 3).iter().map(|x| x * size).collect();
                table[77..2 * 77].fill(0.0);
                let weights = Weights::new(&table, 45, format).unwrap();
                for (output, row) in table.chunks_exact(77).enumerate() {
                    let mut back = vec![f32::NAN; 77];
                    weights.embed(&mut back, &[output as u32]);
                    for (values, back) in row.chunks(Q8_BLOCK).zip(back.chunks(Q8_BLOCK)) {
                        let most = values.iter().fold(0_f32, |most, x| most.max(x.abs()));
                        for (value, back) in values.iter().zip(back) {
                            let scale = if format == WeightFormat::Q8_0 { most } else { value.abs() };
                            // The smallest f16 is 2^-24, and a block's scale is 1/127 of its largest number.
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
