//! Rows of activations times panels of weights on AVX-512.

#![expect(
    clippy::needless_range_loop,
    reason = "iterator adapters are not always inlined in vectorised code"
)]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm512_cvtepi32_ps,
    _mm512_cvtph_ps, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_load_ps,
    _mm512_load_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps,
};
use std::ops::Range;

use super::avx512::{self, mask};
use super::lines::Line;
use super::matrix::Matrix;
use super::rows::{Q8_WORDS, pack_q8};
use super::simd::{Level, level};
use super::tile::{Lanes, Tile};
use super::weights::{BLOCK, Kernel, LANES, Target};

/// Float32 times float32.
#[derive(Clone, Copy)]
pub(super) struct F32(avx512::F32);
/// Float32 times f16, which the processor widens as it goes.
#[derive(Clone, Copy)]
pub(super) struct F16(pub F32);
/// Bfloat16 times bfloat16.
#[derive(Clone, Copy)]
pub(super) struct Bf16(avx512::Bf16);
/// Integers times integers, a block at a time.
#[derive(Clone, Copy)]
pub(super) struct Q8(());

impl F32 {
    pub(super) fn detect() -> Option<Self> {
        avx512::F32::detect().map(Self)
    }
}

impl Bf16 {
    pub(super) fn detect() -> Option<Self> {
        avx512::Bf16::detect().map(Self)
    }
}

impl Q8 {
    pub(super) fn detect() -> Option<Self> {
        (level() == Level::Avx512 && is_x86_feature_detected!("avx512vnni")).then_some(Self(()))
    }
}

/// Floats in a vector.
const VECTOR: usize = 16;

/// Two sums of a vector per row and panel.
type Sums<const ROWS: usize, const PANELS: usize> = [[[__m512; 2]; PANELS]; ROWS];

macro_rules! kernel {
    (
        $name:ident, $features:literal, words $words:expr, lines $lines:expr, pack $pack:expr, step $step:ident,
        tile $tile:ident, { $($width:literal: $together:literal),* }
    ) => {
        impl Kernel for $name {
            const WIDTHS: &'static [usize] = &[$($width),*];
            const WORDS: usize = $words;

            fn together(self, width: usize) -> usize {
                match width {
                    $($width => $together,)*
                    _ => unreachable!("no panel has {width} rows"),
                }
            }

            fn pack(self, to: &mut [u32], width: usize, x: Matrix<'_>, rows: Range<usize>) {
                $pack(self, to, width, x, rows);
            }

            unsafe fn multiply(
                self,
                width: usize,
                panels: usize,
                steps: usize,
                left: *const u32,
                right: *const Line,
                distance: usize,
                target: &Target,
            ) {
                // SAFETY: `detect` found the instructions, the rest is promised by the caller.
                unsafe {
                    match (width, panels) {
                        $(
                            ($width, 1) => $tile::<$width, 1>(steps, left, right, distance, target),
                            ($width, _) => $tile::<$width, $together>(steps, left, right, distance, target),
                        )*
                        _ => unreachable!("no panel has {width} rows"),
                    }
                }
            }
        }

        /// # Safety
        /// See [`Kernel::multiply`].
        #[target_feature(enable = $features)]
        unsafe fn $tile<const ROWS: usize, const PANELS: usize>(
            steps: usize,
            left: *const u32,
            right: *const Line,
            distance: usize,
            target: &Target,
        ) {
            // SAFETY: promised by the caller; every step of the panels is read once.
            unsafe {
                let mut sums = begin::<ROWS, PANELS>(target);
                let (mut left, mut right) = (left, right);
                for _ in 0..steps {
                    $step(&mut sums, left, right, distance);
                    left = left.add(ROWS * $words);
                    right = right.add($lines);
                }
                store(&sums, target);
            }
        }
    };
}

// Sums of up to 14 × 2 vectors leave room for a panel's two and a broadcast. Few rows take several panels at once, so
// that enough sums are under way to hide how long each addition takes.
kernel!(
    F32, "avx512f", words 1, lines 2, pack |kernel: F32, to, width, x, rows| pack(kernel.0, to, width, x, rows),
    step step_f32, tile tile_f32, { 1: 1, 2: 1, 4: 1, 8: 1, 14: 1 }
);
kernel!(
    F16, "avx512f", words 1, lines 1, pack |kernel: F16, to, width, x, rows| pack(kernel.0.0, to, width, x, rows),
    step step_f16, tile tile_f16, { 1: 2, 2: 2, 4: 1, 8: 1, 14: 1 }
);
kernel!(
    Bf16, "avx512f,avx512bf16", words 1, lines 2,
    pack |kernel: Bf16, to, width, x, rows| pack(kernel.0, to, width, x, rows),
    step step_bf16, tile tile_bf16, { 1: 1, 2: 1, 4: 1, 8: 1, 14: 1 }
);
// Here each sum of floats has a sum of integers beside it.
kernel!(
    Q8, "avx512f,avx512vnni", words Q8_WORDS, lines 17, pack |_, to, width, x, rows| pack_q8(to, width, x, rows),
    step step_q8, tile tile_q8, { 1: 1, 2: 1, 4: 1, 6: 1 }
);

fn pack<T: Tile>(tile: T, to: &mut [u32], width: usize, x: Matrix<'_>, rows: Range<usize>) {
    tile.pack(to, width, Lanes::new(x, rows, 0..x.columns()));
}

/// # Safety
/// AVX-512; see [`Kernel::multiply`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn begin<const ROWS: usize, const PANELS: usize>(target: &Target) -> Sums<ROWS, PANELS> {
    let mut sums = [[[_mm512_setzero_ps(); 2]; PANELS]; ROWS];
    for row in 0..ROWS.min(target.rows) {
        for vector in 0..2 * PANELS {
            let at = target.data.wrapping_add(row * target.stride + vector * VECTOR);
            if target.resume {
                let columns = mask(target.columns.saturating_sub(vector * VECTOR));
                // SAFETY: the row is one of the target's, the mask ends with its columns.
                sums[row][vector / 2][vector % 2] = unsafe { _mm512_maskz_loadu_ps(columns, at) };
            } else {
                _mm_prefetch::<_MM_HINT_T0>(at.cast());
            }
        }
    }
    sums
}

/// # Safety
/// AVX-512; see [`Kernel::multiply`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const ROWS: usize, const PANELS: usize>(sums: &Sums<ROWS, PANELS>, target: &Target) {
    for row in 0..ROWS.min(target.rows) {
        for vector in 0..2 * PANELS {
            let at = target.data.wrapping_add(row * target.stride + vector * VECTOR);
            let columns = mask(target.columns.saturating_sub(vector * VECTOR));
            // SAFETY: the row is one of the target's, the mask ends with its columns.
            unsafe { _mm512_mask_storeu_ps(at, columns, sums[row][vector / 2][vector % 2]) };
        }
    }
}

/// Lines ahead of what is read that are asked for.
const AHEAD: usize = 32;
const Q8_AHEAD: usize = 68;

/// Asks for a line some lines ahead.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(line: *const Line, ahead: usize) {
    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(ahead).cast());
}

/// Adds the products of a word of each row and two vectors of a panel.
///
/// # Safety
/// AVX-512; `left` has a word of each row.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn multiply_add<const ROWS: usize, const PANELS: usize>(
    sums: &mut Sums<ROWS, PANELS>,
    left: *const u32,
    panel: usize,
    vectors: [__m512; 2],
) {
    for row in 0..ROWS {
        // SAFETY: promised by the caller.
        let value = _mm512_set1_ps(unsafe { *left.add(row).cast() });
        for half in 0..2 {
            sums[row][panel][half] = _mm512_fmadd_ps(value, vectors[half], sums[row][panel][half]);
        }
    }
}

/// # Safety
/// AVX-512; a step is left in all panels.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn step_f32<const ROWS: usize, const PANELS: usize>(
    sums: &mut Sums<ROWS, PANELS>,
    left: *const u32,
    right: *const Line,
    distance: usize,
) {
    for panel in 0..PANELS {
        // SAFETY: a step is two lines of each panel and a word of each row.
        unsafe {
            let right = right.add(panel * distance);
            prefetch(right, AHEAD);
            prefetch(right.add(1), AHEAD);
            let (first, second) = (_mm512_load_ps(right.cast()), _mm512_load_ps(right.add(1).cast()));
            multiply_add(sums, left, panel, [first, second]);
        }
    }
}

/// # Safety
/// AVX-512; a step is left in all panels.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn step_f16<const ROWS: usize, const PANELS: usize>(
    sums: &mut Sums<ROWS, PANELS>,
    left: *const u32,
    right: *const Line,
    distance: usize,
) {
    for panel in 0..PANELS {
        // SAFETY: a step is a line of each panel and a word of each row.
        unsafe {
            let right = right.add(panel * distance);
            prefetch(right, AHEAD);
            let right = right.cast::<[u16; VECTOR]>();
            let first = _mm512_cvtph_ps(_mm256_loadu_si256(right.cast()));
            let second = _mm512_cvtph_ps(_mm256_loadu_si256(right.add(1).cast()));
            multiply_add(sums, left, panel, [first, second]);
        }
    }
}

/// # Safety
/// AVX-512-BF16; a step is left in all panels.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn step_bf16<const ROWS: usize, const PANELS: usize>(
    sums: &mut Sums<ROWS, PANELS>,
    left: *const u32,
    right: *const Line,
    distance: usize,
) {
    for panel in 0..PANELS {
        // SAFETY: a step is two lines of each panel and a word of each row; all vectors are 512 bits of plain data.
        unsafe {
            let right = right.add(panel * distance);
            prefetch(right, AHEAD);
            prefetch(right.add(1), AHEAD);
            let first = std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(right.cast()));
            let second = std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(right.add(1).cast()));
            for row in 0..ROWS {
                let value =
                    std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*left.add(row).cast()));
                sums[row][panel][0] = _mm512_dpbf16_ps(sums[row][panel][0], value, first);
                sums[row][panel][1] = _mm512_dpbf16_ps(sums[row][panel][1], value, second);
            }
        }
    }
}

/// # Safety
/// AVX-512-VNNI; a step is left in all panels.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn step_q8<const ROWS: usize, const PANELS: usize>(
    sums: &mut Sums<ROWS, PANELS>,
    left: *const u32,
    right: *const Line,
    distance: usize,
) {
    const WORDS: usize = BLOCK / 4;
    for panel in 0..PANELS {
        // SAFETY: a step is 17 lines of each panel and `Q8_WORDS` words of each row.
        unsafe {
            let right = right.add(panel * distance);
            let mut integers = [[_mm512_set1_epi32(0); 2]; ROWS];
            for row in 0..ROWS {
                integers[row] = [_mm512_set1_epi32(*left.add(WORDS * ROWS + row).cast()); 2];
            }
            for word in 0..WORDS {
                prefetch(right.add(1 + 2 * word), Q8_AHEAD);
                prefetch(right.add(2 + 2 * word), Q8_AHEAD);
                let first = _mm512_load_si512(right.add(1 + 2 * word).cast());
                let second = _mm512_load_si512(right.add(2 + 2 * word).cast());
                for row in 0..ROWS {
                    let value = _mm512_set1_epi32(*left.add(word * ROWS + row).cast());
                    integers[row][0] = _mm512_dpbusd_epi32(integers[row][0], first, value);
                    integers[row][1] = _mm512_dpbusd_epi32(integers[row][1], second, value);
                }
            }
            let scales = right.cast::<[u16; VECTOR]>();
            for half in 0..2 {
                let scales = _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(half).cast()));
                for row in 0..ROWS {
                    let scale = _mm512_set1_ps(*left.add((WORDS + 1) * ROWS + row).cast());
                    sums[row][panel][half] = _mm512_fmadd_ps(
                        _mm512_cvtepi32_ps(integers[row][half]),
                        _mm512_mul_ps(scales, scale),
                        sums[row][panel][half],
                    );
                }
            }
        }
    }
}

const _: () = assert!(LANES == 2 * VECTOR);
