//! Checkpoints that are being stored.
//!
//! Every member of a group holds the state of a checkpoint in memory until its manifest is stored. If a worker dies,
//! another holder is asked for its parts. A checkpoint is abandoned only when nobody holds its state any more. Training
//! then repeats that step: at once if nobody has a later state either, otherwise when everything else is done.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ulmus_types::{CheckpointId, CheckpointKind, Digest, FileEntry, SNAPSHOT_SLOTS, Snapshot, WorkerId};

/// How long parts wait for the other members to announce the same state, so that the work can be shared.
const SHARE_WAIT: Duration = Duration::from_secs(1);
/// How long a part or a manifest that could not be stored waits before it is tried again.
const RETRY_WAIT: Duration = Duration::from_secs(2);
/// How long storing a part may take before anything was measured.
const WRITE_WITHIN: Duration = Duration::from_mins(1);
/// How long reading back a checkpoint may take before anything was measured.
const COMMIT_WITHIN: Duration = Duration::from_mins(5);
/// How long storing may fail before states are given up so that training need not wait for them.
const FAILING_FOR: Duration = Duration::from_secs(5);
/// Why a part counts as not stored when nothing was heard of it.
const TOO_LONG: &str = "it took too long";

/// Progress of one part.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Unassigned { not_before: Duration },
    Assigned { to: WorkerId, since: Duration },
    Written { by: WorkerId, entry: FileEntry },
}

/// A checkpoint that is not committed yet.
#[derive(Debug)]
struct Pending {
    kind: CheckpointKind,
    state: Digest,
    holders: BTreeSet<WorkerId>,
    parts: BTreeMap<String, Part>,
    /// Workers that were ever asked for parts. What others report about parts is ignored.
    asked: BTreeSet<WorkerId>,
    /// Since when its parts have been read back and its manifest written; `None` before that.
    committing: Option<Duration>,
    /// When its manifest may be written; later than now if the last attempt failed.
    not_before: Duration,
    since: Duration,
}

/// All checkpoints that are not committed yet.
#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    pending: BTreeMap<CheckpointId, Pending>,
    /// Names of workers that failed to store something, and how often since they last succeeded. They are asked last.
    unable: BTreeMap<String, u32>,
    /// Since when nothing could be stored, and why; `None` if storing works.
    failing: Option<(Duration, String)>,
    /// The longest that storing a part has taken.
    slowest: Duration,
}

/// A checkpoint whose parts are all stored.
pub(crate) struct Complete {
    pub(crate) checkpoint: CheckpointId,
    pub(crate) kind: CheckpointKind,
    pub(crate) state: Digest,
    pub(crate) files: BTreeMap<String, FileEntry>,
}

impl Snapshots {
    /// A worker has announced a state.
    ///
    /// # Errors
    /// The workers that hold a different state of the same checkpoint: some machine computes wrongly.
    pub(crate) fn on_announced(
        &mut self,
        worker: &WorkerId,
        snapshot: &Snapshot,
        now: Duration,
    ) -> Result<(), Vec<WorkerId>> {
        let pending = self.pending.entry(snapshot.checkpoint).or_insert_with(|| Pending {
            kind: snapshot.kind,
            state: snapshot.state,
            holders: BTreeSet::new(),
            parts: snapshot
                .files
                .iter()
                .map(|name| (name.clone(), Part::Unassigned { not_before: Duration::ZERO }))
                .collect(),
            asked: BTreeSet::new(),
            committing: None,
            not_before: now,
            since: now,
        });
        if pending.state != snapshot.state {
            return Err(pending.holders.iter().cloned().collect());
        }
        pending.holders.insert(worker.clone());
        Ok(())
    }

    /// Assigns parts to holders, and returns what to ask of whom. The members of the group that `announce` a
    /// checkpoint sooner or later share the work; workers in `leaving` are asked only if nobody else holds it.
    pub(crate) fn assign(
        &mut self,
        announce: impl Fn(CheckpointId) -> Vec<WorkerId>,
        leaving: &BTreeSet<WorkerId>,
        now: Duration,
    ) -> Vec<(WorkerId, CheckpointId, Vec<String>)> {
        let mut asked = Vec::new();
        for (&checkpoint, pending) in &mut self.pending {
            let all_announced = announce(checkpoint).iter().all(|member| pending.holders.contains(member));
            if !all_announced && now < pending.since + SHARE_WAIT {
                continue;
            }
            // Holders that stay come first, then those that have failed least often.
            let rank = |holder: &WorkerId| {
                (leaving.contains(holder), self.unable.get(holder.name()).copied().unwrap_or(0))
            };
            let Some(best) = pending.holders.iter().map(rank).min() else { continue };
            let holders: Vec<&WorkerId> =
                pending.holders.iter().filter(|holder| rank(holder) == best).collect();
            let mut of_worker: BTreeMap<&WorkerId, Vec<String>> = BTreeMap::new();
            for (index, (name, part)) in pending.parts.iter_mut().enumerate() {
                if matches!(part, Part::Unassigned { not_before } if *not_before <= now) {
                    let holder = holders[index % holders.len()];
                    *part = Part::Assigned { to: holder.clone(), since: now };
                    of_worker.entry(holder).or_default().push(name.clone());
                }
            }
            pending.asked.extend(of_worker.keys().map(|worker| (*worker).clone()));
            asked.extend(of_worker.into_iter().map(|(worker, names)| (worker.clone(), checkpoint, names)));
        }
        asked
    }

    /// Whether a worker was asked for parts of a checkpoint; `None` if the checkpoint is no longer waiting.
    pub(crate) fn was_asked(&self, checkpoint: CheckpointId, worker: &WorkerId) -> Option<bool> {
        self.pending.get(&checkpoint).map(|pending| pending.asked.contains(worker))
    }

    /// A holder has stored parts.
    pub(crate) fn on_written(
        &mut self,
        checkpoint: CheckpointId,
        worker: &WorkerId,
        files: BTreeMap<String, FileEntry>,
        now: Duration,
    ) {
        let Some(pending) = self.pending.get_mut(&checkpoint) else { return };
        self.unable.remove(worker.name());
        for (name, entry) in files {
            if let Some(part) = pending.parts.get_mut(&name) {
                if let Part::Assigned { since, .. } = part {
                    self.slowest = self.slowest.max(now.saturating_sub(*since));
                }
                *part = Part::Written { by: worker.clone(), entry };
            }
        }
    }

    /// A holder could not store what it was asked for.
    pub(crate) fn on_write_failed(
        &mut self,
        checkpoint: CheckpointId,
        worker: &WorkerId,
        why: &str,
        now: Duration,
    ) {
        let not_before = self.count_failure(checkpoint, worker, why, now);
        if let Some(pending) = self.pending.get_mut(&checkpoint) {
            unassign(pending, worker, not_before);
        }
    }

    /// Counts a failure of a holder to store something. Returns when the part may be asked for again.
    fn count_failure(
        &mut self,
        checkpoint: CheckpointId,
        worker: &WorkerId,
        why: &str,
        now: Duration,
    ) -> Duration {
        *self.unable.entry(worker.name().to_owned()).or_insert(0) += 1;
        let is_able = |other: &WorkerId| other != worker && !self.unable.contains_key(other.name());
        // Another holder can be asked at once; the same one only after a wait.
        if self.pending.get(&checkpoint).is_some_and(|pending| pending.holders.iter().any(is_able)) {
            return now;
        }
        let failing = self.failing.get_or_insert_with(|| (now, why.to_owned()));
        // What the store itself says is worth more than that it took too long.
        if why != TOO_LONG {
            why.clone_into(&mut failing.1);
        }
        now + RETRY_WAIT
    }

    /// Workers that have taken too long to store parts. Their parts can be assigned again.
    pub(crate) fn overdue(&mut self, now: Duration) -> Vec<(WorkerId, CheckpointId)> {
        // A worker stores the parts that it is asked for one after the other.
        let within = WRITE_WITHIN.max(self.slowest * 4);
        let mut overdue = BTreeSet::new();
        for (&checkpoint, pending) in &self.pending {
            for part in pending.parts.values() {
                if let Part::Assigned { to, since } = part
                    && now.saturating_sub(*since) > within
                {
                    overdue.insert((to.clone(), checkpoint));
                }
            }
        }
        for (worker, checkpoint) in &overdue {
            self.on_write_failed(*checkpoint, worker, TOO_LONG, now);
        }
        for (checkpoint, pending) in &self.pending {
            // All parts are read back, one after the other.
            let within = COMMIT_WITHIN.max(self.slowest * pending.parts.len() as u32);
            if pending.committing.is_some_and(|since| now.saturating_sub(since) > within) {
                let why = format!("reading back {checkpoint} and writing its manifest takes too long");
                self.failing.get_or_insert((now, why));
            }
        }
        overdue.into_iter().collect()
    }

    /// Since when nothing can be stored, and why; `None` if storing works.
    pub(crate) fn failing(&self) -> Option<&(Duration, String)> {
        self.failing.as_ref()
    }

    /// Gives up a state if nothing can be stored and training would have to wait for it. Returns the checkpoint and its
    /// holders. A milestone has to be trained again in the end.
    pub(crate) fn give_up(
        &mut self,
        now: Duration,
    ) -> Option<(CheckpointId, CheckpointKind, BTreeSet<WorkerId>)> {
        let (since, _) = self.failing.as_ref()?;
        if now.saturating_sub(*since) < FAILING_FOR || self.pending.len() < SNAPSHOT_SLOTS {
            return None;
        }
        let candidates = self.pending.iter().filter(|(_, pending)| pending.committing.is_none());
        let id = candidates
            .min_by_key(|(id, pending)| (pending.kind == CheckpointKind::Milestone, **id))
            .map(|(id, _)| *id)?;
        self.pending.remove(&id).map(|pending| (id, pending.kind, pending.holders))
    }

    /// Parts that were read back differ from what was announced, and have to be stored again.
    pub(crate) fn on_parts_damaged(
        &mut self,
        checkpoint: CheckpointId,
        files: &[String],
        why: &str,
        now: Duration,
    ) {
        let Some(pending) = self.pending.get_mut(&checkpoint) else { return };
        pending.committing = None;
        if pending.holders.is_empty() {
            self.pending.remove(&checkpoint);
            return;
        }
        let writer = |name: &String| match pending.parts.get(name)? {
            Part::Written { by, .. } => Some(by.clone()),
            _ => None,
        };
        let writers: BTreeSet<WorkerId> = files.iter().filter_map(writer).collect();
        let again = writers.iter().map(|worker| self.count_failure(checkpoint, worker, why, now)).max();
        let not_before = again.unwrap_or(now);
        let Some(pending) = self.pending.get_mut(&checkpoint) else { return };
        for name in files {
            if let Some(part) = pending.parts.get_mut(name) {
                *part = Part::Unassigned { not_before };
            }
        }
    }

    /// Whether a worker is still needed to store something: it was asked to, or nobody else holds the state.
    pub(crate) fn needs(&self, worker: &WorkerId) -> bool {
        self.pending.values().filter(|pending| pending.committing.is_none()).any(|pending| {
            let asked =
                pending.parts.values().any(|part| matches!(part, Part::Assigned { to, .. } if to == worker));
            asked || (pending.holders.contains(worker) && pending.holders.len() == 1)
        })
    }

    /// Number of waiting states that a worker has announced.
    pub(crate) fn held_by(&self, worker: &WorkerId) -> usize {
        self.pending.values().filter(|pending| pending.holders.contains(worker)).count()
    }

    /// A worker is gone. Its parts can be assigned again, and states that nobody else holds are lost.
    pub(crate) fn on_worker_lost(&mut self, worker: &WorkerId) {
        for pending in self.pending.values_mut() {
            pending.holders.remove(worker);
            unassign(pending, worker, Duration::ZERO);
        }
        self.pending.retain(|_, pending| is_stored(pending) || !pending.holders.is_empty());
        // Whatever failed before, nothing is left to be stored.
        if self.pending.is_empty() {
            self.failing = None;
        }
    }

    /// Checkpoints that have become complete; each is returned once.
    pub(crate) fn take_complete(&mut self, now: Duration) -> Vec<Complete> {
        let mut complete = Vec::new();
        for (&checkpoint, pending) in &mut self.pending {
            if pending.committing.is_some() || now < pending.not_before {
                continue;
            }
            let files: Option<BTreeMap<String, FileEntry>> = pending
                .parts
                .iter()
                .map(|(name, part)| match part {
                    Part::Written { entry, .. } => Some((name.clone(), *entry)),
                    _ => None,
                })
                .collect();
            if let Some(files) = files {
                pending.committing = Some(now);
                complete.push(Complete { checkpoint, kind: pending.kind, state: pending.state, files });
            }
        }
        complete
    }

    /// The manifest could not be stored. [`Self::take_complete`] will return the checkpoint again.
    pub(crate) fn on_commit_failed(&mut self, checkpoint: CheckpointId, why: &str, now: Duration) {
        if let Some(pending) = self.pending.get_mut(&checkpoint) {
            pending.committing = None;
            pending.not_before = now + RETRY_WAIT;
            self.failing.get_or_insert_with(|| (now, why.to_owned()));
        }
    }

    /// A checkpoint is committed. Returns its kind, and the workers that need not hold it any longer.
    pub(crate) fn on_committed(
        &mut self,
        checkpoint: CheckpointId,
    ) -> Option<(CheckpointKind, BTreeSet<WorkerId>)> {
        self.failing = None;
        self.pending.remove(&checkpoint).map(|pending| (pending.kind, pending.holders))
    }

    /// The checkpoints that are not committed yet.
    pub(crate) fn ids(&self) -> impl Iterator<Item = CheckpointId> {
        self.pending.keys().copied()
    }

    /// Whether no checkpoint is waiting.
    pub(crate) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether each checkpoint is stored or held by a worker that can store it.
    pub(crate) fn all_are_held(&self) -> bool {
        self.pending.values().all(|pending| is_stored(pending) || !pending.holders.is_empty())
    }
}

/// Whether all parts are stored, so that nobody needs to hold the state any longer.
fn is_stored(pending: &Pending) -> bool {
    pending.parts.values().all(|part| matches!(part, Part::Written { .. }))
}

fn unassign(pending: &mut Pending, worker: &WorkerId, not_before: Duration) {
    for part in pending.parts.values_mut() {
        if matches!(part, Part::Assigned { to, .. } if to == worker) {
            *part = Part::Unassigned { not_before };
        }
    }
}

#[cfg(test)]
mod tests {
    use ulmus_types::{Generation, Incarnation, StageName, Step};

    use super::*;

    #[test]
    fn a_manifest_that_could_not_be_stored_waits() {
        let worker = WorkerId::new("w", Incarnation::new(1)).unwrap();
        let checkpoint = CheckpointId::new(StageName::pretraining(), Step::new(5), Generation::new(1));
        let (kind, state) = (CheckpointKind::Milestone, Digest::of(b"state"));
        let snapshot = Snapshot { checkpoint, kind, state, files: vec!["a".to_owned()] };
        let mut snapshots = Snapshots::default();
        let now = Duration::from_secs(100);
        snapshots.on_announced(&worker, &snapshot, now).unwrap();
        assert_eq!(snapshots.assign(|_| vec![worker.clone()], &BTreeSet::new(), now).len(), 1);
        let entry = FileEntry { bytes: 1, digest: state };
        snapshots.on_written(checkpoint, &worker, [("a".to_owned(), entry)].into(), now);
        assert_eq!(snapshots.take_complete(now).len(), 1);
        snapshots.on_commit_failed(checkpoint, "no answer", now);
        assert!(snapshots.take_complete(now + RETRY_WAIT / 2).is_empty());
        assert_eq!(snapshots.take_complete(now + RETRY_WAIT).len(), 1);
    }

    #[test]
    fn who_stores_damaged_parts_is_asked_last_and_waits() {
        let worker = |name: &str| WorkerId::new(name, Incarnation::new(1)).unwrap();
        let (first, second) = (worker("first"), worker("second"));
        let checkpoint = CheckpointId::new(StageName::pretraining(), Step::new(5), Generation::new(1));
        let (kind, state) = (CheckpointKind::Milestone, Digest::of(b"state"));
        let snapshot = Snapshot { checkpoint, kind, state, files: vec!["a".to_owned()] };
        let members = [first.clone(), second.clone()];
        let mut snapshots = Snapshots::default();
        let mut now = Duration::from_secs(100);
        for member in &members {
            snapshots.on_announced(member, &snapshot, now).unwrap();
        }
        let mut asked = Vec::new();
        for _ in 0..3 {
            let [(worker, ..)] = &snapshots.assign(|_| members.to_vec(), &BTreeSet::new(), now)[..] else {
                panic!()
            };
            asked.push(worker.clone());
            let entry = FileEntry { bytes: 1, digest: state };
            snapshots.on_written(checkpoint, worker, [("a".to_owned(), entry)].into(), now);
            assert_eq!(snapshots.take_complete(now).len(), 1);
            snapshots.on_parts_damaged(checkpoint, &["a".to_owned()], "a bit was flipped", now);
            if asked.len() > 1 {
                assert!(snapshots.failing().is_some());
                assert!(
                    snapshots.assign(|_| members.to_vec(), &BTreeSet::new(), now).is_empty(),
                    "everybody waits"
                );
                now += RETRY_WAIT;
            }
        }
        assert_eq!(asked[..2], [first, second], "{asked:?}");
    }

    #[test]
    fn a_part_that_one_holder_cannot_store_is_asked_of_another() {
        let worker = |name: &str| WorkerId::new(name, Incarnation::new(1)).unwrap();
        let (able, unable) = (worker("able"), worker("unable"));
        let of = |step| Snapshot {
            checkpoint: CheckpointId::new(StageName::pretraining(), Step::new(step), Generation::new(1)),
            kind: CheckpointKind::Milestone,
            state: Digest::of(b"state"),
            files: vec!["a".to_owned(), "b".to_owned()],
        };
        let nobody = BTreeSet::new();
        let members = [able.clone(), unable.clone()];
        let mut snapshots = Snapshots::default();
        let now = Duration::from_secs(100);
        for member in &members {
            snapshots.on_announced(member, &of(5), now).unwrap();
        }
        let asked = snapshots.assign(|_| members.to_vec(), &nobody, now);
        assert_eq!(asked.len(), 2, "the work is shared: {asked:?}");
        let failed = of(5).checkpoint;
        snapshots.on_write_failed(failed, &unable, "no space", now);
        let again = snapshots.assign(|_| members.to_vec(), &nobody, now);
        assert_eq!(again, [(able.clone(), failed, vec!["b".to_owned()])], "at once, and of the other one");
        assert!(snapshots.failing().is_none(), "somebody can store");
        // It is not asked for parts of the next checkpoint, until it has stored something.
        for member in &members {
            snapshots.on_announced(member, &of(10), now).unwrap();
        }
        let next = snapshots.assign(|_| members.to_vec(), &nobody, now);
        assert!(next.iter().all(|(worker, ..)| *worker == able), "{next:?}");
        // When nobody can, that is an alarm, and the oldest state is given up for the sake of training.
        snapshots.on_write_failed(failed, &able, "no space", now);
        let (since, why) = snapshots.failing().unwrap();
        assert_eq!((*since, why.as_str()), (now, "no space"));
        assert!(snapshots.give_up(now).is_none(), "it may pass");
        let (given_up, _, holders) = snapshots.give_up(now + FAILING_FOR).unwrap();
        assert_eq!((given_up, holders.len()), (failed, 2));
    }

    #[test]
    fn a_part_that_takes_too_long_is_asked_of_another() {
        let worker = |name: &str| WorkerId::new(name, Incarnation::new(1)).unwrap();
        let members = [worker("a"), worker("b")];
        let checkpoint = CheckpointId::new(StageName::pretraining(), Step::new(5), Generation::new(1));
        let (kind, state) = (CheckpointKind::Recovery, Digest::of(b"state"));
        let snapshot = Snapshot { checkpoint, kind, state, files: vec!["a".to_owned()] };
        let mut snapshots = Snapshots::default();
        let now = Duration::from_secs(100);
        for member in &members {
            snapshots.on_announced(member, &snapshot, now).unwrap();
        }
        let (first, ..) = snapshots.assign(|_| members.to_vec(), &BTreeSet::new(), now).remove(0);
        assert!(snapshots.overdue(now + WRITE_WITHIN).is_empty());
        let later = now + WRITE_WITHIN + Duration::from_secs(1);
        assert_eq!(snapshots.overdue(later), [(first.clone(), checkpoint)]);
        let (second, ..) = snapshots.assign(|_| members.to_vec(), &BTreeSet::new(), later).remove(0);
        assert_ne!(first, second);
    }
}
