//! Identities, digests, messages and errors shared by every crate of Ulmus.
//!
//! Everything here is plain data: no I/O, no clock, no async. The types are parsed once at the edge and
//! cannot be confused with each other afterwards: a [`Generation`] is not a [`Step`].

#![forbid(unsafe_code)]

mod blame;
mod contents;
mod digest;
mod error;
mod ids;
mod job;
mod key;
mod message;
mod nonce;
mod partition;
mod problem;
mod secret;
mod stage;
mod text;
mod timing;

pub use blame::Blame;
pub use contents::{is_pointer, without_mark};
pub use digest::{Digest, DigestError};
pub use error::{ErrorKind, ExitStatus};
pub use ids::{
    CheckpointId, Generation, IdError, Incarnation, LaneId, Rank, RunId, RunName, StageName, Step, WorkerId,
};
pub use job::{Job, JobName, Part, Subject};
pub use key::GroupKey;
pub use message::{
    Assignment, BadUnit, CheckpointKind, FileEntry, GroupRequest, Heartbeat, Hello, LeaveReason, Peer, Ready,
    Repair, Section, Snapshot, SourceReading, StepReport, ToCoordinator, ToWorker, WorkerStatus,
};
pub use nonce::nonce_digest;
pub use partition::Partition;
pub use problem::{Problem, Problems};
pub use secret::{RunSecret, SessionSecret};
pub use stage::{
    Graph, LONGEST_TUNING_NAME, Milestones, Of, Reads, Requirements, Rewards, Stage, StageKind, Tuning,
};
pub use text::{counted, for_people};
pub use timing::{
    CONNECT_WITHIN, COORDINATOR_TIMEOUT, FORM_STILL_FOR, FORM_WITHIN, GREETED_WITHIN, HEARTBEAT_INTERVAL,
    RUN_STORE_DEADLINE, RUN_STORE_REQUEST, SNAPSHOT_SLOTS,
};

/// Target value of a position that is not trained on: padding, or the end of a document.
pub const IGNORE: u32 = u32::MAX;
