//! What the kernel is told about the connections of a ring: to notice a link that is dead.
//!
//! When a machine loses its power or a cable is cut, no packet comes that would say so. Each connection of a ring carries
//! data one way only, so its receiving end has nothing in flight: it asks the other machine once a second, and counts the
//! connection as lost when nothing came for about [`DEAD_AFTER`]. As a link is between two neighbours, one of its ends
//! receives, and the error goes round the ring from there.
//!
//! It is the other machine's kernel that answers. So a member that computes for minutes, or is stopped, is not lost: that
//! is for the coordinator and the group's `stall` to judge. For the same reason there is no `TCP_USER_TIMEOUT`: Linux
//! applies it also to data that wait because the other side has no room for them, and would end a group whose slowest
//! member reads its socket a few seconds later than the others.

use std::net::TcpStream;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// Questions that may go unanswered, one each [`INTERVAL`].
const QUESTIONS: u32 = 3;
/// Time of silence before the first question, and between two.
const INTERVAL: Duration = Duration::from_secs(1);
/// After so long a link that carries nothing counts as dead.
pub(super) const DEAD_AFTER: Duration = Duration::from_secs(INTERVAL.as_secs() * (QUESTIONS as u64 + 1));

/// Prepares a connection of the ring, at either end.
pub(super) fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    let keepalive = TcpKeepalive::new().with_time(INTERVAL).with_interval(INTERVAL).with_retries(QUESTIONS);
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}
