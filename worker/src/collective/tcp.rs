//! A ring over TCP: every member sends to the next and receives from the one before, at the same time.
//!
//! Reduce-scatter and all-gather go round the ring in `size - 1` hops of one part each, the least that any algorithm
//! can send; broadcast passes segments on as they arrive.
//!
//! Only one thread uses a group. It blocks nowhere but in [`wait`](ulmus_transport::ring::wait), where the group's
//! [`AbortHandle`] can wake it. Sockets belong to one generation and are reset at the first error, so that the error
//! goes round the ring and no member is left waiting for one that has given up.

use std::io;
use std::time::Duration;

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use ulmus_transport::ring::{Listener, Place, connect};
use ulmus_types::{Generation, Peer, Rank};

use super::abort::AbortHandle;
use super::frame::{ElementType, Header, Operation};
use super::ring::{End, Ring, network};
use super::watch::Watch;
use super::{Collective, CollectiveError, Data, chunks};

/// Bytes that a broadcast passes on at a time: few compared with the data, many compared with a packet.
const SEGMENT: usize = 1 << 20;

/// A member of a ring over TCP.
#[derive(Debug)]
pub struct TcpGroup {
    generation: Generation,
    rank: usize,
    size: usize,
    /// `None` in a group of one.
    ring: Option<Ring>,
    abort: AbortHandle,
    /// The number of operations entered; an all-reduce counts as two.
    entered: u64,
    /// Receives the integers that are then added. It is kept so that steps do not allocate.
    scratch: Vec<i64>,
    failure: Option<CollectiveError>,
}

impl TcpGroup {
    /// Connects to both neighbours. Blocks until both have agreed, `abort` is used, or `patience` has passed.
    ///
    /// `stall` is how long a later operation may go without sending or receiving a byte: longer than the slowest
    /// member's share of a step takes.
    ///
    /// # Errors
    /// [`CollectiveError::Connect`] says which neighbour did not connect, and why.
    pub fn form(
        listener: &mut Listener,
        place: &Place,
        abort: &AbortHandle,
        patience: Duration,
        stall: Duration,
    ) -> Result<Self, CollectiveError> {
        let ring = if place.size > 1 {
            let (next, previous) = connect(listener, place, abort.interrupt(), patience)?;
            let end = |distance, peer: &Peer, stream| End {
                rank: place.neighbour(distance),
                name: peer.worker.name().to_owned(),
                stream,
            };
            Some(Ring {
                rank: place.rank,
                next: end(1, &place.next, next),
                previous: end(place.size - 1, &place.previous, previous),
                stall,
            })
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
        self.abort.finish();
        result.map_err(|error| {
            // If a connection breaks while this member is being aborted, the abort is the cause.
            let error = if self.abort.is_aborted() { CollectiveError::Aborted } else { error };
            if let Some(ring) = self.ring.take() {
                ring.reset();
            }
            self.failure.insert(error).clone()
        })
    }

    /// Enters an operation; returns the header of its frames, without `part` and `bytes`.
    fn begin(&mut self, operation: Operation, element: ElementType) -> Header {
        self.entered += 1;
        self.abort.enter(self.entered);
        let (generation, number) = (self.generation, self.entered);
        Header { generation, number, operation, element, part: 0, bytes: 0 }
    }

    /// Leaves each member's part summed over all members, in that member's `values`.
    fn sum_chunks(&mut self, values: &mut [i64]) -> Result<(), CollectiveError> {
        let header = self.begin(Operation::ReduceScatter, ElementType::I64);
        let Some(ring) = &self.ring else { return Ok(()) };
        let (chunks, size) = (chunks(values.len(), self.size), self.size);
        self.scratch.resize(chunks.part(0).len(), 0);
        for hop in 1..size {
            let sent = chunks.part((self.rank + size - hop) % size);
            let added = chunks.part((self.rank + 2 * size - hop - 1) % size);
            let received = &mut self.scratch[..added.len()];
            let header = Header { part: hop as u32, ..header };
            ring.exchange(
                &self.abort,
                Some((header, cast_slice(&values[sent]))),
                Some((header, cast_slice_mut(received))),
            )?;
            let sums = values[added].iter_mut();
            sums.zip(received).for_each(|(sum, value)| *sum = value.wrapping_add(*sum));
        }
        Ok(())
    }

    /// Sends each member's part to all others.
    fn spread_chunks<T: Element>(&mut self, values: &mut [T]) -> Result<(), CollectiveError> {
        let header = self.begin(Operation::AllGather, T::TYPE);
        let Some(ring) = &self.ring else { return Ok(()) };
        let (chunks, size) = (chunks(values.len(), self.size), self.size);
        for hop in 1..size {
            let sent = chunks.part((self.rank + size + 1 - hop) % size);
            let received = chunks.part((self.rank + size - hop) % size);
            let [sent, received] = values.get_disjoint_mut([sent, received]).expect("parts do not overlap");
            let header = Header { part: hop as u32, ..header };
            ring.exchange(
                &self.abort,
                Some((header, cast_slice(sent))),
                Some((header, cast_slice_mut(received))),
            )?;
        }
        Ok(())
    }

    /// Sends segments down the ring from `root`; each member receives one while it passes on the one before.
    fn pass_on<T: Element>(&mut self, root: Rank, values: &mut [T]) -> Result<(), CollectiveError> {
        assert!(root.index() < self.size, "root {root} is not in a group of {}", self.size);
        let header = self.begin(Operation::Broadcast, T::TYPE);
        let Some(ring) = &self.ring else { return Ok(()) };
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
}

impl Collective for TcpGroup {
    fn rank(&self) -> Rank {
        Rank::new(self.rank as u32)
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&mut self, values: &mut [i64]) -> Result<(), CollectiveError> {
        self.run(|group| group.sum_chunks(values).and_then(|()| group.spread_chunks(values)))
    }

    fn reduce_scatter(&mut self, values: &mut [i64]) -> Result<(), CollectiveError> {
        self.run(|group| group.sum_chunks(values))
    }

    fn all_gather(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.run(|group| group.spread_chunks(values))
    }

    fn broadcast(&mut self, root: Rank, data: Data<'_>) -> Result<(), CollectiveError> {
        self.run(|group| match data {
            Data::I64(values) => group.pass_on(root, values),
            Data::F32(values) => group.pass_on(root, values),
        })
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn watch(&self, within: Duration) -> Result<Watch, CollectiveError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let ends = self.ring.iter().flat_map(|ring| [&ring.next, &ring.previous]);
        let neighbours = ends
            .map(|end| Ok((end.rank, end.stream.try_clone()?)))
            .collect::<io::Result<_>>()
            .map_err(|error| network("cannot watch sockets", &error))?;
        Ok(Watch::new(self.abort.clone(), neighbours, within))
    }
}

/// Elements that are sent as they are in memory.
trait Element: Pod {
    const TYPE: ElementType;
}

impl Element for i64 {
    const TYPE: ElementType = ElementType::I64;
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
}
