//! The `evaluator` program: one sub-command per thing that can be asked of a model folder.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match ulmus_rt::arguments::<cli::Arguments>() {
        Ok(arguments) => ulmus_rt::report(arguments.run()),
        Err(code) => code,
    }
}
