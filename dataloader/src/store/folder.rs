//! A folder of a corpus: what it is, what it has cost, and how files are written to it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use ulmus_storage::{FileInfo, RateLimiter, Retries, Store};
use ulmus_types::Digest;

use super::cache::Cache;
#[cfg(feature = "http")]
use super::hub::Hub;
use super::runtime::wait_for;
use crate::address::RUN;
use crate::error::DataError;

/// A folder in a store.
#[derive(Clone)]
pub struct Folder {
    pub(super) store: Store,
    /// Whether it is one of this machine that was named by its path, and that nobody else writes to at the same time.
    pub(super) is_on_disk: bool,
    /// The dataset that it belongs to. It knows which files there are.
    #[cfg(feature = "http")]
    pub(super) hub: Option<Arc<Hub>>,
    /// Whether files are told apart by the store's version mark. Not in a run's own folder: its files are written
    /// once, and a copy of the folder on another disk is the same run. Nor where an address holds fixed contents.
    pub(super) has_versions: bool,
    pub(super) cache: Option<Arc<Cache>>,
    /// Whether what is in the cache is in doubt.
    pub(super) is_afresh: bool,
    /// Bytes that came from the cache.
    pub(super) cached: Arc<AtomicU64>,
}

/// What reading a source has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Bytes that came from its store.
    pub fetched_bytes: u64,
    /// Bytes that came from the cache on disk instead.
    pub cached_bytes: u64,
    /// Requests that failed, most of which were then made again.
    pub failed_requests: u64,
}

impl fmt::Debug for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Folder({})", self.store)
    }
}

impl Folder {
    /// A folder whose files are told apart by their versions.
    pub(super) fn new(store: Store) -> Self {
        Self {
            store,
            is_on_disk: false,
            #[cfg(feature = "http")]
            hub: None,
            has_versions: true,
            cache: None,
            is_afresh: false,
            cached: Arc::default(),
        }
    }

    /// A run's own folder, or a folder below it.
    pub fn of_run(store: Store) -> Self {
        // It is read as a corpus is, and what else the run does with its store is not counted.
        let store = store.named(RUN).with_retries(Retries::CORPUS).with_counters(Arc::default());
        Self { has_versions: false, ..Self::new(store) }
    }

    /// A folder below this one.
    #[must_use]
    pub fn child(&self, path: &str) -> Self {
        Self { store: self.store.folder(path), ..self.clone() }
    }

    /// The same folder, whose cache is written and not read.
    pub(crate) fn afresh(&self) -> Self {
        Self { is_afresh: true, ..self.clone() }
    }

    /// Whether it is a folder of this machine, named by its path.
    pub(crate) const fn is_on_disk(&self) -> bool {
        self.is_on_disk
    }

    /// Whether [`Self::list`] works.
    pub(crate) const fn can_list(&self) -> bool {
        #[cfg(feature = "http")]
        if self.hub.is_some() {
            return true;
        }
        self.store.can_list()
    }

    /// The address, for messages.
    pub(crate) fn url(&self) -> &str {
        self.store.location()
    }

    /// An address of the files as they are now, where the one that was opened may have others later.
    pub fn pinned(&self) -> Option<&str> {
        #[cfg(feature = "http")]
        if self.hub.is_some() {
            return Some(self.url());
        }
        None
    }

    /// Where a file lies, for messages.
    pub(crate) fn place(&self, path: &str) -> String {
        self.store.place(path)
    }

    /// What reading has cost.
    pub(crate) fn traffic(&self) -> Traffic {
        let counters = self.store.counters();
        Traffic {
            fetched_bytes: counters.fetched_bytes(),
            cached_bytes: self.cached.load(Ordering::Relaxed),
            failed_requests: counters.failed_requests(),
        }
    }

    /// What is known of a file, without its version where that does not count.
    pub(super) fn known(&self, file: FileInfo) -> FileInfo {
        if self.has_versions { file } else { FileInfo { version: None, ..file } }
    }

    /// Writes a file whole.
    pub(crate) fn write(&self, path: &str, bytes: Vec<u8>) -> Result<(), DataError> {
        wait_for(self.put(path, bytes))
    }

    /// Writes a file whole.
    pub(crate) async fn put(&self, path: &str, bytes: Vec<u8>) -> Result<(), DataError> {
        self.remove_unfinished(path);
        Ok(self.store.put(path, bytes).await?)
    }

    /// Copies a file to the same path of another folder, reads the copy back, and gives the hash of both.
    pub(crate) async fn copy(
        &self,
        file: &FileInfo,
        to: &Self,
        limiter: &RateLimiter,
        done: impl Fn(u64),
    ) -> Result<Digest, DataError> {
        to.remove_unfinished(&file.path);
        Ok(self.store.copy(&self.known(file.clone()), &to.store, limiter, done).await?)
    }

    /// Removes what a program that was killed has left of a file. In a run's folder somebody else may be writing it.
    fn remove_unfinished(&self, path: &str) {
        if self.is_on_disk {
            self.store.remove_unfinished(path);
        }
    }
}
