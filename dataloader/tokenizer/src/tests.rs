//! Tests the tokenizer against a plain implementation of SentencePiece's rules.

use std::collections::HashMap;

use proptest::prelude::*;
use prost::Message;

use super::model::{ModelProto, ModelType, NormalizerProto, PieceProto, PieceType, TrainerProto};
use super::*;

/// A description of a model, from which its file can be made.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "the format has these switches")]
struct Model {
    /// The pieces that follow the special ones and, if there is a byte fallback, the byte pieces.
    pieces: Vec<(String, f32, PieceType)>,
    byte_fallback: bool,
    prefix: bool,
    suffix: bool,
    remove_extra: bool,
    escape: bool,
}

fn plain(pieces: &[(&str, f32)]) -> Model {
    let pieces = pieces.iter().map(|(text, score)| ((*text).to_owned(), *score, PieceType::Normal));
    Model {
        pieces: pieces.collect(),
        byte_fallback: true,
        prefix: true,
        suffix: false,
        remove_extra: false,
        escape: true,
    }
}

impl Model {
    fn all_pieces(&self) -> Vec<(String, f32, PieceType)> {
        let special = [
            ("<unk>".to_owned(), 0.0, PieceType::Unknown),
            ("<s>".to_owned(), 0.0, PieceType::Control),
            ("</s>".to_owned(), 0.0, PieceType::Control),
        ];
        let bytes = (0..256).map(|byte| (format!("<0x{byte:02X}>"), 0.0, PieceType::Byte));
        let bytes = bytes.filter(|_| self.byte_fallback);
        special.into_iter().chain(bytes).chain(self.pieces.clone()).collect()
    }

    fn proto(&self) -> ModelProto {
        let pieces = self.all_pieces().into_iter().map(|(text, score, kind)| PieceProto {
            text: Some(text),
            score: Some(score),
            kind: Some(kind as i32),
        });
        let trainer = TrainerProto {
            model_type: Some(ModelType::Bpe as i32),
            byte_fallback: Some(self.byte_fallback),
            treat_whitespace_as_suffix: Some(self.suffix),
            ..TrainerProto::default()
        };
        let normalizer = NormalizerProto {
            add_dummy_prefix: Some(self.prefix || self.suffix),
            remove_extra_whitespaces: Some(self.remove_extra),
            escape_whitespaces: Some(self.escape),
            ..NormalizerProto::default()
        };
        ModelProto {
            pieces: pieces.collect(),
            trainer: Some(trainer),
            normalizer: Some(normalizer),
            denormalizer: None,
        }
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::read(&self.proto().encode_to_vec(), "test", None, None).unwrap()
    }

    /// The text in the form in which pieces are written.
    fn normalised(&self, text: &str) -> String {
        let mut text = text.to_owned();
        let defined: Vec<&str> = self.of_kind(PieceType::UserDefined);
        if self.remove_extra {
            assert!(
                !defined.iter().any(|piece| piece.contains(' ')),
                "the rule below does not handle such pieces"
            );
            text = text.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
        }
        if text.is_empty() {
            return text;
        }
        let text =
            format!("{}{text}{}", if self.prefix { " " } else { "" }, if self.suffix { " " } else { "" });
        if self.escape { text.replace(' ', "▁") } else { text }
    }

    fn of_kind(&self, kind: PieceType) -> Vec<&str> {
        self.pieces.iter().filter(|piece| piece.2 == kind).map(|piece| piece.0.as_str()).collect()
    }

    /// Encodes by joining strings, one pair at a time.
    fn reference(&self, text: &str) -> Vec<u32> {
        let all = self.all_pieces();
        let id = |text: &str| all.iter().position(|piece| piece.0 == text).map(|id| id as u32);
        let known: HashMap<&str, (f32, PieceType)> =
            self.pieces.iter().map(|(text, score, kind)| (text.as_str(), (*score, *kind))).collect();
        let text = self.normalised(text);
        let mut symbols: Vec<(String, bool)> = Vec::new();
        let mut rest = text.as_str();
        while let Some(c) = rest.chars().next() {
            let defined = self.of_kind(PieceType::UserDefined);
            let found =
                defined.iter().filter(|piece| rest.starts_with(**piece)).max_by_key(|piece| piece.len());
            let length = found.map_or(c.len_utf8(), |piece| piece.len());
            symbols.push((rest[..length].to_owned(), found.is_some()));
            rest = &rest[length..];
        }
        let mut parts: HashMap<String, (String, String)> = HashMap::new();
        let mut meet = |symbols: &[(String, bool)], at: usize| {
            if let Some([(left, false), (right, false)]) = symbols.get(at..at + 2)
                && known
                    .get(format!("{left}{right}").as_str())
                    .is_some_and(|piece| piece.1 == PieceType::Unused)
            {
                parts.insert(format!("{left}{right}"), (left.clone(), right.clone()));
            }
        };
        (0..symbols.len()).for_each(|at| meet(&symbols, at));
        loop {
            let mut best: Option<(f32, usize)> = None;
            for (at, pair) in symbols.windows(2).enumerate() {
                let [(left, false), (right, false)] = pair else { continue };
                if let Some((score, _)) = known.get(format!("{left}{right}").as_str())
                    && best.is_none_or(|(most, _)| *score > most)
                {
                    best = Some((*score, at));
                }
            }
            let Some((_, at)) = best else { break };
            let (right, _) = symbols.remove(at + 1);
            symbols[at].0.push_str(&right);
            if at > 0 {
                meet(&symbols, at - 1);
            }
            meet(&symbols, at);
        }
        let mut ids = Vec::new();
        let mut stack: Vec<String> = symbols.into_iter().rev().map(|(symbol, _)| symbol).collect();
        let mut after_unknown = false;
        while let Some(symbol) = stack.pop() {
            if let Some((left, right)) = parts.get(&symbol) {
                stack.extend([right.clone(), left.clone()]);
                continue;
            }
            // An unused piece that is a single character has no parts, so it is unknown.
            let is_unused = known.get(symbol.as_str()).is_some_and(|piece| piece.1 == PieceType::Unused);
            let found = id(&symbol).filter(|_| !is_unused);
            match found {
                Some(id) => ids.push(id),
                None if self.byte_fallback => {
                    ids.extend(symbol.bytes().map(|byte| id(&format!("<0x{byte:02X}>")).unwrap()));
                }
                None if after_unknown => {}
                None => ids.push(0),
            }
            after_unknown = found.is_none();
        }
        ids
    }
}

fn words(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let Kind::SentencePiece(SentencePiece { vocabulary: Vocabulary { pieces, .. }, .. }) = &tokenizer.0.kind
    else {
        panic!("these tests only make SentencePiece models")
    };
    tokenizer.encode(text).iter().map(|id| pieces[*id as usize].text.clone()).collect()
}

#[test]
fn equal_scores_join_leftmost_first() {
    let spaces: Vec<(String, f32)> = (2..=5).map(|n| ("▁".repeat(n), -1e9)).collect();
    let mut pieces: Vec<(&str, f32)> = spaces.iter().map(|(text, score)| (text.as_str(), *score)).collect();
    pieces.extend([("▁", -2e9), ("a", -2e9)]);
    // There are seven spaces with the prefix: the leftmost run grows until no longer run is a piece.
    assert_eq!(words(&plain(&pieces).tokenizer(), "      a"), ["▁▁▁▁▁", "▁▁", "a"]);
}

#[test]
fn a_character_that_is_no_piece_is_joined_or_falls_back() {
    let tokenizer = plain(&[("xé", -1.0), ("x", -2.0), ("▁", -3.0)]).tokenizer();
    assert_eq!(words(&tokenizer, "xé"), ["▁", "xé"]);
    assert_eq!(words(&tokenizer, "éx"), ["▁", "<0xC3>", "<0xA9>", "x"]);
    assert_eq!(tokenizer.decode(&tokenizer.encode("éx ü")), "éx ü");
}

#[test]
fn several_unknown_characters_are_one() {
    let model = Model { byte_fallback: false, ..plain(&[("x", -2.0), ("▁", -3.0)]) };
    let tokenizer = model.tokenizer();
    let mut encoder = tokenizer.encoder();
    // The second round finds the words in the cache. Ids that are in the vector already must not matter.
    for _ in 0..2 {
        let mut ids = vec![0];
        encoder.encode("xéüx é", &mut ids);
        assert_eq!(ids, [0, 4, 3, 0, 3, 4, 0]);
    }
    assert_eq!(tokenizer.decode(&tokenizer.encode("xéü")), "x \u{2047} ");
}

#[test]
fn every_wrong_byte_is_shown() {
    let tokenizer = plain(&[("x", -2.0), ("▁", -3.0)]).tokenizer();
    let byte = |byte: u32| 3 + byte;
    let ids = [byte(0xE2), byte(0x96), 259, byte(0xC3), byte(0xA9), byte(0xFF)];
    assert_eq!(tokenizer.decode(&ids), "\u{FFFD}\u{FFFD}xé\u{FFFD}");
    // A control piece ends a run of bytes.
    assert_eq!(tokenizer.decode(&[byte(0xC3), tokenizer.eos(), byte(0xA9)]), "\u{FFFD}\u{FFFD}");
}

/// Both files were made by Google's trainer, and the reference library reads the second.
#[test]
fn ids_equal_those_of_the_reference() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/tiny/tokenizer");
    let model = std::fs::read(format!("{golden}.model")).unwrap();
    let tokenizer = Tokenizer::read(&model, golden, None, None).unwrap();
    // As added tokens, control pieces would be matched in texts, so they are removed there.
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(format!("{golden}.json")).unwrap()).unwrap();
    json["added_tokens"] = serde_json::json!([]);
    let reference = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
    let odd = "<s> </s>   \t naïve 日本 \u{1F600}\r\n====== 12345 \u{2581}x";
    for text in include_str!("bpe.rs").lines().chain([odd, "", " "]) {
        assert_eq!(tokenizer.encode(text), reference.encode(text, false).unwrap().get_ids(), "{text:?}");
    }
}

#[test]
fn what_is_not_supported_is_refused() {
    let unigram = {
        let mut model = plain(&[("a", 0.0)]).proto();
        model.trainer = None;
        model
    };
    let incomplete = {
        let mut model = plain(&[]).proto();
        model.pieces.remove(10);
        model
    };
    let no_end = {
        let mut model = plain(&[]).proto();
        model.trainer.as_mut().unwrap().eos_id = Some(-1);
        model
    };
    let denormalised = {
        let mut model = plain(&[]).proto();
        model.denormalizer = Some(NormalizerProto { charsmap: Some(vec![1]), ..NormalizerProto::default() });
        model
    };
    for (bytes, word) in [
        (denormalised.encode_to_vec(), "denormaliser"),
        (b"not a model".to_vec(), "SentencePiece"),
        (Vec::new(), "no pieces"),
        (unigram.encode_to_vec(), "BPE"),
        (incomplete.encode_to_vec(), "all 256 byte pieces"),
        (no_end.encode_to_vec(), "write the name as tokenizer.eos"),
    ] {
        let message = Tokenizer::read(&bytes, "x.model", None, None).unwrap_err().to_string();
        assert!(message.contains(word) && message.contains("x.model"), "{message}");
    }
}

/// Characters that may be pieces, spaces, and characters that are in no piece.
const LETTERS: [char; 8] = ['a', 'b', 'é', '\u{1F600}', ' ', ' ', '日', 'X'];

/// Models with few letters, so that pairs and equal scores are frequent.
fn models() -> impl Strategy<Value = Model> {
    let kind = prop_oneof![
        12 => Just(PieceType::Normal),
        1 => Just(PieceType::UserDefined),
        1 => Just(PieceType::Unused),
    ];
    let piece = (prop::collection::vec(0..5_usize, 1..5), 1..5_u8, kind);
    let flags = prop::collection::vec(any::<bool>(), 6);
    (prop::collection::vec(piece, 1..25), flags).prop_map(|(pieces, flags)| {
        let mut model = Model {
            pieces: Vec::new(),
            byte_fallback: flags[0],
            prefix: flags[1] && !flags[2],
            suffix: flags[1] && flags[2],
            remove_extra: flags[3],
            escape: flags[4],
        };
        let space = if model.escape { SPACE_MARK } else { ' ' };
        let mut add = |text: String, score: f32, kind: PieceType| {
            if model.pieces.iter().all(|piece| piece.0 != text) {
                model.pieces.push((text, score, kind));
            }
        };
        for (letters, score, kind) in pieces {
            let letters: Vec<char> = letters.into_iter().map(|index| LETTERS[index]).collect();
            // A user-defined piece with a space in it would count as a space where extra spaces are removed.
            if kind == PieceType::UserDefined && letters.contains(&' ') {
                continue;
            }
            // Often all pieces are ordinary, so that the fast path is tested, too.
            let kind = if flags[5] { kind } else { PieceType::Normal };
            let text = letters.into_iter().map(|c| if c == ' ' { space } else { c }).collect();
            add(text, -f32::from(score), kind);
        }
        model
    })
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    let text = prop::collection::vec(0..LETTERS.len(), 0..80)
        .prop_map(|letters| letters.into_iter().map(|index| LETTERS[index]).collect());
    prop::collection::vec(text, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_model_encodes_any_text_by_the_rules(model in models(), texts in texts()) {
        let tokenizer = model.tokenizer();
        let mut encoder = tokenizer.encoder();
        for text in texts.iter().chain(&texts) {
            let mut ids = Vec::new();
            encoder.encode(text, &mut ids);
            prop_assert_eq!(ids, model.reference(text), "{:?}", text);
        }
    }
}
