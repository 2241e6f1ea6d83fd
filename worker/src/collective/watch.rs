//! Tells whether a group still stands while its devices reduce among themselves, because their library does not report
//! that a peer died.

use std::io;
use std::net::TcpStream;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ulmus_transport::ring::or_would_block;
use ulmus_types::Rank;

use super::CollectiveError;
use super::abort::AbortHandle;
use super::ring::lost;

/// How long to go on after a neighbour closed its connection: it may have just finished what this member is about to.
const GRACE: Duration = Duration::from_millis(250);

/// The operation meanwhile, for people.
const OPERATION: &str = "an operation of the devices";

/// A view of a member's connections, for one operation of its device.
#[derive(Debug)]
pub struct Watch {
    abort: AbortHandle,
    neighbours: Vec<(Rank, TcpStream)>,
    begun: Instant,
    within: Duration,
    /// When a connection was first found to have ended.
    ended: OnceLock<Instant>,
}

impl Watch {
    pub(super) fn new(abort: AbortHandle, neighbours: Vec<(Rank, TcpStream)>, within: Duration) -> Self {
        Self { abort, neighbours, begun: Instant::now(), within, ended: OnceLock::new() }
    }

    /// Why the operation cannot succeed, if so: it was aborted, a neighbour is gone, or it has taken too long.
    pub fn broken(&self) -> Option<CollectiveError> {
        if self.abort.is_aborted() {
            return Some(CollectiveError::Aborted);
        }
        if let Some((rank, error)) = self.neighbours.iter().find_map(|(rank, end)| Some((*rank, ended(end)?)))
            && self.ended.get_or_init(Instant::now).elapsed() > GRACE
        {
            return Some(lost(rank, &error, &OPERATION));
        }
        let (rank, _) = self.neighbours.first().filter(|_| self.begun.elapsed() > self.within)?;
        let operation = OPERATION.to_owned();
        Some(CollectiveError::Timeout { rank: *rank, operation, after: self.within })
    }
}

/// How a connection has ended, if it has. Data waiting there belong to the next operation.
fn ended(stream: &TcpStream) -> Option<io::Error> {
    match or_would_block(stream.peek(&mut [0])) {
        Ok(Some(0)) => Some(io::ErrorKind::UnexpectedEof.into()),
        Ok(_) => None,
        Err(error) => Some(error),
    }
}
