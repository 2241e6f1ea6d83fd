//! How files are written and deleted. Readers see the old or the new contents, never a part.
//!
//! A file of more than one piece goes up in parts, so that one lost packet does not repeat gigabytes and no store's limit on
//! a single request is met. The request that ends such an upload cannot simply be made again: if its answer is lost, the
//! store knows of no such upload any more. So when it fails for good, what is there is compared with what was sent. If they
//! are the same, the file is written; if not, an upload that the store does not know is begun again.

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use object_store::{Error as Cause, ObjectStoreExt, PutMode, WriteMultipart};
use tokio::time::Instant;

use crate::cause;
use crate::error::StoreError;
use crate::pieces::{IN_FLIGHT, PIECE, in_pieces};
use crate::retry::{UPLOAD_RETRIES, retried};
use crate::store::{Store, parsed};

/// Most parts of an upload that S3 takes.
const MOST_PARTS: u64 = 10_000;

impl Store {
    /// Writes a whole file and replaces what was there.
    ///
    /// # Errors
    /// When the store refuses, or is out of order for longer than its [`Retries`](crate::Retries) allow.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the old or the new contents.
    pub async fn put(&self, path: &str, contents: impl Into<Bytes>) -> Result<(), StoreError> {
        let contents = contents.into();
        let size = contents.len() as u64;
        let pieces = || {
            let contents = contents.clone();
            let slices = in_pieces(0..size)
                .map(move |range| Ok(contents.slice(range.start as usize..range.end as usize)));
            futures::stream::iter(slices)
        };
        self.put_stream(path, size, pieces).await
    }

    /// Writes a whole file unless there is one of this name; answers whether it wrote it. If an answer was lost, `false` may
    /// mean that the file is this one: a caller that must know compares.
    ///
    /// # Errors
    /// As [`Store::put`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves the file absent or whole.
    pub async fn put_new(&self, path: &str, contents: impl Into<Bytes>) -> Result<bool, StoreError> {
        let contents = contents.into();
        let target = self.resolve(path);
        let put = || async {
            match self.objects.put_opts(&target, contents.clone().into(), PutMode::Create.into()).await {
                Err(Cause::AlreadyExists { .. }) => Ok(false),
                written => written.map(|_| true),
            }
        };
        self.attempt("write", path, put).await
    }

    /// Writes a whole file of `size` bytes from pieces of at most 8 MiB, and replaces what was there. `pieces` makes the
    /// stream of them anew for every attempt.
    ///
    /// # Errors
    /// As [`Store::put`]; the stream's own; [`StoreError::Damaged`] when the stream has another length.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the old or the new contents.
    pub async fn put_stream<S: Stream<Item = Result<Bytes, StoreError>>>(
        &self,
        path: &str,
        size: u64,
        pieces: impl Fn() -> S,
    ) -> Result<(), StoreError> {
        self.put_stream_again(UPLOAD_RETRIES, path, size, pieces).await
    }

    /// As [`Store::put_stream`], with at least `at_least` retries.
    pub(crate) async fn put_stream_again<S: Stream<Item = Result<Bytes, StoreError>>>(
        &self,
        at_least: usize,
        path: &str,
        size: u64,
        pieces: impl Fn() -> S,
    ) -> Result<(), StoreError> {
        if size > PIECE {
            let (begun, upload) = (Instant::now(), || self.upload(path, size, &pieces));
            return retried(self.retries.deadline, at_least, StoreError::is_transient, upload)
                .await
                .map_err(|error| error.after(begun.elapsed()));
        }
        let whole = || async { pieces().try_collect::<Vec<Bytes>>().await };
        let whole = retried(self.retries.deadline, at_least, StoreError::is_transient, whole).await?;
        let contents = Bytes::from(whole.concat());
        self.check_length(path, contents.len() as u64, size)?;
        let target = self.resolve(path);
        self.attempt("write", path, || self.objects.put(&target, contents.clone().into())).await.map(drop)
    }

    /// Writes a file in parts, once.
    async fn upload<S: Stream<Item = Result<Bytes, StoreError>>>(
        &self,
        path: &str,
        size: u64,
        pieces: impl Fn() -> S,
    ) -> Result<(), StoreError> {
        let target = self.resolve(path);
        let failed = |error: Cause| self.error("write", path, &error);
        let upload = self.objects.put_multipart(&target).await.map_err(failed)?;
        let part = PIECE.max(size.div_ceil(MOST_PARTS));
        let mut upload = WriteMultipart::new_with_chunk_size(upload, part as usize);
        let sent = async {
            let mut pieces = std::pin::pin!(pieces());
            let mut sent = 0;
            while let Some(piece) = pieces.try_next().await? {
                upload.wait_for_capacity(IN_FLIGHT).await.map_err(failed)?;
                sent += piece.len() as u64;
                upload.put(piece);
            }
            self.check_length(path, sent, size)
        };
        if let Err(error) = sent.await {
            // What is left of it would be paid for. When that fails too, the first error is the one to tell.
            let _left_over = upload.abort().await;
            return Err(error);
        }
        match upload.finish().await {
            Ok(_) => Ok(()),
            Err(error) if cause::is_transient(&error) || cause::of_disk(&error).is_some() => {
                Err(failed(error))
            }
            Err(_) if self.holds(path, size, pieces()).await => Ok(()),
            Err(error @ Cause::NotFound { .. }) => Err(StoreError::Transient {
                act: "write",
                file: self.place(path),
                reason: cause::told(&error),
            }),
            Err(error) => Err(failed(error)),
        }
    }

    /// Whether a file is what was to be written.
    async fn holds(
        &self,
        path: &str,
        size: u64,
        expected: impl Stream<Item = Result<Bytes, StoreError>>,
    ) -> bool {
        let compared = async {
            let file = self.stat(path).await?;
            let mut expected = std::pin::pin!(expected);
            let mut at = 0;
            while let Some(piece) = expected.try_next().await?.filter(|_| file.size == size) {
                let end = at + piece.len() as u64;
                if self.piece(&file, at..end).await? != piece {
                    return Ok(false);
                }
                at = end;
            }
            Ok::<_, StoreError>(at == size)
        };
        compared.await.unwrap_or(false)
    }

    fn check_length(&self, path: &str, found: u64, size: u64) -> Result<(), StoreError> {
        if found == size {
            return Ok(());
        }
        let reason = format!("{found} bytes came to be written, not {size}");
        Err(StoreError::Damaged { file: self.place(path), reason })
    }

    /// Deletes a file; one that does not exist is deleted already.
    ///
    /// # Errors
    /// When the store refuses or is out of order.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let target = self.resolve(path);
        match self.attempt("delete", path, || self.objects.delete(&target)).await {
            Err(StoreError::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// Removes what programs that were killed have left of a file on a disk, where nobody else is writing it.
    pub fn remove_unfinished(&self, path: &str) {
        let Some(directory) = self.directory() else { return };
        // A store on disk writes to `name#1` beside the file, or to the next number that is free.
        let beside = |number: u32| directory.join(format!("{}#{number}", parsed(path)));
        let mut number = 1;
        while std::fs::remove_file(beside(number)).is_ok() {
            number += 1;
        }
    }
}
