//! What a model is trained on: token ids, and which of them it learns.

use ulmus_plan::Truncation;
use ulmus_types::IGNORE;

/// Token ids, and what is learned of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Example {
    /// The token ids.
    pub ids: Vec<u32>,
    /// For each id, the id again if it is to be predicted from those before it, or else [`IGNORE`].
    pub labels: Vec<u32>,
}

/// Two answers to one prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pair {
    /// What both sequences begin with, of which nothing is learned.
    pub prompt: Vec<u32>,
    /// What follows in the sequence with the better answer. Its first labels may be [`IGNORE`], where the prompt has another
    /// last token before this answer.
    pub chosen: Example,
    /// The same with the other answer.
    pub rejected: Example,
}

impl Pair {
    /// A pair of two answers that are learned as a whole.
    pub fn of_answers(prompt: Vec<u32>, chosen: Vec<u32>, rejected: Vec<u32>) -> Self {
        let [chosen, rejected] = [chosen, rejected].map(|ids| Example::learned_from(ids, 0));
        Self { prompt, chosen, rejected }
    }
}

impl Example {
    /// Ids of which those from `begin` on are learned.
    pub(crate) fn learned_from(ids: Vec<u32>, begin: usize) -> Self {
        let mut labels = ids.clone();
        labels.iter_mut().take(begin).for_each(|label| *label = IGNORE);
        Self { ids, labels }
    }

    /// Number of predictions that are learned: of labels that have an id before them.
    pub fn targets(&self) -> usize {
        self.labels.iter().skip(1).filter(|label| **label != IGNORE).count()
    }

    /// Leaves at most `length` ids.
    pub(crate) fn cut(&mut self, length: usize, truncation: Truncation) {
        cut(&mut self.ids, length, truncation);
        cut(&mut self.labels, length, truncation);
    }
}

impl Pair {
    /// The whole sequences, with prompt: of the better answer, and of the other one.
    pub fn sequences(&self) -> [Example; 2] {
        [&self.chosen, &self.rejected].map(|answer| Example {
            ids: [&self.prompt[..], &answer.ids].concat(),
            labels: [vec![IGNORE; self.prompt.len()], answer.labels.clone()].concat(),
        })
    }
}

/// Leaves at most `length` elements.
pub(crate) fn cut(list: &mut Vec<u32>, length: usize, truncation: Truncation) {
    match truncation {
        Truncation::KeepStart => list.truncate(length),
        Truncation::KeepEnd => _ = list.drain(..list.len().saturating_sub(length)),
    }
}

/// Number of elements that two lists begin with and share.
pub(crate) fn common<T: PartialEq>(one: &[T], other: &[T]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}
