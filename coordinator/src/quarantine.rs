//! `quarantine.json` in the run folder: the units that everybody leaves out, where workers read it.

use std::collections::BTreeMap;

use ulmus_checkpoint::{Store, StoreError};
use ulmus_run::{paths, quarantine};
use ulmus_types::BadUnit;

/// Writes all units that are left out, and why. Whoever reads it sees the old list or the new one.
///
/// # Errors
/// When the store refuses, or is out of order.
pub(crate) async fn write(store: &Store, units: &BTreeMap<BadUnit, String>) -> Result<(), StoreError> {
    store.put(paths::QUARANTINE, quarantine::to_json(units)).await
}
