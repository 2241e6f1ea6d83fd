//! A ring over TCP: every member sends to the next and receives from the one before, at the same time.
//!
//! Reduce-scatter and all-gather go round the ring in `size - 1` hops of one chunk each, which is the least that
//! any algorithm can send; broadcast passes segments on as they come. In each hop [`Ring::exchange`] sends and
//! receives without blocking on either, so chunks of any size cannot deadlock, whatever the socket buffers hold.
//!
//! Only one thread uses a group. It blocks in [`wait`] alone, together with the group's [`AbortHandle`]. Sockets
//! belong to one generation and are closed at the first error, so that the error goes round the ring and no member
//! is left waiting for one that has given up.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use ulmus_types::{Digest, Generation, Peer, Rank};

use super::frame::{Answer, ElementType, Greeting, Header, Operation};
use super::listener::Listener;
use super::wake::{AbortHandle, readable, wait, writable};
use super::watch::Watch;
use super::{Collective, CollectiveError, Data, chunk};

/// Pause before a neighbour that could not be reached is tried again.
const REDIAL: Duration = Duration::from_millis(50);
/// Bytes that a broadcast passes on at a time: small against the data, large against a packet.
const SEGMENT: usize = 1 << 20;

/// A member's place in a group that is to be formed.
#[derive(Debug, Clone)]
pub struct Place {
    /// The run; connections of other runs are refused.
    pub run: Digest,
    /// The group's generation.
    pub generation: Generation,
    /// This member's rank.
    pub rank: Rank,
    /// Members of the group.
    pub size: u32,
    /// The member before this one. A group of one has itself on both sides, and uses neither.
    pub previous: Peer,
    /// The member after this one.
    pub next: Peer,
}

impl Place {
    fn neighbour(&self, distance: u32) -> Rank {
        Rank::new((self.rank.get() + distance) % self.size)
    }
}

/// A member of a ring over TCP.
#[derive(Debug)]
pub struct TcpGroup {
    generation: Generation,
    rank: usize,
    size: usize,
    /// `None` in a group of one.
    ring: Option<Ring>,
    abort: AbortHandle,
    /// Operations entered, an all-reduce counting as two.
    entered: u64,
    /// Receives what is then added; kept, so that steps do not allocate. `i64`, for its alignment.
    scratch: Vec<i64>,
    failure: Option<CollectiveError>,
}

impl TcpGroup {
    /// Connects to both neighbours. Blocks until both have agreed, `abort` is used, or `patience` is over.
    ///
    /// `stall` is how long a later operation may go without a single byte moving: longer than the slowest
    /// member's share of a step.
    ///
    /// # Errors
    /// [`CollectiveError::Refused`] when a neighbour is in a later generation or has been replaced;
    /// [`CollectiveError::Timeout`] when one does not come.
    pub fn form(
        listener: &mut Listener,
        place: &Place,
        abort: &AbortHandle,
        patience: Duration,
        stall: Duration,
    ) -> Result<Self, CollectiveError> {
        let ring = if place.size > 1 {
            let (next, previous) = connect(listener, place, abort, patience)?;
            let (next_rank, previous_rank) = (place.neighbour(1), place.neighbour(place.size - 1));
            Some(Ring { next, next_rank, previous, previous_rank, stall })
        } else {
            None
        };
        Ok(Self {
            generation: place.generation,
            rank: place.rank.index(),
            size: place.size as usize,
            ring,
            abort: abort.clone(),
            entered: 0,
            scratch: Vec::new(),
            failure: None,
        })
    }

    /// Runs an operation unless the group has failed; the first failure closes it.
    fn run(
        &mut self,
        operation: impl FnOnce(&mut Self) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let result = if self.abort.is_aborted() { Err(CollectiveError::Aborted) } else { operation(self) };
        result.map_err(|error| {
            // A connection that breaks while this member is being aborted breaks because of the abort.
            let error = if self.abort.is_aborted() { CollectiveError::Aborted } else { error };
            self.ring = None;
            self.failure.insert(error).clone()
        })
    }

    /// The header of this operation's frames, but for `part` and `bytes`.
    fn begin(&mut self, operation: Operation, element: ElementType) -> Header {
        self.entered += 1;
        self.abort.enter(self.entered);
        let (generation, number) = (self.generation, self.entered);
        Header { generation, number, operation, element, part: 0, bytes: 0 }
    }

    /// Rank r's chunk is summed in the order r+1, r+2, ..., r, wherever it is in the ring.
    fn sum_chunks<T: Summand>(&mut self, values: &mut [T]) -> Result<(), CollectiveError> {
        let header = self.begin(Operation::ReduceScatter, T::TYPE);
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let (length, size) = (values.len(), self.size);
        self.scratch.resize((chunk(length, size, 0).len() * size_of::<T>()).div_ceil(size_of::<i64>()), 0);
        for hop in 1..size {
            let sent = chunk(length, size, (self.rank + size - hop) % size);
            let added = chunk(length, size, (self.rank + 2 * size - hop - 1) % size);
            let received = &mut cast_slice_mut::<i64, T>(&mut self.scratch)[..added.len()];
            let header = Header { part: hop as u32, ..header };
            ring.exchange(
                &self.abort,
                Some((header, cast_slice(&values[sent]))),
                Some((header, cast_slice_mut(received))),
            )?;
            T::add(&mut values[added], received);
        }
        Ok(())
    }

    fn spread_chunks<T: Element>(&mut self, values: &mut [T]) -> Result<(), CollectiveError> {
        let header = self.begin(Operation::AllGather, T::TYPE);
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let (length, size) = (values.len(), self.size);
        for hop in 1..size {
            let sent = chunk(length, size, (self.rank + size + 1 - hop) % size);
            let received = chunk(length, size, (self.rank + size - hop) % size);
            let [sent, received] =
                values.get_disjoint_mut([sent, received]).expect("chunks of two ranks do not overlap");
            let header = Header { part: hop as u32, ..header };
            ring.exchange(
                &self.abort,
                Some((header, cast_slice(sent))),
                Some((header, cast_slice_mut(received))),
            )?;
        }
        Ok(())
    }

    /// Segments travel down the ring from `root`; each member receives one while it passes on the one before.
    fn pass_on<T: Element>(&mut self, root: Rank, values: &mut [T]) -> Result<(), CollectiveError> {
        assert!(root.index() < self.size, "root {root} is not in a group of {}", self.size);
        let header = self.begin(Operation::Broadcast, T::TYPE);
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let place = (self.rank + self.size - root.index()) % self.size;
        let (receives, sends) = (place > 0, place < self.size - 1);
        let bytes: &mut [u8] = cast_slice_mut(values);
        let segments = bytes.len().div_ceil(SEGMENT).max(1);
        for round in 0..=segments {
            let (passed, rest) = bytes.split_at_mut(bytes.len().min(round * SEGMENT));
            let sent = (sends && round > 0).then(|| {
                let header = Header { part: round as u32, ..header };
                (header, &passed[(round - 1) * SEGMENT..])
            });
            let received = (receives && round < segments).then(|| {
                let header = Header { part: round as u32 + 1, ..header };
                let end = rest.len().min(SEGMENT);
                (header, &mut rest[..end])
            });
            ring.exchange(&self.abort, sent, received)?;
        }
        Ok(())
    }

    /// Adds up brain floats: takes the sum in f32 and rounds this member's chunk once.
    fn sum_chunks_bf16(&mut self, values: &mut [bf16]) -> Result<(), CollectiveError> {
        let mut wide = values.to_f32_vec();
        self.sum_chunks(&mut wide)?;
        let own = chunk(values.len(), self.size, self.rank);
        values[own.clone()].convert_from_f32_slice(&wide[own]);
        Ok(())
    }
}

impl Collective for TcpGroup {
    fn rank(&self) -> Rank {
        Rank::new(self.rank as u32)
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&mut self, data: Data<'_>) -> Result<(), CollectiveError> {
        self.run(|group| match data {
            Data::I64(values) => group.sum_chunks(values).and_then(|()| group.spread_chunks(values)),
            Data::F32(values) => group.sum_chunks(values).and_then(|()| group.spread_chunks(values)),
            Data::Bf16(values) => group.sum_chunks_bf16(values).and_then(|()| group.spread_chunks(values)),
        })
    }

    fn reduce_scatter(&mut self, data: Data<'_>) -> Result<(), CollectiveError> {
        self.run(|group| match data {
            Data::I64(values) => group.sum_chunks(values),
            Data::F32(values) => group.sum_chunks(values),
            Data::Bf16(values) => group.sum_chunks_bf16(values),
        })
    }

    fn all_gather(&mut self, data: Data<'_>) -> Result<(), CollectiveError> {
        self.run(|group| match data {
            Data::I64(values) => group.spread_chunks(values),
            Data::F32(values) => group.spread_chunks(values),
            Data::Bf16(values) => group.spread_chunks(values),
        })
    }

    fn broadcast(&mut self, root: Rank, data: Data<'_>) -> Result<(), CollectiveError> {
        self.run(|group| match data {
            Data::I64(values) => group.pass_on(root, values),
            Data::F32(values) => group.pass_on(root, values),
            Data::Bf16(values) => group.pass_on(root, values),
        })
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn watch(&self, within: Duration) -> Result<Watch, CollectiveError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let ends = self.ring.iter().flat_map(|ring| {
            [(ring.next_rank, ring.next.try_clone()), (ring.previous_rank, ring.previous.try_clone())]
        });
        let neighbours = ends
            .map(|(rank, end)| Ok((rank, end?)))
            .collect::<io::Result<_>>()
            .map_err(|error| network("cannot watch sockets", &error))?;
        Ok(Watch::new(self.abort.clone(), neighbours, within))
    }
}

/// What can be sent as it lies in memory.
trait Element: Pod {
    const TYPE: ElementType;
}

/// What can be added up without a wider type.
trait Summand: Element {
    /// `sums[i] = received[i] + sums[i]`.
    fn add(sums: &mut [Self], received: &[Self]);
}

impl Element for i64 {
    const TYPE: ElementType = ElementType::I64;
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
}

impl Element for bf16 {
    const TYPE: ElementType = ElementType::Bf16;
}

impl Summand for i64 {
    fn add(sums: &mut [Self], received: &[Self]) {
        sums.iter_mut().zip(received).for_each(|(sum, value)| *sum = value.wrapping_add(*sum));
    }
}

impl Summand for f32 {
    fn add(sums: &mut [Self], received: &[Self]) {
        sums.iter_mut().zip(received).for_each(|(sum, value)| *sum += value);
    }
}

/// The two connections of a member.
#[derive(Debug)]
struct Ring {
    next: TcpStream,
    next_rank: Rank,
    previous: TcpStream,
    previous_rank: Rank,
    stall: Duration,
}

impl Ring {
    /// Sends a frame to the next member while receiving one from the previous. `received` comes with the header
    /// that its frame must have, but for the length, which the buffer gives.
    fn exchange(
        &mut self,
        abort: &AbortHandle,
        sent: Option<(Header, &[u8])>,
        received: Option<(Header, &mut [u8])>,
    ) -> Result<(), CollectiveError> {
        let mut outgoing = sent.map(|(header, data)| Outgoing::new(header, data));
        let mut incoming = received.map(|(header, data)| Incoming::new(header, data));
        let mut deadline = Instant::now() + self.stall;
        while outgoing.is_some() || incoming.is_some() {
            if abort.is_aborted() {
                return Err(CollectiveError::Aborted);
            }
            let mut moved = false;
            if let Some(frame) = &mut outgoing {
                let result = frame.write(&self.next);
                moved |= result.map_err(|error| lost(self.next_rank, &error))?;
                if frame.is_done() {
                    outgoing = None;
                }
            }
            if let Some(frame) = &mut incoming {
                let result = frame.read(&self.previous);
                moved |= result.map_err(|error| lost(self.previous_rank, &error))?;
                frame.check(self.previous_rank)?;
                if frame.is_done() {
                    incoming = None;
                }
            }
            if moved {
                deadline = Instant::now() + self.stall;
                continue;
            }
            if Instant::now() >= deadline {
                let silent = incoming.as_ref().map(|frame| (self.previous_rank, frame.expected));
                let deaf = outgoing.as_ref().map(|frame| (self.next_rank, frame.header));
                if let Some((rank, header)) = silent.or(deaf) {
                    let operation = header.to_string();
                    return Err(CollectiveError::Timeout { rank, operation, after: self.stall });
                }
            }
            let mut sources = vec![readable(abort)];
            sources.extend(outgoing.is_some().then(|| writable(&self.next)));
            sources.extend(incoming.is_some().then(|| readable(&self.previous)));
            wait(&mut sources, deadline).map_err(|error| network("cannot wait for sockets", &error))?;
        }
        Ok(())
    }
}

/// A frame that is being sent.
struct Outgoing<'a> {
    header: Header,
    encoded: [u8; Header::BYTES],
    data: &'a [u8],
    done: usize,
}

impl<'a> Outgoing<'a> {
    fn new(header: Header, data: &'a [u8]) -> Self {
        let header = Header { bytes: data.len() as u64, ..header };
        Self { header, encoded: header.encode(), data, done: 0 }
    }

    fn is_done(&self) -> bool {
        self.done == Header::BYTES + self.data.len()
    }

    /// Writes what the socket takes; answers whether it took anything.
    fn write(&mut self, mut stream: &TcpStream) -> io::Result<bool> {
        let header = &self.encoded[self.done.min(Header::BYTES)..];
        let data = &self.data[self.done.saturating_sub(Header::BYTES)..];
        let count = or_would_block(stream.write_vectored(&[IoSlice::new(header), IoSlice::new(data)]))?;
        self.done += count.unwrap_or(0);
        Ok(count.is_some())
    }
}

/// A frame that is being received.
struct Incoming<'a> {
    expected: Header,
    encoded: [u8; Header::BYTES],
    data: &'a mut [u8],
    done: usize,
}

impl<'a> Incoming<'a> {
    fn new(expected: Header, data: &'a mut [u8]) -> Self {
        let expected = Header { bytes: data.len() as u64, ..expected };
        Self { expected, encoded: [0; Header::BYTES], data, done: 0 }
    }

    fn is_done(&self) -> bool {
        self.done == Header::BYTES + self.data.len()
    }

    /// Reads what the socket has, the header first; answers whether it had anything.
    fn read(&mut self, mut stream: &TcpStream) -> io::Result<bool> {
        let target = match self.done.checked_sub(Header::BYTES) {
            None => &mut self.encoded[self.done..],
            Some(start) => &mut self.data[start..],
        };
        let count = or_would_block(stream.read(target))?;
        if count == Some(0) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.done += count.unwrap_or(0);
        Ok(count.is_some())
    }

    /// Compares the header, as soon as it is there, with the one that is due.
    fn check(&self, from: Rank) -> Result<(), CollectiveError> {
        if self.done != Header::BYTES {
            return Ok(());
        }
        let expected = self.expected;
        match Header::decode(&self.encoded) {
            Some(found) if found == expected => Ok(()),
            Some(found) => Err(CollectiveError::Protocol {
                rank: from,
                reason: format!("it sent {found} instead of {expected}"),
            }),
            None => {
                let reason = format!("it sent something unknown instead of {expected}");
                Err(CollectiveError::Protocol { rank: from, reason })
            }
        }
    }
}

/// `None` when the socket is not ready.
pub(super) fn or_would_block(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn lost(rank: Rank, error: &io::Error) -> CollectiveError {
    let reason = match error.kind() {
        ErrorKind::UnexpectedEof => "it closed the connection".to_owned(),
        _ => error.to_string(),
    };
    CollectiveError::PeerLost { rank, reason }
}

fn network(act: &str, error: &io::Error) -> CollectiveError {
    CollectiveError::Network { act: act.to_owned(), reason: error.to_string() }
}

/// Calls the next member and waits for the call of the previous one, both at once.
fn connect(
    listener: &mut Listener,
    place: &Place,
    abort: &AbortHandle,
    patience: Duration,
) -> Result<(TcpStream, TcpStream), CollectiveError> {
    let deadline = Instant::now() + patience;
    let (next_rank, previous_rank) = (place.neighbour(1), place.neighbour(place.size - 1));
    let expected = Greeting {
        run: place.run,
        generation: place.generation,
        from: previous_rank,
        from_incarnation: place.previous.worker.incarnation(),
        to_incarnation: listener.incarnation(),
    };
    let greeting = Greeting {
        from: place.rank,
        from_incarnation: listener.incarnation(),
        to_incarnation: place.next.worker.incarnation(),
        ..expected
    };
    listener.advance(place.run, place.generation);
    let mut call = Call::new(&place.next.address, &greeting);
    let mut previous = None;
    loop {
        if abort.is_aborted() {
            return Err(CollectiveError::Aborted);
        }
        // It may call again after it gave up a call that was answered late: then only the last one counts.
        previous = listener.take(&expected).or(previous);
        call.go_on();
        match (call.stage, previous) {
            (Stage::Answered(_, answer), _) if answer != Answer::Welcome => {
                return Err(CollectiveError::Refused { rank: next_rank, reason: answer.text() });
            }
            (Stage::Answered(next, _), Some(previous)) => return Ok((next, previous)),
            (stage, waiting) => (call.stage, previous) = (stage, waiting),
        }
        if Instant::now() >= deadline {
            let (rank, state) = match call.stage {
                Stage::Answered(..) => (previous_rank, "it did not call".to_owned()),
                _ => (next_rank, call.trouble),
            };
            let operation = format!("the forming of generation {} ({state})", place.generation);
            return Err(CollectiveError::Timeout { rank, operation, after: patience });
        }
        let mut until = deadline;
        let mut sources = vec![readable(abort), readable(listener)];
        match &call.stage {
            Stage::Pausing(end) => until = until.min(*end),
            Stage::Dialling(stream) => sources.push(writable(stream)),
            Stage::Greeted(stream) => sources.push(readable(stream)),
            Stage::Answered(..) => {}
        }
        wait(&mut sources, until).map_err(|error| network("cannot wait for sockets", &error))?;
    }
}

/// A call to the next member, made again and again until somebody answers.
struct Call<'a> {
    address: &'a str,
    greeting: [u8; Greeting::BYTES],
    attempts: usize,
    stage: Stage,
    /// What went wrong last.
    trouble: String,
}

enum Stage {
    Pausing(Instant),
    Dialling(TcpStream),
    Greeted(TcpStream),
    Answered(TcpStream, Answer),
}

impl<'a> Call<'a> {
    fn new(address: &'a str, greeting: &Greeting) -> Self {
        Self {
            address,
            greeting: greeting.encode(),
            attempts: 0,
            stage: Stage::Pausing(Instant::now()),
            trouble: "it does not answer".to_owned(),
        }
    }

    /// Goes on until there is something to wait for.
    fn go_on(&mut self) {
        loop {
            let stage = std::mem::replace(&mut self.stage, Stage::Pausing(Instant::now() + REDIAL));
            match self.step(stage) {
                Ok((stage, true)) => self.stage = stage,
                Ok((stage, false)) => {
                    self.stage = stage;
                    return;
                }
                Err(error) => {
                    self.trouble = format!("{}: {error}", self.address);
                    return;
                }
            }
        }
    }

    /// The stage that follows, and whether it is another one.
    fn step(&mut self, stage: Stage) -> io::Result<(Stage, bool)> {
        match stage {
            Stage::Pausing(until) if Instant::now() < until => Ok((stage, false)),
            Stage::Pausing(_) => Ok((Stage::Dialling(self.dial()?), true)),
            Stage::Dialling(mut stream) => {
                if let Some(error) = stream.take_error()? {
                    return Err(error);
                }
                match stream.peer_addr() {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::NotConnected => {
                        return Ok((Stage::Dialling(stream), false));
                    }
                    Err(error) => return Err(error),
                }
                // A new connection has room for one packet.
                if stream.write(&self.greeting)? < Greeting::BYTES {
                    return Err(ErrorKind::WriteZero.into());
                }
                Ok((Stage::Greeted(stream), true))
            }
            Stage::Greeted(mut stream) => {
                let mut byte = [0];
                match or_would_block(stream.read(&mut byte))? {
                    None => Ok((Stage::Greeted(stream), false)),
                    Some(0) => Err(ErrorKind::UnexpectedEof.into()),
                    Some(_) => {
                        let answer = Answer::decode(byte[0]).ok_or(ErrorKind::InvalidData)?;
                        Ok((Stage::Answered(stream, answer), true))
                    }
                }
            }
            Stage::Answered(..) => Ok((stage, false)),
        }
    }

    /// Begins to connect, to each of the name's addresses in turn.
    fn dial(&mut self) -> io::Result<TcpStream> {
        let addresses: Vec<SocketAddr> = self.address.to_socket_addrs()?.collect();
        let address = addresses.get(self.attempts % addresses.len().max(1)).ok_or(ErrorKind::NotFound)?;
        self.attempts += 1;
        let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&(*address).into()) {
            Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => Err(error),
            _ => Ok(socket.into()),
        }
    }
}
