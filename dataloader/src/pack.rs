//! Packs tokenized documents into sequences of fixed length.
//!
//! Documents are laid end to end, each as BOS … EOS, and cut every T tokens. Each cut takes one more token, so that
//! every position has its next token as target. Targets never cross documents: a position whose next token begins
//! another document is masked. Positions carry the start of their document, so that attention does not cross documents
//! either. Thus every token of a document except its BOS is a target exactly once.
//!
//! In the published recipe (`pack = "corenet"`) each piece of a document is a sequence of its own: tokens beyond T + 1
//! are dropped, and shorter pieces are padded.

use std::ops::Range;

use ulmus_plan::Pack;
pub use ulmus_types::IGNORE;

/// One row of a micro-batch: three lists of length T.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids.
    pub inputs: Vec<u32>,
    /// The token after each input, or [`IGNORE`].
    pub targets: Vec<u32>,
    /// The first position in this sequence that each position may attend to.
    pub doc_starts: Vec<u32>,
}

/// The tokens of a unit, laid end to end. Sequences are cut from them on demand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packed {
    pack: Pack,
    tokens: Vec<u32>,
    /// Offsets at which documents begin, ascending.
    starts: Vec<u32>,
}

impl Packed {
    /// Without any tokens yet.
    pub(crate) const fn new(pack: Pack) -> Self {
        Self { pack, tokens: Vec::new(), starts: Vec::new() }
    }

    /// Adds a document, or a piece of one, including its BOS and EOS.
    pub(crate) fn push(&mut self, tokens: impl IntoIterator<Item = u32>) {
        self.starts.push(self.tokens.len() as u32);
        self.tokens.extend(tokens);
    }

    /// Number of tokens.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Number of sequences of `length` tokens.
    pub(crate) fn sequences(&self, length: usize) -> usize {
        match self.pack {
            Pack::Concat => self.tokens.len().saturating_sub(1).div_ceil(length),
            Pack::Corenet => self.starts.len(),
        }
    }

    /// Whether the first `sequences` sequences exist and are full.
    pub(crate) fn fills(&self, sequences: usize, length: usize) -> bool {
        match self.pack {
            Pack::Concat => self.tokens.len() > sequences * length,
            Pack::Corenet => self.starts.len() >= sequences,
        }
    }

    /// The range of tokens that are the inputs of sequence number `index`.
    pub(crate) fn range(&self, index: usize, length: usize) -> Range<usize> {
        let (begin, end) = match self.pack {
            Pack::Concat => (index * length, self.tokens.len() - 1),
            Pack::Corenet => {
                let end = self.starts.get(index + 1).map_or(self.tokens.len(), |start| *start as usize);
                (self.starts[index] as usize, end)
            }
        };
        begin..end.min(begin + length)
    }

    /// Sequence number `index`. A short one is filled up with `pad`, which is masked.
    pub(crate) fn sequence(&self, index: usize, length: usize, pad: u32) -> Sequence {
        let range = self.range(index, length);
        let begin = range.start;
        let mut sequence = Sequence {
            inputs: Vec::with_capacity(length),
            targets: Vec::with_capacity(length),
            doc_starts: Vec::with_capacity(length),
        };
        let mut next_document = self.starts.partition_point(|start| *start as usize <= begin);
        let mut doc_start = 0;
        for at in range {
            if self.starts.get(next_document).is_some_and(|start| *start as usize == at) {
                next_document += 1;
                doc_start = (at - begin) as u32;
            }
            let ends = self.starts.get(next_document).is_some_and(|start| *start as usize == at + 1);
            sequence.inputs.push(self.tokens[at]);
            let target = self.tokens.get(at + 1).filter(|_| !ends);
            sequence.targets.push(target.copied().unwrap_or(IGNORE));
            sequence.doc_starts.push(doc_start);
        }
        let filled = sequence.inputs.len();
        sequence.inputs.resize(length, pad);
        sequence.targets.resize(length, IGNORE);
        sequence.doc_starts.resize(length, filled as u32);
        sequence
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOS: u32 = 1;
    const EOS: u32 = 2;
    const PAD: u32 = 3;

    fn pack(documents: &[Vec<u32>]) -> Packed {
        let mut packed = Packed::new(Pack::Concat);
        for document in documents {
            packed.push([BOS].into_iter().chain(document.iter().copied()).chain([EOS]));
        }
        packed
    }

    #[test]
    fn two_documents_in_two_sequences() {
        let packed = pack(&[vec![10, 11], vec![20, 21]]);
        assert_eq!(packed.sequences(5), 2);
        let first = packed.sequence(0, 5, PAD);
        assert_eq!(first.inputs, [BOS, 10, 11, EOS, BOS]);
        assert_eq!(first.targets, [10, 11, EOS, IGNORE, 20]);
        assert_eq!(first.doc_starts, [0, 0, 0, 0, 4]);
        let second = packed.sequence(1, 5, PAD);
        assert_eq!(second.inputs, [20, 21, PAD, PAD, PAD]);
        assert_eq!(second.targets, [21, EOS, IGNORE, IGNORE, IGNORE]);
        assert_eq!(second.doc_starts, [0, 0, 2, 2, 2]);
    }

    #[test]
    fn in_the_published_recipe_a_piece_is_a_sequence() {
        let mut packed = Packed::new(Pack::Corenet);
        packed.push([BOS, 10, EOS]);
        packed.push([BOS, 20, 21, 22, 23, 24, EOS]);
        assert_eq!(packed.sequences(4), 2);
        assert!(packed.fills(2, 4) && !packed.fills(3, 4));
        let first = packed.sequence(0, 4, PAD);
        assert_eq!(first.inputs, [BOS, 10, EOS, PAD]);
        assert_eq!(first.targets, [10, EOS, IGNORE, IGNORE]);
        assert_eq!(first.doc_starts, [0, 0, 0, 3]);
        let second = packed.sequence(1, 4, PAD);
        assert_eq!(second.inputs, [BOS, 20, 21, 22]);
        assert_eq!(second.targets, [20, 21, 22, 23]);
        assert_eq!(second.doc_starts, [0; 4]);
    }

    proptest! {
        #[test]
        fn every_token_is_a_target_once(
            documents in prop::collection::vec(prop::collection::vec(10_u32..1000, 0..40), 0..12),
            length in 2_usize..50,
        ) {
            let packed = pack(&documents);
            let sequences: Vec<Sequence> =
                (0..packed.sequences(length)).map(|index| packed.sequence(index, length, PAD)).collect();
            let targets: Vec<u32> =
                sequences.iter().flat_map(|s| s.targets.clone()).filter(|target| *target != IGNORE).collect();
            let expected: Vec<u32> = documents.iter().flat_map(|d| d.iter().copied().chain([EOS])).collect();
            prop_assert_eq!(targets, expected);
            for sequence in &sequences {
                prop_assert_eq!((sequence.inputs.len(), sequence.targets.len(), sequence.doc_starts.len()), (length, length, length));
                for at in 0..length {
                    let start = sequence.doc_starts[at] as usize;
                    prop_assert!(start <= at);
                    // No document begins between a position's document start and the position itself.
                    prop_assert!(sequence.inputs[start + 1..=at.max(start)].iter().all(|token| *token != BOS));
                    prop_assert!(start == 0 || sequence.inputs[start] == BOS || sequence.inputs[start] == PAD);
                    if let Some(next) = sequence.inputs.get(at + 1).filter(|next| **next != PAD) {
                        prop_assert!([*next, IGNORE].contains(&sequence.targets[at]));
                    }
                }
            }
        }
    }
}
