//! What `coordinator --check` says of a published plan, and of one with mistakes in it.
//!
//!     cargo run -p ulmus-coordinator --example check_published

#![expect(clippy::print_stdout, reason = "an example")]

use std::path::Path;
use std::process::ExitCode;

use ulmus_coordinator::args::Check;
use ulmus_coordinator::{check, plans};
use ulmus_process::{Failure, report};
use ulmus_types::ExitStatus;

fn main() -> ExitCode {
    report(run())
}

fn run() -> Result<ExitStatus, Failure> {
    // The plans that `coordinator init` prints are part of the program.
    let text = plans::published("openelm-270m")?;
    let overrides = ["train.iterations=1000", "checkpoint.every=100", "train.warmup=50"].map(str::to_owned);
    let read = |overrides: &[String]| {
        let path = Path::new("openelm-270m");
        ulmus_plan::read(text, overrides).map_err(|problems| {
            Failure::new(ExitStatus::InvalidInput, ulmus_process::cannot_run(path, &problems))
        })
    };
    check(Path::new("openelm-270m"), &read(&overrides)?, Check::Plan)?;

    let wrong = ["train.itertions=1000", "data.lanes=500", "model.head_dim=wide"].map(str::to_owned);
    if let Err(failure) = read(&wrong) {
        println!("\nand with {wrong:?}:\n{failure}");
    }
    Ok(ExitStatus::Done)
}
