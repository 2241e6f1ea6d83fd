//! The shell around the session: connects, carries messages, and joins again when the connection is lost.

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
    Digest, ErrorKind, ExitStatus, FileEntry, GroupRequest, HEARTBEAT_INTERVAL, Hello, RunId, Snapshot,
    ToCoordinator, ToWorker, WorkerId, nonce_digest,
};
use ulmus_worker_core::{Action, Session};

use crate::control::Control;
use crate::run::Run;
use crate::snapshot::PendingSnapshot;
use crate::trainer::{Command, Report};

/// How long a worker that was once welcome looks for its coordinator.
const ALONE: Duration = Duration::from_mins(5);
/// First pause before another try to connect.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause between two tries to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Messages on their way out.
const OUTGOING: usize = 1024;

/// Where the coordinator is.
#[derive(Debug, Clone)]
pub enum Join {
    /// At this address, `host:port`.
    Address(String),
    /// Where this file says; it may change when the coordinator is started again.
    File(PathBuf),
}

/// Who this worker is.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) worker: WorkerId,
    pub(crate) address: String,
    pub(crate) device: String,
    pub(crate) threads: u32,
}

/// What the loop is given.
pub(crate) struct Parts {
    pub(crate) join: Join,
    pub(crate) token: TokenSource,
    /// How long to look for a coordinator that was never reached.
    pub(crate) join_timeout: Duration,
    /// How long a worker that was asked to leave may take to hand over.
    pub(crate) grace: Duration,
    pub(crate) identity: Identity,
    pub(crate) control: Control,
    pub(crate) commands: Sender<Command>,
    pub(crate) reports: mpsc::Receiver<(RunId, Report)>,
}

/// The loop's state.
struct Agent {
    parts: Parts,
    session: Session<Arc<PendingSnapshot>>,
    run: Option<Run>,
    tasks: TaskTracker,
    done: mpsc::Sender<Done>,
    finished: mpsc::Receiver<Done>,
    outgoing: Option<mpsc::Sender<(Option<RunId>, ToCoordinator)>>,
    /// Connections so far: what was found out for an earlier one is not told to the next.
    connections: u64,
    /// Whether the coordinator of this connection has said which run it leads.
    is_welcome: bool,
    /// Until when the worker has to be gone, once it was asked to leave.
    leave_by: Option<Instant>,
    /// Why the run cannot be taken up here.
    unfit: Option<Failure>,
    /// Whether somebody else was found last where the coordinator of this worker's run was.
    displaced: bool,
    /// The last refusal that another try may change.
    refusal: Option<String>,
}

/// Work that went on beside the loop, and the run that it was for.
enum Done {
    Hashed(RunId, Snapshot),
    Said(RunId, ToCoordinator),
    /// For which connection, too.
    Opened(u64, RunId, Result<(Run, Digest), (ErrorKind, String)>),
}

/// How a connection ended.
enum Ended {
    /// The worker is done.
    Finished(ExitStatus),
    /// The connection broke; join again.
    Lost(String),
}

/// Works for a coordinator until its run is over.
///
/// # Errors
/// When the coordinator refuses this worker, or cannot be reached for too long.
pub(crate) async fn serve(parts: Parts, shutdown: &Shutdown) -> Result<ExitStatus, Failure> {
    let (done, finished) = mpsc::channel(OUTGOING);
    let mut agent = Agent {
        parts,
        session: Session::default(),
        run: None,
        tasks: TaskTracker::new(),
        done,
        finished,
        outgoing: None,
        connections: 0,
        is_welcome: false,
        leave_by: None,
        unfit: None,
        displaced: false,
        refusal: None,
    };
    let mut alone_since = Instant::now();
    let mut welcome = false;
    let mut pause = SHORTEST_PAUSE;
    loop {
        let began = Instant::now();
        let (ended, welcomed) = agent.connection(shutdown).await?;
        if let Some(failure) = agent.unfit.take() {
            return Err(failure);
        }
        let why = match ended {
            Ended::Finished(status) => return Ok(status),
            Ended::Lost(why) => why,
        };
        if welcomed {
            (welcome, alone_since) = (true, Instant::now());
            // One that welcomes and ends the session again and again is not asked faster and faster.
            if began.elapsed() > LONGEST_PAUSE {
                pause = SHORTEST_PAUSE;
            }
            tracing::info!(why, "the coordinator is gone; looking for it");
        }
        let patience = if welcome { ALONE } else { agent.parts.join_timeout };
        if alone_since.elapsed() > patience {
            let message =
                format!("no coordinator for {patience:?}: {why}; check the address, and that it is running");
            let status = if agent.displaced { ExitStatus::Refused } else { ExitStatus::Unavailable };
            return Err(Failure::new(status, message));
        }
        if let Some(status) = agent.wait(pause, shutdown).await {
            return Ok(status);
        }
        if let Some(failure) = agent.unfit.take() {
            return Err(failure);
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl Agent {
    /// Lets time pass between two connections; the trainer goes on and is heard. How the worker ends, if it does.
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
                () = passed(self.leave_by) => return Some(self.leave_unheard()),
                () = &mut end => return None,
                Some((run, report)) = self.parts.reports.recv() => self.reported(run, report),
                Some(done) = self.finished.recv() => self.has_done(done),
            }
        }
    }

    /// The worker was asked to leave: it finishes its step, hands over what it has, and goes.
    fn drain(&mut self) {
        tracing::info!(grace = ?self.parts.grace, "asked to leave; handing over");
        self.leave_by = Some(Instant::now() + self.parts.grace);
        // The group need not hear of it from the coordinator, which may be away.
        self.parts.control.request_now(GroupRequest::Stop);
        for action in self.session.drain() {
            self.act(action);
        }
    }

    fn leave_unheard(&self) -> ExitStatus {
        if !self.session.is_free() {
            tracing::warn!(
                "the time to hand over has passed; what was not stored is with the others, or lost"
            );
        }
        ExitStatus::Interrupted
    }

    /// One connection from hello to its end; also tells whether the worker was welcome.
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
                () = passed(self.leave_by) => break Ok(Ended::Finished(self.leave_unheard())),
                message = incoming.message() => match message {
                    Ok(Some(message)) => match self.received(message) {
                        Ok(None) => {}
                        Ok(Some(ended)) => break Ok(ended),
                        Err(failure) => break Err(failure),
                    },
                    Ok(None) => break Ok(Ended::Lost("it closed the connection".to_owned())),
                    Err(status) => break Ok(Ended::Lost(status.message().to_owned())),
                },
                Some(done) = self.finished.recv() => self.has_done(done),
                Some((run, report)) = self.parts.reports.recv() => self.reported(run, report),
                _ = heartbeat.tick() => {
                    self.say(ToCoordinator::Heartbeat(self.parts.control.heartbeat()));
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
        let address = match &self.parts.join {
            Join::Address(address) => address.clone(),
            Join::File(path) => tokio::fs::read_to_string(path)
                .await
                .map_err(|error| Rejected::Later(format!("{}: {error}", path.display())))?,
        };
        let address = address.trim();
        self.displaced = false;
        let link = ulmus_transport::connect(address, &self.parts.token)
            .await
            .map_err(|error| self.rejected(&error))?;
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let identity = self.parts.identity.clone();
        let (run, secret) = self.session.run().unzip();
        let hello = ToCoordinator::Hello(Hello {
            worker: identity.worker,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            address: identity.address,
            device: identity.device,
            threads: identity.threads,
            pid: std::process::id(),
            run,
            secret,
            status: self.session.greet(),
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

    /// Once it was welcome, a worker waits for its own coordinator, whoever has the address meanwhile.
    fn rejected(&mut self, error: &ConnectError) -> Rejected {
        self.displaced = error.kind() == ErrorKind::Refused && self.run.is_some();
        match error.kind() {
            kind if kind == ErrorKind::Retry || self.displaced => Rejected::Later(error.to_string()),
            kind => Rejected::Final(Failure::of(kind, error)),
        }
    }

    fn received(&mut self, message: v1::FromCoordinator) -> Result<Option<Ended>, Failure> {
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
                // The name is still taken by a life of this worker that the coordinator has not given up yet.
                Action::Refused(ErrorKind::Retry, reason) => {
                    if self.refusal.as_ref() != Some(&reason) {
                        tracing::warn!(reason, "refused; trying again");
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

    fn reported(&mut self, run: RunId, report: Report) {
        for action in self.session.on_report(run, report) {
            self.act(action);
        }
    }

    /// Whether something is of the run that the worker belongs to now.
    fn is_current(&self, run: RunId) -> bool {
        self.session.run().is_some_and(|(id, _)| id == run)
    }

    fn has_done(&mut self, done: Done) {
        match done {
            Done::Said(run, message) if self.is_current(run) => self.say(message),
            Done::Hashed(run, snapshot) if self.is_current(run) => {
                for action in self.session.on_hashed(snapshot) {
                    self.act(action);
                }
            }
            // Of a connection that has ended, or of a run that is no longer this worker's.
            Done::Opened(connection, id, _) if connection != self.connections || !self.is_current(id) => {}
            Done::Opened(_, _, Ok((run, nonce))) => {
                self.say(ToCoordinator::StoreRead(Ok(nonce)));
                let known = self.run.as_ref().is_some_and(|known| known.digest() == run.digest());
                match self.session.on_opened(known) {
                    Some(actions) => actions.into_iter().for_each(|action| self.act(action)),
                    // The trainer is at it, and will say so.
                    None if known => {}
                    None => self.command(Command::Warm(run.clone())),
                }
                self.run = Some(run);
            }
            Done::Opened(_, _, Err((ErrorKind::Retry, error))) => {
                tracing::info!(error, "the run's store does not answer");
                // Nobody is to blame: it is asked again with a new connection.
                self.outgoing = None;
            }
            Done::Opened(_, _, Err((_, error))) => {
                self.say(ToCoordinator::StoreRead(Err(error)));
            }
            Done::Said(..) | Done::Hashed(..) => {}
        }
    }

    fn act(&mut self, action: Action<Arc<PendingSnapshot>>) {
        match action {
            Action::Send(message) => self.say(message),
            Action::ChangeRun => {
                tracing::warn!(
                    "the coordinator leads another run; what this worker had of the one before is dropped"
                );
                self.parts.control.change_run();
                self.run = None;
            }
            Action::Open { id, plan, store } => self.open(id, plan, store),
            Action::Train(run, assignment) => self.command(Command::Train(run, assignment)),
            Action::RunJob(run, job) => self.command(Command::Do(run, job)),
            Action::Abort(generation) => self.parts.control.abort(generation),
            Action::Request(generation, request) => self.parts.control.request(generation, request),
            Action::Hash(held) => {
                let Some((run, _)) = self.session.run() else { return };
                let done = self.done.clone();
                self.tasks
                    .spawn_blocking(move || done.blocking_send(Done::Hashed(run, held.announce())).ok());
            }
            Action::Write(held, files) => self.write(held, files),
            Action::GiveUp(kind, message) => {
                let message = format!("cannot take up the run: {message}");
                self.unfit = Some(Failure::new(kind.into(), message));
            }
            // These end the connection and are dealt with where they come in.
            Action::Exit(_) | Action::Refused(..) => {}
        }
    }

    /// Says something, if somebody listens. What must not be lost is remembered by the session. Before its welcome a
    /// worker does not know whom it speaks to, and says no more than that it lives.
    fn say(&mut self, message: ToCoordinator) {
        if !self.is_welcome && !matches!(message, ToCoordinator::Heartbeat(_)) {
            return;
        }
        let run = self.session.run().filter(|_| self.is_welcome).map(|(run, _)| run);
        if let Some(outgoing) = &self.outgoing
            && outgoing.try_send((run, message)).is_err()
        {
            // The stream stands still; a new one says everything again.
            self.outgoing = None;
        }
    }

    fn command(&self, command: Command) {
        // A trainer that is gone has panicked; its thread's end ends the process.
        self.parts.commands.send(command).ok();
    }

    /// Reads the nonce in the run's store, which proves that this worker sees it, and takes up the plan.
    fn open(&self, id: RunId, plan: String, location: String) {
        let (done, connection) = (self.done.clone(), self.connections);
        self.tasks.spawn(async move {
            done.send(Done::Opened(connection, id, open(id, &plan, &location).await)).await.ok();
        });
    }

    /// Encodes and stores parts of a state.
    fn write(&self, held: Arc<PendingSnapshot>, files: Vec<String>) {
        let Some((run, _)) = self.session.run() else { return };
        let done = self.done.clone();
        self.tasks.spawn(async move {
            let checkpoint = held.checkpoint;
            // Where the run lies that the state is of, whichever this worker belongs to by then.
            let store = held.store.clone();
            let message = match write(&store, held, files).await {
                Ok(files) => ToCoordinator::Written { checkpoint, files },
                Err((kind, message)) => ToCoordinator::WriteFailed { checkpoint, kind, message },
            };
            done.send(Done::Said(run, message)).await.ok();
        });
    }
}

/// Why there is no connection.
enum Rejected {
    Later(String),
    Final(Failure),
}

/// Waits until a moment has come; for ever if there is none.
async fn passed(moment: Option<Instant>) {
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
