//! SentencePiece BPE with byte fallback, exact: a text becomes the same ids as in Google's own library.
//!
//! A text is cut between two characters that are adjacent in no piece: no merge can cross such a cut, so every
//! chunk is merged alone. Within a chunk the pair whose piece has the highest score is merged first, the leftmost
//! of equals. Equal scores are common (the runs of blanks in the LLaMA-2 model share one), so merging by rank of
//! id instead is wrong.
//!
//! Texts are taken literally: `<s>` in a text stays five characters' worth of pieces and never becomes the control
//! id. Not supported, and refused: Unigram models, user-defined pieces, character maps, models without byte
//! fallback. The published recipe needs none of them.

mod json;
mod model;
mod train;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

use prost::Message;
use ulmus_types::Digest;

use crate::error::DataError;
use model::{ModelProto, ModelType, PieceType};

pub use train::train;

/// Stands for a blank inside pieces.
const BLANK: char = '\u{2581}';

/// A tokenizer, ready to encode. Shared by threads.
#[derive(Clone)]
pub struct Tokenizer {
    model: Vec<u8>,
    digest: Digest,
    pieces: Vec<Piece>,
    bos: u32,
    eos: u32,
    dummy_prefix: bool,
    bytes: [u32; 256],
    symbols: HashMap<char, u32, Fast>,
    merges: HashMap<(u32, u32), Merge, Fast>,
    joins: Joins,
}

#[derive(Debug, Clone)]
struct Piece {
    text: String,
    score: f32,
    kind: PieceType,
}

/// The piece that two symbols become. Lower priorities go first; equal scores have equal priority.
#[derive(Debug, Clone, Copy)]
struct Merge {
    priority: u32,
    id: u32,
}

/// Which characters are adjacent in some piece.
#[derive(Debug, Clone)]
struct Joins {
    ascii: [u128; 128],
    others: HashSet<(char, char), Fast>,
}

/// Hashes small keys by multiplication. The tables are only looked up, never walked.
type Fast = BuildHasherDefault<FastHasher>;

#[derive(Debug, Clone, Default)]
struct FastHasher(u64);

impl Hasher for FastHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.0 = (self.0.rotate_left(5) ^ u64::from(word)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

impl Joins {
    fn new<'a>(pieces: impl Iterator<Item = &'a str>) -> Self {
        let mut joins = Self { ascii: [0; 128], others: HashSet::default() };
        for piece in pieces {
            for (left, right) in piece.chars().zip(piece.chars().skip(1)) {
                match Self::ascii_pair(left, right) {
                    Some((left, right)) => joins.ascii[left] |= 1 << right,
                    None => {
                        joins.others.insert((left, right));
                    }
                }
            }
        }
        joins
    }

    fn contains(&self, left: char, right: char) -> bool {
        match Self::ascii_pair(left, right) {
            Some((left, right)) => self.ascii[left] >> right & 1 == 1,
            None => self.others.contains(&(left, right)),
        }
    }

    /// The blank sign sits where the blank itself would, which never occurs in pieces.
    fn ascii_pair(left: char, right: char) -> Option<(usize, usize)> {
        let index =
            |c: char| if c == BLANK { Some(usize::from(b' ')) } else { c.is_ascii().then_some(c as usize) };
        Some((index(left)?, index(right)?))
    }
}

/// Buffers of one encoding.
#[derive(Debug, Default)]
struct Scratch {
    /// Symbols of the chunk; those that were merged into their left neighbour are `GONE`.
    symbols: Vec<u32>,
    /// Left and right neighbour of each symbol that is left.
    neighbours: Vec<(u32, u32)>,
    /// Pairs that may be merged, the next one on top.
    offers: BinaryHeap<Reverse<Offer>>,
}

/// Two neighbours that may be merged. The order of the fields is the order of merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Offer {
    priority: u32,
    /// Position of the left one.
    at: u32,
    left: u32,
    right: u32,
    /// The piece that they become.
    id: u32,
}

const GONE: u32 = u32::MAX;

impl Tokenizer {
    /// Reads a SentencePiece `tokenizer.model`; `name` is its place, for messages.
    ///
    /// # Errors
    /// When the bytes are no BPE model with byte fallback.
    pub fn from_model(bytes: &[u8], name: &str) -> Result<Self, DataError> {
        let refuse = |reason: String| DataError::Tokenizer { what: name.to_owned(), reason };
        let model = ModelProto::decode(bytes).map_err(|error| {
            refuse(format!("it is no SentencePiece model ({error}); give a tokenizer.model"))
        })?;
        let trainer = model.trainer.clone().unwrap_or_default();
        let normalizer = model.normalizer.clone().unwrap_or_default();
        if model.pieces.is_empty() {
            return Err(refuse("it has no pieces; give a SentencePiece tokenizer.model".to_owned()));
        }
        if trainer.model_type() != ModelType::Bpe {
            return Err(refuse(format!("it is a {:?} model; give a BPE model", trainer.model_type())));
        }
        if !normalizer.charsmap().is_empty()
            || normalizer.remove_extra_whitespaces()
            || !normalizer.escape_whitespaces()
        {
            return Err(refuse(
                "it normalises texts; give a model with the identity normaliser that keeps extra blanks"
                    .to_owned(),
            ));
        }
        let pieces: Vec<Piece> = model
            .pieces
            .into_iter()
            .map(|piece| Piece {
                kind: piece.kind(),
                score: piece.score(),
                text: piece.text.unwrap_or_default(),
            })
            .collect();
        if let Some(piece) =
            pieces.iter().find(|p| matches!(p.kind, PieceType::UserDefined | PieceType::Unused))
        {
            return Err(refuse(format!(
                "piece {:?} is {:?}; give a model without such pieces",
                piece.text, piece.kind
            )));
        }
        let mut bytes_to_ids = [GONE; 256];
        for (id, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.kind == PieceType::Byte) {
            let byte = byte_of(&piece.text)
                .ok_or_else(|| refuse(format!("byte piece {:?} names no byte", piece.text)))?;
            bytes_to_ids[usize::from(byte)] = id as u32;
        }
        if bytes_to_ids.contains(&GONE) {
            return Err(refuse("it has no byte fallback; give a model with all 256 byte pieces".to_owned()));
        }
        let special = |what: &str, id: i32| {
            let id = u32::try_from(id).ok().filter(|id| (*id as usize) < pieces.len());
            id.ok_or_else(|| refuse(format!("it has no {what} piece; give a model with one")))
        };
        let (bos, eos) = (special("BOS", trainer.bos_id())?, special("EOS", trainer.eos_id())?);
        let (symbols, merges) = tables(&pieces);
        Ok(Self {
            model: bytes.to_vec(),
            digest: Digest::of(bytes),
            bos,
            eos,
            dummy_prefix: normalizer.add_dummy_prefix(),
            bytes: bytes_to_ids,
            symbols,
            merges,
            joins: Joins::new(normal(&pieces).map(|(_, piece)| piece.text.as_str())),
            pieces,
        })
    }

    /// The ids of `text`, without BOS and EOS.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        let mut scratch = Scratch::default();
        let prefix = (self.dummy_prefix && !text.is_empty()).then_some(BLANK);
        let mut previous = None;
        for c in prefix.into_iter().chain(text.chars().map(|c| if c == ' ' { BLANK } else { c })) {
            if previous.is_some_and(|previous| !self.joins.contains(previous, c)) {
                self.merge(&mut scratch, &mut ids);
            }
            if let Some(symbol) = self.symbols.get(&c) {
                scratch.symbols.push(*symbol);
            } else {
                // In no piece, so cut off on both sides.
                let mut utf8 = [0; 4];
                ids.extend(c.encode_utf8(&mut utf8).bytes().map(|byte| self.bytes[usize::from(byte)]));
            }
            previous = Some(c);
        }
        self.merge(&mut scratch, &mut ids);
        ids
    }

    /// Merges the symbols of a chunk and moves the pieces that result to `ids`.
    fn merge(&self, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let Scratch { symbols, neighbours, offers } = scratch;
        if symbols.len() > 1 {
            neighbours.clear();
            neighbours.extend((0..symbols.len() as u32).map(|at| (at.wrapping_sub(1), at + 1)));
            for at in 1..symbols.len() {
                self.offer(offers, at as u32 - 1, symbols[at - 1], symbols[at]);
            }
            while let Some(Reverse(Offer { at, left, right, id, .. })) = offers.pop() {
                let here = at as usize;
                let next = neighbours[here].1;
                // An older offer, one of whose symbols has been merged since.
                if symbols[here] != left || symbols.get(next as usize) != Some(&right) {
                    continue;
                }
                let after = neighbours[next as usize].1;
                symbols[here] = id;
                symbols[next as usize] = GONE;
                neighbours[here].1 = after;
                if let Some(symbol) = symbols.get(after as usize) {
                    neighbours[after as usize].0 = at;
                    self.offer(offers, at, id, *symbol);
                }
                let before = neighbours[here].0;
                if let Some(symbol) = symbols.get(before as usize) {
                    self.offer(offers, before, *symbol, id);
                }
            }
        }
        for symbol in symbols.drain(..).filter(|symbol| *symbol != GONE) {
            match self.pieces.get(symbol as usize) {
                Some(_) => ids.push(symbol),
                None => ids.extend(self.bytes_of_symbol(symbol)),
            }
        }
    }

    fn offer(&self, offers: &mut BinaryHeap<Reverse<Offer>>, at: u32, left: u32, right: u32) {
        if let Some(Merge { priority, id }) = self.merges.get(&(left, right)).copied() {
            offers.push(Reverse(Offer { priority, at, left, right, id }));
        }
    }

    /// The byte pieces of a character that occurs in pieces but is none itself. Rare enough for a search.
    fn bytes_of_symbol(&self, symbol: u32) -> Vec<u32> {
        let found = self.symbols.iter().find(|(_, other)| **other == symbol);
        let text = found.map(|(c, _)| c.to_string()).unwrap_or_default();
        text.bytes().map(|byte| self.bytes[usize::from(byte)]).collect()
    }

    /// The text of `ids`. Control ids and ids beyond the pieces (such as the pad id) have none; bytes that are not
    /// UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for piece in ids.iter().filter_map(|id| self.pieces.get(*id as usize)) {
            match piece.kind {
                PieceType::Byte => bytes.extend(byte_of(&piece.text)),
                PieceType::Control => {}
                PieceType::Unknown => bytes.extend(" \u{2047} ".as_bytes()),
                PieceType::Normal | PieceType::UserDefined | PieceType::Unused => {
                    bytes.extend(piece.text.replace(BLANK, " ").as_bytes());
                }
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        match text.strip_prefix(' ') {
            Some(rest) if self.dummy_prefix => rest.to_owned(),
            _ => text.into_owned(),
        }
    }

    /// Begins every document.
    pub const fn bos(&self) -> u32 {
        self.bos
    }

    /// Ends every document.
    pub const fn eos(&self) -> u32 {
        self.eos
    }

    /// Fills the tail of sequences; never a target. It is the first id after the pieces.
    pub fn pad(&self) -> u32 {
        self.pieces.len() as u32
    }

    /// Number of pieces. A model needs one row more, for the pad id.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// The bytes of `tokenizer.model`.
    pub fn model(&self) -> &[u8] {
        &self.model
    }

    /// Hash of `tokenizer.model`.
    pub const fn digest(&self) -> Digest {
        self.digest
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} pieces, {})", self.pieces.len(), self.digest.short())
    }
}

/// Pieces that texts are made of, with their ids.
fn normal(pieces: &[Piece]) -> impl Iterator<Item = (u32, &Piece)> {
    (0..).zip(pieces).filter(|(_, piece)| piece.kind == PieceType::Normal)
}

/// The byte of a piece such as `<0x0A>`.
fn byte_of(piece: &str) -> Option<u8> {
    u8::from_str_radix(piece.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

type Symbols = HashMap<char, u32, Fast>;
type Merges = HashMap<(u32, u32), Merge, Fast>;

/// Symbols of single characters, and what two symbols become.
///
/// Characters that occur in pieces without being pieces get symbols beyond the ids: they can be merged, and fall
/// back to bytes where they are not.
fn tables(pieces: &[Piece]) -> (Symbols, Merges) {
    let mut by_text: BTreeMap<String, u32> =
        normal(pieces).map(|(id, piece)| (piece.text.clone(), id)).collect();
    let mut symbols = Symbols::default();
    let mut next = pieces.len() as u32;
    for (_, piece) in normal(pieces) {
        for c in piece.text.chars() {
            let symbol = *by_text.entry(c.to_string()).or_insert_with(|| {
                next += 1;
                next - 1
            });
            symbols.insert(c, symbol);
        }
    }
    let mut ranked: Vec<(u32, &Piece)> =
        normal(pieces).filter(|(_, piece)| piece.text.chars().nth(1).is_some()).collect();
    ranked.sort_by(|(_, a), (_, b)| b.score.total_cmp(&a.score));
    let mut merges = Merges::default();
    let mut priority = 0;
    for (index, (id, piece)) in ranked.iter().enumerate() {
        if index > 0 && ranked[index - 1].1.score > piece.score {
            priority += 1;
        }
        for (at, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if let (Some(left), Some(right)) = (by_text.get(left), by_text.get(right)) {
                merges.insert((*left, *right), Merge { priority, id: *id });
            }
        }
    }
    (symbols, merges)
}

#[cfg(test)]
mod tests {
    use super::model::{NormalizerProto, PieceProto, TrainerProto};
    use super::*;

    fn piece(text: &str, score: f32, kind: PieceType) -> PieceProto {
        PieceProto { text: Some(text.to_owned()), score: Some(score), kind: Some(kind as i32) }
    }

    /// A model with the given normal pieces after the specials and bytes.
    pub(super) fn model_of(normal: &[(&str, f32)]) -> Vec<u8> {
        let mut pieces = vec![
            piece("<unk>", 0.0, PieceType::Unknown),
            piece("<s>", 0.0, PieceType::Control),
            piece("</s>", 0.0, PieceType::Control),
        ];
        pieces.extend((0..256).map(|byte| piece(&format!("<0x{byte:02X}>"), 0.0, PieceType::Byte)));
        pieces.extend(normal.iter().map(|(text, score)| piece(text, *score, PieceType::Normal)));
        let trainer = TrainerProto { model_type: Some(ModelType::Bpe as i32), ..TrainerProto::default() };
        let normalizer =
            NormalizerProto { remove_extra_whitespaces: Some(false), ..NormalizerProto::default() };
        ModelProto { pieces, trainer: Some(trainer), normalizer: Some(normalizer) }.encode_to_vec()
    }

    fn texts(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
        tokenizer.encode(text).iter().map(|id| tokenizer.pieces[*id as usize].text.clone()).collect()
    }

    #[test]
    fn equal_scores_merge_leftmost_first() {
        let blanks: Vec<(String, f32)> = (2..=5).map(|n| ("▁".repeat(n), -1e9)).collect();
        let mut pieces: Vec<(&str, f32)> =
            blanks.iter().map(|(text, score)| (text.as_str(), *score)).collect();
        pieces.extend([("▁", -2e9), ("a", -2e9)]);
        let tokenizer = Tokenizer::from_model(&model_of(&pieces), "test").unwrap();
        // Seven blanks with the prefix: the leftmost run grows until no longer one is a piece.
        assert_eq!(texts(&tokenizer, "      a"), ["▁▁▁▁▁", "▁▁", "a"]);
    }

    #[test]
    fn a_character_that_is_no_piece_merges_or_falls_back() {
        let tokenizer =
            Tokenizer::from_model(&model_of(&[("xé", -1.0), ("x", -2.0), ("▁", -3.0)]), "test").unwrap();
        assert_eq!(texts(&tokenizer, "xé"), ["▁", "xé"]);
        assert_eq!(texts(&tokenizer, "éx"), ["▁", "<0xC3>", "<0xA9>", "x"]);
        assert_eq!(tokenizer.decode(&tokenizer.encode("éx ü")), "éx ü");
    }

    /// Both files were made by Google's trainer; the reference reads the second.
    #[test]
    fn ids_equal_those_of_the_reference() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny/tokenizer");
        let model = std::fs::read(format!("{golden}.model")).unwrap();
        let tokenizer = Tokenizer::from_model(&model, golden).unwrap();
        // Control pieces are left out of the added tokens, where they would be cut out of texts.
        let mut json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(format!("{golden}.json")).unwrap()).unwrap();
        json["added_tokens"] = serde_json::json!([]);
        let reference = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
        let odd = "<s> </s>   \t naïve 日本 \u{1F600}\r\n====== 12345 \u{2581}x";
        for text in include_str!("../order.rs").lines().chain([odd, "", " "]) {
            assert_eq!(tokenizer.encode(text), reference.encode(text, false).unwrap().get_ids(), "{text:?}");
        }
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        for (bytes, word) in [
            (b"not a model".to_vec(), "SentencePiece"),
            (Vec::new(), "no pieces"),
            (
                ModelProto { pieces: vec![piece("a", 0.0, PieceType::Normal)], ..ModelProto::default() }
                    .encode_to_vec(),
                "BPE",
            ),
            (
                {
                    let mut model = ModelProto::decode(model_of(&[]).as_slice()).unwrap();
                    model.pieces.remove(10);
                    model.encode_to_vec()
                },
                "byte fallback",
            ),
            (
                {
                    let mut model = ModelProto::decode(model_of(&[]).as_slice()).unwrap();
                    model.pieces.push(piece("[user]", 0.0, PieceType::UserDefined));
                    model.encode_to_vec()
                },
                "UserDefined",
            ),
        ] {
            let message = Tokenizer::from_model(&bytes, "x.model").unwrap_err().to_string();
            assert!(message.contains(word) && message.contains("x.model"), "{message}");
        }
    }
}
