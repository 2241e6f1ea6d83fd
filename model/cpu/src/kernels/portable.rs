//! Kernels for any processor, as loops that the compiler vectorises.
//!
//! In f32, f16 and `q8_0` they give the same bits as every other version. Products of bfloat16 are exact here and only
//! their sum is rounded to float32, unlike on processors with an instruction for them.

#![expect(
    clippy::needless_range_loop,
    reason = "iterator adapters are not always inlined in vectorised code"
)]

use half::bf16;
use ulmus_backend::WeightFormat;

use super::aligned::Line;
use super::panel::{Kernel, LANES, Lanes, Q8_BLOCK, Target, pack};
use super::q8;
use super::simd::vectorised;

/// Float32 times float32.
#[derive(Clone, Copy)]
pub(super) struct F32;
/// Float32 times f16.
#[derive(Clone, Copy)]
pub(super) struct F16;
/// Bfloat16 times bfloat16.
#[derive(Clone, Copy)]
pub(super) struct Bf16;
/// Integers times integers, one block at a time.
#[derive(Clone, Copy)]
pub(super) struct Q8_0;

/// Number of lanes whose sums are computed together. Those of [`ROWS`] rows take 12 of 16 registers with vectors of 8
/// floats, and 24 of 32 registers with vectors of 4.
const HALF: usize = LANES / 2;
/// Number of rows in the wider version.
const ROWS: usize = 6;

type Sums<const ROWS: usize> = [[f32; HALF]; ROWS];

macro_rules! kernel {
    (
        $name:ident, words $words:expr, lines $lines:expr, rows $rows:expr, pack $pack:expr,
        sum $sum:ident, $one:ident, $many:ident
    ) => {
        vectorised! {
            fn $one(left: &[u32], right: &[Line], half: usize, sums: &mut Sums<1>) {
                $sum(left, right, half, sums);
            }
        }
        vectorised! {
            fn $many(left: &[u32], right: &[Line], half: usize, sums: &mut Sums<{ $rows }>) {
                $sum(left, right, half, sums);
            }
        }
        impl Kernel for $name {
            const FORMAT: WeightFormat = WeightFormat::$name;
            const WIDTHS: &'static [usize] = &[1, $rows];
            const STEP_WORDS: usize = $words;

            fn pack(self, to: &mut [u32], width: usize, lanes: Lanes<'_>) {
                $pack(to, width, lanes);
            }

            unsafe fn multiply(
                self,
                width: usize,
                steps: usize,
                left: *const u32,
                right: *const Line,
                target: &Target,
            ) {
                // SAFETY: by the contract of `Kernel::multiply`, both panels have `steps` steps.
                let (left, right) = unsafe {
                    let left = std::slice::from_raw_parts(left, steps * width * $words);
                    (left, std::slice::from_raw_parts(right, steps * $lines))
                };
                for half in 0..2 {
                    // SAFETY: by the contract of `Kernel::multiply`, the target's sums are valid and not shared.
                    unsafe {
                        match width {
                            1 => add(target, half, |sums| $one(left, right, half, sums)),
                            _ => add(target, half, |sums| $many(left, right, half, sums)),
                        }
                    }
                }
            }
        }
    };
}

/// Calls `sum` to add to the target's sums of one half of the lanes.
///
/// # Safety
/// The rows and columns of `target` must be valid for reads and writes, and nothing else may access them.
unsafe fn add<const ROWS: usize>(target: &Target, half: usize, sum: impl FnOnce(&mut Sums<ROWS>)) {
    let columns = target.columns.saturating_sub(half * HALF).min(HALF);
    if columns == 0 {
        return;
    }
    let mut sums = [[0_f32; HALF]; ROWS];
    // SAFETY: `row` is below `target.rows` in both loops, the columns are the target's, and the caller guarantees that
    // they are valid and not shared.
    let row = |row: usize| unsafe { std::slice::from_raw_parts_mut(target.at(row, half * HALF), columns) };
    if target.resume {
        for (index, sums) in sums.iter_mut().enumerate().take(target.rows) {
            sums[..columns].copy_from_slice(row(index));
        }
    }
    sum(&mut sums);
    for (index, sums) in sums.iter().enumerate().take(target.rows) {
        row(index).copy_from_slice(&sums[..columns]);
    }
}

kernel!(F32, words 1, lines 2, rows ROWS, pack pack_f32, sum sum_f32, f32_one, f32_many);
kernel!(F16, words 1, lines 1, rows ROWS, pack pack_f32, sum sum_f16, f16_one, f16_many);
kernel!(Bf16, words 2, lines 2, rows ROWS, pack pack_bf16, sum sum_bf16, bf16_one, bf16_many);
// Fewer rows fit here, because each sum of floats needs a sum of integers beside it.
kernel!(Q8_0, words q8::STEP_WORDS, lines 17, rows 2, pack q8::pack_left, sum sum_q8, q8_one, q8_many);

fn pack_f32(to: &mut [u32], width: usize, lanes: Lanes<'_>) {
    pack::<1, u32>(to, width, lanes, f32::to_bits);
}

/// Packs bfloat16 numbers as float32, with both depths of a step one after the other.
fn pack_bf16(to: &mut [u32], width: usize, lanes: Lanes<'_>) {
    // With an odd number of depths, the second half of the last step is zero.
    let (to, rest) = to.split_at_mut(width * lanes.depths);
    pack::<1, u32>(to, width, lanes, |x| bf16::from_f32(x).to_f32().to_bits());
    rest.fill(0);
}

/// Adds the products of one depth.
#[inline(always)]
fn add_depth<const ROWS: usize>(left: &[u32; ROWS], right: &[f32; HALF], sums: &mut Sums<ROWS>) {
    for row in 0..ROWS {
        let left = f32::from_bits(left[row]);
        for lane in 0..HALF {
            sums[row][lane] = left.mul_add(right[lane], sums[row][lane]);
        }
    }
}

#[inline(always)]
fn sum_f32<const ROWS: usize>(left: &[u32], right: &[Line], half: usize, sums: &mut Sums<ROWS>) {
    let (left, right) = (left.as_chunks::<ROWS>().0, right.as_chunks::<2>().0);
    let mut own = *sums;
    for step in 0..left.len().min(right.len()) {
        let mut lanes = [0_f32; HALF];
        for lane in 0..HALF {
            lanes[lane] = f32::from_bits(right[step][half].0[lane]);
        }
        add_depth(&left[step], &lanes, &mut own);
    }
    *sums = own;
}

#[inline(always)]
fn sum_f16<const ROWS: usize>(left: &[u32], right: &[Line], half: usize, sums: &mut Sums<ROWS>) {
    let left = left.as_chunks::<ROWS>().0;
    let right: &[[[u16; HALF]; 2]] = bytemuck::cast_slice(right);
    let mut own = *sums;
    for step in 0..left.len().min(right.len()) {
        let mut lanes = [0_f32; HALF];
        for lane in 0..HALF {
            lanes[lane] = widen(right[step][half][lane]);
        }
        add_depth(&left[step], &lanes, &mut own);
    }
    *sums = own;
}

/// Converts a finite f16 to f32: shifts its bits to their position in f32, and multiplies by the difference of the
/// exponents, which is correct for subnormal numbers, too.
#[inline(always)]
fn widen(half: u16) -> f32 {
    const DISTANCE: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits(u32::from(half & 0x7fff) << 13) * DISTANCE;
    f32::from_bits(magnitude.to_bits() | u32::from(half & 0x8000) << 16)
}

#[inline(always)]
fn sum_bf16<const ROWS: usize>(left: &[u32], right: &[Line], half: usize, sums: &mut Sums<ROWS>) {
    let left = left.as_chunks::<ROWS>().0.as_chunks::<2>().0;
    let right = right.as_chunks::<2>().0;
    let mut own = *sums;
    for step in 0..left.len().min(right.len()) {
        // A word holds two numbers, the first in its lower half.
        let mut lanes = [[0_f32; HALF]; 2];
        for lane in 0..HALF {
            let pair = u32::from_le(right[step][half].0[lane]);
            lanes[0][lane] = f32::from_bits(pair << 16);
            lanes[1][lane] = f32::from_bits(pair & 0xffff_0000);
        }
        for depth in 0..2 {
            add_depth(&left[step][depth], &lanes[depth], &mut own);
        }
    }
    *sums = own;
}

#[inline(always)]
fn sum_q8<const ROWS: usize>(left: &[u32], right: &[Line], half: usize, sums: &mut Sums<ROWS>) {
    let left = left.as_chunks::<ROWS>().0.as_chunks::<{ q8::STEP_WORDS }>().0;
    let right = right.as_chunks::<17>().0;
    let mut own = *sums;
    for step in 0..left.len().min(right.len()) {
        let (left, right) = (&left[step], &right[step]);
        let mut integers = [[0_i32; HALF]; ROWS];
        for word in 0..Q8_BLOCK / 4 {
            for row in 0..ROWS {
                for lane in 0..HALF {
                    let weights = right[1 + 2 * word + half].0[lane].to_le_bytes();
                    let activations = left[word][row].to_le_bytes();
                    let mut sum = 0;
                    for i in 0..4 {
                        sum += i32::from(weights[i]) * i32::from(activations[i] as i8);
                    }
                    integers[row][lane] += sum;
                }
            }
        }
        for row in 0..ROWS {
            let start = left[Q8_BLOCK / 4][row] as i32;
            let scale = f32::from_bits(left[Q8_BLOCK / 4 + 1][row]);
            for lane in 0..HALF {
                let weights = (right[0].0[half * HALF / 2 + lane / 2] >> (16 * (lane % 2))) as u16;
                let value = (integers[row][lane] + start) as f32;
                own[row][lane] = value.mul_add(widen(weights) * scale, own[row][lane]);
            }
        }
    }
    *sums = own;
}

/// Sums products of operands that stay in the first-level cache, and returns the number of operations.
pub(super) fn saturate(depths: usize) -> usize {
    const PANEL: usize = 128;
    let (left, right) = ([0_u32; PANEL * ROWS], [Line([0; 16]); PANEL * 2]);
    let mut sums = [[0_f32; HALF]; ROWS];
    for _ in 0..depths / PANEL {
        f32_many(
            std::hint::black_box(&left),
            std::hint::black_box(&right),
            0,
            std::hint::black_box(&mut sums),
        );
    }
    depths / PANEL * PANEL * 2 * ROWS * HALF
}
