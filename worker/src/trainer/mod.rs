//! The trainer: one thread that owns the model, the data and the group, and executes the session's commands.
//!
//! It knows nothing of gRPC. Commands come in one at a time, reports go out as messages. While the trainer is busy, it
//! can be reached by [`Control`] alone.

mod algorithms;
mod consensus;
mod devices;
mod feed;
mod group;
mod member;
mod recipe;
mod reference;
mod step;
mod watched;

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::{Semaphore, mpsc};
use ulmus_backend::{FIRST_PROPOSALS, Quantum, TrainingBackend};
use ulmus_dataloader::Sequence;
use ulmus_model::{BatchShape, MicroBatch, Objective, Replica};
use ulmus_plan::{Algorithms, ModelConfig, Preset};
use ulmus_process::with_causes;
use ulmus_run::TrainState;
use ulmus_transport::ring::{Listener, Place};
use ulmus_types::{
    Assignment, Digest, FORM_WITHIN, Job, LeaveReason, RunId, SNAPSHOT_SLOTS, Section, Stage, StageName,
    Step, ToCoordinator,
};

use crate::WorkerError;
use crate::collective::{AbortHandle, CollectiveError, TcpGroup};
use crate::control::Control;
use crate::jobs;
use crate::run::Run;
use crate::snapshot::PendingSnapshot;

use feed::Feed;
use recipe::Recipe;
use watched::Watched;

/// How long a collective operation may stand still. The coordinator notices dead workers long before.
const STALL_TIMEOUT: Duration = Duration::from_mins(10);
/// The seed of the weights and the batch that the fingerprint is taken of.
const FINGERPRINT_SEED: u64 = 0x5eed_f1e9;
/// Vocabulary of the small model that the fingerprint is taken of if the run does not pretrain.
const SMALL_VOCABULARY: usize = 512;
/// Sequences and positions of its batch.
const SMALL: [usize; 2] = [2, 64];

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

/// What a worker has of a training stage, and the state of the stage that outlives a group.
pub(crate) struct Training<B: TrainingBackend> {
    run: Run,
    recipe: Recipe,
    replica: Replica<B>,
    quantum: Quantum,
    /// The position in the stage of the replica's weights and moments; `None` while these are no state of the stage.
    position: Option<TrainState>,
    /// The hash of the frozen weights of a stage that trains an adapter, once they are loaded.
    base: Option<Digest>,
    feed: Option<Feed>,
    snapshot_slots: Arc<Semaphore>,
}

/// What a worker has of the run that it has joined.
enum Joined<B: TrainingBackend> {
    /// All that training takes; nothing while one stage makes room for the next.
    Training(Run, Option<Box<Training<B>>>),
    /// What jobs take, if it serves nothing else.
    Jobs(Run),
}

impl<B: TrainingBackend> Joined<B> {
    fn run(&self) -> &Run {
        match self {
            Self::Training(run, _) | Self::Jobs(run) => run,
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
        match Training::warm(&run, self.backend.clone()) {
            Ok((training, fingerprint)) => {
                self.joined = Some(Joined::Training(run, training.map(Box::new)));
                Report::WarmedUp(Some(fingerprint))
            }
            Err(error) => {
                Report::Send(ToCoordinator::Unfit { kind: error.kind(), message: with_causes(&error) })
            }
        }
    }

    fn train(&mut self, assignment: &Assignment) -> ToCoordinator {
        let generation = assignment.generation;
        let left = |reason| ToCoordinator::Left { generation, step: Step::default(), reason };
        if self.listener.is_none() || !matches!(self.joined, Some(Joined::Training(..))) {
            let message = "assigned to a group for which it was not ready".to_owned();
            return left(LeaveReason::Lost { suspect: None, message });
        }
        if let Err(error) = self.enter(assignment.training) {
            return left(error.into());
        }
        let (Some(Joined::Training(_, Some(training))), Some(listener)) =
            (&mut self.joined, &mut self.listener)
        else {
            return left(LeaveReason::Lost { suspect: None, message: "the stage is gone".to_owned() });
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

    /// Makes a training stage the one that this worker has, and drops all of the one before: memory need not suffice for two.
    fn enter(&mut self, name: StageName) -> Result<(), WorkerError> {
        let Some(Joined::Training(run, training)) = &mut self.joined else { return Ok(()) };
        if training.as_ref().is_some_and(|training| training.recipe.training() == name) {
            return Ok(());
        }
        *training = None;
        let recipe = Recipe::of(run, name)?;
        *training = Some(Box::new(Training::new(run.clone(), recipe, self.backend.clone())?));
        Ok(())
    }

    /// Computes log-probabilities before a stage with the stage's own replica.
    fn refer(&mut self, tuning: StageName, job: &Job) -> Result<String, WorkerError> {
        self.enter(tuning)?;
        let control = self.control.clone();
        match &mut self.joined {
            Some(Joined::Training(_, Some(training))) => training.refer(job, &control),
            _ => Err(WorkerError::Plan(
                "only workers that train compute what training compares with".to_owned(),
            )),
        }
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
        let refers = |stage: &&Stage| stage.kind.trains() && stage.name.reference() == *job.stage();
        let tuning = run.plan.graph().trainings().find(refers).map(|stage| stage.name);
        let done = match tuning {
            Some(tuning) => self.refer(tuning, &job),
            None => jobs::work(run, &self.backend, self.threads, &job, &say),
        };
        match done {
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
    fn new(run: Run, recipe: Recipe, backend: B) -> Result<Self, WorkerError> {
        Ok(Self {
            replica: recipe::replica(backend, &recipe)?,
            quantum: recipe.quantum(),
            position: None,
            base: None,
            feed: None,
            snapshot_slots: Arc::new(Semaphore::new(SNAPSHOT_SLOTS)),
            recipe,
            run,
        })
    }

    /// Takes the fingerprint of this machine's arithmetic. A run that pretrains takes that of pretraining, and keeps what was
    /// built for it; any other run that of a small model.
    fn warm(run: &Run, backend: B) -> Result<(Option<Self>, Digest), WorkerError> {
        let plan = Arc::clone(&run.plan);
        let fingerprint_of = |replica: &mut Replica<B>, vocabulary, [sequences, length]: [usize; 2]| {
            let backend = replica.backend().clone();
            let fingerprint = || fingerprint(replica, vocabulary, sequences, length);
            match plan.train.algorithms {
                // Undo the choice of an earlier run in this process.
                Algorithms::Library => backend.choose_algorithms(Some(FIRST_PROPOSALS), fingerprint)?.0,
                Algorithms::Measured => algorithms::measured(run, &backend, fingerprint),
            }
        };
        if !plan.pretrains() {
            let model = ModelConfig { vocab_size: SMALL_VOCABULARY, ..Preset::Openelm270m.config() };
            let model = ModelConfig { num_transformer_layers: 2, ..model };
            let [sequences, length] = SMALL;
            let backend = backend.with_precision(plan.train.precision);
            let objective = Objective::next_token(0.0);
            let mut replica = Replica::new(backend, &model, BatchShape::new(sequences, length), objective)?;
            return Ok((None, fingerprint_of(&mut replica, SMALL_VOCABULARY, SMALL)?));
        }
        let recipe = Recipe::of(run, StageName::pretraining())?;
        let BatchShape { sequences, length, .. } = recipe.shape();
        let mut training = Self::new(run.clone(), recipe, backend)?;
        let fingerprint = fingerprint_of(&mut training.replica, plan.model.vocab_size, [sequences, length])?;
        Ok((Some(training), fingerprint))
    }

    /// Computes log-probabilities before the stage.
    fn refer(&mut self, job: &Job, control: &Control) -> Result<String, WorkerError> {
        // The state that the stage begins with is none that it could go on from.
        self.position = None;
        let origin = self.begin(job.subject())?;
        let Self { run, recipe, replica, .. } = self;
        reference::compute(run, recipe, replica, origin, job, || {
            control.begin(Section::Idle);
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
