//! The worker's side of its session, as a pure state machine.
//!
//! It remembers what the coordinator has not confirmed yet (reports, states that wait to be stored, results of
//! jobs), so that nothing is lost when the connection or the coordinator goes away: a session that begins anew
//! says it all again, and saying it twice is harmless.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ulmus_types::{
    CheckpointId, Digest, ErrorKind, Generation, Job, Rank, Snapshot, StepReport, ToCoordinator, ToWorker,
    Wish, WorkerStatus,
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
    /// The last group that the worker was assigned to.
    assigned: Option<(Generation, Rank)>,
    /// Whether it is in that group still.
    trains: bool,
    /// Reports that are not confirmed. Rank 0 sends them as they come. Everybody keeps them, and sends them when
    /// a group ends or a connection begins: their rank 0 may have died before it was heard.
    reports: VecDeque<StepReport>,
    /// Whether the coordinator of this connection has been told all of them. Until then new ones wait behind: a
    /// report confirms all before it.
    caught_up: bool,
    /// States that are to be stored, and what the coordinator is told of them once they are hashed.
    held: BTreeMap<CheckpointId, (Arc<Held>, Option<Snapshot>)>,
    /// That the worker left its group. It is said after what it keeps is announced: a coordinator that hears of
    /// a finished group and knows of no state to store would have the last steps trained again.
    left: Option<ToCoordinator>,
    /// The job that the worker does, or whose result waits to be told.
    job: Option<Job>,
    result: Option<ToCoordinator>,
}

impl Session {
    /// What the worker is doing, for its hello.
    pub(crate) fn status(&self) -> WorkerStatus {
        match (self.assigned, &self.job) {
            (Some((generation, _)), _) if self.trains => WorkerStatus::Training(generation),
            (_, Some(job)) => WorkerStatus::Working(job.clone()),
            _ => WorkerStatus::Idle,
        }
    }

    /// Takes a message of the coordinator.
    pub(crate) fn received(&mut self, message: ToWorker) -> Vec<Action> {
        match message {
            ToWorker::Welcome { plan, store, nonce_path, .. } => {
                vec![Action::Open { plan, store, nonce_path }]
            }
            ToWorker::Refused { kind, reason } => vec![Action::Refused(kind, reason)],
            ToWorker::Assign(assignment) => {
                self.assigned = Some((assignment.generation, assignment.rank));
                self.trains = true;
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
            ToWorker::Run(job) => {
                self.job = Some(job.clone());
                vec![Action::Command(Command::Do(job))]
            }
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
                match self.assigned {
                    Some((generation, rank)) if rank == Rank::new(0) && self.caught_up => {
                        vec![Action::Say(ToCoordinator::Steps { generation, reports })]
                    }
                    _ => Vec::new(),
                }
            }
            Report::Say(message) => match message {
                ToCoordinator::Ready(fingerprint) => {
                    self.fingerprint = Some(fingerprint);
                    self.opened().unwrap_or_default()
                }
                ToCoordinator::Left { .. } => {
                    self.left = Some(message);
                    self.leave()
                }
                ToCoordinator::JobDone { .. } | ToCoordinator::JobFailed { .. } if !self.caught_up => {
                    self.result = Some(message);
                    Vec::new()
                }
                // Should it get lost on its way, the job is done once more.
                ToCoordinator::JobDone { .. } | ToCoordinator::JobFailed { .. } => {
                    self.job = None;
                    vec![Action::Say(message)]
                }
                message => vec![Action::Say(message)],
            },
        }
    }

    /// A state was hashed.
    pub(crate) fn hashed(&mut self, snapshot: Snapshot) -> Vec<Action> {
        let Some((_, announced)) = self.held.get_mut(&snapshot.checkpoint) else { return Vec::new() };
        *announced = Some(snapshot.clone());
        let mut actions = self.say_after_reports(ToCoordinator::Snapshot(snapshot));
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
            && self.assigned.is_some_and(|(of, _)| of == *generation)
        {
            self.trains = false;
        }
        self.say_after_reports(message)
    }

    /// A connection begins or ends; the coordinator of the next one may have heard nothing.
    pub(crate) fn unheard(&mut self) {
        self.caught_up = false;
    }

    /// The run was opened. A worker that is ready already says so at once, though its trainer may be busy.
    pub(crate) fn opened(&mut self) -> Option<Vec<Action>> {
        let ready = ToCoordinator::Ready(self.fingerprint?);
        self.caught_up = true;
        let mut said = self.unconfirmed();
        said.push(ready);
        if let Some(result) = self.result.take() {
            self.job = None;
            said.push(result);
        }
        Some(said.into_iter().map(Action::Say).collect())
    }

    /// Everything that the coordinator may not have heard.
    fn unconfirmed(&self) -> Vec<ToCoordinator> {
        let states =
            self.held.values().filter_map(|(_, snapshot)| snapshot.clone()).map(ToCoordinator::Snapshot);
        self.unsent_reports().into_iter().chain(states).collect()
    }

    /// Reports come before a state that will be stored, and before the end of a group: what the next group
    /// begins with must not be ahead of what the coordinator knows, for all who know more may die.
    fn say_after_reports(&self, message: ToCoordinator) -> Vec<Action> {
        let reports = self.unsent_reports().filter(|_| self.caught_up);
        reports.into_iter().chain([message]).map(Action::Say).collect()
    }

    fn unsent_reports(&self) -> Option<ToCoordinator> {
        let (generation, _) = self.assigned?;
        let reports: Vec<StepReport> = self.reports.iter().cloned().collect();
        (!reports.is_empty()).then_some(ToCoordinator::Steps { generation, reports })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::Semaphore;
    use ulmus_checkpoint::TrainState;
    use ulmus_model::{Layout, State};
    use ulmus_plan::ModelConfig;
    use ulmus_types::{Assignment, CheckpointKind, Incarnation, LeaveReason, Peer, Step, WorkerId};

    use super::*;

    fn assignment(generation: u64, rank: u32) -> ToWorker {
        let peer = Peer { address: String::new(), worker: WorkerId::new("w", Incarnation::new(1)).unwrap() };
        ToWorker::Assign(Assignment {
            generation: Generation::new(generation),
            rank: Rank::new(rank),
            size: 2,
            previous: peer.clone(),
            next: peer,
            micro_batches: 0..1,
        })
    }

    fn steps(generation: u64, step: u64) -> Report {
        let report = StepReport {
            step: Step::new(step),
            tokens: step,
            loss: 1.0,
            z_loss: 0.0,
            grad_norm: 1.0,
            lr: 0.1,
            held_out_loss: None,
            elapsed: Duration::ZERO,
            data_wait: Duration::ZERO,
            communication: Duration::ZERO,
        };
        let generation = Generation::new(generation);
        Report::Say(ToCoordinator::Steps { generation, reports: vec![report] })
    }

    fn left(generation: u64) -> Report {
        let (generation, step, reason) = (Generation::new(generation), Step::new(9), LeaveReason::Finished);
        Report::Say(ToCoordinator::Left { generation, step, reason })
    }

    fn held(step: u64) -> Arc<Held> {
        let config =
            ModelConfig { num_transformer_layers: 1, model_dim: 8, head_dim: 8, ..ModelConfig::default() };
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        Arc::new(Held {
            checkpoint: CheckpointId::new(Step::new(step), Generation::new(1)),
            kind: CheckpointKind::Milestone,
            layout: Arc::new(Layout::new(&config)),
            tensors: State { weights: vec![1.0], first_moment: vec![], second_moment: vec![] }.into(),
            train: TrainState {
                step: Step::new(step),
                tokens: 0,
                quantum: 1.0,
                cursors: vec![],
                quarantine: std::collections::BTreeSet::new(),
            },
            _room: room,
        })
    }

    fn said(actions: &[Action]) -> Vec<&ToCoordinator> {
        actions
            .iter()
            .filter_map(|action| match action {
                Action::Say(message) => Some(message),
                _ => None,
            })
            .collect()
    }

    fn reported_steps(actions: &[Action]) -> Vec<u64> {
        said(actions)
            .into_iter()
            .filter_map(|message| match message {
                ToCoordinator::Steps { reports, .. } => Some(reports.iter().map(|report| report.step.get())),
                _ => None,
            })
            .flatten()
            .collect()
    }

    fn ready() -> Session {
        let mut session = Session::default();
        session.reported(Report::Say(ToCoordinator::Ready(Digest::of(b"arithmetic"))));
        session
    }

    #[test]
    fn a_new_report_waits_behind_those_that_were_not_confirmed() {
        let mut session = ready();
        session.received(assignment(1, 0));
        session.reported(steps(1, 1));
        session.unheard();
        assert!(session.reported(steps(1, 2)).is_empty());
        assert_eq!(reported_steps(&session.opened().unwrap()), [1, 2]);
        assert_eq!(reported_steps(&session.reported(steps(1, 3))), [3]);
    }

    #[test]
    fn steps_of_a_group_that_ended_unheard_are_reported_later() {
        let mut session = ready();
        session.received(assignment(1, 0));
        session.reported(steps(1, 1));
        session.unheard();
        session.reported(steps(1, 2));
        session.reported(left(1));
        assert_eq!(session.status(), WorkerStatus::Idle);
        assert_eq!(reported_steps(&session.opened().unwrap()), [1, 2]);
    }

    #[test]
    fn rank_0_reports_and_at_the_end_everybody_tells_what_it_may_not_have_told() {
        let mut leader = ready();
        leader.received(assignment(1, 0));
        assert_eq!(reported_steps(&leader.reported(steps(1, 1))), [1]);

        let mut other = ready();
        other.received(assignment(1, 1));
        assert!(other.reported(steps(1, 1)).is_empty());
        assert!(other.reported(steps(1, 2)).is_empty());
        other.received(ToWorker::Acknowledge(Step::new(1)));
        let last = other.reported(left(1));
        assert!(matches!(said(&last)[..], [ToCoordinator::Steps { .. }, ToCoordinator::Left { .. }]));
        assert_eq!(reported_steps(&last), [2]);
    }

    #[test]
    fn a_worker_leaves_only_after_what_it_keeps_is_announced() {
        let mut session = Session::default();
        session.received(assignment(1, 0));
        let state = held(9);
        assert!(matches!(session.reported(Report::Keep(Arc::clone(&state)))[..], [Action::Hash(_)]));
        assert!(session.reported(left(1)).is_empty());
        assert_eq!(session.status(), WorkerStatus::Training(Generation::new(1)));
        let actions = session.hashed(state.announce());
        assert!(matches!(said(&actions)[..], [ToCoordinator::Snapshot(_), ToCoordinator::Left { .. }]));
        assert_eq!(session.status(), WorkerStatus::Idle);
    }

    #[test]
    fn a_new_connection_hears_again_what_was_not_confirmed() {
        let mut session = Session::default();
        assert!(session.opened().is_none(), "it is not ready yet");
        session.reported(Report::Say(ToCoordinator::Ready(Digest::of(b"arithmetic"))));
        session.received(assignment(1, 0));
        session.reported(steps(1, 1));
        let state = held(1);
        session.reported(Report::Keep(Arc::clone(&state)));
        session.hashed(state.announce());
        let again = session.opened().unwrap();
        assert!(matches!(
            said(&again)[..],
            [ToCoordinator::Steps { .. }, ToCoordinator::Snapshot(_), ToCoordinator::Ready(_)]
        ));
        session.received(ToWorker::Acknowledge(Step::new(1)));
        session.received(ToWorker::Release(state.checkpoint));
        assert_eq!(said(&session.opened().unwrap()).len(), 1);
    }

    #[test]
    fn the_result_of_a_job_waits_for_somebody_to_hear_it() {
        let mut session = ready();
        let job = Job::Export;
        let done = ToCoordinator::JobDone { job: job.clone(), result: "{}".into() };
        session.received(ToWorker::Run(job.clone()));
        session.unheard();
        assert!(session.reported(Report::Say(done.clone())).is_empty());
        assert_eq!(session.status(), WorkerStatus::Working(job));
        let again = session.opened().unwrap();
        assert_eq!(said(&again).last(), Some(&&done));
        assert_eq!(session.status(), WorkerStatus::Idle);
    }

    #[test]
    fn what_is_not_held_any_more_cannot_be_written() {
        let mut session = Session::default();
        let checkpoint = CheckpointId::new(Step::new(1), Generation::new(1));
        let actions = session.received(ToWorker::Write { checkpoint, files: vec!["a".into()] });
        assert!(matches!(said(&actions)[..], [ToCoordinator::WriteFailed { .. }]));
    }
}
