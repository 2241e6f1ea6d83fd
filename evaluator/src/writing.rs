//! What a model writes.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ulmus_dataloader::Tokenizer;
use ulmus_model::{Backend, Generator, Model};

use crate::error::EvaluatorError;

/// The beginning of a text, and how a model went on from there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continuation {
    /// The beginning.
    pub prompt: String,
    /// What the model wrote, by taking the likeliest token every time.
    pub text: String,
}

/// Continues the first `prompt_tokens` tokens of each text by up to `max_tokens`, greedily.
///
/// # Errors
/// When the model has no memory for a text of that length.
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
        // Decoded together, because a piece's leading blank is text in the middle and not at the beginning.
        let prompt_text = tokenizer.decode(&prompt);
        let whole = tokenizer.decode(&[prompt, written].concat());
        let text = whole.strip_prefix(&prompt_text).unwrap_or(&whole).to_owned();
        Ok(Continuation { prompt: prompt_text, text })
    };
    texts.iter().map(write).collect()
}

/// Turns tokens into text as they come.
///
/// A character may consist of several tokens (one for each byte), so text is given out only up to the last
/// character that is complete.
#[derive(Debug)]
pub struct Transcript<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    given: usize,
}

impl<'a> Transcript<'a> {
    /// A transcript of what follows `prompt`, which is not given out itself.
    pub fn after(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        Self { tokenizer, tokens: prompt.to_vec(), given: tokenizer.decode(prompt).len() }
    }

    /// Adds a token; answers the text that is new.
    pub fn push(&mut self, token: u32) -> String {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens);
        let complete = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        self.give(&text[..complete])
    }

    /// The rest, complete or not.
    pub fn finish(mut self) -> String {
        let text = self.tokenizer.decode(&self.tokens);
        self.give(&text)
    }

    fn give(&mut self, text: &str) -> String {
        let new = text.get(self.given..).unwrap_or_default().to_owned();
        self.given += new.len();
        new
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ulmus_model::Cpu;

    use super::*;
    use crate::{LoadedModel, load_model, load_tokenizer};

    fn tiny() -> (LoadedModel<Cpu>, Tokenizer) {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny");
        let model = load_model(&directory, Cpu::new(1), ulmus_model::WeightFormat::F32).unwrap();
        let tokenizer = load_tokenizer(&directory, &model).unwrap();
        (model, tokenizer)
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
