//! Devices that reduce gradients among themselves, over `NVLink` or directly through network cards, without a copy on
//! the host; used if every member's device can. The ring over TCP stays for everything small, and tells who is lost.
//!
//! Parts of the gradient are summed while others are still being computed: [`Devices::begin`] takes each part once it
//! is complete, and [`Devices::finish`] waits for them when the group has agreed that the step counts. Sums begun for a
//! step that does not count are abandoned together with the devices.

use std::ops::Range;
use std::time::Duration;

use ulmus_backend::{CommunicatorError, CommunicatorId, Out, TrainingBackend};
use ulmus_model::Sums;
use ulmus_types::{Partition, Rank};

use super::STALL_TIMEOUT;
use crate::collective::{Collective, CollectiveError, Watch};

/// How long the devices may take to connect to each other.
const JOIN_WITHIN: Duration = Duration::from_mins(1);
/// The length of an id in 64-bit integers.
const ID_WORDS: usize = 16;

/// The devices of a group.
pub(super) struct Devices<B: TrainingBackend> {
    backend: B,
    communicator: B::Communicator,
    rank: usize,
    size: usize,
    /// The parts of the sums that are being reduced.
    begun: Vec<Range<usize>>,
}

impl<B: TrainingBackend> Devices<B> {
    /// Connects the devices of all members, or none if one of them cannot be connected. `tell` is called with the
    /// reason if this device's kind could be, but this machine lacks something.
    pub(super) fn join(
        backend: B,
        group: &mut dyn Collective,
        mut tell: impl FnMut(String),
    ) -> Result<Option<Self>, CollectiveError> {
        let (rank, size) = (group.rank().index(), group.size());
        if size == 1 {
            return Ok(None);
        }
        let able = or_tell(backend.communicates(), &mut tell).filter(|able| *able);
        if all(group, able)?.is_none() {
            return Ok(None);
        }
        let id = match rank {
            0 => or_tell(backend.communicator_id(), &mut tell).map(|id| bytemuck::cast(id.to_bytes())),
            _ => Some([0; ID_WORDS]),
        };
        let Some(mut words) = all(group, id)? else { return Ok(None) };
        group.broadcast(Rank::new(0), (&mut words[..]).into())?;
        let id = CommunicatorId::from_bytes(bytemuck::cast(words));
        let watch = group.watch(JOIN_WITHIN)?;
        let joined = or_tell(backend.communicator(&id, rank, size, &give_up(&watch)), &mut tell);
        let Some(communicator) = all(group, joined)? else { return Ok(None) };
        tracing::info!(size, "devices sum gradients among themselves");
        Ok(Some(Self { backend, communicator, rank, size, begun: Vec::new() }))
    }

    /// Begins to reduce a part of the sums over all members.
    pub(super) fn begin(
        &mut self,
        sums: &mut Sums<B>,
        part: Range<usize>,
        watch: &Watch,
    ) -> Result<(), CollectiveError> {
        let data = sums.part(part.clone());
        self.begun.push(part);
        self.backend
            .begin_reduce_scatter(&mut self.communicator, data, &give_up(watch))
            .map_err(|error| why(watch, &error))
    }

    /// Waits for all reductions that were begun; returns their parts.
    pub(super) fn finish(&mut self, group: &dyn Collective) -> Result<Vec<Range<usize>>, CollectiveError> {
        let watch = group.watch(STALL_TIMEOUT)?;
        self.backend
            .finish_reductions(&mut self.communicator, &give_up(&watch))
            .map_err(|error| why(&watch, &error))?;
        Ok(std::mem::take(&mut self.begun))
    }

    /// The ranges of a part that this member owns.
    pub(super) fn owned(&self, part: Range<usize>) -> [Range<usize>; 2] {
        Partition::equal(part, self.size).owned(self.rank)
    }

    /// Fills in these parts of the gradient with what the other members hold in the ranges that they own.
    pub(super) fn all_gather(
        &mut self,
        gradient: Out<'_, B>,
        parts: &[Range<usize>],
        group: &dyn Collective,
    ) -> Result<(), CollectiveError> {
        let watch = group.watch(STALL_TIMEOUT)?;
        self.backend
            .all_gather(&mut self.communicator, gradient, parts, &give_up(&watch))
            .map_err(|error| why(&watch, &error))
    }

    /// Replaces `data` by member `root`'s.
    pub(super) fn broadcast(
        &mut self,
        root: Rank,
        data: Out<'_, B>,
        group: &dyn Collective,
    ) -> Result<(), CollectiveError> {
        let watch = group.watch(STALL_TIMEOUT)?;
        self.backend
            .broadcast(&mut self.communicator, root.index(), data, &give_up(&watch))
            .map_err(|error| why(&watch, &error))
    }
}

/// Gives an operation up when the group no longer stands.
fn give_up(watch: &Watch) -> impl Fn() -> Option<String> + Sync {
    || watch.broken().map(|error| error.to_string())
}

/// The error of a failed operation: a lost peer if the group has one, as the library only reports some connection.
fn why(watch: &Watch, error: &CommunicatorError) -> CollectiveError {
    watch.broken().unwrap_or_else(|| CollectiveError::Device(error.to_string()))
}

/// Returns `mine` if every member has its own.
fn all<T>(group: &mut dyn Collective, mine: Option<T>) -> Result<Option<T>, CollectiveError> {
    let mut count = [i64::from(mine.is_some())];
    group.all_reduce(&mut count)?;
    Ok(mine.filter(|_| count[0] == group.size() as i64))
}

fn or_tell<T>(result: Result<T, CommunicatorError>, tell: &mut impl FnMut(String)) -> Option<T> {
    result.map_err(|error| tell(format!("gradients go through the host: {error}"))).ok()
}
