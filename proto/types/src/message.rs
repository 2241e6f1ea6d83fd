//! What coordinator and worker say to each other, free of any wire format.
//!
//! A worker opens one stream and says [`Hello`]; everything else follows from it. Whatever it says after that carries
//! the id of the run that it speaks of, so that nothing of one run is ever taken for another's. Every message about
//! training names its generation, so that what was said under an older one can be told apart and fenced. Reports are
//! idempotent: saying the same thing twice changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    Blame, CheckpointId, Digest, ErrorKind, ExitStatus, Generation, GroupKey, Rank, RunId, RunName,
    SessionSecret, Step, WorkerId,
};

/// How a worker introduces itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Who it is.
    pub worker: WorkerId,
    /// Version of its build; both sides must be of one version.
    pub version: String,
    /// Where other workers reach it, `host:port`.
    pub address: String,
    /// What it computes on, for a person.
    pub device: String,
    /// Compute threads.
    pub threads: u32,
    /// Process id, so that a coordinator knows its own children again.
    pub pid: u32,
    /// The run that it belongs to already, because it was welcomed there before.
    pub run: Option<RunId>,
    /// What the welcome to that run gave it: proves that it is the worker that it says it is.
    pub secret: Option<SessionSecret>,
    /// What it is doing; a worker that rejoins may be in the middle of training or of a job.
    pub status: WorkerStatus,
}

/// What a worker is doing at the moment of its [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkerStatus {
    /// Nothing. It may hold the state after some step.
    Idle,
    /// It trains in the group of this generation.
    Training(Generation),
    /// It does this job, or has done it and could not say so yet.
    Working(Job),
}

/// One optimizer update as everybody in the group saw it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Updates done, this one included.
    pub step: Step,
    /// Valid tokens trained on so far.
    pub tokens: u64,
    /// Mean cross-entropy per valid token before the update, in nats.
    pub loss: f64,
    /// Mean z-loss per valid token, weighted.
    pub z_loss: f64,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Mean cross-entropy on held-out text after the update, where it was measured.
    pub held_out_loss: Option<f64>,
    /// Wall time of the step.
    pub elapsed: Duration,
    /// Part of it spent waiting for data.
    pub data_wait: Duration,
    /// Part of it spent in collectives.
    pub communication: Duration,
}

/// How reading a source goes on one worker, since it opened its data.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceReading {
    /// Name of the source.
    pub source: String,
    /// Epochs that the stream has passed that has come least far, by whole units: of a compressed file, when it is read.
    pub epochs: f64,
    /// Documents that were decoded, read-ahead included.
    pub documents: u64,
    /// Tokens of those that are left after the filters.
    pub tokens: u64,
    /// Bytes of their text before the filters; none where token ids are read.
    pub text_bytes: u64,
    /// Documents with too few characters.
    pub short_characters: u64,
    /// Documents with too few tokens.
    pub short_tokens: u64,
    /// Documents that are held out.
    pub held_out: u64,
    /// Units that are left out, by everybody.
    pub bad_units: u64,
    /// Bytes that came from the store.
    pub fetched_bytes: u64,
    /// Bytes that came from the cache on disk.
    pub cached_bytes: u64,
    /// Requests that failed, most of which were then made again.
    pub failed_requests: u64,
    /// Streams that the worker reads.
    pub streams: u64,
    /// Those of them whose next window is in memory.
    pub ready: u64,
    /// Time in which steps waited for the source.
    pub waited: Duration,
    /// Time in which all this was counted.
    pub elapsed: Duration,
}

/// A unit of a source that cannot be read: by its place in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BadUnit {
    /// Name of the source.
    pub source: String,
    /// Number of the unit.
    pub unit: u64,
}

impl fmt::Display for BadUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unit {} of source {:?}", self.unit, self.source)
    }
}

/// Why a worker is no longer in its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaveReason {
    /// All agreed to pause at this step: for new members, or to stop.
    Agreed,
    /// Every update of the plan is done.
    Finished,
    /// A source's `max_epochs` is used up; the text names it.
    Exhausted(String),
    /// A unit of a source cannot be read; the text tells why.
    BadUnit(BadUnit, String),
    /// The collective broke or was aborted.
    Lost {
        /// The neighbour whose fault it seems to be, and how, if it was seen.
        suspect: Option<(Rank, Blame)>,
        /// What was seen.
        message: String,
    },
    /// Training cannot go on: damaged data, a gradient that is not finite.
    Failed {
        /// What can be done about it.
        kind: ErrorKind,
        /// What happened.
        message: String,
    },
}

/// What a worker's trainer is doing, as far as waiting for it is concerned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Section {
    /// Nothing, or a job.
    #[default]
    Idle,
    /// It forms a group: connects, and agrees on a state.
    Forming,
    /// It computes its share of a step.
    Computing,
    /// It is in a collective operation with the others.
    Collective,
    /// It waits for text that is not there yet.
    Reading,
    /// It measures the held-out loss.
    Measuring,
    /// It waits until an older state is stored.
    Storing,
}

/// That a worker lives, and how far it has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// The group that it is in, if any.
    pub generation: Generation,
    /// Collective operations of the group that it has entered: of a group that stands still, the member that stays
    /// behind is the culprit.
    pub collective: u64,
    /// What the trainer is doing.
    pub section: Section,
    /// How long ago it began that, or last said that it still waits.
    pub since: Duration,
    /// Processor time that the process has used so far: a job that does not move uses none.
    pub busy: Duration,
}

/// Steps that are trained once more because a milestone is damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// Milestones to make again. Training begins from the newest good checkpoint before the first of them and ends
    /// with the last.
    pub milestones: BTreeSet<Step>,
}

/// Everything that a worker that can take work has not been told is recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Ready {
    /// Hash of one fixed micro-batch's gradients: tells its arithmetic.
    pub fingerprint: Digest,
    /// The last group that it was in.
    pub generation: Option<Generation>,
    /// Updates that were done there and not yet confirmed, oldest first.
    pub reports: Vec<StepReport>,
    /// States that it keeps in memory.
    pub snapshots: Vec<Snapshot>,
}

/// Whether a checkpoint is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointKind {
    /// On the grid of the plan: kept, and averaged at the end.
    Milestone,
    /// To come back after a failure: only the newest are kept.
    Recovery,
}

/// Size and hash of a stored file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its content.
    pub digest: Digest,
}

impl FileEntry {
    /// The entry of a file with this content.
    pub fn of(content: &[u8]) -> Self {
        Self { bytes: content.len() as u64, digest: Digest::of(content) }
    }
}

/// A state that a worker keeps in memory until it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name.
    pub checkpoint: CheckpointId,
    /// Whether it is kept.
    pub kind: CheckpointKind,
    /// Hash of weights, moments and counters; equal on every worker.
    pub state: Digest,
    /// The files that it consists of.
    pub files: Vec<String>,
}

/// Work on the results of training, done by one worker. Doing it twice gives the same files.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Job {
    /// Make the shards, the tokenizer and the manifest.
    Prepare,
    /// Average these checkpoints in f64.
    Average(Vec<CheckpointId>),
    /// Held-out perplexity of the average.
    EvaluateAverage,
    /// Held-out perplexity of a checkpoint.
    Evaluate(CheckpointId),
    /// Greedy continuations of held-out text from these checkpoints.
    Continue(Vec<CheckpointId>),
    /// Write the average in Hugging Face layout.
    Export,
    /// Tokens per second of prompt processing and generation.
    Benchmark,
}

impl Job {
    /// Its kind, whatever it reads.
    pub const fn kind(&self) -> JobKind {
        match self {
            Self::Prepare => JobKind::Prepare,
            Self::Average(_) => JobKind::Average,
            Self::EvaluateAverage => JobKind::EvaluateAverage,
            Self::Evaluate(_) => JobKind::EvaluateLast,
            Self::Continue(_) => JobKind::Continuations,
            Self::Export => JobKind::Export,
            Self::Benchmark => JobKind::Benchmark,
        }
    }

    /// The name of its kind.
    pub const fn name(&self) -> &'static str {
        self.kind().name()
    }
}

/// What a job makes. A run has one job of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum JobKind {
    /// Shards, tokenizer and manifest.
    Prepare,
    /// The mean of the last milestones.
    Average,
    /// Held-out perplexity of the average.
    EvaluateAverage,
    /// Held-out perplexity of the last milestone.
    EvaluateLast,
    /// Continuations of held-out text.
    Continuations,
    /// The average in Hugging Face layout.
    Export,
    /// Tokens per second of the average.
    Benchmark,
}

impl JobKind {
    /// Every kind, in the order in which a run comes to them.
    pub const ALL: [Self; 7] = [
        Self::Prepare,
        Self::Average,
        Self::EvaluateAverage,
        Self::EvaluateLast,
        Self::Continuations,
        Self::Export,
        Self::Benchmark,
    ];

    /// A short name, which is also that of its result file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Average => "average",
            Self::EvaluateAverage => "evaluate-average",
            Self::EvaluateLast => "evaluate-last",
            Self::Continuations => "continuations",
            Self::Export => "export",
            Self::Benchmark => "benchmark",
        }
    }

    /// The kind of that name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// A neighbour in the ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Where it listens.
    pub address: String,
    /// Who must answer there.
    pub worker: WorkerId,
}

/// A worker's place in a new group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The group.
    pub generation: Generation,
    /// The worker's place in it.
    pub rank: Rank,
    /// Workers in it.
    pub size: u32,
    /// By which its members know each other.
    pub key: GroupKey,
    /// The one before it in the ring.
    pub previous: Peer,
    /// The one after it in the ring.
    pub next: Peer,
    /// Its share of every update's micro-batches.
    pub micro_batches: Range<u64>,
    /// Updates that the coordinator has recorded: no checkpoint of a later step is taken up.
    pub recorded: Step,
    /// Whether training may begin from the seed, if no member has a state and no checkpoint holds.
    pub may_begin: bool,
    /// Set when the group trains some steps once more.
    pub repair: Option<Repair>,
}

/// What a group is asked to do at the end of a step that all its members agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupRequest {
    /// Keep a recovery checkpoint.
    Save,
    /// Leave the group, keeping the state, so that a new one can be formed.
    Pause,
    /// Keep a recovery checkpoint and leave the group.
    Stop,
}

/// From worker to coordinator.
#[derive(Debug, Clone, PartialEq)]
pub enum ToCoordinator {
    /// The first message.
    Hello(Hello),
    /// What the worker read in the run's store, as [`crate::nonce_digest`] of it, or why it could not.
    StoreRead(Result<Digest, String>),
    /// The worker can take work.
    Ready(Ready),
    /// The worker cannot take up the run, and leaves.
    Unfit {
        /// What can be done about it.
        kind: ErrorKind,
        /// Why.
        message: String,
    },
    /// The worker was asked to leave: it wants to hand over what it has, and go.
    Draining,
    /// It lives.
    Heartbeat(Heartbeat),
    /// It has reached its neighbours in the group, and now takes part in agreeing on a state, which may take long.
    Connected(Generation),
    /// Its group agrees on the step to go on from.
    Formed {
        /// The group.
        generation: Generation,
        /// Updates done.
        step: Step,
    },
    /// Updates that were done, oldest first.
    Steps {
        /// The group.
        generation: Generation,
        /// One per update.
        reports: Vec<StepReport>,
    },
    /// How reading goes, at a checkpoint.
    Reading {
        /// Updates done.
        step: Step,
        /// One per source.
        sources: Vec<SourceReading>,
    },
    /// It is out of its group, idle, with the state after `step`.
    Left {
        /// The group it was in.
        generation: Generation,
        /// Updates done.
        step: Step,
        /// Why.
        reason: LeaveReason,
    },
    /// It keeps a state in memory that should be stored.
    Snapshot(Snapshot),
    /// It stored parts of a checkpoint.
    Written {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// The parts.
        files: BTreeMap<String, FileEntry>,
    },
    /// A part could not be stored.
    WriteFailed {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// What can be done about it.
        kind: ErrorKind,
        /// What happened.
        message: String,
    },
    /// Something that a person should know, such as a damaged checkpoint that was passed over.
    Notice(String),
    /// A job is done; its result as JSON.
    JobDone {
        /// The job.
        job: Job,
        /// JSON.
        result: String,
    },
    /// A job failed.
    JobFailed {
        /// The job.
        job: Job,
        /// What can be done about it.
        kind: ErrorKind,
        /// What happened.
        message: String,
        /// The unit whose fault it is, if it is one's.
        bad_unit: Option<BadUnit>,
        /// The checkpoint that is damaged, if that is the reason.
        damaged: Option<CheckpointId>,
    },
}

impl ToCoordinator {
    /// What kind of message it is, for a person.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::StoreRead(_) => "store read",
            Self::Ready(_) => "ready",
            Self::Unfit { .. } => "unfit",
            Self::Draining => "draining",
            Self::Heartbeat(_) => "heartbeat",
            Self::Connected(_) => "connected",
            Self::Formed { .. } => "formed",
            Self::Steps { .. } => "steps",
            Self::Reading { .. } => "reading",
            Self::Left { .. } => "left",
            Self::Snapshot(_) => "snapshot",
            Self::Written { .. } => "written",
            Self::WriteFailed { .. } => "write failed",
            Self::Notice(_) => "notice",
            Self::JobDone { .. } => "job done",
            Self::JobFailed { .. } => "job failed",
        }
    }
}

/// From coordinator to worker.
#[derive(Debug, Clone, PartialEq)]
pub enum ToWorker {
    /// The worker may join: this is the run.
    Welcome {
        /// The run.
        run: RunName,
        /// Tells it from every other run, of whatever name.
        id: RunId,
        /// What this worker proves with that it is itself, when it has to connect anew.
        secret: SessionSecret,
        /// The resolved plan, as TOML.
        plan: String,
        /// The folder of the run, as a URL. The worker must prove that it sees it: see [`crate::nonce_digest`].
        store: String,
    },
    /// The worker may not join, or no longer.
    Refused {
        /// What can be done about it.
        kind: ErrorKind,
        /// Why, and what to do instead.
        reason: String,
    },
    /// Join a group and train.
    Assign(Assignment),
    /// Leave the group at once: a member is lost.
    Abort(Generation),
    /// Pass on at the end of a step.
    Request(Generation, GroupRequest),
    /// Reports up to this step are stored.
    Acknowledge(Step),
    /// Store these parts of a snapshot.
    Write {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// The parts.
        files: Vec<String>,
    },
    /// The snapshot need not be kept any longer.
    Release(CheckpointId),
    /// Do a job.
    Run(Job),
    /// The run is over, or goes on without this worker; leave, with this exit code.
    Finish(ExitStatus),
}
