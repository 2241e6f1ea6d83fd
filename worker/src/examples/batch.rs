//! From examples to a micro-batch: padded to the longest, or several in a sequence.

use ulmus_chat::{Example, Item, bins};
use ulmus_model::MicroBatch;
use ulmus_types::IGNORE;

use super::Reference;

/// What fills up a sequence. It is seen by nothing and learned by nobody.
const PADDING: u32 = 0;

/// The micro-batch of some examples. `before` is the number of examples that the stage trains on before them. With `pack`,
/// several examples share a sequence of at most that many tokens. Pairs have references, if they are compared with any.
pub(crate) fn micro_batch(
    items: &[&Item],
    references: Option<&[Reference]>,
    before: u64,
    pack: Option<usize>,
) -> MicroBatch {
    let mut sequences: Vec<Example> = Vec::new();
    for item in items {
        match item {
            Item::Example(example) => sequences.push(example.clone()),
            Item::Pair(pair) => sequences.extend(pair.sequences()),
            // Nothing is learned of a prompt by itself.
            Item::Prompt(ids) => {
                sequences.push(Example { ids: ids.clone(), labels: vec![IGNORE; ids.len()] });
            }
        }
    }
    let per_item = sequences.len().checked_div(items.len()).unwrap_or(1) as u64;
    let positions: Vec<usize> = sequences.iter().map(positions).collect();
    let rows = match pack {
        // As trl fills them: no row has more tokens than the longest example may have.
        Some(longest) => {
            bins(&sequences.iter().map(|example| example.ids.len()).collect::<Vec<_>>(), longest)
        }
        None => (0..sequences.len()).map(|sequence| vec![sequence]).collect(),
    };
    let filled = |row: &Vec<usize>| row.iter().map(|sequence| positions[*sequence]).sum::<usize>();
    let length = rows.iter().map(filled).max().unwrap_or(1);
    let mut batch = MicroBatch {
        sequences: rows.len(),
        length,
        number: before * per_item,
        references: references.unwrap_or_default().iter().flatten().copied().collect(),
        ..MicroBatch::default()
    };
    for row in rows {
        let begin = batch.inputs.len();
        for sequence in row {
            let Example { ids, labels } = &sequences[sequence];
            let start = (batch.inputs.len() - begin) as u32;
            let count = positions[sequence];
            batch.inputs.extend(&ids[..count]);
            // An example of a single token has nothing to predict.
            batch.targets.extend((1..=count).map(|place| labels.get(place).copied().unwrap_or(IGNORE)));
            batch.doc_starts.extend(std::iter::repeat_n(start, count));
        }
        while batch.inputs.len() < begin + length {
            batch.doc_starts.push((batch.inputs.len() - begin) as u32);
            batch.inputs.push(PADDING);
            batch.targets.push(IGNORE);
        }
    }
    batch
}

/// The positions of a sequence that predict something: all but the last.
fn positions(example: &Example) -> usize {
    example.ids.len().saturating_sub(1).max(1)
}

/// A micro-batch that teaches nothing, for a worker for which an update has no examples: it goes the way of all others.
pub(crate) fn masked(sequences: usize, compares: bool) -> MicroBatch {
    let references = if compares { vec![0.0; sequences] } else { Vec::new() };
    let tokens = vec![PADDING; sequences];
    MicroBatch { references, ..MicroBatch::of_whole_documents(sequences, 1, tokens, vec![IGNORE; sequences]) }
}

#[cfg(test)]
mod tests {
    use ulmus_chat::Pair;

    use super::*;

    fn example(ids: &[u32], learned: usize) -> Item {
        let mut labels = ids.to_vec();
        labels[..ids.len() - learned].fill(IGNORE);
        Item::Example(Example { ids: ids.to_vec(), labels })
    }

    #[test]
    fn examples_are_padded_to_the_longest_and_padding_teaches_nothing() {
        // The EOS has the id of the padding, and is learned all the same.
        let (one, other) = (example(&[5, 6, 7, PADDING], 2), example(&[8, PADDING], 1));
        let batch = micro_batch(&[&one, &other], None, 10, None);
        assert_eq!((batch.sequences, batch.length, batch.number), (2, 3, 10));
        assert_eq!(batch.inputs, [5, 6, 7, 8, PADDING, PADDING]);
        assert_eq!(batch.targets, [IGNORE, 7, PADDING, PADDING, IGNORE, IGNORE]);
        assert_eq!(batch.doc_starts, [0, 0, 0, 0, 1, 2]);
    }

    #[test]
    fn packed_examples_do_not_see_each_other() {
        let items = [example(&[1, 2, 3], 3), example(&[4, 5], 2), example(&[6, 7, 8, 9], 4)];
        let batch = micro_batch(&items.iter().collect::<Vec<_>>(), None, 0, Some(6));
        assert_eq!((batch.sequences, batch.length), (2, 4));
        assert_eq!(batch.inputs, [6, 7, 8, 4, 1, 2, PADDING, PADDING]);
        assert_eq!(batch.targets, [7, 8, 9, 5, 2, 3, IGNORE, IGNORE]);
        assert_eq!(batch.doc_starts, [0, 0, 0, 3, 0, 0, 2, 3]);
    }

    #[test]
    fn pairs_have_two_sequences_and_their_references() {
        let answer = |ids: &[u32]| Example { ids: ids.to_vec(), labels: ids.to_vec() };
        let pair = Item::Pair(Pair { prompt: vec![1, 2], chosen: answer(&[3, 4]), rejected: answer(&[5]) });
        let batch = micro_batch(&[&pair], Some(&[[-1.0, -2.0]]), 3, None);
        assert_eq!((batch.sequences, batch.length, batch.number), (2, 3, 6));
        assert_eq!(batch.inputs, [1, 2, 3, 1, 2, PADDING]);
        assert_eq!(batch.targets, [IGNORE, 3, 4, IGNORE, 5, IGNORE]);
        assert_eq!(batch.references, [-1.0, -2.0]);
    }
}
