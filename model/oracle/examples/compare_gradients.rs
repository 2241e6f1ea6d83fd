//! Loss and gradients of a tiny model, by our kernels in float32 and by the oracle's tape in float64.
//!
//!     cargo run -p ulmus-oracle --example compare_gradients

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;

use ulmus_cpu::Cpu;
use ulmus_model::{BatchShape, MicroBatch, Objective, Replica};
use ulmus_oracle::Oracle;
use ulmus_plan::ModelConfig;

const LENGTH: usize = 12;
const Z_LOSS: f64 = 1e-4;

fn main() -> Result<(), Box<dyn Error>> {
    let config = ModelConfig {
        vocab_size: 32,
        max_context_length: LENGTH,
        num_transformer_layers: 2,
        model_dim: 16,
        head_dim: 4,
        num_gqa_groups: 2,
        ffn_dim_divisor: 8,
        ..ModelConfig::default()
    };
    let tokens = |from: usize| (0..LENGTH).map(|at| ((from + at) * 5 % 32) as u32).collect();
    let batch = MicroBatch::of_whole_documents(1, LENGTH, tokens(0), tokens(1));

    let mut replica =
        Replica::new(Cpu::new(1), &config, BatchShape::new(1, LENGTH), Objective::next_token(Z_LOSS))?;
    replica.initialise(0);
    let loss = replica.forward_backward(&batch)?;
    let mut gradient = vec![0.0; replica.layout().parameters()];
    replica.read_gradient(0, &mut gradient);

    // The oracle is given the same weights by their names, and knows nothing of our kernels.
    let weights = replica.state().weights;
    let layout = replica.layout();
    let tensors = layout.tensors().iter();
    let tensors = tensors.map(|t| (t.name.as_str(), t.shape.as_slice(), &weights[t.range.clone()]));
    let expected = Oracle::new(&config, tensors)?.losses(&batch, Z_LOSS)?;
    println!("cross-entropy {:.6}, of the oracle {:.6}", loss.ce, expected.cross_entropy);
    for (tensor, expected) in layout.tensors().iter().zip(expected.gradients).take(4) {
        let own = &gradient[tensor.range.clone()];
        let largest = own.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        println!("gradient of {}: largest difference {largest:.1e}", tensor.name);
    }
    Ok(())
}
