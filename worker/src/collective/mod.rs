//! Collective operations: how the members of a group add up and share what they hold.
//!
//! [`Collective`] is the seam: trainers know it alone. What it promises is that every member of a group calls the
//! same operations in the same order, and that every member then has the same bits: sums are of integers, and exact.
//!
//! A group is of one generation and is never mended. When anything goes wrong, on any member, all its
//! connections are closed, which ends the operation everywhere; a new group is formed under a new generation.
//! This module does not decide who is in a group, and does not retry.
//!
//! What goes round is checked: members prove to each other that they belong to the group, frames carry checksums, and a
//! link that is dead is noticed within seconds. [`CollectiveError::blames`] tells which neighbour it was.
//!
//! - [`chunks`]: which part of a vector belongs to which member.
//! - [`TcpGroup`]: a ring over TCP. [`Listener`]: the port at which a process takes part in one ring after another.
//! - [`AbortHandle`]: how other threads end a blocked operation.
//! - [`Watch`]: whether a group stands that reduces in another way just now, from device to device.

mod abort;
mod call;
mod frame;
mod link;
mod listener;
mod ring;
mod tcp;
mod watch;

#[cfg(test)]
mod tests;

use std::time::Duration;

use ulmus_backend::BLOCK;
use ulmus_types::{Blame, ErrorKind, Generation, Partition, Rank};

pub use abort::AbortHandle;
pub use listener::Listener;
pub use tcp::{Place, TcpGroup};
pub use watch::Watch;

/// A vector that is handed round as it is, in host memory.
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
/// All operations fail alike: after the first error the group is of no more use, and says the same error again.
#[expect(clippy::missing_errors_doc, reason = "said once, above")]
pub trait Collective: Send {
    /// This member's place, from 0.
    fn rank(&self) -> Rank;

    /// Members of the group.
    fn size(&self) -> usize;

    /// Replaces `values` by the sum over all members, modulo 2^64.
    fn all_reduce(&mut self, values: &mut [i64]) -> Result<(), CollectiveError>;

    /// Replaces this member's part ([`chunks`]) of `values` by the sum over all members; the rest holds partial sums.
    fn reduce_scatter(&mut self, values: &mut [i64]) -> Result<(), CollectiveError>;

    /// Replaces all other members' parts ([`chunks`]) of `values` by what those members hold there.
    fn all_gather(&mut self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Replaces `data` by what `root` holds.
    fn broadcast(&mut self, root: Rank, data: Data<'_>) -> Result<(), CollectiveError>;

    /// Ends any operation, now or later, from another thread.
    fn abort_handle(&self) -> AbortHandle;

    /// Tells whether the group still stands, while its members do something together in another way that takes no longer
    /// than `within`.
    fn watch(&self, within: Duration) -> Result<Watch, CollectiveError>;
}

/// Why an operation, or the forming of a group, did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// Another thread of this process ended it.
    #[error("the collective was aborted")]
    Aborted,
    /// Nothing at the next member's address answered as that member.
    #[error(
        "rank {rank} could not be reached at {address} for generation {generation} within {after:?}: {reason}; see that it runs, and that its address and port are open to other workers"
    )]
    Unreachable {
        /// The neighbour.
        rank: Rank,
        /// Where it should be.
        address: String,
        /// The group that was to be formed.
        generation: Generation,
        /// How long it was tried.
        after: Duration,
        /// What happened last.
        reason: String,
    },
    /// The member before this one did not call.
    #[error("rank {rank} did not connect for generation {generation} within {after:?}")]
    NeverCame {
        /// The neighbour.
        rank: Rank,
        /// The group that was to be formed.
        generation: Generation,
        /// How long it was waited for.
        after: Duration,
    },
    /// A neighbour's connection broke: its process died, or it left the group because of an error of its own.
    #[error("lost the connection to rank {rank}: {reason}")]
    PeerLost {
        /// The neighbour.
        rank: Rank,
        /// What the connection said.
        reason: String,
    },
    /// Nothing moved for too long.
    #[error("rank {rank} was silent for {after:?} in {operation}")]
    Timeout {
        /// The neighbour that was waited for.
        rank: Rank,
        /// What was going on.
        operation: String,
        /// How long.
        after: Duration,
    },
    /// What came over a link is not what was sent. Nothing of it was used.
    #[error(
        "what rank {from} ({name}) sent to rank {to} was damaged on the way, {what}; if it happens again, look at the network and the memory of both"
    )]
    Damaged {
        /// The neighbour that sent it.
        from: Rank,
        /// Who that is, for a person.
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
        /// What was expected, and what came.
        reason: String,
    },
    /// A neighbour does not want this member in its group.
    #[error("rank {rank} refused the connection: {reason}")]
    Refused {
        /// The neighbour.
        rank: Rank,
        /// Why.
        reason: &'static str,
    },
    /// The devices' own way to reduce failed.
    #[error("{0}")]
    Device(String),
    /// This machine's network does not do what it should.
    #[error("{act}: {reason}")]
    Network {
        /// What was tried.
        act: String,
        /// What the system said.
        reason: String,
    },
}

impl CollectiveError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Aborted
            | Self::Unreachable { .. }
            | Self::NeverCame { .. }
            | Self::PeerLost { .. }
            | Self::Timeout { .. }
            | Self::Damaged { .. }
            | Self::Device(_) => ErrorKind::Retry,
            Self::Refused { .. } => ErrorKind::Fenced,
            Self::Protocol { .. } => ErrorKind::Internal,
            Self::Network { .. } => ErrorKind::InvalidInput,
        }
    }

    /// The neighbour that this member holds it against, and what. `None` where the fault is its own or nobody's: it was
    /// aborted, it belongs to another group, or the programs differ.
    pub fn blames(&self) -> Option<(Rank, Blame)> {
        match self {
            Self::Unreachable { rank, .. } => Some((*rank, Blame::Unreachable)),
            Self::NeverCame { rank, .. } => Some((*rank, Blame::Absent)),
            Self::PeerLost { rank, .. } => Some((*rank, Blame::Lost)),
            Self::Timeout { rank, .. } => Some((*rank, Blame::Silent)),
            Self::Damaged { from, .. } => Some((*from, Blame::Damaged)),
            Self::Aborted
            | Self::Protocol { .. }
            | Self::Refused { .. }
            | Self::Device(_)
            | Self::Network { .. } => None,
        }
    }
}

/// Which part of a vector of `length` elements belongs to which member of a group of `size`: whole [`BLOCK`]s, of which
/// the norm of a gradient is summed, unless there are fewer blocks than members.
///
/// # Panics
/// When `size` is 0.
pub fn chunks(length: usize, size: usize) -> Partition {
    Partition::balanced(length, BLOCK, size)
}
