//! A worker of the simulation: the session is the real one; its shell and its trainer are simulated.

use std::collections::VecDeque;

use ulmus_types::{
    Assignment, CheckpointId, CheckpointKind, Digest, ErrorKind, ExitStatus, FileEntry, Generation,
    GroupRequest, Hello, Job, LeaveReason, RunId, Snapshot, Step, StepReport, ToCoordinator, ToWorker,
    WorkerId,
};
use ulmus_worker_core::{Action, Report, Session};

use crate::{FILES, GRID, ITERATIONS, RUN, VERSION};

/// What stands for weights and moments: a chain of hashes, which is another one if any step was made from another state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State {
    pub step: u64,
    pub digest: Digest,
}

impl State {
    /// What the seed gives.
    pub(crate) fn begin() -> Self {
        Self { step: 0, digest: Digest::of(b"seed") }
    }

    /// The state after one more update.
    pub(crate) fn advanced(self) -> Self {
        let step = self.step + 1;
        let bytes: Vec<u8> = self.digest.as_bytes().iter().copied().chain(step.to_le_bytes()).collect();
        Self { step, digest: Digest::of(&bytes) }
    }

    /// The state that every worker must have after that many updates.
    pub(crate) fn after(steps: u64) -> Self {
        (0..steps).fold(Self::begin(), |state, _| state.advanced())
    }

    /// A bit is flipped.
    pub(crate) fn flipped(self) -> Self {
        Self { digest: Digest::of(self.digest.as_bytes()), ..self }
    }

    /// What is reported of the update that led here.
    pub(crate) fn report(self) -> StepReport {
        let loss = self.digest.as_bytes()[..4].iter().fold(1.0, |loss, byte| loss + f64::from(*byte) / 256.0);
        StepReport { step: Step::new(self.step), tokens: self.step * 100, loss, ..report_of_nothing() }
    }

    pub(crate) fn is_milestone(self) -> bool {
        self.step.is_multiple_of(GRID) || self.step == ITERATIONS
    }

    fn snapshot(self, checkpoint: CheckpointId) -> Snapshot {
        let kind = if self.is_milestone() { CheckpointKind::Milestone } else { CheckpointKind::Recovery };
        Snapshot { checkpoint, kind, state: self.digest, files: FILES.map(str::to_owned).to_vec() }
    }

    /// A part of it, as it is stored.
    pub(crate) fn part(self, file: &str) -> FileEntry {
        let bytes: Vec<u8> = self.digest.as_bytes().iter().copied().chain(file.bytes()).collect();
        FileEntry { bytes: bytes.len() as u64, digest: Digest::of(&bytes) }
    }
}

fn report_of_nothing() -> StepReport {
    StepReport {
        step: Step::default(),
        tokens: 0,
        loss: 0.0,
        z_loss: 0.0,
        grad_norm: 1.0,
        lr: 0.1,
        held_out_loss: None,
        elapsed: std::time::Duration::ZERO,
        data_wait: std::time::Duration::ZERO,
        communication: std::time::Duration::ZERO,
    }
}

/// How far the forming of a group has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Assigned,
    Connected,
    Formed,
}

/// A state that is kept until it is stored.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub checkpoint: CheckpointId,
    pub state: State,
}

/// What the trainer's thread does.
#[derive(Debug)]
pub(crate) struct Group {
    pub assignment: Assignment,
    pub stage: Stage,
    pub aborted: bool,
    pub request: Option<GroupRequest>,
}

impl Group {
    /// The last milestone that the group makes again, and the first.
    pub(crate) fn repair(&self) -> Option<(u64, u64)> {
        let milestones = &self.assignment.repair.as_ref()?.milestones;
        Some((milestones.first()?.get(), milestones.last()?.get()))
    }

    pub(crate) fn makes_again(&self, step: u64) -> bool {
        let repair = self.assignment.repair.as_ref();
        repair.is_none_or(|repair| repair.milestones.contains(&Step::new(step)))
    }
}

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Fine,
    /// The worker ends.
    Leaves(ExitStatus),
    Refused(String),
}

#[derive(Debug)]
pub(crate) struct Worker {
    id: WorkerId,
    session: Session<Kept>,
    /// Whether the coordinator of this connection has welcomed it.
    is_welcome: bool,
    is_warm: bool,
    pub draining: bool,
    pub state: Option<State>,
    pub group: Option<Group>,
    pub job: Option<Job>,
    /// States that it was to keep, the last at the end; they may be released by now.
    pub kept: Vec<CheckpointId>,
    /// States that are being hashed, beside training.
    hashing: VecDeque<Kept>,
    /// What it has said and the coordinator not yet heard.
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
            state: None,
            group: None,
            job: None,
            kept: Vec::new(),
            hashing: VecDeque::new(),
            outbox: VecDeque::new(),
        }
    }

    pub(crate) fn generation(&self) -> Option<Generation> {
        self.group.as_ref().map(|group| group.assignment.generation)
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.group.as_ref().is_some_and(|group| group.aborted)
    }

    pub(crate) fn stage(&self) -> Option<Stage> {
        self.group.as_ref().map(|group| group.stage)
    }

    /// Connects, or connects anew.
    pub(crate) fn hello(&mut self) {
        self.session.unheard();
        self.is_welcome = false;
        self.outbox.clear();
        let (run, secret) = self.session.run().unzip();
        let hello = Hello {
            worker: self.id.clone(),
            version: VERSION.into(),
            address: format!("{}", self.id),
            device: "sim".into(),
            threads: 1,
            pid: 1,
            run,
            secret,
            status: self.session.greet(),
        };
        self.outbox.push_back((run, ToCoordinator::Hello(hello)));
    }

    /// States that were to be hashed are.
    pub(crate) fn finish_hashing(&mut self) {
        while let Some(Kept { checkpoint, state }) = self.hashing.pop_front() {
            let actions = self.session.hashed(state.snapshot(checkpoint));
            self.act(actions);
        }
    }

    /// Whether nothing would be lost if it ended now.
    pub(crate) fn is_free(&self) -> bool {
        self.session.is_free()
    }

    /// It is asked to leave.
    pub(crate) fn drain(&mut self) {
        if !std::mem::replace(&mut self.draining, true) {
            if let Some(group) = &mut self.group {
                group.request = Some(GroupRequest::Stop);
            }
            let actions = self.session.drain();
            self.act(actions);
        }
    }

    /// The coordinator says something.
    pub(crate) fn receive(&mut self, message: ToWorker) -> Heard {
        self.is_welcome |= matches!(message, ToWorker::Welcome { .. });
        let actions = self.session.received(message);
        self.act(actions)
    }

    /// The trainer says something for the coordinator.
    pub(crate) fn say(&mut self, message: ToCoordinator) {
        self.report(Report::Say(message));
    }

    fn report(&mut self, report: Report<Kept>) {
        let actions = self.session.reported(RUN, report);
        self.act(actions);
    }

    /// It adopts the state of its group.
    pub(crate) fn form(&mut self, generation: Generation, state: State) {
        self.state = Some(state);
        self.group.as_mut().unwrap().stage = Stage::Formed;
        self.say(ToCoordinator::Formed { generation, step: Step::new(state.step) });
    }

    /// It has done an update, of which the whole group has one report, and after which the state may be kept.
    pub(crate) fn advance(&mut self, generation: Generation, report: &StepReport, keep: bool) {
        let state = self.state.unwrap().advanced();
        self.state = Some(state);
        self.group.as_mut().unwrap().request = None;
        self.say(ToCoordinator::Steps { generation, reports: vec![report.clone()] });
        if keep {
            let checkpoint = CheckpointId::new(Step::new(state.step), generation);
            self.kept.push(checkpoint);
            self.report(Report::Keep(checkpoint, Kept { checkpoint, state }));
        }
    }

    pub(crate) fn leave(&mut self, reason: LeaveReason) {
        let generation = self.group.take().unwrap().assignment.generation;
        let step = Step::new(self.state.map_or(0, |state| state.step));
        self.say(ToCoordinator::Left { generation, step, reason });
    }

    fn act(&mut self, actions: Vec<Action<Kept>>) -> Heard {
        let mut heard = Heard::Fine;
        for action in actions {
            match action {
                Action::Say(message) => {
                    if self.is_welcome {
                        self.outbox.push_back((self.session.run().map(|(run, _)| run), message));
                    }
                }
                Action::ChangeRun => panic!("there is one run alone"),
                Action::Open { id, .. } => {
                    assert_eq!(id, RUN);
                    self.open();
                }
                Action::Train(run, assignment) => {
                    assert_eq!(run, RUN);
                    let group = Group { assignment, stage: Stage::Assigned, aborted: false, request: None };
                    self.group = Some(group);
                }
                Action::Do(run, job) => {
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
                Action::Hash(kept) => self.hashing.push_back(kept),
                Action::Write(Kept { checkpoint, state }, files) => {
                    let files = files.into_iter().map(|file| (file.clone(), state.part(&file))).collect();
                    let written = ToCoordinator::Written { checkpoint, files };
                    self.outbox.push_back((Some(RUN), written));
                }
                Action::Leave(status) => heard = Heard::Leaves(status),
                // Its session ends, and it connects anew.
                Action::Refused(ErrorKind::Retry, _) => {}
                Action::Refused(_, reason) => heard = Heard::Refused(reason),
                Action::GiveUp(_, reason) => panic!("{reason}"),
            }
        }
        heard
    }

    /// Reads the nonce, and takes the run up.
    fn open(&mut self) {
        self.outbox.push_back((Some(RUN), ToCoordinator::StoreRead(Ok(Digest::of(b"secret")))));
        if let Some(actions) = self.session.opened(self.is_warm) {
            self.act(actions);
        } else {
            self.is_warm = true;
            self.report(Report::Warm(Digest::of(b"arithmetic")));
        }
    }
}
