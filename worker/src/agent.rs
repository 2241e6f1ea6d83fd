//! The shell around the session: connects, carries messages, and reconnects when the connection is lost.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use futures::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::Streaming;
use ulmus_checkpoint::{Store, StoreError, write_part};
use ulmus_process::{Failure, Shutdown, with_causes};
use ulmus_proto::v1::coordinator_client::CoordinatorClient;
use ulmus_proto::{MESSAGE_LIMIT, kind_of, v1};
use ulmus_run::paths;
use ulmus_transport::{ConnectError, TokenSource};
use ulmus_types::{
    COORDINATOR_TIMEOUT, Digest, ErrorKind, ExitStatus, FileEntry, GroupRequest, HEARTBEAT_INTERVAL, Hello,
    RunId, Snapshot, ToCoordinator, ToWorker, WorkerId, nonce_digest,
};
use ulmus_worker_core::{Action, Session};

use crate::control::Control;
use crate::run::Run;
use crate::snapshot::PendingSnapshot;
use crate::trainer::{Command, Report};

/// Shortest pause between two attempts to connect.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause between two attempts to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Capacity of the queue of outgoing messages.
const QUEUE: usize = 1024;

/// Where the coordinator is.
#[derive(Debug, Clone)]
pub enum Join {
    /// At this address, `host:port`.
    Address(String),
    /// At the address in this file, which may change when the coordinator restarts.
    File(PathBuf),
}

/// What the worker says about itself in its hello.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) worker: WorkerId,
    pub(crate) address: String,
    pub(crate) device: String,
    pub(crate) threads: u32,
    pub(crate) memory: u64,
    pub(crate) only_jobs: bool,
}

/// What the agent is given when it starts.
pub(crate) struct Setup {
    pub(crate) join: Join,
    pub(crate) token: TokenSource,
    /// How long to look for a coordinator that was never reached.
    pub(crate) join_timeout: Duration,
    /// How long a worker that was asked to leave may take to hand over its work.
    pub(crate) grace: Duration,
    pub(crate) identity: Identity,
    pub(crate) control: Control,
    pub(crate) commands: Sender<Command>,
    pub(crate) reports: mpsc::Receiver<(RunId, Report)>,
}

/// The state of the agent's loop.
struct Agent {
    setup: Setup,
    session: Session<Arc<PendingSnapshot>>,
    run: Option<Run>,
    tasks: TaskTracker,
    done: mpsc::Sender<Done>,
    finished: mpsc::Receiver<Done>,
    outgoing: Option<mpsc::Sender<(Option<RunId>, ToCoordinator)>>,
    /// Number of connections so far, by which results of work for an earlier connection are recognized.
    connections: u64,
    /// Whether the coordinator of this connection has welcomed the worker.
    is_welcome: bool,
    /// Whether the worker has joined its run, on this connection or an earlier one.
    has_joined: bool,
    /// When the worker exits at the latest, once it was asked to leave.
    leave_by: Option<Instant>,
    /// Why this worker cannot join the run, if it cannot.
    unfit: Option<Failure>,
    /// Whether the last attempt found another coordinator at the address.
    displaced: bool,
    /// The last refusal that was logged, if trying again may help.
    refusal: Option<String>,
}

/// The result of work that was done outside the loop, and the run that it was done for.
#[expect(clippy::large_enum_variant, reason = "results are few, and moved once")]
enum Done {
    Hashed(RunId, Snapshot),
    /// A message to send.
    Message(RunId, ToCoordinator),
    /// Begins with the number of the connection.
    Opened(u64, RunId, Result<(Run, Digest), (ErrorKind, String)>),
}

/// How a connection ended.
enum Ended {
    /// The worker is done.
    Finished(ExitStatus),
    /// The connection broke, for this reason.
    Lost(String),
}

/// Works for a coordinator until its run is over.
///
/// # Errors
/// When the coordinator refuses this worker, or cannot be reached for too long.
pub(crate) async fn serve(setup: Setup, shutdown: &Shutdown) -> Result<ExitStatus, Failure> {
    let (done, finished) = mpsc::channel(QUEUE);
    let mut agent = Agent {
        setup,
        session: Session::default(),
        run: None,
        tasks: TaskTracker::new(),
        done,
        finished,
        outgoing: None,
        connections: 0,
        is_welcome: false,
        has_joined: false,
        leave_by: None,
        unfit: None,
        displaced: false,
        refusal: None,
    };
    let mut lost_since = Instant::now();
    let mut welcome = false;
    let mut pause = SHORTEST_PAUSE;
    loop {
        let began = Instant::now();
        let (ended, welcomed) = agent.connection(shutdown).await?;
        if let Some(failure) = agent.unfit.take() {
            return Err(failure);
        }
        let why = match ended {
            Ended::Finished(status) => return Ok(agent.finish(status)),
            Ended::Lost(why) => why,
        };
        if welcomed {
            (welcome, lost_since) = (true, Instant::now());
            // Only a session that lasted resets the pause, so that short ones do not make a busy loop.
            if began.elapsed() > LONGEST_PAUSE {
                pause = SHORTEST_PAUSE;
            }
            tracing::info!("lost the coordinator ({why}); looking for it");
        }
        let timeout = if welcome { COORDINATOR_TIMEOUT } else { agent.setup.join_timeout };
        if !welcome && agent.connections == 1 && agent.leave_by.is_none() {
            let timeout = humantime::format_duration(timeout);
            tracing::info!("no coordinator yet ({why}); looking for it for up to {timeout}");
        }
        if lost_since.elapsed() > timeout {
            let timeout = humantime::format_duration(timeout);
            let message =
                format!("no coordinator for {timeout}: {why}; check the address, and that it is running");
            let status = if agent.displaced { ExitStatus::Refused } else { ExitStatus::Unavailable };
            return Err(Failure::new(status, message));
        }
        if let Some(status) = agent.wait(pause, shutdown).await {
            return Ok(agent.finish(status));
        }
        if let Some(failure) = agent.unfit.take() {
            return Err(failure);
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl Agent {
    /// Waits between two connections, while the trainer continues. Returns the exit status if the worker ends.
    async fn wait(&mut self, pause: Duration, shutdown: &Shutdown) -> Option<ExitStatus> {
        let end = tokio::time::sleep(pause);
        tokio::pin!(end);
        loop {
            if self.leave_by.is_some() && self.session.is_free() {
                return Some(ExitStatus::Interrupted);
            }
            tokio::select! {
                biased;
                _ = shutdown.requested(), if self.leave_by.is_none() => self.drain(),
                () = sleep_until(self.leave_by) => return Some(self.leave_late()),
                () = &mut end => return None,
                Some((run, report)) = self.setup.reports.recv() => self.on_report(run, report),
                Some(done) = self.finished.recv() => self.on_done(done),
            }
        }
    }

    /// Logs that the worker is done.
    fn finish(&self, status: ExitStatus) -> ExitStatus {
        let run = self.run.as_ref().map_or("the run".to_owned(), |run| format!("run {}", run.plan.run.name));
        match status {
            ExitStatus::Done => tracing::info!("{run} is done"),
            ExitStatus::Interrupted if !self.has_joined => tracing::info!("stopped before a run was joined"),
            ExitStatus::Interrupted if self.leave_by.is_some() => tracing::info!("left {run}"),
            ExitStatus::Interrupted => tracing::info!("{run} was interrupted, and can be resumed"),
            status => tracing::info!("{run} ended with exit code {}", status.code()),
        }
        status
    }

    /// The worker was asked to leave: it finishes its step, hands over its work, and exits.
    fn drain(&mut self) {
        let grace = humantime::format_duration(self.setup.grace);
        tracing::info!("asked to leave; handing over within {grace}");
        self.leave_by = Some(Instant::now() + self.setup.grace);
        // Stop the group directly, since the coordinator may be away.
        self.setup.control.request_now(GroupRequest::Stop);
        for action in self.session.drain() {
            self.act(action);
        }
    }

    fn leave_late(&self) -> ExitStatus {
        if !self.session.is_free() {
            tracing::warn!(
                "no time left to hand over; what is not stored is lost unless other workers hold it"
            );
        }
        ExitStatus::Interrupted
    }

    /// Runs one connection from hello to its end. Also returns whether the worker was welcomed.
    async fn connection(&mut self, shutdown: &Shutdown) -> Result<(Ended, bool), Failure> {
        self.is_welcome = false;
        self.connections += 1;
        let connected = tokio::select! {
            biased;
            _ = shutdown.requested(), if self.leave_by.is_none() => {
                self.session.on_disconnected();
                self.drain();
                return Ok((Ended::Lost("asked to leave".to_owned()), false));
            }
            connected = self.connect() => connected,
        };
        let (outgoing, mut incoming) = match connected {
            Ok(streams) => streams,
            Err(Rejected::Later(why)) => {
                self.session.on_disconnected();
                return Ok((Ended::Lost(why), false));
            }
            Err(Rejected::Final(failure)) => return Err(failure),
        };
        self.outgoing = Some(outgoing);
        let mut heartbeat = tokio::time::interval(HEARTBEAT_INTERVAL);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ended = loop {
            tokio::select! {
                biased;
                _ = shutdown.requested(), if self.leave_by.is_none() => self.drain(),
                () = sleep_until(self.leave_by) => break Ok(Ended::Finished(self.leave_late())),
                message = incoming.message() => match message {
                    Ok(Some(message)) => match self.on_message(message) {
                        Ok(None) => {}
                        Ok(Some(ended)) => break Ok(ended),
                        Err(failure) => break Err(failure),
                    },
                    Ok(None) => break Ok(Ended::Lost("it closed the connection".to_owned())),
                    Err(status) => break Ok(Ended::Lost(status.message().to_owned())),
                },
                Some(done) = self.finished.recv() => self.on_done(done),
                Some((run, report)) = self.setup.reports.recv() => self.on_report(run, report),
                _ = heartbeat.tick() => {
                    self.send(ToCoordinator::Heartbeat(self.setup.control.heartbeat()));
                }
            }
        };
        self.outgoing = None;
        self.session.on_disconnected();
        ended.map(|ended| (ended, self.is_welcome))
    }

    async fn connect(
        &mut self,
    ) -> Result<(mpsc::Sender<(Option<RunId>, ToCoordinator)>, Streaming<v1::FromCoordinator>), Rejected>
    {
        let address = match &self.setup.join {
            Join::Address(address) => address.clone(),
            Join::File(path) => tokio::fs::read_to_string(path)
                .await
                .map_err(|error| Rejected::Later(format!("{}: {error}", path.display())))?,
        };
        let address = address.trim();
        self.displaced = false;
        let link = ulmus_transport::connect(address, &self.setup.token)
            .await
            .map_err(|error| self.rejected(&error))?;
        let (outgoing, messages) = mpsc::channel(QUEUE);
        let identity = self.setup.identity.clone();
        let (run, secret) = self.session.run().unzip();
        let hello = ToCoordinator::Hello(Hello {
            worker: identity.worker,
            version: ulmus_proto::VERSION.to_owned(),
            address: identity.address,
            device: identity.device,
            threads: identity.threads,
            pid: std::process::id(),
            run,
            secret,
            status: self.session.greet(),
            host: host(),
            memory: identity.memory,
            only_jobs: identity.only_jobs,
        });
        outgoing.try_send((run, hello)).expect("the channel is new");
        let messages = ReceiverStream::new(messages).map(v1::FromWorker::from);
        let mut client = CoordinatorClient::new(link.service()).max_decoding_message_size(MESSAGE_LIMIT);
        let incoming = client.session(messages).await.map_err(|status| match link.refusal(&status) {
            Some(error) => self.rejected(&error),
            None => match kind_of(&status) {
                ErrorKind::Retry => Rejected::Later(format!("{address}: {}", status.message())),
                kind => Rejected::Final(Failure::new(kind.into(), status.message().to_owned())),
            },
        })?;
        Ok((outgoing, incoming.into_inner()))
    }

    /// Decides whether to try again. Once welcomed, a worker waits for its own coordinator even if another one has
    /// taken the address.
    fn rejected(&mut self, error: &ConnectError) -> Rejected {
        self.displaced = error.kind() == ErrorKind::Refused && self.run.is_some();
        match error.kind() {
            kind if kind == ErrorKind::Retry || self.displaced => Rejected::Later(error.to_string()),
            kind => Rejected::Final(Failure::of(kind, error)),
        }
    }

    fn on_message(&mut self, message: v1::FromCoordinator) -> Result<Option<Ended>, Failure> {
        let message: ToWorker = match message.try_into() {
            Ok(message) => message,
            Err(error) => {
                let error: ulmus_proto::WireError = error;
                return Err(Failure::new(ExitStatus::Refused, error.to_string()));
            }
        };
        self.is_welcome |= matches!(message, ToWorker::Welcome { .. });
        for action in self.session.on_message(message) {
            match action {
                Action::Exit(status) => return Ok(Some(Ended::Finished(status))),
                // For instance, the coordinator has not noticed yet that an earlier life of this worker is over.
                Action::Refused(ErrorKind::Retry, reason) => {
                    if self.refusal.as_ref() != Some(&reason) {
                        tracing::warn!("refused, trying again: {reason}");
                        self.refusal = Some(reason.clone());
                    }
                    return Ok(Some(Ended::Lost(reason)));
                }
                Action::Refused(kind, reason) => return Err(Failure::new(kind.into(), reason)),
                action => self.act(action),
            }
        }
        Ok(None)
    }

    fn on_report(&mut self, run: RunId, report: Report) {
        for action in self.session.on_report(run, report) {
            self.act(action);
        }
    }

    /// Whether the worker still belongs to this run.
    fn is_current(&self, run: RunId) -> bool {
        self.session.run().is_some_and(|(id, _)| id == run)
    }

    fn on_done(&mut self, done: Done) {
        match done {
            Done::Message(run, message) if self.is_current(run) => self.send(message),
            Done::Hashed(run, snapshot) if self.is_current(run) => {
                for action in self.session.on_hashed(snapshot) {
                    self.act(action);
                }
            }
            // The connection has ended, or the worker belongs to another run by now.
            Done::Opened(connection, id, _) if connection != self.connections || !self.is_current(id) => {}
            Done::Opened(_, _, Ok((run, nonce))) => {
                self.send(ToCoordinator::StoreRead(Ok(nonce)));
                let known = self.run.as_ref().is_some_and(|known| known.digest() == run.digest());
                match self.session.on_opened(known) {
                    Some(actions) => actions.into_iter().for_each(|action| self.act(action)),
                    // The trainer is warming up, and will report when it is ready.
                    None if known => {}
                    None => self.command(Command::Warm(run.clone())),
                }
                self.run = Some(run);
            }
            Done::Opened(_, _, Err((ErrorKind::Retry, error))) => {
                tracing::info!("the run's store does not answer, trying again: {error}");
                // Nobody is to blame. The store is read again with a new connection.
                self.outgoing = None;
            }
            Done::Opened(_, _, Err((_, error))) => {
                self.send(ToCoordinator::StoreRead(Err(error)));
            }
            Done::Message(..) | Done::Hashed(..) => {}
        }
    }

    fn act(&mut self, action: Action<Arc<PendingSnapshot>>) {
        match action {
            Action::Send(message) => {
                if matches!(message, ToCoordinator::Ready(_)) {
                    self.log_joined();
                }
                self.send(message);
            }
            Action::ChangeRun => {
                tracing::warn!("the coordinator leads another run; dropping the work for the earlier one");
                self.setup.control.change_run();
                (self.run, self.has_joined) = (None, false);
            }
            Action::Open { id, plan, store } => self.open(id, plan, store),
            Action::Train(run, assignment) => self.command(Command::Train(run, assignment)),
            Action::RunJob(id, job) => {
                // Settings of stages may have changed since the trainer joined the run.
                if let Some(run) = self.run.clone().filter(|run| run.id == id) {
                    self.command(Command::Do(run, job));
                }
            }
            Action::Abort(generation) => self.setup.control.abort(generation),
            Action::Request(generation, request) => self.setup.control.request(generation, request),
            Action::Hash(held) => {
                let Some((run, _)) = self.session.run() else { return };
                let done = self.done.clone();
                self.tasks
                    .spawn_blocking(move || done.blocking_send(Done::Hashed(run, held.announce())).ok());
            }
            Action::Write(held, files) => self.write(held, files),
            Action::GiveUp(kind, message) => {
                let message = format!("cannot join the run: {message}");
                self.unfit = Some(Failure::new(kind.into(), message));
            }
            // These end the connection, and are handled in `on_message`.
            Action::Exit(_) | Action::Refused(..) => {}
        }
    }

    fn log_joined(&mut self) {
        let name = self.run.as_ref().map_or("", |run| run.plan.run.name.as_str());
        let verb = if std::mem::replace(&mut self.has_joined, true) { "rejoined" } else { "joined" };
        tracing::info!("{verb} run {name}");
    }

    /// Sends a message if there is a connection; the session remembers what must not be lost. Before its welcome a
    /// worker does not know which run the coordinator leads, and sends nothing but heartbeats.
    fn send(&mut self, message: ToCoordinator) {
        if !self.is_welcome && !matches!(message, ToCoordinator::Heartbeat(_)) {
            return;
        }
        let run = self.session.run().filter(|_| self.is_welcome).map(|(run, _)| run);
        if let Some(outgoing) = &self.outgoing
            && outgoing.try_send((run, message)).is_err()
        {
            // The stream is stuck. A new one will send everything again.
            self.outgoing = None;
        }
    }

    fn command(&self, command: Command) {
        // A trainer that is gone has panicked, and the end of its thread ends the process.
        self.setup.commands.send(command).ok();
    }

    /// Opens the run: reads the plan, and the nonce in the run's store, which proves that this worker can read the
    /// store.
    fn open(&self, id: RunId, plan: String, location: String) {
        let (done, connection) = (self.done.clone(), self.connections);
        self.tasks.spawn(async move {
            done.send(Done::Opened(connection, id, open(id, &plan, &location).await)).await.ok();
        });
    }

    /// Encodes and stores files of a state.
    fn write(&self, held: Arc<PendingSnapshot>, files: Vec<String>) {
        let Some((run, _)) = self.session.run() else { return };
        let done = self.done.clone();
        self.tasks.spawn(async move {
            let checkpoint = held.checkpoint;
            // The store of the state's own run, even if the worker belongs to another run by then.
            let store = held.store.clone();
            let message = match write(&store, held, files).await {
                Ok(files) => ToCoordinator::Written { checkpoint, files },
                Err((kind, message)) => ToCoordinator::WriteFailed { checkpoint, kind, message },
            };
            done.send(Done::Message(run, message)).await.ok();
        });
    }
}

/// The name of this machine.
pub(crate) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Why there is no connection, and whether to try again.
enum Rejected {
    Later(String),
    Final(Failure),
}

/// Waits until a point in time, or forever if there is none.
async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

async fn open(id: RunId, plan: &str, location: &str) -> Result<(Run, Digest), (ErrorKind, String)> {
    let wrong = |problem: String| (ErrorKind::InvalidInput, problem);
    let plan = ulmus_plan::read(plan, &[])
        .map_err(|problems| wrong(problems.to_string()))?
        .pop()
        .ok_or_else(|| wrong("the plan is empty".to_owned()))?;
    let failed = |error: StoreError| (error.kind(), with_causes(&error));
    let store = Store::open(location).map_err(failed)?;
    let nonce = nonce_digest(&store.get(paths::NONCE).await.map_err(failed)?);
    Ok((Run::new(id, plan, store, Handle::current()), nonce))
}

async fn write(
    store: &Store,
    held: Arc<PendingSnapshot>,
    files: Vec<String>,
) -> Result<BTreeMap<String, FileEntry>, (ErrorKind, String)> {
    let defect = |message: String| (ErrorKind::Internal, message);
    let mut written = BTreeMap::new();
    for file in files {
        let (encoded, name) = (Arc::clone(&held), file.clone());
        let contents = tokio::task::spawn_blocking(move || encoded.encode(&name))
            .await
            .map_err(|error| defect(error.to_string()))?
            .map_err(|error| (error.kind(), with_causes(&error)))?
            .ok_or_else(|| defect(format!("{} has no file {file}", held.checkpoint)))?;
        let entry = write_part(store, held.checkpoint, &file, contents)
            .await
            .map_err(|error| (error.kind(), with_causes(&error)))?;
        written.insert(file, entry);
    }
    Ok(written)
}
