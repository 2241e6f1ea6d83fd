//! Positions in the streams of a run, as plain integers that can be stored and summed.

/// Words per stream in [`Cursors`].
pub(crate) const WORDS_PER_STREAM: usize = 4;

/// The positions of all streams of all lanes, in four words each: sequences given, epoch, start of the window, and
/// offset in the window. A window starts at a unit (the low 32 bits) and one of its segments (the high ones).
///
/// In the cursors of a worker, the words of streams that it does not host are zero, so that the cursors of a group are
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
        Self(vec![0; WORDS_PER_STREAM * streams])
    }

    /// Cursors from the result of [`Self::words`], or from its sum over a group.
    pub const fn from_words(words: Vec<i64>) -> Self {
        Self(words)
    }

    /// The plain words, for checkpoints and for sums over a group.
    pub fn words(&self) -> &[i64] {
        &self.0
    }

    pub(crate) fn get(&self, stream: usize) -> Cursor {
        let word = |index: usize| self.0[WORDS_PER_STREAM * stream + index].max(0).cast_unsigned();
        let start = WindowStart { epoch: word(1), unit: word(2) as u32, segment: (word(2) >> 32) as u32 };
        Cursor { emitted: word(0), start, offset: word(3) }
    }

    pub(crate) fn set(&mut self, stream: usize, cursor: Cursor) {
        let WindowStart { epoch, unit, segment } = cursor.start;
        let words = [cursor.emitted, epoch, u64::from(unit) | u64::from(segment) << 32, cursor.offset];
        self.0[WORDS_PER_STREAM * stream..WORDS_PER_STREAM * (stream + 1)]
            .copy_from_slice(&words.map(u64::cast_signed));
    }
}
