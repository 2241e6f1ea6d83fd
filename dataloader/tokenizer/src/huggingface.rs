//! Reads Hugging Face's `tokenizer.json`.
//!
//! Two families have fast implementations here: byte-level BPE, and BPE over a SentencePiece vocabulary. All others,
//! and files with rare settings, go through Hugging Face's own library, at its speed.
//!
//! Texts are taken literally: a token that the file marks as special is never matched in a text. Other added tokens
//! (such as runs of spaces) are.

use std::collections::{BTreeMap, HashMap};

use aho_corasick::{AhoCorasick, MatchKind};
use serde::Deserialize;
use serde_json::{Value, json};

use super::bpe::Bpe;
use super::byte_level::{self, ByteLevel, characters};
use super::model::PieceType;
use super::normalizer::Normalizer;
use super::pretokenizer::PreTokenizer;
use super::vocabulary::{Piece, Vocabulary, byte_of};
use super::{Decoding, Kind, SentencePiece, SpecialToken, Tables};

/// Common names of BOS.
const BOS: [&str; 6] = ["<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "[CLS]"];
/// Common names of EOS.
const EOS: [&str; 7] =
    ["</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|endofprompt|>", "[EOS]", "[SEP]"];

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    decoder: Option<Value>,
    model: Value,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    /// Settings that are false in most files: `single_word`, `lstrip`, `rstrip` and `normalized`.
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

impl Added {
    fn is(&self, setting: &str) -> bool {
        self.rest.get(setting).is_some_and(|value| value == true)
    }
}

#[derive(Deserialize)]
struct Model {
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    /// The form in older files: the two parts, separated by a space.
    Line(String),
}

impl Merge {
    fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Line(line) => line.split_once(' '),
        }
    }
}

/// Reads a file. `bos` and `eos` are the names of these tokens if the caller gives them.
pub(super) fn read(json: &[u8], bos: Option<&str>, eos: Option<&str>) -> Result<Tables, String> {
    let file: File = serde_json::from_slice(json).map_err(|error| {
        format!("not a tokenizer.json ({error}); give the file of a model, or a tokenizer.model")
    })?;
    let ids = ids(&file);
    let pieces = ids.values().max().ok_or("it has no tokens; give the tokenizer.json of a model")? + 1;
    if pieces >= 1 << 24 {
        return Err(format!("it has an id of {}; give the tokenizer.json of a model", pieces - 1));
    }
    // In a file with special tokens, an ordinary token with a common name may be markup instead.
    let special: Vec<&str> =
        file.added_tokens.iter().filter(|added| added.special).map(|added| added.content.as_str()).collect();
    let find = |what: &str, named: Option<&str>, common: &[&str]| match named {
        Some(name) => match ids.get(name) {
            Some(id) => Ok(Some(SpecialToken { id: *id, name: name.to_owned() })),
            None => {
                Err(format!("it has no token {name:?}; correct tokenizer.{what} in the plan, or --{what}"))
            }
        },
        None => Ok(common
            .iter()
            .filter(|name| special.is_empty() || special.contains(*name))
            .find_map(|name| Some(SpecialToken { id: *ids.get(*name)?, name: (*name).to_owned() }))),
    };
    let eos = find("eos", eos, &EOS)?
        .ok_or("it does not name the token that ends a document; write its name as tokenizer.eos in the plan, or give --eos")?;
    // A model without BOS has a token that separates documents, which then stands at both ends.
    let bos = find("bos", bos, &BOS)?.unwrap_or_else(|| eos.clone());
    if let Some(kind) = fast(&file, &ids, pieces as usize)? {
        return Ok(Tables::new(kind, bos, eos));
    }
    let reference = reference(json)?;
    // Where the ids of added tokens leave a gap in the file, the library renumbers them.
    let known = |token: SpecialToken| SpecialToken {
        id: reference.token_to_id(&token.name).unwrap_or(token.id),
        ..token
    };
    let (bos, eos) = (known(bos), known(eos));
    Ok(Tables::new(Kind::Reference(reference), bos, eos))
}

/// The ids of all tokens.
fn ids(file: &File) -> HashMap<String, u32> {
    let mut ids: HashMap<String, u32> = match file.model.get("vocab") {
        Some(Value::Object(vocab)) => vocab
            .iter()
            .filter_map(|(text, id)| Some((text.clone(), u32::try_from(id.as_u64()?).ok()?)))
            .collect(),
        // Unigram models have a list of pieces with their scores.
        Some(Value::Array(vocab)) => (0..)
            .zip(vocab)
            .filter_map(|(id, piece)| Some((piece.get(0)?.as_str()?.to_owned(), id)))
            .collect(),
        _ => HashMap::new(),
    };
    ids.extend(file.added_tokens.iter().map(|added| (added.content.clone(), added.id)));
    ids
}

/// The number of pieces in a file, or `None` if it is not a tokenizer.
pub(super) fn count_pieces(json: &[u8]) -> Option<usize> {
    let ids = ids(&serde_json::from_slice(json).ok()?);
    ids.into_values().max().map(|id| id as usize + 1)
}

/// A text with every byte that UTF-8 can contain, and with characters that are in no model's vocabulary.
fn unlikely() -> String {
    let ranges = [0..0x800, 0xe000..0xe040, 0xf_0000..0xf_0040, 0x10_fff0..0x10_fffe];
    // One character for each leading byte of a sequence of three or four.
    let leads = (0x800..0x1_0000).step_by(0x800).chain((0x1_0000..0x11_0000).step_by(0x1_0000));
    ranges.into_iter().flatten().chain(leads).filter_map(char::from_u32).collect()
}

/// Reads a file with Hugging Face's own library.
fn reference(json: &[u8]) -> Result<Box<tokenizers::Tokenizer>, String> {
    let mut reference = tokenizers::Tokenizer::from_bytes(json)
        .map_err(|error| format!("it cannot be read: {error}; give a tokenizer.json of a known kind"))?;
    reference.set_encode_special_tokens(true);
    if let Err(error) = reference.encode_fast(unlikely(), false) {
        return Err(format!(
            "it cannot encode every text ({error}); give a file with a token for unknown characters"
        ));
    }
    reference.with_truncation(None).map_err(|error| error.to_string())?.with_padding(None);
    Ok(Box::new(reference))
}

/// The tables of a file, if we have a fast implementation for its settings.
fn fast(file: &File, ids: &HashMap<String, u32>, pieces: usize) -> Result<Option<Kind>, String> {
    if file.model.get("type").is_some_and(|kind| kind != "BPE") {
        return Ok(None);
    }
    let Ok(model) = Model::deserialize(&file.model) else { return Ok(None) };
    let is_set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    if model.dropout.is_some_and(|share| share > 0.0)
        || is_set(&model.continuing_subword_prefix)
        || is_set(&model.end_of_word_suffix)
    {
        return Ok(None);
    }
    if has_gaps(&model, &file.added_tokens) {
        return Ok(None);
    }
    let mut joins = Vec::new();
    // Merges were once kept in a file of their own that began with its version, and some JSON files retain that line.
    let is_merge = |merge: &&Merge| !matches!(merge, Merge::Line(line) if line.starts_with("#version"));
    for (rank, merge) in (0..).zip(model.merges.iter().filter(is_merge)) {
        let parts = merge.parts().and_then(|(left, right)| {
            let id = model.vocab.get(&format!("{left}{right}"))?;
            Some(((*model.vocab.get(left)?, *model.vocab.get(right)?), *id))
        });
        let (pair, id) = parts.ok_or_else(|| {
            format!("the parts of its merge {rank} are not tokens; fetch the file again from its origin")
        })?;
        joins.push((pair, rank, id));
    }
    let found: Vec<&Added> = file.added_tokens.iter().filter(|added| !added.special).collect();
    if let Some((words, nfc)) = words(file)
        && !model.byte_fallback
        && found
            .iter()
            .all(|added| !["single_word", "lstrip", "rstrip"].iter().any(|setting| added.is(setting)))
        && file.decoder.as_ref().is_some_and(|decoder| decoder["type"] == "ByteLevel")
    {
        return Ok(byte_level(&model, &file.added_tokens, words, nfc, &joins, pieces)?.map(Kind::ByteLevel));
    }
    if let Some(normalizer) = spaces(file)
        && model.byte_fallback
        && !model.ignore_merges
        && found.is_empty()
    {
        return Ok(sentencepiece(&model, &file.added_tokens, ids, normalizer, &joins, pieces));
    }
    Ok(None)
}

/// Whether the library would number added tokens differently than the file does.
fn has_gaps(model: &Model, added: &[Added]) -> bool {
    let mut added: Vec<&Added> = added.iter().collect();
    added.sort_by_key(|added| added.id);
    let mut next = model.vocab.len() as u32;
    added.into_iter().any(|added| {
        let expected = model.vocab.get(&added.content).copied().unwrap_or(next);
        next = next.max(expected + 1);
        added.id != expected
    })
}

/// How a byte-level file cuts texts into words, and whether it normalises them first. `None` for other kinds of files.
fn words(file: &File) -> Option<(PreTokenizer, bool)> {
    let nfc = match &file.normalizer {
        None => false,
        Some(normalizer) if normalizer["type"] == "NFC" => true,
        Some(_) => return None,
    };
    let pre = file.pre_tokenizer.as_ref()?;
    let bytes = |step: &Value, expression: bool| {
        step["type"] == "ByteLevel"
            && step["add_prefix_space"] == false
            && step["use_regex"].as_bool().unwrap_or(true) == expression
    };
    if bytes(pre, true) {
        return Some((PreTokenizer::GPT2, nfc));
    }
    let [split, last] = pre["pretokenizers"].as_array()?.as_slice() else { return None };
    let is_split = split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] == false;
    let words = PreTokenizer::of_expression(split["pattern"]["Regex"].as_str()?)?;
    (is_split && bytes(last, false)).then_some((words, nfc))
}

fn byte_level(
    model: &Model,
    added: &[Added],
    words: PreTokenizer,
    nfc: bool,
    joins: &[((u32, u32), u32, u32)],
    pieces: usize,
) -> Result<Option<ByteLevel>, String> {
    let characters = characters();
    let mut symbols = [0; 256];
    for (symbol, c) in symbols.iter_mut().zip(characters) {
        let Some(id) = model.vocab.get(c.encode_utf8(&mut [0; 4]) as &str) else { return Ok(None) };
        *symbol = *id;
    }
    let byte_of: HashMap<char, u8> =
        (0..=u8::MAX).map(|byte| (characters[usize::from(byte)], byte)).collect();
    let mut bytes = vec![None; pieces];
    let mut whole = HashMap::new();
    for (text, id) in model.vocab.iter().filter(|_| model.ignore_merges) {
        let spelt: Option<Vec<u8>> = text.chars().map(|c| byte_of.get(&c).copied()).collect();
        whole.extend(spelt.map(|spelt| (spelt, *id)));
    }
    // A token with any other character in it is plain text.
    let decoded = |text: &str| -> Vec<u8> {
        let spelt: Option<Vec<u8>> = text.chars().map(|c| byte_of.get(&c).copied()).collect();
        spelt.unwrap_or_else(|| text.as_bytes().to_vec())
    };
    for (text, id) in &model.vocab {
        bytes[*id as usize] = Some(decoded(text));
    }
    for token in added {
        bytes[token.id as usize] = (!token.special).then(|| decoded(&token.content));
    }
    let added = [finder(added, false)?, finder(added, true)?];
    Ok(Some(ByteLevel { words, nfc, bpe: Bpe::of_bytes(&symbols, joins), whole, added, bytes }))
}

/// The matcher for added tokens whose setting `normalized` has this value. `None` if there is nothing to match.
fn finder(added: &[Added], normalized: bool) -> Result<Option<byte_level::Added>, String> {
    let found: Vec<&Added> = added
        .iter()
        .filter(|added| added.is("normalized") == normalized && !added.content.is_empty())
        .collect();
    let ids: Vec<Option<u32>> = found.iter().map(|added| (!added.special).then_some(added.id)).collect();
    if ids.iter().all(Option::is_none) {
        return Ok(None);
    }
    let texts = found.iter().map(|added| &added.content);
    let matcher = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts);
    let matcher = matcher.map_err(|error| format!("its added tokens cannot be searched for: {error}"))?;
    Ok(Some(byte_level::Added { matcher, ids }))
}

/// How a file with a SentencePiece vocabulary treats spaces. `None` for other kinds of files.
fn spaces(file: &File) -> Option<Normalizer> {
    let steps = file.decoder.as_ref()?["decoders"].as_array()?;
    let usual = [
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let drops = match steps.strip_prefix(&usual)? {
        [] => false,
        [strip] if *strip == json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}) => true,
        _ => return None,
    };
    let replaces = |step: &Value| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == "▁"
    };
    match (&file.normalizer, &file.pre_tokenizer) {
        (Some(normalizer), None) => {
            let steps = normalizer["normalizers"].as_array();
            match steps.map_or(std::slice::from_ref(normalizer), Vec::as_slice) {
                [prepend, replace]
                    if prepend["type"] == "Prepend" && prepend["prepend"] == "▁" && replaces(replace) =>
                {
                    Some(Normalizer::of_spaces(true, false, drops))
                }
                [replace] if replaces(replace) => Some(Normalizer::of_spaces(false, false, drops)),
                _ => None,
            }
        }
        (None, Some(pre))
            if pre["type"] == "Metaspace" && pre["replacement"] == "▁" && pre["split"] == false =>
        {
            match pre["prepend_scheme"].as_str()? {
                "first" | "always" => Some(Normalizer::of_spaces(true, true, drops)),
                "never" => Some(Normalizer::of_spaces(false, false, drops)),
                _ => None,
            }
        }
        _ => None,
    }
}

fn sentencepiece(
    model: &Model,
    added: &[Added],
    ids: &HashMap<String, u32>,
    normalizer: Normalizer,
    joins: &[((u32, u32), u32, u32)],
    pieces: usize,
) -> Option<Kind> {
    let unused = Piece { text: String::new(), score: 0.0, kind: PieceType::Control };
    let mut list = vec![unused; pieces];
    for (text, id) in ids {
        let kind = if byte_of(text).is_some() { PieceType::Byte } else { PieceType::Normal };
        list[*id as usize] = Piece { text: text.clone(), score: 0.0, kind };
    }
    for added in added {
        list[added.id as usize].kind = PieceType::Control;
    }
    let vocabulary = Vocabulary::of_pieces(list).ok()?;
    let bpe = Bpe::of_merges(model.vocab.iter().map(|(text, id)| (text.as_str(), *id)), joins);
    Some(Kind::SentencePiece(SentencePiece::new(vocabulary, normalizer, bpe, Decoding::PerRun)))
}
