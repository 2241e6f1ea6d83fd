//! What the driver has to do, in the imperative.

use std::collections::BTreeMap;
use std::time::Duration;

use ulmus_types::{
    BadUnit, CheckpointId, CheckpointKind, Digest, ExitStatus, FileEntry, Generation, Job, JobKind,
    SourceReading, Step, StepReport, ToWorker, WorkerId,
};

/// Something to do. Effects are performed in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Store that this generation consists of these workers, durably, before anything else is done.
    SaveGeneration(Generation, Vec<WorkerId>),
    /// Store that this generation's group is no more, so that nobody waits for its members to come back.
    SaveGroupEnded(Generation),
    /// Store the fingerprint that every worker of the run must have.
    SaveFingerprint(Digest),
    /// Store reports of updates.
    SaveSteps(Generation, Vec<StepReport>),
    /// Store how reading goes on a worker, source by source.
    SaveReading(WorkerId, Step, Vec<SourceReading>),
    /// Store the units that everybody leaves out from now on, and why, where workers read it, before anything else is
    /// done.
    SaveQuarantine(BTreeMap<BadUnit, String>),
    /// Store that every update is done.
    SaveTrained(Step),
    /// Store that the manifest of a checkpoint is written.
    SaveCommitted(CheckpointId),
    /// Forget a checkpoint that is damaged; its files stay where they are.
    SaveDamaged(CheckpointId),
    /// Store that a job was given to a worker: nobody else's result counts.
    SaveJobStarted(Job, WorkerId),
    /// Store that a job is done, and its result (JSON).
    SaveJob(Job, String),
    /// Forget that the job of this kind is done: what it made is damaged.
    SaveJobUndone(JobKind),
    /// Send a message to a worker.
    Send(WorkerId, ToWorker),
    /// Close a worker's stream.
    Disconnect(WorkerId),
    /// Read the parts of a checkpoint back, which are all stored; then write its manifest, and then `latest`.
    Commit {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Whether it is kept.
        kind: CheckpointKind,
        /// Hash of the state.
        state: Digest,
        /// Its parts.
        files: BTreeMap<String, FileEntry>,
    },
    /// Delete a recovery checkpoint that newer ones replace.
    Delete(CheckpointId),
    /// Read committed checkpoints and tell which are damaged; nobody waits for it.
    Verify(Vec<CheckpointId>),
    /// Tell a person.
    Notify(Notification),
    /// End the process.
    Exit(Outcome),
}

/// What a person wants to know while the run goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notification {
    /// A worker may take work.
    Joined(WorkerId),
    /// A worker is gone, and why it is thought so.
    Lost(WorkerId, String),
    /// A worker was asked to leave, has handed over what it had, and is gone.
    Drained(WorkerId),
    /// A worker gets no work for a while, and why.
    SitsOut(WorkerId, Duration, String),
    /// A group trains.
    GroupFormed {
        /// Its generation.
        generation: Generation,
        /// Workers in it.
        size: usize,
        /// Updates done.
        step: Step,
    },
    /// A group has ended, and why.
    GroupEnded(Generation, String),
    /// A checkpoint is stored.
    Checkpoint(CheckpointId, CheckpointKind),
    /// A job has begun.
    JobStarted(Job, WorkerId),
    /// Anything else that is not routine: a refusal, something that is tried again, data that is used up.
    Info(String),
    /// Something that somebody should look after while the run goes on.
    Alarm(String),
}

/// How the run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The exit code.
    pub status: ExitStatus,
    /// What a person is told.
    pub message: String,
    /// Workers were left to the next coordinator.
    pub detached: bool,
}
