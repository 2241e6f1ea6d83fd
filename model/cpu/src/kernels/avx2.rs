//! Kernels for AVX2, which nearly every x86-64 processor has: float32, f16, bfloat16 and `q8_0`, with sums in float32.
//!
//! In all formats they give the same bits as [`portable`](super::portable).

#![expect(
    clippy::needless_range_loop,
    reason = "iterator adapters are not always inlined in vectorised code"
)]

use std::arch::x86_64::{
    __m256, __m256i, _CMP_UNORD_Q, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_abs_epi8,
    _mm256_add_epi32, _mm256_and_si256, _mm256_blendv_epi8, _mm256_castpd_ps, _mm256_castps_pd,
    _mm256_castps_si256, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cvtepi32_ps, _mm256_cvtph_ps,
    _mm256_fmadd_ps, _mm256_load_ps, _mm256_load_si256, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_maskload_ps, _mm256_maskstore_epi32, _mm256_maskstore_ps,
    _mm256_mul_ps, _mm256_or_si256, _mm256_permute2f128_ps, _mm256_permute4x64_epi64, _mm256_set1_epi8,
    _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_shuffle_ps, _mm256_sign_epi8, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps,
    _mm256_storeu_si256, _mm256_unpackhi_pd, _mm256_unpackhi_ps, _mm256_unpacklo_pd, _mm256_unpacklo_ps,
    _mm256_xor_si256,
};

use ulmus_backend::WeightFormat;

use super::aligned::Line;
use super::panel::{Kernel, LANES, Lanes, Q8_BLOCK, Target};
use super::q8;
use super::simd::{Level, level};

/// Number of floats in a vector.
const VECTOR: usize = 8;
/// Number of vectors for the lanes of a right panel.
const VECTORS: usize = LANES / VECTOR;

/// Float32 times float32.
#[derive(Clone, Copy)]
pub(super) struct F32(());
/// Float32 times f16, which is widened on the fly.
#[derive(Clone, Copy)]
pub(super) struct F16(());
/// Bfloat16 times bfloat16, which are widened on the fly.
#[derive(Clone, Copy)]
pub(super) struct Bf16(());
/// Numbers that are rounded to bfloat16 but kept as float32. For operands that are packed for a single product, this is
/// faster than widening them at every use. The bits are the same as for [`Bf16`].
#[derive(Clone, Copy)]
pub(super) struct Rounded<K>(K);
/// Integers times integers, one block at a time.
#[derive(Clone, Copy)]
pub(super) struct Q8_0(());

impl F32 {
    pub(super) fn detect() -> Option<Self> {
        (level() >= Level::Avx2).then_some(Self(()))
    }
}

impl F16 {
    pub(super) fn detect() -> Option<Self> {
        (level() >= Level::Avx2 && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }
}

impl Bf16 {
    /// `None` on processors with AVX-512, too, where the portable loops have wider vectors.
    pub(super) fn detect() -> Option<Self> {
        (level() == Level::Avx2).then_some(Self(()))
    }
}

impl<K: Kernel> Rounded<K> {
    /// Uses `kernel`, which must be one for float32.
    pub(super) fn detect(kernel: K) -> Option<Self> {
        (K::FORMAT == WeightFormat::F32 && level() >= Level::Avx2).then_some(Self(kernel))
    }

    /// Packs lanes as a right panel of rounded numbers.
    #[expect(clippy::unused_self, reason = "that it exists shows that this processor has the instructions")]
    pub(super) fn pack_right(self, to: &mut [Line], lanes: Lanes<'_>) {
        pack_bfloat16(bytemuck::cast_slice_mut(to), LANES, lanes);
    }
}

impl Q8_0 {
    pub(super) fn detect() -> Option<Self> {
        (level() >= Level::Avx2 && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }
}

/// The sums of `TOGETHER` vectors of lanes, for each row.
type Sums<const ROWS: usize, const TOGETHER: usize> = [[__m256; TOGETHER]; ROWS];

macro_rules! kernel {
    (
        $name:ident, $features:literal, words $words:expr, lines $lines:expr, pack $pack:expr, step $step:ident,
        tile $tile:ident, widths { $($width:literal x $together:literal),* }
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
                        $($width => $tile::<$width, $together>(steps, left, right, target),)*
                        _ => unreachable!("{width} is not among the widths of panels"),
                    }
                }
            }
        }

        /// Computes a tile, reading the right panel once for every `TOGETHER` vectors of its lanes.
        ///
        /// # Safety
        /// The contract of [`Kernel::multiply`], with `ROWS` as the width.
        #[target_feature(enable = $features)]
        unsafe fn $tile<const ROWS: usize, const TOGETHER: usize>(
            steps: usize,
            left: *const u32,
            right: *const Line,
            target: &Target,
        ) {
            // A part is so small that it stays in the first-level cache from one pass to the next.
            let part = if TOGETHER == VECTORS { steps } else { PART_LINES / $lines };
            for start in (0..steps).step_by(part.max(1)) {
                let steps = part.min(steps - start);
                // SAFETY: the caller guarantees that both panels have more than `start` steps.
                let (left, right) = unsafe { (left.add(start * ROWS * $words), right.add(start * $lines)) };
                for first in (0..VECTORS).step_by(TOGETHER) {
                    if target.columns <= first * VECTOR {
                        break;
                    }
                    // The loops are not in functions of their own, because the sums have to stay in registers.
                    let mut sums: Sums<ROWS, TOGETHER> = [[_mm256_setzero_ps(); TOGETHER]; ROWS];
                    if target.resume || start > 0 {
                        for row in 0..ROWS {
                            for vector in 0..TOGETHER {
                                // SAFETY: the caller guarantees that the target is valid for reads.
                                sums[row][vector] = unsafe { load(target, row, (first + vector) * VECTOR) };
                            }
                        }
                    }
                    let (mut left, mut right) = (left, right);
                    for _ in 0..steps {
                        // SAFETY: the caller guarantees that both panels have these steps, of which a pass reads each
                        // once.
                        unsafe {
                            $step(&mut sums, left, right, first);
                            left = left.add(ROWS * $words);
                            right = right.add($lines);
                        }
                    }
                    for row in 0..ROWS {
                        for vector in 0..TOGETHER {
                            // SAFETY: the caller guarantees that the target is valid for writes.
                            unsafe { store(target, row, (first + vector) * VECTOR, sums[row][vector]) };
                        }
                    }
                }
            }
        }
    };
}

// Sums in 12 registers leave room for two vectors of a right panel and a broadcast. With few rows, all lanes of a panel
// are taken together, so that its memory is read in order.
kernel!(
    F32, "avx2,fma", words 1, lines 2, pack pack_float32, step step_f32, tile tile_f32,
    widths { 1 x 4, 2 x 4, 4 x 2, 6 x 2 }
);
kernel!(
    F16, "avx2,fma,f16c", words 1, lines 1, pack pack_float32, step step_f16, tile tile_f16,
    widths { 1 x 4, 2 x 4, 4 x 2, 6 x 2 }
);
kernel!(
    Bf16, "avx2,fma", words 2, lines 2, pack pack_bfloat16, step step_bf16, tile tile_bf16,
    widths { 1 x 4, 2 x 4, 4 x 2, 6 x 2 }
);
// Fewer rows fit here, because each sum of floats needs a sum of integers beside it.
kernel!(
    Q8_0, "avx2,fma,f16c", words q8::STEP_WORDS, lines 17, pack q8::pack_left, step step_q8, tile tile_q8,
    widths { 1 x 4, 2 x 2, 4 x 1 }
);

impl<K: Kernel> Kernel for Rounded<K> {
    const FORMAT: WeightFormat = K::FORMAT;
    const WIDTHS: &'static [usize] = K::WIDTHS;
    const STEP_WORDS: usize = K::STEP_WORDS;

    fn pack(self, to: &mut [u32], width: usize, lanes: Lanes<'_>) {
        pack_bfloat16(to, width, lanes);
    }

    unsafe fn multiply(
        self,
        width: usize,
        steps: usize,
        left: *const u32,
        right: *const Line,
        target: &Target,
    ) {
        // SAFETY: this is the same contract, and rounded panels have the layout of float32.
        unsafe { self.0.multiply(width, steps, left, right, target) };
    }
}

/// The mask of the first `count` elements of a vector.
#[inline]
#[target_feature(enable = "avx2")]
fn mask(count: usize) -> __m256i {
    const BITS: [i32; 2 * VECTOR] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: the vector begins in the first half of the table or at its middle, so it ends within the table.
    unsafe { _mm256_loadu_si256(BITS.as_ptr().add(VECTOR - count.min(VECTOR)).cast()) }
}

/// Loads a vector of a target's sums from `column` on, with zeros for columns and rows beyond the target.
///
/// # Safety
/// The processor must have AVX2, and the target must be valid for reads.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(target: &Target, row: usize, column: usize) -> __m256 {
    let columns = target.columns.saturating_sub(column);
    if row >= target.rows || columns == 0 {
        _mm256_setzero_ps()
    } else if columns >= VECTOR {
        // SAFETY: the target has all columns of the vector.
        unsafe { _mm256_loadu_ps(target.at(row, column)) }
    } else {
        // SAFETY: the mask allows only columns of the target.
        unsafe { _mm256_maskload_ps(target.at(row, column), mask(columns)) }
    }
}

/// Stores the part of a vector that belongs to a target.
///
/// # Safety
/// The processor must have AVX2, and the target must be valid for writes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store(target: &Target, row: usize, column: usize, values: __m256) {
    let columns = target.columns.saturating_sub(column);
    if row >= target.rows || columns == 0 {
    } else if columns >= VECTOR {
        // SAFETY: the target has all columns of the vector.
        unsafe { _mm256_storeu_ps(target.at(row, column), values) }
    } else {
        // SAFETY: the mask allows only columns of the target.
        unsafe { _mm256_maskstore_ps(target.at(row, column), mask(columns), values) }
    }
}

/// Number of lines in the part of a right panel that several passes read one after the other.
const PART_LINES: usize = 256;

/// With at most this many rows, a product is limited by the memory that right panels come from.
const FEW: usize = 4;
/// How many lines ahead of the current one are prefetched in that case, by format.
const F32_AHEAD: usize = 24;
const F16_AHEAD: usize = 24;
const BF16_AHEAD: usize = 24;
const Q8_AHEAD: usize = 34;

/// Prefetches the line that is `ahead` lines after `line`.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch(line: *const Line, ahead: usize) {
    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(ahead).cast());
}

/// Adds the products of one word of each row and `TOGETHER` vectors of a right panel.
///
/// # Safety
/// The processor must have AVX2 and FMA, and `left` must point to one word per row.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_add<const ROWS: usize, const TOGETHER: usize>(
    sums: &mut Sums<ROWS, TOGETHER>,
    left: *const u32,
    vectors: [__m256; TOGETHER],
) {
    for row in 0..ROWS {
        // SAFETY: the caller guarantees that there is a word for each row.
        let value = _mm256_set1_ps(unsafe { *left.add(row).cast() });
        for vector in 0..TOGETHER {
            sums[row][vector] = _mm256_fmadd_ps(value, vectors[vector], sums[row][vector]);
        }
    }
}

/// Adds the products of one step.
///
/// # Safety
/// The processor must have AVX2 and FMA, both panels must have another step, and `first + TOGETHER` must be at most
/// [`VECTORS`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn step_f32<const ROWS: usize, const TOGETHER: usize>(
    sums: &mut Sums<ROWS, TOGETHER>,
    left: *const u32,
    right: *const Line,
    first: usize,
) {
    if first == 0 && ROWS <= FEW {
        prefetch(right, F32_AHEAD);
        prefetch(right, F32_AHEAD + 1);
    }
    let mut vectors = [_mm256_setzero_ps(); TOGETHER];
    // SAFETY: a step has two lines, which are four vectors, in the right panel, and one word per row in the left panel.
    unsafe {
        for vector in 0..TOGETHER {
            vectors[vector] = _mm256_load_ps(right.cast::<f32>().add((first + vector) * VECTOR));
        }
        multiply_add(sums, left, vectors);
    }
}

/// Adds the products of one step.
///
/// # Safety
/// The processor must have AVX2, FMA and F16C, both panels must have another step, and `first + TOGETHER` must be at
/// most [`VECTORS`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step_f16<const ROWS: usize, const TOGETHER: usize>(
    sums: &mut Sums<ROWS, TOGETHER>,
    left: *const u32,
    right: *const Line,
    first: usize,
) {
    if first == 0 && ROWS <= FEW {
        prefetch(right, F16_AHEAD);
    }
    let mut vectors = [_mm256_setzero_ps(); TOGETHER];
    // SAFETY: a step has one line, which is four half vectors, in the right panel, and one word per row in the left
    // panel.
    unsafe {
        for vector in 0..TOGETHER {
            let at = right.cast::<u16>().add((first + vector) * VECTOR);
            vectors[vector] = _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
        }
        multiply_add(sums, left, vectors);
    }
}

/// Adds the products of one step.
///
/// # Safety
/// The processor must have AVX2 and FMA, both panels must have another step, and `first + TOGETHER` must be at most
/// [`VECTORS`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn step_bf16<const ROWS: usize, const TOGETHER: usize>(
    sums: &mut Sums<ROWS, TOGETHER>,
    left: *const u32,
    right: *const Line,
    first: usize,
) {
    if first == 0 && ROWS <= FEW {
        prefetch(right, BF16_AHEAD);
        prefetch(right, BF16_AHEAD + 1);
    }
    let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    let mut vectors = [[_mm256_setzero_ps(); TOGETHER]; 2];
    // SAFETY: a step has two lines, which are four vectors of pairs, in the right panel, and two words per row in the
    // left panel.
    unsafe {
        for vector in 0..TOGETHER {
            let pairs = _mm256_load_si256(right.cast::<u32>().add((first + vector) * VECTOR).cast());
            vectors[0][vector] = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
            vectors[1][vector] = _mm256_castsi256_ps(_mm256_and_si256(pairs, high));
        }
        multiply_add(sums, left, vectors[0]);
        multiply_add(sums, left.add(ROWS), vectors[1]);
    }
}

/// Adds the products of one step. AVX2 can only multiply unsigned by signed bytes, and sums of two products must fit in
/// 16 bits. So the instruction gets the magnitudes of weights, up to 127, and activations with the signs of the
/// weights.
///
/// # Safety
/// The processor must have AVX2, FMA and F16C, both panels must have another step, and `first + TOGETHER` must be at
/// most [`VECTORS`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step_q8<const ROWS: usize, const TOGETHER: usize>(
    sums: &mut Sums<ROWS, TOGETHER>,
    left: *const u32,
    right: *const Line,
    first: usize,
) {
    const INTEGER_WORDS: usize = Q8_BLOCK / 4;
    let (shift, ones) = (_mm256_set1_epi8(-128), _mm256_set1_epi16(1));
    let mut integers = [[_mm256_setzero_si256(); TOGETHER]; ROWS];
    // SAFETY: a step has 17 lines in the right panel and `q8::STEP_WORDS` words per row in the left panel.
    unsafe {
        for word in 0..INTEGER_WORDS {
            if first == 0 && ROWS <= FEW {
                prefetch(right, 2 * word + Q8_AHEAD);
                prefetch(right, 2 * word + Q8_AHEAD + 1);
            }
            for vector in 0..TOGETHER {
                let at = right.add(1 + 2 * word).cast::<u32>().add((first + vector) * VECTOR);
                let weights = _mm256_xor_si256(_mm256_load_si256(at.cast()), shift);
                let magnitudes = _mm256_abs_epi8(weights);
                for row in 0..ROWS {
                    let values = _mm256_set1_epi32(*left.add(word * ROWS + row).cast());
                    let signed = _mm256_sign_epi8(values, weights);
                    let pairs = _mm256_maddubs_epi16(magnitudes, signed);
                    integers[row][vector] =
                        _mm256_add_epi32(integers[row][vector], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for vector in 0..TOGETHER {
            let at = right.cast::<u16>().add((first + vector) * VECTOR);
            let scales = _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
            for row in 0..ROWS {
                let scale = _mm256_set1_ps(*left.add((INTEGER_WORDS + 1) * ROWS + row).cast());
                sums[row][vector] = _mm256_fmadd_ps(
                    _mm256_cvtepi32_ps(integers[row][vector]),
                    _mm256_mul_ps(scales, scale),
                    sums[row][vector],
                );
            }
        }
    }
}

fn pack_float32(to: &mut [u32], width: usize, lanes: Lanes<'_>) {
    assert_eq!(to.len(), width * lanes.depths, "words of a panel");
    // SAFETY: only kernels whose `detect` has found AVX2 call this, and the panel's size is checked above.
    unsafe { pack_words::<false>(to, width, lanes) }
}

/// Packs bfloat16 numbers as float32, with both depths of a step one after the other.
fn pack_bfloat16(to: &mut [u32], width: usize, lanes: Lanes<'_>) {
    // With an odd number of depths, the second half of the last step is zero.
    let (to, rest) = to.split_at_mut(width * lanes.depths);
    // SAFETY: only kernels whose `detect` has found AVX2 call this, and the split above gives `to` the required size.
    unsafe { pack_words::<true>(to, width, lanes) };
    rest.fill(0);
}

/// Packs lanes as a right panel of bfloat16.
pub(super) fn pack_right(_: Bf16, to: &mut [u32], lanes: Lanes<'_>) {
    assert_eq!(to.len(), LANES * lanes.depths.div_ceil(2), "words of a panel");
    // SAFETY: the kernel's value proves that `detect` has found AVX2, and the panel's size is checked above.
    unsafe { pack_pairs(to, lanes) }
}

/// Rounds to bfloat16 and back: to the nearest number, and to the even one of two.
#[inline]
#[target_feature(enable = "avx2")]
fn round(values: __m256) -> __m256i {
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    // NaN stays NaN, and becomes quiet.
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let none = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
    let kept = _mm256_blendv_epi8(rounded, quiet, none);
    _mm256_and_si256(kept, _mm256_set1_epi32(0xffff_0000_u32 as i32))
}

/// Loads up to a vector of floats, of which there are `count`, and fills it up with zeros.
///
/// # Safety
/// The processor must have AVX2, and `at` must point to `count` floats.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn read(at: *const f32, count: usize) -> __m256 {
    if count >= VECTOR {
        // SAFETY: the caller guarantees at least a vector of floats.
        unsafe { _mm256_loadu_ps(at) }
    } else {
        // SAFETY: the mask allows only the first `count` floats.
        unsafe { _mm256_maskload_ps(at, mask(count)) }
    }
}

/// Packs one word per lane and depth, rounded to bfloat16 or not.
///
/// # Safety
/// The processor must have AVX2, and `to` must have `width * source.depths` words.
#[target_feature(enable = "avx2")]
unsafe fn pack_words<const ROUND: bool>(to: &mut [u32], width: usize, source: Lanes<'_>) {
    for first in (0..width).step_by(VECTOR) {
        let lanes = source.count.saturating_sub(first);
        if source.adjacent() {
            for depth in 0..source.depths {
                // SAFETY: only lanes of the source are read, and depths are stored in order.
                unsafe {
                    let values = read(source.at(first, depth), lanes);
                    let values = if ROUND { round(values) } else { _mm256_castps_si256(values) };
                    store_lanes(to, width, first, depth, values);
                }
            }
            continue;
        }
        for start in (0..source.depths).step_by(VECTOR) {
            let depths = VECTOR.min(source.depths - start);
            if width == 1 {
                // SAFETY: only depths of the source are read, and the panel has a word for each of them.
                unsafe {
                    let values = read(source.at(0, start), depths);
                    let values = if ROUND { round(values) } else { _mm256_castps_si256(values) };
                    let at = to.as_mut_ptr().add(start).cast();
                    _mm256_maskstore_epi32(at, mask(depths), values);
                }
                continue;
            }
            let mut block = [_mm256_setzero_ps(); VECTOR];
            for lane in 0..lanes.min(VECTOR) {
                // SAFETY: only depths of the source are read.
                let values = unsafe { read(source.at(first + lane, start), depths) };
                block[lane] = if ROUND { _mm256_castsi256_ps(round(values)) } else { values };
            }
            let columns = transpose(&block);
            for depth in 0..depths {
                // SAFETY: depths are stored in order.
                unsafe { store_lanes(to, width, first, start + depth, _mm256_castps_si256(columns[depth])) };
            }
        }
    }
}

/// Packs two depths of a lane into each word.
///
/// # Safety
/// The processor must have AVX2, and `to` must have `LANES * source.depths.div_ceil(2)` words.
#[target_feature(enable = "avx2")]
unsafe fn pack_pairs(to: &mut [u32], source: Lanes<'_>) {
    let words = source.depths.div_ceil(2);
    for first in (0..LANES).step_by(VECTOR) {
        let lanes = source.count.saturating_sub(first);
        if source.adjacent() {
            for word in 0..words {
                let rounded = |depth: usize| {
                    let lanes = if depth < source.depths { lanes } else { 0 };
                    // SAFETY: only lanes of the source are read, and none after its last depth.
                    round(unsafe { read(source.at(first, depth), lanes) })
                };
                let pairs = pair(rounded(2 * word), rounded(2 * word + 1));
                // SAFETY: words are stored in order.
                unsafe { store_lanes(to, LANES, first, word, pairs) };
            }
            continue;
        }
        for start in (0..words).step_by(VECTOR) {
            let depths = source.depths - 2 * start;
            let mut block = [_mm256_setzero_ps(); VECTOR];
            for lane in 0..lanes.min(VECTOR) {
                // SAFETY: only depths of the source are read.
                let (low, high) = unsafe {
                    let at = source.at(first + lane, 2 * start);
                    (read(at, depths), read(at.wrapping_add(VECTOR), depths.saturating_sub(VECTOR)))
                };
                let (low, high) = (_mm256_castsi256_ps(round(low)), _mm256_castsi256_ps(round(high)));
                let even = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(low, high));
                let odd = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(low, high));
                // The shuffles have left each half of `low` next to one of `high`.
                let pairs = _mm256_permute4x64_epi64::<0b11_01_10_00>(pair(even, odd));
                block[lane] = _mm256_castsi256_ps(pairs);
            }
            let columns = transpose(&block);
            for word in 0..VECTOR.min(words - start) {
                // SAFETY: words are stored in order.
                unsafe { store_lanes(to, LANES, first, start + word, _mm256_castps_si256(columns[word])) };
            }
        }
    }
}

/// Combines two bfloat16 numbers in a word, the first in its lower half.
#[inline]
#[target_feature(enable = "avx2")]
fn pair(first: __m256i, second: __m256i) -> __m256i {
    _mm256_or_si256(_mm256_srli_epi32::<16>(first), second)
}

/// Stores the lanes from `first` on of the panel's word `word`. After the first lanes, zeros may also be stored beyond
/// the panel's width, in the place of the next word.
///
/// # Safety
/// The processor must have AVX2, the panel must have that word, and later words must be stored later.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_lanes(to: &mut [u32], width: usize, first: usize, word: usize, values: __m256i) {
    let at = word * width + first;
    let fits = first == 0 || first + VECTOR <= width;
    // SAFETY: either a whole vector fits in the panel, or the mask allows only lanes within the panel.
    unsafe {
        let address = to.as_mut_ptr().add(at);
        if fits && at + VECTOR <= to.len() {
            _mm256_storeu_si256(address.cast(), values);
        } else {
            _mm256_maskstore_epi32(address.cast(), mask((width - first).min(to.len() - at)), values);
        }
    }
}

/// Transposes a matrix of 8 × 8 floats.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: &[__m256; VECTOR]) -> [__m256; VECTOR] {
    let mut quads = [_mm256_setzero_ps(); VECTOR];
    for half in 0..2 {
        let [a, b, c, d] = [rows[4 * half], rows[4 * half + 1], rows[4 * half + 2], rows[4 * half + 3]];
        let pairs = [
            [_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)],
            [_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)],
        ];
        for (index, [ab, cd]) in pairs.into_iter().enumerate() {
            let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
            quads[4 * half + 2 * index] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
            quads[4 * half + 2 * index + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
        }
    }
    let mut columns = [_mm256_setzero_ps(); VECTOR];
    for column in 0..4 {
        // Each half of `quads[4h + c]` holds column c or c + 4 of the rows 4h..4h + 4.
        columns[column] = _mm256_permute2f128_ps::<0x20>(quads[column], quads[4 + column]);
        columns[4 + column] = _mm256_permute2f128_ps::<0x31>(quads[column], quads[4 + column]);
    }
    columns
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::panel::pack;
    use super::super::view::Matrix;
    use super::*;

    /// Numbers that include ties in both directions, overflows, subnormals, infinity and NaN.
    fn values(len: usize) -> Vec<f32> {
        let rare =
            [0x3f80_8000, 0x3f81_8000, 0x7f7f_ffff, 0x8000_0001, 0x7f80_0000, 0x7f80_0001, 0xffc0_1234];
        let bits = |at: usize| {
            if at.is_multiple_of(5) { rare[at / 5 % 7] } else { 0x3f00_0000 + at as u32 * 0x1357 }
        };
        (0..len).map(|at| f32::from_bits(bits(at))).collect()
    }

    #[test]
    fn panels_equal_those_of_plain_loops() {
        if F32::detect().is_none() {
            return;
        }
        for (count, depths) in [(1, 1), (1, 37), (5, 3), (6, 40), (13, 19), (32, 33), (29, 16)] {
            let values = values(count * depths);
            let by_lane = Matrix::new(&values, count, depths, depths);
            for matrix in [by_lane, Matrix::new(&values, depths, count, count).transposed()] {
                let lanes = || Lanes::new(matrix, 0..count, 0..depths);
                for width in (1..=LANES).filter(|width| *width >= count) {
                    let (mut found, mut expected) = (vec![7; width * depths], vec![9; width * depths]);
                    pack_float32(&mut found, width, lanes());
                    pack::<1, u32>(&mut expected, width, lanes(), f32::to_bits);
                    assert_eq!(found, expected, "{count} x {depths} in {width}");
                    pack_bfloat16(&mut found, width, lanes());
                    pack::<1, u32>(&mut expected, width, lanes(), |x| bf16::from_f32(x).to_f32().to_bits());
                    assert_eq!(found, expected, "{count} x {depths} in {width}, rounded");
                }
                if let Some(kernel) = Bf16::detect() {
                    let words = LANES * depths.div_ceil(2);
                    let (mut found, mut expected) = (vec![7_u32; words], vec![0_u32; words]);
                    pack_right(kernel, &mut found, lanes());
                    let pairs = bytemuck::cast_slice_mut(&mut expected);
                    pack::<2, u16>(pairs, LANES, lanes(), |x| bf16::from_f32(x).to_bits());
                    assert_eq!(found, expected, "{count} x {depths} in pairs");
                }
            }
        }
    }
}
