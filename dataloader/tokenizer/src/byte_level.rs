//! Byte-level BPE as in GPT-2, Llama 3 and OLMo: a text is cut into words, and the bytes of each word are joined in the
//! order of the model's merges.

use std::collections::HashMap;

use std::borrow::Cow;

use aho_corasick::AhoCorasick;
use unicode_normalization::{IsNormalized, is_nfc_quick};
use unicode_normalization_alignments::UnicodeNormalization;

use super::bpe::{Bpe, Part, Scratch};
use super::cache::{Cache, Key};
use super::pretokenizer::PreTokenizer;

/// Tokens that are matched in texts before the texts are cut into words. A control token has no id here: its match
/// stays text, but no other token is matched within it.
#[derive(Debug)]
pub(super) struct Added {
    pub(super) matcher: AhoCorasick,
    pub(super) ids: Vec<Option<u32>>,
}

impl Added {
    /// Calls `emit` with the matched tokens (`Err`) and the text between them (`Ok`), in order.
    fn cut<'t>(this: Option<&Self>, text: &'t str, mut emit: impl FnMut(Result<&'t str, u32>)) {
        let mut end = 0;
        if let Some(Self { matcher, ids }) = this {
            for found in matcher.find_iter(text) {
                if let Some(id) = ids[found.pattern().as_usize()] {
                    emit(Ok(&text[end..found.start()]));
                    emit(Err(id));
                    end = found.end();
                }
            }
        }
        emit(Ok(&text[end..]));
    }
}

/// The tables of a byte-level model.
#[derive(Debug)]
pub(super) struct ByteLevel {
    pub(super) words: PreTokenizer,
    /// Whether texts are normalised to NFC first.
    pub(super) nfc: bool,
    pub(super) bpe: Bpe,
    /// Tokens by their bytes, if the model takes a word that is a token as that token, whatever its merges.
    pub(super) whole: HashMap<Vec<u8>, u32>,
    /// The tokens that are matched before a text is normalised, and those that are matched afterwards.
    pub(super) added: [Option<Added>; 2],
    /// The bytes of each token, or `None` for control tokens.
    pub(super) bytes: Vec<Option<Vec<u8>>>,
}

impl ByteLevel {
    pub(super) fn encode(&self, cache: &mut Cache, scratch: &mut Scratch, text: &str, ids: &mut Vec<u32>) {
        let [before, after] = &self.added;
        Added::cut(before.as_ref(), text, |part| match part {
            Err(id) => ids.push(id),
            Ok(text) => Added::cut(after.as_ref(), &self.normalised(text), |part| match part {
                Err(id) => ids.push(id),
                Ok(text) => self.encode_text(cache, scratch, text, ids),
            }),
        });
    }

    /// Normalises to NFC with the crate that Hugging Face's library uses. Its tables know fewer characters than those
    /// of the quick check before it.
    fn normalised<'t>(&self, text: &'t str) -> Cow<'t, str> {
        if self.nfc && is_nfc_quick(text.chars()) != IsNormalized::Yes {
            text.nfc().map(|(c, _)| c).collect()
        } else {
            Cow::Borrowed(text)
        }
    }

    fn encode_text(&self, cache: &mut Cache, scratch: &mut Scratch, text: &str, ids: &mut Vec<u32>) {
        self.words.cut(text, |word| {
            let key = Key::new(word.as_bytes());
            if key.as_ref().is_some_and(|key| cache.get(key, ids)) {
                return;
            }
            let before = ids.len();
            match self.whole.get(word.as_bytes()) {
                Some(id) => ids.push(*id),
                None => self.bpe.encode_known(scratch, [Part::Bytes(word.as_bytes())], ids),
            }
            if let Some(key) = key {
                cache.put(&key, &ids[before..]);
            }
        });
    }

    /// The bytes of `ids`.
    pub(super) fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for known in ids.iter().filter_map(|id| self.bytes.get(*id as usize)?.as_deref()) {
            bytes.extend_from_slice(known);
        }
        bytes
    }
}

/// The character that represents each byte in the tokens of these models: printable bytes represent themselves, and the
/// others are numbered from code point 256 on.
pub(super) fn characters() -> [char; 256] {
    let mut others = 0x100_u32..;
    std::array::from_fn(|byte| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte as u8),
        _ => others.next().and_then(char::from_u32).expect("these code points are characters"),
    })
}
