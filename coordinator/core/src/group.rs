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
//! A new generation begins only after all remaining members have left the old one, so no worker is ever in two groups.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use ulmus_types::{
    Assignment, Blame, Generation, GroupKey, Peer, Rank, Repair, StageName, Step, Subject, WorkerId,
};

use crate::members::Members;

/// The phase of the group's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Group {
    /// There is no group. Since `enough_since` there have been enough workers for one.
    Absent { enough_since: Option<Duration> },
    /// The coordinator has restarted, and waits until the deadline for members of the stored generation to come back,
    /// except for those that are known to be `gone`.
    Adopting { members: Vec<WorkerId>, back: BTreeSet<WorkerId>, gone: BTreeSet<WorkerId>, until: Duration },
    /// Members were assigned. They connect to each other before the deadline, then agree on a state without a fixed
    /// deadline.
    Forming {
        members: Vec<WorkerId>,
        connected: BTreeSet<WorkerId>,
        formed: BTreeSet<WorkerId>,
        until: Duration,
    },
    /// Members train. `pausing` means that they were asked to pause or stop.
    Training { members: Vec<WorkerId>, since: Duration, pausing: bool },
    /// Members leave; those in `waiting` have not reported yet that they left.
    Dissolving { waiting: BTreeSet<WorkerId>, since: Duration },
}

impl Group {
    pub(crate) const ABSENT: Self = Self::Absent { enough_since: None };

    /// The workers that are in the group or still leaving it.
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

/// The micro-batches of a rank. Over all ranks these ranges are consecutive, complete, and differ by at most one in
/// length.
pub(crate) fn share(micro_batches: u64, rank: u64, size: u64) -> Range<u64> {
    (micro_batches * rank / size)..(micro_batches * (rank + 1) / size)
}

/// What a member of the last group reported about a neighbour with which it could not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Suspicion {
    pub(crate) by: WorkerId,
    pub(crate) of: WorkerId,
    pub(crate) blame: Blame,
}

/// The workers that the next group excludes because of mutual accusations. The `proven` have trained together before,
/// so a newcomer that is involved is at fault; otherwise the worker that is named most often is.
pub(crate) fn culprits(suspicions: &[Suspicion], proven: &[WorkerId]) -> BTreeSet<WorkerId> {
    // A connection that ended proves nothing: when one member leaves, all connections end.
    let mut open: Vec<&Suspicion> = suspicions.iter().filter(|said| said.blame != Blame::Lost).collect();
    let mut culprits = BTreeSet::new();
    while !open.is_empty() {
        let involved: BTreeSet<&WorkerId> = open.iter().flat_map(|said| [&said.by, &said.of]).collect();
        let weight = |worker: &WorkerId| {
            let named = open.iter().filter(|said| said.of == *worker).count();
            let accuses = open.iter().filter(|said| said.by == *worker).count();
            let direct =
                open.iter().filter(|said| said.of == *worker && said.blame == Blame::Unreachable).count();
            (!proven.contains(worker), named + accuses, direct)
        };
        let Some(worst) = involved.into_iter().max_by_key(|worker| weight(worker)).cloned() else { break };
        open.retain(|said| said.by != worst && said.of != worst);
        culprits.insert(worst);
    }
    culprits
}

/// What a group is for; an [`Assignment`] is a member's part of it.
pub(crate) struct Task {
    pub(crate) training: StageName,
    pub(crate) from: Option<Subject>,
    pub(crate) generation: Generation,
    pub(crate) key: GroupKey,
    pub(crate) micro_batches: u64,
    pub(crate) recorded: Step,
    pub(crate) may_begin: bool,
    pub(crate) repair: Option<Repair>,
}

impl Task {
    /// One assignment per member, in rank order. Each names only the member's neighbours in the ring.
    pub(crate) fn assignments(&self, group: &[WorkerId], members: &Members) -> Vec<(WorkerId, Assignment)> {
        let size = group.len();
        let peer = |index: usize| {
            let worker = group[index % size].clone();
            let address =
                members.get(&worker).map_or_else(String::new, |member| member.hello.address.clone());
            Peer { address, worker }
        };
        group
            .iter()
            .enumerate()
            .map(|(index, worker)| {
                let assignment = Assignment {
                    training: self.training,
                    from: self.from.clone(),
                    generation: self.generation,
                    rank: Rank::new(index as u32),
                    size: size as u32,
                    key: self.key,
                    previous: peer(index + size - 1),
                    next: peer(index + 1),
                    micro_batches: share(self.micro_batches, index as u64, size as u64),
                    recorded: self.recorded,
                    may_begin: self.may_begin,
                    repair: self.repair.clone(),
                };
                (worker.clone(), assignment)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use ulmus_types::Incarnation;

    use super::*;

    #[test]
    fn a_newcomer_or_whoever_is_named_most_often_is_left_out() {
        let worker = |name: &str| WorkerId::new(name, Incarnation::new(1)).unwrap();
        let said = |by: &str, of: &str, blame| Suspicion { by: worker(by), of: worker(of), blame };
        let (a, b, c, d) = (worker("a"), worker("b"), worker("c"), worker("d"));
        let proven = [a.clone(), b.clone(), c.clone()];
        // The newcomer reaches its neighbour, and nobody reaches it.
        let unreachable = [said("c", "d", Blame::Unreachable), said("d", "c", Blame::Absent)];
        assert_eq!(culprits(&unreachable, &proven), BTreeSet::from([d.clone()]));
        // Among workers that have trained together: the one that could not be reached.
        assert_eq!(culprits(&unreachable, &[c.clone(), d.clone()]), BTreeSet::from([d]));
        // Two broken links have one end in common.
        let cut =
            [said("a", "b", Blame::Silent), said("b", "c", Blame::Silent), said("c", "b", Blame::Silent)];
        assert_eq!(culprits(&cut, &proven), BTreeSet::from([b]));
        // Of a single broken link, one end is kept.
        assert_eq!(culprits(&[said("a", "c", Blame::Silent)], &proven).len(), 1);
        assert!(culprits(&[said("a", "c", Blame::Lost), said("c", "a", Blame::Lost)], &proven).is_empty());
        let _ = (a, c);
    }

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
