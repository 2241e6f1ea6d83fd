//! Identities, digests and problems that every crate of Ulmus speaks about.
//!
//! Everything here is plain data: no I/O, no clock, no async. The types are parsed once at the edge and
//! cannot be confused with each other afterwards: a [`Generation`] is not a [`Step`].

#![forbid(unsafe_code)]

mod digest;
mod error;
mod ids;
mod message;
mod problem;

pub use digest::{Digest, DigestError};
pub use error::{ErrorKind, ExitStatus};
pub use ids::{CheckpointId, Generation, IdError, Incarnation, LaneId, Rank, RunName, Step, WorkerId};
pub use message::{
    Assignment, BadUnit, CheckpointKind, FileEntry, Hello, Job, LeaveReason, Peer, Snapshot, SourceReading,
    StepReport, ToCoordinator, ToWorker, Wish, WorkerStatus,
};
pub use problem::{Problem, Problems};
