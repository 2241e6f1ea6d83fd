//! Exact tokenizers: a text gets the same ids as from the library that the tokenizer file was made for.
//!
//! SentencePiece BPE (`tokenizer.model`) and the two common families of `tokenizer.json` ([`huggingface`]) have
//! implementations of our own; other kinds of `tokenizer.json` go through Hugging Face's library.
//!
//! A text for a SentencePiece vocabulary is cut into chunks across which no merge is possible ([`boundaries`]). The ids
//! of a chunk come from the [`cache`], or else from [`bpe`]. Models that do more than prepend a space ([`normalizer`]),
//! that define pieces to be matched first, or that have unused pieces take slower paths to the same result.
//!
//! Texts are taken literally: `<s>` in a text is encoded as three characters and never becomes the control id, unless the
//! caller asks for that ([`SpecialEncoder`]). Unigram models of SentencePiece are refused. Those in a `tokenizer.json` go
//! through the library with the scores in the file. Its Python wheel has other last bits in some scores, and so other ids
//! where two segmentations tie.

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
mod special;
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
use vocabulary::{SPACE_MARK, Vocabulary};

pub use error::TokenizerError;
pub use special::SpecialEncoder;
pub use train::{TRAINED_NAMES, train};

/// A tokenizer. Clones share its tables.
#[derive(Clone)]
pub struct Tokenizer(Arc<Tables>);

struct Tables {
    file: Vec<u8>,
    digest: Digest,
    pieces: usize,
    bos: SpecialToken,
    eos: SpecialToken,
    kind: Kind,
}

/// BOS or EOS.
#[derive(Debug, Clone)]
struct SpecialToken {
    id: u32,
    name: String,
}

enum Kind {
    SentencePiece(SentencePiece),
    ByteLevel(ByteLevel),
    /// Any other kind that Hugging Face's library can read.
    Reference(Box<tokenizers::Tokenizer>),
}

struct SentencePiece {
    vocabulary: Vocabulary,
    normalizer: Normalizer,
    bpe: Bpe,
    boundaries: SplitTable,
    /// The bytes that each piece decodes to.
    surfaces: Vec<Vec<u8>>,
    decoding: Decoding,
}

/// How a run of byte pieces is decoded that is not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decoding {
    /// As SentencePiece does it: each invalid byte becomes U+FFFD, and a control piece ends the run.
    PerByte,
    /// As Hugging Face's library does it: all bytes of the run become U+FFFD. Control pieces are ignored, and a leading
    /// space is dropped whichever piece it comes from.
    PerRun,
}

/// Encodes texts. Each thread uses its own, because an encoder caches the ids of the words that it has seen.
#[derive(Debug)]
pub struct Encoder {
    tokenizer: Tokenizer,
    cache: Cache,
    scratch: Scratch,
    first: String,
}

impl Tokenizer {
    /// Reads a SentencePiece `tokenizer.model` or a Hugging Face `tokenizer.json`. Errors call the file `name`.
    /// `bos` and `eos` name the tokens that begin and end documents, and default to those that the file names.
    ///
    /// # Errors
    /// When the bytes are no tokenizer of either kind, or the file lacks one of the two tokens.
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

    /// A new encoder, to be used for many texts: its cache of 4 MiB fills with the words that it has seen.
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

    /// The text of `ids`. Control ids and ids beyond the vocabulary (such as the pad id) add no text; bytes that are
    /// not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.0.kind {
            Kind::SentencePiece(model) => model.decode(ids),
            Kind::ByteLevel(model) => String::from_utf8_lossy(&model.decode(ids)).into_owned(),
            // Some of the library's decoders panic when there is nothing to decode.
            Kind::Reference(_) if ids.iter().all(|id| self.is_byte(*id).is_none()) => String::new(),
            Kind::Reference(reference) => reference.decode(ids, true).unwrap_or_default(),
        }
    }

    /// The id of BOS, which begins every document.
    pub fn bos(&self) -> u32 {
        self.0.bos.id
    }

    /// The id of EOS, which ends every document.
    pub fn eos(&self) -> u32 {
        self.0.eos.id
    }

    /// The names of BOS and EOS in the tokenizer file.
    pub fn special_names(&self) -> (&str, &str) {
        (&self.0.bos.name, &self.0.eos.name)
    }

    /// The names and ids of pieces that are not text: BOS, EOS, the unknown piece, and others that the file marks so. Hugging
    /// Face's tokenizers read them where they are written out in a text; [`Self::encode`] does not.
    pub fn special_pieces(&self) -> Vec<(String, u32)> {
        let listed = |file: &[u8]| -> Option<Vec<(String, u32)>> {
            let file: serde_json::Value = serde_json::from_slice(without_mark(file)).ok()?;
            let special = file["added_tokens"].as_array()?.iter().filter(|token| token["special"] == true);
            special
                .map(|token| {
                    Some((token["content"].as_str()?.to_owned(), u32::try_from(token["id"].as_u64()?).ok()?))
                })
                .collect()
        };
        let mut pieces = match &self.0.kind {
            Kind::SentencePiece(model) if !self.is_json() => {
                let kinds = [PieceType::Control, PieceType::Unknown];
                let of_kind =
                    |kind| model.vocabulary.of_kind(kind).map(|(id, piece)| (piece.text.clone(), id));
                kinds.into_iter().flat_map(of_kind).collect()
            }
            _ => listed(&self.0.file).unwrap_or_default(),
        };
        let (bos, eos) = (&self.0.bos, &self.0.eos);
        pieces.extend([bos, eos].map(|token| (token.name.clone(), token.id)));
        pieces.retain(|(name, _)| !name.is_empty());
        pieces.sort_by_key(|(_, id)| *id);
        pieces.dedup();
        pieces
    }

    /// The id that fills the end of short sequences and is never a target. It is the first id after the pieces.
    pub fn pad(&self) -> u32 {
        self.pieces() as u32
    }

    /// Whether `id` belongs to a piece.
    pub fn has(&self, id: u32) -> bool {
        match &self.0.kind {
            Kind::Reference(reference) => reference.id_to_token(id).is_some(),
            Kind::SentencePiece(_) | Kind::ByteLevel(_) => (id as usize) < self.pieces(),
        }
    }

    /// Number of pieces. A model needs one more row, for the pad id.
    pub fn pieces(&self) -> usize {
        self.0.pieces
    }

    /// The file that the tokenizer was read from: the usual name of such files, and the bytes.
    pub fn file(&self) -> (&'static str, &[u8]) {
        let name = if self.is_json() { paths::TOKENIZER_JSON } else { paths::TOKENIZER_MODEL };
        (name, &self.0.file)
    }

    /// Whether texts are encoded by our own implementation and not by Hugging Face's library.
    pub fn is_native(&self) -> bool {
        !matches!(self.0.kind, Kind::Reference(_))
    }

    fn is_json(&self) -> bool {
        is_json(&self.0.file)
    }

    /// Hash of the file that the tokenizer was read from.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }
}

/// Number of pieces in a tokenizer file, which may lack BOS and EOS; `None` if it is not a tokenizer.
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
    /// Tables whose `file` and `digest` are filled in later.
    fn new(kind: Kind, bos: SpecialToken, eos: SpecialToken) -> Self {
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
            format!("it is not a SentencePiece model ({error}); give a tokenizer.model or a tokenizer.json")
        })?;
        if model.pieces.is_empty() {
            return Err("it has no pieces; give a SentencePiece tokenizer.model".to_owned());
        }
        let kind = model.trainer.clone().unwrap_or_default().model_type();
        if kind != ModelType::Bpe {
            return Err(format!("it is a {kind:?} model; give a BPE model"));
        }
        if model.denormalizer.as_ref().is_some_and(|rules| !rules.charsmap().is_empty()) {
            return Err("it has a denormaliser, which is not supported; give a model without one".to_owned());
        }
        let vocabulary = Vocabulary::new(&model)?;
        let normalizer = Normalizer::new(&model, &vocabulary)?;
        let bpe = Bpe::new(&vocabulary, normalizer.escapes());
        Ok(Self::new(vocabulary, normalizer, bpe, Decoding::PerByte))
    }

    fn new(vocabulary: Vocabulary, normalizer: Normalizer, bpe: Bpe, decoding: Decoding) -> Self {
        let boundaries = SplitTable::new(&vocabulary, normalizer.escapes());
        let surfaces = vocabulary.pieces.iter().map(|piece| vocabulary.surface(piece)).collect();
        Self { vocabulary, normalizer, bpe, boundaries, surfaces, decoding }
    }

    fn tables(self, bos: Option<&str>, eos: Option<&str>) -> Result<Tables, String> {
        let Vocabulary { pieces, bos: own_bos, eos: own_eos, .. } = &self.vocabulary;
        let end = |what: &str, named: Option<&str>, own: Option<u32>| {
            let id = match named {
                Some(name) => (0..)
                    .zip(pieces)
                    .find(|(_, piece)| piece.text == name)
                    .map(|(id, _)| id)
                    .ok_or_else(|| format!("it has no piece {name:?}; correct tokenizer.{what} in the plan, or --{what}"))?,
                None => own.ok_or_else(|| {
                    format!("it does not name its {what} piece; write the name as tokenizer.{what} in the plan, or give --{what}")
                })?,
            };
            Ok::<SpecialToken, String>(SpecialToken { id, name: pieces[id as usize].text.clone() })
        };
        let (bos, eos) = (end("bos", bos, *own_bos)?, end("eos", eos, *own_eos)?);
        Ok(Tables::new(Kind::SentencePiece(self), bos, eos))
    }

    fn decode(&self, ids: &[u32]) -> String {
        let (drops_space, drops_all) = self.normalizer.drops_spaces();
        let per_byte = self.decoding == Decoding::PerByte;
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut at_start = drops_space && per_byte;
        // Offsets of control pieces, which end a run of bytes.
        let mut seams = Vec::new();
        for id in ids {
            let Some(surface) = self.surfaces.get(*id as usize) else { continue };
            if surface.is_empty() && per_byte {
                seams.push(bytes.len());
            } else if at_start && bytes.is_empty() && self.vocabulary.begins_with_space(*id) {
                at_start = drops_all;
                bytes.extend_from_slice(&surface[1..]);
            } else {
                bytes.extend_from_slice(surface);
            }
        }
        let mut text = match String::from_utf8(bytes) {
            Ok(text) if seams.is_empty() => text,
            Ok(text) => mended(text.as_bytes(), &seams),
            Err(error) if per_byte => mended(error.as_bytes(), &seams),
            Err(_) => self.decode_runs(ids),
        };
        if drops_space && !per_byte && text.starts_with(' ') {
            text.remove(0);
        }
        text
    }

    /// Decodes ids with runs of bytes that are not UTF-8. A run is decoded or replaced as a whole.
    fn decode_runs(&self, ids: &[u32]) -> String {
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
                let end = boundaries.first_end(SPACE_MARK, text);
                first.clear();
                first.push(SPACE_MARK);
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

/// Bytes as text, with one U+FFFD for each invalid byte, where the standard library would write one for several.
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
