//! How a flat vector is cut into parts: one for each member of a group, or one for each file of a checkpoint.

use std::ops::Range;

/// A range of a flat vector, cut into parts that lie end to end, in order; no element is in two of them.
///
/// What may differ is the rule of the cut, and each constructor is one. Members of a group own what they reduce or
/// update by such a cut, and must make it from the same numbers; a cut that files follow can never change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// What the parts cover.
    covered: Range<usize>,
    /// Elements between two places where a part may begin.
    unit: usize,
    parts: usize,
    /// Elements behind the parts, which every member owns.
    left_over: usize,
}

impl Partition {
    /// `length` elements in parts whose numbers of whole units differ by at most one; the larger parts come first. A
    /// vector with fewer units than parts is cut between any two elements instead.
    ///
    /// # Panics
    /// If `unit` or `parts` is 0.
    #[inline]
    pub fn balanced(length: usize, unit: usize, parts: usize) -> Self {
        assert!(parts > 0, "a vector is cut into at least one part");
        let unit = if length.div_ceil(unit) < parts { 1 } else { unit };
        Self { covered: 0..length, unit, parts, left_over: 0 }
    }

    /// `length` elements in parts of `unit` elements each, the last with what remains: a cut that depends on nothing
    /// but the length.
    ///
    /// # Panics
    /// If `unit` is 0.
    pub fn fixed(length: usize, unit: usize) -> Self {
        Self { covered: 0..length, unit, parts: length.div_ceil(unit), left_over: 0 }
    }

    /// `range` in parts of exactly equal length. Fewer than `parts` elements may be left over at its end; every member
    /// owns them.
    ///
    /// # Panics
    /// If `parts` is 0.
    pub fn equal(range: Range<usize>, parts: usize) -> Self {
        let left_over = range.len() % parts;
        Self { covered: range.start..range.end - left_over, unit: 1, parts, left_over }
    }

    /// The elements of a part.
    ///
    /// # Panics
    /// If there is no such part.
    #[inline]
    pub fn part(&self, index: usize) -> Range<usize> {
        assert!(index < self.parts, "part {index} of {}", self.parts);
        let units = self.covered.len().div_ceil(self.unit);
        let boundary = |index: usize| {
            // The first `units % parts` parts have one unit more.
            let before = units / self.parts * index + index.min(units % self.parts);
            self.covered.start + self.covered.len().min(before * self.unit)
        };
        boundary(index)..boundary(index + 1)
    }

    /// All parts, first to last.
    pub fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        (0..self.parts).map(|index| self.part(index))
    }

    /// What the member of that rank owns: its part, and what is left over.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn owned(&self, rank: usize) -> [Range<usize>; 2] {
        [self.part(rank), self.covered.end..self.covered.end + self.left_over]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: [usize; 9] = [0, 1, 5, 63, 64, 65, 64 * 8, 64 * 8 + 1, 64 * 40 + 23];

    /// Asserts that each element of `range` is in one part, that parts follow each other, and that only what is left
    /// over has several owners.
    fn check(partition: &Partition, range: Range<usize>) {
        let mut owners = vec![0; range.end];
        let mut next = range.start;
        for (rank, part) in partition.parts().enumerate() {
            assert_eq!(part.start, next, "{partition:?}");
            next = part.end;
            let [own, left_over] = partition.owned(rank);
            assert_eq!((own, left_over.len()), (part, partition.left_over));
            partition.owned(rank).into_iter().flatten().for_each(|element| owners[element] += 1);
        }
        assert_eq!(next + partition.left_over, range.end, "{partition:?}");
        assert!(owners[range.start..next].iter().all(|owners| *owners == 1), "{partition:?}");
        assert!(owners[next..].iter().all(|owners| *owners == partition.parts), "{partition:?}");
    }

    #[test]
    fn balanced_parts_are_whole_units_and_differ_by_one() {
        for parts in 1..9 {
            for length in LENGTHS {
                let partition = Partition::balanced(length, 64, parts);
                check(&partition, 0..length);
                let unit = if length > 64 * (parts - 1) { 64 } else { 1 };
                assert!(partition.parts().all(|part| part.start % unit == 0 || part.start == length));
                let units: Vec<usize> = partition.parts().map(|part| part.len().div_ceil(unit)).collect();
                assert!(units.is_sorted_by(|a, b| a >= b) && units[0] - units[parts - 1] <= 1, "{units:?}");
            }
        }
    }

    #[test]
    fn fixed_parts_depend_on_the_length_alone() {
        for length in LENGTHS {
            let partition = Partition::fixed(length, 64);
            check(&partition, 0..length);
            assert_eq!(partition.parts().count(), length.div_ceil(64));
            for (index, part) in partition.parts().enumerate() {
                assert_eq!(part, 64 * index..length.min(64 * (index + 1)));
            }
        }
    }

    #[test]
    fn equal_parts_leave_fewer_elements_than_there_are_parts() {
        for parts in 1..9 {
            for range in LENGTHS.map(|length| 7..7 + length) {
                let partition = Partition::equal(range.clone(), parts);
                check(&partition, range.clone());
                assert!(partition.parts().all(|part| part.len() == range.len() / parts));
                assert_eq!(partition.left_over, range.len() % parts);
            }
        }
    }

    /// Groups exchange and checkpoints store by these cuts.
    #[test]
    fn cuts_never_change() {
        let parts = |partition: Partition| partition.parts().collect::<Vec<_>>();
        assert_eq!(parts(Partition::balanced(10, 4, 3)), [0..4, 4..8, 8..10]);
        assert_eq!(parts(Partition::balanced(17, 4, 2)), [0..12, 12..17]);
        assert_eq!(parts(Partition::balanced(5, 4, 3)), [0..2, 2..4, 4..5]);
        assert_eq!(parts(Partition::fixed(10, 4)), [0..4, 4..8, 8..10]);
        let equal = Partition::equal(10..21, 3);
        assert_eq!(parts(equal.clone()), [10..13, 13..16, 16..19]);
        assert_eq!(equal.owned(1), [13..16, 19..21]);
    }

    #[test]
    #[should_panic(expected = "part 3 of 3")]
    fn a_part_that_does_not_exist_is_refused() {
        Partition::equal(0..9, 3).part(3);
    }
}
