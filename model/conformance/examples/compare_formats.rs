//! What a new backend is held against: the outputs of inference, compared by their relative distance. Here the same backend
//! in other formats of weights stands for one.
//!
//!     cargo run --release -p ulmus-conformance --example compare_formats

#![expect(clippy::print_stdout, reason = "an example")]

use ulmus_backend::WeightFormat;
use ulmus_conformance::inference::inference;
use ulmus_conformance::relative_l2;
use ulmus_cpu::Cpu;
use ulmus_plan::{ModelConfig, Preset};

fn main() {
    let config = ModelConfig {
        vocab_size: 264,
        model_dim: 64,
        head_dim: 16,
        num_transformer_layers: 2,
        max_context_length: 512,
        ffn_dim_divisor: 32,
        ..Preset::Openelm270m.config()
    };
    let reference = inference(Cpu::new(2), &config, WeightFormat::F32);
    for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q8_0] {
        let found = inference(Cpu::new(1), &config, format);
        // Logits of a prompt, of tokens side by side and alone, and losses of a text.
        let worst = found
            .iter()
            .zip(&reference)
            .map(|((name, found), (_, reference))| (relative_l2(found, reference), name))
            .max_by(|one, other| one.0.total_cmp(&other.0));
        if let Some((distance, name)) = worst {
            println!("{format:?}: {} outputs, furthest off is {name:?} with {distance:.1e}", found.len());
        }
    }
}
