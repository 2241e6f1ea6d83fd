//! The command line of the coordinator.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use ulmus_process::HostPort;

/// Runs a pretraining plan: prepares data, trains on workers, averages, evaluates, benchmarks and exports.
///
/// The same command resumes an interrupted run. Ctrl-C saves and stops; a second Ctrl-C stops at once.
///
/// Exit codes: 0 done, 1 failed, 2 wrong input, 3 refused (port in use, run folder in use), 4 fenced, 5 damaged data,
/// 6 unavailable, 130 interrupted and saved.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version, args_conflicts_with_subcommands = true)]
pub struct Args {
    /// The plan, a TOML file.
    #[arg(long, env = "ULMUS_PLAN", required = true)]
    pub plan: Option<PathBuf>,

    /// Address at which workers join [default: 127.0.0.1:7070, or a free port if the plan starts local workers].
    #[arg(long, env = "ULMUS_LISTEN", value_name = "HOST:PORT")]
    pub listen: Option<HostPort>,

    /// File with the join token that workers must show; it is made if it does not exist. Alternatively, set
    /// `ULMUS_TOKEN` to the content of such a file [default: join.token in the run folder].
    #[arg(long, env = "ULMUS_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// Override a key of the plan; may be given several times.
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    pub overrides: Vec<String>,

    /// Start nothing: print what the plan means, or everything that is wrong with it. With "sources", also open every
    /// source, the base and the tokenizer, and show what tuning stages learn from.
    #[arg(long, num_args = 0..=1, default_missing_value = "plan", value_name = "WHAT")]
    pub check: Option<Check>,

    /// Rebuild a lost run.sqlite from the checkpoints in the run folder, and continue from there.
    #[arg(long)]
    pub recover: bool,

    /// Start over if every checkpoint of the run is damaged.
    #[arg(long)]
    pub from_start: bool,

    /// What SIGTERM does: save and stop the run, or leave the workers to the next coordinator, for which they wait
    /// while they continue to train [default: stop if the plan starts local workers, otherwise detach]. Ctrl-C always
    /// saves and stops.
    #[arg(long, env = "ULMUS_ON_TERM", value_name = "WHAT")]
    pub on_term: Option<OnTerm>,

    /// Run the plan a second time, kill a local worker with SIGKILL in the middle of training, and compare the final
    /// states of both runs.
    #[arg(long)]
    pub demo_failure: bool,

    /// What to do instead of running a plan.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What SIGTERM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnTerm {
    /// Leave the workers to the next coordinator.
    Detach,
    /// Save and stop the run.
    Stop,
}

/// How much to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Check {
    /// Only the plan itself, offline.
    Plan,
    /// The plan, and everything that it reads.
    Sources,
}

/// What the program can do instead of running a plan.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print a commented plan to start from.
    Init {
        /// The plan: a published model, such as openelm-1_1b, or its variant with modern packing, openelm-1_1b-modern.
        #[arg(long, value_name = "NAME", default_value = "openelm-270m")]
        from: String,
    },
    /// Run as a worker that this program has started itself.
    #[cfg(feature = "local-workers")]
    #[command(hide = true)]
    LocalWorker {
        /// File with the address at which the coordinator listens.
        #[arg(long)]
        join_file: PathBuf,
        /// Name of the worker.
        #[arg(long)]
        name: String,
        /// What to compute on.
        #[arg(long)]
        device: ulmus_plan::Device,
        /// Index of the local worker.
        #[arg(long)]
        nth: usize,
        /// Compute threads.
        #[arg(long)]
        threads: usize,
    },
}
