//! Ranges of a file that are read one after the other, some of them ahead of their use.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use ulmus_storage::FileInfo;

use super::folder::Folder;
use super::read::Reading;
use crate::error::DataError;

/// Bytes that are asked for at once.
const STEP: u64 = 1 << 20;
/// Steps that are under way while one is used.
const AHEAD: usize = 2;

/// Reads ranges of a file in steps of at most [`STEP`] bytes. At most `AHEAD + 1` of them are in memory.
pub(crate) struct Steps {
    folder: Folder,
    file: FileInfo,
    wanted: Box<dyn Iterator<Item = Range<u64>> + Send>,
    ahead: VecDeque<(u64, Reading)>,
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Steps({})", self.folder.place(&self.file.path))
    }
}

impl Steps {
    /// Reads `ranges` of a file, in their order.
    pub(crate) fn new(
        folder: &Folder,
        file: &FileInfo,
        ranges: impl IntoIterator<Item = Range<u64>, IntoIter: Send + 'static>,
    ) -> Self {
        let wanted = ranges.into_iter().flat_map(|range| {
            let starts = (range.start..range.end).step_by(STEP as usize);
            starts.map(move |start| start..(start + STEP).min(range.end))
        });
        Self { folder: folder.clone(), file: file.clone(), wanted: Box::new(wanted), ahead: VecDeque::new() }
    }

    /// The next bytes and where in the file they begin; none at the end.
    pub(crate) fn next(&mut self) -> Result<Option<(u64, Bytes)>, DataError> {
        while self.ahead.len() <= AHEAD
            && let Some(range) = self.wanted.next()
        {
            self.ahead.push_back((range.start, self.folder.start_reading(&self.file, range)));
        }
        match self.ahead.pop_front() {
            Some((start, reading)) => Ok(Some((start, reading.wait()?))),
            None => Ok(None),
        }
    }
}
