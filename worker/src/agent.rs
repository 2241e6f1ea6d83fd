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
use tonic::transport::Endpoint;
use ulmus_checkpoint::{Store, StoreError, write_part};
use ulmus_proto::v1::coordinator_client::CoordinatorClient;
use ulmus_proto::{kind_of, v1};
use ulmus_rt::{Failure, Shutdown, with_causes};
use ulmus_types::{ErrorKind, ExitStatus, FileEntry, Hello, Snapshot, ToCoordinator, ToWorker, WorkerId};

use crate::control::Control;
use crate::run::Run;
use crate::session::{Action, Session};
use crate::snapshot::Held;
use crate::trainer::{Command, Report};

/// How often a worker tells that it lives.
const BEAT: Duration = Duration::from_secs(1);
/// How long a worker that was once welcome looks for its coordinator.
const ALONE: Duration = Duration::from_mins(5);
/// Longest pause between two tries to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Messages on their way out.
const OUTGOING: usize = 1024;
/// Largest message: a resolved plan with thousands of file names.
const MESSAGE_LIMIT: usize = 16 << 20;

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
    /// How long to look for a coordinator that was never reached.
    pub(crate) join_timeout: Duration,
    pub(crate) identity: Identity,
    pub(crate) control: Control,
    pub(crate) commands: Sender<Command>,
    pub(crate) reports: mpsc::Receiver<Report>,
}

/// The loop's state.
struct Agent {
    parts: Parts,
    session: Session,
    run: Option<Run>,
    tasks: TaskTracker,
    done: mpsc::Sender<Done>,
    finished: mpsc::Receiver<Done>,
    outgoing: Option<mpsc::Sender<ToCoordinator>>,
}

/// Work that went on beside the loop.
enum Done {
    Hashed(Snapshot),
    Said(ToCoordinator),
    Opened(Result<Run, (ErrorKind, String)>, String),
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
    };
    let mut alone_since = Instant::now();
    let mut welcome = false;
    let mut pause = Duration::from_millis(50);
    loop {
        let (ended, welcomed) = tokio::select! {
            biased;
            () = shutdown.requested() => return Ok(ExitStatus::Interrupted),
            ended = agent.connection() => ended?,
        };
        let why = match ended {
            Ended::Finished(status) => return Ok(status),
            Ended::Lost(why) => why,
        };
        if welcomed {
            (welcome, alone_since, pause) = (true, Instant::now(), Duration::from_millis(50));
            tracing::info!(why, "the coordinator is gone; looking for it");
        }
        let patience = if welcome { ALONE } else { agent.parts.join_timeout };
        if alone_since.elapsed() > patience {
            let message =
                format!("no coordinator for {patience:?}: {why}; check the address, and that it is running");
            return Err(Failure::new(ExitStatus::Unavailable, message));
        }
        agent.wait(pause, shutdown).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl Agent {
    /// Lets time pass between two connections; the trainer goes on and is heard.
    async fn wait(&mut self, pause: Duration, shutdown: &Shutdown) {
        let end = tokio::time::sleep(pause);
        tokio::pin!(end);
        loop {
            tokio::select! {
                biased;
                () = shutdown.requested() => return,
                () = &mut end => return,
                Some(report) = self.parts.reports.recv() => self.reported(report),
                Some(done) = self.finished.recv() => self.has_done(done),
            }
        }
    }

    /// One connection from hello to its end; also tells whether the worker was welcome.
    async fn connection(&mut self) -> Result<(Ended, bool), Failure> {
        let (outgoing, mut incoming) = match self.connect().await {
            Ok(streams) => streams,
            Err(Rejected::Later(why)) => return Ok((Ended::Lost(why), false)),
            Err(Rejected::Final(failure)) => return Err(failure),
        };
        self.outgoing = Some(outgoing);
        self.session.unheard();
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut welcome = false;
        let ended = loop {
            tokio::select! {
                biased;
                message = incoming.message() => match message {
                    Ok(Some(message)) => match self.received(message) {
                        Ok(None) => welcome = true,
                        Ok(Some(ended)) => break Ok(ended),
                        Err(failure) => break Err(failure),
                    },
                    Ok(None) => break Ok(Ended::Lost("it closed the connection".to_owned())),
                    Err(status) => break Ok(Ended::Lost(status.message().to_owned())),
                },
                Some(done) = self.finished.recv() => self.has_done(done),
                Some(report) = self.parts.reports.recv() => self.reported(report),
                _ = beat.tick() => self.say(ToCoordinator::Beat { collective: self.parts.control.entered() }),
            }
        };
        self.outgoing = None;
        self.session.unheard();
        ended.map(|ended| (ended, welcome))
    }

    async fn connect(
        &mut self,
    ) -> Result<(mpsc::Sender<ToCoordinator>, Streaming<v1::FromCoordinator>), Rejected> {
        let address = match &self.parts.join {
            Join::Address(address) => address.clone(),
            Join::File(path) => tokio::fs::read_to_string(path)
                .await
                .map_err(|error| Rejected::Later(format!("{}: {error}", path.display())))?,
        };
        let address = address.trim();
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| {
            let message = format!("{address:?} is no address: {error}; write --join HOST:PORT");
            Rejected::Final(Failure::new(ExitStatus::InvalidInput, message))
        })?;
        let later = |error: &dyn std::error::Error| Rejected::Later(format!("{address}: {error}"));
        let channel = endpoint
            .connect_timeout(Duration::from_secs(3))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .connect()
            .await
            .map_err(|error| later(&error))?;
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let identity = self.parts.identity.clone();
        let hello = ToCoordinator::Hello(Hello {
            worker: identity.worker,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            address: identity.address,
            device: identity.device,
            threads: identity.threads,
            pid: std::process::id(),
            status: self.session.status(),
        });
        outgoing.try_send(hello).expect("the channel is new");
        let messages = ReceiverStream::new(messages).map(v1::FromWorker::from);
        let incoming = CoordinatorClient::new(channel)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .session(messages)
            .await
            .map_err(|status| match kind_of(&status) {
                ErrorKind::Retry => Rejected::Later(format!("{address}: {}", status.message())),
                kind => Rejected::Final(Failure::new(kind.into(), status.message().to_owned())),
            })?;
        Ok((outgoing, incoming.into_inner()))
    }

    fn received(&mut self, message: v1::FromCoordinator) -> Result<Option<Ended>, Failure> {
        let message: ToWorker = match message.try_into() {
            Ok(message) => message,
            Err(error) => {
                let error: ulmus_proto::WireError = error;
                return Err(Failure::new(ExitStatus::Refused, error.to_string()));
            }
        };
        for action in self.session.received(message) {
            match action {
                Action::Leave => {
                    return Ok(Some(Ended::Finished(ExitStatus::Done)));
                }
                // The name is still taken by a life of this worker that the coordinator has not given up yet.
                Action::Refused(ErrorKind::Retry, reason) => return Ok(Some(Ended::Lost(reason))),
                Action::Refused(kind, reason) => return Err(Failure::new(kind.into(), reason)),
                action => self.act(action),
            }
        }
        Ok(None)
    }

    fn reported(&mut self, report: Report) {
        for action in self.session.reported(report) {
            self.act(action);
        }
    }

    fn has_done(&mut self, done: Done) {
        match done {
            Done::Said(message) => self.say(message),
            Done::Hashed(snapshot) => {
                for action in self.session.hashed(snapshot) {
                    self.act(action);
                }
            }
            Done::Opened(Ok(run), nonce) => {
                self.say(ToCoordinator::StoreRead(Ok(nonce)));
                let known = self.run.as_ref().is_some_and(|known| known.digest() == run.digest());
                let ready = if known { self.session.opened() } else { None };
                match ready {
                    Some(actions) => actions.into_iter().for_each(|action| self.act(action)),
                    None => self.command(Command::Warm(run.clone())),
                }
                self.run = Some(run);
            }
            Done::Opened(Err((ErrorKind::Retry, error)), _) => {
                tracing::info!(error, "the run's store does not answer");
                // Nobody is to blame: it is asked again with a new connection.
                self.outgoing = None;
            }
            Done::Opened(Err((_, error)), _) => self.say(ToCoordinator::StoreRead(Err(error))),
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Say(message) => self.say(message),
            Action::Open { plan, store, nonce_path } => self.open(plan, store, nonce_path),
            Action::Command(command) => self.command(command),
            Action::Abort(generation) => self.parts.control.abort(generation),
            Action::Wish(generation, wish) => self.parts.control.wish(generation, wish),
            Action::Hash(held) => {
                let done = self.done.clone();
                self.tasks.spawn_blocking(move || done.blocking_send(Done::Hashed(held.announce())).ok());
            }
            Action::Write(held, files) => self.write(held, files),
            // These end the connection and are dealt with where they come in.
            Action::Leave | Action::Refused(..) => {}
        }
    }

    /// Says something, if somebody listens. What must not be lost is remembered by the session.
    fn say(&mut self, message: ToCoordinator) {
        if let Some(outgoing) = &self.outgoing
            && outgoing.try_send(message).is_err()
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
    fn open(&self, plan: String, location: String, nonce_path: String) {
        let done = self.done.clone();
        self.tasks.spawn(async move {
            let opened = open(&plan, &location, &nonce_path).await;
            let (run, nonce) = match opened {
                Ok((run, nonce)) => (Ok(run), nonce),
                Err(error) => (Err(error), String::new()),
            };
            done.send(Done::Opened(run, nonce)).await.ok();
        });
    }

    /// Encodes and stores parts of a state.
    fn write(&self, held: Arc<Held>, files: Vec<String>) {
        let Some(store) = self.run.as_ref().map(|run| run.store.clone()) else { return };
        let done = self.done.clone();
        self.tasks.spawn(async move {
            let checkpoint = held.checkpoint;
            let message = match write(&store, held, files).await {
                Ok(files) => ToCoordinator::Written { checkpoint, files },
                Err(message) => ToCoordinator::WriteFailed { checkpoint, message },
            };
            done.send(Done::Said(message)).await.ok();
        });
    }
}

/// Why there is no connection.
enum Rejected {
    Later(String),
    Final(Failure),
}

async fn open(plan: &str, location: &str, nonce_path: &str) -> Result<(Run, String), (ErrorKind, String)> {
    let wrong = |problem: String| (ErrorKind::InvalidInput, problem);
    let plan = ulmus_plan::read(plan, &[])
        .map_err(|problems| wrong(problems.to_string()))?
        .pop()
        .ok_or_else(|| wrong("the plan is empty".to_owned()))?;
    let failed = |error: StoreError| (error.kind(), with_causes(&error));
    let store = Store::open(location).map_err(failed)?;
    let nonce = store.get(nonce_path).await.map_err(failed)?;
    let nonce = String::from_utf8_lossy(&nonce).into_owned();
    Ok((Run::new(plan, store, Handle::current()), nonce))
}

async fn write(
    store: &Store,
    held: Arc<Held>,
    files: Vec<String>,
) -> Result<BTreeMap<String, FileEntry>, String> {
    let mut written = BTreeMap::new();
    for file in files {
        let (encoded, name) = (Arc::clone(&held), file.clone());
        let contents = tokio::task::spawn_blocking(move || encoded.encode(&name))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?
            .ok_or_else(|| format!("{} has no file {file}", held.checkpoint))?;
        let entry =
            write_part(store, held.checkpoint, &file, contents).await.map_err(|error| with_causes(&error))?;
        written.insert(file, entry);
    }
    Ok(written)
}
