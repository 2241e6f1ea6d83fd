//! Generation beyond the golden numbers: chunked prompts, limits, stopping, sharing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::ControlFlow;
use std::sync::Arc;

use ulmus_backend::{IGNORE, WeightFormat, greedy};
use ulmus_conformance::reference::largest_difference;
use ulmus_cpu::Cpu;
use ulmus_model::{BatchShape, Generator, MicroBatch, Model, ModelError, Objective, Replica};
use ulmus_plan::{ModelConfig, Multipliers, NormKind};

const OBJECTIVE: Objective = Objective::next_token(0.0);

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 211,
        max_context_length: 400,
        num_transformer_layers: 3,
        model_dim: 40,
        head_dim: 10,
        num_gqa_groups: 2,
        qkv_multipliers: Multipliers::Layers(vec![0.5, 1.0]),
        ffn_multipliers: Multipliers::Layers(vec![0.5, 2.0]),
        ffn_dim_divisor: 20,
        rope_freq_constant: 10_000.0,
        norm: NormKind::Rms,
        share_input_output_layers: true,
    }
}

fn model() -> Arc<Model<Cpu>> {
    model_of(&config())
}

fn model_of(config: &ModelConfig) -> Arc<Model<Cpu>> {
    let mut replica = Replica::new(Cpu::new(1), config, BatchShape::new(1, 1), OBJECTIVE).unwrap();
    replica.initialise(5);
    Arc::new(Model::new(Cpu::new(2), config, &replica.state().weights).unwrap())
}

fn text(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i * 7 + i * 3) % 211).collect()
}

/// Tolerance for float32 sums in another order.
const LOGITS: f32 = 2e-5;

#[test]
fn a_prompt_may_come_in_any_pieces() {
    let model = model();
    let text = text(300);
    let mut whole = Generator::new(Arc::clone(&model), 300).unwrap();
    let expected = whole.feed(&text).unwrap().to_vec();
    for piece in [1, 7, 64, 255, 256, 257] {
        let mut generator = Generator::new(Arc::clone(&model), 300).unwrap();
        for part in text.chunks(piece) {
            generator.feed(part).unwrap();
        }
        assert_eq!(generator.position(), 300);
        let (last, before) = text.split_last().unwrap();
        generator.reset();
        generator.feed(before).unwrap();
        let logits = generator.feed(&[*last]).unwrap();
        assert!(largest_difference(logits, &expected) < f64::from(LOGITS), "pieces of {piece}");
    }
}

#[test]
fn scores_are_those_of_the_training_loss() {
    for norm in NormKind::ALL {
        scores_are_those_of(&ModelConfig { norm, ..config() });
    }
}

fn scores_are_those_of(config: &ModelConfig) {
    let model = model_of(config);
    let text = text(301);
    let (inputs, mut targets) = (text[..300].to_vec(), text[1..].to_vec());
    targets[..20].fill(IGNORE);
    let mut replica = Replica::new(Cpu::new(2), config, BatchShape::new(1, 300), OBJECTIVE).unwrap();
    replica.initialise(5);
    let batch = MicroBatch::of_whole_documents(1, 300, inputs.clone(), targets.clone());
    let loss = replica.loss(&batch).unwrap();
    let mut generator = Generator::new(Arc::clone(&model), 300).unwrap();
    let scores = generator.score(&inputs, &targets).unwrap();
    assert!(scores[..20].iter().all(|score| *score == 0.0));
    let total: f64 = scores.iter().map(|score| f64::from(*score)).sum();
    assert!((total / loss.ce - 1.0).abs() < 1e-6, "{:?}", config.norm);
    // In two windows over one cache.
    generator.reset();
    let mut windows = generator.score(&inputs[..130], &targets[..130]).unwrap();
    windows.extend(generator.score(&inputs[130..], &targets[130..]).unwrap());
    assert!(largest_difference(&windows, &scores) < f64::from(LOGITS));
    // Token by token, beside another text.
    let mut generator = Generator::with_sequences(model, 300, 2).unwrap();
    for (index, (token, target)) in inputs.iter().zip(&targets).enumerate().take(40) {
        let logits = generator.feed_each(&[(0, *token), (1, 7)]).unwrap()[..211].to_vec();
        let lse = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
        let score = lse - f64::from(logits[*target as usize % 211]);
        assert!(*target == IGNORE || (score - f64::from(scores[index])).abs() < f64::from(LOGITS));
    }
}

#[test]
fn text_ends_at_the_limit_the_stop_token_or_the_callers_wish() {
    let mut generator = Generator::new(model(), 100).unwrap();
    let mut generate = |max_tokens, stop, most: usize| {
        generator.reset();
        let mut made = Vec::new();
        generator
            .generate(&text(10), max_tokens, stop, |token| {
                made.push(token);
                if made.len() == most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .unwrap();
        made
    };
    let long = generate(12, None, 100);
    assert_eq!(long.len(), 12);
    assert!(generate(0, None, 100).is_empty());
    assert_eq!(generate(5, None, 100), long[..5]);
    assert_eq!(generate(12, None, 3), long[..3]);
    let stop = long[6];
    let first = long.iter().position(|token| *token == stop).unwrap();
    assert_eq!(generate(12, Some(stop), 100), long[..first]);
}

#[test]
fn what_cannot_be_fed_is_refused_and_leaves_the_text_as_it_was() {
    let mut generator = Generator::new(model(), 8).unwrap();
    generator.feed(&text(5)).unwrap();
    let next = generator.feed(&text(1)).unwrap().to_vec();
    for tokens in [vec![], vec![211], vec![0; 3]] {
        assert!(matches!(generator.feed(&tokens), Err(ModelError::Batch(_))));
    }
    assert!(matches!(generator.score(&[1], &[1, 2]), Err(ModelError::Batch(_))));
    assert!(matches!(generator.score(&[1], &[500]), Err(ModelError::Batch(_))));
    assert_eq!(generator.position(), 6);
    let token = greedy(&next);
    generator.feed(&[token, token]).unwrap();
    assert_eq!((generator.position(), generator.capacity()), (8, 8));
}

#[test]
fn a_batch_gives_the_bits_of_single_texts() {
    let mut replica = Replica::new(Cpu::new(1), &config(), BatchShape::new(1, 1), OBJECTIVE).unwrap();
    replica.initialise(5);
    let weights = replica.state().weights.clone();
    let lengths = [3, 70, 1, 31, 32, 33, 8];
    for format in WeightFormat::ALL {
        let model =
            |threads| Arc::new(Model::in_format(Cpu::new(threads), &config(), &weights, format).unwrap());
        let mut batch = Generator::with_sequences(model(3), 200, lengths.len()).unwrap();
        let mut singles: Vec<_> = lengths.iter().map(|_| Generator::new(model(1), 200).unwrap()).collect();
        let mut next = Vec::new();
        for (sequence, length) in lengths.into_iter().enumerate() {
            let logits = batch.feed_to(sequence, &text(length)).unwrap().to_vec();
            assert_eq!(logits, singles[sequence].feed(&text(length)).unwrap());
            next.push((sequence, greedy(&logits)));
        }
        for step in 0..40 {
            // Now and then a text gets no token.
            let fed: Vec<_> = next.iter().copied().filter(|(sequence, _)| step % 5 != *sequence).collect();
            let logits = batch.feed_each(&fed).unwrap().to_vec();
            for ((sequence, token), logits) in fed.iter().zip(logits.chunks_exact(211)) {
                let single = singles[*sequence].feed(&[*token]).unwrap();
                assert!(single.iter().zip(logits).all(|(a, b)| a.to_bits() == b.to_bits()), "{format}");
                next[*sequence].1 = greedy(logits);
            }
        }
        assert!(matches!(batch.feed_each(&[(0, 1), (0, 2)]), Err(ModelError::Batch(_))));
        assert!(matches!(batch.feed_each(&[(7, 1)]), Err(ModelError::Batch(_))));
        assert!(matches!(batch.feed_each(&[]), Err(ModelError::Batch(_))));
    }
}

#[test]
fn pieces_of_a_prompt_do_not_change_a_bit() {
    let model = model();
    let mut whole = Generator::new(Arc::clone(&model), 300).unwrap();
    let expected = whole.feed(&text(300)).unwrap().to_vec();
    for piece in [1, 45, 256] {
        let mut generator = Generator::new(Arc::clone(&model), 300).unwrap();
        let mut logits = Vec::new();
        for part in text(300).chunks(piece) {
            logits = generator.feed(part).unwrap().to_vec();
        }
        assert_eq!(logits, expected, "pieces of {piece}");
    }
}

#[test]
fn every_format_is_close_to_float32() {
    // A vocabulary and widths that are multiples of nothing.
    let config = ModelConfig { vocab_size: 32_001, model_dim: 100, ffn_dim_divisor: 50, ..config() };
    let mut replica = Replica::new(Cpu::new(1), &config, BatchShape::new(1, 1), OBJECTIVE).unwrap();
    replica.initialise(9);
    let weights = replica.state().weights.clone();
    let logits = |format| {
        let model = Arc::new(Model::in_format(Cpu::new(2), &config, &weights, format).unwrap());
        let mut generator = Generator::new(model, 40).unwrap();
        generator.feed(&text(39)).unwrap();
        generator.feed(&[32_000]).unwrap().to_vec()
    };
    let exact = logits(WeightFormat::F32);
    let spread = (exact.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 32_001.0).sqrt();
    // Root of the mean square of a product's relative error, from weights, and from activations where they are rounded
    // too: of uniform rounding 2^-11 / sqrt(3) and 2^-8 / sqrt(3), of a block of 32 normal numbers 2.1 / (127 *
    // sqrt(12)). A logit is behind thirteen products: a factor of sqrt(13) = 3.6, if norms and the softmax did not
    // stretch differences; three times that bounds it.
    for (format, product) in
        [(WeightFormat::F16, 1.4e-4), (WeightFormat::Bf16, 1.6e-3), (WeightFormat::Q8_0, 6.8e-3)]
    {
        let most = 3.0 * 3.6 * product;
        let rounded = logits(format);
        let squares = exact.iter().zip(&rounded).map(|(a, b)| f64::from(a - b).powi(2));
        let error = (squares.sum::<f64>() / 32_001.0).sqrt() / spread;
        assert!(error > most / 100.0 && error <= most, "{format}: {error:.1e}");
    }
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    let mut replica = Replica::new(Cpu::new(1), &config(), BatchShape::new(1, 1), OBJECTIVE).unwrap();
    replica.initialise(5);
    let layout = ulmus_model::Layout::new(&config());
    for (name, value, format, refused) in [
        ("transformer.token_embeddings.weight", f32::NAN, WeightFormat::F32, true),
        ("transformer.layers.1.ffn.proj_2.weight", f32::INFINITY, WeightFormat::Q8_0, true),
        ("transformer.norm.weight", f32::NEG_INFINITY, WeightFormat::Bf16, true),
        ("transformer.layers.0.attn.qkv_proj.weight", 1e5, WeightFormat::F16, true),
        ("transformer.layers.0.attn.qkv_proj.weight", 1e5, WeightFormat::Q8_0, false),
        ("transformer.norm.weight", 1e5, WeightFormat::F16, false),
    ] {
        let mut weights = replica.state().weights.clone();
        weights[layout.tensor(name).unwrap().range.end - 1] = value;
        let made = Model::in_format(Cpu::new(1), &config(), &weights, format);
        match made {
            Err(error) => assert!(refused && error.to_string().contains(name), "{error}"),
            Ok(_) => assert!(!refused, "{name} with {value} in {format}"),
        }
    }
}
