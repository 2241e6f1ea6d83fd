//! The `worker` program.

use std::process::ExitCode;

use clap::Parser;
use ulmus_worker::{Args, run_process};

fn main() -> ExitCode {
    ulmus_rt::report(run_process(Args::parse().into()))
}
