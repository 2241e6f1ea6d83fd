//! The command line of a worker.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use ulmus_plan::{
    AdapterConfig, AdapterKind, Algorithms, Device, ModelConfig, NormKind, Plan, Precision, Preset,
};
use ulmus_process::{Failure, load_plans};
use ulmus_transport::TokenSource;
use ulmus_types::{COORDINATOR_TIMEOUT, ExitStatus};

use crate::agent::{Join, host};
use crate::bench::BenchConfig;

/// Joins a coordinator and works for its run: reads, tokenizes, trains, and does jobs.
///
/// Exit codes: 0 if the run is done; otherwise the exit code of the run (1 failed, 2 wrong input, 5 damaged data, 130
/// interrupted), or the worker's own: 3 refused (no token or a wrong one, another version, another fingerprint, a store
/// that is not shared), 4 fenced, 6 no coordinator, 130 asked to leave, after handing over its work.
#[derive(Debug, Clone, Parser)]
#[command(name = "worker", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    /// What to do instead of joining.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// How to join.
    #[command(flatten)]
    pub join: JoinArgs,
}

/// What a worker does without a coordinator.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Time training steps: forward, backward, the exact mean, clipping and AdamW.
    ///
    /// Example: worker bench --preset openelm-270m --batch 4 --sequence 512 --dtype bf16 --threads 8
    Bench(BenchArgs),
    /// Measure the limits of this machine: arithmetic in registers, and reading and copying memory.
    Roofline(RooflineArgs),
}

/// Arguments of `worker bench`.
#[derive(Debug, Clone, Parser)]
pub struct BenchArgs {
    #[command(flatten)]
    subject: Subject,
    /// Kind of norm for the preset: `rms`, `naive_rms` or `layer`. A plan sets its own in `model.norm`.
    #[arg(long, value_name = "KIND", default_value = "rms", conflicts_with = "plan")]
    norm: NormKind,
    /// Sequences per micro-batch [default: that of the plan, or 4].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Tokens per sequence [default: that of the plan, or 512].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    sequence: Option<u32>,
    /// Precision to which the operands of matrix products are rounded.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// Recompute layers in the backward pass instead of keeping their activations.
    #[arg(long)]
    recompute: bool,
    /// Train an adapter of all matrices of all layers, and nothing else.
    #[arg(long, value_enum, value_name = "KIND")]
    adapter: Option<Adapter>,
    /// Rank of the adapter.
    #[arg(long, value_name = "N", default_value_t = 32, requires = "adapter", value_parser = clap::value_parser!(u64).range(1..=1024))]
    rank: u64,
    /// Dropout of the adapter.
    #[arg(long, value_name = "P", default_value_t = 0.0, requires = "adapter")]
    dropout: f64,
    /// Train on pairs of a chosen and a rejected answer (direct preference optimisation): sequences 1 and 2, 3 and 4, ...
    #[arg(long)]
    preferences: bool,
    /// The first tokens of each sequence that are a prompt, which nothing is learned from.
    #[arg(long, value_name = "N", default_value_t = 0)]
    prompt: u32,
    /// How cuBLASLt chooses matrix multiplication algorithms, like `train.algorithms` in a plan.
    #[arg(long, value_enum, default_value = "library")]
    algorithms: AlgorithmChoice,
    /// Compute threads [default: all cores].
    #[arg(long, env = "ULMUS_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// What to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N.
    #[arg(long, env = "ULMUS_DEVICE", value_name = "DEVICE", default_value_t)]
    device: Device,
    /// Timed steps, after one untimed step; the median is reported.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The model to train.
#[derive(Debug, Clone, clap::Args)]
#[group(required = true, multiple = false)]
struct Subject {
    /// A published model shape: `openelm-270m`, `-450m`, `-1_1b` or `-3b`.
    #[arg(long, value_name = "NAME")]
    preset: Option<Preset>,
    /// The model of a plan (its first variant).
    #[arg(long, value_name = "FILE.toml")]
    plan: Option<PathBuf>,
}

/// Arguments of `worker roofline`.
#[derive(Debug, Clone, Parser)]
pub struct RooflineArgs {
    /// Compute threads [default: all cores].
    #[arg(long, env = "ULMUS_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

impl RooflineArgs {
    pub(crate) fn threads(&self) -> usize {
        self.threads.map_or_else(all_cores, usize::from)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AlgorithmChoice {
    /// The first choice of the library's heuristic; reproducible.
    Library,
    /// The fastest, found by measuring.
    Measured,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Adapter {
    /// Low-rank adaptation.
    Lora,
    /// The same with a trained norm for each row.
    Dora,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    /// 32-bit floats.
    F32,
    /// 16-bit brain floats, summed in 32 bits.
    Bf16,
}

impl BenchArgs {
    /// # Errors
    /// When the plan cannot be read.
    pub(crate) fn config(&self) -> Result<BenchConfig, Failure> {
        let (name, model, batch, sequence) = match (&self.subject.preset, &self.subject.plan) {
            (Some(preset), _) => {
                (preset.name().to_owned(), ModelConfig { norm: self.norm, ..preset.config() }, 4, 512)
            }
            (None, path) => {
                let plan = first_plan(path.as_deref().expect("clap requires one of the group"))?;
                let (batch, sequence) = (plan.train.micro_batch as usize, plan.sequence_length());
                (plan.run.name.to_string(), plan.model, batch, sequence)
            }
        };
        let sequence = self.sequence.map_or(sequence, |sequence| sequence as usize);
        if sequence > model.max_context_length {
            let most = model.max_context_length;
            let message = format!("--sequence {sequence} exceeds the model's maximum; use at most {most}");
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        let batch = self.batch.map_or(batch, |batch| batch as usize);
        let prompt = self.prompt as usize;
        if prompt >= sequence {
            let message =
                format!("--prompt {prompt} leaves nothing of {sequence} tokens; use less than {sequence}");
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        if self.preferences && !batch.is_multiple_of(2) {
            let message = format!("--batch {batch} sequences are no pairs; use {}", batch + 1);
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        let adapter = self.adapter.map(|adapter| AdapterConfig {
            kind: match adapter {
                Adapter::Lora => AdapterKind::Lora,
                Adapter::Dora => AdapterKind::Dora,
            },
            rank: self.rank,
            alpha: self.rank as f64,
            dropout: self.dropout,
            ..AdapterConfig::default()
        });
        Ok(BenchConfig {
            name,
            model,
            batch,
            sequence,
            adapter,
            preferences: self.preferences,
            prompt,
            precision: match self.dtype {
                Dtype::F32 => Precision::F32,
                Dtype::Bf16 => Precision::Bf16,
            },
            recompute: self.recompute,
            algorithms: match self.algorithms {
                AlgorithmChoice::Library => Algorithms::Library,
                AlgorithmChoice::Measured => Algorithms::Measured,
            },
            device: self.device,
            threads: self.threads.map_or_else(all_cores, usize::from),
            steps: self.steps as usize,
        })
    }
}

fn first_plan(path: &Path) -> Result<Plan, Failure> {
    let plans = load_plans(path, &[], crate::tokenizer_pieces, crate::base_shape)?;
    Ok(plans.into_iter().next().expect("a plan file contains a plan"))
}

/// How to join a coordinator.
#[derive(Debug, Clone, clap::Args)]
pub struct JoinArgs {
    /// Address of the coordinator.
    #[arg(long, env = "ULMUS_JOIN", value_name = "HOST:PORT", required = true)]
    pub join: Option<String>,

    /// What to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N.
    #[arg(long, env = "ULMUS_DEVICE", value_name = "DEVICE", default_value_t)]
    pub device: Device,

    /// Compute threads [default: all cores].
    #[arg(long, env = "ULMUS_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// File with the coordinator's join token; alternatively, set `ULMUS_TOKEN` to the content of that file [default:
    /// the token that a coordinator of the same user on this machine has left in the user's runtime folder].
    #[arg(long, env = "ULMUS_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// Name of this worker, different from those of others [default: host name and process id].
    #[arg(long, env = "ULMUS_NAME", value_name = "NAME")]
    pub name: Option<String>,

    /// Address at which other workers reach this one [default: the address from which the coordinator is reached, and a
    /// free port].
    #[arg(long, env = "ULMUS_ADVERTISE", value_name = "HOST[:PORT]")]
    pub advertise: Option<String>,

    /// Serve jobs (evaluations, benchmarks, averages) and never train. Such a worker may compute other bits than those that
    /// train, needs no memory for training, and no port that others reach.
    #[arg(long, env = "ULMUS_ONLY", value_enum, value_name = "WHAT", conflicts_with = "advertise")]
    pub only: Option<Only>,

    /// How long to look for the coordinator before giving up.
    #[arg(long, env = "ULMUS_JOIN_TIMEOUT", value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    pub join_timeout: Duration,

    /// How long the worker may take to hand over its work when it is asked to leave (SIGTERM or Ctrl-C). A second
    /// signal ends it at once.
    #[arg(long, env = "ULMUS_GRACE", value_name = "TIME", default_value = GRACE, value_parser = humantime::parse_duration)]
    pub grace: Duration,
}

/// The only work that a worker takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Only {
    /// Jobs of stages.
    Jobs,
}

/// Configuration of a worker.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Where the coordinator is.
    pub join: Join,
    /// The token to show to the coordinator.
    pub token: TokenSource,
    /// What to compute on.
    pub device: Device,
    /// Index of the worker on this machine, which selects a GPU if the device does not name one.
    pub nth: usize,
    /// Compute threads.
    pub threads: usize,
    /// Name of the worker.
    pub name: String,
    /// Address at which other workers reach it, if it is not detected.
    pub advertise: Option<String>,
    /// Whether it serves jobs and never trains.
    pub only_jobs: bool,
    /// How long to look for the coordinator before giving up.
    pub join_timeout: Duration,
    /// How long it may take to hand over its work when it is asked to leave.
    pub grace: Duration,
}

/// Default of [`WorkerConfig::grace`]; less than Kubernetes waits before it kills a process.
const GRACE: &str = "25s";

impl WorkerConfig {
    /// Configuration of a worker that was started by the coordinator.
    pub fn local(join_file: PathBuf, name: String, device: Device, nth: usize, threads: usize) -> Self {
        let (join, token) = (Join::File(join_file), TokenSource::given(None));
        Self {
            join,
            token,
            device,
            nth,
            threads,
            name,
            advertise: None,
            only_jobs: false,
            join_timeout: COORDINATOR_TIMEOUT,
            grace: humantime::parse_duration(GRACE).expect("a test parses it"),
        }
    }
}

impl From<JoinArgs> for WorkerConfig {
    fn from(args: JoinArgs) -> Self {
        Self {
            join: Join::Address(args.join.expect("clap requires --join")),
            token: TokenSource::given(args.token_file),
            device: args.device,
            nth: 0,
            threads: args.threads.map_or_else(all_cores, usize::from),
            name: args.name.unwrap_or_else(default_name),
            advertise: args.advertise,
            only_jobs: args.only == Some(Only::Jobs),
            join_timeout: args.join_timeout,
            grace: args.grace,
        }
    }
}

fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The host name and this process's id, so that several workers on one host differ.
fn default_name() -> String {
    let host: String = host().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(40).collect();
    let host = host.trim_start_matches('-');
    let host = if host.is_empty() { "worker" } else { host };
    format!("{host}-{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bench_has_the_norm_that_was_asked_for() {
        let norm = |norm: &[&str]| {
            let args = ["worker", "bench", "--preset", "openelm-270m"].iter().chain(norm);
            let Some(Command::Bench(bench)) = Args::try_parse_from(args)?.command else {
                panic!("not a bench")
            };
            Ok::<_, clap::Error>(bench.config().unwrap().model.norm)
        };
        assert_eq!(norm(&[]).unwrap(), NormKind::Rms);
        for kind in NormKind::ALL {
            assert_eq!(norm(&["--norm", kind.name()]).unwrap(), kind);
        }
        let error = norm(&["--norm", "batch"]).unwrap_err().to_string();
        assert!(error.contains("use rms, naive_rms or layer"), "{error}");
        let both = ["worker", "bench", "--plan", "plan.toml", "--norm", "layer"];
        assert!(Args::try_parse_from(both).is_err(), "a plan has a norm of its own");
    }
}
