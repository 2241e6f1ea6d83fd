//! The `worker` program.

use std::process::ExitCode;

use ulmus_worker::{Args, Command, run_bench, run_process, run_roofline};

fn main() -> ExitCode {
    let args: Args = match ulmus_process::arguments() {
        Ok(args) => args,
        Err(code) => return code,
    };
    ulmus_process::report(match args.command {
        Some(Command::Bench(bench)) => run_bench(&bench),
        Some(Command::Roofline(roofline)) => run_roofline(&roofline),
        None => run_process(args.join.into()),
    })
}
