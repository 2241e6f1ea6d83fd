//! Tiles of the matrix product on AVX-512: float32, and bfloat16 operands with float32 sums.

use super::matrix::Output;
use super::simd::{Level, level};
use super::tile::{Lanes, Target, Tile, panel_words};
use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __m512i, __mmask16, _MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch,
    _mm512_add_ps, _mm512_castps_si512, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh,
    _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_storeu_epi32,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_or_si512, _mm512_permutex2var_epi64,
    _mm512_reduce_add_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi64, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpacklo_epi32,
};

/// Rows of a tile: its 14 × 2 sums, the two vectors of a depth and a broadcast fill the 32 registers but one.
const ROWS: usize = 14;
/// Columns of a tile: two vectors.
const COLUMNS: usize = 2 * VECTOR;
/// Floats in a vector.
const VECTOR: usize = 16;

/// Operands and sums in float32.
#[derive(Clone, Copy)]
pub(super) struct F32(());

/// Operands rounded to bfloat16, two to a word, sums in float32.
#[derive(Clone, Copy)]
pub(super) struct Bf16(());

impl F32 {
    pub(super) fn detect() -> Option<Self> {
        (level() == Level::Avx512).then_some(Self(()))
    }
}

impl Bf16 {
    pub(super) fn detect() -> Option<Self> {
        (level() == Level::Avx512 && is_x86_feature_detected!("avx512bf16")).then_some(Self(()))
    }
}

impl Tile for F32 {
    const ROWS: usize = ROWS;
    const COLUMNS: usize = COLUMNS;
    const DEPTH: usize = 1;

    fn pack(self, to: &mut [u32], width: usize, lanes: Lanes<'_>) {
        assert_eq!(to.len(), panel_words::<Self>(width, lanes.depths), "words of a panel");
        // SAFETY: `detect` found the instructions, the panel's size is checked.
        unsafe { pack_f32(to, width, lanes) }
    }

    unsafe fn multiply(self, left: &[u32], right: &[u32], target: &Target) {
        let depths = (left.len() / ROWS).min(right.len() / COLUMNS);
        // SAFETY: `detect` found the instructions, both panels have that many depths, the rest is promised.
        unsafe { multiply_f32(depths, left.as_ptr(), right.as_ptr(), target) }
    }
}

impl Tile for Bf16 {
    const ROWS: usize = ROWS;
    const COLUMNS: usize = COLUMNS;
    const DEPTH: usize = 2;

    fn pack(self, to: &mut [u32], width: usize, lanes: Lanes<'_>) {
        assert_eq!(to.len(), panel_words::<Self>(width, lanes.depths), "words of a panel");
        // SAFETY: `detect` found the instructions, the panel's size is checked.
        unsafe { pack_bf16(to, width, lanes) }
    }

    unsafe fn multiply(self, left: &[u32], right: &[u32], target: &Target) {
        let words = (left.len() / ROWS).min(right.len() / COLUMNS);
        // SAFETY: `detect` found the instructions, both panels have that many words per lane, the rest is promised.
        unsafe { multiply_bf16(words, left.as_ptr(), right.as_ptr(), target) }
    }
}

/// Lanes of a group of [`VECTOR`], from the first on.
fn lanes_of(lanes: &Lanes<'_>, first: usize) -> usize {
    lanes.count.saturating_sub(first).min(VECTOR)
}

/// The first `count` of a vector.
pub(super) fn mask(count: usize) -> __mmask16 {
    ((1_u32 << count.min(VECTOR)) - 1) as __mmask16
}

/// # Safety
/// AVX-512; `to` has `width * source.depths` words.
#[target_feature(enable = "avx512f")]
unsafe fn pack_f32(to: &mut [u32], width: usize, source: Lanes<'_>) {
    for first in (0..width).step_by(VECTOR) {
        let lanes = lanes_of(&source, first);
        if source.adjacent() {
            for depth in 0..source.depths {
                // SAFETY: the mask ends with the source's lanes; depths come in order.
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
                // SAFETY: the mask ends with the source's depths.
                let values = unsafe { _mm512_maskz_loadu_ps(mask(depths), source.at(first + lane, start)) };
                *row = _mm512_castps_si512(values);
            }
            for (depth, values) in transpose(&block).into_iter().enumerate().take(depths) {
                // SAFETY: depths come in order.
                unsafe { store_lanes(to, width, first, start + depth, values) };
            }
        }
    }
}

/// # Safety
/// As for [`pack_f32`], with AVX-512-BF16 and half as many words, rounded up.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pack_bf16(to: &mut [u32], width: usize, source: Lanes<'_>) {
    let words = source.depths.div_ceil(2);
    for first in (0..width).step_by(VECTOR) {
        let lanes = lanes_of(&source, first);
        if source.adjacent() {
            for word in 0..words {
                let round = |depth: usize| {
                    let lanes = if depth < source.depths { mask(lanes) } else { 0 };
                    // SAFETY: the mask ends with the source's lanes, and is empty behind its last depth.
                    let values = unsafe { _mm512_maskz_loadu_ps(lanes, source.at(first, depth)) };
                    let rounded = _mm512_cvtneps_pbh(values);
                    // SAFETY: both are 256 bits of plain data.
                    _mm512_cvtepu16_epi32(unsafe { std::mem::transmute::<__m256bh, __m256i>(rounded) })
                };
                let pair = _mm512_or_si512(round(2 * word), _mm512_slli_epi32::<16>(round(2 * word + 1)));
                // SAFETY: words come in order.
                unsafe { store_lanes(to, width, first, word, pair) };
            }
            continue;
        }
        for start in (0..words).step_by(VECTOR) {
            let depths = source.depths - 2 * start;
            let mut block = [_mm512_setzero_si512(); VECTOR];
            for (lane, row) in block.iter_mut().enumerate().take(lanes) {
                // SAFETY: the masks end with the source's depths.
                *row = unsafe {
                    let at = source.at(first + lane, 2 * start);
                    let low = _mm512_maskz_loadu_ps(mask(depths), at);
                    let high =
                        _mm512_maskz_loadu_ps(mask(depths.saturating_sub(VECTOR)), at.wrapping_add(VECTOR));
                    std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
                };
            }
            for (word, values) in transpose(&block).into_iter().enumerate().take(words - start) {
                // SAFETY: words come in order.
                unsafe { store_lanes(to, width, first, start + word, values) };
            }
        }
    }
}

/// Stores the lanes from `first` on of word `word` of a panel, and possibly zeros behind the panel's width, where the
/// next word of these lanes belongs.
///
/// # Safety
/// AVX-512; the panel has that word, and its later words are stored after it.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_lanes(to: &mut [u32], width: usize, first: usize, word: usize, values: __m512i) {
    let at = word * width + first;
    // SAFETY: a whole vector lies in the panel, or the mask ends with its width.
    unsafe {
        let address = to.as_mut_ptr().add(at).cast();
        if at + VECTOR <= to.len() {
            _mm512_storeu_si512(address, values);
        } else {
            _mm512_mask_storeu_epi32(address.cast(), mask(width - first), values);
        }
    }
}

/// Rows become columns.
#[target_feature(enable = "avx512f")]
fn transpose(rows: &[__m512i; VECTOR]) -> [__m512i; VECTOR] {
    let mut pairs = [_mm512_setzero_si512(); VECTOR];
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Every 128-bit quarter q of `quads[4g + c]` holds column 4q + c of rows 4g..4g + 4.
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

/// Vectors in which the limit of arithmetic is measured.
pub(super) const CHAINS: usize = 12;

/// Multiplies and adds in registers, so often in each of [`CHAINS`] vectors.
pub(super) fn saturate_f32(_: F32, iterations: usize) -> f32 {
    // SAFETY: `detect` found the instructions.
    unsafe { multiply_add(iterations) }
}

/// Adds up products of pairs in registers, so often in each of [`CHAINS`] vectors.
pub(super) fn saturate_bf16(_: Bf16, iterations: usize) -> f32 {
    // SAFETY: `detect` found the instructions.
    unsafe { dot_pairs(iterations) }
}

#[target_feature(enable = "avx512f")]
fn multiply_add(iterations: usize) -> f32 {
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
fn dot_pairs(iterations: usize) -> f32 {
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    let ones = std::hint::black_box(_mm512_set1_epi32(0x3f80_3f80));
    // SAFETY: both are 512 bits of plain data.
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

type Sums = [[__m512; 2]; ROWS];

/// # Safety
/// AVX-512; panels of that many depths; see [`Tile::multiply`].
#[target_feature(enable = "avx512f")]
unsafe fn multiply_f32(depths: usize, left: *const u32, right: *const u32, target: &Target) {
    prefetch(target);
    let mut sums: Sums = [[_mm512_setzero_ps(); 2]; ROWS];
    let (mut left, mut right) = (left.cast::<f32>(), right.cast::<f32>());
    for _ in 0..depths {
        // SAFETY: the panels hold `ROWS` and `COLUMNS` words per depth.
        unsafe {
            prefetch_right(right.cast());
            let (first, second) = (_mm512_loadu_ps(right), _mm512_loadu_ps(right.add(VECTOR)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*left.add(row));
                sums[0] = _mm512_fmadd_ps(value, first, sums[0]);
                sums[1] = _mm512_fmadd_ps(value, second, sums[1]);
            }
            left = left.add(ROWS);
            right = right.add(COLUMNS);
        }
    }
    // SAFETY: promised by the caller.
    unsafe { store(&sums, target) };
}

/// # Safety
/// AVX-512-BF16; panels of that many words per lane; see [`Tile::multiply`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_bf16(words: usize, left: *const u32, right: *const u32, target: &Target) {
    prefetch(target);
    let mut sums: Sums = [[_mm512_setzero_ps(); 2]; ROWS];
    let (mut left, mut right) = (left, right);
    for _ in 0..words {
        // SAFETY: the panels hold `ROWS` and `COLUMNS` words per pair of depths; all vectors are 512 bits of plain
        // data.
        unsafe {
            prefetch_right(right);
            let first = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(right.cast()));
            let second =
                std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(right.add(VECTOR).cast()));
            for (row, sums) in sums.iter_mut().enumerate() {
                let value =
                    std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*left.add(row) as i32));
                sums[0] = _mm512_dpbf16_ps(sums[0], value, first);
                sums[1] = _mm512_dpbf16_ps(sums[1], value, second);
            }
            left = left.add(ROWS);
            right = right.add(COLUMNS);
        }
    }
    // SAFETY: promised by the caller.
    unsafe { store(&sums, target) };
}

/// Asks for what a right panel holds some depths ahead.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_right(right: *const u32) {
    for half in 0..2 {
        let at = right.wrapping_add(16 * COLUMNS + half * VECTOR);
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
}

/// Asks for the target's cache lines while the sums are made.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(target: &Target) {
    for row in 0..target.rows {
        for half in 0..2 {
            let at = target.data.wrapping_add(row * target.stride + half * VECTOR);
            _mm_prefetch::<_MM_HINT_ET0>(at.cast());
        }
    }
}

/// # Safety
/// AVX-512; see [`Tile::multiply`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(sums: &Sums, target: &Target) {
    let columns = [mask(target.columns), mask(target.columns.saturating_sub(VECTOR))];
    let scale = _mm512_set1_ps(target.scale);
    for (row, sums) in sums.iter().enumerate().take(target.rows) {
        for (half, (sum, columns)) in sums.iter().zip(columns).enumerate() {
            let at = target.data.wrapping_add(row * target.stride + half * VECTOR);
            // SAFETY: the row is one of the target's, the mask ends with its columns.
            unsafe {
                let sum = match target.output {
                    Output::Overwrite => _mm512_mul_ps(*sum, scale),
                    Output::Accumulate => _mm512_fmadd_ps(*sum, scale, _mm512_maskz_loadu_ps(columns, at)),
                };
                _mm512_mask_storeu_ps(at, columns, sum);
            }
        }
    }
}
