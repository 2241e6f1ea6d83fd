//! States on their way to the store, and what becomes of checkpoints that are there.

use std::collections::BTreeSet;
use std::time::Duration;

use ulmus_types::{
    CheckpointId, CheckpointKind, ErrorKind, ExitStatus, Snapshot, ToWorker, WorkerId, for_people,
};

use crate::coordinator::{Coordinator, TEXT_LIMIT};
use crate::effect::{Effect, Notification};
use crate::group::Group;

impl Coordinator {
    pub(crate) fn on_snapshot(&mut self, worker: &WorkerId, snapshot: &Snapshot, now: Duration) {
        let checkpoint = snapshot.checkpoint;
        if self.checkpoints.contains_key(&checkpoint) {
            return self.send(worker, ToWorker::Release(checkpoint));
        }
        self.saved_at = now;
        if let Err(others) = self.snapshots.announced(worker, snapshot, now) {
            let others: Vec<&str> = others.iter().map(WorkerId::name).collect();
            let message = format!(
                "{} holds another state of {checkpoint} than {}: one of them computes wrongly; check their memory and start again from the checkpoint before",
                worker.name(),
                others.join(", ")
            );
            self.exit(ExitStatus::Corrupt, message);
        }
    }

    /// Asks holders for parts, and commits what is complete.
    pub(crate) fn assign_parts(&mut self, now: Duration) {
        let training = match &self.group {
            Group::Training { members, .. } => members.clone(),
            _ => Vec::new(),
        };
        let leaving: BTreeSet<WorkerId> =
            self.members.iter().filter(|(_, member)| member.draining).map(|(id, _)| id.clone()).collect();
        for (worker, checkpoint, files) in self.snapshots.assign(&training, &leaving, now) {
            self.send(&worker, ToWorker::Write { checkpoint, files });
        }
        for complete in self.snapshots.complete(now) {
            let crate::snapshots::Complete { checkpoint, kind, state, files } = complete;
            self.effect(Effect::Commit { checkpoint, kind, state, files });
        }
    }

    pub(crate) fn on_write_failed(
        &mut self,
        worker: &WorkerId,
        checkpoint: CheckpointId,
        kind: ErrorKind,
        message: &str,
        now: Duration,
    ) {
        let message = for_people(message, TEXT_LIMIT);
        self.snapshots.write_failed(checkpoint, worker, &message, now);
        let advice = match kind {
            ErrorKind::Retry => "trying again",
            _ => "others are asked; free space or give it the right to write there",
        };
        let text = format!("{} could not store its part of {checkpoint}: {message}; {advice}", worker.name());
        self.emit(Notification::Info(text));
    }

    pub(crate) fn on_commit_failed(
        &mut self,
        checkpoint: CheckpointId,
        kind: ErrorKind,
        why: &str,
        now: Duration,
    ) {
        self.snapshots.commit_failed(checkpoint, why, now);
        match kind {
            // Another coordinator has written there, or something that cannot be: no second try changes it.
            ErrorKind::Fenced | ErrorKind::Refused | ErrorKind::Corrupt => {
                self.exit(kind.into(), format!("manifest of {checkpoint} not stored: {why}"));
            }
            _ => self.emit(Notification::Info(format!(
                "manifest of {checkpoint} not stored, trying again: {why}"
            ))),
        }
    }

    pub(crate) fn on_committed(&mut self, checkpoint: CheckpointId, now: Duration) {
        let Some((kind, holders)) = self.snapshots.committed(checkpoint) else { return };
        self.checkpoints.insert(checkpoint, kind);
        self.committed_at = now;
        self.had_checkpoints = true;
        self.effect(Effect::SaveCommitted(checkpoint));
        for worker in holders {
            self.send(&worker, ToWorker::Release(checkpoint));
        }
        if std::mem::take(&mut self.storing_alarmed) {
            self.emit(Notification::Info("checkpoints can be stored again".to_owned()));
        }
        self.emit(Notification::Checkpoint(checkpoint, kind));
        self.retire_recovery();
    }

    /// Keeps the newest two recovery checkpoints.
    fn retire_recovery(&mut self) {
        let recovery: Vec<CheckpointId> = self
            .checkpoints
            .iter()
            .filter(|(_, kind)| **kind == CheckpointKind::Recovery)
            .map(|(id, _)| *id)
            .collect();
        for id in &recovery[..recovery.len().saturating_sub(2)] {
            self.checkpoints.remove(id);
            self.effect(Effect::Delete(*id));
        }
    }

    /// A committed checkpoint is damaged. It does not exist any more; a milestone that will be averaged is trained again
    /// when all others are done, from the one before it.
    pub(crate) fn on_damaged(&mut self, checkpoint: CheckpointId, why: &str) {
        let Some(kind) = self.checkpoints.remove(&checkpoint) else { return };
        self.effect(Effect::SaveDamaged(checkpoint));
        let consequence = match kind {
            CheckpointKind::Milestone => "it counts as absent, and is trained again if it is to be averaged",
            CheckpointKind::Recovery => "it counts as absent",
        };
        self.emit(Notification::Alarm(format!("{why}; {consequence}")));
    }

    /// What is to be done about a store that takes nothing.
    pub(crate) fn watch_storing(&mut self, now: Duration) {
        for (worker, checkpoint) in self.snapshots.overdue(now) {
            let text = format!(
                "{} takes too long to store its part of {checkpoint}; others are asked",
                worker.name()
            );
            self.emit(Notification::Info(text));
        }
        let Some((since, why)) = self.snapshots.failing().cloned() else { return };
        if !self.storing_alarmed {
            self.storing_alarmed = true;
            self.emit(Notification::Alarm(format!(
                "nothing can be stored: {why}; training goes on until the newest stored state is {} old",
                humantime(self.settings.max_age)
            )));
        }
        if let Some((checkpoint, kind, holders)) = self.snapshots.give_up(now) {
            for worker in holders {
                self.send(&worker, ToWorker::Release(checkpoint));
            }
            let consequence = match kind {
                CheckpointKind::Milestone => "it is trained again if it is to be averaged",
                CheckpointKind::Recovery => "newer ones replace it",
            };
            self.emit(Notification::Alarm(format!(
                "the state of {checkpoint} is given up, so that training goes on; {consequence}"
            )));
        }
        let oldest = self.committed_at.max(since.saturating_sub(self.settings.recovery));
        if now.saturating_sub(oldest) > self.settings.max_age {
            let message = format!(
                "nothing could be stored for {}: {why}; make sure that {} takes files, then start the same command again",
                humantime(now.saturating_sub(since)),
                self.settings.store
            );
            self.exit(ExitStatus::Failed, message);
        }
    }
}

/// A duration in whole seconds, as a person writes it.
pub(crate) fn humantime(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 60, seconds % 60) {
        (0, seconds) => format!("{seconds} s"),
        (minutes, 0) => format!("{minutes} min"),
        (minutes, seconds) => format!("{minutes} min {seconds} s"),
    }
}
