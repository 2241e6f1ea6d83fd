//! Writes `quarantine.json`, from which workers know the units that they must skip.

use std::collections::BTreeMap;

use ulmus_checkpoint::{Store, StoreError};
use ulmus_run::{paths, quarantine};
use ulmus_types::BadUnit;

/// Writes all quarantined units, and why each is skipped. The write is atomic: readers see the old list or the new one.
///
/// # Errors
/// When the store refuses the write, or is unavailable.
pub(crate) async fn write(store: &Store, units: &BTreeMap<BadUnit, String>) -> Result<(), StoreError> {
    store.put(paths::QUARANTINE, quarantine::to_json(units)).await
}
