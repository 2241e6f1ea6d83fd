//! Trains a tiny model to count, on the CPU, and lets it go on from a prompt.
//!
//!     cargo run --release -p ulmus-model --example train_and_generate

#![expect(clippy::print_stdout, reason = "an example")]

use std::sync::Arc;

use ulmus_cpu::Cpu;
use ulmus_model::{
    BatchShape, Generator, MicroBatch, Model, ModelError, Objective, Quantum, Replica, greedy,
};
use ulmus_plan::{ModelConfig, Multipliers, TrainConfig};

const VOCABULARY: u32 = 64;
const LENGTH: usize = 32;

fn main() -> Result<(), ModelError> {
    let config = ModelConfig {
        vocab_size: VOCABULARY as usize,
        max_context_length: LENGTH,
        num_transformer_layers: 2,
        model_dim: 32,
        head_dim: 8,
        num_gqa_groups: 2,
        qkv_multipliers: Multipliers::Layers(vec![0.5, 1.0]),
        ffn_multipliers: Multipliers::Layers(vec![1.0, 2.0]),
        ffn_dim_divisor: 16,
        ..ModelConfig::default()
    };
    let recipe =
        TrainConfig { iterations: 150, warmup: 10, max_lr: 0.01, min_lr: 0.001, ..TrainConfig::default() };
    let mut replica =
        Replica::new(Cpu::new(1), &config, BatchShape::new(4, LENGTH), Objective::next_token(recipe.z_loss))?;
    replica.initialise(0);
    let quantum = Quantum::new((4 * LENGTH) as u64, 1);
    for step in 0..recipe.iterations {
        let tokens = |shift: usize| {
            let at = move |index: usize| {
                ((step as usize + index / LENGTH * 9 + index % LENGTH + shift) as u32) % VOCABULARY
            };
            (0..4 * LENGTH).map(at).collect::<Vec<u32>>()
        };
        let loss =
            replica.forward_backward(&MicroBatch::of_whole_documents(4, LENGTH, tokens(0), tokens(1)))?;
        replica.quantise_mean_gradient(&quantum, loss.valid)?;
        replica.update(&recipe, recipe.learning_rate(step), step)?;
        if step % 50 == 0 {
            println!("step {step}: loss {:.3}", loss.mean_ce());
        }
    }
    let state = replica.state();
    let model = Arc::new(Model::new(Cpu::new(1), &config, &state.weights)?);
    let mut generator = Generator::new(model, LENGTH)?;
    let mut written = vec![5, 6, 7, 8];
    let mut next = greedy(generator.feed(&written)?);
    for _ in 0..8 {
        written.push(next);
        next = greedy(generator.feed(&[next])?);
    }
    println!("{written:?}");
    Ok(())
}
