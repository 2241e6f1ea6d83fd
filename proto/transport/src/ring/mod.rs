//! How the members of a group connect to each other: a ring of TCP connections, each from a member to the next.
//!
//! A process binds one [`Listener`] for its whole life. Once it is assigned a [`Place`] in a group, [`connect`] calls the
//! next member while the previous one calls, and both ends of each connection prove that they have the group's key. What
//! is sent over the connections afterwards is not this module's concern.
//!
//! Unlike the sessions with the coordinator this is blocking code: a ring is used by one thread, which waits for sockets
//! and for an [`Interrupt`] in [`wait`] and nowhere else.

mod call;
mod greeting;
mod link;
mod listener;
mod wakeup;

use std::io;
use std::time::Duration;

use ulmus_types::{Blame, Digest, ErrorKind, Generation, GroupKey, Peer, Rank};

pub use call::connect;
pub use greeting::{Answer, Greeting};
pub use link::DEAD_AFTER;
pub use listener::Listener;
pub use wakeup::{Interrupt, readable, wait};

/// A member's place in a group that is to be formed.
#[derive(Debug, Clone)]
pub struct Place {
    /// The run; connections of other runs are refused.
    pub run: Digest,
    /// The group's generation.
    pub generation: Generation,
    /// This member's rank.
    pub rank: Rank,
    /// The number of members.
    pub size: u32,
    /// The key by which members recognise each other.
    pub key: GroupKey,
    /// The member before this one. In a group of one it is this member itself, and is not used.
    pub previous: Peer,
    /// The member after this one.
    pub next: Peer,
}

impl Place {
    /// The rank of the member `distance` places after this one.
    pub fn neighbour(&self, distance: u32) -> Rank {
        Rank::new((self.rank.get() + distance) % self.size)
    }
}

/// Why a member could not connect to its neighbours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Another thread of this process ended it.
    #[error("connecting was interrupted")]
    Interrupted,
    /// Nobody at the next member's address answered as that member.
    #[error(
        "rank {rank} could not be reached at {address} for generation {generation} within {after:?}: {reason}; check that it runs, and that other workers can reach this address and port"
    )]
    Unreachable {
        /// The neighbour.
        rank: Rank,
        /// The neighbour's address.
        address: String,
        /// The group that was to be formed.
        generation: Generation,
        /// How long this member tried.
        after: Duration,
        /// What happened at the last attempt.
        reason: String,
    },
    /// The member before this one did not call.
    #[error("rank {rank} did not connect for generation {generation} within {after:?}")]
    NeverCame {
        /// The neighbour.
        rank: Rank,
        /// The group that was to be formed.
        generation: Generation,
        /// How long this member waited.
        after: Duration,
    },
    /// A neighbour did not let this member into its group.
    #[error("rank {rank} refused the connection: {reason}")]
    Refused {
        /// The neighbour.
        rank: Rank,
        /// The neighbour's reason.
        reason: &'static str,
    },
    /// A network function of this machine's system failed.
    #[error("{act}: {reason}")]
    Network {
        /// What was tried.
        act: String,
        /// The system's error.
        reason: String,
    },
}

impl ConnectError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Interrupted | Self::Unreachable { .. } | Self::NeverCame { .. } => ErrorKind::Retry,
            Self::Refused { .. } => ErrorKind::Fenced,
            Self::Network { .. } => ErrorKind::InvalidInput,
        }
    }

    /// The neighbour that this member blames, and for what; `None` if the fault is its own or nobody's.
    pub fn blames(&self) -> Option<(Rank, Blame)> {
        match self {
            Self::Unreachable { rank, .. } => Some((*rank, Blame::Unreachable)),
            Self::NeverCame { rank, .. } => Some((*rank, Blame::Absent)),
            Self::Interrupted | Self::Refused { .. } | Self::Network { .. } => None,
        }
    }
}

/// Turns "not ready" into `None`.
///
/// # Errors
/// Every other error.
pub fn or_would_block(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
