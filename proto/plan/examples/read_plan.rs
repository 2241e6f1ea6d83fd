//! Reads a plan, and tells what it means or every mistake in it.
//!
//!     cargo run -p ulmus-plan --example read_plan -- plans/openelm-270m.toml train.iterations=1000

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;

use ulmus_plan::worker_memory;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let text = match arguments.next() {
        Some(path) => std::fs::read_to_string(path)?,
        None => "[model]\npreset = \"openelm-270m\"".to_owned(),
    };
    let overrides: Vec<String> = arguments.collect();
    match ulmus_plan::read(&text, &overrides) {
        Ok(plans) => {
            for plan in plans {
                let memory = worker_memory(&plan.model, &plan.train, plan.sequence_length());
                println!("{}: {} parameters", plan.run.name, plan.model.parameters());
                println!("{} tokens per step, {} bytes per worker", plan.tokens_per_step(), memory.total);
            }
        }
        Err(problems) => println!("{problems}"),
    }
    Ok(())
}
