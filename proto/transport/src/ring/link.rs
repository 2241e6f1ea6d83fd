//! Options of a ring's connections, by which the kernel notices a dead link.
//!
//! When a machine loses power or a cable is cut, no packet arrives that would tell. Each connection of a ring carries
//! data one way only, so its receiving end has nothing in flight. Its kernel therefore probes the other machine once a
//! second (TCP keepalive), and considers the connection lost after about [`DEAD_AFTER`] of silence. Every link has a
//! receiving end, and the error goes round the ring from there.
//!
//! The other machine's kernel answers the probes. So a member that computes for minutes, or is stopped, is not lost;
//! that is for the coordinator and the group's `stall` to judge. For the same reason `TCP_USER_TIMEOUT` is not set:
//! Linux also applies it to data that wait because the other side has no room for them, which would end a group whose
//! slowest member reads its socket a few seconds later than the others.

use std::net::TcpStream;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// Probes that may go unanswered, sent one per [`INTERVAL`].
const PROBES: u32 = 3;
/// Silence before the first probe, and between two probes.
const INTERVAL: Duration = Duration::from_secs(1);
/// Silence after which a link counts as dead.
pub const DEAD_AFTER: Duration = Duration::from_secs(INTERVAL.as_secs() * (PROBES as u64 + 1));

/// Sets the options of a ring's connection, at either end.
pub(super) fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    let keepalive = TcpKeepalive::new().with_time(INTERVAL).with_interval(INTERVAL).with_retries(PROBES);
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}
