//! Memory in whole cache lines, so that no vector of packed data straddles two of them.

use std::sync::{Mutex, PoisonError};

/// A cache line.
#[derive(Debug, Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u32; 16]);

/// Unused memory for packed operands. It does not belong to any thread, so that each product finds the memory of the
/// previous one, whichever thread runs it.
static FREE: Mutex<Vec<[Vec<Line>; 2]>> = Mutex::new(Vec::new());

/// Lends memory for the two operands of a product.
pub(super) fn with_operands<R>(work: impl FnOnce(&mut [Vec<Line>; 2]) -> R) -> R {
    let free = || FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut operands = free().pop().unwrap_or_default();
    let result = work(&mut operands);
    free().push(operands);
    result
}

/// The first `words` words of a scratch buffer, which grows as needed.
pub(super) fn room(scratch: &mut Vec<Line>, words: usize) -> &mut [u32] {
    let lines = words.div_ceil(16);
    if scratch.len() < lines {
        scratch.resize(lines, bytemuck::Zeroable::zeroed());
    }
    &mut bytemuck::cast_slice_mut::<Line, u32>(scratch)[..words]
}

/// The first `lines` lines of a scratch buffer, which grows as needed.
pub(super) fn room_lines(scratch: &mut Vec<Line>, lines: usize) -> &mut [Line] {
    bytemuck::cast_slice_mut(room(scratch, lines * 16))
}
