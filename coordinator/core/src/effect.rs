//! What the driver has to do; named in the imperative.

use std::collections::BTreeMap;
use std::time::Duration;

use ulmus_types::{
    BadUnit, CheckpointId, CheckpointKind, Digest, ExitStatus, FileEntry, Generation, Job, JobName,
    SourceReading, StageName, Step, StepReport, ToWorker, WorkerId,
};

use crate::members::Roster;

/// Something for the driver to do. Effects are performed in order.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "effects are few, and moved once")]
pub enum Effect {
    /// Durably store what this generation trains and of which workers it consists, before anything else is done.
    SaveGeneration(Generation, Roster),
    /// Store that this generation's group has ended, so that nobody waits for its members to come back.
    SaveGroupEnded(Generation),
    /// Store the fingerprint that every worker of the run must have.
    SaveFingerprint(Digest),
    /// Store reports of a training stage's updates.
    SaveSteps(StageName, Generation, Vec<StepReport>),
    /// Store a worker's reading statistics of each source.
    SaveReading(WorkerId, Step, Vec<SourceReading>),
    /// Store which units every worker skips from now on, and why, where workers read it, before anything else is done.
    SaveQuarantine(BTreeMap<BadUnit, String>),
    /// Store that every update of a training stage is done, and which was the last.
    SaveTrained(StageName, Step),
    /// Store that the manifest of a checkpoint is written.
    SaveCommitted(CheckpointId),
    /// Forget a damaged checkpoint; its files stay where they are.
    SaveDamaged(CheckpointId),
    /// Store that a job was given to a worker: no other worker's result counts.
    SaveJobStarted(Job, WorkerId),
    /// Store that a job is done, and its result as JSON.
    SaveJob(Job, String),
    /// Store that a job is not done, and why.
    SaveJobSkipped(Job, String),
    /// Forget that this job is done: its result is damaged.
    SaveJobUndone(JobName),
    /// Send a message to a worker.
    Send(WorkerId, ToWorker),
    /// Close a worker's stream.
    Disconnect(WorkerId),
    /// Read back the parts of a checkpoint, all of which are stored; then write its manifest, and then `latest`.
    Commit {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Whether it is kept for good.
        kind: CheckpointKind,
        /// Hash of the state.
        state: Digest,
        /// Its parts.
        files: BTreeMap<String, FileEntry>,
    },
    /// Delete a recovery checkpoint that newer ones have replaced.
    Delete(CheckpointId),
    /// Read committed checkpoints in the background and report which are damaged.
    Verify(Vec<CheckpointId>),
    /// Tell a person.
    Notify(Notification),
    /// End the process.
    Exit(Outcome),
}

/// What a person wants to know during the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notification {
    /// A worker has joined and may take work.
    Joined(WorkerId),
    /// A worker is lost, and why.
    Lost(WorkerId, String),
    /// A worker was asked to leave, has handed over what it had, and is gone.
    Drained(WorkerId),
    /// A worker gets no work for this long, and why.
    SitsOut(WorkerId, Duration, String),
    /// A group trains.
    GroupFormed {
        /// Its generation.
        generation: Generation,
        /// Workers in it.
        size: usize,
        /// The stage that it trains.
        training: StageName,
        /// Updates done.
        step: Step,
        /// The last update of the stage.
        last: Step,
    },
    /// A group has ended, and why.
    GroupEnded(Generation, String),
    /// A checkpoint is stored.
    Checkpoint(CheckpointId, CheckpointKind),
    /// A job has begun.
    JobStarted {
        /// Its name.
        job: JobName,
        /// The worker that does it.
        worker: WorkerId,
        /// What it is for and what it reads.
        purpose: String,
    },
    /// Anything else that is not routine: a refusal, a retry, data that has run out.
    Info(String),
    /// Something that a person should attend to while the run continues.
    Alarm(String),
}

/// How the run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The exit code.
    pub status: ExitStatus,
    /// The message for a person.
    pub message: String,
    /// Whether workers were left running for the next coordinator.
    pub detached: bool,
}
