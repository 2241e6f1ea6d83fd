//! Which examples share a sequence.

/// Puts examples of some lengths into sequences of at most `max_length` tokens, and returns the examples of each sequence.
///
/// The longest come first, and each goes where it leaves the least room (best-fit decreasing, as in TRL). Examples of equal
/// length keep their order. An example that is longer than a sequence has one of its own.
pub fn bins(lengths: &[usize], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|example| std::cmp::Reverse(lengths[*example]));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    // Of the bins with as much room, the first.
    let mut rooms: std::collections::BTreeSet<(usize, usize)> = std::collections::BTreeSet::new();
    for example in order {
        let length = lengths[example];
        let found = rooms.range((length, 0)..).next().copied();
        let (room, bin) = found.unwrap_or((max_length.max(length), bins.len()));
        if found.is_some() {
            rooms.remove(&(room, bin));
        } else {
            bins.push(Vec::new());
        }
        bins[bin].push(example);
        rooms.insert((room - length, bin));
    }
    bins
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_example_is_in_one_bin_that_has_room(lengths in prop::collection::vec(0_usize..100, 0..60), max_length in 1_usize..120) {
            let bins = bins(&lengths, max_length);
            let mut seen = vec![0; lengths.len()];
            for bin in &bins {
                prop_assert!(!bin.is_empty());
                for example in bin {
                    seen[*example] += 1;
                }
                let filled: usize = bin.iter().map(|example| lengths[*example]).sum();
                let longest = bin.iter().map(|example| lengths[*example]).max().unwrap();
                prop_assert!(filled <= max_length.max(longest), "{filled}");
            }
            prop_assert!(seen.iter().all(|times| *times == 1));
            // Two bins that are less than half full would have been one.
            let light = bins.iter().filter(|bin| 2 * bin.iter().map(|example| lengths[*example]).sum::<usize>() < max_length);
            prop_assert!(light.count() <= 1);
        }
    }
}
