//! What can happen to a run, in the past tense.

use ulmus_types::{CheckpointId, ErrorKind, RunId, ToCoordinator, WorkerId};

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "nearly every event is the largest one")]
pub enum Event {
    /// Time passed. Expected a few times a second.
    Ticked,
    /// A worker said something. Its first message is its hello, which [`Coordinator::judge`](crate::Coordinator::judge)
    /// has let in.
    Said {
        /// Who.
        worker: WorkerId,
        /// The run that it speaks of; none before it was told one.
        run: Option<RunId>,
        /// What.
        message: ToCoordinator,
    },
    /// A worker reports a step otherwise than it is recorded.
    Contradicted(WorkerId, String),
    /// What a worker said cannot be, which was found outside the core.
    SaidImpossible(WorkerId, String),
    /// A worker's stream ended.
    Disconnected(WorkerId),
    /// Every part of a checkpoint was read back as it was announced, its manifest is stored, and `latest` names it.
    CheckpointCommitted(CheckpointId),
    /// The manifest could not be stored.
    CommitFailed(CheckpointId, ErrorKind, String),
    /// Parts of a checkpoint that is about to be committed are not what their writers announced.
    PartsDamaged(CheckpointId, Vec<String>, String),
    /// A committed checkpoint is not what was written any more.
    CheckpointDamaged(CheckpointId, String),
    /// Somebody asked to save and stop.
    StopRequested,
    /// Local workers end again and again right after their start; why.
    LocalWorkersFailed(String),
}
