//! Devices that reduce the gradients among themselves, if all of a group can: over `NVLink` or the network's own cards,
//! without a copy on the host. The ring over TCP stays for all that is small, and tells who is lost.

use std::ops::Range;
use std::time::Duration;

use ulmus_model::{Backend, CommunicatorId, NcclError, Out, Patience};
use ulmus_types::Rank;

use super::STALL;
use crate::collective::{Collective, CollectiveError, chunk};

/// How long the devices may take to find each other.
const FORM_WITHIN: Duration = Duration::from_mins(1);
/// An id, as control words.
const ID_WORDS: usize = 16;

/// The devices of a group.
pub(super) struct Devices<B: Backend> {
    communicator: B::Communicator,
    /// Of the gradient; each member's.
    chunks: Vec<Range<usize>>,
}

impl<B: Backend> Devices<B> {
    /// Joins the devices of all members, or none if one of them cannot; `tell` hears why this one cannot, though its kind
    /// could.
    pub(super) fn join(
        backend: &B,
        parameters: usize,
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
            0 => or_tell(CommunicatorId::new(), &mut tell).map(|id| bytemuck::cast(id.to_bytes())),
            _ => Some([0; ID_WORDS]),
        };
        let Some(mut words) = all(group, id)? else { return Ok(None) };
        group.broadcast(Rank::new(0), (&mut words[..]).into())?;
        let id = CommunicatorId::from_bytes(bytemuck::cast(words));
        let watch = group.watch(FORM_WITHIN)?;
        let broken = || watch.broken().map(|error| error.to_string());
        let joined = or_tell(backend.communicator(&id, rank, size, &broken), &mut tell);
        let Some(communicator) = all(group, joined)? else { return Ok(None) };
        tracing::info!(size, "devices sum gradients among themselves");
        let chunks = (0..size).map(|rank| chunk(parameters, size, rank)).collect();
        Ok(Some(Self { communicator, chunks }))
    }

    /// This member's chunk of the gradient.
    pub(super) fn own(&self, group: &dyn Collective) -> Range<usize> {
        self.chunks[group.rank().index()].clone()
    }

    /// Replaces this member's chunk of `sums` by the sum over all members.
    pub(super) fn reduce_scatter(
        &mut self,
        backend: &B,
        sums: Out<'_, B, i64>,
        group: &dyn Collective,
    ) -> Result<(), CollectiveError> {
        self.together(group, |communicator, chunks, patience| {
            backend.reduce_scatter(communicator, sums, chunks, patience)
        })
    }

    /// Replaces all other members' chunks of `gradient` by theirs.
    pub(super) fn all_gather(
        &mut self,
        backend: &B,
        gradient: Out<'_, B>,
        group: &dyn Collective,
    ) -> Result<(), CollectiveError> {
        self.together(group, |communicator, chunks, patience| {
            backend.all_gather(communicator, gradient, chunks, patience)
        })
    }

    fn together(
        &mut self,
        group: &dyn Collective,
        operation: impl FnOnce(&mut B::Communicator, &[Range<usize>], Patience<'_>) -> Result<(), NcclError>,
    ) -> Result<(), CollectiveError> {
        let watch = group.watch(STALL)?;
        let broken = || watch.broken().map(|error| error.to_string());
        operation(&mut self.communicator, &self.chunks, &broken)
            // The library's own words for a lost peer are of some connection.
            .map_err(|error| watch.broken().unwrap_or_else(|| CollectiveError::Device(error.to_string())))
    }
}

/// What this member has, if all members have theirs.
fn all<T>(group: &mut dyn Collective, mine: Option<T>) -> Result<Option<T>, CollectiveError> {
    let mut count = [i64::from(mine.is_some())];
    group.all_reduce((&mut count[..]).into())?;
    Ok(mine.filter(|_| count[0] == group.size() as i64))
}

fn or_tell<T>(result: Result<T, NcclError>, tell: &mut impl FnMut(String)) -> Option<T> {
    result.map_err(|error| tell(format!("gradients go through the host: {error}"))).ok()
}
