//! Positions in the streams of a run, as plain integers that can be stored and summed.

/// Numbers per stream in [`Cursors`].
pub(crate) const NUMBERS_PER_STREAM: usize = 4;

/// The positions of all streams of all lanes, in four numbers each: sequences given, epoch, start of the window, and
/// offset in the window. A window starts at a unit (the low 32 bits) and one of its segments (the high ones).
///
/// In the cursors of a worker, the numbers of streams that it does not host are zero, so that the cursors of a group are
/// the sum of its workers' cursors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursors(Vec<i64>);

/// The position of one stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// Sequences given since the beginning of the run.
    pub(crate) emitted: u64,
    /// Start of the current window.
    pub(crate) start: WindowStart,
    /// Sequences of the current window that have been given.
    pub(crate) offset: u64,
}

/// Where a window starts: the epoch, the number of the stream's units in that epoch before it, and the number of
/// segments before it in its first unit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct WindowStart {
    pub(crate) epoch: u64,
    pub(crate) unit: u32,
    pub(crate) segment: u32,
}

impl Cursors {
    /// Cursors of `streams` streams at their beginning.
    pub(crate) fn start(streams: usize) -> Self {
        Self(vec![0; NUMBERS_PER_STREAM * streams])
    }

    /// Cursors from the result of [`Self::numbers`], or from its sum over a group.
    pub const fn from_numbers(numbers: Vec<i64>) -> Self {
        Self(numbers)
    }

    /// The plain numbers, for checkpoints and for sums over a group.
    pub fn numbers(&self) -> &[i64] {
        &self.0
    }

    pub(crate) fn get(&self, stream: usize) -> Cursor {
        let number = |index: usize| self.0[NUMBERS_PER_STREAM * stream + index].max(0).cast_unsigned();
        let start =
            WindowStart { epoch: number(1), unit: number(2) as u32, segment: (number(2) >> 32) as u32 };
        Cursor { emitted: number(0), start, offset: number(3) }
    }

    pub(crate) fn set(&mut self, stream: usize, cursor: Cursor) {
        let WindowStart { epoch, unit, segment } = cursor.start;
        let numbers = [cursor.emitted, epoch, u64::from(unit) | u64::from(segment) << 32, cursor.offset];
        self.0[NUMBERS_PER_STREAM * stream..NUMBERS_PER_STREAM * (stream + 1)]
            .copy_from_slice(&numbers.map(u64::cast_signed));
    }
}
