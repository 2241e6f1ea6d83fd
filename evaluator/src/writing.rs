//! Turns what a model generates into text.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ulmus_backend::Backend;
use ulmus_model::{Generator, Model};
use ulmus_tokenizer::Tokenizer;

use crate::error::EvaluatorError;

/// The beginning of a text, and how a model continued it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continuation {
    /// The beginning of the text.
    pub prompt: String,
    /// The model's greedy continuation.
    pub text: String,
}

/// Continues the first `prompt_tokens` tokens of each text greedily, by up to `max_tokens` tokens.
///
/// # Errors
/// When there is no memory for a text of that length.
pub fn continuations<B: Backend>(
    model: &Arc<Model<B>>,
    tokenizer: &Tokenizer,
    texts: &[String],
    prompt_tokens: usize,
    max_tokens: usize,
) -> Result<Vec<Continuation>, EvaluatorError> {
    let mut generator = Generator::new(Arc::clone(model), 1 + prompt_tokens + max_tokens)?;
    let write = |text: &String| {
        let mut prompt = tokenizer.encode(text);
        prompt.truncate(prompt_tokens);
        let mut written = Vec::new();
        let begun: Vec<u32> = std::iter::once(tokenizer.bos()).chain(prompt.iter().copied()).collect();
        generator.reset();
        generator.generate(&begun, max_tokens, Some(tokenizer.eos()), |token| {
            written.push(token);
            ControlFlow::Continue(())
        })?;
        // Prompt and continuation are decoded together, because a piece's leading blank is dropped at the beginning of a
        // text only. Text of the prompt that depends on what follows belongs to the continuation.
        let prompt_text = tokenizer.decode_settled(&prompt);
        let whole = tokenizer.decode(&[prompt, written].concat());
        let text = whole.get(prompt_text.len()..).unwrap_or_default().to_owned();
        Ok(Continuation { prompt: prompt_text, text })
    };
    texts.iter().map(write).collect()
}

/// Decodes tokens into text while they arrive.
///
/// The text of a token may depend on the tokens after it: a character may consist of several tokens, and some tokenizers
/// decode runs of bytes together. So text is returned only once later tokens cannot change it, and everything returned
/// adds up to the text of all tokens decoded together.
#[derive(Debug)]
pub struct Transcript<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    /// Bytes of the text that were returned already.
    returned: usize,
}

impl<'a> Transcript<'a> {
    /// A transcript of what follows `prompt`. The text of the prompt itself is not returned, except for its pending end.
    pub fn after(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        Self { tokenizer, tokens: prompt.to_vec(), returned: tokenizer.decode_settled(prompt).len() }
    }

    /// The end of the text so far that later tokens may still change. It is returned once it is settled.
    pub fn pending(&self) -> String {
        self.tokenizer.decode(&self.tokens).get(self.returned..).unwrap_or_default().to_owned()
    }

    /// Adds a token, and returns the text that has become settled.
    pub fn push(&mut self, token: u32) -> String {
        self.tokens.push(token);
        let settled = self.tokenizer.decode_settled(&self.tokens);
        let new = settled.get(self.returned..).unwrap_or_default().to_owned();
        self.returned += new.len();
        new
    }

    /// Returns the rest of the text, whether or not its last character is complete.
    pub fn finish(self) -> String {
        self.pending()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use serde_json::{Value, json};
    use ulmus_cpu::Cpu;

    use super::*;
    use crate::{LoadedModel, load_model, load_tokenizer};

    fn tiny() -> (LoadedModel<Cpu>, Tokenizer) {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny");
        let model = load_model(&directory, Cpu::new(1), ulmus_model::WeightFormat::F32).unwrap();
        let tokenizer = load_tokenizer(&directory, &model).unwrap();
        (model, tokenizer)
    }

    /// The tokenizer of a `tokenizer.json` after `change`.
    fn changed(base: &Value, change: impl FnOnce(&mut Value)) -> Tokenizer {
        let mut file = base.clone();
        change(&mut file);
        Tokenizer::read(file.to_string().as_bytes(), "tokenizer.json", Some("<s>"), Some("</s>")).unwrap()
    }

    /// Decoders of every kind: some only append, some look back for bytes, and one looks back for anything.
    fn decoders() -> Vec<(&'static str, Tokenizer)> {
        let (_, own) = tiny();
        let llama: Value = serde_json::from_str(&own.to_json().unwrap()).unwrap();
        let listed = llama["model"]["vocab"].as_object().unwrap().len();
        // Our own decoder does not handle tokens that are matched in texts, so such a file goes through the library.
        let through_library = |file: &mut Value| {
            file["added_tokens"] = json!([{ "id": listed, "content": "<found>", "special": false, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false }]);
        };
        let decoder = |decoder: Value| {
            changed(&llama, |file| {
                through_library(file);
                file["decoder"] = decoder;
            })
        };
        let bytes = json!({"type": "ByteFallback"});
        let (fuse, blanks) = (
            json!({"type": "Fuse"}),
            json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        );
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let late = json!({"type": "Replace", "pattern": {"String": "e"}, "content": "three"});
        let sequence = |steps: &[&Value]| decoder(json!({"type": "Sequence", "decoders": steps}));
        vec![
            ("each byte by itself", own),
            ("rows of bytes", changed(&llama, |_| ())),
            (
                "rows of bytes, no blank dropped",
                changed(&llama, |file| {
                    file["normalizer"] = blanks_of_gemma();
                    file["decoder"] = json!({"type": "Sequence", "decoders": [&blanks, &bytes, &fuse]});
                }),
            ),
            ("rows of bytes, by the library", changed(&llama, through_library)),
            ("rows of bytes, tokens apart", sequence(&[&bytes, &blanks])),
            ("no bytes", sequence(&[&blanks, &fuse, &strip])),
            (
                "bytes of characters",
                decoder(
                    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
                ),
            ),
            ("words", decoder(json!({"type": "WordPiece", "prefix": "##", "cleanup": true}))),
            ("ends of words", decoder(json!({"type": "BPEDecoder", "suffix": "e"}))),
            (
                "blanks",
                decoder(
                    json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}),
                ),
            ),
            ("no decoder", decoder(Value::Null)),
            ("anything", sequence(&[&bytes, &fuse, &late])),
        ]
    }

    fn blanks_of_gemma() -> Value {
        json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"})
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        /// The tokens 3 to 258 are single bytes, and most of the tokens that are tried.
        #[test]
        fn what_is_shown_is_never_taken_back_and_nothing_is_lost(
            tokens in prop::collection::vec(
                prop_oneof![4 => 3_u32..259, 3 => 259_u32..520, 1 => 0_u32..3, 3 => prop::sample::select(
                    vec![3 + 0x0a, 3 + 0x41, 3 + 0xe2, 3 + 0x82, 3 + 0xac, 3 + 0xf0, 3 + 0x9f, 3 + 0x98, 3 + 0x80]
                )],
                0..24,
            ),
            prompt in 0_usize..24,
        ) {
            thread_local! { static DECODERS: Vec<(&'static str, Tokenizer)> = decoders(); }
            DECODERS.with(|decoders| {
                for (kind, tokenizer) in decoders {
                    let (prompt, written) = tokens.split_at(prompt.min(tokens.len()));
                    let whole = tokenizer.decode(&tokens);
                    let mut transcript = Transcript::after(tokenizer, prompt);
                    let begun = tokenizer.decode(prompt);
                    let pending = transcript.pending();
                    prop_assert!(begun.ends_with(&pending), "{}", kind);
                    let mut shown = begun[..begun.len() - pending.len()].to_owned();
                    prop_assert!(whole.starts_with(&shown), "{}: {:?} of {:?}", kind, shown, whole);
                    for token in written {
                        shown += &transcript.push(*token);
                        prop_assert!(whole.starts_with(&shown), "{}: {:?} of {:?}", kind, shown, whole);
                    }
                    shown += &transcript.finish();
                    prop_assert_eq!(shown, whole, "{}", kind);
                }
                Ok(())
            })?;
        }
    }

    #[test]
    fn a_byte_that_does_not_continue_a_character_loses_nothing() {
        let (_, tokenizer) = decoders().swap_remove(1);
        let word = |text: &str| tokenizer.encode(text)[0];
        let byte = |byte: u32| 3 + byte;
        let (a, b) = (word("the"), word("on"));
        let after = |tokens: &[u32]| {
            let mut transcript = Transcript::after(&tokenizer, &[]);
            let given: Vec<String> = tokens.iter().map(|token| transcript.push(*token)).collect();
            (given, transcript.finish())
        };
        let tokens = [a, byte(0x0a), byte(0xe2), b, byte(0x82), a];
        let (given, rest) = after(&tokens);
        // A run of bytes waits for its end, and the words after it are returned at once.
        assert_eq!(given[1..3], ["", ""]);
        assert!(given[3].starts_with("\u{fffd}\u{fffd}") && given[3].len() > 6, "{given:?}");
        assert_eq!(given.concat() + &rest, tokenizer.decode(&tokens));
        // A whole character is returned as soon as something else follows, or the text ends.
        let (given, rest) = after(&[byte(0xe2), byte(0x82), byte(0xac)]);
        assert_eq!((given.concat().as_str(), rest.as_str()), ("", "\u{20ac}"));
    }

    #[test]
    fn text_that_comes_in_tokens_adds_up_and_never_breaks_a_character() {
        let (_, tokenizer) = tiny();
        let text = "The \u{1f333} of S\u{e3}o Paulo, \u{6811}";
        let tokens = tokenizer.encode(text);
        for prompt in 0..tokens.len() {
            let mut transcript = Transcript::after(&tokenizer, &tokens[..prompt]);
            let given: Vec<String> = tokens[prompt..].iter().map(|token| transcript.push(*token)).collect();
            let rest = transcript.finish();
            let begun = tokenizer.decode(&tokens[..prompt]);
            if !begun.ends_with(char::REPLACEMENT_CHARACTER) {
                assert_eq!(format!("{begun}{}{rest}", given.concat()), text);
                assert!(given.iter().all(|part| !part.contains(char::REPLACEMENT_CHARACTER)));
            }
        }
    }

    #[test]
    fn continuations_begin_where_the_prompt_ends_and_repeat_exactly() {
        let (model, tokenizer) = tiny();
        let texts = ["The old teacher counts an iron pot at the market.".to_owned(), "x".to_owned()];
        let write = |max| continuations(&model.model, &tokenizer, &texts, 6, max).unwrap();
        let [long, short] = [write(24), write(8)];
        assert_eq!(long, write(24));
        assert!(texts[0].starts_with(&long[0].prompt));
        assert_eq!(long[1].prompt, "x");
        assert!(long[0].text.starts_with(short[0].text.trim_end_matches(char::REPLACEMENT_CHARACTER)));
        assert_eq!(write(0)[0].text, "");
    }
}
