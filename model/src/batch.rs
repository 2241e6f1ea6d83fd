//! Micro-batches: their shape, their contents, and what kernels rely upon.

use ulmus_backend::IGNORE;

use crate::error::ModelError;

/// The largest shape of the micro-batches that a replica is planned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShape {
    /// Sequences of a micro-batch, at least 1.
    pub sequences: usize,
    /// Positions per sequence, at least 1.
    pub length: usize,
    /// Keep only the input of each layer, and compute the layer again in the backward pass (activation checkpointing):
    /// a third more work, and memory for the activations of one layer only. The gradients have the same bits.
    pub recompute: bool,
}

impl BatchShape {
    /// A shape that keeps all activations.
    pub fn new(sequences: usize, length: usize) -> Self {
        Self { sequences, length, recompute: false }
    }
}

/// Sequences that go through the model at once; all vectors of tokens are row-major `[sequences, length]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MicroBatch {
    /// Number of sequences.
    pub sequences: usize,
    /// Positions per sequence.
    pub length: usize,
    /// Tokens.
    pub inputs: Vec<u32>,
    /// The token to predict at each position, or [`IGNORE`].
    pub targets: Vec<u32>,
    /// The first position of its sequence that a position may attend to; never after itself.
    pub doc_starts: Vec<u32>,
    /// The number of the first sequence among all that a stage trains on; those behind it have the numbers that follow.
    /// Dropout depends on it.
    pub number: u64,
    /// The log-probability of each sequence's targets under the reference model, `[sequences]`, in nats; empty unless the
    /// objective compares with one.
    pub references: Vec<f64>,
}

impl MicroBatch {
    /// A batch in which every sequence is one document.
    pub fn of_whole_documents(sequences: usize, length: usize, inputs: Vec<u32>, targets: Vec<u32>) -> Self {
        let doc_starts = vec![0; inputs.len()];
        Self { sequences, length, inputs, targets, doc_starts, ..Self::default() }
    }

    /// Checks what kernels rely upon.
    pub(crate) fn check(&self, most: BatchShape, vocabulary: usize) -> Result<(), ModelError> {
        let refuse = |problem: String| Err(ModelError::Batch(problem));
        let Self { sequences, length, .. } = *self;
        if !(1..=most.sequences).contains(&sequences) || !(1..=most.length).contains(&length) {
            return refuse(format!(
                "it is [{sequences}, {length}] and this replica was planned for up to [{}, {}], and at least [1, 1]",
                most.sequences, most.length
            ));
        }
        let positions = sequences * length;
        for (name, len) in [
            ("inputs", self.inputs.len()),
            ("targets", self.targets.len()),
            ("doc_starts", self.doc_starts.len()),
        ] {
            if len != positions {
                return refuse(format!("{name} has {len} elements for {positions} positions"));
            }
        }
        let known = |token: u32| (token as usize) < vocabulary;
        for position in 0..positions {
            let (input, target) = (self.inputs[position], self.targets[position]);
            if !known(input) || !(known(target) || target == IGNORE) {
                let token = if known(input) { target } else { input };
                return refuse(format!(
                    "token {token} at position {position} is outside the vocabulary of {vocabulary}; \
                     the tokenizer and model.vocab_size do not belong together"
                ));
            }
            let (start, own) = (self.doc_starts[position] as usize, position % length);
            if start > own {
                return refuse(format!("position {own} has document start {start}, which comes after it"));
            }
        }
        Ok(())
    }

    /// Checks that there are pairs of sequences, with references.
    pub(crate) fn check_pairs(&self) -> Result<(), ModelError> {
        let (sequences, references) = (self.sequences, &self.references);
        let problem = if !sequences.is_multiple_of(2) {
            format!("{sequences} sequences are no pairs of a chosen and a rejected answer")
        } else if references.len() != sequences {
            format!("it has {} reference log-probabilities for {sequences} sequences", references.len())
        } else if let Some(reference) = references.iter().find(|reference| !reference.is_finite()) {
            format!("a reference log-probability is {reference}; compute it again")
        } else {
            return Ok(());
        };
        Err(ModelError::Batch(problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kernels_rely_upon_is_checked() {
        let good = MicroBatch::of_whole_documents(1, 3, vec![0, 1, 2], vec![1, 2, IGNORE]);
        let check = |batch: &MicroBatch| batch.check(BatchShape::new(2, 3), 3);
        assert!(check(&good).is_ok());
        let message = |batch: &MicroBatch| check(batch).unwrap_err().to_string();
        for (sequences, length) in [(3, 3), (1, 4), (0, 3), (1, 0)] {
            let tokens = || vec![0; sequences * length];
            let batch = MicroBatch::of_whole_documents(sequences, length, tokens(), tokens());
            assert!(message(&batch).contains("planned for up to [2, 3]"), "{sequences} {length}");
        }
        assert!(message(&MicroBatch { targets: vec![0; 2], ..good.clone() }).contains("targets has 2"));
        assert!(
            message(&MicroBatch { inputs: vec![0, 3, 0], ..good.clone() }).contains("token 3 at position 1")
        );
        assert!(
            message(&MicroBatch { targets: vec![0, 0, 7], ..good.clone() }).contains("token 7 at position 2")
        );
        assert!(message(&MicroBatch { doc_starts: vec![0, 2, 0], ..good }).contains("document start 2"));
    }

    #[test]
    fn preferences_come_in_pairs_with_references() {
        let batch = |sequences: usize, references: Vec<f64>| MicroBatch {
            references,
            ..MicroBatch::of_whole_documents(sequences, 1, vec![0; sequences], vec![0; sequences])
        };
        let message = |batch: &MicroBatch| batch.check_pairs().unwrap_err().to_string();
        assert!(batch(2, vec![-1.0, -2.0]).check_pairs().is_ok());
        assert!(message(&batch(3, vec![-1.0; 3])).contains("3 sequences"));
        assert!(message(&batch(2, vec![-1.0])).contains("1 reference log-probabilities for 2"));
        assert!(message(&batch(2, vec![-1.0, f64::NAN])).contains("NaN"));
    }
}
