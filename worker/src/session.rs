//! The worker's side of its session, as a pure state machine.
//!
//! It remembers what the coordinator has not confirmed yet (reports, states that wait to be stored, results of
//! jobs), so that nothing is lost when the connection or the coordinator goes away: a session that begins anew
//! says it all again, and saying it twice is harmless.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ulmus_types::{
    CheckpointId, Digest, ErrorKind, Generation, Rank, Snapshot, StepReport, ToCoordinator, ToWorker, Wish,
    WorkerStatus,
};

use crate::snapshot::Held;
use crate::trainer::{Command, Report};

/// What the shell has to do.
#[derive(Debug)]
pub(crate) enum Action {
    /// Send a message, if there is a connection.
    Say(ToCoordinator),
    /// Open the run: read the nonce, and build the model.
    Open {
        /// The resolved plan, TOML.
        plan: String,
        /// The run's folder.
        store: String,
        /// The file to read there.
        nonce_path: String,
    },
    /// Hand something to the trainer.
    Command(Command),
    /// Leave the group of this generation.
    Abort(Generation),
    /// Pass a wish on.
    Wish(Generation, Wish),
    /// Hash a state, then call [`Session::hashed`].
    Hash(Arc<Held>),
    /// Store parts of a state, then say so.
    Write(Arc<Held>, Vec<String>),
    /// The run is over.
    Leave,
    /// The coordinator does not want this worker.
    Refused(ErrorKind, String),
}

/// What is remembered from one connection to the next.
#[derive(Debug, Default)]
pub(crate) struct Session {
    fingerprint: Option<Digest>,
    /// The group that the worker was assigned to and has not left.
    group: Option<(Generation, Rank)>,
    /// Reports that are not confirmed. Everybody keeps them; rank 0 sends them.
    reports: VecDeque<StepReport>,
    /// States that are to be stored, and what the coordinator is told of them once they are hashed.
    held: BTreeMap<CheckpointId, (Arc<Held>, Option<Snapshot>)>,
    /// That the worker left its group. It is said after what it keeps is announced: a coordinator that hears of
    /// a finished group and knows of no state to store would have the last steps trained again.
    left: Option<ToCoordinator>,
}

impl Session {
    /// What the worker is doing, for its hello.
    pub(crate) fn status(&self) -> WorkerStatus {
        self.group.map_or(WorkerStatus::Idle, |(generation, _)| WorkerStatus::Training(generation))
    }

    /// Takes a message of the coordinator.
    pub(crate) fn received(&mut self, message: ToWorker) -> Vec<Action> {
        match message {
            ToWorker::Welcome { plan, store, nonce_path, .. } => {
                vec![Action::Open { plan, store, nonce_path }]
            }
            ToWorker::Refused { kind, reason } => vec![Action::Refused(kind, reason)],
            ToWorker::Assign(assignment) => {
                self.group = Some((assignment.generation, assignment.rank));
                vec![Action::Command(Command::Train(assignment))]
            }
            ToWorker::Abort(generation) => vec![Action::Abort(generation)],
            ToWorker::Wish(generation, wish) => vec![Action::Wish(generation, wish)],
            ToWorker::Acknowledge(step) => {
                while self.reports.front().is_some_and(|report| report.step <= step) {
                    self.reports.pop_front();
                }
                Vec::new()
            }
            ToWorker::Write { checkpoint, files } => {
                if let Some((held, _)) = self.held.get(&checkpoint) {
                    vec![Action::Write(Arc::clone(held), files)]
                } else {
                    let message = "this worker does not hold it any more".to_owned();
                    vec![Action::Say(ToCoordinator::WriteFailed { checkpoint, message })]
                }
            }
            ToWorker::Release(checkpoint) => {
                self.held.remove(&checkpoint);
                Vec::new()
            }
            ToWorker::Run(job) => vec![Action::Command(Command::Do(job))],
            ToWorker::Finish => vec![Action::Leave],
        }
    }

    /// Takes a report of the trainer.
    pub(crate) fn reported(&mut self, report: Report) -> Vec<Action> {
        match report {
            Report::Keep(held) => {
                self.held.insert(held.checkpoint, (Arc::clone(&held), None));
                vec![Action::Hash(held)]
            }
            Report::Say(ToCoordinator::Steps { reports, .. }) => {
                self.reports.extend(reports.iter().cloned());
                self.leads().map_or_else(Vec::new, |generation| {
                    vec![Action::Say(ToCoordinator::Steps { generation, reports })]
                })
            }
            Report::Say(message) => {
                let mut actions = Vec::new();
                match &message {
                    ToCoordinator::Ready(fingerprint) => {
                        self.fingerprint = Some(*fingerprint);
                        return self.opened().unwrap_or_default();
                    }
                    ToCoordinator::Formed { .. } => {
                        actions.push(Action::Say(message));
                        // The rank 0 before may have died with reports that only its group has seen.
                        actions.extend(self.unsent_reports().map(Action::Say));
                        return actions;
                    }
                    ToCoordinator::Left { .. } => {
                        self.left = Some(message);
                        return self.leave();
                    }
                    _ => {}
                }
                actions.push(Action::Say(message));
                actions
            }
        }
    }

    /// A state was hashed.
    pub(crate) fn hashed(&mut self, snapshot: Snapshot) -> Vec<Action> {
        let Some((_, announced)) = self.held.get_mut(&snapshot.checkpoint) else { return Vec::new() };
        *announced = Some(snapshot.clone());
        let mut actions = vec![Action::Say(ToCoordinator::Snapshot(snapshot))];
        actions.extend(self.leave());
        actions
    }

    /// Says that the worker left its group, once everything that it keeps is announced.
    fn leave(&mut self) -> Vec<Action> {
        if self.held.values().any(|(_, announced)| announced.is_none()) {
            return Vec::new();
        }
        let Some(message) = self.left.take() else { return Vec::new() };
        if let ToCoordinator::Left { generation, .. } = &message
            && self.group.is_some_and(|(of, _)| of == *generation)
        {
            self.group = None;
        }
        vec![Action::Say(message)]
    }

    /// The run was opened. A worker that is ready already says so at once, though its trainer may be busy.
    pub(crate) fn opened(&self) -> Option<Vec<Action>> {
        let ready = ToCoordinator::Ready(self.fingerprint?);
        let messages = std::iter::once(ready).chain(self.unconfirmed());
        Some(messages.map(Action::Say).collect())
    }

    /// The generation, if this worker is the one that reports for its group.
    fn leads(&self) -> Option<Generation> {
        self.group.filter(|(_, rank)| *rank == Rank::new(0)).map(|(generation, _)| generation)
    }

    /// Everything that the coordinator may not have heard.
    fn unconfirmed(&self) -> Vec<ToCoordinator> {
        let states =
            self.held.values().filter_map(|(_, snapshot)| snapshot.clone()).map(ToCoordinator::Snapshot);
        self.unsent_reports().into_iter().chain(states).collect()
    }

    fn unsent_reports(&self) -> Option<ToCoordinator> {
        let generation = self.leads()?;
        let reports: Vec<StepReport> = self.reports.iter().cloned().collect();
        (!reports.is_empty()).then_some(ToCoordinator::Steps { generation, reports })
    }
}
