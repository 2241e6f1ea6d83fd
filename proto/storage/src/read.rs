//! How files are read: looked up, whole, in ranges, and piece by piece.
//!
//! Larger files are read in several requests, each of which is answered within its deadline or made again alone. What comes
//! is compared with the file that was described, so that two versions of a file are never mixed.

use std::ops::Range;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::{GetOptions, GetRange, ObjectStoreExt};

use crate::cause;
use crate::error::StoreError;
use crate::file::FileInfo;
use crate::pieces::{IN_FLIGHT, PIECE, in_pieces};
use crate::store::Store;

/// How often a file that is replaced while it is read is read from its beginning.
const REPLACED_AGAIN: usize = 3;
/// What is given to a caller at once, who may hash it: half a millisecond for a thread of the runtime.
const STEP: usize = 2 << 20;

impl Store {
    /// Size and version of a file.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or when the store refuses or is out of order.
    pub async fn stat(&self, path: &str) -> Result<FileInfo, StoreError> {
        let target = self.resolve(path);
        let look_up = || async {
            match self.objects.head(&target).await {
                // Some web servers do not support HEAD. The answer to a request for any part of a file has its size, too.
                Err(error) if cause::status(&error) == Some(405) => {
                    self.objects.get_opts(&target, part(0..1)).await.map(|begin| begin.meta)
                }
                meta => meta,
            }
        };
        Ok(FileInfo::of(path.to_owned(), &self.attempt("look up", path, look_up).await?))
    }

    /// Whether a file is there, and still the one that was described.
    ///
    /// # Errors
    /// When the store refuses or is out of order.
    pub async fn is_still(&self, file: &FileInfo) -> Result<bool, StoreError> {
        match self.stat(&file.path).await {
            Ok(now) => Ok(self.compare(file, &now).is_ok()),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads a whole file, as it is at one moment.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or when the store refuses or is out of order.
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        let target = self.resolve(path);
        let read = || async {
            let found = self.objects.get(&target).await?;
            let file = FileInfo::of(path.to_owned(), &found.meta);
            Ok(if file.size <= PIECE { Ok(found.bytes().await?) } else { Err(file) })
        };
        let mut again = 0..REPLACED_AGAIN;
        loop {
            let file = match self.attempt("read", path, read).await? {
                Ok(bytes) => {
                    self.counters.add_fetched(bytes.len() as u64);
                    return Ok(bytes);
                }
                Err(file) => file,
            };
            match self.get_range(&file, 0..file.size).await {
                Err(StoreError::Changed { .. }) if again.next().is_some() => {}
                read => return read,
            }
        }
    }

    /// Reads a range of a file, which must still be the one that was described.
    ///
    /// # Errors
    /// [`StoreError::Changed`], [`StoreError::NotFound`], or when the store refuses or is out of order.
    pub async fn get_range(&self, file: &FileInfo, range: Range<u64>) -> Result<Bytes, StoreError> {
        let length = (range.end - range.start) as usize;
        let mut pieces = std::pin::pin!(self.pieces(file, range));
        let first = pieces.try_next().await?.unwrap_or_default();
        if first.len() == length {
            return Ok(first);
        }
        let mut whole = Vec::with_capacity(length);
        whole.extend_from_slice(&first);
        while let Some(piece) = pieces.try_next().await? {
            whole.extend_from_slice(&piece);
        }
        Ok(whole.into())
    }

    /// Gives a whole file to `take`, in order and in steps, while the next pieces are under way. A caller that may meet a
    /// file that is being replaced checks what came, for instance by its hash.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Changed`] when its size changes, or when the store refuses or is out of order.
    pub async fn get_pieces(&self, path: &str, mut take: impl FnMut(&[u8])) -> Result<(), StoreError> {
        let file = FileInfo { version: None, ..self.stat(path).await? };
        let mut pieces = std::pin::pin!(self.pieces(&file, 0..file.size));
        while let Some(piece) = pieces.try_next().await? {
            for step in piece.chunks(STEP) {
                take(step);
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// The pieces of a range, in order, several of which are under way at once.
    pub(crate) fn pieces(
        &self,
        file: &FileInfo,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, StoreError>> {
        futures::stream::iter(in_pieces(range)).map(move |range| self.piece(file, range)).buffered(IN_FLIGHT)
    }

    /// Reads a range in one request.
    pub(crate) async fn piece(&self, file: &FileInfo, range: Range<u64>) -> Result<Bytes, StoreError> {
        let FileInfo { path, .. } = file;
        let target = self.resolve(path);
        let read = || async {
            match self.objects.get_opts(&target, part(range.clone())).await {
                Err(error) if cause::is_out_of_range(&error) => Ok(None),
                found => {
                    let found = found?;
                    Ok(Some((FileInfo::of(path.clone(), &found.meta), found.bytes().await?)))
                }
            }
        };
        let (now, bytes) = match self.attempt("read", path, read).await? {
            Some(read) => read,
            // It has become shorter, or less is there than its store says.
            None => (self.stat(path).await?, Bytes::new()),
        };
        self.compare(file, &now)?;
        let (expected, found) = (range.end - range.start, bytes.len() as u64);
        if found != expected {
            let reason = format!("{expected} bytes were asked for, {found} came");
            return Err(StoreError::Damaged { file: self.place(path), reason });
        }
        self.counters.add_fetched(found);
        Ok(bytes)
    }

    /// Makes sure that a file is still the one that was described.
    pub(crate) fn compare(&self, then: &FileInfo, now: &FileInfo) -> Result<(), StoreError> {
        match then.difference(now, self.directory().is_some()) {
            None => Ok(()),
            Some((what, then_value, now)) => {
                Err(StoreError::Changed { file: self.place(&then.path), what, then: then_value, now })
            }
        }
    }
}

fn part(range: Range<u64>) -> GetOptions {
    GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() }
}
