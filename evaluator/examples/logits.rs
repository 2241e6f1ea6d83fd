//! Prints the logits after each token of a text, as a JSON list per token.
//!
//!     cargo run --release -p ulmus-evaluator --example logits -- runs/quickstart/export 1 17 4 211

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;
use std::path::Path;

use ulmus_cpu::Cpu;
use ulmus_evaluator::load_model;
use ulmus_model::{Generator, WeightFormat};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().ok_or("name a model folder or a .pt file, and token ids")?;
    let tokens = arguments.map(|token| token.parse()).collect::<Result<Vec<u32>, _>>()?;
    let loaded = load_model(Path::new(&model), Cpu::new(1), WeightFormat::F32)?;
    let mut generator = Generator::new(loaded.model, tokens.len())?;
    for token in tokens {
        println!("{}", serde_json::to_string(generator.feed(&[token])?)?);
    }
    Ok(())
}
