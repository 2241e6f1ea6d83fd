//! A worker: trains its share of a run and does its jobs.
//!
//! It has two parts: the *agent* (async) carries messages between the coordinator and the *trainer* (a plain thread
//! that owns model, data and group). They share only channels and [`control::Control`]. Workers that a coordinator
//! starts itself run the same code, and join in the same way as all others.

#![forbid(unsafe_code)]

mod agent;
pub mod args;
mod bench;
mod check;
pub mod collective;
mod control;
mod error;
mod examples;
mod jobs;
mod rso;
mod run;
mod snapshot;
mod trainer;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;

use rand::Rng;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use ulmus_backend::TrainingBackend;
use ulmus_device::AnyBackend;
use ulmus_plan::Device;
use ulmus_process::{Failure, HostPort, LogTarget, Shutdown};
use ulmus_types::{ExitStatus, Incarnation, WorkerId};

pub use agent::Join;
pub use args::{Args, Command, Only, WorkerConfig};
pub use check::{SourceCheck, check_sources, check_tasks, tokenizer_pieces};
pub use error::WorkerError;
pub use jobs::base_shape;

use agent::{Identity, Setup};
use control::Control;
use trainer::Trainer;
use ulmus_transport::ring::Listener;

/// Capacity of the channel from trainer to agent; the trainer sends a few reports per step.
const REPORTS: usize = 256;

/// Runs a worker until its run is over.
///
/// # Errors
/// The exit code, and a message for a person.
pub async fn run(config: WorkerConfig, shutdown: &Shutdown) -> Result<ExitStatus, Failure> {
    let incarnation = Incarnation::new(rand::rng().next_u64());
    let worker = WorkerId::new(config.name.clone(), incarnation)
        .map_err(|error| Failure::new(ExitStatus::InvalidInput, format!("--name: {error}")))?;
    let (bind, advertised) = addresses(&config)?;
    let listen = || {
        Listener::bind(bind, incarnation).map_err(|error| {
            let message = format!(
                "cannot listen on {bind}: {error}; choose another address with --advertise HOST:PORT"
            );
            Failure::new(ExitStatus::Refused, message)
        })
    };
    let listener = if config.only_jobs { None } else { Some(listen()?) };
    let address = match (&listener, advertised) {
        (None, _) => String::new(),
        (Some(listener), Some(host)) => host.with_port(listener.address().port()).to_string(),
        (Some(listener), None) => listener.address().to_string(),
    };
    let opened = AnyBackend::new(config.device, config.threads, config.nth)
        .map_err(|error| Failure::of(error.kind(), &error))?;
    let identity = Identity {
        worker,
        address,
        device: opened.describe(),
        threads: config.threads as u32,
        memory: opened.memory(),
        only_jobs: config.only_jobs,
    };
    match opened {
        AnyBackend::Cpu(backend) => Box::pin(work(backend, config, identity, listener, shutdown)).await,
        AnyBackend::Cuda(backend) => Box::pin(work(backend, config, identity, listener, shutdown)).await,
    }
}

/// Runs a worker whose device and address are known.
async fn work<B: TrainingBackend>(
    backend: B,
    config: WorkerConfig,
    identity: Identity,
    listener: Option<Listener>,
    shutdown: &Shutdown,
) -> Result<ExitStatus, Failure> {
    let Identity { worker, address, device, .. } = &identity;
    if listener.is_some() {
        tracing::info!("worker {worker} starts on {device}; other workers reach it at {address}");
    } else {
        tracing::info!("worker {worker} starts on {device}, for jobs alone");
    }
    let control = Control::default();
    let (reports_in, reports) = mpsc::channel(REPORTS);
    let (commands, commands_out) = crossbeam_channel::unbounded();
    let trainer = Trainer::new(backend, config.threads, listener, control.clone(), reports_in);
    let (died, death) = tokio::sync::oneshot::channel::<()>();
    std::thread::Builder::new()
        .name("trainer".to_owned())
        .spawn(move || {
            trainer.serve(&commands_out);
            drop(died);
        })
        .map_err(|error| Failure::new(ExitStatus::Failed, format!("cannot start the trainer: {error}")))?;
    let WorkerConfig { join, token, join_timeout, grace, .. } = config;
    let setup = Setup { join, token, join_timeout, grace, identity, control, commands, reports };
    tokio::select! {
        result = Box::pin(agent::serve(setup, shutdown)) => result,
        // The trainer ends before the agent only if it panics, which is logged.
        _ = death => Err(Failure::new(ExitStatus::Failed, "the trainer panicked; see the log")),
    }
}

/// The address at which to listen for other workers, and the host to advertise to them if it differs.
fn addresses(config: &WorkerConfig) -> Result<(SocketAddr, Option<HostPort>), Failure> {
    let wrong = |flag: &str, text: &str, reason: &str| {
        Failure::new(ExitStatus::InvalidInput, format!("{flag} {text}: {reason}"))
    };
    let join = match &config.join {
        Join::File(_) => None,
        Join::Address(text) => {
            let address: HostPort = text.parse().map_err(|reason: String| wrong("--join", text, &reason))?;
            if address.port().is_none() {
                let whole = address.with_port(7070);
                let reason = format!("the port is missing; write HOST:PORT, for instance {whole}");
                return Err(wrong("--join", text, &reason));
            }
            Some(address)
        }
    };
    if let Some(text) = &config.advertise {
        let address: HostPort = text.parse().map_err(|reason: String| wrong("--advertise", text, &reason))?;
        // A host that has only IPv6 addresses must listen on IPv6.
        let any = if address.is_ipv6() {
            IpAddr::from(Ipv6Addr::UNSPECIFIED)
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        return Ok((SocketAddr::new(any, address.port().unwrap_or(0)), Some(address)));
    }
    let Some(join) = join else { return Ok((SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), None)) };
    let found = join.resolve().map_err(|error| {
        let reason = format!("no such host ({error}); write HOST:PORT as the coordinator prints it");
        wrong("--join", &join.to_string(), &reason)
    })?;
    Ok((SocketAddr::from((own_address_towards(found[0]), 0)), None))
}

/// The address of this machine from which packets to `other` are sent. Sends nothing.
fn own_address_towards(other: SocketAddr) -> IpAddr {
    let any: SocketAddr = if other.is_ipv4() {
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
    } else {
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
    };
    UdpSocket::bind(any)
        .and_then(|socket| {
            socket.connect(other)?;
            socket.local_addr()
        })
        .map_or(IpAddr::from(Ipv4Addr::LOCALHOST), |address| address.ip())
}

/// Runs a worker as a program: with a runtime, signal handlers, and logs on standard error.
///
/// # Errors
/// The same as those of [`run`].
pub fn run_process(config: WorkerConfig) -> Result<ExitStatus, Failure> {
    let failed =
        |what: &str, error: std::io::Error| Failure::new(ExitStatus::Failed, format!("{what}: {error}"));
    ulmus_process::init_telemetry(&LogTarget::Stderr).map_err(|error| failed("cannot log", error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| failed("cannot start", error))?;
    let result = runtime.block_on(async {
        let tasks = TaskTracker::new();
        let shutdown =
            Shutdown::on_signals(&tasks).map_err(|error| failed("cannot handle signals", error))?;
        Box::pin(run(config, &shutdown)).await
    });
    // Do not wait for the trainer, which may be in the middle of a step that nobody needs any more.
    runtime.shutdown_background();
    result
}

/// Runs a worker that was started by a coordinator.
///
/// # Errors
/// The same as those of [`run`].
pub fn run_local(
    join_file: PathBuf,
    name: String,
    device: Device,
    nth: usize,
    threads: usize,
) -> Result<ExitStatus, Failure> {
    run_process(WorkerConfig::local(join_file, name, device, nth, threads))
}

/// Times training steps and prints the result.
///
/// # Errors
/// When the plan cannot be read, memory does not suffice for the model, or the result cannot be printed.
pub fn run_bench(args: &args::BenchArgs) -> Result<ExitStatus, Failure> {
    let result = bench::bench(args.config()?).map_err(|error| Failure::of(error.kind(), &error))?;
    ulmus_process::print(&if args.json { json(&result) } else { result.table() })?;
    Ok(ExitStatus::Done)
}

/// Measures the limits of the machine and prints them.
///
/// # Errors
/// When memory does not suffice for measuring, or the result cannot be printed.
pub fn run_roofline(args: &args::RooflineArgs) -> Result<ExitStatus, Failure> {
    let result = bench::roofline(args.threads()).map_err(|error| Failure::of(error.kind(), &error))?;
    ulmus_process::print(&if args.json { json(&result) } else { result.table() })?;
    Ok(ExitStatus::Done)
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).expect("plain data is valid JSON")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn addresses_of(join: &str, advertise: Option<&str>) -> Result<(String, Option<String>), String> {
        let config = WorkerConfig {
            join: Join::Address(join.to_owned()),
            token: ulmus_transport::TokenSource::Unspecified,
            grace: std::time::Duration::ZERO,
            device: Device::Cpu,
            nth: 0,
            threads: 1,
            name: "w".to_owned(),
            advertise: advertise.map(str::to_owned),
            only_jobs: false,
            join_timeout: Duration::from_secs(1),
        };
        addresses(&config)
            .map(|(bind, told)| (bind.to_string(), told.map(|host| host.with_port(9).to_string())))
            .map_err(|failure| failure.to_string())
    }

    #[test]
    fn others_are_told_an_address_that_they_can_use() {
        for (advertise, bind, address) in [
            ("host.invalid", "0.0.0.0:0", "host.invalid:9"),
            ("host.invalid:7000", "0.0.0.0:7000", "host.invalid:9"),
            ("192.0.2.1:7000", "0.0.0.0:7000", "192.0.2.1:9"),
            ("::1", "[::]:0", "[::1]:9"),
            ("[::1]", "[::]:0", "[::1]:9"),
            ("[::1]:7000", "[::]:7000", "[::1]:9"),
        ] {
            let expected = Ok((bind.to_owned(), Some(address.to_owned())));
            assert_eq!(addresses_of("127.0.0.1:7070", Some(advertise)), expected, "{advertise}");
        }
        assert_eq!(addresses_of("127.0.0.1:7070", None), Ok(("127.0.0.1:0".to_owned(), None)));
    }

    #[test]
    fn addresses_that_are_none_are_told_with_what_to_write() {
        for (join, advertise, words) in [
            ("nonsense", None, "--join nonsense: the port is missing; write HOST:PORT"),
            ("no.such.host.invalid:1", None, "no such host"),
            ("::1", None, "[::1]:7070"),
            ("127.0.0.1:1", Some("[::1"), "--advertise [::1: the bracket is not closed"),
            ("127.0.0.1:1", Some("host:x"), "invalid port \"x\"; write HOST or HOST:PORT"),
        ] {
            let message = addresses_of(join, advertise).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
    }
}
