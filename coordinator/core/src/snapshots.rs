//! Checkpoints on their way to the store.
//!
//! Every member of a group keeps the state of a checkpoint in memory until its manifest is stored. So the parts
//! that a dead worker owed are simply asked of another holder; a checkpoint is given up only when nobody holds
//! it any more, and then training has to pass that step again anyway.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ulmus_types::{CheckpointId, CheckpointKind, Digest, FileEntry, Snapshot, WorkerId};

/// How long parts wait for the other members to announce the same state, so that the work can be shared.
const SHARE_WAIT: Duration = Duration::from_secs(1);
/// How long a part, or a manifest, that could not be stored waits.
const RETRY_WAIT: Duration = Duration::from_secs(2);

/// One part.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Unassigned { not_before: Duration },
    Assigned(WorkerId),
    Written(FileEntry),
}

/// A checkpoint that is not committed yet.
#[derive(Debug)]
struct Pending {
    kind: CheckpointKind,
    state: Digest,
    holders: BTreeSet<WorkerId>,
    parts: BTreeMap<String, Part>,
    committing: bool,
    /// Until then its manifest, which could not be stored, waits.
    not_before: Duration,
    since: Duration,
}

/// All checkpoints that are not committed yet.
#[derive(Debug, Default)]
pub(crate) struct Snapshots(BTreeMap<CheckpointId, Pending>);

/// A checkpoint whose parts are all stored.
pub(crate) struct Complete {
    pub(crate) checkpoint: CheckpointId,
    pub(crate) kind: CheckpointKind,
    pub(crate) state: Digest,
    pub(crate) files: BTreeMap<String, FileEntry>,
}

impl Snapshots {
    /// A worker announced a state.
    ///
    /// # Errors
    /// The workers that hold another state of the same checkpoint: somebody's arithmetic is broken.
    pub(crate) fn announced(
        &mut self,
        worker: &WorkerId,
        snapshot: &Snapshot,
        now: Duration,
    ) -> Result<(), Vec<WorkerId>> {
        let pending = self.0.entry(snapshot.checkpoint).or_insert_with(|| Pending {
            kind: snapshot.kind,
            state: snapshot.state,
            holders: BTreeSet::new(),
            parts: snapshot
                .files
                .iter()
                .map(|name| (name.clone(), Part::Unassigned { not_before: Duration::ZERO }))
                .collect(),
            committing: false,
            not_before: now,
            since: now,
        });
        if pending.state != snapshot.state {
            return Err(pending.holders.iter().cloned().collect());
        }
        pending.holders.insert(worker.clone());
        Ok(())
    }

    /// Parts to ask of holders now. `members` is the group that trains, whose members all announce.
    pub(crate) fn assign(
        &mut self,
        members: &[WorkerId],
        now: Duration,
    ) -> Vec<(WorkerId, CheckpointId, Vec<String>)> {
        let mut asked = Vec::new();
        for (&checkpoint, pending) in &mut self.0 {
            let all_announced = members.iter().all(|member| pending.holders.contains(member));
            if !all_announced && now < pending.since + SHARE_WAIT {
                continue;
            }
            let holders: Vec<&WorkerId> = pending.holders.iter().collect();
            if holders.is_empty() {
                continue;
            }
            let mut of_worker: BTreeMap<&WorkerId, Vec<String>> = BTreeMap::new();
            for (index, (name, part)) in pending.parts.iter_mut().enumerate() {
                if matches!(part, Part::Unassigned { not_before } if *not_before <= now) {
                    let holder = holders[index % holders.len()];
                    *part = Part::Assigned(holder.clone());
                    of_worker.entry(holder).or_default().push(name.clone());
                }
            }
            asked.extend(of_worker.into_iter().map(|(worker, names)| (worker.clone(), checkpoint, names)));
        }
        asked
    }

    /// A holder stored parts.
    pub(crate) fn written(&mut self, checkpoint: CheckpointId, files: BTreeMap<String, FileEntry>) {
        let Some(pending) = self.0.get_mut(&checkpoint) else { return };
        for (name, entry) in files {
            if let Some(part) = pending.parts.get_mut(&name) {
                *part = Part::Written(entry);
            }
        }
    }

    /// A holder could not store what it was asked for.
    pub(crate) fn write_failed(&mut self, checkpoint: CheckpointId, worker: &WorkerId, now: Duration) {
        if let Some(pending) = self.0.get_mut(&checkpoint) {
            unassign(pending, worker, now + RETRY_WAIT);
        }
    }

    /// A worker is gone: its parts are open again, and states that nobody else holds are lost.
    pub(crate) fn lost(&mut self, worker: &WorkerId) {
        for pending in self.0.values_mut() {
            pending.holders.remove(worker);
            unassign(pending, worker, Duration::ZERO);
        }
        self.0.retain(|_, pending| pending.committing || !pending.holders.is_empty());
    }

    /// Checkpoints that became complete, each told once.
    pub(crate) fn complete(&mut self, now: Duration) -> Vec<Complete> {
        let mut complete = Vec::new();
        for (&checkpoint, pending) in &mut self.0 {
            if pending.committing || now < pending.not_before {
                continue;
            }
            let files: Option<BTreeMap<String, FileEntry>> = pending
                .parts
                .iter()
                .map(|(name, part)| match part {
                    Part::Written(entry) => Some((name.clone(), *entry)),
                    _ => None,
                })
                .collect();
            if let Some(files) = files {
                pending.committing = true;
                complete.push(Complete { checkpoint, kind: pending.kind, state: pending.state, files });
            }
        }
        complete
    }

    /// The manifest could not be stored: tell the checkpoint as complete again.
    pub(crate) fn commit_failed(&mut self, checkpoint: CheckpointId, now: Duration) {
        if let Some(pending) = self.0.get_mut(&checkpoint) {
            pending.committing = false;
            pending.not_before = now + RETRY_WAIT;
        }
    }

    /// A checkpoint is committed; its kind, and who need not hold it any longer.
    pub(crate) fn committed(
        &mut self,
        checkpoint: CheckpointId,
    ) -> Option<(CheckpointKind, BTreeSet<WorkerId>)> {
        self.0.remove(&checkpoint).map(|pending| (pending.kind, pending.holders))
    }

    /// Whether nothing is on its way.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether each of them has somebody who could store it.
    pub(crate) fn all_are_held(&self) -> bool {
        self.0.values().all(|pending| pending.committing || !pending.holders.is_empty())
    }
}

fn unassign(pending: &mut Pending, worker: &WorkerId, not_before: Duration) {
    for part in pending.parts.values_mut() {
        if matches!(part, Part::Assigned(holder) if holder == worker) {
            *part = Part::Unassigned { not_before };
        }
    }
}

#[cfg(test)]
mod tests {
    use ulmus_types::{Generation, Incarnation, Step};

    use super::*;

    #[test]
    fn a_manifest_that_could_not_be_stored_waits() {
        let worker = WorkerId::new("w", Incarnation::new(1)).unwrap();
        let checkpoint = CheckpointId::new(Step::new(5), Generation::new(1));
        let (kind, state) = (CheckpointKind::Milestone, Digest::of(b"state"));
        let snapshot = Snapshot { checkpoint, kind, state, files: vec!["a".to_owned()] };
        let mut snapshots = Snapshots::default();
        let now = Duration::from_secs(100);
        snapshots.announced(&worker, &snapshot, now).unwrap();
        assert_eq!(snapshots.assign(std::slice::from_ref(&worker), now).len(), 1);
        let entry = FileEntry { bytes: 1, digest: state };
        snapshots.written(checkpoint, [("a".to_owned(), entry)].into());
        assert_eq!(snapshots.complete(now).len(), 1);
        snapshots.commit_failed(checkpoint, now);
        assert!(snapshots.complete(now + RETRY_WAIT / 2).is_empty());
        assert_eq!(snapshots.complete(now + RETRY_WAIT).len(), 1);
    }
}
