//! Memory in cache lines: no vector of packed data straddles two.

/// A cache line.
#[derive(Debug, Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u32; 16]);

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
