//! The `dataloader` program: everything that can be done with corpora and tokenizers without training on them.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match ulmus_process::arguments::<cli::Arguments>() {
        Ok(arguments) => ulmus_process::report(arguments.run()),
        Err(code) => code,
    }
}
