//! The one client through which files are read and written, on a disk or in an object store: corpora, copies of them, and
//! the folders of runs.
//!
//! A [`Store`] is a folder behind an address: a path, `file://`, `s3://`, `gs://`, `az://` or `http(s)://`. It promises three
//! things. A file is there whole or not at all, and once written to a disk it survives a loss of power. A busy store is not a
//! failed one: what may work when tried again is tried again, within the limits of its [`Retries`], before the caller hears of
//! it. And an error says what to do about it: [`StoreError`] tells a full disk from a refusal, and an outage from a file that
//! is missing.
//!
//! Credentials come from the environment and from the files that each provider's own tools write, never from an address.
//! The client does not interpret contents, and knows neither runs nor corpora.

#![forbid(unsafe_code)]

mod address;
mod cause;
mod copy;
mod counters;
mod error;
mod file;
mod limiter;
mod list;
mod pieces;
#[cfg(feature = "aws")]
mod profile;
mod read;
mod retry;
mod store;
#[cfg(feature = "http")]
mod wire;
mod write;

pub use address::directory_of;
pub use counters::Counters;
pub use error::StoreError;
pub use file::{FileInfo, check_path, is_unfinished};
pub use limiter::RateLimiter;
pub use retry::{Retries, retried};
pub use store::{Access, OpenOptions, Store};
#[cfg(feature = "http")]
pub use wire::{settings, watched, wire_retries};
