//! Generation beyond the golden numbers: chunked prompts, limits, stopping, sharing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::ops::ControlFlow;
use std::sync::Arc;

use common::largest_difference;
use ulmus_model::{BatchShape, Cpu, Generator, IGNORE, MicroBatch, Model, ModelError, Replica, greedy};
use ulmus_plan::{ModelConfig, Multipliers};

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
    }
}

fn model() -> Arc<Model<Cpu>> {
    let mut replica = Replica::new(Cpu::new(1), &config(), BatchShape::new(1, 1), 0.0).unwrap();
    replica.initialise(5);
    Arc::new(Model::new(Cpu::new(2), &config(), &replica.state().weights).unwrap())
}

fn text(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i * 7 + i * 3) % 211).collect()
}

/// Float32 sums in another order.
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
    let model = model();
    let text = text(301);
    let (inputs, mut targets) = (text[..300].to_vec(), text[1..].to_vec());
    targets[..20].fill(IGNORE);
    let mut replica = Replica::new(Cpu::new(2), &config(), BatchShape::new(1, 300), 0.0).unwrap();
    replica.initialise(5);
    let batch = MicroBatch::of_whole_documents(1, 300, inputs.clone(), targets.clone());
    let loss = replica.loss(&batch).unwrap();
    let mut generator = Generator::new(model, 300).unwrap();
    let scores = generator.score(&inputs, &targets).unwrap();
    assert!(scores[..20].iter().all(|score| *score == 0.0));
    let total: f64 = scores.iter().map(|score| f64::from(*score)).sum();
    assert!((total / loss.ce - 1.0).abs() < 1e-6);
    // In two windows over one cache.
    generator.reset();
    let mut windows = generator.score(&inputs[..130], &targets[..130]).unwrap();
    windows.extend(generator.score(&inputs[130..], &targets[130..]).unwrap());
    assert!(largest_difference(&windows, &scores) < f64::from(LOGITS));
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
