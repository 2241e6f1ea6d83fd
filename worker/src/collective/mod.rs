//! Collective operations: how the members of a group add up and share what they hold.
//!
//! [`Collective`] is the seam: trainers know it alone. What it promises is that every member of a group calls the
//! same operations in the same order, and that every member then has the same bits: integer sums are exact,
//! floating-point sums are taken in an order that depends on the length and the size of the group alone.
//!
//! A group is of one generation and is never mended. When anything goes wrong, on any member, all its
//! connections are closed, which ends the operation everywhere; a new group is formed under a new generation.
//! This module does not decide who is in a group, and does not retry.
//!
//! - [`chunk`]: which part of a vector belongs to which member.
//! - [`TcpGroup`]: a ring over TCP. [`Listener`]: the port at which a process takes part in one ring after another.
//! - [`AbortHandle`]: how other threads end a blocked operation.
//! - [`Watch`]: whether a group stands that reduces in another way just now, from device to device.

mod frame;
mod listener;
mod tcp;
mod wake;
mod watch;

#[cfg(test)]
mod tests;

use std::ops::Range;
use std::time::Duration;

use half::bf16;
use ulmus_types::{ErrorKind, Rank};

pub use listener::Listener;
pub use tcp::{Place, TcpGroup};
pub use wake::AbortHandle;
pub use watch::Watch;

/// Boundaries of chunks fall on multiples of this many elements, where there are enough of them: whole blocks of
/// the gradient norm, which is summed block by block.
pub const BLOCK: usize = 65_536;

/// A vector that takes part in a collective, in host memory.
#[derive(Debug)]
pub enum Data<'a> {
    /// 64-bit integers; sums are exact (modulo 2^64).
    I64(&'a mut [i64]),
    /// 32-bit floats; sums are rounded to f32 after each addition.
    F32(&'a mut [f32]),
    /// 16-bit brain floats; sums are taken in f32 and rounded once.
    Bf16(&'a mut [bf16]),
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

impl<'a> From<&'a mut [bf16]> for Data<'a> {
    fn from(values: &'a mut [bf16]) -> Self {
        Self::Bf16(values)
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

    /// Replaces `data` by the sum over all members.
    fn all_reduce(&mut self, data: Data<'_>) -> Result<(), CollectiveError>;

    /// Replaces this member's [`chunk`] of `data` by the sum over all members; the rest holds partial sums.
    fn reduce_scatter(&mut self, data: Data<'_>) -> Result<(), CollectiveError>;

    /// Replaces all other members' [`chunk`]s of `data` by what those members hold there.
    fn all_gather(&mut self, data: Data<'_>) -> Result<(), CollectiveError>;

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
            Self::Aborted | Self::PeerLost { .. } | Self::Timeout { .. } | Self::Device(_) => {
                ErrorKind::Retry
            }
            Self::Refused { .. } => ErrorKind::Fenced,
            Self::Protocol { .. } => ErrorKind::Internal,
            Self::Network { .. } => ErrorKind::InvalidInput,
        }
    }
}

/// The part of a vector of `length` elements that belongs to `rank` in a group of `size`.
///
/// The chunks of all ranks lie end to end; they are whole [`BLOCK`]s (but for the end of the vector), and their
/// numbers of blocks differ by at most one. A vector with fewer blocks than the group has members is cut between
/// any two elements.
///
/// # Panics
/// When `rank` is not below `size`.
pub fn chunk(length: usize, size: usize, rank: usize) -> Range<usize> {
    assert!(rank < size, "rank {rank} is not in a group of {size}");
    let blocks = length.div_ceil(BLOCK);
    let (units, unit) = if blocks < size { (length, 1) } else { (blocks, BLOCK) };
    let boundary = |rank: usize| {
        // The first `units % size` chunks have one unit more.
        let whole = units / size * rank + rank.min(units % size);
        length.min(whole * unit)
    };
    boundary(rank)..boundary(rank + 1)
}
