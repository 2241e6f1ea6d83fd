//! A stored file as a stream of bytes. Errors of the store pass through it as the sources of `io` errors.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes};
use ulmus_storage::FileInfo;

use crate::store::{Folder, Steps};

/// The bytes of a file as they are stored, read ahead step by step.
pub(crate) struct Stored {
    steps: Steps,
    fetched: Bytes,
    taken: Arc<AtomicU64>,
}

impl Stored {
    /// The bytes of a file from its beginning. `taken` counts those that have been consumed.
    pub(crate) fn open(folder: &Folder, file: &FileInfo, taken: Arc<AtomicU64>) -> Self {
        let steps = Steps::new(folder, file, std::iter::once(0..file.size));
        Self { steps, fetched: Bytes::new(), taken }
    }
}

impl BufRead for Stored {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.fetched.is_empty()
            && let Some((_, bytes)) = self.steps.next().map_err(io::Error::other)?
        {
            self.fetched = bytes;
        }
        Ok(&self.fetched)
    }

    fn consume(&mut self, amount: usize) {
        self.fetched.advance(amount);
        self.taken.fetch_add(amount as u64, Ordering::Relaxed);
    }
}

impl Read for Stored {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}
