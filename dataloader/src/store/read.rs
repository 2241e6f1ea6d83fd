//! How files of a corpus are read: in ranges, from the cache or from the store, ahead of their use where that helps.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::task::JoinHandle;
use ulmus_storage::{FileInfo, StoreError};

use super::folder::Folder;
use super::runtime::{IO, wait_for};
use crate::error::DataError;

/// Bytes of a file that are held while it is copied.
const COPIED_AT_ONCE: usize = 64 << 20;

/// A range that is being read.
#[derive(Debug)]
pub(crate) enum Reading {
    /// It was in the cache, or is empty.
    Here(Bytes),
    /// It comes from the store.
    Under(JoinHandle<Result<Bytes, DataError>>),
}

impl Reading {
    /// Waits for the bytes.
    pub(crate) fn wait(self) -> Result<Bytes, DataError> {
        match self {
            Self::Here(bytes) => Ok(bytes),
            Self::Under(task) => wait_for(task).unwrap_or(Err(DataError::Stopped)),
        }
    }
}

impl Folder {
    /// A whole file; `None` if it is not there.
    ///
    /// # Errors
    /// When the store does not give it.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>, DataError> {
        match wait_for(self.store.get(path)) {
            Err(StoreError::NotFound { .. }) => Ok(None),
            read => Ok(Some(read?.into())),
        }
    }

    /// Copies a file to `target`, which appears whole or not at all, and returns its size in bytes.
    ///
    /// # Errors
    /// When the store does not give the file, or `target` cannot be written.
    pub fn download(&self, path: &str, target: &Path) -> Result<u64, DataError> {
        let file = self.stat(vec![path.to_owned()])?.remove(0);
        // Two programs may copy the same file.
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let part = target.with_file_name(format!("{name}.part-{}", std::process::id()));
        let failed = |error: io::Error| DataError::Target {
            folder: target.display().to_string(),
            reason: format!("it cannot be written: {error}"),
        };
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        let copy = || {
            let mut out = File::create(&part).map_err(failed)?;
            for start in (0..file.size).step_by(COPIED_AT_ONCE) {
                let end = file.size.min(start + COPIED_AT_ONCE as u64);
                out.write_all(&self.read_range(&file, start..end)?).map_err(failed)?;
            }
            out.sync_all().map_err(failed)?;
            if !self.is_copy(&file, &part).map_err(failed)? {
                let reason =
                    "what arrived does not have the size or the SHA-256 that its listing names".to_owned();
                return Err(DataError::Damaged { file: self.place(path), reason });
            }
            fs::rename(&part, target).map_err(failed)
        };
        let copied = copy();
        if copied.is_err() {
            fs::remove_file(&part).ok();
        }
        copied.map(|()| file.size)
    }

    /// The size of `target` in bytes, if it is a whole copy of a file: of its size and, where its listing says it, its SHA-256.
    ///
    /// # Errors
    /// When the file cannot be asked for, or the copy is there and cannot be read.
    pub fn copy_of(&self, path: &str, target: &Path) -> Result<Option<u64>, DataError> {
        let file = self.stat(vec![path.to_owned()])?.remove(0);
        match self.is_copy(&file, target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(DataError::Disk { file: target.display().to_string(), reason: error.to_string() })
            }
            Ok(is_copy) => Ok(is_copy.then_some(file.size)),
        }
    }

    #[cfg_attr(not(feature = "http"), expect(clippy::unused_self, reason = "only the hub names contents"))]
    fn is_copy(&self, file: &FileInfo, target: &Path) -> io::Result<bool> {
        if fs::metadata(target)?.len() != file.size {
            return Ok(false);
        }
        #[cfg(feature = "http")]
        if let (Some(_), Some(version)) = (&self.hub, &file.version) {
            return super::hub::has_version(target, version);
        }
        Ok(true)
    }

    /// The bytes of `range` of a file, which must still be the one that `file` describes.
    pub(crate) fn read_range(&self, file: &FileInfo, range: Range<u64>) -> Result<Bytes, DataError> {
        self.start_reading(file, range).wait()
    }

    /// The whole file, which must still be the one that `file` describes.
    pub(crate) fn read_all(&self, file: &FileInfo) -> Result<Bytes, DataError> {
        self.read_range(file, 0..file.size)
    }

    /// Begins to read a range.
    pub(crate) fn start_reading(&self, file: &FileInfo, range: Range<u64>) -> Reading {
        if range.is_empty() {
            return Reading::Here(Bytes::new());
        }
        let (folder, file) = (self.clone(), file.clone());
        let Some(cache) = self.cache.clone() else {
            return Reading::Under(IO.spawn(async move { folder.fetch(&file, range).await }));
        };
        if !self.is_afresh
            && let Some(bytes) = cache.get(self.url(), &file, &range)
        {
            self.cached.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            return Reading::Here(bytes);
        }
        Reading::Under(IO.spawn(async move {
            let bytes = folder.fetch(&file, range.clone()).await?;
            let kept = bytes.clone();
            tokio::task::spawn_blocking(move || cache.put(folder.url(), &file, &range, &kept));
            Ok(bytes)
        }))
    }

    /// Reads a range from the store.
    pub(crate) async fn fetch(&self, file: &FileInfo, range: Range<u64>) -> Result<Bytes, DataError> {
        Ok(self.store.get_range(&self.known(file.clone()), range).await?)
    }
}
