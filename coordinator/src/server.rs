//! The gRPC end of worker sessions. It only turns streams into events for the driver.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use ulmus_proto::v1::coordinator_server;
use ulmus_proto::{from_worker, status_of, v1};
use ulmus_transport::Caller;
use ulmus_types::{ErrorKind, Hello, RunId, ToCoordinator, ToWorker, WorkerId};

/// Number of messages that may wait for a worker. A worker with a full queue is disconnected; normal traffic, a few
/// messages per step, never comes near the limit.
const OUTBOX: usize = 1024;

/// Distinguishes the connections of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionNumber(pub(crate) u64);

/// What happens in sessions, for the driver.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    /// A worker opened a session.
    Opened {
        /// Its session.
        session: SessionNumber,
        /// Its first message.
        hello: Hello,
        /// Queue of messages to the worker. Dropping it ends the session.
        outbox: mpsc::Sender<ToWorker>,
    },
    /// A message from a worker arrived.
    Received {
        /// Its session.
        session: SessionNumber,
        /// The worker.
        worker: WorkerId,
        /// The run that the message is about.
        run: Option<RunId>,
        /// The message.
        message: ToCoordinator,
    },
    /// A session ended.
    Closed {
        /// The session.
        session: SessionNumber,
        /// The worker.
        worker: WorkerId,
    },
}

/// The gRPC service.
#[derive(Debug)]
pub(crate) struct Sessions {
    events: mpsc::Sender<SessionEvent>,
    tasks: TaskTracker,
    count: std::sync::atomic::AtomicU64,
}

impl Sessions {
    /// A service that sends `events` to the driver. Its tasks are tracked by `tasks`.
    pub(crate) fn new(events: mpsc::Sender<SessionEvent>, tasks: TaskTracker) -> Self {
        Self { events, tasks, count: std::sync::atomic::AtomicU64::new(0) }
    }
}

#[tonic::async_trait]
impl coordinator_server::Coordinator for Sessions {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<v1::FromCoordinator, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::FromWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = Caller::of(&request)?;
        let mut incoming = request.into_inner();
        let Some((_, ToCoordinator::Hello(hello))) = next(&mut incoming).await? else {
            return Err(no_hello());
        };
        caller.admit();
        let session = SessionNumber(self.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let worker = hello.worker.clone();
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        self.send(SessionEvent::Opened { session, hello, outbox }).await?;
        let events = self.events.clone();
        self.tasks.spawn(async move {
            // If the stream ends, breaks or carries an unreadable message, the session is over and the worker must
            // reconnect.
            while let Ok(Some((run, message))) = next(&mut incoming).await {
                let received = SessionEvent::Received { session, worker: worker.clone(), run, message };
                if events.send(received).await.is_err() {
                    return;
                }
            }
            // If the driver is already gone, nobody needs to know.
            events.send(SessionEvent::Closed { session, worker }).await.ok();
        });
        let outgoing = ReceiverStream::new(outgoing).map(|message| Ok(message.into()));
        Ok(Response::new(Box::pin(outgoing)))
    }
}

impl Sessions {
    async fn send(&self, event: SessionEvent) -> Result<(), Status> {
        self.events
            .send(event)
            .await
            .map_err(|_| status_of(ErrorKind::Retry, "the coordinator is shutting down"))
    }
}

fn no_hello() -> Status {
    status_of(ErrorKind::InvalidInput, "the first message of a session must be a hello")
}

async fn next(
    incoming: &mut Streaming<v1::FromWorker>,
) -> Result<Option<(Option<RunId>, ToCoordinator)>, Status> {
    let Some(message) = incoming.message().await? else { return Ok(None) };
    from_worker(message).map(Some).map_err(|error| status_of(ErrorKind::InvalidInput, error.to_string()))
}
