//! A worker of the simulation: its session is real, its shell and its trainer are simulated.

use std::collections::VecDeque;

use ulmus_types::{
    Assignment, CheckpointId, CheckpointKind, Digest, ErrorKind, ExitStatus, FileEntry, Generation,
    GroupRequest, Hello, Job, LeaveReason, RunId, Snapshot, StageName, Step, StepReport, ToCoordinator,
    ToWorker, WorkerId,
};
use ulmus_worker_core::{Action, Report, Session};

use crate::{FILES, GRID, RUN, VERSION, updates};

/// Stands for weights and moments: a chain of hashes, which differs if any step started from a different state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State {
    pub training: StageName,
    pub step: u64,
    pub digest: Digest,
}

impl State {
    /// The state before the first update of a stage.
    pub(crate) fn begin(training: StageName) -> Self {
        Self { training, step: 0, digest: Digest::of(training.as_str().as_bytes()) }
    }

    /// The state after one more update.
    pub(crate) fn advanced(self) -> Self {
        let step = self.step + 1;
        let bytes: Vec<u8> = self.digest.as_bytes().iter().copied().chain(step.to_le_bytes()).collect();
        Self { step, digest: Digest::of(&bytes), ..self }
    }

    /// The state that every worker must have after this many updates of a stage.
    pub(crate) fn after(training: StageName, steps: u64) -> Self {
        (0..steps).fold(Self::begin(training), |state, _| state.advanced())
    }

    /// The state with a flipped bit.
    pub(crate) fn flipped(self) -> Self {
        Self { digest: Digest::of(self.digest.as_bytes()), ..self }
    }

    /// The report of the update that led to this state.
    pub(crate) fn report(self) -> StepReport {
        let loss = self.digest.as_bytes()[..4].iter().fold(1.0, |loss, byte| loss + f64::from(*byte) / 256.0);
        StepReport { step: Step::new(self.step), tokens: self.step * 100, loss, ..report_of_nothing() }
    }

    pub(crate) fn is_milestone(self) -> bool {
        let is_pretraining = self.training == StageName::pretraining();
        is_pretraining && self.step.is_multiple_of(GRID) || self.step == updates(self.training)
    }

    fn snapshot(self, checkpoint: CheckpointId) -> Snapshot {
        let kind = if self.is_milestone() { CheckpointKind::Milestone } else { CheckpointKind::Recovery };
        Snapshot { checkpoint, kind, state: self.digest, files: FILES.map(str::to_owned).to_vec() }
    }

    /// The stored form of one file of the state.
    pub(crate) fn part(self, file: &str) -> FileEntry {
        let bytes: Vec<u8> = self.digest.as_bytes().iter().copied().chain(file.bytes()).collect();
        FileEntry { bytes: bytes.len() as u64, digest: Digest::of(&bytes) }
    }
}

fn report_of_nothing() -> StepReport {
    StepReport { grad_norm: 1.0, lr: 0.1, ..StepReport::default() }
}

/// The progress of forming a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    Assigned,
    Connected,
    Formed,
}

/// A state that is held until it is stored.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub checkpoint: CheckpointId,
    pub state: State,
}

/// What the simulated trainer is doing.
#[derive(Debug)]
pub(crate) struct Group {
    pub assignment: Assignment,
    pub stage: Progress,
    pub aborted: bool,
    pub request: Option<GroupRequest>,
}

impl Group {
    /// The first and the last milestone that the group recreates.
    pub(crate) fn repair(&self) -> Option<(u64, u64)> {
        let milestones = &self.assignment.repair.as_ref()?.milestones;
        Some((milestones.first()?.get(), milestones.last()?.get()))
    }

    pub(crate) fn recreates(&self, step: u64) -> bool {
        let repair = self.assignment.repair.as_ref();
        repair.is_none_or(|repair| repair.milestones.contains(&Step::new(step)))
    }
}

/// What a worker does after a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reaction {
    Continues,
    /// The worker exits.
    Exits(ExitStatus),
    Refused(String),
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Worker {
    id: WorkerId,
    session: Session<Held>,
    /// Whether the coordinator of this connection has welcomed it.
    is_welcome: bool,
    is_warm: bool,
    pub draining: bool,
    /// Whether it serves jobs and never trains.
    pub only_jobs: bool,
    pub device: String,
    pub state: Option<State>,
    pub group: Option<Group>,
    pub job: Option<Job>,
    /// States that it was told to hold, newest last; some may be released by now.
    pub held: Vec<CheckpointId>,
    /// States that are being hashed, alongside training.
    hashing: VecDeque<Held>,
    /// Parts of states that are being stored.
    writing: VecDeque<(Held, Vec<String>)>,
    /// What it has said and the coordinator not yet reaction.
    pub outbox: VecDeque<(Option<RunId>, ToCoordinator)>,
}

impl Worker {
    pub(crate) fn new(id: WorkerId) -> Self {
        Self {
            id,
            session: Session::default(),
            is_welcome: false,
            is_warm: false,
            draining: false,
            only_jobs: false,
            device: "sim".into(),
            state: None,
            group: None,
            job: None,
            held: Vec::new(),
            hashing: VecDeque::new(),
            writing: VecDeque::new(),
            outbox: VecDeque::new(),
        }
    }

    pub(crate) fn generation(&self) -> Option<Generation> {
        self.group.as_ref().map(|group| group.assignment.generation)
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.group.as_ref().is_some_and(|group| group.aborted)
    }

    pub(crate) fn stage(&self) -> Option<Progress> {
        self.group.as_ref().map(|group| group.stage)
    }

    /// Connects or reconnects.
    pub(crate) fn hello(&mut self) {
        self.session.on_disconnected();
        self.is_welcome = false;
        self.outbox.clear();
        let (run, secret) = self.session.run().unzip();
        let hello = Hello {
            worker: self.id.clone(),
            version: VERSION.into(),
            address: format!("{}", self.id),
            device: self.device.clone(),
            threads: 1,
            pid: 1,
            run,
            secret,
            status: self.session.greet(),
            host: "host".into(),
            memory: 1 << 30,
            only_jobs: self.only_jobs,
        };
        self.outbox.push_back((run, ToCoordinator::Hello(hello)));
    }

    /// Hashes all states that wait to be hashed.
    pub(crate) fn finish_hashing(&mut self) {
        while let Some(Held { checkpoint, state }) = self.hashing.pop_front() {
            let actions = self.session.on_hashed(state.snapshot(checkpoint));
            self.act(actions);
        }
    }

    /// Stores all parts that wait to be stored.
    pub(crate) fn finish_writing(&mut self) {
        for (Held { checkpoint, state }, files) in std::mem::take(&mut self.writing) {
            let files = files.into_iter().map(|file| (file.clone(), state.part(&file))).collect();
            self.outbox.push_back((Some(RUN), ToCoordinator::Written { checkpoint, files }));
        }
    }

    /// Whether nothing would be lost if the worker ended now.
    pub(crate) fn is_free(&self) -> bool {
        self.session.is_free()
    }

    /// The worker is asked to leave.
    pub(crate) fn drain(&mut self) {
        if !std::mem::replace(&mut self.draining, true) {
            if let Some(group) = &mut self.group {
                group.request = Some(GroupRequest::Stop);
            }
            let actions = self.session.drain();
            self.act(actions);
        }
    }

    /// Handles a message from the coordinator.
    pub(crate) fn receive(&mut self, message: ToWorker) -> Reaction {
        self.is_welcome |= matches!(message, ToWorker::Welcome { .. });
        let actions = self.session.on_message(message);
        self.act(actions)
    }

    /// The trainer sends a message to the coordinator.
    pub(crate) fn say(&mut self, message: ToCoordinator) {
        self.report(Report::Send(message));
    }

    fn report(&mut self, report: Report<Held>) {
        let actions = self.session.on_report(RUN, report);
        self.act(actions);
    }

    /// The worker adopts the state of its group.
    pub(crate) fn form(&mut self, generation: Generation, state: State) {
        self.state = Some(state);
        self.group.as_mut().unwrap().stage = Progress::Formed;
        self.say(ToCoordinator::Formed { generation, step: Step::new(state.step) });
    }

    /// The worker has done an update, with the group's common report. With `keep`, the new state is to be stored.
    pub(crate) fn advance(&mut self, generation: Generation, report: &StepReport, keep: bool) {
        let state = self.state.unwrap().advanced();
        self.state = Some(state);
        self.group.as_mut().unwrap().request = None;
        self.say(ToCoordinator::Steps { generation, reports: vec![report.clone()] });
        if keep {
            let checkpoint = CheckpointId::new(state.training, Step::new(state.step), generation);
            self.held.push(checkpoint);
            self.report(Report::Hold(checkpoint, Held { checkpoint, state }));
        }
    }

    pub(crate) fn leave(&mut self, reason: LeaveReason) {
        let Assignment { training, generation, .. } = self.group.take().unwrap().assignment;
        let state = self.state.filter(|state| state.training == training);
        let step = Step::new(state.map_or(0, |state| state.step));
        self.say(ToCoordinator::Left { generation, step, reason });
    }

    fn act(&mut self, actions: Vec<Action<Held>>) -> Reaction {
        let mut reaction = Reaction::Continues;
        for action in actions {
            match action {
                Action::Send(message) => {
                    if self.is_welcome {
                        self.outbox.push_back((self.session.run().map(|(run, _)| run), message));
                    }
                }
                Action::ChangeRun => panic!("there is only one run"),
                Action::Open { id, .. } => {
                    assert_eq!(id, RUN);
                    self.open();
                }
                Action::Train(run, assignment) => {
                    assert_eq!(run, RUN);
                    let group =
                        Group { assignment, stage: Progress::Assigned, aborted: false, request: None };
                    self.group = Some(group);
                }
                Action::RunJob(run, job) => {
                    assert_eq!(run, RUN);
                    self.job = Some(job);
                }
                Action::Abort(generation) => {
                    let group = self.group.as_mut().filter(|group| group.assignment.generation <= generation);
                    if let Some(group) = group {
                        group.aborted = true;
                    }
                }
                Action::Request(generation, request) => {
                    let group = self.group.as_mut().filter(|group| group.assignment.generation == generation);
                    if let Some(group) = group {
                        group.request = Some(request);
                    }
                }
                Action::Hash(held) => self.hashing.push_back(held),
                Action::Write(held, files) => self.writing.push_back((held, files)),
                Action::Exit(status) => reaction = Reaction::Exits(status),
                // Its session ends, and it reconnects.
                Action::Refused(ErrorKind::Retry, _) => {}
                Action::Refused(_, reason) => reaction = Reaction::Refused(reason),
                Action::GiveUp(_, reason) => panic!("{reason}"),
            }
        }
        reaction
    }

    /// Reads the nonce, and joins the run.
    fn open(&mut self) {
        self.outbox.push_back((Some(RUN), ToCoordinator::StoreRead(Ok(Digest::of(b"secret")))));
        if let Some(actions) = self.session.on_opened(self.is_warm) {
            self.act(actions);
        } else {
            self.is_warm = true;
            let fingerprint = (!self.only_jobs).then(|| Digest::of(b"arithmetic"));
            self.report(Report::WarmedUp(fingerprint));
        }
    }
}
