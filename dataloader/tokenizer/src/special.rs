//! Encodes texts in which the name of a special piece stands for the piece, as Hugging Face's tokenizers do. What is between
//! two special pieces is encoded as a text of its own, so a tokenizer that begins texts with a space begins each with one.

use std::fmt;

use aho_corasick::{AhoCorasick, MatchKind};

use super::{Encoder, Tokenizer};

/// Encodes texts with special pieces. Each thread uses its own.
pub struct SpecialEncoder {
    encoder: Encoder,
    /// Finds the names. Of two that begin at the same place, the longer one counts.
    names: AhoCorasick,
    /// The id of each name.
    ids: Vec<u32>,
}

impl Clone for SpecialEncoder {
    /// The same encoder with a cache of its own.
    fn clone(&self) -> Self {
        let Self { encoder, names, ids } = self;
        Self { encoder: encoder.tokenizer.encoder(), names: names.clone(), ids: ids.clone() }
    }
}

impl fmt::Debug for SpecialEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpecialEncoder({} names)", self.ids.len())
    }
}

impl Tokenizer {
    /// An encoder for texts in which special pieces are written out.
    pub fn special_encoder(&self) -> SpecialEncoder {
        SpecialEncoder::new(self.encoder(), self.special_pieces())
    }
}

impl SpecialEncoder {
    fn new(encoder: Encoder, pieces: Vec<(String, u32)>) -> Self {
        let (names, ids): (Vec<String>, Vec<u32>) = pieces.into_iter().unzip();
        let names = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(names)
            .expect("a few short names fit in an automaton");
        Self { encoder, names, ids }
    }

    /// Whether special pieces are written out in a text.
    pub fn has_special(&self, text: &str) -> bool {
        self.names.is_match(text)
    }

    /// Adds the ids of `text` without adding BOS or EOS to it, and returns whether special pieces are written out in it.
    pub fn encode(&mut self, text: &str, ids: &mut Vec<u32>) -> bool {
        let Self { encoder, names, ids: special } = self;
        let mut end = 0;
        for found in names.find_iter(text) {
            let before = &text[end..found.start()];
            if !before.is_empty() {
                encoder.encode(before, ids);
            }
            ids.push(special[found.pattern().as_usize()]);
            end = found.end();
        }
        if end < text.len() {
            encoder.encode(&text[end..], ids);
        }
        end > 0
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/tokenizer.model");
        Tokenizer::read(&std::fs::read(file).unwrap(), "tokenizer.model", None, None).unwrap()
    }

    fn ids(encoder: &mut SpecialEncoder, text: &str) -> (Vec<u32>, bool) {
        let mut ids = Vec::new();
        let written_out = encoder.encode(text, &mut ids);
        (ids, written_out)
    }

    #[test]
    fn a_special_piece_that_is_written_out_begins_another_text() {
        let tokenizer = tokenizer();
        let mut encoder = tokenizer.special_encoder();
        let [a, b] = ["a", "b"].map(|text| tokenizer.encode(text));
        assert_eq!(ids(&mut encoder, "a"), (a.clone(), false));
        assert_eq!(ids(&mut encoder, "a<unk>b"), ([a.clone(), vec![0], b.clone()].concat(), true));
        assert_eq!(ids(&mut encoder, "<s>a</s>"), ([vec![1], a, vec![2]].concat(), true));
        assert_eq!(ids(&mut encoder, ""), (Vec::new(), false));
    }

    #[test]
    fn of_two_names_the_longer_one_counts() {
        let tokenizer = tokenizer();
        let mut pieces = tokenizer.special_pieces();
        pieces.push(("<s>a".to_owned(), 7));
        let mut encoder = SpecialEncoder::new(tokenizer.encoder(), pieces);
        assert_eq!(ids(&mut encoder, "b<s>a").0, [tokenizer.encode("b"), vec![7]].concat());
    }
}
