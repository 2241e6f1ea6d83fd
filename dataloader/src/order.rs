//! Decides which stream gives the next sequence, and which unit a stream reads next, by pure integer arithmetic.
//!
//! The K lanes lie end to end on a line, all of the same length. The sources lie end to end on the same line, each with
//! a length proportional to its share of the tokens. The overlap of a lane and a source is a *stream*. Nothing here
//! knows the number of workers, so nothing that is read can depend on it.
//!
//! Invariants: the overlaps of a lane add up to exactly one lane; an epoch of a source gives every unit to exactly one
//! of its streams, and every stream at least one unit.

use std::ops::Range;

use ulmus_types::LaneId;

/// Lanes, sources and the streams between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mixture {
    streams: Vec<Stream>,
    /// Index of each lane's first stream, and the number of streams at the end.
    first_of_lane: Vec<usize>,
    /// For each source, the ends of its streams on its own stretch of the line, preceded by 0.
    ends_of_source: Vec<Vec<u128>>,
    /// Length of one lane in the integer units of the line.
    lane_length: u128,
}

/// The overlap of one lane and one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stream {
    /// Index of the source.
    pub(crate) source: usize,
    /// Index among the streams of the same source.
    pub(crate) index: usize,
    /// Length of the overlap in the integer units of the line.
    share: u128,
}

impl Mixture {
    /// Lays out `lanes` lanes over sources with the given weights (token counts). Weights of zero count as one.
    pub(crate) fn new(lanes: u64, weights: &[u64]) -> Self {
        let weights: Vec<u128> = weights.iter().map(|weight| u128::from((*weight).max(1))).collect();
        let lane_length: u128 = weights.iter().sum();
        let lanes = u128::from(lanes);
        let mut ends_of_source = vec![vec![0]; weights.len()];
        let mut streams = Vec::new();
        let mut first_of_lane = vec![0];
        // The line has length lanes · Σ weights, so that lanes and sources both end at integers.
        let (mut source, mut at) = (0, 0);
        let mut source_begin = 0;
        for lane in 0..lanes {
            let lane_end = (lane + 1) * lane_length;
            while at < lane_end {
                let source_end = source_begin + lanes * weights[source];
                let end = source_end.min(lane_end);
                let ends = &mut ends_of_source[source];
                streams.push(Stream { source, index: ends.len() - 1, share: end - at });
                ends.push(end - source_begin);
                at = end;
                if at == source_end {
                    (source, source_begin) = (source + 1, source_end);
                }
            }
            first_of_lane.push(streams.len());
        }
        Self { streams, first_of_lane, ends_of_source, lane_length }
    }

    /// All streams, ordered by lane, then by source.
    pub(crate) fn streams(&self) -> &[Stream] {
        &self.streams
    }

    /// The streams of a lane, as indices of [`Self::streams`].
    pub(crate) fn of_lane(&self, lane: LaneId) -> Range<usize> {
        self.first_of_lane[lane.index()]..self.first_of_lane[lane.index() + 1]
    }

    /// Number of lanes.
    pub(crate) fn lanes(&self) -> usize {
        self.first_of_lane.len() - 1
    }

    /// The ends of a source's streams on its own stretch of the line, preceded by 0.
    pub(crate) fn ends_of_source(&self, source: usize) -> &[u128] {
        &self.ends_of_source[source]
    }

    /// The stream that gives the next sequence of `lane`: the one furthest behind its share, and the first of those
    /// that are equally far behind. `emitted` returns how many sequences a stream has given so far.
    pub(crate) fn next_stream(&self, lane: LaneId, emitted: impl Fn(usize) -> u64) -> usize {
        let streams = self.of_lane(lane);
        let next = streams.clone().map(|stream| u128::from(emitted(stream))).sum::<u128>() + 1;
        let deficit = |stream: usize| {
            (self.streams[stream].share * next).cast_signed()
                - (u128::from(emitted(stream)) * self.lane_length).cast_signed()
        };
        // The order is reversed because `max_by_key` returns the last of several maxima.
        streams.rev().max_by_key(|stream| deficit(*stream)).expect("every lane overlaps a source")
    }
}

/// One pass over one source: its units in random order, cut among its streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Epoch {
    units: Vec<u32>,
    cuts: Vec<usize>,
}

impl Epoch {
    /// Permutes the units of `source` and lays them end to end, by size, over the stretch that ends at the last of
    /// `ends`. A unit belongs to the stream that contains its middle, except that every stream gets at least one unit.
    ///
    /// `sizes` are the units' bytes of text. There must be at least as many units as streams.
    pub(crate) fn new(seed: u64, source: usize, epoch: u64, sizes: &[u64], ends: &[u128]) -> Self {
        let units = permutation(sizes.len(), [seed, source as u64, epoch, u64::MAX]);
        let streams = ends.len() - 1;
        let stretch = ends[streams];
        let total: u128 = sizes.iter().map(|size| u128::from((*size).max(1))).sum();
        let mut cuts = vec![0];
        let (mut taken, mut begin) = (0, 0);
        for (index, end) in ends.iter().enumerate().take(streams).skip(1) {
            // This is (begin + size/2) / total < end / stretch, without fractions.
            while taken < units.len() {
                let size = u128::from(sizes[units[taken] as usize].max(1));
                if (2 * begin + size) * stretch >= 2 * end * total {
                    break;
                }
                begin += size;
                taken += 1;
            }
            let least = cuts[index - 1] + 1;
            let most = units.len().saturating_sub(streams - index);
            cuts.push(taken.max(least).min(most));
        }
        cuts.push(units.len());
        Self { units, cuts }
    }

    /// The units of the source's stream number `stream`, in reading order.
    pub(crate) fn units(&self, stream: usize) -> &[u32] {
        &self.units[self.cuts[stream]..self.cuts[stream + 1]]
    }
}

/// The order in which the `len` sequences of a window are given.
pub(crate) fn window_order(
    len: usize,
    seed: u64,
    source: usize,
    epoch: u64,
    first_unit: u32,
    first_segment: u64,
) -> Vec<u32> {
    permutation(len, [seed, source as u64, epoch, u64::from(first_unit) | first_segment << 32])
}

/// The order in which `len` examples of a tuning stage are learned in an epoch.
pub(crate) fn examples_in_order(len: usize, seed: u64, epoch: u64) -> Vec<u32> {
    // No source has this number.
    permutation(len, [seed, u64::MAX, epoch, u64::MAX])
}

/// A permutation of `0..len` that depends on `key` alone.
fn permutation(len: usize, key: [u64; 4]) -> Vec<u32> {
    let mut hasher = blake3::Hasher::new_derive_key("ulmus order of units and windows");
    for word in key {
        hasher.update(&word.to_le_bytes());
    }
    let mut random = hasher.finalize_xof();
    let mut keyed: Vec<(u128, u32)> = (0..len as u32)
        .map(|index| {
            let mut bytes = [0; 16];
            random.fill(&mut bytes);
            (u128::from_le_bytes(bytes), index)
        })
        .collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, index)| index).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes `rounds` sequences from one lane and counts them per stream.
    fn emit(mixture: &Mixture, lane: LaneId, rounds: u64) -> Vec<u64> {
        let streams = mixture.of_lane(lane);
        let mut emitted = vec![0; streams.len()];
        for _ in 0..rounds {
            let next = mixture.next_stream(lane, |stream| emitted[stream - streams.start]);
            emitted[next - streams.start] += 1;
        }
        emitted
    }

    #[test]
    fn two_sources_alternate_in_proportion() {
        let mixture = Mixture::new(1, &[3, 1]);
        let mut emitted = [0, 0];
        let picks: Vec<usize> = (0..8)
            .map(|_| {
                let next = mixture.next_stream(LaneId::new(0), |stream| emitted[stream]);
                emitted[next] += 1;
                next
            })
            .collect();
        assert_eq!(picks, [0, 0, 1, 0, 0, 0, 1, 0]);
    }

    proptest! {
        #[test]
        fn streams_tile_lanes_and_sources(lanes in 1_u64..40, weights in prop::collection::vec(1_u64..1 << 44, 1..8)) {
            let mixture = Mixture::new(lanes, &weights);
            prop_assert!(mixture.streams().len() < lanes as usize + weights.len());
            for lane in 0..lanes as u32 {
                let shares = mixture.of_lane(LaneId::new(lane)).map(|stream| mixture.streams()[stream].share);
                prop_assert_eq!(shares.sum::<u128>(), mixture.lane_length);
            }
            for (source, weight) in weights.iter().enumerate() {
                let ends = mixture.ends_of_source(source);
                prop_assert!(ends.is_sorted());
                prop_assert_eq!(ends[ends.len() - 1], u128::from(lanes) * u128::from(*weight));
            }
        }

        #[test]
        fn the_mixture_stays_close_to_its_shares(weights in prop::collection::vec(1_u64..1000, 1..6), rounds in 1_u64..500) {
            let mixture = Mixture::new(1, &weights);
            let total: u64 = weights.iter().sum();
            for (emitted, weight) in emit(&mixture, LaneId::new(0), rounds).iter().zip(&weights) {
                let exact = rounds as f64 * *weight as f64 / total as f64;
                prop_assert!((*emitted as f64 - exact).abs() < weights.len() as f64, "{emitted} for {exact}");
            }
        }

        #[test]
        fn an_epoch_gives_every_unit_to_one_stream(
            lanes in 1_u64..12,
            weights in prop::collection::vec(1_u64..1000, 1..4),
            sizes in prop::collection::vec(0_u64..1 << 23, 12..80),
            seed: u64,
        ) {
            let mixture = Mixture::new(lanes, &weights);
            for source in 0..weights.len() {
                let ends = mixture.ends_of_source(source);
                let epoch = Epoch::new(seed, source, 0, &sizes, ends);
                let mut seen = vec![0; sizes.len()];
                for stream in 0..ends.len() - 1 {
                    prop_assert!(!epoch.units(stream).is_empty());
                    epoch.units(stream).iter().for_each(|unit| seen[*unit as usize] += 1);
                }
                prop_assert!(seen.iter().all(|count| *count == 1));
                prop_assert_ne!(&epoch.units, &Epoch::new(seed, source, 1, &sizes, ends).units);
            }
        }

        #[test]
        fn streams_get_bytes_in_proportion(sizes in prop::collection::vec(1_u64..100, 200..400), seed: u64) {
            let ends = [0, 10, 40, 100];
            let epoch = Epoch::new(seed, 0, 0, &sizes, &ends);
            let total: u64 = sizes.iter().sum();
            for stream in 0..3 {
                let bytes: u64 = epoch.units(stream).iter().map(|unit| sizes[*unit as usize]).sum();
                let exact = total as f64 * (ends[stream + 1] - ends[stream]) as f64 / 100.0;
                prop_assert!((bytes as f64 - exact).abs() <= 100.0, "{bytes} for {exact}");
            }
        }
    }
}
