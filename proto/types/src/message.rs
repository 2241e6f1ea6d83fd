//! The messages between coordinator and worker, independent of any wire format.
//!
//! A worker opens one stream and sends [`Hello`]; everything else follows from it. Every later message carries the id
//! of the run it is about, so that one run's data is never taken for another's. Every message about training names its
//! generation, so that messages from an older one can be recognized and fenced. Reports are idempotent: sending the
//! same one twice changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    Blame, CheckpointId, Digest, ErrorKind, ExitStatus, Generation, GroupKey, Job, Rank, RunId, RunName,
    SessionSecret, StageName, Step, Subject, WorkerId,
};

/// How a worker introduces itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Who it is.
    pub worker: WorkerId,
    /// Version of its build; both sides must have the same one.
    pub version: String,
    /// Address at which other workers reach it, `host:port`.
    pub address: String,
    /// What it computes on, in words for a person.
    pub device: String,
    /// Compute threads.
    pub threads: u32,
    /// Process id, by which a coordinator recognizes its own children.
    pub pid: u32,
    /// The run that it already belongs to, if it was welcomed before.
    pub run: Option<RunId>,
    /// The secret from that run's welcome, which proves the worker's identity.
    pub secret: Option<SessionSecret>,
    /// What it is doing; a worker that reconnects may be in the middle of training or of a job.
    pub status: WorkerStatus,
    /// Name of the machine that it runs on.
    pub host: String,
    /// Bytes of memory that its device has.
    pub memory: u64,
    /// Whether it serves jobs and never trains.
    pub only_jobs: bool,
}

/// What a worker is doing at the moment of its [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkerStatus {
    /// Nothing. It may still hold a training state.
    Idle,
    /// Training in the group of this generation.
    Training(Generation),
    /// Working on this job, or waiting to report its result.
    Working(Job),
}

/// One optimizer update, as every member of the group saw it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Updates done, including this one.
    pub step: Step,
    /// Valid tokens trained on so far.
    pub tokens: u64,
    /// Mean cross-entropy per valid token before the update, in nats.
    pub loss: f64,
    /// Mean weighted z-loss per valid token.
    pub z_loss: f64,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Mean cross-entropy on held-out (validation) text after the update, in nats, if it was measured.
    pub held_out_loss: Option<f64>,
    /// Examples trained on so far; 0 for text.
    #[serde(default)]
    pub examples: u64,
    /// What else the stage measures, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub measures: BTreeMap<String, f64>,
    /// Wall time of the step.
    pub elapsed: Duration,
    /// Time of the step spent waiting for data.
    pub data_wait: Duration,
    /// Time of the step spent in collective operations.
    pub communication: Duration,
}

/// Statistics of reading one source on one worker, since it opened its data.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceReading {
    /// Name of the source.
    pub source: String,
    /// Epochs completed by the slowest stream, counted in whole units: a compressed file counts once it is fully read.
    pub epochs: f64,
    /// Documents decoded, including read-ahead.
    pub documents: u64,
    /// Tokens of the documents that passed the filters.
    pub tokens: u64,
    /// Bytes of text before the filters; 0 for sources of token ids.
    pub text_bytes: u64,
    /// Documents dropped because they had too few characters.
    pub short_characters: u64,
    /// Documents dropped because they had too few tokens.
    pub short_tokens: u64,
    /// Documents held out for validation.
    pub held_out: u64,
    /// Quarantined units, which every worker skips.
    pub bad_units: u64,
    /// Bytes read from the store.
    pub fetched_bytes: u64,
    /// Bytes read from the cache on disk.
    pub cached_bytes: u64,
    /// Failed requests, most of which were then retried.
    pub failed_requests: u64,
    /// Streams read by this worker.
    pub streams: u64,
    /// Streams whose next window is in memory.
    pub ready: u64,
    /// Time that steps spent waiting for the source.
    pub waited: Duration,
    /// Time covered by these statistics.
    pub elapsed: Duration,
}

/// A unit of a source that cannot be read, identified by its position in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BadUnit {
    /// Name of the source.
    pub source: String,
    /// Index of the unit.
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
    /// All members agreed to pause at this step: to admit new members, or to stop.
    Agreed,
    /// Every update of the plan is done.
    Finished,
    /// A source has used up its `max_epochs`; the text names the source.
    Exhausted(String),
    /// A unit of a source cannot be read; the text says why.
    BadUnit(BadUnit, String),
    /// The collective broke or was aborted.
    Lost {
        /// The neighbour that seems to be at fault, and how, if the member saw one.
        suspect: Option<(Rank, Blame)>,
        /// What the member saw.
        message: String,
    },
    /// Training cannot continue: damaged data, a non-finite gradient.
    Failed {
        /// What can be done about it.
        kind: ErrorKind,
        /// What happened.
        message: String,
    },
}

impl fmt::Display for LeaveReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agreed => f.write_str("all members agreed to"),
            Self::Finished => f.write_str("every update is done"),
            Self::Exhausted(message)
            | Self::BadUnit(_, message)
            | Self::Lost { message, .. }
            | Self::Failed { message, .. } => f.write_str(message),
        }
    }
}

/// What a worker's trainer is doing; it determines how long others wait for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Section {
    /// Nothing, or a job.
    #[default]
    Idle,
    /// Forming a group: connecting, and agreeing on a state.
    Forming,
    /// Computing its share of a step.
    Computing,
    /// In a collective operation with the other members.
    Collective,
    /// Waiting for text that has not arrived yet.
    Reading,
    /// Measuring the held-out loss.
    Measuring,
    /// Waiting until an older state is stored.
    Storing,
}

/// Shows that a worker is alive, and how far it has got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// The group that it is in, if any.
    pub generation: Generation,
    /// Number of the group's collective operations that it has entered: when a group stalls, the member that is behind
    /// the others is the culprit.
    pub collective: u64,
    /// What the trainer is doing.
    pub section: Section,
    /// How long ago it entered this section, or last confirmed that it is still waiting.
    pub since: Duration,
    /// Processor time used by the process so far: a job that hangs uses none.
    pub busy: Duration,
}

/// A request to train some steps again, because milestones are missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// Milestones to recreate. Training begins at the newest intact checkpoint before the first of them and ends with
    /// the last.
    pub milestones: BTreeSet<Step>,
}

/// Sent when a worker can take work, with everything that the coordinator has not confirmed.
#[derive(Debug, Clone, PartialEq)]
pub struct Ready {
    /// Hash of the gradients of one fixed micro-batch: equal only on machines with the same arithmetic. `None` if it never
    /// trains.
    pub fingerprint: Option<Digest>,
    /// The last group that it was in.
    pub generation: Option<Generation>,
    /// Updates done in that group and not yet confirmed, oldest first.
    pub reports: Vec<StepReport>,
    /// States that it holds in memory.
    pub snapshots: Vec<Snapshot>,
}

/// Whether a checkpoint is kept for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointKind {
    /// At a step of the plan's milestone interval: kept, and possibly averaged at the end.
    Milestone,
    /// For recovery after a failure: only the newest are kept.
    Recovery,
}

/// Size and hash of a stored file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 hash of the content.
    pub digest: Digest,
}

impl FileEntry {
    /// The entry of a file with this content.
    pub fn of(content: &[u8]) -> Self {
        Self { bytes: content.len() as u64, digest: Digest::of(content) }
    }
}

/// A state that a worker holds in memory until it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The checkpoint that the state will become.
    pub checkpoint: CheckpointId,
    /// Whether that checkpoint is kept for good.
    pub kind: CheckpointKind,
    /// Hash of weights, moments and counters; the same on every worker.
    pub state: Digest,
    /// Names of the files that the checkpoint consists of.
    pub files: Vec<String>,
}

/// A neighbour in the ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Address at which it listens, `host:port`.
    pub address: String,
    /// The worker that must answer at that address.
    pub worker: WorkerId,
}

/// A worker's role in a new group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The training stage.
    pub training: StageName,
    /// The model that the stage begins from if nothing of it is stored; `None` for the seed.
    pub from: Option<Subject>,
    /// The group.
    pub generation: Generation,
    /// The worker's rank in the group.
    pub rank: Rank,
    /// Number of workers in the group.
    pub size: u32,
    /// Key by which the members recognize each other.
    pub key: GroupKey,
    /// The previous member in the ring.
    pub previous: Peer,
    /// The next member in the ring.
    pub next: Peer,
    /// The worker's share of each update's micro-batches.
    pub micro_batches: Range<u64>,
    /// Updates that the coordinator has recorded: checkpoints of later steps are ignored.
    pub recorded: Step,
    /// Whether the stage may start from its beginning, if no member has a state and no checkpoint is intact.
    pub may_begin: bool,
    /// Set when the group trains some steps again.
    pub repair: Option<Repair>,
}

/// What a group is asked to do at the end of a step on which all its members agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupRequest {
    /// Save a recovery checkpoint.
    Save,
    /// Leave the group, keeping the state, so that a new one can be formed.
    Pause,
    /// Save a recovery checkpoint and leave the group.
    Stop,
}

/// A message from a worker to the coordinator.
#[derive(Debug, Clone, PartialEq)]
pub enum ToCoordinator {
    /// The first message.
    Hello(Hello),
    /// The [`crate::nonce_digest`] of what the worker read in the run's store, or why it could not read it.
    StoreRead(Result<Digest, String>),
    /// The worker can take work.
    Ready(Ready),
    /// The worker cannot join the run, and leaves.
    Unfit {
        /// What can be done about it.
        kind: ErrorKind,
        /// Why.
        message: String,
    },
    /// The worker was asked to leave: it will hand over what it holds and exit.
    Draining,
    /// The worker is alive.
    Heartbeat(Heartbeat),
    /// It has connected to its neighbours in the group, which now agrees on a state; that may take long.
    Connected(Generation),
    /// Its group has agreed on the step to continue from.
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
        /// A report of each update.
        reports: Vec<StepReport>,
    },
    /// Reading statistics, sent at a checkpoint.
    Reading {
        /// Updates done.
        step: Step,
        /// Statistics of each source.
        sources: Vec<SourceReading>,
    },
    /// It has left its group and is idle, with the state after `step`.
    Left {
        /// The group it was in.
        generation: Generation,
        /// Updates done.
        step: Step,
        /// Why.
        reason: LeaveReason,
    },
    /// It holds a state in memory that should be stored.
    Snapshot(Snapshot),
    /// It has stored files of a checkpoint.
    Written {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// The files.
        files: BTreeMap<String, FileEntry>,
    },
    /// It could not store a file of a checkpoint.
    WriteFailed {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// What can be done about it.
        kind: ErrorKind,
        /// What happened.
        message: String,
    },
    /// Something that a person should know, such as a damaged checkpoint that was skipped.
    Notice(String),
    /// A job is done.
    JobDone {
        /// The job.
        job: Job,
        /// Its result, as JSON.
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
        /// The unit that caused the failure, if one did.
        bad_unit: Option<BadUnit>,
        /// The damaged checkpoint that caused the failure, if one did.
        damaged: Option<CheckpointId>,
    },
}

impl ToCoordinator {
    /// The name of the message's kind, for a person.
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

/// A message from the coordinator to a worker.
#[expect(clippy::large_enum_variant, reason = "assignments are few, and moved once")]
#[derive(Debug, Clone, PartialEq)]
pub enum ToWorker {
    /// The worker may join the run.
    Welcome {
        /// The name of the run.
        run: RunName,
        /// The id of the run.
        id: RunId,
        /// The secret with which this worker proves its identity when it reconnects.
        secret: SessionSecret,
        /// The resolved plan, as TOML.
        plan: String,
        /// The run folder, as a URL. The worker must prove that it can read it: see [`crate::nonce_digest`].
        store: String,
    },
    /// The worker may not join, or must leave.
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
    /// Something for the group to do at the end of a step.
    Request(Generation, GroupRequest),
    /// Reports of this training stage up to this step are stored.
    Acknowledge(StageName, Step),
    /// Store these files of a snapshot.
    Write {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Names of the files.
        files: Vec<String>,
    },
    /// The snapshot need not be kept any longer.
    Release(CheckpointId),
    /// Do a job.
    Run(Job),
    /// The run is over, or continues without this worker; exit with this code.
    Finish(ExitStatus),
}
