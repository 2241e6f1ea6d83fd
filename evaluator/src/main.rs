//! The `evaluator` program: one subcommand for each thing that one can ask of a model folder.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match ulmus_process::arguments::<cli::Arguments>() {
        Ok(arguments) => ulmus_process::report(arguments.run()),
        Err(code) => code,
    }
}
