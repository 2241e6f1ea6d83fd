//! The worker's side of its session, as a pure state machine.
//!
//! It remembers everything that the coordinator has not confirmed yet (reports, states that wait to be stored, results
//! of jobs), so that nothing is lost when the connection or the coordinator goes away: after a reconnection it sends
//! everything again, and sending it twice is harmless. All of this belongs to one run: the coordinator of another run
//! is told none of it, and sees a new worker.

use std::collections::{BTreeMap, VecDeque};

use ulmus_types::{
    Assignment, CheckpointId, Digest, ErrorKind, ExitStatus, Generation, GroupRequest, Job, Rank, Ready,
    RunId, SessionSecret, Snapshot, StageName, StepReport, ToCoordinator, ToWorker, WorkerStatus,
};

/// A report from the trainer.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a report is sent on at once")]
pub enum Report<S> {
    /// A message for the coordinator.
    Send(ToCoordinator),
    /// The trainer has joined the run; the fingerprint of this machine's arithmetic, unless it never trains.
    WarmedUp(Option<Digest>),
    /// A state to hold until it is stored, and its handle.
    Hold(CheckpointId, S),
}

/// Something for the shell to do.
#[derive(Debug)]
pub enum Action<S> {
    /// Send a message, if there is a connection.
    Send(ToCoordinator),
    /// The coordinator leads a different run from before: drop everything that belongs to the earlier one.
    ChangeRun,
    /// Open the run: read the nonce, and build the model.
    Open {
        /// The id of the run.
        id: RunId,
        /// The resolved plan, as TOML.
        plan: String,
        /// The run folder, as a URL.
        store: String,
    },
    /// Train in a group of a run.
    Train(RunId, Assignment),
    /// Do a job of a run.
    RunJob(RunId, Job),
    /// Leave the group of this generation.
    Abort(Generation),
    /// Pass a request on to the group.
    Request(Generation, GroupRequest),
    /// Hash a state, then call [`Session::on_hashed`].
    Hash(S),
    /// Store parts of a state, then report that.
    Write(S, Vec<String>),
    /// End the worker: the run is over, or continues without it.
    Exit(ExitStatus),
    /// End the worker: it cannot join the run.
    GiveUp(ErrorKind, String),
    /// The coordinator has refused this worker.
    Refused(ErrorKind, String),
}

/// The progress of a connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Connection {
    /// There is no connection.
    #[default]
    Away,
    /// A hello was sent. The coordinator ignores anything else until it has answered.
    Greeting,
    /// The coordinator has answered.
    Welcome,
    /// The run was opened, and the coordinator waits for the worker to be ready.
    Opened,
    /// All unconfirmed reports were sent. Until then new ones must wait, because confirming a report confirms all
    /// before it.
    CaughtUp,
}

/// The group that a worker was assigned to.
#[derive(Debug, Clone, Copy)]
struct Assigned {
    training: StageName,
    generation: Generation,
    rank: Rank,
}

/// What the worker remembers from one connection to the next.
#[derive(Debug)]
pub struct Session<S> {
    /// The run to which the worker belongs, and the secret from that run's welcome.
    run: Option<(RunId, SessionSecret)>,
    /// Whether the worker was asked to leave.
    draining: bool,
    /// Whether the trainer has joined the run.
    is_warm: bool,
    /// The fingerprint of this machine's arithmetic, once it is known; a worker that never trains has none.
    fingerprint: Option<Digest>,
    /// The last group that the worker was assigned to.
    assigned: Option<Assigned>,
    /// Whether the worker is still in that group.
    trains: bool,
    /// Unconfirmed reports. Rank 0 sends them as they come. All members keep them, and send them when a group ends or a
    /// connection begins: rank 0 may have died before its reports arrived.
    reports: VecDeque<StepReport>,
    /// The progress of the current connection.
    connection: Connection,
    /// States to be stored, and once each is hashed, the snapshot that the coordinator is told of.
    held: BTreeMap<CheckpointId, (S, Option<Snapshot>)>,
    /// The message that the worker left its group. It is sent after all held states are announced: a coordinator that
    /// learns of a finished group but of no state to store would have the last steps trained again.
    left: Option<ToCoordinator>,
    /// The job that the worker is doing, or whose result waits to be sent.
    job: Option<Job>,
    result: Option<ToCoordinator>,
}

impl<S> Default for Session<S> {
    fn default() -> Self {
        Self {
            run: None,
            draining: false,
            is_warm: false,
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
    /// Begins a connection. Returns what the worker is doing, for its hello. Until the coordinator answers, that is
    /// what it believes.
    pub fn greet(&mut self) -> WorkerStatus {
        self.connection = Connection::Greeting;
        self.status()
    }

    fn is_caught_up(&self) -> bool {
        self.connection == Connection::CaughtUp
    }

    fn status(&self) -> WorkerStatus {
        match (self.assigned, &self.job) {
            (Some(group), _) if self.trains => WorkerStatus::Training(group.generation),
            (_, Some(job)) => WorkerStatus::Working(job.clone()),
            _ => WorkerStatus::Idle,
        }
    }

    /// The run to which the worker belongs, and the secret that proves it.
    pub const fn run(&self) -> Option<(RunId, SessionSecret)> {
        self.run
    }

    /// Whether nothing would be lost if the worker ended now.
    pub fn is_free(&self) -> bool {
        !self.trains && self.held.is_empty() && self.result.is_none() && self.left.is_none()
    }

    /// The worker was asked to leave: tells the coordinator, now and on every later connection.
    pub fn drain(&mut self) -> Vec<Action<S>> {
        self.draining = true;
        vec![Action::Send(ToCoordinator::Draining)]
    }

    fn on_welcome(&mut self, id: RunId, secret: SessionSecret) -> Vec<Action<S>> {
        let mut actions = Vec::new();
        if self.run.is_some_and(|(run, _)| run != id) {
            *self = Self { draining: self.draining, ..Self::default() };
            actions.push(Action::ChangeRun);
        }
        self.run = Some((id, secret));
        self.connection = self.connection.max(Connection::Welcome);
        if self.draining {
            actions.push(Action::Send(ToCoordinator::Draining));
        }
        actions.extend(self.leave());
        actions
    }

    /// Handles a message from the coordinator.
    pub fn on_message(&mut self, message: ToWorker) -> Vec<Action<S>> {
        match message {
            ToWorker::Welcome { id, secret, plan, store, .. } => {
                let mut actions = self.on_welcome(id, secret);
                actions.push(Action::Open { id, plan, store });
                actions
            }
            ToWorker::Refused { kind, reason } => vec![Action::Refused(kind, reason)],
            ToWorker::Assign(assignment) => {
                let Assignment { training, generation, rank, .. } = assignment;
                if self.assigned.is_some_and(|before| before.training != training) {
                    // The stage before is over, so all that can be said of it is known.
                    self.reports.clear();
                }
                self.assigned = Some(Assigned { training, generation, rank });
                self.trains = true;
                self.for_run(|run| Action::Train(run, assignment))
            }
            ToWorker::Abort(generation) => vec![Action::Abort(generation)],
            ToWorker::Request(generation, request) => vec![Action::Request(generation, request)],
            ToWorker::Acknowledge(training, step) => {
                let is_of_reports = self.assigned.is_none_or(|group| group.training == training);
                while is_of_reports && self.reports.front().is_some_and(|report| report.step <= step) {
                    self.reports.pop_front();
                }
                Vec::new()
            }
            ToWorker::Write { checkpoint, files } => {
                if let Some((held, _)) = self.held.get(&checkpoint) {
                    vec![Action::Write(held.clone(), files)]
                } else {
                    let message = "this worker no longer holds the state".to_owned();
                    let kind = ErrorKind::Retry;
                    vec![Action::Send(ToCoordinator::WriteFailed { checkpoint, kind, message })]
                }
            }
            ToWorker::Release(checkpoint) => {
                self.held.remove(&checkpoint);
                Vec::new()
            }
            ToWorker::Run(job) => {
                self.job = Some(job.clone());
                self.for_run(|run| Action::RunJob(run, job))
            }
            ToWorker::Finish(status) => vec![Action::Exit(status)],
        }
    }

    /// An action for the run. Without a run there is none, since only a welcomed worker is asked for anything.
    fn for_run(&self, action: impl FnOnce(RunId) -> Action<S>) -> Vec<Action<S>> {
        self.run.map(|(run, _)| action(run)).into_iter().collect()
    }

    /// Handles a report from the trainer. Reports about another run are ignored.
    pub fn on_report(&mut self, run: RunId, report: Report<S>) -> Vec<Action<S>> {
        if self.run.is_none_or(|(id, _)| id != run) {
            return Vec::new();
        }
        match report {
            Report::WarmedUp(fingerprint) => {
                (self.is_warm, self.fingerprint) = (true, fingerprint);
                self.ready().unwrap_or_default()
            }
            Report::Hold(checkpoint, held) => {
                self.held.insert(checkpoint, (held.clone(), None));
                vec![Action::Hash(held)]
            }
            Report::Send(ToCoordinator::Steps { reports, .. }) => {
                self.reports.extend(reports.iter().cloned());
                match self.assigned {
                    Some(Assigned { generation, rank, .. })
                        if rank == Rank::new(0) && self.is_caught_up() =>
                    {
                        vec![Action::Send(ToCoordinator::Steps { generation, reports })]
                    }
                    _ => Vec::new(),
                }
            }
            Report::Send(message) => match message {
                ToCoordinator::Unfit { kind, message } => {
                    let unfit = ToCoordinator::Unfit { kind, message: message.clone() };
                    vec![Action::Send(unfit), Action::GiveUp(kind, message)]
                }
                ToCoordinator::Left { .. } => {
                    self.left = Some(message);
                    self.leave()
                }
                ToCoordinator::JobDone { .. } | ToCoordinator::JobFailed { .. } if !self.is_caught_up() => {
                    self.result = Some(message);
                    Vec::new()
                }
                // If the result is lost on its way, the job is done again.
                ToCoordinator::JobDone { .. } | ToCoordinator::JobFailed { .. } => {
                    self.job = None;
                    vec![Action::Send(message)]
                }
                message => vec![Action::Send(message)],
            },
        }
    }

    /// A held state has been hashed.
    pub fn on_hashed(&mut self, snapshot: Snapshot) -> Vec<Action<S>> {
        let Some((_, announced)) = self.held.get_mut(&snapshot.checkpoint) else { return Vec::new() };
        *announced = Some(snapshot.clone());
        let mut actions = self.send_after_reports(ToCoordinator::Snapshot(snapshot));
        actions.extend(self.leave());
        actions
    }

    /// Reports that the worker left its group, once all held states are announced.
    fn leave(&mut self) -> Vec<Action<S>> {
        // Sent before the welcome it would be lost, and the hello has said that the worker trains.
        if self.connection == Connection::Greeting
            || self.held.values().any(|(_, announced)| announced.is_none())
        {
            return Vec::new();
        }
        let Some(message) = self.left.take() else { return Vec::new() };
        if let ToCoordinator::Left { generation, .. } = &message
            && self.assigned.is_some_and(|group| group.generation == *generation)
        {
            self.trains = false;
        }
        self.send_after_reports(message)
    }

    /// A connection has ended. The next coordinator may have received nothing.
    pub fn on_disconnected(&mut self) {
        self.connection = Connection::Away;
    }

    /// The run was opened. If it is not `known` to the trainer, the trainer has to warm up first. A worker that is
    /// already warm reports ready at once, even if its trainer is busy.
    pub fn on_opened(&mut self, known: bool) -> Option<Vec<Action<S>>> {
        self.connection = self.connection.max(Connection::Opened);
        if !known {
            (self.is_warm, self.fingerprint) = (false, None);
        }
        self.ready()
    }

    fn ready(&mut self) -> Option<Vec<Action<S>>> {
        if !self.is_warm || self.connection < Connection::Opened {
            return None;
        }
        self.connection = Connection::CaughtUp;
        let ready = ToCoordinator::Ready(Ready {
            fingerprint: self.fingerprint,
            generation: self.assigned.map(|group| group.generation),
            reports: self.reports.iter().cloned().collect(),
            snapshots: self.held.values().filter_map(|(_, snapshot)| snapshot.clone()).collect(),
        });
        let mut messages = vec![ready];
        if let Some(result) = self.result.take() {
            self.job = None;
            messages.push(result);
        }
        Some(messages.into_iter().map(Action::Send).collect())
    }

    /// Sends a message after all unconfirmed reports. Reports come before a state that will be stored, and before the
    /// end of a group: the next group must not begin with a state that is ahead of what the coordinator knows, because
    /// every worker that knows more may die.
    fn send_after_reports(&self, message: ToCoordinator) -> Vec<Action<S>> {
        let reports = self.unsent_reports().filter(|_| self.is_caught_up());
        reports.into_iter().chain([message]).map(Action::Send).collect()
    }

    fn unsent_reports(&self) -> Option<ToCoordinator> {
        let generation = self.assigned?.generation;
        let reports: Vec<StepReport> = self.reports.iter().cloned().collect();
        (!reports.is_empty()).then_some(ToCoordinator::Steps { generation, reports })
    }
}

#[cfg(test)]
mod tests {
    use ulmus_types::{CheckpointKind, GroupKey, Incarnation, LeaveReason, Peer, Step, Subject, WorkerId};

    use super::*;

    fn assignment(generation: u64, rank: u32) -> ToWorker {
        let peer = Peer { address: String::new(), worker: WorkerId::new("w", Incarnation::new(1)).unwrap() };
        ToWorker::Assign(Assignment {
            training: StageName::pretraining(),
            from: None,
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
            grad_norm: 1.0,
            lr: 0.1,
            ..StepReport::default()
        };
        let generation = Generation::new(generation);
        Report::Send(ToCoordinator::Steps { generation, reports: vec![report] })
    }

    fn left(generation: u64) -> Report<Snapshot> {
        let (generation, step, reason) = (Generation::new(generation), Step::new(9), LeaveReason::Finished);
        Report::Send(ToCoordinator::Left { generation, step, reason })
    }

    /// A state that serves as its own handle.
    fn held(step: u64) -> Snapshot {
        Snapshot {
            checkpoint: CheckpointId::new(StageName::pretraining(), Step::new(step), Generation::new(1)),
            kind: CheckpointKind::Milestone,
            state: Digest::of(&step.to_le_bytes()),
            files: vec!["a".to_owned()],
        }
    }

    fn keep(state: &Snapshot) -> Report<Snapshot> {
        Report::Hold(state.checkpoint, state.clone())
    }

    fn sent(actions: &[Action<Snapshot>]) -> Vec<&ToCoordinator> {
        actions
            .iter()
            .filter_map(|action| match action {
                Action::Send(message) => Some(message),
                _ => None,
            })
            .collect()
    }

    fn reported_steps(actions: &[Action<Snapshot>]) -> Vec<u64> {
        sent(actions)
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
        session.on_message(welcome(RUN));
        session
    }

    fn ready() -> Session<Snapshot> {
        let mut session = welcomed();
        assert!(session.on_opened(true).is_none(), "it is not warm yet");
        session.on_report(RUN, Report::WarmedUp(Some(Digest::of(b"arithmetic"))));
        session
    }

    #[test]
    fn a_worker_that_leaves_between_hello_and_welcome_says_so_after_it() {
        let mut session = ready();
        session.on_message(assignment(1, 0));
        session.on_disconnected();
        assert_eq!(session.greet(), WorkerStatus::Training(Generation::new(1)));
        assert!(session.on_report(RUN, left(1)).is_empty());
        let actions = session.on_message(welcome(RUN));
        assert!(matches!(sent(&actions)[..], [ToCoordinator::Left { .. }]), "{actions:?}");
        assert_eq!(session.status(), WorkerStatus::Idle);
    }

    #[test]
    fn a_worker_that_is_warm_before_it_has_read_the_store_is_ready_after_that() {
        let mut session = welcomed();
        assert!(session.on_report(RUN, Report::WarmedUp(Some(Digest::of(b"arithmetic")))).is_empty());
        assert!(matches!(sent(&session.on_opened(true).unwrap())[..], [ToCoordinator::Ready(_)]));
    }

    #[test]
    fn a_new_report_waits_behind_those_that_were_not_confirmed() {
        let mut session = ready();
        session.on_message(assignment(1, 0));
        session.on_report(RUN, steps(1, 1));
        session.on_disconnected();
        assert!(session.on_report(RUN, steps(1, 2)).is_empty());
        assert_eq!(reported_steps(&session.on_opened(true).unwrap()), [1, 2]);
        assert_eq!(reported_steps(&session.on_report(RUN, steps(1, 3))), [3]);
    }

    #[test]
    fn steps_of_a_group_that_ended_unheard_are_reported_later() {
        let mut session = ready();
        session.on_message(assignment(1, 0));
        session.on_report(RUN, steps(1, 1));
        session.on_disconnected();
        session.on_report(RUN, steps(1, 2));
        session.on_report(RUN, left(1));
        assert_eq!(session.status(), WorkerStatus::Idle);
        assert_eq!(reported_steps(&session.on_opened(true).unwrap()), [1, 2]);
    }

    #[test]
    fn rank_0_reports_and_at_the_end_everybody_tells_what_it_may_not_have_told() {
        let mut leader = ready();
        leader.on_message(assignment(1, 0));
        assert_eq!(reported_steps(&leader.on_report(RUN, steps(1, 1))), [1]);

        let mut other = ready();
        other.on_message(assignment(1, 1));
        assert!(other.on_report(RUN, steps(1, 1)).is_empty());
        assert!(other.on_report(RUN, steps(1, 2)).is_empty());
        other.on_message(ToWorker::Acknowledge(StageName::pretraining(), Step::new(1)));
        let last = other.on_report(RUN, left(1));
        assert!(matches!(sent(&last)[..], [ToCoordinator::Steps { .. }, ToCoordinator::Left { .. }]));
        assert_eq!(reported_steps(&last), [2]);
    }

    #[test]
    fn a_worker_leaves_only_after_what_it_keeps_is_announced() {
        let mut session = welcomed();
        session.on_message(assignment(1, 0));
        let state = held(9);
        assert!(matches!(session.on_report(RUN, keep(&state))[..], [Action::Hash(_)]));
        assert!(session.on_report(RUN, left(1)).is_empty());
        assert_eq!(session.status(), WorkerStatus::Training(Generation::new(1)));
        let actions = session.on_hashed(state.clone());
        assert!(matches!(sent(&actions)[..], [ToCoordinator::Snapshot(_), ToCoordinator::Left { .. }]));
        assert_eq!(session.status(), WorkerStatus::Idle);
    }

    #[test]
    fn a_new_connection_hears_again_what_was_not_confirmed() {
        let mut session = welcomed();
        assert!(session.on_opened(true).is_none(), "it is not ready yet");
        session.on_report(RUN, Report::WarmedUp(Some(Digest::of(b"arithmetic"))));
        session.on_message(assignment(1, 0));
        session.on_report(RUN, steps(1, 1));
        let state = held(1);
        session.on_report(RUN, keep(&state));
        session.on_hashed(state.clone());
        let again = session.on_opened(true).unwrap();
        let [ToCoordinator::Ready(ready)] = sent(&again)[..] else { panic!("{again:?}") };
        assert_eq!((ready.reports.len(), ready.snapshots.len()), (1, 1));
        session.on_message(ToWorker::Acknowledge(StageName::pretraining(), Step::new(1)));
        session.on_message(ToWorker::Release(state.checkpoint));
        let again = session.on_opened(true).unwrap();
        let [ToCoordinator::Ready(ready)] = sent(&again)[..] else { panic!("{again:?}") };
        assert!(ready.reports.is_empty() && ready.snapshots.is_empty());
    }

    #[test]
    fn nothing_of_one_run_is_told_to_another() {
        let mut session = ready();
        session.on_message(assignment(1, 0));
        session.on_report(RUN, steps(1, 1));
        let state = held(1);
        session.on_report(RUN, keep(&state));
        session.on_disconnected();
        let other = RunId::from_bytes([9; 16]);
        let actions = session.on_message(welcome(other));
        assert!(matches!(actions[..], [Action::ChangeRun, Action::Open { .. }]), "{actions:?}");
        assert_eq!(session.status(), WorkerStatus::Idle);
        // Whatever its threads still report about the earlier run is ignored.
        assert!(session.on_hashed(state.clone()).is_empty());
        assert!(session.on_report(RUN, steps(1, 2)).is_empty());
        assert!(session.on_report(RUN, left(1)).is_empty());
        assert!(session.on_opened(true).is_none(), "it is not ready for this run yet");
        let actions = session.on_report(other, Report::WarmedUp(Some(Digest::of(b"arithmetic"))));
        let [ToCoordinator::Ready(ready)] = sent(&actions)[..] else { panic!("{actions:?}") };
        assert_eq!((ready.generation, ready.reports.len(), ready.snapshots.len()), (None, 0, 0));
    }

    #[test]
    fn the_result_of_a_job_waits_for_somebody_to_hear_it() {
        let mut session = ready();
        let job = Job::new("export".parse().unwrap(), Subject::Stage(Vec::new()));
        let done = ToCoordinator::JobDone { job: job.clone(), result: "{}".into() };
        session.on_message(ToWorker::Run(job.clone()));
        session.on_disconnected();
        assert!(session.on_report(RUN, Report::Send(done.clone())).is_empty());
        assert_eq!(session.status(), WorkerStatus::Working(job));
        let again = session.on_opened(true).unwrap();
        assert_eq!(sent(&again).last(), Some(&&done));
        assert_eq!(session.status(), WorkerStatus::Idle);
    }

    #[test]
    fn what_is_not_held_any_more_cannot_be_written() {
        let mut session = welcomed();
        let checkpoint = CheckpointId::new(StageName::pretraining(), Step::new(1), Generation::new(1));
        let actions = session.on_message(ToWorker::Write { checkpoint, files: vec!["a".into()] });
        assert!(matches!(sent(&actions)[..], [ToCoordinator::WriteFailed { .. }]));
    }
}
