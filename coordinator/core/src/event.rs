//! What can happen to a run; named in the past tense.

use ulmus_types::{CheckpointId, ErrorKind, RunId, StageName, ToCoordinator, WorkerId};

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "nearly every event is the largest one")]
pub enum Event {
    /// Time passed. Expected a few times a second.
    Ticked,
    /// A message arrived. A worker's first one is its hello, which has passed
    /// [`Coordinator::check_hello`](crate::Coordinator::check_hello).
    Received {
        /// Its sender.
        worker: WorkerId,
        /// The run that it is about; `None` before the sender was told one.
        run: Option<RunId>,
        /// The message.
        message: ToCoordinator,
    },
    /// A worker's report of a step contradicts the record; how.
    Contradicted(WorkerId, String),
    /// A worker's message cannot be valid, for a reason found outside the core.
    ReceivedInvalid(WorkerId, String),
    /// A worker's stream ended.
    Disconnected(WorkerId),
    /// Every part of a checkpoint was read back and verified, its manifest is stored, and `latest` names it.
    CheckpointCommitted(CheckpointId),
    /// The manifest of a checkpoint could not be stored.
    CommitFailed(CheckpointId, ErrorKind, String),
    /// Parts of a checkpoint that was about to be committed differ from what their writers announced.
    PartsDamaged(CheckpointId, Vec<String>, String),
    /// A committed checkpoint no longer has the content that was written.
    CheckpointDamaged(CheckpointId, String),
    /// The examples of a training stage are made, and give so many updates.
    ExamplesMade(StageName, u64),
    /// A person asked to save and stop.
    StopRequested,
    /// Local workers repeatedly exit right after their start; why.
    LocalWorkersFailed(String),
}
