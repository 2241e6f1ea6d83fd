//! `quarantine.json` in the run folder: the units that everybody leaves out, where workers read it.

use std::collections::BTreeMap;

use ulmus_checkpoint::{Store, StoreError};
use ulmus_types::BadUnit;

/// Writes all units that are left out, and why. Whoever reads it sees the old list or the new one.
///
/// # Errors
/// When the store refuses, or is out of order.
pub(crate) async fn write(store: &Store, units: &BTreeMap<BadUnit, String>) -> Result<(), StoreError> {
    let units: Vec<_> = units.iter().collect();
    let text = serde_json::to_vec(&units).expect("names and numbers can be written as JSON");
    store.put("quarantine.json", text).await
}
