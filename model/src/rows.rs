//! Which positions of a batch are computed, and how often.
//!
//! Only attention looks from one position at another; everything else treats the positions of a batch as rows of a matrix. So
//! a matrix has one *row* for each position that a loss depends on, and none for the others: those behind the last target of
//! a text, as padding is. Pairs of answers to one prompt have it once: up to the first target, the positions that begin both
//! sequences of a pair are the same, and share their rows. Before attention, rows are copied to their positions.

use ulmus_backend::{IGNORE, In, TrainingBackend};

use crate::batch::MicroBatch;
use crate::buffers::{Planner, read, write};
use crate::error::ModelError;

/// The rows of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Map {
    /// The position of each row, `[rows]`. Rows that are shared come first.
    positions: Vec<u32>,
    /// The other position of each row that is shared, `[shared]`.
    others: Vec<u32>,
    /// The row of each position, `[sequences · length]`; for those that have none, any.
    rows: Vec<u32>,
    /// Whether a loss depends on each position, `[sequences · length]`.
    needed: Vec<bool>,
}

impl Map {
    fn with_capacity(positions: usize) -> Self {
        Self {
            positions: Vec::with_capacity(positions),
            others: Vec::with_capacity(positions),
            rows: Vec::with_capacity(positions),
            needed: Vec::with_capacity(positions),
        }
    }

    /// One row for each position.
    fn set_all(&mut self, batch: &MicroBatch) {
        self.others.clear();
        for list in [&mut self.positions, &mut self.rows] {
            list.clear();
            list.extend(0..batch.inputs.len() as u32);
        }
    }

    /// One row for each different position that a loss depends on, and at least one row.
    fn set_needed(&mut self, batch: &MicroBatch, in_pairs: bool) {
        let Self { positions, others, rows, needed } = self;
        let length = batch.length;
        needed.clear();
        needed.resize(batch.inputs.len(), false);
        let of_sequences = |list| <[u32]>::chunks_exact(list, length);
        let texts = of_sequences(&batch.targets).zip(of_sequences(&batch.doc_starts));
        for (needed, (targets, doc_starts)) in needed.chunks_exact_mut(length).zip(texts) {
            // What a position needs are those from the start of its document.
            let mut start = length as u32;
            for position in (0..length).rev() {
                if targets[position] != IGNORE || start <= position as u32 {
                    needed[position] = true;
                    start = start.min(doc_starts[position]);
                }
            }
        }
        positions.clear();
        others.clear();
        rows.clear();
        rows.resize(batch.inputs.len(), u32::MAX);
        // A sequence without a partner shares nothing.
        let pairs = if in_pairs { batch.sequences / 2 } else { 0 };
        for first in (0..pairs).map(|pair| 2 * pair * length) {
            let is_shared = |position: &usize| {
                let (one, other) = (first + position, first + length + position);
                let is_same = |list: &[u32]| list[one] == list[other];
                is_same(&batch.inputs)
                    && is_same(&batch.doc_starts)
                    && [one, other].iter().all(|at| needed[*at] && batch.targets[*at] == IGNORE)
            };
            for position in (0..length).take_while(is_shared).map(|position| first + position) {
                let other = position + length;
                (rows[position], rows[other]) = (positions.len() as u32, positions.len() as u32);
                positions.push(position as u32);
                others.push(other as u32);
            }
        }
        for (position, row) in rows.iter_mut().enumerate().filter(|(_, row)| **row == u32::MAX) {
            *row = if needed[position] { positions.len() as u32 } else { 0 };
            if needed[position] {
                positions.push(position as u32);
            }
        }
        if positions.is_empty() {
            positions.push(0);
        }
    }
}

/// The rows of a network's batch, on the host and on the device.
#[derive(Debug)]
pub(crate) struct Rows<B: TrainingBackend> {
    map: Map,
    /// [`Map::positions`].
    positions: B::Buffer<u32>,
    /// [`Map::others`].
    others: B::Buffer<u32>,
    /// [`Map::rows`].
    of_positions: B::Buffer<u32>,
}

impl<B: TrainingBackend> Rows<B> {
    /// Plans for batches of up to so many positions.
    pub(crate) fn new(plan: &mut Planner<'_, B>, positions: usize) -> Result<Self, ModelError> {
        Ok(Self {
            map: Map::with_capacity(positions),
            positions: plan.buffer(positions)?,
            others: plan.buffer(positions)?,
            of_positions: plan.buffer(positions)?,
        })
    }

    /// Gives each position of a batch its row, or each that is needed for the losses of sequences or of pairs of sequences.
    pub(crate) fn set(&mut self, backend: &B, batch: &MicroBatch, only_needed: bool, in_pairs: bool) {
        if only_needed {
            self.map.set_needed(batch, in_pairs);
        } else {
            self.map.set_all(batch);
        }
        let Self { map, positions, others, of_positions } = self;
        let lists = [(positions, &map.positions), (others, &map.others), (of_positions, &map.rows)];
        for (buffer, values) in lists {
            backend.upload(write(buffer, values.len()), values);
        }
    }

    /// Their number.
    pub(crate) fn count(&self) -> usize {
        self.map.positions.len()
    }

    /// The position of each row.
    pub(crate) fn positions(&self) -> &[u32] {
        &self.map.positions
    }

    /// The same on the device.
    pub(crate) fn positions_on_device(&self) -> In<'_, B, u32> {
        read(&self.positions, self.count())
    }

    /// The row of a position with a target.
    pub(crate) fn of(&self, position: usize) -> u32 {
        self.map.rows[position]
    }

    /// Whether rows and positions are the same, so that nothing has to be copied.
    pub(crate) fn are_positions(&self) -> bool {
        self.map.others.is_empty() && self.count() == self.map.rows.len()
    }

    /// Copies rows of `width` elements to their positions in `to`, unless they are there: answers where they are. Positions
    /// without a row get any.
    pub(crate) fn at_positions<'a>(
        &self,
        backend: &B,
        to: &'a mut B::Activations,
        from: &'a mut B::Activations,
        width: usize,
    ) -> &'a mut B::Activations {
        if self.are_positions() {
            return from;
        }
        let count = self.map.rows.len();
        let rows = read(&self.of_positions, count);
        backend.gather(write(to, count * width), read(from, self.count() * width), rows, width);
        to
    }

    /// Copies what positions have to their rows in `to`, unless it is there: answers where it is.
    pub(crate) fn at_rows<'a>(
        &self,
        backend: &B,
        to: &'a mut B::Activations,
        from: &'a B::Activations,
        width: usize,
    ) -> &'a B::Activations {
        if self.are_positions() {
            return from;
        }
        let from = read(from, self.map.rows.len() * width);
        backend.gather(write(to, self.count() * width), from, self.positions_on_device(), width);
        to
    }

    /// The gradient of what [`Rows::at_rows`] copies from, if `from` is that of its result.
    pub(crate) fn gradient_at_positions(
        &self,
        backend: &B,
        to: &mut B::Activations,
        from: &B::Activations,
        width: usize,
    ) {
        let to = write(to, self.map.rows.len() * width);
        backend.scatter(to, read(from, self.count() * width), self.positions_on_device(), width);
    }

    /// The gradient of what [`Rows::at_positions`] copies from, if `from` is that of its result. That of positions without a row is 0.
    pub(crate) fn gradient_at_rows(
        &self,
        backend: &B,
        to: &mut B::Activations,
        from: &B::Activations,
        width: usize,
    ) {
        let (from, shared) = (read(from, self.map.rows.len() * width), self.map.others.len());
        let positions = self.positions_on_device();
        backend.gather(write(to, self.count() * width), from.clone(), positions, width);
        if shared > 0 {
            backend.gather_add(write(to, shared * width), from, read(&self.others, shared), width);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: u32 = IGNORE;

    fn map(batch: &MicroBatch, in_pairs: bool) -> Map {
        let mut map = Map::with_capacity(0);
        // What another batch has left does not matter.
        map.set_all(&MicroBatch::of_whole_documents(1, 9, vec![1; 9], vec![1; 9]));
        map.set_needed(batch, in_pairs);
        map
    }

    #[test]
    fn positions_behind_the_last_target_have_no_row() {
        let targets = vec![NONE, 5, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, 5];
        let batch = MicroBatch::of_whole_documents(3, 4, vec![1; 12], targets);
        let Map { positions, others, rows, .. } = map(&batch, false);
        assert_eq!(positions, [0, 1, 8, 9, 10, 11]);
        assert!(others.is_empty());
        assert_eq!(rows, [0, 1, 0, 0, 0, 0, 0, 0, 2, 3, 4, 5]);
        let none = MicroBatch::of_whole_documents(1, 3, vec![1; 3], vec![NONE; 3]);
        assert_eq!(map(&none, false).positions, [0]);
    }

    #[test]
    fn a_document_needs_nothing_of_others() {
        let batch = MicroBatch {
            doc_starts: vec![0, 0, 2, 2, 2, 5],
            ..MicroBatch::of_whole_documents(1, 6, vec![1; 6], vec![NONE, NONE, NONE, 5, NONE, NONE])
        };
        assert_eq!(map(&batch, false).positions, [2, 3]);
        // One that looks into the document before it needs what that needs.
        let batch = MicroBatch { doc_starts: vec![0, 0, 1, 2, 4, 5], ..batch };
        assert_eq!(map(&batch, false).positions, [0, 1, 2, 3]);
    }

    #[test]
    fn a_pair_has_its_prompt_once() {
        let inputs = vec![1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 7, 8, 9, 9, 9, 7, 8, 9, 9, 9];
        let targets = vec![NONE, NONE, 4, 9, NONE, NONE, NONE, 5, 6, 9, 8, 9, 9, 9, 9, NONE, 9, 9, 9, NONE];
        let batch = MicroBatch::of_whole_documents(4, 5, inputs, targets);
        let Map { positions, others, rows, .. } = map(&batch, true);
        // The first pair shares two positions: the third predicts different tokens. The second shares none, because one of its
        // sequences has a target at once.
        assert_eq!(positions[..2], [0, 1]);
        assert_eq!(others, [5, 6]);
        assert_eq!(positions[2..], [2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]);
        assert_eq!(rows[..5], [0, 1, 2, 3, 0]);
        assert_eq!(rows[5..10], [0, 1, 4, 5, 6]);
        assert_eq!(map(&batch, false).positions.len(), 18);
        let alone = MicroBatch::of_whole_documents(1, 2, vec![1, 2], vec![NONE, 5]);
        assert_eq!(map(&alone, true), map(&alone, false));
    }
}
