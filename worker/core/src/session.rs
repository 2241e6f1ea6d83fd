//! The worker's side of its session, as a pure state machine.
//!
//! It remembers what the coordinator has not confirmed yet (reports, states that wait to be stored, results of
//! jobs), so that nothing is lost when the connection or the coordinator goes away: a session that begins anew
//! says it all again, and saying it twice is harmless. All of it is of one run: a coordinator of another one gets
//! nothing of it, and the worker begins there as a new one.

use std::collections::{BTreeMap, VecDeque};

use ulmus_types::{
    Assignment, CheckpointId, Digest, ErrorKind, ExitStatus, Generation, GroupRequest, Job, Rank, Ready,
    RunId, SessionSecret, Snapshot, StepReport, ToCoordinator, ToWorker, WorkerStatus,
};

/// What the trainer has to say.
#[derive(Debug)]
pub enum Report<S> {
    /// Something for the coordinator.
    Say(ToCoordinator),
    /// The run was taken up; the fingerprint of this machine's arithmetic.
    Warm(Digest),
    /// A state to be stored, and its handle.
    Keep(CheckpointId, S),
}

/// What the shell has to do.
#[derive(Debug)]
pub enum Action<S> {
    /// Send a message, if there is a connection.
    Say(ToCoordinator),
    /// The coordinator leads another run than the one before: drop what is of that one.
    ChangeRun,
    /// Open the run: read the nonce, and build the model.
    Open {
        /// The run.
        id: RunId,
        /// The resolved plan, TOML.
        plan: String,
        /// The run's folder.
        store: String,
    },
    /// Train in a group of a run.
    Train(RunId, Assignment),
    /// Do a job of a run.
    Do(RunId, Job),
    /// Leave the group of this generation.
    Abort(Generation),
    /// Pass a request on.
    Request(Generation, GroupRequest),
    /// Hash a state, then call [`Session::hashed`].
    Hash(S),
    /// Store parts of a state, then say so.
    Write(S, Vec<String>),
    /// The run is over, or goes on without this worker.
    Leave(ExitStatus),
    /// The run cannot be taken up here.
    GiveUp(ErrorKind, String),
    /// The coordinator does not want this worker.
    Refused(ErrorKind, String),
}

/// How far a connection has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Connection {
    /// There is none.
    #[default]
    Away,
    /// A hello was said. What the worker says before it is answered is heard by nobody.
    Greeting,
    /// The coordinator has answered.
    Welcome,
    /// The run was opened: now the coordinator waits for the worker to be ready.
    Opened,
    /// The coordinator has been told all reports. Until then new ones wait behind: a report confirms all before it.
    CaughtUp,
}

/// What is remembered from one connection to the next.
#[derive(Debug)]
pub struct Session<S> {
    /// The run that it belongs to, and what the welcome there gave it.
    run: Option<(RunId, SessionSecret)>,
    /// It was asked to leave.
    draining: bool,
    fingerprint: Option<Digest>,
    /// The last group that the worker was assigned to.
    assigned: Option<(Generation, Rank)>,
    /// Whether it is in that group still.
    trains: bool,
    /// Reports that are not confirmed. Rank 0 sends them as they come. Everybody keeps them, and sends them when
    /// a group ends or a connection begins: their rank 0 may have died before it was heard.
    reports: VecDeque<StepReport>,
    /// How far the connection has come.
    connection: Connection,
    /// States that are to be stored, and what the coordinator is told of them once they are hashed.
    held: BTreeMap<CheckpointId, (S, Option<Snapshot>)>,
    /// That the worker left its group. It is said after what it keeps is announced: a coordinator that hears of
    /// a finished group and knows of no state to store would have the last steps trained again.
    left: Option<ToCoordinator>,
    /// The job that the worker does, or whose result waits to be told.
    job: Option<Job>,
    result: Option<ToCoordinator>,
}

impl<S> Default for Session<S> {
    fn default() -> Self {
        Self {
            run: None,
            draining: false,
            fingerprint: None,
            assigned: None,
            trains: false,
            reports: VecDeque::new(),
            connection: Connection::default(),
            held: BTreeMap::new(),
            left: None,
            job: None,
            result: None,
        }
    }
}

impl<S: Clone> Session<S> {
    /// What the worker is doing, for its hello. Until that is answered the worker does nothing else, as far as the
    /// coordinator knows.
    pub fn greet(&mut self) -> WorkerStatus {
        self.connection = Connection::Greeting;
        self.status()
    }

    fn is_caught_up(&self) -> bool {
        self.connection == Connection::CaughtUp
    }

    fn status(&self) -> WorkerStatus {
        match (self.assigned, &self.job) {
            (Some((generation, _)), _) if self.trains => WorkerStatus::Training(generation),
            (_, Some(job)) => WorkerStatus::Working(job.clone()),
            _ => WorkerStatus::Idle,
        }
    }

    /// The run that it belongs to, and what proves that.
    pub const fn run(&self) -> Option<(RunId, SessionSecret)> {
        self.run
    }

    /// Whether nothing would be lost if it ended now.
    pub fn is_free(&self) -> bool {
        !self.trains && self.held.is_empty() && self.result.is_none() && self.left.is_none()
    }

    /// It was asked to leave.
    pub fn drain(&mut self) -> Vec<Action<S>> {
        self.draining = true;
        vec![Action::Say(ToCoordinator::Draining)]
    }

    fn welcome(&mut self, id: RunId, secret: SessionSecret) -> Vec<Action<S>> {
        let mut actions = Vec::new();
        if self.run.is_some_and(|(run, _)| run != id) {
            *self = Self { draining: self.draining, ..Self::default() };
            actions.push(Action::ChangeRun);
        }
        self.run = Some((id, secret));
        self.connection = self.connection.max(Connection::Welcome);
        if self.draining {
            actions.push(Action::Say(ToCoordinator::Draining));
        }
        actions.extend(self.leave());
        actions
    }

    /// Takes a message of the coordinator.
    pub fn received(&mut self, message: ToWorker) -> Vec<Action<S>> {
        match message {
            ToWorker::Welcome { id, secret, plan, store, .. } => {
                let mut actions = self.welcome(id, secret);
                actions.push(Action::Open { id, plan, store });
                actions
            }
            ToWorker::Refused { kind, reason } => vec![Action::Refused(kind, reason)],
            ToWorker::Assign(assignment) => {
                self.assigned = Some((assignment.generation, assignment.rank));
                self.trains = true;
                self.of_run(|run| Action::Train(run, assignment))
            }
            ToWorker::Abort(generation) => vec![Action::Abort(generation)],
            ToWorker::Request(generation, request) => vec![Action::Request(generation, request)],
            ToWorker::Acknowledge(step) => {
                while self.reports.front().is_some_and(|report| report.step <= step) {
                    self.reports.pop_front();
                }
                Vec::new()
            }
            ToWorker::Write { checkpoint, files } => {
                if let Some((held, _)) = self.held.get(&checkpoint) {
                    vec![Action::Write(held.clone(), files)]
                } else {
                    let message = "this worker does not hold it any more".to_owned();
                    let kind = ErrorKind::Retry;
                    vec![Action::Say(ToCoordinator::WriteFailed { checkpoint, kind, message })]
                }
            }
            ToWorker::Release(checkpoint) => {
                self.held.remove(&checkpoint);
                Vec::new()
            }
            ToWorker::Run(job) => {
                self.job = Some(job.clone());
                self.of_run(|run| Action::Do(run, job))
            }
            ToWorker::Finish(status) => vec![Action::Leave(status)],
        }
    }

    /// Something to be done for the run. Without a run there is nothing: nobody was welcomed who could be told to.
    fn of_run(&self, action: impl FnOnce(RunId) -> Action<S>) -> Vec<Action<S>> {
        self.run.map(|(run, _)| action(run)).into_iter().collect()
    }

    /// Takes a report of the trainer. What it still has to say of another run is not heard.
    pub fn reported(&mut self, run: RunId, report: Report<S>) -> Vec<Action<S>> {
        if self.run.is_none_or(|(id, _)| id != run) {
            return Vec::new();
        }
        match report {
            Report::Warm(fingerprint) => {
                self.fingerprint = Some(fingerprint);
                self.ready().unwrap_or_default()
            }
            Report::Keep(checkpoint, held) => {
                self.held.insert(checkpoint, (held.clone(), None));
                vec![Action::Hash(held)]
            }
            Report::Say(ToCoordinator::Steps { reports, .. }) => {
                self.reports.extend(reports.iter().cloned());
                match self.assigned {
                    Some((generation, rank)) if rank == Rank::new(0) && self.is_caught_up() => {
                        vec![Action::Say(ToCoordinator::Steps { generation, reports })]
                    }
                    _ => Vec::new(),
                }
            }
            Report::Say(message) => match message {
                ToCoordinator::Unfit { kind, message } => {
                    let said = ToCoordinator::Unfit { kind, message: message.clone() };
                    vec![Action::Say(said), Action::GiveUp(kind, message)]
                }
                ToCoordinator::Left { .. } => {
                    self.left = Some(message);
                    self.leave()
                }
                ToCoordinator::JobDone { .. } | ToCoordinator::JobFailed { .. } if !self.is_caught_up() => {
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
    pub fn hashed(&mut self, snapshot: Snapshot) -> Vec<Action<S>> {
        let Some((_, announced)) = self.held.get_mut(&snapshot.checkpoint) else { return Vec::new() };
        *announced = Some(snapshot.clone());
        let mut actions = self.say_after_reports(ToCoordinator::Snapshot(snapshot));
        actions.extend(self.leave());
        actions
    }

    /// Says that the worker left its group, once everything that it keeps is announced.
    fn leave(&mut self) -> Vec<Action<S>> {
        // Said before the welcome it would be lost, and the hello has said that the worker trains.
        if self.connection == Connection::Greeting
            || self.held.values().any(|(_, announced)| announced.is_none())
        {
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

    /// A connection has ended; the coordinator of the next one may have heard nothing.
    pub fn unheard(&mut self) {
        self.connection = Connection::Away;
    }

    /// The run was opened, and is `known` to the trainer or has to be taken up first. A worker that is ready already says so
    /// at once, though its trainer may be busy.
    pub fn opened(&mut self, known: bool) -> Option<Vec<Action<S>>> {
        self.connection = self.connection.max(Connection::Opened);
        if !known {
            self.fingerprint = None;
        }
        self.ready()
    }

    fn ready(&mut self) -> Option<Vec<Action<S>>> {
        let fingerprint = self.fingerprint.filter(|_| self.connection >= Connection::Opened)?;
        self.connection = Connection::CaughtUp;
        let ready = ToCoordinator::Ready(Ready {
            fingerprint,
            generation: self.assigned.map(|(generation, _)| generation),
            reports: self.reports.iter().cloned().collect(),
            snapshots: self.held.values().filter_map(|(_, snapshot)| snapshot.clone()).collect(),
        });
        let mut said = vec![ready];
        if let Some(result) = self.result.take() {
            self.job = None;
            said.push(result);
        }
        Some(said.into_iter().map(Action::Say).collect())
    }

    /// Reports come before a state that will be stored, and before the end of a group: what the next group
    /// begins with must not be ahead of what the coordinator knows, for all who know more may die.
    fn say_after_reports(&self, message: ToCoordinator) -> Vec<Action<S>> {
        let reports = self.unsent_reports().filter(|_| self.is_caught_up());
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

    use ulmus_types::{CheckpointKind, GroupKey, Incarnation, LeaveReason, Peer, Step, WorkerId};

    use super::*;

    fn assignment(generation: u64, rank: u32) -> ToWorker {
        let peer = Peer { address: String::new(), worker: WorkerId::new("w", Incarnation::new(1)).unwrap() };
        ToWorker::Assign(Assignment {
            generation: Generation::new(generation),
            rank: Rank::new(rank),
            size: 2,
            key: GroupKey::from_bytes([0; 32]),
            previous: peer.clone(),
            next: peer,
            micro_batches: 0..1,
            recorded: Step::default(),
            may_begin: true,
            repair: None,
        })
    }

    fn steps(generation: u64, step: u64) -> Report<Snapshot> {
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

    fn left(generation: u64) -> Report<Snapshot> {
        let (generation, step, reason) = (Generation::new(generation), Step::new(9), LeaveReason::Finished);
        Report::Say(ToCoordinator::Left { generation, step, reason })
    }

    /// A state, which is its own handle.
    fn held(step: u64) -> Snapshot {
        Snapshot {
            checkpoint: CheckpointId::new(Step::new(step), Generation::new(1)),
            kind: CheckpointKind::Milestone,
            state: Digest::of(&step.to_le_bytes()),
            files: vec!["a".to_owned()],
        }
    }

    fn keep(state: &Snapshot) -> Report<Snapshot> {
        Report::Keep(state.checkpoint, state.clone())
    }

    fn said(actions: &[Action<Snapshot>]) -> Vec<&ToCoordinator> {
        actions
            .iter()
            .filter_map(|action| match action {
                Action::Say(message) => Some(message),
                _ => None,
            })
            .collect()
    }

    fn reported_steps(actions: &[Action<Snapshot>]) -> Vec<u64> {
        said(actions)
            .into_iter()
            .filter_map(|message| match message {
                ToCoordinator::Steps { reports, .. } | ToCoordinator::Ready(Ready { reports, .. }) => {
                    Some(reports.iter().map(|report| report.step.get()))
                }
                _ => None,
            })
            .flatten()
            .collect()
    }

    const RUN: RunId = RunId::from_bytes([1; 16]);

    fn welcome(id: RunId) -> ToWorker {
        ToWorker::Welcome {
            run: "run".parse().unwrap(),
            id,
            secret: SessionSecret::from_bytes([2; 32]),
            plan: String::new(),
            store: "store".to_owned(),
        }
    }

    fn welcomed() -> Session<Snapshot> {
        let mut session = Session::default();
        session.received(welcome(RUN));
        session
    }

    fn ready() -> Session<Snapshot> {
        let mut session = welcomed();
        assert!(session.opened(true).is_none(), "it is not warm yet");
        session.reported(RUN, Report::Warm(Digest::of(b"arithmetic")));
        session
    }

    #[test]
    fn a_worker_that_leaves_between_hello_and_welcome_says_so_after_it() {
        let mut session = ready();
        session.received(assignment(1, 0));
        session.unheard();
        assert_eq!(session.greet(), WorkerStatus::Training(Generation::new(1)));
        assert!(session.reported(RUN, left(1)).is_empty());
        let actions = session.received(welcome(RUN));
        assert!(matches!(said(&actions)[..], [ToCoordinator::Left { .. }]), "{actions:?}");
        assert_eq!(session.status(), WorkerStatus::Idle);
    }

    #[test]
    fn a_worker_that_is_warm_before_it_has_read_the_store_is_ready_after_that() {
        let mut session = welcomed();
        assert!(session.reported(RUN, Report::Warm(Digest::of(b"arithmetic"))).is_empty());
        assert!(matches!(said(&session.opened(true).unwrap())[..], [ToCoordinator::Ready(_)]));
    }

    #[test]
    fn a_new_report_waits_behind_those_that_were_not_confirmed() {
        let mut session = ready();
        session.received(assignment(1, 0));
        session.reported(RUN, steps(1, 1));
        session.unheard();
        assert!(session.reported(RUN, steps(1, 2)).is_empty());
        assert_eq!(reported_steps(&session.opened(true).unwrap()), [1, 2]);
        assert_eq!(reported_steps(&session.reported(RUN, steps(1, 3))), [3]);
    }

    #[test]
    fn steps_of_a_group_that_ended_unheard_are_reported_later() {
        let mut session = ready();
        session.received(assignment(1, 0));
        session.reported(RUN, steps(1, 1));
        session.unheard();
        session.reported(RUN, steps(1, 2));
        session.reported(RUN, left(1));
        assert_eq!(session.status(), WorkerStatus::Idle);
        assert_eq!(reported_steps(&session.opened(true).unwrap()), [1, 2]);
    }

    #[test]
    fn rank_0_reports_and_at_the_end_everybody_tells_what_it_may_not_have_told() {
        let mut leader = ready();
        leader.received(assignment(1, 0));
        assert_eq!(reported_steps(&leader.reported(RUN, steps(1, 1))), [1]);

        let mut other = ready();
        other.received(assignment(1, 1));
        assert!(other.reported(RUN, steps(1, 1)).is_empty());
        assert!(other.reported(RUN, steps(1, 2)).is_empty());
        other.received(ToWorker::Acknowledge(Step::new(1)));
        let last = other.reported(RUN, left(1));
        assert!(matches!(said(&last)[..], [ToCoordinator::Steps { .. }, ToCoordinator::Left { .. }]));
        assert_eq!(reported_steps(&last), [2]);
    }

    #[test]
    fn a_worker_leaves_only_after_what_it_keeps_is_announced() {
        let mut session = welcomed();
        session.received(assignment(1, 0));
        let state = held(9);
        assert!(matches!(session.reported(RUN, keep(&state))[..], [Action::Hash(_)]));
        assert!(session.reported(RUN, left(1)).is_empty());
        assert_eq!(session.status(), WorkerStatus::Training(Generation::new(1)));
        let actions = session.hashed(state.clone());
        assert!(matches!(said(&actions)[..], [ToCoordinator::Snapshot(_), ToCoordinator::Left { .. }]));
        assert_eq!(session.status(), WorkerStatus::Idle);
    }

    #[test]
    fn a_new_connection_hears_again_what_was_not_confirmed() {
        let mut session = welcomed();
        assert!(session.opened(true).is_none(), "it is not ready yet");
        session.reported(RUN, Report::Warm(Digest::of(b"arithmetic")));
        session.received(assignment(1, 0));
        session.reported(RUN, steps(1, 1));
        let state = held(1);
        session.reported(RUN, keep(&state));
        session.hashed(state.clone());
        let again = session.opened(true).unwrap();
        let [ToCoordinator::Ready(ready)] = said(&again)[..] else { panic!("{again:?}") };
        assert_eq!((ready.reports.len(), ready.snapshots.len()), (1, 1));
        session.received(ToWorker::Acknowledge(Step::new(1)));
        session.received(ToWorker::Release(state.checkpoint));
        let again = session.opened(true).unwrap();
        let [ToCoordinator::Ready(ready)] = said(&again)[..] else { panic!("{again:?}") };
        assert!(ready.reports.is_empty() && ready.snapshots.is_empty());
    }

    #[test]
    fn nothing_of_one_run_is_told_to_another() {
        let mut session = ready();
        session.received(assignment(1, 0));
        session.reported(RUN, steps(1, 1));
        let state = held(1);
        session.reported(RUN, keep(&state));
        session.unheard();
        let other = RunId::from_bytes([9; 16]);
        let actions = session.received(welcome(other));
        assert!(matches!(actions[..], [Action::ChangeRun, Action::Open { .. }]), "{actions:?}");
        assert_eq!(session.status(), WorkerStatus::Idle);
        // What its threads still do for the run before is not heard.
        assert!(session.hashed(state.clone()).is_empty());
        assert!(session.reported(RUN, steps(1, 2)).is_empty());
        assert!(session.reported(RUN, left(1)).is_empty());
        assert!(session.opened(true).is_none(), "it is not ready for this run yet");
        let actions = session.reported(other, Report::Warm(Digest::of(b"arithmetic")));
        let [ToCoordinator::Ready(ready)] = said(&actions)[..] else { panic!("{actions:?}") };
        assert_eq!((ready.generation, ready.reports.len(), ready.snapshots.len()), (None, 0, 0));
    }

    #[test]
    fn the_result_of_a_job_waits_for_somebody_to_hear_it() {
        let mut session = ready();
        let job = Job::Export;
        let done = ToCoordinator::JobDone { job: job.clone(), result: "{}".into() };
        session.received(ToWorker::Run(job.clone()));
        session.unheard();
        assert!(session.reported(RUN, Report::Say(done.clone())).is_empty());
        assert_eq!(session.status(), WorkerStatus::Working(job));
        let again = session.opened(true).unwrap();
        assert_eq!(said(&again).last(), Some(&&done));
        assert_eq!(session.status(), WorkerStatus::Idle);
    }

    #[test]
    fn what_is_not_held_any_more_cannot_be_written() {
        let mut session = welcomed();
        let checkpoint = CheckpointId::new(Step::new(1), Generation::new(1));
        let actions = session.received(ToWorker::Write { checkpoint, files: vec!["a".into()] });
        assert!(matches!(said(&actions)[..], [ToCoordinator::WriteFailed { .. }]));
    }
}
