//! The `coordinator` program.

use std::process::ExitCode;

use tokio_util::task::TaskTracker;
use ulmus_coordinator::args::{Args, Command};
use ulmus_coordinator::{Options, check, plans, run};
use ulmus_process::{Failure, Shutdown, print};
use ulmus_transport::{TokenSource, raise_file_limit};
use ulmus_types::ExitStatus;

fn main() -> ExitCode {
    match ulmus_process::arguments() {
        Ok(args) => ulmus_process::report(start(args)),
        Err(code) => code,
    }
}

fn start(args: Args) -> Result<ExitStatus, Failure> {
    match args.command {
        Some(Command::Init { from }) => {
            print(plans::published(&from)?.trim_end())?;
            return Ok(ExitStatus::Done);
        }
        #[cfg(feature = "local-workers")]
        Some(Command::LocalWorker { join_file, name, device, nth, threads }) => {
            return ulmus_worker::run_local(join_file, name, device, nth, threads);
        }
        None => {}
    }
    let path = args.plan.expect("clap requires --plan without a subcommand");
    let plans = plans::load(&path, &args.overrides)?;
    if let Some(what) = args.check {
        return check(&path, &plans, what);
    }
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(ExitStatus::Failed, format!("cannot start: {error}")))?;
    let options = Options {
        plan: path,
        overrides: args.overrides,
        listen: args.listen,
        token: TokenSource::given(args.token_file),
        demo_failure: args.demo_failure,
        recover: args.recover,
        from_start: args.from_start,
        on_term: args.on_term,
    };
    runtime.block_on(async {
        let tasks = TaskTracker::new();
        let shutdown = Shutdown::on_signals(&tasks)
            .map_err(|error| Failure::new(ExitStatus::Failed, format!("cannot handle signals: {error}")))?;
        Box::pin(run(&plans, &options, &shutdown)).await
    })
}
