//! Addresses in a plan: which are in the run's own folder, and which name a folder of this machine.

use std::path::PathBuf;

/// What addresses in the run's own folder begin with.
pub(crate) const RUN: &str = "run:";

/// The folder of this machine that an address names, if it names one.
///
/// # Errors
/// In words, when it would be one and cannot be.
pub(crate) fn on_disk(url: &str) -> Result<Option<PathBuf>, String> {
    if url.starts_with(RUN) { Ok(None) } else { ulmus_storage::directory_of(url) }
}
