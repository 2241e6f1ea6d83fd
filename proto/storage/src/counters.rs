//! What the use of a store has cost, and what went wrong on the way.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Counts what a store was asked for; all folders below it share one.
#[derive(Debug, Default)]
pub struct Counters {
    fetched: AtomicU64,
    failed: AtomicU64,
    odd_names: Mutex<BTreeSet<String>>,
}

impl Counters {
    /// Bytes of files that have been read.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Requests that failed, most of which were then made again.
    pub fn failed_requests(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Names that listings had, as the whole store has them, and that no request can be made for.
    pub(crate) fn odd_names(&self) -> BTreeSet<String> {
        self.odd_names.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn add_fetched(&self, bytes: u64) {
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
    }

    #[cfg(feature = "http")]
    pub(crate) fn add_failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    #[cfg(feature = "http")]
    pub(crate) fn add_odd_name(&self, name: String) {
        self.odd_names.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
    }
}
