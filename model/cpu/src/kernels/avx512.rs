//! Kernels for AVX-512: float32, f16, bfloat16 and `q8_0`, with sums in float32.

#![expect(
    clippy::needless_range_loop,
    reason = "iterator adapters are not always inlined in vectorised code"
)]

use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __m512i, __mmask16, _MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch,
    _mm256_loadu_si256, _mm512_add_ps, _mm512_castps_si512, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh, _mm512_cvtph_ps, _mm512_dpbf16_ps, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_load_ps, _mm512_load_si512, _mm512_mask_storeu_epi32, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_or_si512, _mm512_permutex2var_epi64, _mm512_reduce_add_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi64, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpacklo_epi32,
};

use ulmus_backend::WeightFormat;

use super::aligned::Line;
use super::panel::{Kernel, LANES, Lanes, Q8_BLOCK, Target};
use super::q8;
use super::simd::{Level, level};

/// Number of floats in a vector.
const VECTOR: usize = LANES / 2;

/// Float32 times float32.
#[derive(Clone, Copy)]
pub(super) struct F32(());
/// Float32 times f16, which is widened on the fly.
#[derive(Clone, Copy)]
pub(super) struct F16(());
/// Bfloat16 times bfloat16.
#[derive(Clone, Copy)]
pub(super) struct Bf16(());
/// Integers times integers, one block at a time.
#[derive(Clone, Copy)]
pub(super) struct Q8_0(());

impl F32 {
    pub(super) fn detect() -> Option<Self> {
        (level() == Level::Avx512).then_some(Self(()))
    }
}

impl F16 {
    pub(super) fn detect() -> Option<Self> {
        (level() == Level::Avx512).then_some(Self(()))
    }
}

impl Bf16 {
    pub(super) fn detect() -> Option<Self> {
        (level() == Level::Avx512 && is_x86_feature_detected!("avx512bf16")).then_some(Self(()))
    }
}

impl Q8_0 {
    pub(super) fn detect() -> Option<Self> {
        (level() == Level::Avx512 && is_x86_feature_detected!("avx512vnni")).then_some(Self(()))
    }
}

/// Two vectors of sums per row.
type Sums<const ROWS: usize> = [[__m512; 2]; ROWS];

macro_rules! kernel {
    (
        $name:ident, $features:literal, words $words:expr, lines $lines:expr, pack $pack:expr, step $step:ident,
        tile $tile:ident, widths { $($width:literal),* }
    ) => {
        impl Kernel for $name {
            const FORMAT: WeightFormat = WeightFormat::$name;
            const WIDTHS: &'static [usize] = &[$($width),*];
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
                // SAFETY: `detect` has found the instructions, and the caller fulfils the contract of
                // `Kernel::multiply`.
                unsafe {
                    match width {
                        $($width => $tile::<$width>(steps, left, right, target),)*
                        _ => unreachable!("{width} is not among the widths of panels"),
                    }
                }
            }
        }

        /// Computes a tile.
        ///
        /// # Safety
        /// The contract of [`Kernel::multiply`], with `ROWS` as the width.
        #[target_feature(enable = $features)]
        unsafe fn $tile<const ROWS: usize>(
            steps: usize,
            left: *const u32,
            right: *const Line,
            target: &Target,
        ) {
            // Loading and storing are not in functions of their own, because the sums have to stay in registers.
            let masks = masks(target);
            let mut sums: Sums<ROWS> = [[_mm512_setzero_ps(); 2]; ROWS];
            prefetch_next::<ROWS>(target);
            if target.resume {
                for row in 0..ROWS {
                    for vector in 0..2 {
                        let columns = if row < target.rows { masks[vector] } else { 0 };
                        let at = target.at(row, vector * VECTOR);
                        // SAFETY: the mask allows only columns of the target, and none after its last row.
                        let sum = unsafe { _mm512_maskz_loadu_ps(columns, at) };
                        sums[row][vector] = sum;
                    }
                }
            }
            let (mut left, mut right) = (left, right);
            for _ in 0..steps {
                // SAFETY: the caller guarantees that both panels have `steps` steps, of which the loop reads each once.
                unsafe {
                    $step(&mut sums, left, right);
                    left = left.add(ROWS * $words);
                    right = right.add($lines);
                }
            }
            for row in 0..ROWS {
                for vector in 0..2 {
                    let columns = if row < target.rows { masks[vector] } else { 0 };
                    // SAFETY: the mask allows only columns of the target, and none after its last row.
                    unsafe {
                        _mm512_mask_storeu_ps(target.at(row, vector * VECTOR), columns, sums[row][vector]);
                    }
                }
            }
        }
    };
}

// Sums in up to 14 × 2 registers leave room for two vectors of a right panel and a broadcast.
kernel!(
    F32, "avx512f", words 1, lines 2, pack pack_float32,
    step step_f32, tile tile_f32, widths { 1, 2, 4, 8, 14 }
);
kernel!(
    F16, "avx512f", words 1, lines 1, pack pack_float32,
    step step_f16, tile tile_f16, widths { 1, 2, 4, 8, 14 }
);
kernel!(
    Bf16, "avx512f,avx512bf16", words 1, lines 2, pack pack_pairs,
    step step_bf16, tile tile_bf16, widths { 1, 2, 4, 8, 14 }
);
// Fewer rows fit here, because each sum of floats needs a sum of integers beside it.
kernel!(
    Q8_0, "avx512f,avx512vnni", words q8::STEP_WORDS, lines 17, pack q8::pack_left,
    step step_q8, tile tile_q8, widths { 1, 2, 4, 6 }
);

fn pack_float32(to: &mut [u32], width: usize, lanes: Lanes<'_>) {
    assert_eq!(to.len(), width * lanes.depths, "words of a panel");
    // SAFETY: only kernels whose `detect` has found AVX-512 call this, and the panel's size is checked above.
    unsafe { pack_f32(to, width, lanes) }
}

fn pack_pairs(to: &mut [u32], width: usize, lanes: Lanes<'_>) {
    assert_eq!(to.len(), width * lanes.depths.div_ceil(2), "words of a panel");
    // SAFETY: only kernels whose `detect` has found AVX-512-BF16 call this, and the panel's size is checked above.
    unsafe { pack_bf16(to, width, lanes) }
}

/// Prefetches the sums of the next tile.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_next<const ROWS: usize>(target: &Target) {
    for row in 0..ROWS {
        for vector in 0..2 {
            let at = target.next.wrapping_add(row * target.stride + vector * VECTOR);
            _mm_prefetch::<_MM_HINT_ET0>(at.cast());
        }
    }
}

/// Masks of the target's columns in both vectors of a row.
#[inline]
fn masks(target: &Target) -> [__mmask16; 2] {
    [mask(target.columns), mask(target.columns.saturating_sub(VECTOR))]
}

/// How many lines ahead of the current one are prefetched, by format.
const F32_AHEAD: usize = 24;
const F16_AHEAD: usize = 64;
const BF16_AHEAD: usize = 32;
const Q8_AHEAD: usize = 68;

/// Prefetches the line that is `ahead` lines after `line`.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(line: *const Line, ahead: usize) {
    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(ahead).cast());
}

/// Adds the products of one word of each row and two vectors of a right panel.
///
/// # Safety
/// The processor must have AVX-512, and `left` must point to one word per row.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn multiply_add<const ROWS: usize>(sums: &mut Sums<ROWS>, left: *const u32, vectors: [__m512; 2]) {
    for row in 0..ROWS {
        // SAFETY: the caller guarantees that there is a word for each row.
        let value = _mm512_set1_ps(unsafe { *left.add(row).cast() });
        for half in 0..2 {
            sums[row][half] = _mm512_fmadd_ps(value, vectors[half], sums[row][half]);
        }
    }
}

/// Adds the products of one step.
///
/// # Safety
/// The processor must have AVX-512, and both panels must have another step.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn step_f32<const ROWS: usize>(sums: &mut Sums<ROWS>, left: *const u32, right: *const Line) {
    // SAFETY: a step has two lines in the right panel and one word per row in the left panel.
    unsafe {
        prefetch(right, F32_AHEAD);
        prefetch(right.add(1), F32_AHEAD);
        let (first, second) = (_mm512_load_ps(right.cast()), _mm512_load_ps(right.add(1).cast()));
        multiply_add(sums, left, [first, second]);
    }
}

/// Adds the products of one step.
///
/// # Safety
/// The processor must have AVX-512, and both panels must have another step.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn step_f16<const ROWS: usize>(sums: &mut Sums<ROWS>, left: *const u32, right: *const Line) {
    // SAFETY: a step has one line in the right panel and one word per row in the left panel.
    unsafe {
        prefetch(right, F16_AHEAD);
        let right = right.cast::<[u16; VECTOR]>();
        let first = _mm512_cvtph_ps(_mm256_loadu_si256(right.cast()));
        let second = _mm512_cvtph_ps(_mm256_loadu_si256(right.add(1).cast()));
        multiply_add(sums, left, [first, second]);
    }
}

/// Adds the products of one step.
///
/// # Safety
/// The processor must have AVX-512-BF16, and both panels must have another step.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn step_bf16<const ROWS: usize>(sums: &mut Sums<ROWS>, left: *const u32, right: *const Line) {
    // SAFETY: a step has two lines in the right panel and one word per row in the left panel. All vectors are 512 bits
    // of plain data.
    unsafe {
        prefetch(right, BF16_AHEAD);
        prefetch(right.add(1), BF16_AHEAD);
        let first = std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(right.cast()));
        let second = std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(right.add(1).cast()));
        for row in 0..ROWS {
            let value = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*left.add(row).cast()));
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], value, first);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], value, second);
        }
    }
}

/// Adds the products of one step.
///
/// # Safety
/// The processor must have AVX-512-VNNI, and both panels must have another step.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn step_q8<const ROWS: usize>(sums: &mut Sums<ROWS>, left: *const u32, right: *const Line) {
    const INTEGER_WORDS: usize = Q8_BLOCK / 4;
    // SAFETY: a step has 17 lines in the right panel and `q8::STEP_WORDS` words per row in the left panel.
    unsafe {
        let mut integers = [[_mm512_set1_epi32(0); 2]; ROWS];
        for row in 0..ROWS {
            integers[row] = [_mm512_set1_epi32(*left.add(INTEGER_WORDS * ROWS + row).cast()); 2];
        }
        for word in 0..INTEGER_WORDS {
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
                let scale = _mm512_set1_ps(*left.add((INTEGER_WORDS + 1) * ROWS + row).cast());
                sums[row][half] = _mm512_fmadd_ps(
                    _mm512_cvtepi32_ps(integers[row][half]),
                    _mm512_mul_ps(scales, scale),
                    sums[row][half],
                );
            }
        }
    }
}

/// Number of lanes in the group of [`VECTOR`] that begins at lane `first`.
fn lanes_of(lanes: &Lanes<'_>, first: usize) -> usize {
    lanes.count.saturating_sub(first).min(VECTOR)
}

/// The mask of the first `count` elements of a vector.
fn mask(count: usize) -> __mmask16 {
    ((1_u32 << count.min(VECTOR)) - 1) as __mmask16
}

/// Packs one word per lane and depth.
///
/// # Safety
/// The processor must have AVX-512, and `to` must have `width * source.depths` words.
#[target_feature(enable = "avx512f")]
unsafe fn pack_f32(to: &mut [u32], width: usize, source: Lanes<'_>) {
    for first in (0..width).step_by(VECTOR) {
        let lanes = lanes_of(&source, first);
        if source.adjacent() {
            for depth in 0..source.depths {
                // SAFETY: the mask allows only lanes of the source, and depths are stored in order.
                unsafe {
                    let values = _mm512_maskz_loadu_ps(mask(lanes), source.at(first, depth));
                    store_lanes(to, width, first, depth, _mm512_castps_si512(values));
                }
            }
            continue;
        }
        for start in (0..source.depths).step_by(VECTOR) {
            let depths = VECTOR.min(source.depths - start);
            let mut block = [_mm512_setzero_si512(); VECTOR];
            for (lane, row) in block.iter_mut().enumerate().take(lanes) {
                // SAFETY: the mask allows only depths of the source.
                let values = unsafe { _mm512_maskz_loadu_ps(mask(depths), source.at(first + lane, start)) };
                *row = _mm512_castps_si512(values);
            }
            for (depth, values) in transpose(&block).into_iter().enumerate().take(depths) {
                // SAFETY: depths are stored in order.
                unsafe { store_lanes(to, width, first, start + depth, values) };
            }
        }
    }
}

/// Packs one word per lane and pair of depths.
///
/// # Safety
/// The processor must have AVX-512-BF16, and `to` must have `width * source.depths.div_ceil(2)` words.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pack_bf16(to: &mut [u32], width: usize, source: Lanes<'_>) {
    let words = source.depths.div_ceil(2);
    for first in (0..width).step_by(VECTOR) {
        let lanes = lanes_of(&source, first);
        if source.adjacent() {
            for word in 0..words {
                let round = |depth: usize| {
                    let lanes = if depth < source.depths { mask(lanes) } else { 0 };
                    // SAFETY: the mask allows only lanes of the source, and none after its last depth.
                    let values = unsafe { _mm512_maskz_loadu_ps(lanes, source.at(first, depth)) };
                    let rounded = _mm512_cvtneps_pbh(values);
                    // SAFETY: both types are 256 bits of plain data.
                    _mm512_cvtepu16_epi32(unsafe { std::mem::transmute::<__m256bh, __m256i>(rounded) })
                };
                let pair = _mm512_or_si512(round(2 * word), _mm512_slli_epi32::<16>(round(2 * word + 1)));
                // SAFETY: words are stored in order.
                unsafe { store_lanes(to, width, first, word, pair) };
            }
            continue;
        }
        for start in (0..words).step_by(VECTOR) {
            let depths = source.depths - 2 * start;
            let mut block = [_mm512_setzero_si512(); VECTOR];
            for (lane, row) in block.iter_mut().enumerate().take(lanes) {
                // SAFETY: the masks allow only depths of the source, and both vector types are 512 bits of plain data.
                *row = unsafe {
                    let at = source.at(first + lane, 2 * start);
                    let low = _mm512_maskz_loadu_ps(mask(depths), at);
                    let high =
                        _mm512_maskz_loadu_ps(mask(depths.saturating_sub(VECTOR)), at.wrapping_add(VECTOR));
                    std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
                };
            }
            for (word, values) in transpose(&block).into_iter().enumerate().take(words - start) {
                // SAFETY: words are stored in order.
                unsafe { store_lanes(to, width, first, start + word, values) };
            }
        }
    }
}

/// Stores the lanes from `first` on of the panel's word `word`. Zeros may also be stored beyond the panel's width, in
/// the place of the next word.
///
/// # Safety
/// The processor must have AVX-512, the panel must have that word, and later words must be stored later.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_lanes(to: &mut [u32], width: usize, first: usize, word: usize, values: __m512i) {
    let at = word * width + first;
    // SAFETY: either a whole vector fits in the panel, or the mask allows only lanes within its width.
    unsafe {
        let address = to.as_mut_ptr().add(at).cast();
        if at + VECTOR <= to.len() {
            _mm512_storeu_si512(address, values);
        } else {
            _mm512_mask_storeu_epi32(address.cast(), mask(width - first), values);
        }
    }
}

/// Transposes a matrix of 16 × 16 words.
#[target_feature(enable = "avx512f")]
fn transpose(rows: &[__m512i; VECTOR]) -> [__m512i; VECTOR] {
    let mut pairs = [_mm512_setzero_si512(); VECTOR];
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // The 128-bit quarter q of `quads[4g + c]` holds column 4q + c of the rows 4g..4g + 4.
    let (low, high) =
        (_mm512_setr_epi64(0, 8, 2, 10, 4, 12, 6, 14), _mm512_setr_epi64(1, 9, 3, 11, 5, 13, 7, 15));
    let mut quads = [_mm512_setzero_si512(); VECTOR];
    for g in 0..4 {
        for half in 0..2 {
            let (a, b) = (pairs[4 * g + half], pairs[4 * g + 2 + half]);
            quads[4 * g + 2 * half] = _mm512_permutex2var_epi64(a, low, b);
            quads[4 * g + 2 * half + 1] = _mm512_permutex2var_epi64(a, high, b);
        }
    }
    let mut columns = [_mm512_setzero_si512(); VECTOR];
    for c in 0..4 {
        let [a, b, d, e] = [quads[c], quads[4 + c], quads[8 + c], quads[12 + c]];
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (de_even, de_odd) = (_mm512_shuffle_i32x4::<0x88>(d, e), _mm512_shuffle_i32x4::<0xdd>(d, e));
        columns[c] = _mm512_shuffle_i32x4::<0x88>(ab_even, de_even);
        columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(ab_odd, de_odd);
        columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(ab_even, de_even);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, de_odd);
    }
    columns
}

/// Number of independent chains of instructions that saturate the arithmetic units.
pub(super) const CHAINS: usize = 12;

/// Multiplies and adds in registers, `iterations` times in each of [`CHAINS`] vectors.
pub(super) fn saturate_f32(_: F32, iterations: usize) -> f32 {
    // SAFETY: the kernel's value proves that `detect` has found the instructions.
    unsafe { add_products(iterations) }
}

/// Adds products of pairs in registers, `iterations` times in each of [`CHAINS`] vectors.
pub(super) fn saturate_bf16(_: Bf16, iterations: usize) -> f32 {
    // SAFETY: the kernel's value proves that `detect` has found the instructions.
    unsafe { add_pairs(iterations) }
}

#[target_feature(enable = "avx512f")]
fn add_products(iterations: usize) -> f32 {
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    let factor = std::hint::black_box(_mm512_set1_ps(0.999));
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, factor);
        }
    }
    total(&sums)
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn add_pairs(iterations: usize) -> f32 {
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    let ones = std::hint::black_box(_mm512_set1_epi32(0x3f80_3f80));
    // SAFETY: both types are 512 bits of plain data.
    let ones = unsafe { std::mem::transmute::<__m512i, __m512bh>(ones) };
    for _ in 0..iterations {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, ones, ones);
        }
    }
    total(&sums)
}

#[target_feature(enable = "avx512f")]
fn total(sums: &[__m512; CHAINS]) -> f32 {
    let mut total = _mm512_setzero_ps();
    for sum in sums {
        total = _mm512_add_ps(total, *sum);
    }
    _mm512_reduce_add_ps(total)
}
