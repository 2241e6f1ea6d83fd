//! The format `q8_0`: blocks of 32 numbers, stored as 8-bit integers with a common scale.

use half::f16;
use ulmus_backend::WeightFormat;

use super::panel::{LANES, Lanes, Q8_BLOCK, step};
use super::simd::vectorised;

/// Added to the integers in a right panel to make them unsigned.
const SHIFT: i32 = 128;
/// Number of bytes in a step of a right panel.
const STEP: usize = step(WeightFormat::Q8_0).1 * 64;

/// Offset of an integer in a step of a right panel, by its lane and its depth in the block.
fn byte_of(lane: usize, depth: usize) -> usize {
    2 * LANES + (depth / 4 * LANES + lane) * 4 + depth % 4
}

/// Packs lanes, whose depths are adjacent, as a right panel.
pub(super) fn pack_right(to: &mut [u8], lanes: Lanes<'_>) {
    assert!(!lanes.adjacent(), "blocks run along the depths");
    let to = to.as_chunks_mut::<STEP>().0;
    for block in to.iter_mut() {
        block[..2 * LANES].fill(0);
        block[2 * LANES..].fill(SHIFT as u8);
    }
    for lane in 0..lanes.count {
        for (values, to) in lanes.run(lane).chunks(Q8_BLOCK).zip(to.iter_mut()) {
            let most = values.iter().fold(0_f32, |most, value| most.max(value.abs()));
            let scale = most / 127.0;
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            to[2 * lane..2 * lane + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            for (depth, value) in values.iter().enumerate() {
                // As in GGUF's reference, halves are rounded away from zero, and the scale is not yet rounded to f16.
                to[byte_of(lane, depth)] = ((value * inverse).round() as i32 + SHIFT) as u8;
            }
        }
    }
}

/// Unpacks the first depths of a lane from a right panel.
pub(super) fn unpack(out: &mut [f32], panel: &[u8], lane: usize) {
    for (out, block) in out.chunks_mut(Q8_BLOCK).zip(panel.as_chunks::<STEP>().0) {
        let scale = f16::from_le_bytes([block[2 * lane], block[2 * lane + 1]]).to_f32();
        for (depth, out) in out.iter_mut().enumerate() {
            *out = (i32::from(block[byte_of(lane, depth)]) - SHIFT) as f32 * scale;
        }
    }
}

/// Number of words in a left panel per row and block: eight words with the integers of four depths each, the initial
/// value of the integer sum, which compensates for the shift in right panels, and the scale.
pub(super) const STEP_WORDS: usize = Q8_BLOCK / 4 + 2;

/// Quantises lanes, whose depths are adjacent, as a left panel. A block with a number that is not finite gets the scale
/// NaN.
pub(super) fn pack_left(to: &mut [u32], width: usize, lanes: Lanes<'_>) {
    assert!(!lanes.adjacent(), "blocks run along the depths");
    to.fill(0);
    for lane in 0..lanes.count {
        quantise(to, width, lane, lanes.run(lane));
    }
}

vectorised! {
    fn quantise(to: &mut [u32], width: usize, row: usize, values: &[f32]) {
        let (blocks, rest) = values.as_chunks::<Q8_BLOCK>();
        for block in 0..blocks.len() {
            quantise_block(&mut to[block * STEP_WORDS * width..][..STEP_WORDS * width], width, row, &blocks[block]);
        }
        if !rest.is_empty() {
            let mut last = [0_f32; Q8_BLOCK];
            last[..rest.len()].copy_from_slice(rest);
            quantise_block(&mut to[blocks.len() * STEP_WORDS * width..][..STEP_WORDS * width], width, row, &last);
        }
    }
}

#[inline(always)]
fn quantise_block(to: &mut [u32], width: usize, row: usize, values: &[f32; Q8_BLOCK]) {
    /// Floats between 2^23 and 2^24 are integers, so adding this rounds and leaves the integer in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    let mut largest = [0_f32; 16];
    // This stays zero unless a number is not finite.
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
    // If the scale is so small that its inverse overflows, the numbers are practically zero.
    let inverse = if inverse < f32::INFINITY { inverse } else { 0.0 };
    let mut integers = [0_i32; Q8_BLOCK];
    let mut total = 0_i32;
    for i in 0..Q8_BLOCK {
        integers[i] = (values[i] * inverse + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32;
        total = total.wrapping_add(integers[i]);
    }
    for word in 0..Q8_BLOCK / 4 {
        let byte = |i: usize| (integers[4 * word + i] as u32 & 0xff) << (8 * i);
        to[word * width + row] = byte(0) | byte(1) | byte(2) | byte(3);
    }
    to[Q8_BLOCK / 4 * width + row] = total.wrapping_mul(-SHIFT) as u32;
    to[(Q8_BLOCK / 4 + 1) * width + row] = (scale + poison[0]).to_bits();
}
