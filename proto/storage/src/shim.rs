//! Names that the clients above still use, until each goes through [`crate::Store`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::path::Path;

use crate::Counters;

/// How requests are made.
#[derive(Debug, Clone, Copy)]
pub struct Requests {
    /// One that takes longer has failed.
    pub timeout: Duration,
}

/// Opens the store of an address such as `s3://bucket/path`, and gives the path within it.
///
/// # Errors
/// In words, when there is no such store, or it is not part of this build.
pub fn open(
    url: &str,
    requests: Requests,
    counters: &Arc<Counters>,
) -> Result<(Arc<dyn ObjectStore>, Path), String> {
    crate::address::open(url, requests.timeout, counters)
}

/// The error of a disk that takes nothing, if it is one.
pub fn of_disk(error: &object_store::Error) -> Option<&io::Error> {
    crate::cause::of_disk(error)
}

impl crate::Store {
    /// The object store and the prefix within it.
    pub fn objects(&self) -> (Arc<dyn ObjectStore>, Path) {
        (Arc::clone(&self.objects), self.resolve(""))
    }
}
