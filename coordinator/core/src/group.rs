//! The life of the training group.
//!
//! ```text
//!            enough idle workers            all formed
//!   Absent ───────────────────────► Forming ──────────► Training
//!     ▲                                │ late, or a member is lost │ member lost, paused or done
//!     │          all have left         ▼                           ▼
//!     └──────────────────────────── Dissolving ◄───────────────────┘
//!   Adopting: a returning coordinator waits for the group that it knew; then Training, or Dissolving
//! ```
//!
//! A new generation is made only after everybody who is still there has left the old one, so no worker is ever
//! in two groups.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use ulmus_types::{Assignment, Generation, Peer, Rank, WorkerId};

use crate::members::Members;

/// Where the group is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Group {
    /// There is none. `enough_since` tells since when there have been enough workers for one.
    Absent { enough_since: Option<Duration> },
    /// After a restart of the coordinator: members of the stored generation come back until the deadline.
    Adopting { members: Vec<WorkerId>, back: BTreeSet<WorkerId>, until: Duration },
    /// Members were assigned and connect to each other, for which they have until the deadline; then they agree on a
    /// state, which takes as long as it takes.
    Forming {
        members: Vec<WorkerId>,
        connected: BTreeSet<WorkerId>,
        formed: BTreeSet<WorkerId>,
        until: Duration,
    },
    /// Members train. `pausing` tells that they were asked to pause or stop.
    Training { members: Vec<WorkerId>, pausing: bool },
    /// Members leave; those in `waiting` have not said so yet.
    Dissolving { waiting: BTreeSet<WorkerId>, until: Duration },
}

impl Group {
    pub(crate) const ABSENT: Self = Self::Absent { enough_since: None };

    /// The workers that are in the group or on their way out of it.
    pub(crate) fn members(&self) -> Vec<WorkerId> {
        match self {
            Self::Absent { .. } => Vec::new(),
            Self::Adopting { back, .. } => back.iter().cloned().collect(),
            Self::Forming { members, .. } | Self::Training { members, .. } => members.clone(),
            Self::Dissolving { waiting, .. } => waiting.iter().cloned().collect(),
        }
    }

    pub(crate) fn contains(&self, worker: &WorkerId) -> bool {
        match self {
            Self::Absent { .. } => false,
            Self::Adopting { members, .. }
            | Self::Forming { members, .. }
            | Self::Training { members, .. } => members.contains(worker),
            Self::Dissolving { waiting, .. } => waiting.contains(worker),
        }
    }
}

/// The micro-batches of each rank: consecutive, all of them, their numbers differing by one at most.
pub(crate) fn share(micro_batches: u64, rank: u64, size: u64) -> Range<u64> {
    (micro_batches * rank / size)..(micro_batches * (rank + 1) / size)
}

/// One assignment per member, in rank order. Each knows only its neighbours in the ring.
pub(crate) fn assignments(
    generation: Generation,
    group: &[WorkerId],
    members: &Members,
    micro_batches: u64,
) -> Vec<(WorkerId, Assignment)> {
    let size = group.len();
    let peer = |index: usize| {
        let worker = group[index % size].clone();
        let address = members.get(&worker).map_or_else(String::new, |member| member.hello.address.clone());
        Peer { address, worker }
    };
    group
        .iter()
        .enumerate()
        .map(|(index, worker)| {
            let assignment = Assignment {
                generation,
                rank: Rank::new(index as u32),
                size: size as u32,
                previous: peer(index + size - 1),
                next: peer(index + 1),
                micro_batches: share(micro_batches, index as u64, size as u64),
            };
            (worker.clone(), assignment)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_every_micro_batch_once() {
        for micro_batches in [1, 4, 7, 128] {
            for size in 1..=micro_batches.min(9) {
                let shares: Vec<_> = (0..size).map(|rank| share(micro_batches, rank, size)).collect();
                assert_eq!((shares[0].start, shares[size as usize - 1].end), (0, micro_batches));
                assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
                let lengths = shares.iter().map(|share| share.end - share.start);
                assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
            }
        }
    }
}
