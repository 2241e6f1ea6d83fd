//! Byte-level BPE, as of GPT-2, Llama 3 and OLMo: a text is cut into words, and of each word's bytes neighbours are
//! joined in the order of the model's merges.

use std::collections::HashMap;

use std::borrow::Cow;

use aho_corasick::AhoCorasick;
use unicode_normalization::{IsNormalized, is_nfc_quick};
use unicode_normalization_alignments::UnicodeNormalization;

use super::bpe::{Bpe, Part, Scratch};
use super::cache::{Cache, Key};
use super::pretokenizer::PreTokenizer;

/// Tokens that are found in texts before words are cut. Control tokens are passed over, as text, and yet nothing else is
/// found within one; they have no id here.
#[derive(Debug)]
pub(super) struct Added {
    pub(super) matcher: AhoCorasick,
    pub(super) ids: Vec<Option<u32>>,
}

impl Added {
    /// Gives the text between such tokens, and the tokens.
    fn cut<'t>(this: Option<&Self>, text: &'t str, mut give: impl FnMut(Result<&'t str, u32>)) {
        let mut end = 0;
        if let Some(Self { matcher, ids }) = this {
            for found in matcher.find_iter(text) {
                if let Some(id) = ids[found.pattern().as_usize()] {
                    give(Ok(&text[end..found.start()]));
                    give(Err(id));
                    end = found.end();
                }
            }
        }
        give(Ok(&text[end..]));
    }
}

/// The tables of a model.
#[derive(Debug)]
pub(super) struct ByteLevel {
    pub(super) words: PreTokenizer,
    /// Whether texts are brought into normal form C first.
    pub(super) nfc: bool,
    pub(super) bpe: Bpe,
    /// Tokens by their bytes, where a word that is a token is taken as it is.
    pub(super) whole: HashMap<Vec<u8>, u32>,
    /// Tokens that are found in texts before they are normalised, and those that are found after that.
    pub(super) added: [Option<Added>; 2],
    /// The bytes of each token; none of control tokens.
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

    /// In normal form C by the tables of Hugging Face's library, which know fewer characters than those that tell quickly
    /// that nothing is to be done.
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

    /// The bytes of some tokens.
    pub(super) fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for known in ids.iter().filter_map(|id| self.bytes.get(*id as usize)?.as_deref()) {
            bytes.extend_from_slice(known);
        }
        bytes
    }
}

/// The character that stands for each byte in the tokens of these models: bytes that print stand for themselves, the
/// others for code points from 256 on, in their order.
pub(super) fn characters() -> [char; 256] {
    let mut others = 0x100_u32..;
    std::array::from_fn(|byte| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte as u8),
        _ => others.next().and_then(char::from_u32).expect("these code points are characters"),
    })
}
