//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use ulmus_process::HostPort;

/// Runs a pretraining plan: prepares data, trains on workers, averages, evaluates, benchmarks and exports.
///
/// The same command goes on where an interrupted run stopped. Ctrl-C saves and stops; a second one stops at
/// once.
///
/// Exit codes: 0 done, 1 failed, 2 wrong input, 3 refused (port in use, run folder in use), 4 fenced,
/// 5 damaged data, 6 unavailable, 130 interrupted and saved.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version, args_conflicts_with_subcommands = true)]
pub struct Args {
    /// The plan (TOML).
    #[arg(long, env = "ULMUS_PLAN", required = true)]
    pub plan: Option<PathBuf>,

    /// Address for workers [default: 127.0.0.1:7070, or any free port when the plan starts local workers].
    #[arg(long, env = "ULMUS_LISTEN", value_name = "HOST:PORT")]
    pub listen: Option<HostPort>,

    /// The file with the join token that workers must show, which is made if there is none; or set `ULMUS_TOKEN` to
    /// what such a file says [default: join.token in the run's folder].
    #[arg(long, env = "ULMUS_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// Replace a key of the plan; may be given several times.
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    pub overrides: Vec<String>,

    /// Start nothing: print what the plan means, or all that is wrong with it. With "sources", also open
    /// every source and the tokenizer.
    #[arg(long, num_args = 0..=1, default_missing_value = "plan", value_name = "WHAT")]
    pub check: Option<Check>,

    /// Rebuild a lost run.sqlite from the checkpoints in the run folder, and go on from there.
    #[arg(long)]
    pub recover: bool,

    /// Begin anew where every checkpoint of the run is damaged.
    #[arg(long)]
    pub from_start: bool,

    /// What SIGTERM does: save and stop the run, or leave the workers to the next coordinator, for which they wait while
    /// they train on [default: stop when the plan starts local workers, else detach]. Ctrl-C always saves and stops.
    #[arg(long, env = "ULMUS_ON_TERM", value_name = "WHAT")]
    pub on_term: Option<OnTerm>,

    /// Kill a local worker with SIGKILL in the middle of training, and compare the final weights with those of
    /// the undisturbed run.
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
    /// The plan itself, offline.
    Plan,
    /// Its sources and tokenizer too.
    Sources,
}

/// Other things that the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print a commented plan to begin with.
    Init {
        /// The plan to begin from: a published model, such as openelm-1_1b, or its twin openelm-1_1b-modern.
        #[arg(long, value_name = "NAME", default_value = "openelm-270m")]
        from: String,
    },
    /// A worker that this program started itself.
    #[cfg(feature = "local-workers")]
    #[command(hide = true)]
    LocalWorker {
        /// The file that tells where the coordinator listens.
        #[arg(long)]
        join_file: PathBuf,
        /// Its name.
        #[arg(long)]
        name: String,
        /// What to compute on.
        #[arg(long)]
        device: ulmus_plan::Device,
        /// Which of the local workers it is.
        #[arg(long)]
        nth: usize,
        /// Compute threads.
        #[arg(long)]
        threads: usize,
    },
}
