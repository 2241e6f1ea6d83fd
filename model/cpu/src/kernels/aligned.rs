//! Memory in cache lines: no vector of packed data straddles two.

use std::sync::{Mutex, PoisonError};

/// A cache line.
#[derive(Debug, Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u32; 16]);

/// Packed operands that nobody uses. They do not belong to threads: whichever runs a product, it finds the memory of the
/// product before.
static FREE: Mutex<Vec<[Vec<Line>; 2]>> = Mutex::new(Vec::new());

/// Lends memory for the two operands of a product.
pub(super) fn with_operands<R>(work: impl FnOnce(&mut [Vec<Line>; 2]) -> R) -> R {
    let free = || FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut operands = free().pop().unwrap_or_default();
    let result = work(&mut operands);
    free().push(operands);
    result
}

/// The first `words` of a scratch that grows to what it was asked for.
pub(super) fn room(scratch: &mut Vec<Line>, words: usize) -> &mut [u32] {
    let lines = words.div_ceil(16);
    if scratch.len() < lines {
        scratch.resize(lines, bytemuck::Zeroable::zeroed());
    }
    &mut bytemuck::cast_slice_mut::<Line, u32>(scratch)[..words]
}

/// The same, in lines.
pub(super) fn room_lines(scratch: &mut Vec<Line>, lines: usize) -> &mut [Line] {
    bytemuck::cast_slice_mut(room(scratch, lines * 16))
}
