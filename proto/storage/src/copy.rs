//! How a file is copied from one store to another.

use std::sync::{Mutex, PoisonError};

use futures::{StreamExt, TryStreamExt};
use ulmus_types::Digest;

use crate::error::StoreError;
use crate::file::FileInfo;
use crate::limiter::RateLimiter;
use crate::pieces::{IN_FLIGHT, in_pieces};
use crate::retry::COPY_RETRIES;
use crate::store::Store;

impl Store {
    /// Copies a file, which must still be the one that was described, to the same path of another folder, reads the copy
    /// back, and gives the hash of both. `done` hears of bytes as they are read, and hears of them again when they are read
    /// again.
    ///
    /// # Errors
    /// When one of the stores refuses or is out of order; [`StoreError::Damaged`] when the copy is not what was read.
    pub async fn copy(
        &self,
        file: &FileInfo,
        to: &Self,
        limiter: &RateLimiter,
        done: impl Fn(u64),
    ) -> Result<Digest, StoreError> {
        let FileInfo { path, size, .. } = file;
        if *size == 0 {
            // Nothing is read of it, and so nothing else would tell that it has grown.
            self.compare(file, &self.stat(path).await?)?;
        }
        let read = Mutex::new(blake3::Hasher::new());
        let hasher = || read.lock().unwrap_or_else(PoisonError::into_inner);
        let pieces = || {
            hasher().reset();
            futures::stream::iter(in_pieces(0..*size))
                .map(async |range| {
                    limiter.acquire(range.end - range.start).await;
                    self.piece(file, range).await
                })
                .buffered(IN_FLIGHT)
                .inspect_ok(|piece| {
                    hasher().update(piece);
                    done(piece.len() as u64);
                })
        };
        to.put_stream_again(COPY_RETRIES, path, *size, pieces).await?;
        let mut written = blake3::Hasher::new();
        to.get_pieces(path, |piece| {
            written.update(piece);
        })
        .await?;
        let (read, written) = (hasher().finalize(), written.finalize());
        if written != read {
            let reason = format!("it is another than {}, of which it is a copy", self.place(path));
            return Err(StoreError::Damaged { file: to.place(path), reason });
        }
        Ok(Digest::from_bytes(*read.as_bytes()))
    }
}
