//! The coordinator's end: accepts connections, and lets nobody in who has not proved that he knows the token.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::{Interceptor, InterceptorLayer, Routes};
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

use crate::credentials::Credentials;
use crate::gate::{Gate, Limits, Ticket};
use crate::token::JoinToken;

/// How long nothing is accepted after the system had no file or no memory for it.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections that the kernel keeps until they are accepted.
const BACKLOG: u32 = 1024;
/// Streams of a connection. A worker has one.
const STREAMS: u32 = 4;
/// Bytes of all headers of a request. A worker sends some 300.
const HEADERS: u32 = 8 << 10;
/// How often a peer has to answer that takes part in a session. Heartbeats notice a dead worker before.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// An address that nobody else has, and at which nobody can connect yet: what newcomers need to find is put in its
/// place meanwhile.
#[derive(Debug)]
pub struct Bound(TcpSocket);

impl Bound {
    /// Takes an address.
    ///
    /// # Errors
    /// When it is in use, or not one of this machine.
    pub fn new(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A coordinator that starts again need not wait until the connections of the last one are forgotten.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok(Self(socket))
    }

    /// The address, with the port that the system chose if none was given.
    ///
    /// # Errors
    /// When the system does not tell it.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Lets others connect.
    ///
    /// # Errors
    /// When somebody else listens at the address.
    pub fn listen(self) -> io::Result<TcpListener> {
        self.0.listen(BACKLOG)
    }
}

/// The other side of a connection, as handlers find it among a request's extensions.
#[derive(Debug, Clone)]
pub struct Caller {
    address: SocketAddr,
    ticket: Arc<Ticket>,
}

impl Caller {
    /// Who made a request.
    ///
    /// # Errors
    /// When it did not come in through [`serve`].
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("the request came in past the transport"))
    }

    /// Its address.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// It has said hello. The connection has no deadline any more, and no longer counts among those that wait.
    pub fn admit(&self) {
        self.ticket.admit();
    }
}

/// Serves `routes` to those that prove the token, until `closed`; then waits for the streams that are left.
///
/// # Errors
/// When the server cannot run.
pub async fn serve(
    listener: TcpListener,
    routes: Routes,
    credentials: &Credentials,
    limits: Limits,
    closed: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (accepted, incoming) = mpsc::channel(1);
    let entrance = Entrance {
        acceptor: TlsAcceptor::from(credentials.identity.tls()),
        limits,
        handshakes: Gate::new(limits),
        hellos: Gate::new(limits),
        accepted,
    };
    let accepting = accept(listener, entrance);
    let incoming = ReceiverStream::new(incoming).map(Ok::<_, Infallible>);
    let serving = Server::builder()
        .layer(InterceptorLayer::new(Guard(credentials.token.clone())))
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .max_concurrent_streams(STREAMS)
        .http2_max_header_list_size(HEADERS)
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, closed);
    tokio::join!(serving, accepting).0
}

/// The way of a connection to the server.
#[derive(Clone)]
struct Entrance {
    acceptor: TlsAcceptor,
    limits: Limits,
    handshakes: Arc<Gate>,
    hellos: Arc<Gate>,
    accepted: mpsc::Sender<Connection>,
}

/// Accepts connections for as long as somebody takes them.
async fn accept(listener: TcpListener, entrance: Entrance) {
    let mut handshakes = JoinSet::new();
    let mut refused = false;
    loop {
        let connected = tokio::select! {
            biased;
            () = entrance.accepted.closed() => break,
            Some(_) = handshakes.join_next() => continue,
            connected = listener.accept() => connected,
        };
        match connected {
            Ok((stream, address)) => {
                refused = false;
                let ticket = entrance.handshakes.enter(address.ip());
                handshakes.spawn(entrance.clone().shake_hands(stream, address, ticket));
            }
            // It was gone before it was accepted.
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(%error, "no connection can be accepted");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    entrance.hellos.close();
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

impl Entrance {
    /// Brings a connection to where it is encrypted, and hands it on.
    async fn shake_hands(self, stream: TcpStream, address: SocketAddr, ticket: Ticket) {
        let shake = async {
            stream.set_nodelay(true)?;
            tokio::time::timeout(self.limits.handshake, self.acceptor.accept(stream)).await?
        };
        // What went wrong is not worth a line: strangers could fill the log.
        let Some(Ok(stream)) = ticket.pushed_out().run_until_cancelled(shake).await else { return };
        let ticket = Arc::new(self.hellos.enter(address.ip()));
        let connection = Connection::new(stream, Caller { address, ticket }, self.limits.hello);
        // Otherwise the server has ended.
        self.accepted.send(connection).await.ok();
    }
}

/// An encrypted connection. Until it is admitted it breaks at its deadline, or when it is pushed out.
struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    limit: Option<Limit>,
}

/// What breaks a connection.
struct Limit {
    deadline: Pin<Box<Sleep>>,
    pushed_out: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Connection {
    fn new(stream: TlsStream<TcpStream>, caller: Caller, within: Duration) -> Self {
        let limit = Limit {
            deadline: Box::pin(tokio::time::sleep(within)),
            pushed_out: Box::pin(caller.ticket.pushed_out().clone().cancelled_owned()),
        };
        Self { stream, caller, limit: Some(limit) }
    }

    /// The stream, if it may still be used. Also has the task woken when it may be no longer.
    fn stream(&mut self, context: &mut Context<'_>) -> io::Result<Pin<&mut TlsStream<TcpStream>>> {
        if self.caller.ticket.is_admitted() {
            self.limit = None;
        }
        if let Some(limit) = &mut self.limit {
            let late = limit.deadline.as_mut().poll(context).is_ready();
            if late || limit.pushed_out.as_mut().poll(context).is_ready() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(Pin::new(&mut self.stream))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream(context)?.poll_read(context, buffer)
    }
}

// Whoever does not take what is sent to him must not escape his deadline.
impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream(context)?.poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(context)?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(context)?.poll_shutdown(context)
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

/// Answers every call that does not prove the token, and says nothing else.
#[derive(Clone)]
struct Guard(JoinToken);

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard(…)")
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let bearer = request.metadata().get("authorization").map(AsciiMetadataValue::as_bytes);
        if bearer.is_some_and(|bearer| self.0.is_proved_by(bearer)) {
            Ok(request)
        } else {
            Err(Status::unauthenticated("show the join token"))
        }
    }
}

/// Lets this process open as many files as it is allowed to; what it gets without asking is often a fraction.
pub fn raise_file_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Some systems refuse "no limit"; then everything stays as it was.
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::debug!(%error, "the number of open files cannot be raised");
    }
}
