//! One run from its plan to its last phase: opens what it needs, drives it, and closes in order.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use ulmus_coord_core::Settings;
use ulmus_plan::{OnBadUnit, Plan};
use ulmus_proto::v1::coordinator_server::CoordinatorServer;
use ulmus_rt::{Failure, LogTarget, Shutdown, with_causes};
use ulmus_types::{Digest, ExitStatus};

use crate::console::{Console, print};
use crate::driver::{Ended, Parts, drive, finish_commits};
use crate::folder::{FolderError, RunFolder, unguessable};
use crate::local::LocalWorkers;
use crate::metrics::{MetricsFile, SourcesFile};
use crate::quarantine;
use crate::server::{MESSAGE_LIMIT, Sessions};
use crate::store::{RunStore, StoreError};
use crate::summary;

/// Events of sessions that may wait for the driver.
const EVENTS: usize = 4096;
/// How long workers may take to close their streams after the end.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// What is asked of the coordinator besides the plan.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where the plan is, for the summary's advice.
    pub plan: PathBuf,
    /// Where to listen.
    pub listen: Option<SocketAddr>,
    /// Run the plan a second time with a killed worker, and compare.
    pub demo_failure: bool,
}

/// Runs plans one after the other; several are variants of one, and are compared at the end.
///
/// # Errors
/// With the exit code and what a person is told. What was committed is never lost.
pub async fn run(plans: &[Plan], options: &Options, shutdown: &Shutdown) -> Result<ExitStatus, Failure> {
    let mut compared = Vec::new();
    for plan in plans {
        if options.demo_failure && plan.local.workers == 0 {
            let message =
                "--demo-failure kills a local worker, and local.workers is 0; add --set local.workers=2";
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        let finished = run_one(plan, options, None, shutdown).await?;
        if finished.status != ExitStatus::Done {
            return Ok(finished.status);
        }
        compared.push((plan.run.name.to_string(), plan.model.parameters(), finished.results));
        if options.demo_failure {
            let undisturbed = finished.state;
            let status = run_disturbed(plan, options, undisturbed, shutdown).await?;
            if status != ExitStatus::Done {
                return Ok(status);
            }
        }
    }
    if compared.len() > 1 {
        print(&format!("\n{}", summary::comparison(&compared)));
    }
    Ok(ExitStatus::Done)
}

/// Runs the plan again under another name, kills a worker in the middle, and compares the final states.
async fn run_disturbed(
    plan: &Plan,
    options: &Options,
    undisturbed: Option<Digest>,
    shutdown: &Shutdown,
) -> Result<ExitStatus, Failure> {
    let mut disturbed = plan.clone();
    let name = format!("{}-failure", plan.run.name);
    disturbed.run.name = name
        .parse()
        .map_err(|error| Failure::new(ExitStatus::InvalidInput, format!("--demo-failure: {error}")))?;
    let finished = run_one(&disturbed, options, Some(plan.train.iterations / 2), shutdown).await?;
    if finished.status != ExitStatus::Done {
        return Ok(finished.status);
    }
    let (Some(undisturbed), Some(state)) = (undisturbed, finished.state) else {
        return Err(Failure::new(ExitStatus::Failed, "--demo-failure: a run ended without a checkpoint"));
    };
    print(&format!(
        "\nfinal state undisturbed          {undisturbed}\nfinal state with a killed worker {state}"
    ));
    if undisturbed == state {
        print("the same bits: losing a worker changed nothing");
        Ok(ExitStatus::Done)
    } else {
        Err(Failure::new(ExitStatus::Corrupt, "the final states differ"))
    }
}

/// How a run ended.
struct Finished {
    status: ExitStatus,
    /// Hash of the state of the newest checkpoint.
    state: Option<Digest>,
    results: std::collections::BTreeMap<String, serde_json::Value>,
}

async fn run_one(
    plan: &Plan,
    options: &Options,
    kill_after: Option<u64>,
    shutdown: &Shutdown,
) -> Result<Finished, Failure> {
    let folder = tokio::select! {
        folder = RunFolder::open(plan) => folder.map_err(|error| in_folder(&error))?,
        // A store that does not answer is not waited for then.
        () = shutdown.requested() => {
            return Err(Failure::new(ExitStatus::Interrupted, "stopped before the run was opened"));
        }
    };
    ulmus_rt::init_telemetry(&LogTarget::File(folder.path().join("logs/coordinator.log")))
        .map_err(|error| failed(&folder.path().join("logs"), &error))?;
    let memory = RunStore::open(&folder.database()).map_err(|error| stored(&error))?;
    finish_commits(&memory, folder.store(), plan.digest()).await?;
    let listener = bind(plan, options).await?;
    let address =
        listener.local_addr().map_err(|error| Failure::new(ExitStatus::Failed, error.to_string()))?;
    folder.write_address(address).map_err(|error| in_folder(&error))?;

    let saved = memory.saved().map_err(|error| stored(&error))?;
    let rows = memory.metrics().map_err(|error| stored(&error))?;
    let metrics_path = folder.path().join("metrics.csv");
    let metrics = MetricsFile::create(&metrics_path, &rows).map_err(|error| failed(&metrics_path, &error))?;
    let sources = sources_file(&memory, folder.path())?;
    let console = Console::new(plan.train.iterations, saved.step);
    console.line(&format!("run {} in {}; workers join at {address}", plan.run.name, folder.shown()));
    let finished_before = saved.jobs.contains("benchmark");
    let locals = start_locals(plan, &folder, finished_before)?;
    if locals.is_none() && !finished_before {
        console.line(&format!("waiting for workers: worker --join {address}"));
    }

    let tasks = TaskTracker::new();
    let (events, sessions) = mpsc::channel(EVENTS);
    let (close, closed) = oneshot::channel::<()>();
    let server = serve(listener, events, tasks.clone(), closed);
    let server = tasks.spawn(server);
    if !saved.quarantine.is_empty() {
        quarantine::write(folder.store(), &saved.quarantine).await.map_err(|error| in_store(&error))?;
    }
    let parts = Parts {
        settings: settings(plan, &folder).await?,
        saved,
        plan_digest: plan.digest(),
        memory,
        files: folder.store().clone(),
        metrics,
        sources,
        console,
        locals,
        kill_after,
        tasks: tasks.clone(),
    };
    let ended = Box::pin(drive(parts, sessions, shutdown)).await;
    // The order of closing: no new sessions, streams drained, local workers gone, writes finished.
    drop(close);
    tokio::time::timeout(CLOSE_WITHIN, server).await.ok();
    let Ended { outcome, memory, console, locals } = ended?;
    console.finish();
    if let Some(locals) = locals {
        locals.finish().await;
    }
    tasks.close();
    tokio::time::timeout(CLOSE_WITHIN, tasks.wait()).await.ok();

    let rows = memory.metrics().map_err(|error| stored(&error))?;
    // Steps that were trained twice, or reported late, are in their place in the record and not in the file.
    MetricsFile::create(&metrics_path, &rows).map_err(|error| failed(&metrics_path, &error))?;
    sources_file(&memory, folder.path())?;
    let results = memory.results().map_err(|error| stored(&error))?;
    let left_out = memory.saved().map_err(|error| stored(&error))?.quarantine;
    if outcome.status == ExitStatus::Done {
        // Nobody writes any more. What is not deleted now costs space and nothing else.
        if let Err(error) = ulmus_checkpoint::collect_garbage(folder.store(), &BTreeSet::new()).await {
            tracing::info!(error = with_causes(&error), "left over of checkpoints could not be deleted");
        }
    }
    match outcome.status {
        ExitStatus::Done => print(&summary::page(plan, options, &folder, &rows, &results, &left_out)),
        ExitStatus::Interrupted => print(&outcome.message),
        status => return Err(Failure::new(status, outcome.message)),
    }
    let state = memory
        .checkpoints(true)
        .map_err(|error| stored(&error))?
        .into_iter()
        .max_by_key(|c| c.id)
        .map(|c| c.state);
    Ok(Finished { status: outcome.status, state, results })
}

async fn bind(plan: &Plan, options: &Options) -> Result<TcpListener, Failure> {
    let default = if plan.local.workers > 0 { 0 } else { 7070 };
    let address = options.listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], default)));
    TcpListener::bind(address).await.map_err(|error| {
        let message =
            format!("cannot listen on {address}: {error}; choose another address with --listen HOST:PORT");
        Failure::new(ExitStatus::Refused, message)
    })
}

async fn serve(
    listener: TcpListener,
    events: mpsc::Sender<crate::server::SessionEvent>,
    tasks: TaskTracker,
    closed: oneshot::Receiver<()>,
) -> Result<(), tonic::transport::Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let sessions =
        CoordinatorServer::new(Sessions::new(events, tasks)).max_decoding_message_size(MESSAGE_LIMIT);
    health.set_serving::<CoordinatorServer<Sessions>>().await;
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .tcp_nodelay(true)
        .add_service(health_service)
        .add_service(sessions)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
            closed.await.ok();
        })
        .await
}

async fn settings(plan: &Plan, folder: &RunFolder) -> Result<Settings, Failure> {
    let (nonce, nonce_path) = (unguessable(), "coordinator.nonce".to_owned());
    folder.store().put(&nonce_path, nonce.clone()).await.map_err(|error| in_store(&error))?;
    Ok(Settings {
        run: plan.run.name.clone(),
        plan: plan.to_toml(),
        store: folder.location().map_err(|error| in_folder(&error))?,
        nonce_path,
        nonce,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        expected_workers: plan.local.workers.max(plan.cluster.min_workers) as usize,
        min_workers: plan.cluster.min_workers as usize,
        micro_batches: plan.train.micro_batches(),
        iterations: plan.train.iterations,
        average: plan.checkpoint.average,
        export: plan.checkpoint.export,
        dead_after: plan.cluster.dead_after,
        rejoin_window: plan.cluster.rejoin_window,
        recovery: plan.checkpoint.recovery,
        bad_units: match plan.data.on_bad_unit {
            OnBadUnit::Fail => 0,
            OnBadUnit::Quarantine => plan.data.max_bad_units as usize,
        },
    })
}

fn start_locals(plan: &Plan, folder: &RunFolder, finished: bool) -> Result<Option<LocalWorkers>, Failure> {
    if plan.local.workers == 0 || finished {
        return Ok(None);
    }
    if !cfg!(feature = "local-workers") {
        let message = "local.workers: this coordinator was built without local workers; set it to 0 and start workers yourself";
        return Err(Failure::new(ExitStatus::InvalidInput, message));
    }
    let address_file: PathBuf =
        std::path::absolute(folder.address_file()).map_err(|error| failed(folder.path(), &error))?;
    LocalWorkers::start(folder.path(), address_file, &plan.local)
        .map(Some)
        .map_err(|error| failed(folder.path(), &error))
}

fn failed(path: &std::path::Path, error: &std::io::Error) -> Failure {
    Failure::new(ExitStatus::Failed, format!("{}: {error}", path.display()))
}

/// `sources.csv`, written anew.
fn sources_file(memory: &RunStore, folder: &std::path::Path) -> Result<SourcesFile, Failure> {
    let path = folder.join("sources.csv");
    let rows = memory.readings().map_err(|error| stored(&error))?;
    SourcesFile::create(&path, &rows).map_err(|error| failed(&path, &error))
}

fn in_folder(error: &FolderError) -> Failure {
    Failure::of(error.kind(), error)
}

fn in_store(error: &ulmus_checkpoint::StoreError) -> Failure {
    Failure::of(error.kind(), error)
}

fn stored(error: &StoreError) -> Failure {
    Failure::of(error.kind(), error)
}
