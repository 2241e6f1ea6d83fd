//! Micro-batches: their shape, their contents, and what kernels rely upon.

use ulmus_backend::IGNORE;

use crate::error::ModelError;

/// The shape of the micro-batches that a replica is planned for.
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

/// Sequences that go through the model at once; all vectors are row-major `[sequences, length]`.
#[derive(Debug, Clone, PartialEq, Eq)]
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
}

impl MicroBatch {
    /// A batch in which every sequence is one document.
    pub fn of_whole_documents(sequences: usize, length: usize, inputs: Vec<u32>, targets: Vec<u32>) -> Self {
        let doc_starts = vec![0; inputs.len()];
        Self { sequences, length, inputs, targets, doc_starts }
    }

    /// Checks what kernels rely upon.
    pub(crate) fn check(&self, sequences: usize, length: usize, vocabulary: usize) -> Result<(), ModelError> {
        let refuse = |problem: String| Err(ModelError::Batch(problem));
        if (self.sequences, self.length) != (sequences, length) {
            return refuse(format!(
                "it is [{}, {}] and this replica was planned for [{sequences}, {length}]",
                self.sequences, self.length
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kernels_rely_upon_is_checked() {
        let good = MicroBatch::of_whole_documents(1, 3, vec![0, 1, 2], vec![1, 2, IGNORE]);
        assert!(good.check(1, 3, 3).is_ok());
        let message = |batch: &MicroBatch| batch.check(1, 3, 3).unwrap_err().to_string();
        assert!(good.check(2, 3, 3).unwrap_err().to_string().contains("planned for [2, 3]"));
        assert!(message(&MicroBatch { targets: vec![0; 2], ..good.clone() }).contains("targets has 2"));
        assert!(
            message(&MicroBatch { inputs: vec![0, 3, 0], ..good.clone() }).contains("token 3 at position 1")
        );
        assert!(
            message(&MicroBatch { targets: vec![0, 0, 7], ..good.clone() }).contains("token 7 at position 2")
        );
        assert!(message(&MicroBatch { doc_starts: vec![0, 2, 0], ..good }).contains("document start 2"));
    }
}
