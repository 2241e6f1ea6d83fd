//! Trains a tokenizer on a sample of text. The same sample gives the same file, on any number of threads.
//!
//! The crate `tokenizers` finds the merges. What counts as a word, and so what a piece may span, is decided here by the
//! rules of `LLaMA`: spaces only begin a piece, each digit is a piece of its own, letters and symbols do not mix, and
//! line ends and rare characters fall back to bytes.

use std::collections::BTreeMap;

use prost::Message;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::tokenizer::Trainer;

use super::Tokenizer;
use super::model::{ModelProto, ModelType, NormalizerProto, PieceProto, PieceType, TrainerProto};
use super::vocabulary::SPACE_MARK;
use crate::TokenizerError;

/// Share of all characters in the sample that have pieces of their own. The rest falls back to bytes.
const CHARACTER_COVERAGE: f64 = 0.9995;

/// Maximum length of a piece in characters.
const LONGEST_PIECE: usize = 16;

/// The names of BOS and EOS in a tokenizer that was trained here.
pub const TRAINED_NAMES: (&str, &str) = ("<s>", "</s>");

/// The unknown piece, BOS and EOS.
const SPECIALS: [&str; 3] = ["<unk>", TRAINED_NAMES.0, TRAINED_NAMES.1];

/// Trains a tokenizer of exactly `pieces` pieces on `documents`.
///
/// # Errors
/// When the sample is too small or too uniform for that many pieces.
pub fn train(documents: &[String], pieces: usize) -> Result<Tokenizer, TokenizerError> {
    let refuse = |reason: String| TokenizerError::Unusable { what: "the training sample".to_owned(), reason };
    let base = SPECIALS.len() + 256;
    let alphabet = alphabet(documents, pieces.saturating_sub(base) / 2);
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(pieces)
        .min_frequency(2)
        .max_token_length(Some(LONGEST_PIECE))
        .special_tokens(specials_and_bytes().map(|text| AddedToken::from(text, true)).collect())
        .initial_alphabet(alphabet.keys().copied().collect())
        .build();
    let mut model = BPE::default();
    trainer
        .feed(documents.iter(), |document| Ok(words(document, &alphabet)))
        .and_then(|()| trainer.train(&mut model))
        .map_err(|error| refuse(format!("training failed: {error}")))?;

    let mut trained: Vec<(u32, String)> =
        model.get_vocab().into_iter().map(|(text, id)| (id, text)).collect();
    trained.sort_unstable();
    if trained.len() != pieces {
        return Err(TokenizerError::FewPieces { found: trained.len(), wanted: pieces });
    }
    // As in models that SentencePiece itself trains, merged pieces come first, in order, and single characters last.
    let (characters, merged): (Vec<_>, Vec<_>) =
        trained.into_iter().skip(base).map(|(_, text)| text).partition(|text| text.chars().count() == 1);
    Tokenizer::read(
        &model_bytes(merged.into_iter().chain(characters), pieces),
        "the trained tokenizer",
        None,
        None,
    )
}

/// The pieces that every tokenizer begins with.
fn specials_and_bytes() -> impl Iterator<Item = String> {
    SPECIALS.into_iter().map(str::to_owned).chain((0..256).map(|byte| format!("<0x{byte:02X}>")))
}

fn model_bytes(normal: impl Iterator<Item = String>, pieces: usize) -> Vec<u8> {
    let kinds = [PieceType::Unknown, PieceType::Control, PieceType::Control].into_iter();
    let kinds = kinds.chain(std::iter::repeat(PieceType::Byte));
    let special = specials_and_bytes().zip(kinds).map(|(text, kind)| (text, 0.0, kind));
    let normal = (0_u32..).zip(normal).map(|(rank, text)| (text, -(rank as f32), PieceType::Normal));
    let trainer = TrainerProto {
        model_type: Some(ModelType::Bpe as i32),
        vocab_size: Some(pieces as i32),
        character_coverage: Some(CHARACTER_COVERAGE as f32),
        max_piece_length: Some(LONGEST_PIECE as i32),
        split_digits: Some(true),
        allow_whitespace_only_pieces: Some(true),
        byte_fallback: Some(true),
        unk_id: Some(0),
        bos_id: Some(1),
        eos_id: Some(2),
        pad_id: Some(-1),
        ..TrainerProto::default()
    };
    let normalizer = NormalizerProto {
        name: Some("identity".to_owned()),
        charsmap: Some(Vec::new()),
        add_dummy_prefix: Some(true),
        remove_extra_whitespaces: Some(false),
        escape_whitespaces: Some(true),
    };
    let pieces = special
        .chain(normal)
        .map(|(text, score, kind)| PieceProto {
            text: Some(text),
            score: Some(score),
            kind: Some(kind as i32),
        })
        .collect();
    ModelProto { pieces, trainer: Some(trainer), normalizer: Some(normalizer), denormalizer: None }
        .encode_to_vec()
}

/// The class of a character, for cutting words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Space,
    Letter,
    Digit,
    Sign,
    /// Not in the alphabet, so it falls back to bytes.
    Rare,
}

impl Class {
    fn of(c: char) -> Self {
        match c {
            SPACE_MARK | ' ' => Self::Space,
            c if c.is_control() => Self::Rare,
            c if c.is_numeric() => Self::Digit,
            c if c.is_alphabetic() => Self::Letter,
            _ => Self::Sign,
        }
    }
}

/// The most frequent characters, until they reach the coverage or `limit`. [`SPACE_MARK`] is always included.
fn alphabet(documents: &[String], limit: usize) -> BTreeMap<char, Class> {
    let mut counts = BTreeMap::<char, u64>::new();
    for c in documents.iter().flat_map(|document| document.chars()) {
        *counts.entry(c).or_default() += 1;
    }
    counts.retain(|c, _| !matches!(Class::of(*c), Class::Rare | Class::Space));
    let wanted = (counts.values().sum::<u64>() as f64 * CHARACTER_COVERAGE).ceil() as u64;
    let mut by_count: Vec<(char, u64)> = counts.into_iter().collect();
    by_count.sort_by_key(|(c, count)| (std::cmp::Reverse(*count), *c));
    let mut covered = 0;
    let frequent = by_count.into_iter().take(limit).take_while(|(_, count)| {
        let more = covered < wanted;
        covered += count;
        more
    });
    frequent.map(|(c, _)| (c, Class::of(c))).chain([(SPACE_MARK, Class::Space)]).collect()
}

/// The words of a document, within which characters may be merged: `▁▁▁`, `▁word`, `word`, `▁->`.
///
/// The last space of a run belongs to the word that follows. Single characters are left out, because there is nothing
/// to merge.
fn words(document: &str, alphabet: &BTreeMap<char, Class>) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut class = Class::Space;
    let mut finish = |word: &mut String| {
        if word.chars().nth(1).is_some() {
            words.push(std::mem::take(word));
        }
        word.clear();
    };
    for c in [SPACE_MARK].into_iter().chain(document.chars().map(|c| if c == ' ' { SPACE_MARK } else { c })) {
        let next = alphabet.get(&c).copied().unwrap_or(Class::Rare);
        let joins = match (class, next) {
            (Class::Space, Class::Letter | Class::Sign) if word.ends_with(SPACE_MARK) => {
                word.pop();
                finish(&mut word);
                word.push(SPACE_MARK);
                true
            }
            (before, after) => before == after && matches!(after, Class::Space | Class::Letter | Class::Sign),
        };
        if !joins {
            finish(&mut word);
        }
        if next != Class::Rare {
            word.push(c);
        }
        class = next;
    }
    finish(&mut word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<String> {
        let sources = [include_str!("lib.rs"), include_str!("train.rs"), include_str!("bpe.rs")];
        sources.iter().flat_map(|text| text.split("\n\n")).map(str::to_owned).collect()
    }

    #[test]
    fn words_are_cut_as_llama_does() {
        let text = "let x2 = a->b;   don't\n  é end";
        let words = words(text, &alphabet(&[text.to_owned()], 1000));
        assert_eq!(words, ["▁let", "▁x", "▁=", "▁a", "->", "▁▁", "▁don", "▁é", "▁end"]);
    }

    #[test]
    fn the_same_sample_gives_the_same_files() {
        let (first, second) = (train(&sample(), 700).unwrap(), train(&sample(), 700).unwrap());
        assert_eq!(first.file(), second.file());
        assert_eq!(first.to_json(), second.to_json());
        assert_eq!((first.pieces(), first.pad(), first.bos(), first.eos()), (700, 700, 1, 2));
    }

    #[test]
    fn no_piece_spans_two_words() {
        let tokenizer = train(&sample(), 700).unwrap();
        for text in tokenizer.normal_texts() {
            assert!(!text.trim_start_matches(SPACE_MARK).contains(SPACE_MARK), "{text:?}");
            assert!(text.chars().count() == 1 || !text.contains(char::is_numeric), "{text:?}");
            assert!(!text.contains('\n'), "{text:?}");
        }
    }

    #[test]
    fn both_files_give_the_same_ids() {
        let tokenizer = train(&sample(), 700).unwrap();
        let reference = tokenizers::Tokenizer::from_bytes(tokenizer.to_json().unwrap()).unwrap();
        let odd =
            ["", " ", "<s> is no control </s><unk>", "  ======= ---  \t\n", "日本 café \u{1F600}", "▁x"];
        for text in sample().iter().map(String::as_str).chain(odd) {
            let expected = reference.encode(text, false).unwrap();
            assert_eq!(tokenizer.encode(text), expected.get_ids(), "{text:?}");
            assert_eq!(tokenizer.decode(&tokenizer.encode(text)), text.replace(SPACE_MARK, " "));
        }
    }

    #[test]
    fn a_sample_that_is_too_small_says_what_it_gives() {
        let message = train(&["too small".to_owned()], 1000).unwrap_err().to_string();
        assert!(message.contains("set tokenizer.pieces to at most 26"), "{message}");
    }
}
