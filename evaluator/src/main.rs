//! The `evaluator` program: one sub-command per thing that can be asked of a model folder.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    ulmus_rt::report(cli::Arguments::parse().run())
}
