//! Tokenizers, exact: a text becomes the same ids as in the library that the file was made for.
//!
//! SentencePiece BPE (`tokenizer.model`) and the two common families of `tokenizer.json` ([`huggingface`]) are our own;
//! other kinds of `tokenizer.json` go through Hugging Face's library.
//!
//! With SentencePiece's characters, a text is cut into chunks where nothing can be joined ([`boundaries`]); of each, the ids are known from before
//! ([`cache`]) or made ([`bpe`]). Models that do more to a text than put a blank in front ([`normalizer`]), that name
//! pieces to be found first, or that have pieces to be taken apart again take longer ways to the same end.
//!
//! Texts are taken literally: `<s>` in a text stays five characters' worth of pieces and never becomes the control
//! id. Unigram models of SentencePiece are refused. Those of a `tokenizer.json` go through the library, with the scores of
//! the file as they are; its Python wheel has others in their last bits, and so other ids where two ways to cut a text tie.

#![forbid(unsafe_code)]

mod boundaries;
mod bpe;
mod byte_level;
mod cache;
mod error;
mod huggingface;
mod json;
mod model;
mod normalizer;
mod pretokenizer;
mod settled;
mod train;
mod vocabulary;

use std::fmt;
use std::sync::Arc;

use prost::Message;
use ulmus_run::paths;
use ulmus_types::Digest;

use boundaries::SplitTable;
use bpe::{Bpe, Part, Scratch};
use byte_level::ByteLevel;
use cache::{Cache, Key};
use model::{ModelProto, ModelType, PieceType};
use normalizer::Normalizer;
use ulmus_types::{is_pointer, without_mark};
use vocabulary::{BLANK, Vocabulary};

pub use error::TokenizerError;
pub use train::train;

/// A tokenizer. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct Tokenizer(Arc<Tables>);

struct Tables {
    file: Vec<u8>,
    digest: Digest,
    pieces: usize,
    bos: End,
    eos: End,
    kind: Kind,
}

/// A token that begins or ends documents.
#[derive(Debug, Clone)]
struct End {
    id: u32,
    name: String,
}

enum Kind {
    SentencePiece(SentencePiece),
    ByteLevel(ByteLevel),
    /// Any other that Hugging Face's library reads.
    Reference(Box<tokenizers::Tokenizer>),
}

struct SentencePiece {
    vocabulary: Vocabulary,
    normalizer: Normalizer,
    bpe: Bpe,
    boundaries: SplitTable,
    /// What each piece decodes to.
    surfaces: Vec<Vec<u8>>,
    bytes: Bytes,
}

/// What becomes of byte pieces in a row that are not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bytes {
    /// Each that is wrong becomes U+FFFD. A control piece ends the row. So does SentencePiece.
    Apart,
    /// All of the row become U+FFFD. Control pieces are not there at all, and a blank in front is dropped whatever made it. So
    /// does Hugging Face's library.
    Together,
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
    /// Reads a SentencePiece `tokenizer.model` or a Hugging Face `tokenizer.json`; `name` is its place, for messages.
    /// `bos` and `eos` name the tokens that begin and end documents, where they are not those that the file tells.
    ///
    /// # Errors
    /// When the bytes are neither, or the file has no such tokens.
    pub fn read(
        bytes: &[u8],
        name: &str,
        bos: Option<&str>,
        eos: Option<&str>,
    ) -> Result<Self, TokenizerError> {
        let bytes = without_mark(bytes);
        if is_pointer(bytes, bytes.len() as u64) {
            return Err(TokenizerError::Pointer { file: name.to_owned() });
        }
        let tables = if is_json(bytes) {
            huggingface::read(bytes, bos, eos)
        } else {
            SentencePiece::read(bytes).and_then(|model| model.tables(bos, eos))
        };
        let tables = tables.map_err(|reason| TokenizerError::Unusable { what: name.to_owned(), reason })?;
        Ok(Self(Arc::new(Tables { file: bytes.to_vec(), digest: Digest::of(bytes), ..tables })))
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
        match &self.0.kind {
            Kind::SentencePiece(model) => model.decode(ids),
            Kind::ByteLevel(model) => String::from_utf8_lossy(&model.decode(ids)).into_owned(),
            // Some of the library's decoders panic if there is nothing to decode.
            Kind::Reference(_) if ids.iter().all(|id| self.is_byte(*id).is_none()) => String::new(),
            Kind::Reference(reference) => reference.decode(ids, true).unwrap_or_default(),
        }
    }

    /// Begins every document.
    pub fn bos(&self) -> u32 {
        self.0.bos.id
    }

    /// Ends every document.
    pub fn eos(&self) -> u32 {
        self.0.eos.id
    }

    /// What the file calls BOS and EOS.
    pub fn names_of_ends(&self) -> (&str, &str) {
        (&self.0.bos.name, &self.0.eos.name)
    }

    /// Fills the tail of sequences; never a target. It is the first id after the pieces.
    pub fn pad(&self) -> u32 {
        self.pieces() as u32
    }

    /// Whether there is a piece of this id.
    pub fn has(&self, id: u32) -> bool {
        match &self.0.kind {
            Kind::Reference(reference) => reference.id_to_token(id).is_some(),
            Kind::SentencePiece(_) | Kind::ByteLevel(_) => (id as usize) < self.pieces(),
        }
    }

    /// Number of pieces. A model needs one row more, for the pad id.
    pub fn pieces(&self) -> usize {
        self.0.pieces
    }

    /// The file that it was read from: the name that such files have, and the bytes.
    pub fn file(&self) -> (&'static str, &[u8]) {
        let name = if self.is_json() { paths::TOKENIZER_JSON } else { paths::TOKENIZER_MODEL };
        (name, &self.0.file)
    }

    /// Whether texts go our own way, and not through Hugging Face's library.
    pub fn is_native(&self) -> bool {
        !matches!(self.0.kind, Kind::Reference(_))
    }

    fn is_json(&self) -> bool {
        is_json(&self.0.file)
    }

    /// Hash of the file.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }
}

/// How many pieces a tokenizer file has, whatever its BOS and EOS; none if it is no tokenizer.
pub fn count_pieces(file: &[u8]) -> Option<usize> {
    let file = without_mark(file);
    if is_json(file) {
        huggingface::count_pieces(file)
    } else {
        Some(ModelProto::decode(file).ok()?.pieces.len()).filter(|pieces| *pieces > 0)
    }
}

fn is_json(file: &[u8]) -> bool {
    file.trim_ascii_start().starts_with(b"{")
}

impl Tables {
    /// Those of a file that is filled in later.
    fn new(kind: Kind, bos: End, eos: End) -> Self {
        let pieces = match &kind {
            Kind::SentencePiece(model) => model.vocabulary.pieces.len(),
            Kind::ByteLevel(model) => model.bytes.len(),
            Kind::Reference(reference) => {
                reference.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
            }
        };
        Self { file: Vec::new(), digest: Digest::of(&[]), pieces, bos, eos, kind }
    }
}

impl SentencePiece {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let model = ModelProto::decode(bytes).map_err(|error| {
            format!("it is no SentencePiece model ({error}); give a tokenizer.model or a tokenizer.json")
        })?;
        if model.pieces.is_empty() {
            return Err("it has no pieces; give a SentencePiece tokenizer.model".to_owned());
        }
        let kind = model.trainer.clone().unwrap_or_default().model_type();
        if kind != ModelType::Bpe {
            return Err(format!("it is a {kind:?} model; give a BPE model"));
        }
        if model.denormalizer.as_ref().is_some_and(|rules| !rules.charsmap().is_empty()) {
            return Err("it changes decoded texts by a table; give a model without denormaliser".to_owned());
        }
        let vocabulary = Vocabulary::new(&model)?;
        let normalizer = Normalizer::new(&model, &vocabulary)?;
        let bpe = Bpe::new(&vocabulary, normalizer.escapes());
        Ok(Self::new(vocabulary, normalizer, bpe, Bytes::Apart))
    }

    fn new(vocabulary: Vocabulary, normalizer: Normalizer, bpe: Bpe, bytes: Bytes) -> Self {
        let boundaries = SplitTable::new(&vocabulary, normalizer.escapes());
        let surfaces = vocabulary.pieces.iter().map(|piece| vocabulary.surface(piece)).collect();
        Self { vocabulary, normalizer, bpe, boundaries, surfaces, bytes }
    }

    fn tables(self, bos: Option<&str>, eos: Option<&str>) -> Result<Tables, String> {
        let Vocabulary { pieces, bos: own_bos, eos: own_eos, .. } = &self.vocabulary;
        let end = |what: &str, named: Option<&str>, own: Option<u32>| {
            let id = match named {
                Some(name) => (0..)
                    .zip(pieces)
                    .find(|(_, piece)| piece.text == name)
                    .map(|(id, _)| id)
                    .ok_or_else(|| format!("it has no piece {name:?}; correct tokenizer.{what} of the plan, or --{what}"))?,
                None => own.ok_or_else(|| {
                    format!("it names no piece as its {what}; write the name of one as tokenizer.{what} in the plan, or --{what}")
                })?,
            };
            Ok::<End, String>(End { id, name: pieces[id as usize].text.clone() })
        };
        let (bos, eos) = (end("bos", bos, *own_bos)?, end("eos", eos, *own_eos)?);
        Ok(Tables::new(Kind::SentencePiece(self), bos, eos))
    }

    fn decode(&self, ids: &[u32]) -> String {
        let (drops_blank, drops_all) = self.normalizer.drops_blanks();
        let apart = self.bytes == Bytes::Apart;
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut at_start = drops_blank && apart;
        // Where what comes before and what comes behind are not one row of bytes.
        let mut seams = Vec::new();
        for id in ids {
            let Some(surface) = self.surfaces.get(*id as usize) else { continue };
            if surface.is_empty() && apart {
                seams.push(bytes.len());
            } else if at_start && bytes.is_empty() && self.vocabulary.begins_with_blank(*id) {
                at_start = drops_all;
                bytes.extend_from_slice(&surface[1..]);
            } else {
                bytes.extend_from_slice(surface);
            }
        }
        let mut text = match String::from_utf8(bytes) {
            Ok(text) if seams.is_empty() => text,
            Ok(text) => mended(text.as_bytes(), &seams),
            Err(error) if apart => mended(error.as_bytes(), &seams),
            Err(_) => self.decode_rows(ids),
        };
        if drops_blank && !apart && text.starts_with(' ') {
            text.remove(0);
        }
        text
    }

    /// The text of ids with rows of bytes that are not UTF-8, each of which is kept or lost whole.
    fn decode_rows(&self, ids: &[u32]) -> String {
        let kind = |id: u32| self.vocabulary.pieces.get(id as usize).map(|piece| piece.kind);
        let shown: Vec<u32> = ids
            .iter()
            .copied()
            .filter(|id| kind(*id).is_some_and(|kind| kind != PieceType::Control))
            .collect();
        let rows = shown.chunk_by(|a, b| [a, b].iter().all(|id| kind(**id) == Some(PieceType::Byte)));
        let text = |row: &[u32]| {
            let bytes: Vec<u8> = row.iter().flat_map(|id| &self.surfaces[*id as usize]).copied().collect();
            String::from_utf8(bytes).unwrap_or_else(|error| {
                error.as_bytes().iter().map(|_| char::REPLACEMENT_CHARACTER).collect()
            })
        };
        rows.map(text).collect()
    }

    fn encode(
        &self,
        cache: &mut Cache,
        scratch: &mut Scratch,
        first: &mut String,
        text: &str,
        ids: &mut Vec<u32>,
    ) {
        let Self { vocabulary, normalizer, bpe, boundaries, .. } = self;
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
            if normalizer.prefixes(text) {
                let end = boundaries.first_end(BLANK, text);
                first.clear();
                first.push(BLANK);
                first.push_str(&text[..end]);
                chunk(first);
                rest = &text[end..];
            }
            boundaries.cut(rest, chunk);
        } else {
            let text = normalizer.apply(text);
            if bpe.is_local() && !normalizer.has_user_defined() {
                boundaries.cut(&text, chunk);
            } else {
                bpe.encode(vocabulary, scratch, normalizer.parts(&text), ids);
            }
        }
        vocabulary.merge_unknown(ids, start);
    }
}

/// Bytes as text, with a sign for each byte that is wrong, not one for several.
fn mended(bytes: &[u8], seams: &[usize]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let ends = seams.iter().copied().chain([bytes.len()]);
    let mut begin = 0;
    for end in ends {
        for chunk in bytes[begin..end].utf8_chunks() {
            text.push_str(chunk.valid());
            text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
        }
        begin = end;
    }
    text
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
        match &tokenizer.0.kind {
            Kind::SentencePiece(model) => model.encode(cache, scratch, first, text, ids),
            Kind::ByteLevel(model) => model.encode(cache, scratch, text, ids),
            Kind::Reference(reference) => {
                let encoding = reference.encode_fast(text, false);
                ids.extend_from_slice(encoding.expect("the library encodes every text").get_ids());
            }
        }
    }
}

#[cfg(test)]
mod tests;
