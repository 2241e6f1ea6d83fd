//! Measures how well a model predicts held-out text.
//!
//! Every document is scored by itself, as in training: BOS, its tokens, EOS. Each token after BOS is scored exactly once,
//! with as much context as allowed. A document longer than the context is covered by windows that overlap by half, so
//! that each of its later tokens has at least half a window of context. Sums are taken in f64 in the order of the text,
//! so the result does not depend on the number of threads.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;

use ulmus_backend::Backend;
use ulmus_dataloader::IGNORE;
use ulmus_model::{Generator, Model};
use ulmus_run::results::Perplexity;
use ulmus_tokenizer::Tokenizer;

use crate::error::EvaluatorError;

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
        nll += document_nll(&mut generator, &document)?;
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

/// Negative log-likelihood, in nats, of all tokens but the first, which is only context.
fn document_nll<B: Backend>(generator: &mut Generator<B>, tokens: &[u32]) -> Result<f64, EvaluatorError> {
    let mut nll = 0.0;
    for window in windows(tokens.len() - 1, generator.capacity()) {
        // The token at position p is the target of position p - 1.
        let mut targets = vec![IGNORE; window.scored.start - window.start];
        targets.extend(&tokens[window.scored.start + 1..=window.scored.end]);
        generator.reset();
        let losses = generator.score(&tokens[window.start..window.scored.end], &targets)?;
        nll += losses.iter().copied().map(f64::from).sum::<f64>();
    }
    Ok(nll)
}

/// A range of positions that goes through the model at once.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Window {
    /// The first position, from which on the model reads.
    start: usize,
    /// The positions whose predictions are scored. Their end is the end of the window, too.
    scored: Range<usize>,
}

/// Covers `positions` with windows of at most `context` positions, so that each position is scored once.
fn windows(positions: usize, context: usize) -> impl Iterator<Item = Window> {
    let stride = context.div_ceil(2);
    let mut done = 0;
    std::iter::from_fn(move || {
        let step = if done == 0 { context } else { stride };
        let end = positions.min(done + step);
        let window = Window { start: end.saturating_sub(context), scored: done..end };
        done = end;
        (!window.scored.is_empty()).then_some(window)
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use ulmus_cpu::Cpu;

    use super::*;
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
            let nll = document_nll(&mut generator, &tokens).unwrap();
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

    proptest! {
        #[test]
        fn windows_score_every_position_once_with_half_a_window_of_context(
            positions in 0_usize..3000,
            context in 1_usize..300,
        ) {
            let mut done = 0;
            for window in windows(positions, context) {
                prop_assert_eq!(window.scored.start, done);
                prop_assert!(window.start <= window.scored.start);
                prop_assert!(window.scored.end - window.start <= context);
                let read_before = window.scored.start - window.start;
                prop_assert!(done == 0 || read_before >= context / 2);
                done = window.scored.end;
            }
            prop_assert_eq!(done, positions);
        }
    }
}
