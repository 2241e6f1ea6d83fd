//! Runs inference on any device, to compare the results.

use std::sync::Arc;

use ulmus_backend::{Backend, WeightFormat};
use ulmus_cpu::Cpu;
use ulmus_model::{BatchShape, Generator, Model, Objective, Replica, Span};
use ulmus_plan::{ModelConfig, Preset};

/// Outputs as pairs of a name and values.
pub type Outputs = Vec<(String, Vec<f32>)>;

/// A small model with heads of the published width.
pub fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 264,
        model_dim: 256,
        num_transformer_layers: 3,
        max_context_length: 512,
        ..Preset::Openelm270m.config()
    }
}

/// Logits after a prompt, after single tokens, and of a second sequence beside the first; and the losses of a text.
pub fn inference<B: Backend>(backend: B, config: &ModelConfig, format: WeightFormat) -> Outputs {
    let mut replica =
        Replica::new(Cpu::new(2), config, BatchShape::new(1, 1), Objective::next_token(0.0)).unwrap();
    replica.initialise(5);
    let model = Model::in_format(backend, config, &replica.state().weights, format).unwrap();
    let mut generator = Generator::with_sequences(Arc::new(model), 400, 2).unwrap();
    let text: Vec<u32> = (0..320).map(|at| (at * at + 3 * at) as u32 % config.vocab_size as u32).collect();
    let mut outputs = Outputs::new();
    outputs.push(("prompt".to_owned(), generator.feed(&text[..300]).unwrap().to_vec()));
    outputs.push(("other prompt".to_owned(), generator.feed_to(1, &text[5..10]).unwrap().to_vec()));
    for at in 300..304 {
        let logits = generator.feed_each(&[(0, text[at]), (1, text[at - 290])]).unwrap().to_vec();
        outputs.push((format!("tokens {at}"), logits));
    }
    for at in 304..308 {
        outputs.push((format!("token {at}"), generator.feed(&text[at..=at]).unwrap().to_vec()));
    }
    // The tokens that the device considers most likely.
    let begin = |generator: &mut Generator<B>| {
        generator.reset();
        generator.feed(&text[..30]).unwrap();
        generator.feed_to(1, &text[5..10]).unwrap();
    };
    begin(&mut generator);
    let logits = generator.feed_each(&[(1, 9), (0, 3)]).unwrap();
    let expected: Vec<u32> = logits.chunks(config.vocab_size).map(ulmus_model::greedy).collect();
    begin(&mut generator);
    assert_eq!(generator.feed_greedy(&[(1, 9), (0, 3)]).unwrap(), expected);
    generator.reset();
    let losses = generator.score(&text[..310], &text[1..311]).unwrap();
    outputs.push(("losses".to_owned(), losses));
    // Two texts that begin alike, continued by spans of different lengths in one pass.
    generator.reset();
    generator.feed(&text[..20]).unwrap();
    generator.fork(&[(0, 1)]).unwrap();
    let spans = [
        Span { sequence: 0, tokens: &text[20..25], targets: &[(0, text[21]), (4, 9)] },
        Span { sequence: 1, tokens: &text[40..47], targets: &[(6, 3), (2, text[43])] },
    ];
    let scores = generator.extend(&spans).unwrap();
    outputs.push(("branches".to_owned(), scores.iter().map(|score| score.nll).collect()));
    // The same, one after the other.
    for (span, scores) in spans.iter().zip(scores.chunks(2)) {
        generator.reset();
        generator.feed(&text[..20]).unwrap();
        let alone = generator.extend(&[Span { sequence: 0, ..*span }]).unwrap();
        for (alone, beside) in alone.iter().zip(scores) {
            assert!((alone.nll - beside.nll).abs() <= 1e-2 * alone.nll, "{alone:?} {beside:?}");
        }
    }
    outputs
}
