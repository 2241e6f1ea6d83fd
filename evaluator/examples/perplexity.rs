//! Measures the perplexity of a model folder on text files.
//!
//!     cargo run --release -p ulmus-evaluator --example perplexity -- runs/quickstart/export notes.txt

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;
use std::path::PathBuf;

use ulmus_backend::WeightFormat;
use ulmus_cpu::Cpu;
use ulmus_evaluator::{load_model, load_tokenizer, perplexity, read_texts};

fn main() -> Result<(), Box<dyn Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let Some((folder, texts)) = paths.split_first() else {
        println!("usage: perplexity MODEL_FOLDER TEXT...");
        return Ok(());
    };
    let threads = std::thread::available_parallelism()?.get();
    let loaded = load_model(folder, Cpu::new(threads), WeightFormat::F32)?;
    let tokenizer = load_tokenizer(folder, &loaded)?;
    let context = loaded.model.config().max_context_length;
    let result = perplexity(&loaded.model, &tokenizer, &read_texts(texts, "text")?, context)?;
    println!("{:.4} nats per token, perplexity {:.2}", result.loss, result.loss.exp());
    Ok(())
}
