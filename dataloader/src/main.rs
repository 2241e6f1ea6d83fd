//! The `dataloader` program: what can be asked of corpora and tokenizers without training on them.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    ulmus_rt::report(cli::Arguments::parse().run())
}
