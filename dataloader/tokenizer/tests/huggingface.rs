//! Compares ids and texts with those of Hugging Face's own library, for all kinds of `tokenizer.json`.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use proptest::prelude::*;
use serde_json::{Value, json};
use ulmus_tokenizer::Tokenizer;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEXT: &str = "The cat's hat isn't that flat; they'll've 12345 things.\n\n    def f(x):\n\treturn  x * 2  \r\n\
                    ÉTÉ naïve 中文 \u{1F600}\u{301} e\u{301} don'T <|endoftext|> <s> 3.14 -- ... ??? https://a.b/c?d=e_f\n";

/// Spells bytes with the characters that GPT-2's code defines for them.
fn spell(bytes: &[u8]) -> String {
    let plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let spelt = |byte: u8| {
        let before = (0..byte).filter(|byte| !plain(*byte)).count() as u32;
        if plain(byte) { char::from(byte) } else { char::from_u32(256 + before).unwrap() }
    };
    bytes.iter().map(|byte| spelt(*byte)).collect()
}

/// A file whose merges are the most frequent neighbours in `TEXT`.
fn byte_level(pre_tokenizer: &Value, normalizer: &Value, ignore_merges: bool, merges: usize) -> Value {
    let mut vocab: Vec<String> = (0..=255).map(|byte| spell(&[byte])).collect();
    let mut words: Vec<Vec<String>> =
        TEXT.split_inclusive(' ').map(|word| word.bytes().map(|byte| spell(&[byte])).collect()).collect();
    let mut list = Vec::new();
    for _ in 0..merges {
        let mut counts = std::collections::BTreeMap::new();
        for word in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0].clone(), pair[1].clone())).or_insert(0) += 1;
            }
        }
        let Some(((left, right), _)) = counts.into_iter().max_by_key(|(_, count)| *count) else { break };
        for word in &mut words {
            let mut at = 0;
            while at + 1 < word.len() {
                if word[at] == left && word[at + 1] == right {
                    word[at] += &right;
                    word.remove(at + 1);
                }
                at += 1;
            }
        }
        vocab.push(format!("{left}{right}"));
        list.push(json!([left, right]));
    }
    // A token that no merges lead to.
    vocab.push(spell(b" things"));
    let mut added = vec![json!({"content": "<|endoftext|>", "special": true})];
    added.extend(["  ", "    "].map(|spaces| json!({"content": spaces, "special": false})));
    for (number, token) in added.iter_mut().enumerate() {
        token["id"] = json!(vocab.len() + number);
        for flag in ["single_word", "lstrip", "rstrip"] {
            token[flag] = json!(false);
        }
        token["normalized"] = json!(!token["special"].as_bool().unwrap());
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
            "vocab": vocab.iter().enumerate().map(|(id, text)| (text.clone(), json!(id))).collect::<serde_json::Map<_, _>>(),
            "merges": list,
        },
    })
}

fn gpt2() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})
}

fn split(expression: &str) -> Value {
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let split =
        json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    json!({"type": "Sequence", "pretokenizers": [split, bytes]})
}

/// Every kind of file, and whether we have a fast implementation for it.
fn files() -> Vec<(&'static str, Value, bool)> {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/tiny/tokenizer.model");
    let like_llama = Tokenizer::read(&std::fs::read(golden).unwrap(), golden, None, None).unwrap();
    let like_llama: Value = serde_json::from_str(&like_llama.to_json().unwrap()).unwrap();
    let metaspace = |scheme: &str| {
        let mut file = like_llama.clone();
        let pre = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
        (file["normalizer"], file["pre_tokenizer"]) = (Value::Null, pre);
        file
    };
    let digits =
        json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, gpt2()]});
    let prefix =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    vec![
        ("gpt2", byte_level(&gpt2(), &Value::Null, false, 120), true),
        ("gpt2, expression in the file", byte_level(&split(GPT2), &Value::Null, false, 120), true),
        ("llama3", byte_level(&split(LLAMA3), &Value::Null, true, 120), true),
        ("olmo", byte_level(&gpt2(), &json!({"type": "NFC"}), false, 60), true),
        ("qwen", byte_level(&split(&LLAMA3.replace("{1,3}", "")), &json!({"type": "NFC"}), false, 200), true),
        ("digits", byte_level(&digits, &Value::Null, false, 80), false),
        ("leading space", byte_level(&prefix, &Value::Null, false, 80), false),
        ("lower case", byte_level(&gpt2(), &json!({"type": "Lowercase"}), false, 80), false),
        ("llama", like_llama.clone(), true),
        ("metaspace, first", metaspace("first"), true),
        ("metaspace, never", metaspace("never"), true),
    ]
}

/// Our reader of a file, and Hugging Face's with special tokens taken as text.
fn readers(file: &Value) -> (Tokenizer, tokenizers::Tokenizer) {
    let bytes = serde_json::to_vec(file).unwrap();
    let mut theirs = tokenizers::Tokenizer::from_bytes(&bytes).unwrap();
    theirs.set_encode_special_tokens(true);
    // The LLaMA-like file does not list its control tokens as such.
    let is_listed = file["added_tokens"][0]["content"] == "<|endoftext|>";
    let ends = if is_listed { [None, None] } else { [Some("<s>"), Some("</s>")] };
    (Tokenizer::read(&bytes, "tokenizer.json", ends[0], ends[1]).unwrap(), theirs)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn ids_are_those_of_the_library(
        text in "([a-eT ]{1,5}|the|cat| things| 12345|'(s|T|ll)|[ \t\n\r\u{a0}]{1,5}|[.,!<|>_é中e\u{301}😀▁]{1,3}|<\\|endoftext\\|>|<s>){0,14}"
    ) {
        thread_local! {
            static READERS: Vec<(&'static str, Tokenizer, tokenizers::Tokenizer)> =
                files().into_iter().map(|(name, file, _)| { let (ours, theirs) = readers(&file); (name, ours, theirs) }).collect();
        }
        READERS.with(|readers| {
            for (name, ours, theirs) in readers {
                let expected = theirs.encode_fast(text.as_str(), false).unwrap();
                prop_assert_eq!(ours.encode(&text), expected.get_ids(), "{}: {:?}", name, text);
                prop_assert_eq!(ours.decode(expected.get_ids()), theirs.decode(expected.get_ids(), true).unwrap(), "{}", name);
            }
            Ok(())
        })?;
    }
}

#[test]
fn common_kinds_have_a_fast_implementation() {
    for (name, file, fast) in files() {
        let (ours, theirs) = readers(&file);
        assert_eq!(ours.is_native(), fast, "{name}");
        assert_eq!(ours.encode(TEXT), theirs.encode_fast(TEXT, false).unwrap().get_ids(), "{name}");
        assert_eq!(ours.pieces(), theirs.get_vocab_size(true), "{name}");
        if !name.contains("llama") && !name.contains("metaspace") {
            let end = theirs.token_to_id("<|endoftext|>").unwrap();
            assert_eq!(
                (ours.bos(), ours.eos(), ours.special_names().1),
                (end, end, "<|endoftext|>"),
                "{name}"
            );
            assert!(!ours.encode("a <|endoftext|> b").contains(&end), "{name}");
        }
    }
}

/// These settings and texts once gave other ids or decoded texts than the library.
#[test]
fn rare_settings_agree_with_the_library() {
    let nfc = json!({"type": "NFC"});
    let base = byte_level(&gpt2(), &nfc, false, 60);
    let added = |tokens: &[(&str, bool, bool)]| {
        let mut file = base.clone();
        let list = file["added_tokens"].as_array_mut().unwrap();
        for (content, special, normalized) in tokens {
            let id = list[0]["id"].as_u64().unwrap() + list.len() as u64;
            list.push(json!({"id": id, "content": content, "special": special, "normalized": normalized,
                "single_word": false, "lstrip": false, "rstrip": false}));
        }
        file
    };
    let mut gap = base.clone();
    gap["added_tokens"][2]["id"] = json!(2000);
    let mut no_decoder = base.clone();
    no_decoder["decoder"] = Value::Null;
    let mut twice = base.clone();
    let merges = twice["model"]["merges"].as_array_mut().unwrap();
    merges.push(merges[0].clone());
    let llama = files().into_iter().find(|(name, ..)| *name == "llama").unwrap().1;
    let mut star = llama.clone();
    let id = star["model"]["vocab"].as_object().unwrap().len();
    star["added_tokens"] = json!([{"id": id, "content": "★", "special": true, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false}]);
    for (name, file) in [
        ("matched before normalisation", added(&[("=", false, false), (">", false, true)])),
        ("two passes", added(&[("at", false, true), ("tT", false, false), ("t ", false, false)])),
        ("within a control token", added(&[("<|a|>", true, false), ("|>", false, false)])),
        ("a token of the bytes' characters", added(&[("é", false, false), ("Ġ", false, false)])),
        ("a gap in the ids", gap),
        ("no decoder", no_decoder),
        ("a merge twice", twice),
        (
            "a possessive quantifier for spaces",
            byte_level(&split(&LLAMA3.replace(r"\s+(?!", r"\s++(?!")), &nfc, false, 60),
        ),
        ("llama", llama),
        ("a control token of one character", star),
    ] {
        let (ours, theirs) = readers(&file);
        for text in [
            "=\u{338} >\u{338}",
            "that hatT t  x",
            "<|a|> |>",
            "é Ġ ★ ",
            "    a    b  \n  c",
            "a\u{5c8}\u{316}\u{301}",
            "\u{11935}\u{11930}",
        ] {
            let expected = theirs.encode_fast(text, false).unwrap();
            assert_eq!(ours.encode(text), expected.get_ids(), "{name}: {text:?}");
        }
        let mut random = 7_u32;
        for _ in 0..300 {
            let ids: Vec<u32> = (0..4)
                .map(|_| {
                    random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (random >> 8) % ours.pieces() as u32
                })
                .collect();
            assert_eq!(ours.decode(&ids), theirs.decode(&ids, true).unwrap(), "{name}: {ids:?}");
        }
    }
}

#[test]
fn words_that_are_tokens_are_taken_whole_only_where_the_file_says_so() {
    let things = |ignore_merges| {
        let (ours, theirs) = readers(&byte_level(&split(LLAMA3), &Value::Null, ignore_merges, 20));
        ours.encode("x things") == [u32::from(b'x'), theirs.token_to_id(&spell(b" things")).unwrap()]
    };
    assert!(things(true) && !things(false));
}

#[test]
fn mistakes_name_what_to_write() {
    let mut nameless = byte_level(&gpt2(), &Value::Null, false, 5);
    nameless["added_tokens"][0]["content"] = json!("<|border|>");
    let mut broken = byte_level(&gpt2(), &Value::Null, false, 5);
    broken["model"]["merges"][2] = json!("x nothing");
    // The file falls back to bytes but lacks some of them, and has no unknown token.
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/tiny/tokenizer.json");
    let mut holed: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let pieces = holed["model"]["vocab"].as_object_mut().unwrap();
    for (piece, other) in [("<unk>", "<other>"), ("<0xC3>", "<0xXX>")] {
        let id = pieces.remove(piece).unwrap();
        pieces.insert(other.to_owned(), id);
    }
    for (file, eos, words) in [
        (json!({"a": 1}), None, "not a tokenizer.json"),
        (holed, None, "it cannot encode every text"),
        (nameless.clone(), None, "write its name as tokenizer.eos"),
        (nameless.clone(), Some("<|edge|>"), "no token \"<|edge|>\"; correct tokenizer.eos"),
        (broken, None, "the parts of its merge 2 are not tokens"),
    ] {
        let bytes = serde_json::to_vec(&file).unwrap();
        let message = Tokenizer::read(&bytes, "x.json", None, eos).unwrap_err().to_string();
        assert!(message.contains(words) && message.contains("x.json"), "{message}");
    }
    let bytes = serde_json::to_vec(&nameless).unwrap();
    assert!(Tokenizer::read(&bytes, "x.json", None, Some("<|border|>")).is_ok());
}
