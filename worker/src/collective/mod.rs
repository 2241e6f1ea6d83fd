//! Collective operations: how the members of a group add up and share what they hold.
//!
//! [`Collective`] is the seam: trainers know nothing else of this module. Every member of a group calls the same
//! operations in the same order, or the group ends; afterwards every member has the same bits, because sums are of
//! integers and exact.
//!
//! A group belongs to one generation and is never repaired. When anything goes wrong on any member, all its connections
//! are closed, which ends the operation everywhere; a new group is formed under a new generation. This module does not
//! decide who is in a group, and does not retry.
//!
//! Everything sent is checked: members prove to each other that they belong to the group, frames carry checksums, and a
//! dead link is noticed within seconds. [`CollectiveError::blames`] tells which neighbour was at fault.
//!
//! - [`chunks`]: which part of a vector belongs to which member.
//! - [`TcpGroup`]: a ring over TCP. [`Listener`]: the port at which a process takes part in one ring after another.
//! - [`AbortHandle`]: how other threads end a blocked operation.
//! - [`Watch`]: whether a group still stands while its devices reduce among themselves.

mod abort;
mod frame;
mod ring;
mod tcp;
mod watch;

#[cfg(test)]
mod tests;

use std::time::Duration;

use ulmus_backend::BLOCK;
use ulmus_transport::ring::ConnectError;
use ulmus_types::{Blame, ErrorKind, Partition, Rank};

pub use abort::AbortHandle;
pub use tcp::TcpGroup;
pub use watch::Watch;

/// A vector in host memory, to be broadcast unchanged.
#[derive(Debug)]
pub enum Data<'a> {
    /// 64-bit integers.
    I64(&'a mut [i64]),
    /// 32-bit floats.
    F32(&'a mut [f32]),
}

impl<'a> From<&'a mut [i64]> for Data<'a> {
    fn from(values: &'a mut [i64]) -> Self {
        Self::I64(values)
    }
}

impl<'a> From<&'a mut [f32]> for Data<'a> {
    fn from(values: &'a mut [f32]) -> Self {
        Self::F32(values)
    }
}

/// The operations of a group. All work in place; lengths and types must be the same on all members.
///
/// # Errors
/// All operations fail alike: after the first error the group is of no more use, and returns the same error again.
#[expect(clippy::missing_errors_doc, reason = "described once, above")]
pub trait Collective: Send {
    /// This member's rank, from 0.
    fn rank(&self) -> Rank;

    /// The number of members.
    fn size(&self) -> usize;

    /// Replaces `values` by the sum over all members, modulo 2^64.
    fn all_reduce(&mut self, values: &mut [i64]) -> Result<(), CollectiveError>;

    /// Replaces this member's part ([`chunks`]) of `values` by the sum over all members; the rest holds partial sums.
    fn reduce_scatter(&mut self, values: &mut [i64]) -> Result<(), CollectiveError>;

    /// Replaces the other members' parts ([`chunks`]) of `values` by what those members hold there.
    fn all_gather(&mut self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Replaces `data` by member `root`'s.
    fn broadcast(&mut self, root: Rank, data: Data<'_>) -> Result<(), CollectiveError>;

    /// A handle that ends any operation, present or future, from another thread.
    fn abort_handle(&self) -> AbortHandle;

    /// A watch that tells whether the group still stands, while its members do something together in another way, for
    /// at most `within`.
    fn watch(&self, within: Duration) -> Result<Watch, CollectiveError>;
}

/// Why an operation, or forming a group, failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// Another thread of this process ended the operation.
    #[error("the collective was aborted")]
    Aborted,
    /// The group could not be formed.
    #[error(transparent)]
    Connect(ConnectError),
    /// A neighbour's connection broke: its process died, or it left the group after an error of its own.
    #[error("lost the connection to rank {rank}: {reason}")]
    PeerLost {
        /// The neighbour.
        rank: Rank,
        /// The error of the connection.
        reason: String,
    },
    /// No byte was sent or received for too long.
    #[error("rank {rank} was silent for {after:?} in {operation}")]
    Timeout {
        /// The neighbour that this member was waiting for.
        rank: Rank,
        /// The operation.
        operation: String,
        /// How long this member waited.
        after: Duration,
    },
    /// Data changed on the way from a neighbour. None of it was used.
    #[error(
        "what rank {from} ({name}) sent to rank {to} was damaged on the way, {what}; if it happens again, check the network, and the memory of both machines"
    )]
    Damaged {
        /// The neighbour that sent it.
        from: Rank,
        /// The neighbour's name, for people.
        name: String,
        /// This member.
        to: Rank,
        /// What was damaged.
        what: String,
    },
    /// A neighbour is in another operation than this member: the programs differ.
    #[error("rank {rank} is out of step: {reason}")]
    Protocol {
        /// The neighbour.
        rank: Rank,
        /// What was expected, and what was received.
        reason: String,
    },
    /// The reduction from device to device failed.
    #[error("{0}")]
    Device(String),
    /// A network function of this machine's system failed.
    #[error("{act}: {reason}")]
    Network {
        /// What was tried.
        act: String,
        /// The system's error.
        reason: String,
    },
}

impl From<ConnectError> for CollectiveError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Interrupted => Self::Aborted,
            error => Self::Connect(error),
        }
    }
}

impl CollectiveError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Aborted
            | Self::PeerLost { .. }
            | Self::Timeout { .. }
            | Self::Damaged { .. }
            | Self::Device(_) => ErrorKind::Retry,
            Self::Connect(error) => error.kind(),
            Self::Protocol { .. } => ErrorKind::Internal,
            Self::Network { .. } => ErrorKind::InvalidInput,
        }
    }

    /// The neighbour that this member blames, and for what. `None` if the fault is its own or nobody's: it was aborted,
    /// it belongs to another group, or the programs differ.
    pub fn blames(&self) -> Option<(Rank, Blame)> {
        match self {
            Self::Connect(error) => error.blames(),
            Self::PeerLost { rank, .. } => Some((*rank, Blame::Lost)),
            Self::Timeout { rank, .. } => Some((*rank, Blame::Silent)),
            Self::Damaged { from, .. } => Some((*from, Blame::Damaged)),
            Self::Aborted | Self::Protocol { .. } | Self::Device(_) | Self::Network { .. } => None,
        }
    }
}

/// Which part of a vector of `length` elements belongs to which member of a group of `size`. Parts are whole
/// [`BLOCK`]s, by which a gradient's norm is summed, unless there are fewer blocks than members.
///
/// # Panics
/// When `size` is 0.
pub fn chunks(length: usize, size: usize) -> Partition {
    Partition::balanced(length, BLOCK, size)
}
