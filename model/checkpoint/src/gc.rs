//! Which checkpoints are kept: every milestone, the newest two recovery checkpoints, and those being written.
//!
//! Which directories are deleted is a pure function of what was found. The manifest is deleted first, so a deletion
//! that dies half-way leaves a directory that does not count as a checkpoint. A directory whose manifest is damaged is
//! left for a person to look at.

use std::collections::BTreeSet;

use ulmus_run::paths;
use ulmus_storage::Store;
use ulmus_types::{CheckpointId, CheckpointKind, StageName};

use crate::reader::{checkpoints, read_manifest};
use crate::{CheckpointError, manifest_path};

/// The number of recovery checkpoints kept: the newest, and one to fall back on if it turns out to be damaged.
const RECOVERY_KEPT: usize = 2;

/// What was found in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Committed(CheckpointKind),
    /// No manifest: being written, or never finished.
    Unfinished,
    Damaged,
}

/// Deletes checkpoints of a training stage that need not be kept, except `in_flight`, those that are being written. Returns the ones it
/// deleted.
///
/// # Errors
/// When the store refuses or is unavailable. Call it again later: it finds what is left.
pub async fn collect_garbage(
    store: &Store,
    training: StageName,
    in_flight: &BTreeSet<CheckpointId>,
) -> Result<Vec<CheckpointId>, CheckpointError> {
    let mut found = Vec::new();
    for id in checkpoints(store, training).await? {
        let what = match read_manifest(store, id).await {
            Ok(manifest) => Found::Committed(manifest.kind),
            Err(CheckpointError::NoManifest(_)) => Found::Unfinished,
            Err(error) if error.condemns() => Found::Damaged,
            Err(error) => return Err(error),
        };
        found.push((id, what));
    }
    let expired = expired(&found, in_flight);
    for id in &expired {
        delete(store, *id).await?;
    }
    Ok(expired)
}

/// Deletes one checkpoint; succeeds if it does not exist.
///
/// # Errors
/// When the store refuses or is unavailable. Call it again to delete what is left.
pub async fn delete(store: &Store, id: CheckpointId) -> Result<(), CheckpointError> {
    store.delete(&manifest_path(id)).await?;
    for file in store.list(&paths::checkpoint(id)).await? {
        store.delete(&file.path).await?;
    }
    if let Some(directory) = store.directory() {
        // Object stores have no empty directories; on a disk, one that stays behind does no harm.
        drop(std::fs::remove_dir(directory.join(paths::checkpoint(id))));
    }
    Ok(())
}

/// Chooses the checkpoints to delete from `found`, which is in ascending order.
fn expired(found: &[(CheckpointId, Found)], in_flight: &BTreeSet<CheckpointId>) -> Vec<CheckpointId> {
    let newest_committed = found.iter().rev().find(|(_, what)| matches!(what, Found::Committed(_)));
    let Some((newest_committed, _)) = newest_committed else {
        return Vec::new();
    };
    let recovery = |what: &Found| *what == Found::Committed(CheckpointKind::Recovery);
    let recoveries = found.iter().filter(|(_, what)| recovery(what)).count();
    let surplus =
        found.iter().filter(|(_, what)| recovery(what)).take(recoveries.saturating_sub(RECOVERY_KEPT));
    let unfinished = found.iter().filter(|(id, what)| *what == Found::Unfinished && id < newest_committed);
    surplus.chain(unfinished).map(|(id, _)| *id).filter(|id| !in_flight.contains(id)).collect()
}

#[cfg(test)]
mod tests {
    use ulmus_types::{Generation, Step};

    use super::*;

    const MILESTONE: Found = Found::Committed(CheckpointKind::Milestone);
    const RECOVERY: Found = Found::Committed(CheckpointKind::Recovery);

    fn steps_expired(found: &[(u64, Found)], in_flight: &[u64]) -> Vec<u64> {
        let id = |step: u64| CheckpointId::new(StageName::pretraining(), Step::new(step), Generation::new(1));
        let found: Vec<_> = found.iter().map(|(step, what)| (id(*step), *what)).collect();
        let in_flight = in_flight.iter().map(|step| id(*step)).collect();
        expired(&found, &in_flight).into_iter().map(|id| id.step().get()).collect()
    }

    #[test]
    fn milestones_and_the_newest_two_recoveries_stay() {
        let found = [(1, RECOVERY), (2, MILESTONE), (3, RECOVERY), (4, RECOVERY), (5, MILESTONE)];
        assert_eq!(steps_expired(&found, &[]), [1]);
        assert!(steps_expired(&found[1..], &[]).is_empty());
    }

    #[test]
    fn unfinished_ones_go_only_when_old_and_not_in_flight() {
        let found = [(1, Found::Unfinished), (2, Found::Unfinished), (3, MILESTONE), (4, Found::Unfinished)];
        assert_eq!(steps_expired(&found, &[2]), [1]);
        assert!(steps_expired(&[(1, Found::Unfinished)], &[]).is_empty());
        assert!(steps_expired(&[(1, Found::Damaged), (2, MILESTONE)], &[]).is_empty());
    }
}
