//! SentencePiece BPE, exact: a text becomes the same ids as in Google's own library.
//!
//! A text is cut into chunks where nothing can be joined ([`joints`]); of each, the ids are known from before
//! ([`cache`]) or made ([`bpe`]). Models that do more to a text than put a blank in front ([`normalizer`]), that name
//! pieces to be found first, or that have pieces to be taken apart again take longer ways to the same end.
//!
//! Texts are taken literally: `<s>` in a text stays five characters' worth of pieces and never becomes the control
//! id. Unigram models are refused.

mod bpe;
mod cache;
mod joints;
mod json;
mod model;
mod normalizer;
mod train;
mod vocabulary;

use std::fmt;
use std::sync::Arc;

use prost::Message;
use ulmus_types::Digest;

use crate::error::DataError;
use bpe::{Bpe, Part, Scratch};
use cache::{Cache, Key};
use joints::Joints;
use model::{ModelProto, ModelType, PieceType};
use normalizer::Normalizer;
use vocabulary::{BLANK, Vocabulary, byte_of};

pub use train::train;

/// A tokenizer. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct Tokenizer(Arc<Tables>);

struct Tables {
    model: Vec<u8>,
    digest: Digest,
    vocabulary: Vocabulary,
    normalizer: Normalizer,
    bpe: Bpe,
    joints: Joints,
}

/// Encodes texts. Each thread has its own: it remembers what became of the words that it has seen.
#[derive(Debug)]
pub struct Encoder {
    tokenizer: Tokenizer,
    cache: Cache,
    scratch: Scratch,
    first: String,
}

impl Tokenizer {
    /// Reads a SentencePiece `tokenizer.model`; `name` is its place, for messages.
    ///
    /// # Errors
    /// When the bytes are no BPE model.
    pub fn from_model(bytes: &[u8], name: &str) -> Result<Self, DataError> {
        let refuse = |reason: String| DataError::Tokenizer { what: name.to_owned(), reason };
        let model = ModelProto::decode(bytes).map_err(|error| {
            refuse(format!("it is no SentencePiece model ({error}); give a tokenizer.model"))
        })?;
        if model.pieces.is_empty() {
            return Err(refuse("it has no pieces; give a SentencePiece tokenizer.model".to_owned()));
        }
        let kind = model.trainer.clone().unwrap_or_default().model_type();
        if kind != ModelType::Bpe {
            return Err(refuse(format!("it is a {kind:?} model; give a BPE model")));
        }
        if model.denormalizer.as_ref().is_some_and(|rules| !rules.charsmap().is_empty()) {
            return Err(refuse(
                "it changes decoded texts by a table; give a model without denormaliser".to_owned(),
            ));
        }
        let vocabulary = Vocabulary::new(&model).map_err(refuse)?;
        let normalizer = Normalizer::new(&model, &vocabulary).map_err(refuse)?;
        let escapes = normalizer.escapes();
        Ok(Self(Arc::new(Tables {
            model: bytes.to_vec(),
            digest: Digest::of(bytes),
            normalizer,
            bpe: Bpe::new(&vocabulary, escapes),
            joints: Joints::new(&vocabulary, escapes),
            vocabulary,
        })))
    }

    /// A new encoder. It is made for many texts: its memory, 4 MiB, fills with what it has seen.
    pub fn encoder(&self) -> Encoder {
        Encoder {
            tokenizer: self.clone(),
            cache: Cache::new(),
            scratch: Scratch::default(),
            first: String::new(),
        }
    }

    /// The ids of `text`, without BOS and EOS.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        self.encoder().encode(text, &mut ids);
        ids
    }

    /// The text of `ids`. Control ids and ids beyond the pieces (such as the pad id) have none; each byte that is not
    /// UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let (drops_blank, drops_all) = self.0.normalizer.drops_blanks();
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut at_start = true;
        for piece in ids.iter().filter_map(|id| self.0.vocabulary.pieces.get(*id as usize)) {
            match piece.kind {
                PieceType::Byte => bytes.extend(byte_of(&piece.text)),
                PieceType::Control => {}
                PieceType::Unknown => bytes.extend(self.0.vocabulary.unknown_surface.as_bytes()),
                PieceType::Normal | PieceType::UserDefined | PieceType::Unused => {
                    let text = match piece.text.strip_prefix(BLANK) {
                        Some(rest) if at_start && drops_blank && bytes.is_empty() => {
                            at_start = drops_all;
                            rest
                        }
                        _ => &piece.text,
                    };
                    bytes.extend(text.replace(BLANK, " ").as_bytes());
                }
            }
        }
        // A sign for each byte that is wrong, not one for several.
        let mut text = String::with_capacity(bytes.len());
        for chunk in bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
        }
        text
    }

    /// Begins every document.
    pub fn bos(&self) -> u32 {
        self.0.vocabulary.bos
    }

    /// Ends every document.
    pub fn eos(&self) -> u32 {
        self.0.vocabulary.eos
    }

    /// Fills the tail of sequences; never a target. It is the first id after the pieces.
    pub fn pad(&self) -> u32 {
        self.pieces() as u32
    }

    /// Number of pieces. A model needs one row more, for the pad id.
    pub fn pieces(&self) -> usize {
        self.0.vocabulary.pieces.len()
    }

    /// The bytes of `tokenizer.model`.
    pub fn model(&self) -> &[u8] {
        &self.0.model
    }

    /// Hash of `tokenizer.model`.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} pieces, {})", self.pieces(), self.digest().short())
    }
}

impl Encoder {
    /// Adds the ids of `text`, without BOS and EOS.
    pub fn encode(&mut self, text: &str, ids: &mut Vec<u32>) {
        let Self { tokenizer, cache, scratch, first } = self;
        let Tables { vocabulary, normalizer, bpe, joints, .. } = &*tokenizer.0;
        let start = ids.len();
        let mut chunk = |chunk: &str| {
            let key = Key::new(chunk.as_bytes());
            if key.as_ref().is_some_and(|key| cache.get(key, ids)) {
                return;
            }
            let before = ids.len();
            bpe.encode(vocabulary, scratch, [Part::Text(chunk)], ids);
            if let Some(key) = key {
                cache.put(&key, &ids[before..]);
            }
        };
        if normalizer.is_plain() && bpe.is_local() {
            let mut rest = text;
            if normalizer.has_prefix() && !text.is_empty() {
                let end = joints.first_end(BLANK, text);
                first.clear();
                first.push(BLANK);
                first.push_str(&text[..end]);
                chunk(first);
                rest = &text[end..];
            }
            joints.cut(rest, chunk);
        } else {
            let text = normalizer.apply(text);
            if bpe.is_local() && !normalizer.has_user_defined() {
                joints.cut(&text, chunk);
            } else {
                bpe.encode(vocabulary, scratch, normalizer.parts(&text), ids);
            }
        }
        vocabulary.merge_unknown(ids, start);
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::bytes_only;
