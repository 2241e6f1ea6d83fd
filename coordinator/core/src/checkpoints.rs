//! Storing checkpoints, and dealing with those that are damaged or no longer needed.

use std::collections::BTreeSet;
use std::time::Duration;

use ulmus_types::{
    CheckpointId, CheckpointKind, ErrorKind, ExitStatus, Snapshot, ToWorker, WorkerId, for_people,
};

use crate::effect::{Effect, Notification};
use crate::group::Group;
use crate::state::{Coordinator, TEXT_LIMIT};

impl Coordinator {
    pub(crate) fn on_snapshot(&mut self, worker: &WorkerId, snapshot: &Snapshot, now: Duration) {
        let checkpoint = snapshot.checkpoint;
        let training = self.training(checkpoint.training());
        if training.is_some_and(|training| training.record.checkpoints.contains_key(&checkpoint)) {
            return self.send(worker, ToWorker::Release(checkpoint));
        }
        self.saved_at = now;
        if let Err(others) = self.snapshots.on_announced(worker, snapshot, now) {
            let others: Vec<&str> = others.iter().map(WorkerId::name).collect();
            let message = format!(
                "{} holds a different state of {checkpoint} from {}: one of them computes wrongly; check their memory, then start again from the previous checkpoint",
                worker.name(),
                others.join(", ")
            );
            self.exit(ExitStatus::Corrupt, message);
        }
    }

    /// Asks holders to store parts, and commits checkpoints that are complete.
    pub(crate) fn assign_parts(&mut self, now: Duration) {
        let training = match &self.group {
            Group::Training { members, .. } => members.clone(),
            _ => Vec::new(),
        };
        let leaving: BTreeSet<WorkerId> =
            self.members.iter().filter(|(_, member)| member.draining).map(|(id, _)| id.clone()).collect();
        let announce = |checkpoint: CheckpointId| -> Vec<WorkerId> {
            let had = self.rosters.get(&checkpoint.generation());
            training
                .iter()
                .filter(|worker| had.is_some_and(|had| had.members.contains(worker)))
                .cloned()
                .collect()
        };
        let asked = self.snapshots.assign(announce, &leaving, now);
        for (worker, checkpoint, files) in asked {
            self.send(&worker, ToWorker::Write { checkpoint, files });
        }
        for complete in self.snapshots.take_complete(now) {
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
        self.snapshots.on_write_failed(checkpoint, worker, &message, now);
        let advice = match kind {
            ErrorKind::Retry => "trying again",
            _ => "other workers are asked; free some space there, or let the worker write there",
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
        self.snapshots.on_commit_failed(checkpoint, why, now);
        match kind {
            // Another coordinator has written there, or the content is impossible: trying again cannot help.
            ErrorKind::Fenced | ErrorKind::Refused | ErrorKind::Corrupt => {
                self.exit(kind.into(), format!("could not store the manifest of {checkpoint}: {why}"));
            }
            _ => self.emit(Notification::Info(format!(
                "could not store the manifest of {checkpoint}, trying again: {why}"
            ))),
        }
    }

    pub(crate) fn on_committed(&mut self, checkpoint: CheckpointId, now: Duration) {
        let Some((kind, holders)) = self.snapshots.on_committed(checkpoint) else { return };
        let Some(training) = self.training_mut(checkpoint.training()) else { return };
        training.record.checkpoints.insert(checkpoint, kind);
        training.record.had_checkpoints = true;
        let retired = training.retire_recovery();
        self.committed_at = now;
        if kind == CheckpointKind::Milestone {
            // Milestones that are trained again are progress too, and there is an end to them.
            self.futile_groups = 0;
        }
        self.effect(Effect::SaveCommitted(checkpoint));
        for worker in holders {
            self.send(&worker, ToWorker::Release(checkpoint));
        }
        if std::mem::take(&mut self.storing_alarmed) {
            self.emit(Notification::Info("checkpoints can be stored again".to_owned()));
        }
        self.emit(Notification::Checkpoint(checkpoint, kind));
        for id in retired {
            self.effect(Effect::Delete(id));
        }
    }

    /// A committed checkpoint is damaged and counts as missing. A milestone that the average needs is trained again,
    /// from the one before it, after all other training is done.
    pub(crate) fn on_damaged(&mut self, checkpoint: CheckpointId, why: &str) {
        let Some(training) = self.training_mut(checkpoint.training()) else { return };
        let Some(kind) = training.record.checkpoints.remove(&checkpoint) else { return };
        training.record.damaged.insert(checkpoint.step());
        self.effect(Effect::SaveDamaged(checkpoint));
        let consequence = match kind {
            CheckpointKind::Milestone => "it counts as missing, and is trained again if the average needs it",
            CheckpointKind::Recovery => "it counts as missing",
        };
        self.emit(Notification::Alarm(format!("{why}; {consequence}")));
    }

    /// Reacts to slow writers, and to a store that cannot be written.
    pub(crate) fn watch_storing(&mut self, now: Duration) {
        for (worker, checkpoint) in self.snapshots.overdue(now) {
            let text = format!(
                "{} takes too long to store its part of {checkpoint}; other workers are asked",
                worker.name()
            );
            self.emit(Notification::Info(text));
        }
        let Some((since, why)) = self.snapshots.failing().cloned() else { return };
        if !self.storing_alarmed {
            self.storing_alarmed = true;
            self.emit(Notification::Alarm(format!(
                "nothing can be stored: {why}; training continues until the newest stored state is {} old",
                whole_seconds(self.settings.max_age)
            )));
        }
        if let Some((checkpoint, kind, holders)) = self.snapshots.give_up(now) {
            for worker in holders {
                self.send(&worker, ToWorker::Release(checkpoint));
            }
            let consequence = match kind {
                CheckpointKind::Milestone => "it is trained again in the end",
                CheckpointKind::Recovery => "newer ones will replace it",
            };
            self.emit(Notification::Alarm(format!(
                "giving up the state of {checkpoint} so that training can continue; {consequence}"
            )));
        }
        let oldest = self.committed_at.max(since.saturating_sub(self.settings.recovery));
        if now.saturating_sub(oldest) > self.settings.max_age {
            let message = format!(
                "nothing could be stored for {}: {why}; make sure that {} can be written, then run the same command again",
                whole_seconds(now.saturating_sub(since)),
                self.settings.store
            );
            self.exit(ExitStatus::Failed, message);
        }
    }
}

/// Formats a duration in whole seconds for a person.
pub(crate) fn whole_seconds(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 60, seconds % 60) {
        (0, seconds) => format!("{seconds} s"),
        (minutes, 0) => format!("{minutes} min"),
        (minutes, seconds) => format!("{minutes} min {seconds} s"),
    }
}
