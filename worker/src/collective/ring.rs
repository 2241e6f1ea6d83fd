//! The two connections of a member, and the frames that go over them.
//!
//! [`Ring::exchange`] sends and receives at the same time without blocking on either, so frames of any size cannot
//! deadlock, whatever the socket buffers hold. A frame counts as received when its checksum is right; until then its
//! data are neither used nor passed on. Checksums are computed piece by piece, while a piece is in the processor's
//! cache anyway.

use std::fmt::Display;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use socket2::SockRef;
use ulmus_transport::ring::{DEAD_AFTER, or_would_block, readable, wait};
use ulmus_types::Rank;

use super::CollectiveError;
use super::abort::AbortHandle;
use super::frame::{Checksum, Decoded, Header};

/// Bytes per call of a socket: enough for few calls, little enough to be in the cache when the checksum is computed.
const PIECE: usize = 1 << 17;

/// The two connections of a member.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) rank: Rank,
    pub(super) next: End,
    pub(super) previous: End,
    /// How long an operation may go without a single byte moving.
    pub(super) stall: Duration,
}

/// A connection to a neighbour.
#[derive(Debug)]
pub(super) struct End {
    pub(super) rank: Rank,
    /// The neighbour's name, for people.
    pub(super) name: String,
    pub(super) stream: TcpStream,
}

impl End {
    /// Fails if the next member has closed the connection. If packets no longer reach it, nothing else may tell: what
    /// is sent to it is lost, and never answered.
    fn still_takes(&self) -> io::Result<()> {
        match or_would_block(self.stream.peek(&mut [0]))? {
            None => Ok(()),
            Some(0) => Err(ErrorKind::UnexpectedEof.into()),
            Some(_) => {
                Err(io::Error::new(ErrorKind::InvalidData, "it sent data against the direction of the ring"))
            }
        }
    }
}

impl Ring {
    /// Closes both connections so that the neighbours notice at once, whatever they are doing or have sent.
    pub(super) fn reset(self) {
        for end in [&self.next, &self.previous] {
            // Should this fail, the connection is closed in order, which is noticed later.
            drop(SockRef::from(&end.stream).set_linger(Some(Duration::ZERO)));
        }
    }

    /// Sends a frame to the next member while receiving one from the previous. `received` is the header that the frame
    /// must have, and the buffer for its data, which determines the length in that header.
    pub(super) fn exchange(
        &self,
        abort: &AbortHandle,
        sent: Option<(Header, &[u8])>,
        received: Option<(Header, &mut [u8])>,
    ) -> Result<(), CollectiveError> {
        let mut outgoing = sent.map(|(header, data)| Outgoing::new(header, data));
        let mut incoming = received.map(|(header, data)| Incoming::new(header, data));
        let sent = outgoing.as_ref().map(|frame| frame.header);
        let Some(operation) = sent.or(incoming.as_ref().map(|frame| frame.expected)) else { return Ok(()) };
        let lost = |end: &End, error: &io::Error| lost(end.rank, error, &operation);
        let mut deadline = Instant::now() + self.stall;
        // Whether an end that is idle now may still report a dead link.
        let mut open = [true; 2];
        while outgoing.is_some() || incoming.is_some() {
            if abort.is_aborted() {
                return Err(CollectiveError::Aborted);
            }
            let mut moved = false;
            if let Some(frame) = &mut outgoing {
                moved |= frame.write(&self.next.stream).map_err(|error| lost(&self.next, &error))?;
                if frame.is_done() {
                    outgoing = None;
                }
            }
            if let Some(frame) = &mut incoming {
                moved |= frame.read(&self.previous.stream).map_err(|error| lost(&self.previous, &error))?;
                self.check(frame)?;
                if frame.is_done() {
                    incoming = None;
                }
            }
            let now = Instant::now();
            if moved {
                abort.moved(now);
                deadline = now + self.stall;
                continue;
            }
            if now >= deadline {
                let silent = incoming.as_ref().map(|frame| (self.previous.rank, frame.expected));
                let deaf = outgoing.as_ref().map(|frame| (self.next.rank, frame.header));
                if let Some((rank, header)) = silent.or(deaf) {
                    let operation = header.to_string();
                    return Err(CollectiveError::Timeout { rank, operation, after: self.stall });
                }
            }
            // The next member sends nothing; its end becomes readable when it closes the connection.
            let ends = [
                (&self.next, outgoing.as_ref().map(|_| PollFlags::OUT | PollFlags::IN)),
                (&self.previous, incoming.as_ref().map(|_| PollFlags::IN)),
            ];
            let mut sources = vec![readable(abort)];
            // The system reports errors of any end in the list, even of one that awaits nothing.
            let watched = ends.iter().zip(open).filter(|((_, awaited), open)| awaited.is_some() || *open);
            sources.extend(
                watched.map(|((end, awaited), _)| {
                    PollFd::new(&end.stream, awaited.unwrap_or(PollFlags::empty()))
                }),
            );
            wait(&mut sources, deadline).map_err(|error| network("cannot wait for sockets", &error))?;
            if outgoing.is_some() {
                self.next.still_takes().map_err(|error| lost(&self.next, &error))?;
            }
            let broken =
                sources.iter().any(|source| source.revents().intersects(PollFlags::ERR | PollFlags::HUP));
            for ((end, awaited), open) in ends.into_iter().zip(&mut open) {
                if broken && awaited.is_none() && *open {
                    match end.stream.take_error() {
                        // The error is not at this end.
                        Ok(None) => *open = false,
                        Ok(Some(error)) | Err(error) => return Err(lost(end, &error)),
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares header and checksum with the expected ones, as soon as each has arrived.
    fn check(&self, frame: &Incoming<'_>) -> Result<(), CollectiveError> {
        let (rank, expected) = (self.previous.rank, frame.expected);
        let damaged = |what: String| CollectiveError::Damaged {
            from: rank,
            name: self.previous.name.clone(),
            to: self.rank,
            what,
        };
        if frame.is_done() && frame.checksum.encode() != frame.trailer {
            return Err(damaged(format!("the data or the checksum of {expected}")));
        }
        if frame.done != Header::BYTES {
            return Ok(());
        }
        match Header::decode(&frame.encoded) {
            Decoded::Header(found) if found == expected => Ok(()),
            Decoded::Header(found) => Err(CollectiveError::Protocol {
                rank,
                reason: format!("it sent {found} instead of {expected}"),
            }),
            Decoded::Unknown => {
                let reason = format!("it sent something unknown instead of {expected}");
                Err(CollectiveError::Protocol { rank, reason })
            }
            Decoded::Damaged => Err(damaged(format!("the header of {expected}"))),
        }
    }
}

/// A frame that is being sent.
struct Outgoing<'a> {
    header: Header,
    encoded: [u8; Header::BYTES],
    data: &'a [u8],
    checksum: Checksum,
    /// Bytes of data that the checksum includes.
    summed: usize,
    /// The encoded checksum, valid once it includes all data.
    trailer: [u8; Checksum::BYTES],
    done: usize,
}

impl<'a> Outgoing<'a> {
    fn new(header: Header, data: &'a [u8]) -> Self {
        let header = Header { bytes: data.len() as u64, ..header };
        let encoded = header.encode();
        let checksum = Checksum::begin(&encoded);
        let trailer = checksum.encode();
        Self { header, encoded, data, checksum, summed: 0, trailer, done: 0 }
    }

    fn is_done(&self) -> bool {
        self.done == Header::BYTES + self.data.len() + Checksum::BYTES
    }

    /// Writes as much as the socket takes; returns whether it took anything.
    fn write(&mut self, mut stream: &TcpStream) -> io::Result<bool> {
        let length = self.data.len();
        let sent = self.done.saturating_sub(Header::BYTES).min(length);
        let end = length.min(sent + PIECE);
        if end > self.summed {
            self.checksum.add(&self.data[self.summed..end]);
            self.summed = end;
            if end == length {
                self.trailer = self.checksum.encode();
            }
        }
        let header = &self.encoded[self.done.min(Header::BYTES)..];
        let trailer = self.done.saturating_sub(Header::BYTES + length);
        let trailer = if end == length { &self.trailer[trailer..] } else { &[] };
        let pieces = [header, &self.data[sent..end], trailer].map(IoSlice::new);
        let count = or_would_block(stream.write_vectored(&pieces))?;
        self.done += count.unwrap_or(0);
        Ok(count.is_some())
    }
}

/// A frame that is being received.
struct Incoming<'a> {
    expected: Header,
    encoded: [u8; Header::BYTES],
    data: &'a mut [u8],
    checksum: Checksum,
    trailer: [u8; Checksum::BYTES],
    done: usize,
}

impl<'a> Incoming<'a> {
    fn new(expected: Header, data: &'a mut [u8]) -> Self {
        let expected = Header { bytes: data.len() as u64, ..expected };
        // A frame with another header is refused before its checksum is compared.
        let checksum = Checksum::begin(&expected.encode());
        Self { expected, encoded: [0; Header::BYTES], data, checksum, trailer: [0; Checksum::BYTES], done: 0 }
    }

    fn is_done(&self) -> bool {
        self.done == Header::BYTES + self.data.len() + Checksum::BYTES
    }

    /// Reads what the socket has, the header first; returns whether it had anything.
    fn read(&mut self, mut stream: &TcpStream) -> io::Result<bool> {
        let length = self.data.len();
        let count = match self.done.checked_sub(Header::BYTES) {
            None => or_would_block(stream.read(&mut self.encoded[self.done..]))?,
            Some(done) => {
                let (start, end) = (done.min(length), length.min(done + PIECE));
                let trailer = if end == length { &mut self.trailer[done - start..] } else { &mut [] };
                let mut pieces = [&mut self.data[start..end], trailer].map(IoSliceMut::new);
                let count = or_would_block(stream.read_vectored(&mut pieces))?;
                self.checksum.add(&self.data[start..end.min(start + count.unwrap_or(0))]);
                count
            }
        };
        if count == Some(0) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.done += count.unwrap_or(0);
        Ok(count.is_some())
    }
}

/// What the error of a connection tells about the neighbour.
pub(super) fn lost(rank: Rank, error: &io::Error, operation: &dyn Display) -> CollectiveError {
    let reason = match error.kind() {
        // The kernel ended the connection because the other machine no longer answers.
        ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
            let operation = operation.to_string();
            return CollectiveError::Timeout { rank, operation, after: DEAD_AFTER };
        }
        ErrorKind::UnexpectedEof => "it closed the connection".to_owned(),
        _ => error.to_string(),
    };
    CollectiveError::PeerLost { rank, reason }
}

pub(super) fn network(act: &str, error: &io::Error) -> CollectiveError {
    CollectiveError::Network { act: act.to_owned(), reason: error.to_string() }
}
