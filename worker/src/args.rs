//! The command line of a worker.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::agent::Join;

/// Joins a coordinator and works for it: reads, tokenizes, trains, and does its jobs.
///
/// Exit codes: 0 the run is over, 1 failed, 2 wrong input, 3 refused (another version, another fingerprint, a
/// store that is not shared), 4 fenced, 6 no coordinator, 130 interrupted.
#[derive(Debug, Clone, Parser)]
#[command(name = "worker", version)]
pub struct Args {
    /// The coordinator.
    #[arg(long, env = "ULMUS_JOIN", value_name = "HOST:PORT")]
    pub join: String,

    /// What to compute on; auto takes the best there is.
    #[arg(long, env = "ULMUS_DEVICE", value_enum, default_value = "auto")]
    pub device: Device,

    /// Compute threads [default: all cores].
    #[arg(long, env = "ULMUS_THREADS", value_name = "N")]
    pub threads: Option<usize>,

    /// A name that tells this worker from others [default: made from the host's name].
    #[arg(long, env = "ULMUS_NAME", value_name = "NAME")]
    pub name: Option<String>,

    /// Where other workers reach this one [default: the address that reaches the coordinator, any free port].
    #[arg(long, env = "ULMUS_ADVERTISE", value_name = "HOST[:PORT]")]
    pub advertise: Option<String>,

    /// How long to look for the coordinator.
    #[arg(long, env = "ULMUS_JOIN_TIMEOUT", value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    pub join_timeout: Duration,
}

/// What a worker computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The best there is.
    Auto,
    /// The processor.
    Cpu,
}

/// What a worker is told when it starts.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// The coordinator.
    pub join: Join,
    /// Compute threads.
    pub threads: usize,
    /// Its name.
    pub name: String,
    /// Where other workers reach it.
    pub advertise: Option<String>,
    /// How long to look for the coordinator.
    pub join_timeout: Duration,
}

impl WorkerConfig {
    /// A worker that the coordinator itself started.
    pub fn local(join_file: PathBuf, name: String, threads: usize) -> Self {
        let join = Join::File(join_file);
        Self { join, threads, name, advertise: None, join_timeout: Duration::from_mins(5) }
    }
}

impl From<Args> for WorkerConfig {
    fn from(args: Args) -> Self {
        // The processor is the only device of this build, so both choices mean it.
        let (Device::Auto | Device::Cpu) = args.device;
        Self {
            join: Join::Address(args.join),
            threads: args.threads.unwrap_or_else(all_cores).max(1),
            name: args.name.unwrap_or_else(default_name),
            advertise: args.advertise,
            join_timeout: args.join_timeout,
        }
    }
}

fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The host's name and this process's id: several workers of one host differ.
fn default_name() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let host: String = host.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(40).collect();
    let host = host.trim_start_matches('-');
    let host = if host.is_empty() { "worker" } else { host };
    format!("{host}-{}", std::process::id())
}
