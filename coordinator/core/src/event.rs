//! What can happen to a run, in the past tense.

use ulmus_types::{CheckpointId, ToCoordinator, WorkerId};

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Time passed. Expected a few times a second.
    Ticked,
    /// A worker said something. Its first message is its hello.
    Said(WorkerId, ToCoordinator),
    /// A worker's stream ended.
    Disconnected(WorkerId),
    /// The manifest of a checkpoint is stored, and `latest` names it.
    CheckpointCommitted(CheckpointId),
    /// The manifest could not be stored.
    CommitFailed(CheckpointId, String),
    /// Somebody asked to save and stop.
    StopRequested,
}
