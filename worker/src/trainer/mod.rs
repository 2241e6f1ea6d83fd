//! The trainer: one thread that owns the model, the data and the group, and executes the session's commands.
//!
//! It knows nothing of gRPC. Commands come in one at a time, reports go out as messages. While the trainer is busy, it
//! can be reached by [`Control`] alone.

mod algorithms;
mod consensus;
mod devices;
mod group;
mod member;
mod step;
mod watched;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::{Semaphore, mpsc};
use ulmus_backend::{FIRST_PROPOSALS, Quantum, TrainingBackend};
use ulmus_dataloader::{Corpus, Loader, Sequence};
use ulmus_model::{BatchShape, MicroBatch, Objective, Replica};
use ulmus_plan::Algorithms;
use ulmus_process::with_causes;
use ulmus_run::TrainState;
use ulmus_transport::ring::{Listener, Place};
use ulmus_types::{
    Assignment, BadUnit, Digest, FORM_WITHIN, Job, LeaveReason, RunId, SNAPSHOT_SLOTS, Step, ToCoordinator,
};

use crate::WorkerError;
use crate::collective::{AbortHandle, CollectiveError, TcpGroup};
use crate::control::Control;
use crate::jobs;
use crate::run::Run;
use crate::snapshot::PendingSnapshot;

use watched::Watched;

/// How long a collective operation may stand still. The coordinator notices dead workers long before.
const STALL_TIMEOUT: Duration = Duration::from_mins(10);
/// The seed of the weights and the batch that the fingerprint is taken of.
const FINGERPRINT_SEED: u64 = 0x5eed_f1e9;

/// A command from the agent.
#[derive(Debug)]
pub(crate) enum Command {
    /// Build the model of a run and take the fingerprint.
    Warm(Run),
    /// Train in a group of a run.
    Train(RunId, Assignment),
    /// Do a job of a run.
    Do(Run, Job),
}

/// A report of the trainer.
pub(crate) type Report = ulmus_worker_core::Report<Arc<PendingSnapshot>>;

/// The trainer's end of the channel to the agent, for the reports of one run.
#[derive(Debug, Clone)]
pub(crate) struct Reports {
    run: RunId,
    sender: mpsc::Sender<(RunId, Report)>,
}

impl Reports {
    /// Sends a message to the coordinator. If the agent is gone the message is lost; the process ends with its agent.
    pub(crate) fn say(&self, message: ToCoordinator) {
        self.report(Report::Send(message));
    }

    fn report(&self, report: Report) {
        self.sender.blocking_send((self.run, report)).ok();
    }
}

/// The model of a run, and the state of its training that outlives a group.
pub(crate) struct Training<B: TrainingBackend> {
    run: Run,
    replica: Replica<B>,
    quantum: Quantum,
    fingerprint: Digest,
    /// The position in the run of the replica's weights and moments; `None` while these are no state of the run.
    position: Option<TrainState>,
    reading: Option<Reading>,
    snapshot_slots: Arc<Semaphore>,
}

/// The run's data, and how far this worker has read them.
struct Reading {
    corpus: Arc<Corpus>,
    /// The units that the corpus leaves out.
    quarantine: BTreeSet<BadUnit>,
    /// The loader of the last group's lanes.
    loader: Option<Loader>,
    /// The sequences for the held-out loss, once they have been read.
    held_out: Option<Arc<[Sequence]>>,
}

/// What a worker has of the run that it has joined.
enum Joined<B: TrainingBackend> {
    /// All that training takes.
    Training(Box<Training<B>>),
    /// What jobs take, if it serves nothing else.
    Jobs(Run),
}

impl<B: TrainingBackend> Joined<B> {
    fn run(&self) -> &Run {
        match self {
            Self::Training(training) => &training.run,
            Self::Jobs(run) => run,
        }
    }
}

/// The thread's state.
pub(crate) struct Trainer<B: TrainingBackend> {
    backend: B,
    threads: usize,
    /// Where other workers reach this one; `None` if it never trains.
    listener: Option<Listener>,
    control: Control,
    reports: mpsc::Sender<(RunId, Report)>,
    joined: Option<Joined<B>>,
}

impl<B: TrainingBackend> Trainer<B> {
    pub(crate) fn new(
        backend: B,
        threads: usize,
        listener: Option<Listener>,
        control: Control,
        reports: mpsc::Sender<(RunId, Report)>,
    ) -> Self {
        Self { backend, threads, listener, control, reports, joined: None }
    }

    /// Executes commands until the session is gone.
    pub(crate) fn serve(mut self, commands: &Receiver<Command>) {
        for command in commands {
            let (run, report) = match command {
                Command::Warm(run) => (run.id, self.warm(run)),
                Command::Train(run, assignment) => (run, Report::Send(self.train(&assignment))),
                Command::Do(run, job) => (run.id, Report::Send(self.work(&run, job))),
            };
            if self.reports.blocking_send((run, report)).is_err() {
                return;
            }
        }
    }

    fn warm(&mut self, run: Run) -> Report {
        // Drop another run's model first: memory need not suffice for two.
        self.joined = None;
        if self.listener.is_none() {
            self.joined = Some(Joined::Jobs(run));
            return Report::WarmedUp(None);
        }
        match Training::new(run, self.backend.clone()) {
            Ok(training) => {
                let fingerprint = training.fingerprint;
                self.joined = Some(Joined::Training(Box::new(training)));
                Report::WarmedUp(Some(fingerprint))
            }
            Err(error) => {
                Report::Send(ToCoordinator::Unfit { kind: error.kind(), message: with_causes(&error) })
            }
        }
    }

    fn train(&mut self, assignment: &Assignment) -> ToCoordinator {
        let generation = assignment.generation;
        let (Some(Joined::Training(training)), Some(listener)) = (&mut self.joined, &mut self.listener)
        else {
            let message = "assigned to a group for which it was not ready".to_owned();
            let reason = LeaveReason::Lost { suspect: None, message };
            return ToCoordinator::Left { generation, step: Step::default(), reason };
        };
        let reports = Reports { run: training.run.id, sender: self.reports.clone() };
        let reason = match form(listener, &self.control, &training.run, assignment) {
            Ok(group) => {
                let mut group = Watched::new(group, self.control.clone());
                training.take_part(assignment, &mut group, &self.control, &reports)
            }
            Err(error) => LeaveReason::from(WorkerError::from(error)),
        };
        self.control.leave();
        tracing::info!("left the group of generation {generation}: {reason}");
        ToCoordinator::Left { generation, step: training.step(), reason }
    }

    fn work(&mut self, run: &Run, job: Job) -> ToCoordinator {
        if self.joined.as_ref().is_none_or(|joined| joined.run().id != run.id) {
            let message = "asked for a job before it was ready".to_owned();
            return ToCoordinator::JobFailed {
                job,
                kind: ulmus_types::ErrorKind::Retry,
                message,
                bad_unit: None,
                damaged: None,
            };
        }
        let reports = Reports { run: run.id, sender: self.reports.clone() };
        let say = |text: String| reports.say(ToCoordinator::Notice(text));
        match jobs::work(run, &self.backend, self.threads, &job, &say) {
            Ok(result) => ToCoordinator::JobDone { job, result },
            Err(error) => ToCoordinator::JobFailed {
                job,
                kind: error.kind(),
                message: with_causes(&error),
                bad_unit: error.bad_unit(),
                damaged: error.damaged_checkpoint(),
            },
        }
    }
}

fn form(
    listener: &mut Listener,
    control: &Control,
    run: &Run,
    assignment: &Assignment,
) -> Result<TcpGroup, CollectiveError> {
    let abort = AbortHandle::new().map_err(|error| CollectiveError::Network {
        act: "cannot make an abort handle".to_owned(),
        reason: error.to_string(),
    })?;
    if !control.enter(assignment.generation, abort.clone()) {
        return Err(CollectiveError::Aborted);
    }
    let place = Place {
        run: run.digest(),
        generation: assignment.generation,
        rank: assignment.rank,
        size: assignment.size,
        key: assignment.key,
        previous: assignment.previous.clone(),
        next: assignment.next.clone(),
    };
    TcpGroup::form(listener, &place, &abort, FORM_WITHIN, STALL_TIMEOUT)
}

impl<B: TrainingBackend> Training<B> {
    fn new(run: Run, backend: B) -> Result<Self, WorkerError> {
        let plan = Arc::clone(&run.plan);
        let (sequences, length) = (plan.train.micro_batch as usize, plan.sequence_length());
        let shape = BatchShape { sequences, length, recompute: plan.train.recompute };
        let backend = backend.with_precision(plan.train.precision);
        let mut replica =
            Replica::new(backend, &plan.model, shape, Objective::next_token(plan.train.z_loss))?;
        let backend = replica.backend().clone();
        let fingerprint = || fingerprint(&mut replica, plan.model.vocab_size, sequences, length);
        let fingerprint = match plan.train.algorithms {
            // Undo the choice of an earlier run in this process.
            Algorithms::Library => backend.choose_algorithms(Some(FIRST_PROPOSALS), fingerprint)?.0?,
            Algorithms::Measured => algorithms::measured(&run, &backend, fingerprint)?,
        };
        let positions = plan.train.sequences * length as u64;
        Ok(Self {
            run,
            replica,
            quantum: Quantum::new(positions, plan.train.micro_batches()),
            fingerprint,
            position: None,
            reading: None,
            snapshot_slots: Arc::new(Semaphore::new(SNAPSHOT_SLOTS)),
        })
    }

    /// The number of updates that the state has seen.
    fn step(&self) -> Step {
        self.position.as_ref().map_or(Step::default(), |position| position.step)
    }
}

/// The hash of the gradient of one fixed micro-batch, which tells this machine's arithmetic from another's. Computing
/// it is also the dry run that finds out whether the model fits into memory, and which algorithms are fast.
fn fingerprint<B: TrainingBackend>(
    replica: &mut Replica<B>,
    vocabulary: usize,
    sequences: usize,
    length: usize,
) -> Result<Digest, WorkerError> {
    replica.initialise(FINGERPRINT_SEED);
    let mut random = ChaCha8Rng::seed_from_u64(FINGERPRINT_SEED);
    let mut tokens = || -> Vec<u32> {
        (0..sequences * length).map(|_| random.random_range(0..vocabulary as u32)).collect()
    };
    let (inputs, targets) = (tokens(), tokens());
    replica.forward_backward(&MicroBatch::of_whole_documents(sequences, length, inputs, targets))?;
    Ok(replica.gradient_hash())
}

/// The micro-batch of these sequences, each of `length` positions.
fn micro_batch(rows: &[Sequence], length: usize) -> MicroBatch {
    let join =
        |part: fn(&Sequence) -> &Vec<u32>| rows.iter().flat_map(|row| part(row).iter().copied()).collect();
    MicroBatch {
        sequences: rows.len(),
        length,
        inputs: join(|row| &row.inputs),
        targets: join(|row| &row.targets),
        doc_starts: join(|row| &row.doc_starts),
        ..MicroBatch::default()
    }
}
