//! The file of a stage's examples: compressed JSON lines, one for each row.

use serde::{Deserialize, Serialize};
use ulmus_chat::{Example, Item, Pair};
use ulmus_types::IGNORE;

use super::Kept;

/// How hard zstd tries.
const LEVEL: i32 = 3;

/// A line.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    row: u64,
    #[serde(flatten)]
    item: Tokens,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Tokens {
    Example(Sequence),
    Pair { prompt: Vec<u32>, chosen: Sequence, rejected: Sequence },
    Prompt { prompt: Vec<u32> },
}

/// Token ids, and the places `[first, end)` of those that are learned.
#[derive(Debug, Serialize, Deserialize)]
struct Sequence {
    ids: Vec<u32>,
    learned: Vec<[usize; 2]>,
}

impl From<&Example> for Sequence {
    fn from(example: &Example) -> Self {
        let mut learned: Vec<[usize; 2]> = Vec::new();
        for (place, _) in example.labels.iter().enumerate().filter(|(_, label)| **label != IGNORE) {
            match learned.last_mut() {
                Some([_, end]) if *end == place => *end += 1,
                _ => learned.push([place, place + 1]),
            }
        }
        Self { ids: example.ids.clone(), learned }
    }
}

impl Sequence {
    fn example(self) -> Result<Example, String> {
        let mut labels = vec![IGNORE; self.ids.len()];
        for [first, end] in self.learned {
            let (Some(labels), Some(ids)) = (labels.get_mut(first..end), self.ids.get(first..end)) else {
                return Err(format!("tokens {first} to {end} of {} are learned", self.ids.len()));
            };
            labels.copy_from_slice(ids);
        }
        Ok(Example { ids: self.ids, labels })
    }
}

/// The content of the file.
pub(crate) fn to_bytes(examples: &[Kept]) -> Vec<u8> {
    let mut text = Vec::new();
    for Kept { row, item } in examples {
        let item = match item {
            Item::Example(example) => Tokens::Example(example.into()),
            Item::Pair(Pair { prompt, chosen, rejected }) => {
                Tokens::Pair { prompt: prompt.clone(), chosen: chosen.into(), rejected: rejected.into() }
            }
            Item::Prompt(prompt) => Tokens::Prompt { prompt: prompt.clone() },
        };
        serde_json::to_writer(&mut text, &Line { row: *row, item }).expect("lines have text keys");
        text.push(b'\n');
    }
    zstd::encode_all(&text[..], LEVEL).expect("memory can be written")
}

/// Reads what [`to_bytes`] wrote.
///
/// # Errors
/// What is wrong with the content.
pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Vec<Kept>, String> {
    let text = zstd::decode_all(bytes).map_err(|error| error.to_string())?;
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let Line { row, item } = serde_json::from_slice(line).map_err(|error| error.to_string())?;
            let item = match item {
                Tokens::Example(sequence) => Item::Example(sequence.example()?),
                Tokens::Pair { prompt, chosen, rejected } => {
                    Item::Pair(Pair { prompt, chosen: chosen.example()?, rejected: rejected.example()? })
                }
                Tokens::Prompt { prompt } => Item::Prompt(prompt),
            };
            Ok(Kept { row, item })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_read_as_they_were_written() {
        let example = |ids: &[u32], labels: &[u32]| Example { ids: ids.to_vec(), labels: labels.to_vec() };
        let kept = [
            Kept { row: 1, item: Item::Example(example(&[1, 5, 6, 7, 2], &[IGNORE, IGNORE, 6, IGNORE, 2])) },
            Kept {
                row: 9,
                item: Item::Pair(Pair {
                    prompt: vec![1, 8],
                    chosen: example(&[3, 2], &[3, 2]),
                    rejected: example(&[4], &[4]),
                }),
            },
            Kept { row: 11, item: Item::Prompt(vec![1, 9]) },
        ];
        let bytes = to_bytes(&kept);
        assert_eq!(from_bytes(&bytes).unwrap(), kept);
        assert!(from_bytes(&bytes[..bytes.len() / 2]).is_err());
        let wrong = zstd::encode_all(&br#"{"row":1,"ids":[1],"learned":[[0,2]]}"#[..], 1).unwrap();
        assert!(from_bytes(&wrong).unwrap_err().contains("tokens 0 to 2 of 1"));
    }
}
