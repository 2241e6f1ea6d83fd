//! Measures how well a model predicts held-out text.
//!
//! Every document is scored by itself, as in training: BOS, its tokens, EOS. Each token after BOS is scored exactly once,
//! with as much context as allowed. A document longer than the context is covered by windows that overlap by half, so
//! that each of its later tokens has at least half a window of context. Sums are taken in f64 in the order of the text,
//! so the result does not depend on the number of threads.

use std::io::{self, Write};
use std::sync::Arc;

use ulmus_backend::Backend;
use ulmus_model::{Generator, Model};
use ulmus_run::results::Perplexity;
use ulmus_tokenizer::Tokenizer;

use crate::error::EvaluatorError;
use crate::likelihood::rolling_nll;

/// Scores `texts` with a context of up to `context` tokens. Empty texts are skipped.
///
/// # Errors
/// [`EvaluatorError::NoText`] when all texts are empty, or a model error when there is no memory for the context.
///
/// # Panics
/// When `context` is 0.
pub fn perplexity<B: Backend>(
    model: &Arc<Model<B>>,
    tokenizer: &Tokenizer,
    texts: &[String],
    context: usize,
) -> Result<Perplexity, EvaluatorError> {
    let mut generator = Generator::new(Arc::clone(model), context)?;
    let mut encoder = tokenizer.encoder();
    let (mut documents, mut bytes, mut tokens, mut nll) = (0, 0, 0, 0.0);
    for text in texts.iter().filter(|text| !text.is_empty()) {
        let mut document = vec![tokenizer.bos()];
        encoder.encode(text, &mut document);
        document.push(tokenizer.eos());
        documents += 1;
        bytes += text.len() as u64;
        tokens += document.len() as u64 - 1;
        nll += rolling_nll(&mut generator, &document)?;
    }
    if documents == 0 {
        return Err(EvaluatorError::NoText("the texts given".to_owned()));
    }
    let loss = nll / tokens as f64;
    Ok(Perplexity {
        documents,
        bytes,
        tokens,
        context,
        nll,
        loss,
        perplexity: loss.exp(),
        bits_per_byte: nll / bytes as f64 / std::f64::consts::LN_2,
        zstd_bits_per_byte: zstd_bits_per_byte(texts),
    })
}

/// Bits per byte that `zstd -19` needs for all texts in one stream, or 0 when all are empty.
pub fn zstd_bits_per_byte(texts: &[String]) -> f64 {
    let bytes: usize = texts.iter().map(String::len).sum();
    let compress = || -> io::Result<u64> {
        let mut encoder = zstd::Encoder::new(CountingSink(0), 19)?;
        for text in texts {
            encoder.write_all(text.as_bytes())?;
        }
        Ok(encoder.finish()?.0)
    };
    let compressed = compress().expect("a sink that only counts cannot fail");
    if bytes == 0 { 0.0 } else { compressed as f64 * 8.0 / bytes as f64 }
}

struct CountingSink(u64);

impl Write for CountingSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ulmus_cpu::Cpu;

    use super::*;
    use crate::likelihood::windows;
    use crate::{LoadedModel, load_model, load_tokenizer};
    use serde::Deserialize;

    fn tiny() -> (LoadedModel<Cpu>, Tokenizer) {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny");
        let model = load_model(&directory, Cpu::new(1), ulmus_model::WeightFormat::F32).unwrap();
        let tokenizer = load_tokenizer(&directory, &model).unwrap();
        (model, tokenizer)
    }

    #[derive(Deserialize)]
    struct Rolling {
        samples: Vec<Sample>,
    }

    #[derive(Deserialize)]
    struct Sample {
        text: String,
        n_tokens: usize,
        ll: f64,
    }

    #[test]
    fn likelihoods_are_those_of_lm_evaluation_harness() {
        let (loaded, tokenizer) = tiny();
        let golden: Rolling =
            serde_json::from_str(include_str!("../../tests/golden/tiny/rolling.json")).unwrap();
        assert!(golden.samples.len() >= 2);
        let mut generator = Generator::new(Arc::clone(&loaded.model), 2048).unwrap();
        for sample in golden.samples {
            // The harness also predicts BOS itself, from another BOS.
            let mut tokens = vec![tokenizer.bos(); 2];
            tokens.extend(tokenizer.encode(&sample.text));
            assert_eq!(tokens.len() - 1, sample.n_tokens);
            let nll = rolling_nll(&mut generator, &tokens).unwrap();
            assert!((nll + sample.ll).abs() < 1e-3, "{nll} against {}", -sample.ll);
        }
    }

    /// The negative log-likelihood by its definition, without a cache or windows: one forward pass for each token.
    fn nll_by_definition(
        model: &LoadedModel<Cpu>,
        tokens: &[u32],
        window_of: impl Fn(usize) -> usize,
    ) -> f64 {
        let mut generator = Generator::new(Arc::clone(&model.model), tokens.len()).unwrap();
        (1..tokens.len())
            .map(|target| {
                generator.reset();
                let logits = generator.feed(&tokens[window_of(target - 1)..target]).unwrap();
                let largest = logits.iter().copied().fold(f32::MIN, f32::max) as f64;
                let sum: f64 = logits.iter().map(|logit| (*logit as f64 - largest).exp()).sum();
                largest + sum.ln() - logits[tokens[target] as usize] as f64
            })
            .sum()
    }

    #[test]
    fn every_token_of_a_long_document_is_scored_once_in_its_window() {
        let (model, tokenizer) = tiny();
        let text = "The old teacher counts an iron pot at the market. ".repeat(3);
        let mut tokens = vec![tokenizer.bos()];
        tokens.extend(tokenizer.encode(&text));
        tokens.push(tokenizer.eos());
        for context in [1, 8, 31, tokens.len() - 1, 500] {
            let windows: Vec<_> = windows(tokens.len() - 1, context).collect();
            let start = |position: usize| {
                windows.iter().find(|window| window.scored.contains(&position)).unwrap().start
            };
            let expected = nll_by_definition(&model, &tokens, start);
            let result = perplexity(&model.model, &tokenizer, std::slice::from_ref(&text), context).unwrap();
            assert!((result.nll - expected).abs() < 1e-3, "{} against {expected}", result.nll);
            assert_eq!(result.tokens as usize, tokens.len() - 1);
        }
    }

    #[test]
    fn rates_follow_from_the_sums_and_empty_texts_are_skipped() {
        let (model, tokenizer) = tiny();
        let texts = ["a glass of water".to_owned(), String::new(), "S\u{e3}o Paulo".to_owned()];
        let both = perplexity(&model.model, &tokenizer, &texts, 64).unwrap();
        let [first, last] = [0, 2].map(|i| perplexity(&model.model, &tokenizer, &texts[i..=i], 64).unwrap());
        assert_eq!((both.documents, both.bytes), (2, 16 + 10));
        assert_eq!(both.tokens, first.tokens + last.tokens);
        assert_eq!(both.nll, first.nll + last.nll);
        assert_eq!(both.perplexity, (both.nll / both.tokens as f64).exp());
        assert!((both.bits_per_byte - both.nll / 26.0 / 2.0_f64.ln()).abs() < 1e-12);
        assert!(perplexity(&model.model, &tokenizer, &texts[1..2], 64).is_err());
    }

    #[test]
    fn zstd_compresses_repetition_but_not_noise() {
        let repeated = "all work and no play ".repeat(500);
        assert!(zstd_bits_per_byte(&[repeated]) < 0.1);
        assert!(zstd_bits_per_byte(&["q8Zr".to_owned()]) > 8.0);
        assert_eq!(zstd_bits_per_byte(&[]), 0.0);
    }
}
