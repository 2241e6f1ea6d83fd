//! A run from its plan to its last phase: opens what it needs, drives it, and closes everything in order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use ulmus_coord_core::{Outcome, PersistentState, Settings, TrainingSettings};
use ulmus_plan::{OnBadUnit, Plan};
use ulmus_process::{Failure, HostPort, LogTarget, Shutdown, print, with_causes};
use ulmus_proto::MESSAGE_LIMIT;
use ulmus_proto::v1::coordinator_server::CoordinatorServer;
use ulmus_run::paths;
use ulmus_run::results::Results;
use ulmus_transport::{
    Bound, Credentials, CredentialsError, IDENTITY_FILE, Limits, Published, RuntimeError, TOKEN_FILE,
    TokenSource,
};
use ulmus_types::{
    CheckpointId, Digest, ExitStatus, FileEntry, JobName, RunId, RunSecret, StageName, Step, counted,
    nonce_digest,
};

use crate::args::OnTerm;
use crate::cards;
use crate::console::Console;
use crate::database::{Database, DatabaseError};
use crate::driver::{Ended, Setup, drive, finish_commits};
use crate::figure::Figure;
use crate::folder::{FolderError, RunFolder, unguessable};
use crate::local::LocalWorkers;
use crate::metrics::{Columns, MetricsFile, SourcesFile};
use crate::options::Options;
use crate::quarantine;
use crate::recover::{contradiction, gather, refuse_to_forget};
use crate::server::Sessions;
use crate::summary;
use crate::tuned::Tuned;

/// Capacity of the channel of session events to the driver.
const EVENTS: usize = 4096;
/// How long workers may take to close their streams after the end of the run.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// Runs plans one after the other. Several plans are variants of one, and their results are compared at the end.
///
/// # Errors
/// The exit code, and a message for a person. Committed checkpoints are never lost.
pub async fn run(plans: &[Plan], options: &Options, shutdown: &Shutdown) -> Result<ExitStatus, Failure> {
    if !matches!(options.token, TokenSource::Unspecified) && (plans.len() > 1 || options.demo_failure) {
        let message = "a token is for one run, but these are several runs, each with its own key; omit --token-file, \
                       and unset ULMUS_TOKEN_FILE and ULMUS_TOKEN: every run then makes its own token";
        return Err(Failure::new(ExitStatus::InvalidInput, message));
    }
    let mut compared = Vec::new();
    // Run the next plan even if the summary of this one cannot be printed.
    let mut printed = Ok(());
    for plan in plans {
        if options.demo_failure && plan.local.workers == 0 {
            let message =
                "--demo-failure kills a local worker, but local.workers is 0; add --set local.workers=2";
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        let finished = run_one(plan, options, false, shutdown).await?;
        printed = printed.and(finished.printed);
        if finished.status != ExitStatus::Done {
            return printed.map(|()| finished.status);
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
        printed = printed.and_then(|()| print(&format!("\n{}", summary::comparison(&compared))));
    }
    printed.map(|()| ExitStatus::Done)
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
    let finished = run_one(&disturbed, options, true, shutdown).await?;
    finished.printed?;
    if finished.status != ExitStatus::Done {
        return Ok(finished.status);
    }
    if !finished.killed_one {
        let message = format!(
            "--demo-failure: no worker was killed, because {} had been trained before; give the run another name",
            disturbed.run.name
        );
        return Err(Failure::new(ExitStatus::InvalidInput, message));
    }
    let (Some(undisturbed), Some(state)) = (undisturbed, finished.state) else {
        return Err(Failure::new(ExitStatus::Failed, "--demo-failure: a run ended without a checkpoint"));
    };
    print(&format!(
        "\nfinal state undisturbed          {undisturbed}\nfinal state with a killed worker {state}"
    ))?;
    if undisturbed == state {
        print("the same bits: losing a worker changed nothing")?;
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
    results: Results,
    /// Whether a local worker was killed as wanted.
    killed_one: bool,
    /// Whether the final message or summary was printed.
    printed: Result<(), Failure>,
}

async fn run_one(
    plan: &Plan,
    options: &Options,
    kills_one: bool,
    shutdown: &Shutdown,
) -> Result<Finished, Failure> {
    let opened = Opened::new(plan, options, shutdown).await?;
    let led = opened.lead(plan, options, kills_one, shutdown).await?;
    led.close(plan, options).await
}

/// A run that this process alone may lead, before anything of it has changed.
struct Opened {
    folder: RunFolder,
    credentials: Credentials,
    database: Database,
    id: RunId,
    secret: RunSecret,
    /// The digest of the plan with which the run was last led.
    kept: Option<Digest>,
    /// Tuning stages that have not begun and are not what they were in that plan.
    changed: Vec<StageName>,
    saved: PersistentState,
    listener: TcpListener,
    address: SocketAddr,
    /// Whether workers on this machine find the token by themselves.
    published: Result<Published, RuntimeError>,
}

/// A run whose group has ended.
struct Led {
    folder: RunFolder,
    database: Database,
    outcome: Outcome,
    killed_one: bool,
}

impl Opened {
    async fn new(plan: &Plan, options: &Options, shutdown: &Shutdown) -> Result<Self, Failure> {
        let folder = tokio::select! {
            folder = RunFolder::open(plan, options.recover) => folder.map_err(|error| in_folder(&error))?,
            // Do not wait any longer for a store that does not answer.
            _ = shutdown.requested() => {
                return Err(Failure::new(ExitStatus::Interrupted, "stopped before the run was opened"));
            }
        };
        ulmus_process::init_telemetry(&LogTarget::File(folder.path().join(paths::log("coordinator"))))
            .map_err(|error| failed(&folder.path().join(paths::LOGS), &error))?;
        let credentials = credentials(&folder, options)?;
        for file in &credentials.exposed {
            print(&format!(
                "ALARM: other users could read {} until now; if others use this machine, delete {} and {} beside it \
                 and start again: workers then need the new token",
                file.display(),
                TOKEN_FILE,
                IDENTITY_FILE
            ))?;
        }
        let database = open_database(plan, options, &folder).await?;
        folder.hide_database().map_err(|error| in_folder(&error))?;
        let begun = !database.is_new().map_err(|error| in_database(&error))?;
        let kept = database.plan_digest().map_err(|error| in_database(&error))?;
        let changed = if begun {
            let trainings = database.saved().map_err(|error| in_database(&error))?.trainings;
            let has_begun = |name| {
                trainings
                    .get(&name)
                    .is_some_and(|record| record.had_checkpoints || record.step > Step::default())
            };
            folder.check_plan(plan, kept, has_begun).map_err(|error| in_folder(&error))?
        } else {
            Vec::new()
        };
        let (id, secret) = database.identity().map_err(|error| in_database(&error))?;
        finish_commits(&database, folder.store(), id, plan).await?;
        let bound = bind(plan, options).await?;
        let address = bound.address().map_err(|error| Failure::new(ExitStatus::Failed, error.to_string()))?;
        folder.write_address(address).map_err(|error| in_folder(&error))?;
        let published = ulmus_transport::publish(address.port(), &credentials.token);
        // Accept connections only now: earlier, a worker would find no token, or that of the last coordinator at this
        // port.
        let listener = bound.listen().map_err(|error| cannot_listen(address, &error))?;
        for lost in lost_results(&database, &folder).await? {
            print(&format!("ALARM: {lost}"))?;
        }
        let saved = database.saved().map_err(|error| in_database(&error))?;
        Ok(Self {
            folder,
            credentials,
            database,
            id,
            secret,
            kept,
            changed,
            saved,
            listener,
            address,
            published,
        })
    }

    /// Records the plan with which the run is led from now on. Returns whether there is nothing left to do.
    fn keep_plan(&mut self, plan: &Plan) -> Result<bool, Failure> {
        let Self { folder, database, .. } = self;
        let is_finished = self.saved.is_finished(&plan.graph());
        if is_finished && folder.keeps_another(plan).map_err(|error| in_folder(&error))? {
            print(
                "this run is finished, so changes of its plan have no effect on what is done; give a changed stage, or the run, another name",
            )?;
            return Ok(true);
        }
        // What was made for a stage that is another one now is made again.
        for name in &self.changed {
            database.forget_jobs_of(*name).map_err(|error| in_database(&error))?;
        }
        folder.keep_plan(plan).map_err(|error| in_folder(&error))?;
        if self.kept != Some(plan.digest()) {
            database.keep_plan_digest(plan.digest()).map_err(|error| in_database(&error))?;
        }
        if !self.changed.is_empty() {
            self.saved = self.database.saved().map_err(|error| in_database(&error))?;
        }
        Ok(is_finished)
    }

    /// Leads the run until it ends, and closes everything that workers have to do with.
    async fn lead(
        mut self,
        plan: &Plan,
        options: &Options,
        kills_one: bool,
        shutdown: &Shutdown,
    ) -> Result<Led, Failure> {
        let is_finished = self.keep_plan(plan)?;
        let Self { folder, credentials, database, id, secret, saved, listener, address, published, .. } =
            self;
        let metrics = metrics_files(plan, &database, folder.path())?;
        let sources = sources_file(&database, folder.path())?;
        let console = Console::new();
        console.line(&format!("run {} in {}; workers join at {address}", plan.run.name, folder.shown()));
        let locals = start_locals(plan, &folder, &credentials, is_finished)?;
        if !is_finished {
            if locals.is_none() {
                console.line("waiting for workers");
            }
            print_how_to_join(&console, address, &credentials, published.as_ref().err());
        }
        let tasks = TaskTracker::new();
        let (events, sessions) = mpsc::channel(EVENTS);
        let (close, closed) = oneshot::channel::<()>();
        let routes = Routes::new(
            CoordinatorServer::new(Sessions::new(events, tasks.clone()))
                .max_decoding_message_size(MESSAGE_LIMIT),
        );
        let server = tasks.spawn(async move {
            let closed = async { drop(closed.await) };
            ulmus_transport::serve(listener, routes, &credentials, Limits::of_this_process(), closed).await
        });
        if !saved.quarantine.is_empty() {
            quarantine::write(folder.store(), &saved.quarantine).await.map_err(|error| in_store(&error))?;
        }
        let setup = Setup {
            settings: settings(plan, options, &folder, id, secret).await?,
            lock: folder.lock(),
            saved,
            plan: plan.clone(),
            database,
            files: folder.store().clone(),
            metrics,
            sources,
            console,
            locals,
            detach_on_term: match options.on_term {
                Some(what) => what == OnTerm::Detach,
                None => plan.local.workers == 0,
            },
            kills_one,
            tasks: tasks.clone(),
        };
        let ended = Box::pin(drive(setup, sessions, shutdown)).await;
        // Close in this order: accept no new sessions, drain streams, end local workers, finish writes.
        drop(close);
        tokio::time::timeout(CLOSE_WITHIN, server).await.ok();
        let Ended { outcome, database, console, locals, killed_one } = ended?;
        console.finish();
        match locals {
            // Local workers are left to the next coordinator.
            Some(_) if outcome.detached => {}
            Some(locals) => locals.finish().await,
            None => {}
        }
        tasks.close();
        tokio::time::timeout(CLOSE_WITHIN, tasks.wait()).await.ok();
        Ok(Led { folder, database, outcome, killed_one })
    }
}

impl Led {
    /// Completes the run's files, and prints how it ended.
    async fn close(self, plan: &Plan, options: &Options) -> Result<Finished, Failure> {
        let Self { folder, database, outcome, killed_one } = self;
        // Rows of steps that were trained twice or reported late are right in the database, but not yet in the file.
        let written = metrics_files(plan, &database, folder.path()).map(drop);
        if let Err(failure) = written.and(sources_file(&database, folder.path()).map(drop)) {
            print(&format!("ALARM: {failure}; run.sqlite has the complete metrics"))?;
        }
        if let Err(failure) = copy_tables(plan, &folder).await {
            print(&format!("ALARM: {failure}; the metrics are in {}", folder.path().display()))?;
        }
        let rows = database.metrics(StageName::pretraining()).map_err(|error| in_database(&error))?;
        let results = database.results().map_err(|error| in_database(&error))?;
        let graph = plan.graph();
        let tuned = graph
            .trainings()
            .map(|stage| Ok(Tuned::of(plan, stage.name, &database.metrics(stage.name)?, &results)));
        let tuned = tuned.collect::<Result<Vec<_>, _>>().map_err(|error| in_database(&error))?;
        let tuned: Vec<Tuned> = tuned.into_iter().flatten().collect();
        let quarantine = database.saved().map_err(|error| in_database(&error))?.quarantine;
        // Nobody writes them any more: now they have every milestone.
        for figure in plan.graph().stages().iter().filter_map(|stage| Figure::of(&stage.name, &results)) {
            if let Err(error) = figure.write(folder.store()).await {
                print(&format!("ALARM: cannot write a figure: {}", with_causes(&error)))?;
            }
        }
        // Workers that were left running may be about to write them.
        if !outcome.detached
            && let Err(error) = cards::complete(&tuned, &results, folder.store()).await
        {
            print(&format!("ALARM: cannot write results into model cards: {}", with_causes(&error)))?;
        }
        if outcome.status == ExitStatus::Done {
            for stage in &tuned {
                if let Err(error) = stage.write(folder.store()).await {
                    print(&format!(
                        "ALARM: cannot write the results of {}: {}",
                        stage.stage,
                        with_causes(&error)
                    ))?;
                }
            }
            // Nobody writes any more. Whatever cannot be deleted now only wastes space.
            for training in plan.graph().trainings().map(|stage| stage.name) {
                let none = BTreeSet::new();
                if let Err(error) = ulmus_checkpoint::collect_garbage(folder.store(), training, &none).await {
                    tracing::info!(
                        error = with_causes(&error),
                        "cannot delete leftover files of checkpoints"
                    );
                }
            }
        }
        let newest = || -> Result<Option<Digest>, Failure> {
            let checkpoints = database.checkpoints(true).map_err(|error| in_database(&error))?;
            let order: Vec<StageName> = plan.graph().trainings().map(|stage| stage.name).collect();
            let place = |id: CheckpointId| (order.iter().position(|training| *training == id.training()), id);
            Ok(checkpoints
                .into_iter()
                .max_by_key(|checkpoint| place(checkpoint.id))
                .map(|checkpoint| checkpoint.state))
        };
        let printed = match outcome.status {
            ExitStatus::Done => {
                let state = newest().ok().flatten();
                print(&summary::page(plan, options, &folder, &rows, &tuned, &results, &quarantine, state))
            }
            ExitStatus::Interrupted => print(&outcome.message),
            status => return Err(Failure::new(status, outcome.message)),
        };
        Ok(Finished { status: outcome.status, state: newest()?, results, killed_one, printed })
    }
}

/// Writes `metrics.csv` of each training stage anew from the database.
fn metrics_files(
    plan: &Plan,
    database: &Database,
    folder: &Path,
) -> Result<BTreeMap<StageName, MetricsFile>, Failure> {
    let file = |training: StageName| {
        let rows = database.metrics(training).map_err(|error| in_database(&error))?;
        let path = folder.join(paths::of_training(training, paths::METRICS));
        let file = MetricsFile::create(&path, Columns::of(plan, training), &rows);
        Ok((training, file.map_err(|error| failed(&path, &error))?))
    };
    plan.graph().trainings().map(|stage| file(stage.name)).collect()
}

/// Copies what people read of the coordinator's own files to the store of the run, if that is another place.
async fn copy_tables(plan: &Plan, folder: &RunFolder) -> Result<(), Failure> {
    if folder.store().directory().is_some() {
        return Ok(());
    }
    let graph = plan.graph();
    let metrics = graph.trainings().map(|stage| paths::of_training(stage.name, paths::METRICS));
    for name in metrics.chain([paths::SOURCES.to_owned()]) {
        let path = folder.path().join(&name);
        let table = std::fs::read(&path).map_err(|error| failed(&path, &error))?;
        folder.store().put(&name, table).await.map_err(|error| in_store(&error))?;
    }
    Ok(())
}

/// Messages about results of finished jobs that are missing. Those jobs are forgotten, so that they are done again.
async fn lost_results(database: &Database, folder: &RunFolder) -> Result<Vec<String>, Failure> {
    let results = database.results().map_err(|error| in_database(&error))?;
    let average =
        results.averaged().map(|average| (StageName::AVERAGE, paths::AVERAGE_FOLDER, average.files));
    let export = results.exported().map(|exported| (StageName::EXPORT, paths::EXPORT, exported.files));
    let mut lost = Vec::new();
    for (job, place, files) in average.into_iter().chain(export) {
        let found = folder.store().list(place).await.map_err(|error| in_store(&error))?;
        let is_there = |name: &str, entry: &FileEntry| {
            found.iter().any(|file| file.path == format!("{place}/{name}") && file.size == entry.bytes)
        };
        if let Some((name, _)) = files.iter().find(|(name, entry)| !is_there(name, entry)) {
            database.forget_job(&JobName::stored(job.to_owned())).map_err(|error| in_database(&error))?;
            lost.push(format!("{place}/{name} is missing or changed; {job} is done again"));
        }
    }
    Ok(lost)
}

/// Moves a database away, together with `SQLite`'s files beside it, which a new database would take for its own.
fn set_aside(path: &Path, aside: &Path) -> Result<(), Failure> {
    for suffix in ["", "-wal", "-shm"] {
        let of = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        match std::fs::rename(of(path), of(aside)) {
            Err(error) if suffix.is_empty() || error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed(path, &error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Opens the run's database, or rebuilds it if it was lost and `--recover` was given.
async fn open_database(plan: &Plan, options: &Options, folder: &RunFolder) -> Result<Database, Failure> {
    let path = folder.database();
    let mut database = match Database::open(&path) {
        Err(DatabaseError::NoDatabase(_)) if options.recover => {
            let aside = path.with_extension("sqlite.damaged");
            set_aside(&path, &aside)?;
            print(&format!("{} is damaged; it is kept as {}", path.display(), aside.display()))?;
            Database::open(&path)
        }
        opened => opened,
    }
    .map_err(|error| in_database(&error))?;
    if !database.is_new().map_err(|error| in_database(&error))? {
        let (id, _) = database.identity().map_err(|error| in_database(&error))?;
        let known = database.saved().map_err(|error| in_database(&error))?.generation;
        let Some(why) = contradiction(folder, plan, id, known).await? else { return Ok(database) };
        if !options.recover {
            let message = format!(
                "{} {why}: it is an older copy, or of another run; put back the newest one, or rebuild it from the run \
                 folder with: {} --recover",
                path.display(),
                options.command()
            );
            return Err(Failure::new(ExitStatus::Corrupt, message));
        }
        drop(database);
        let aside = path.with_extension("sqlite.older");
        set_aside(&path, &aside)?;
        print(&format!("{} {why}; it is kept as {}", path.display(), aside.display()))?;
        database = Database::open(&path).map_err(|error| in_database(&error))?;
    } else if !options.recover {
        refuse_to_forget(folder, plan, &options.command(), options.from_start).await?;
        return Ok(database);
    }
    let (recovered, damaged) = gather(folder, plan).await?;
    for fault in &damaged {
        print(&format!("ALARM: {fault}"))?;
    }
    let had_begun = !damaged.is_empty() || recovered.metrics.iter().any(|(_, rows)| !rows.is_empty());
    if recovered.checkpoints.is_empty() && had_begun && !options.from_start {
        let message = format!(
            "no checkpoint in {} can be used, so training would start over; put back copies of the checkpoints, or start \
             over with: {} --recover --from-start",
            folder.shown(),
            options.command()
        );
        return Err(Failure::new(ExitStatus::Corrupt, message));
    }
    database.recover(&recovered).map_err(|error| in_database(&error))?;
    let newest = recovered.checkpoints.iter().map(|checkpoint| checkpoint.id).max();
    print(&format!(
        "run.sqlite is rebuilt from {}{} and {} of metrics.csv; jobs are done again",
        counted(recovered.checkpoints.len(), "checkpoint"),
        newest.map_or_else(String::new, |newest| format!(", the newest of them {newest},")),
        counted(recovered.metrics.iter().map(|(_, rows)| rows.len()).sum::<usize>(), "step")
    ))?;
    Ok(database)
}

fn credentials(folder: &RunFolder, options: &Options) -> Result<Credentials, Failure> {
    Credentials::of_run(folder.path(), &options.token)
        .map_err(|error: CredentialsError| Failure::of(error.kind(), &error))
}

/// Prints how workers that cannot find the token by themselves join.
fn print_how_to_join(
    console: &Console,
    address: SocketAddr,
    credentials: &Credentials,
    unpublished: Option<&RuntimeError>,
) {
    if let Some(error) = unpublished {
        console.line(&format!("workers on this machine cannot find the token by themselves: {error}"));
    }
    // An address that stands for all interfaces is not one that can be joined.
    let (mut here, mut there) = (address.to_string(), Some(address.to_string()));
    if address.ip().is_unspecified() {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        here = format!("localhost:{}", address.port());
        there = Some(format!("{host}:{}", address.port()));
    } else if address.ip().is_loopback() {
        there = None;
    }
    let token = match &credentials.token_file {
        Some(path) => {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string();
            console.line(&format!("join by hand with: worker --join {here} --token-file {path}"));
            format!("the content of {path}")
        }
        None => "this token".to_owned(),
    };
    if let Some(there) = there {
        console.line(&format!("from other machines: worker --join {there}, with ULMUS_TOKEN set to {token}"));
    }
}

async fn bind(plan: &Plan, options: &Options) -> Result<Bound, Failure> {
    let default = if plan.local.workers > 0 { 0 } else { 7070 };
    let refused = |status, address: &HostPort, reason: &str| {
        let message =
            format!("cannot listen on {address}: {reason}; choose another address with --listen HOST:PORT");
        Failure::new(status, message)
    };
    let address = match &options.listen {
        Some(address) if address.port().is_none() => {
            let reason =
                format!("the port is missing; write for instance {}", address.clone().with_port(7070));
            return Err(refused(ExitStatus::InvalidInput, address, &reason));
        }
        Some(address) => address.clone(),
        None => HostPort::of_ip(Ipv4Addr::LOCALHOST.into(), default),
    };
    let found = tokio::net::lookup_host((address.host(), address.port().unwrap_or(default))).await;
    let found = found.map_err(|error| refused(ExitStatus::InvalidInput, &address, &error.to_string()))?;
    // Take the first free one of the name's addresses.
    let mut last = "the name has no address".to_owned();
    for candidate in found {
        match Bound::new(candidate) {
            Ok(bound) => return Ok(bound),
            Err(error) => last = error.to_string(),
        }
    }
    Err(refused(ExitStatus::Refused, &address, &last))
}

fn cannot_listen(address: SocketAddr, error: &std::io::Error) -> Failure {
    let message =
        format!("cannot listen on {address}: {error}; choose another address with --listen HOST:PORT");
    Failure::new(ExitStatus::Refused, message)
}

async fn settings(
    plan: &Plan,
    options: &Options,
    folder: &RunFolder,
    id: RunId,
    secret: RunSecret,
) -> Result<Settings, Failure> {
    let nonce = unguessable();
    // Everybody who may read the run may read the nonce: workers of other users must, and it is useless without the
    // token.
    folder.store().put(paths::NONCE, nonce.clone()).await.map_err(|error| in_store(&error))?;
    Ok(Settings {
        run: plan.run.name.clone(),
        id,
        secret,
        plan: plan.to_toml(),
        store: folder.location().map_err(|error| in_folder(&error))?,
        nonce: nonce_digest(nonce.as_bytes()),
        version: ulmus_proto::VERSION.to_owned(),
        expected_workers: plan.local.workers.max(plan.cluster.min_workers) as usize,
        min_workers: plan.cluster.min_workers as usize,
        graph: plan.graph(),
        trainings: plan.graph().trainings().map(|stage| training(plan, stage.name)).collect(),
        sources: plan.data.source.iter().map(|source| source.name.clone()).collect(),
        from_start: options.from_start,
        dead_after: plan.cluster.dead_after,
        rejoin_window: plan.cluster.rejoin_window,
        recovery: plan.checkpoint.recovery,
        max_age: plan.checkpoint.oldest(),
        bad_units: match plan.data.on_bad_unit {
            OnBadUnit::Fail => 0,
            OnBadUnit::Quarantine => plan.data.max_bad_units as usize,
        },
    })
}

/// What the plan says of a training stage.
fn training(plan: &Plan, name: StageName) -> TrainingSettings {
    match plan.tuning(name) {
        Some(tuning) => TrainingSettings {
            name,
            updates: None,
            micro_batches: tuning.micro_batches(),
            tokens_per_step: tuning.tokens_per_step(),
            milestone_every: tuning.checkpoint_every,
            needed_milestones: 1,
            checkpoint_files: ulmus_checkpoint::files_of(tuning.trainable(&plan.model) as usize),
            may_exhaust: false,
            measures: tuning.measures().into_iter().collect(),
        },
        None => TrainingSettings {
            name,
            updates: Some(plan.train.iterations),
            micro_batches: plan.train.micro_batches(),
            tokens_per_step: plan.tokens_per_step(),
            milestone_every: plan.checkpoint.every,
            needed_milestones: plan.checkpoint.average,
            checkpoint_files: ulmus_checkpoint::files_of(plan.model.parameters() as usize),
            may_exhaust: plan.data.source.iter().any(|source| source.max_epochs.is_some()),
            measures: BTreeSet::new(),
        },
    }
}

fn start_locals(
    plan: &Plan,
    folder: &RunFolder,
    credentials: &Credentials,
    finished: bool,
) -> Result<Option<LocalWorkers>, Failure> {
    if plan.local.workers == 0 || finished {
        return Ok(None);
    }
    if !cfg!(feature = "local-workers") {
        let message = "local.workers: this coordinator was built without local workers; set local.workers to 0 and start workers yourself";
        return Err(Failure::new(ExitStatus::InvalidInput, message));
    }
    let address_file: PathBuf =
        std::path::absolute(folder.address_file()).map_err(|error| failed(folder.path(), &error))?;
    Ok(Some(LocalWorkers::start(folder.path(), address_file, credentials.token.clone(), &plan.local)))
}

fn failed(path: &std::path::Path, error: &std::io::Error) -> Failure {
    Failure::new(ExitStatus::Failed, format!("{}: {error}", path.display()))
}

/// Rewrites `sources.csv`.
fn sources_file(database: &Database, folder: &std::path::Path) -> Result<SourcesFile, Failure> {
    let path = folder.join(paths::SOURCES);
    let rows = database.readings().map_err(|error| in_database(&error))?;
    SourcesFile::create(&path, &rows).map_err(|error| failed(&path, &error))
}

fn in_folder(error: &FolderError) -> Failure {
    Failure::of(error.kind(), error)
}

fn in_store(error: &ulmus_checkpoint::StoreError) -> Failure {
    Failure::of(error.kind(), error)
}

fn in_database(error: &DatabaseError) -> Failure {
    Failure::of(error.kind(), error)
}

#[cfg(test)]
mod tests {
    use ulmus_types::{Hello, Incarnation, ToWorker, WorkerId, WorkerStatus};

    use super::*;
    use crate::server::{SessionEvent, SessionNumber};

    fn hello(incarnation: u64) -> Hello {
        Hello {
            worker: WorkerId::new("local-0", Incarnation::new(incarnation)).unwrap(),
            version: ulmus_proto::VERSION.to_owned(),
            address: "127.0.0.1:1".to_owned(),
            device: "cpu".to_owned(),
            threads: 1,
            pid: 1,
            run: None,
            secret: None,
            status: WorkerStatus::Idle,
            host: "here".to_owned(),
            memory: 1 << 30,
            only_jobs: false,
        }
    }

    /// A worker is killed, another process takes its place, and the end of the first connection is not known yet.
    #[tokio::test]
    async fn a_worker_that_cannot_be_told_anything_makes_room_for_its_successor() {
        let home = tempfile::tempdir().unwrap();
        let plan = format!(
            "[run]\nname = \"tiny\"\n[store]\nurl = {:?}\n[prepare]\npaths = [\"corpus\"]\n[train]\niterations = 10\nwarmup = 1\n\
             [checkpoint]\nevery = 5\naverage = 1\n",
            home.path()
        );
        let plan = ulmus_plan::read(&plan, &[]).unwrap().remove(0);
        let folder = RunFolder::open(&plan, false).await.unwrap();
        let database = Database::open(&folder.database()).unwrap();
        let (id, secret) = database.identity().unwrap();
        let setup = Setup {
            settings: settings(&plan, &Options::default(), &folder, id, secret).await.unwrap(),
            lock: folder.lock(),
            saved: database.saved().unwrap(),
            metrics: metrics_files(&plan, &database, folder.path()).unwrap(),
            sources: sources_file(&database, folder.path()).unwrap(),
            plan,
            database,
            files: folder.store().clone(),
            console: Console::new(),
            locals: None,
            detach_on_term: false,
            kills_one: false,
            tasks: TaskTracker::new(),
        };
        let (events, sessions) = mpsc::channel(EVENTS);
        let successor = async {
            let (outbox, dead) = mpsc::channel(8);
            drop(dead);
            let opened = |number, outbox| SessionEvent::Opened {
                session: SessionNumber(number),
                hello: hello(number),
                outbox,
            };
            events.send(opened(1, outbox)).await.unwrap();
            let (outbox, mut told) = mpsc::channel(8);
            events.send(opened(2, outbox)).await.unwrap();
            told.recv().await
        };
        let shutdown = Shutdown::manual();
        let told = tokio::select! {
            told = successor => told,
            _ = drive(setup, sessions, &shutdown) => None,
        };
        assert!(matches!(told, Some(ToWorker::Welcome { .. })), "{told:?}");
    }
}
