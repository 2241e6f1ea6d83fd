//! Rows of activations times panels of weights: loops for any processor, which the compiler vectorises.
//!
//! In f32, f16 and `q8_0` the bits are those of every other version; products of bfloat16 are exact here, and rounded
//! to float32 only in the sum, which is not how processors with an instruction for them do it.

use std::ops::Range;

use super::lines::Line;
use super::matrix::Matrix;
use super::simd::vectorised;
use super::tile::{Lanes, Plain, Tile};
use super::weights::{BLOCK, Kernel, LANES, SHIFT, Target};

#[derive(Clone, Copy)]
pub(super) struct F32;
#[derive(Clone, Copy)]
pub(super) struct F16;
#[derive(Clone, Copy)]
pub(super) struct Bf16;
#[derive(Clone, Copy)]
pub(super) struct Q8;

/// Rows of the wider version: with vectors of 8, its sums take half of 16 registers.
const ROWS: usize = 2;
const WIDTHS: &[usize] = &[1, ROWS];

type Sums<const ROWS: usize> = [[f32; LANES]; ROWS];

macro_rules! kernel {
    ($name:ident, words $words:expr, lines $lines:expr, pack $pack:expr, $sum:ident, $one:ident, $two:ident) => {
        vectorised! {
            fn $one(left: &[u32], right: &[Line], sums: &mut Sums<1>) {
                $sum(left, right, sums);
            }
        }
        vectorised! {
            fn $two(left: &[u32], right: &[Line], sums: &mut Sums<ROWS>) {
                $sum(left, right, sums);
            }
        }
        impl Kernel for $name {
            const WIDTHS: &'static [usize] = WIDTHS;
            const WORDS: usize = $words;

            fn together(self, _: usize) -> usize {
                1
            }

            fn pack(self, to: &mut [u32], width: usize, x: Matrix<'_>, rows: Range<usize>) {
                $pack(to, width, x, rows);
            }

            unsafe fn multiply(
                self,
                width: usize,
                _: usize,
                steps: usize,
                left: *const u32,
                right: *const Line,
                _: usize,
                target: &Target,
            ) {
                // SAFETY: promised by the caller.
                let (left, right) = unsafe {
                    let left = std::slice::from_raw_parts(left, steps * width * $words);
                    (left, std::slice::from_raw_parts(right, steps * $lines))
                };
                // SAFETY: promised by the caller.
                unsafe {
                    match width {
                        1 => add(target, |sums| $one(left, right, sums)),
                        _ => add(target, |sums| $two(left, right, sums)),
                    }
                }
            }
        }
    };
}

/// Has `sum` add to the sums of a target.
///
/// # Safety
/// See [`Kernel::multiply`].
unsafe fn add<const ROWS: usize>(target: &Target, sum: impl FnOnce(&mut Sums<ROWS>)) {
    let mut sums = [[0_f32; LANES]; ROWS];
    // SAFETY: promised by the caller.
    let row = |row: usize| unsafe {
        std::slice::from_raw_parts_mut(target.data.add(row * target.stride), target.columns)
    };
    if target.resume {
        for (index, sums) in sums.iter_mut().enumerate().take(target.rows) {
            sums[..target.columns].copy_from_slice(row(index));
        }
    }
    sum(&mut sums);
    for (index, sums) in sums.iter().enumerate().take(target.rows) {
        row(index).copy_from_slice(&sums[..target.columns]);
    }
}

kernel!(F32, words 1, lines 2, pack pack_floats::<false>, sum_f32, f32_one, f32_two);
kernel!(F16, words 1, lines 1, pack pack_floats::<false>, sum_f16, f16_one, f16_two);
kernel!(Bf16, words 2, lines 2, pack pack_floats::<true>, sum_bf16, bf16_one, bf16_two);
kernel!(Q8, words Q8_WORDS, lines 17, pack pack_q8, sum_q8, q8_one, q8_two);

fn pack_floats<const ROUNDED: bool>(to: &mut [u32], width: usize, x: Matrix<'_>, rows: Range<usize>) {
    let (depths, lanes) = (x.columns(), Lanes::new(x, rows, 0..x.columns()));
    // With an odd number of depths, the last pair of bfloat16 has a half more.
    let (to, rest) = to.split_at_mut(width * depths);
    Plain::<ROUNDED>.pack(to, width, lanes);
    rest.fill(0);
}

/// Adds the products of one depth.
#[inline(always)]
fn add_depth<const ROWS: usize>(left: &[u32; ROWS], right: &[f32; LANES], sums: &mut Sums<ROWS>) {
    for row in 0..ROWS {
        let left = f32::from_bits(left[row]);
        for lane in 0..LANES {
            sums[row][lane] = left.mul_add(right[lane], sums[row][lane]);
        }
    }
}

#[inline(always)]
fn sum_f32<const ROWS: usize>(left: &[u32], right: &[Line], sums: &mut Sums<ROWS>) {
    let (left, right) = (left.as_chunks::<ROWS>().0, right.as_chunks::<2>().0);
    let mut own = *sums;
    for step in 0..left.len().min(right.len()) {
        let mut lanes = [0_f32; LANES];
        for lane in 0..LANES {
            lanes[lane] = f32::from_bits(right[step][lane / 16].0[lane % 16]);
        }
        add_depth(&left[step], &lanes, &mut own);
    }
    *sums = own;
}

#[inline(always)]
fn sum_f16<const ROWS: usize>(left: &[u32], right: &[Line], sums: &mut Sums<ROWS>) {
    let left = left.as_chunks::<ROWS>().0;
    let right: &[[u16; LANES]] = bytemuck::cast_slice(right);
    let mut own = *sums;
    for step in 0..left.len().min(right.len()) {
        let mut lanes = [0_f32; LANES];
        for lane in 0..LANES {
            lanes[lane] = widen(right[step][lane]);
        }
        add_depth(&left[step], &lanes, &mut own);
    }
    *sums = own;
}

/// A finite f16 as f32: its bits in the place where those of f32 are, times the distance of the exponents, which
/// makes subnormal numbers right too.
#[inline(always)]
fn widen(half: u16) -> f32 {
    const DISTANCE: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits(u32::from(half & 0x7fff) << 13) * DISTANCE;
    f32::from_bits(magnitude.to_bits() | u32::from(half & 0x8000) << 16)
}

#[inline(always)]
fn sum_bf16<const ROWS: usize>(left: &[u32], right: &[Line], sums: &mut Sums<ROWS>) {
    let left = left.as_chunks::<ROWS>().0.as_chunks::<2>().0;
    let right: &[[[u16; 2]; LANES]] = bytemuck::cast_slice(right);
    let mut own = *sums;
    for step in 0..left.len().min(right.len()) {
        for half in 0..2 {
            let mut lanes = [0_f32; LANES];
            for lane in 0..LANES {
                lanes[lane] = f32::from_bits(u32::from(right[step][lane][half]) << 16);
            }
            add_depth(&left[step][half], &lanes, &mut own);
        }
    }
    *sums = own;
}

/// Words per row and block of quantised activations: the integers of four inputs in each of eight words, then what
/// the sum of integers starts from because weights are shifted, then the scale.
pub(super) const Q8_WORDS: usize = BLOCK / 4 + 2;

/// Quantises rows in blocks of [`BLOCK`]. A block with a number that is not finite has the scale NaN.
pub(super) fn pack_q8(to: &mut [u32], width: usize, x: Matrix<'_>, rows: Range<usize>) {
    to.fill(0);
    let (inputs, first) = (x.columns(), rows.start);
    for row in rows {
        // SAFETY: the matrix has this row of that many adjacent elements.
        let values = unsafe { std::slice::from_raw_parts(x.at(row, 0), inputs) };
        quantise(to, width, row - first, values);
    }
}

vectorised! {
    fn quantise(to: &mut [u32], width: usize, row: usize, values: &[f32]) {
        let (blocks, rest) = values.as_chunks::<BLOCK>();
        for block in 0..blocks.len() {
            quantise_block(&mut to[block * Q8_WORDS * width..][..Q8_WORDS * width], width, row, &blocks[block]);
        }
        if !rest.is_empty() {
            let mut last = [0_f32; BLOCK];
            last[..rest.len()].copy_from_slice(rest);
            quantise_block(&mut to[blocks.len() * Q8_WORDS * width..][..Q8_WORDS * width], width, row, &last);
        }
    }
}

#[inline(always)]
fn quantise_block(to: &mut [u32], width: usize, row: usize, values: &[f32; BLOCK]) {
    /// Between 2^23 and 2^24 floats are integers: adding this rounds, and leaves the integer in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    let mut largest = [0_f32; 16];
    // Stays zero unless a number is not finite.
    let mut poison = [0_f32; 16];
    for half in 0..2 {
        for i in 0..16 {
            let value = values[16 * half + i];
            let magnitude = value.abs();
            largest[i] = if magnitude > largest[i] { magnitude } else { largest[i] };
            poison[i] += value * 0.0;
        }
    }
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            largest[i] = if largest[i + half] > largest[i] { largest[i + half] } else { largest[i] };
            poison[i] += poison[i + half];
        }
        half /= 2;
    }
    let scale = largest[0] / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    // A scale so small that its inverse overflows belongs to numbers that are as good as zero.
    let inverse = if inverse < f32::INFINITY { inverse } else { 0.0 };
    let mut integers = [0_i32; BLOCK];
    let mut total = 0_i32;
    for i in 0..BLOCK {
        integers[i] = (values[i] * inverse + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32;
        total = total.wrapping_add(integers[i]);
    }
    for word in 0..BLOCK / 4 {
        let byte = |i: usize| (integers[4 * word + i] as u32 & 0xff) << (8 * i);
        to[word * width + row] = byte(0) | byte(1) | byte(2) | byte(3);
    }
    to[BLOCK / 4 * width + row] = total.wrapping_mul(-SHIFT) as u32;
    to[(BLOCK / 4 + 1) * width + row] = (scale + poison[0]).to_bits();
}

#[inline(always)]
fn sum_q8<const ROWS: usize>(left: &[u32], right: &[Line], sums: &mut Sums<ROWS>) {
    let left = left.as_chunks::<ROWS>().0.as_chunks::<Q8_WORDS>().0;
    let right = right.as_chunks::<17>().0;
    let mut own = *sums;
    for step in 0..left.len().min(right.len()) {
        let (left, right) = (&left[step], &right[step]);
        let mut integers = [[0_i32; LANES]; ROWS];
        for word in 0..BLOCK / 4 {
            for row in 0..ROWS {
                for lane in 0..LANES {
                    let weights = right[1 + 2 * word + lane / 16].0[lane % 16].to_le_bytes();
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
            let start = left[BLOCK / 4][row] as i32;
            let scale = f32::from_bits(left[BLOCK / 4 + 1][row]);
            for lane in 0..LANES {
                let half = (right[0].0[lane / 2] >> (16 * (lane % 2))) as u16;
                let value = (integers[row][lane] + start) as f32;
                own[row][lane] = value.mul_add(widen(half) * scale, own[row][lane]);
            }
        }
    }
    *sums = own;
}
