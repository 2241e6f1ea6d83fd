//! The coordinator's end: accepts connections, and serves only peers that prove that they know the token.

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

/// How long to wait before accepting again after the system ran out of files or memory.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections that the kernel queues until they are accepted.
const BACKLOG: u32 = 1024;
/// Maximum number of streams per connection. A worker needs one.
const STREAMS: u32 = 4;
/// Maximum size of a request's headers, in bytes. A worker sends about 300.
const HEADERS: u32 = 8 << 10;
/// Interval of keep-alive pings to admitted peers. Missing heartbeats reveal a dead worker earlier.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// An address that is reserved, but does not accept connections yet, so that what newcomers need can be published
/// first.
#[derive(Debug)]
pub struct Bound(TcpSocket);

impl Bound {
    /// Reserves an address.
    ///
    /// # Errors
    /// When the address is in use, or does not belong to this machine.
    pub fn new(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A restarted coordinator need not wait until the kernel forgets the connections of the last one.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok(Self(socket))
    }

    /// The address, with the port that the system chose if port 0 was given.
    ///
    /// # Errors
    /// When the system does not report it.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Starts accepting connections.
    ///
    /// # Errors
    /// When another process listens at the address.
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
    /// The sender of a request.
    ///
    /// # Errors
    /// When the request did not come in through [`serve`].
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("the request bypassed the transport"))
    }

    /// The peer's address.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Admits the connection after its hello: it no longer has a deadline, and no longer counts as waiting.
    pub fn admit(&self) {
        self.ticket.admit();
    }
}

/// Serves `routes` to peers that prove the token, until `closed`; then waits for the remaining streams.
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

/// The path of a connection to the server.
#[derive(Clone)]
struct Entrance {
    acceptor: TlsAcceptor,
    limits: Limits,
    handshakes: Arc<Gate>,
    hellos: Arc<Gate>,
    accepted: mpsc::Sender<Connection>,
}

/// Accepts connections for as long as the server takes them.
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
            // The peer was gone before the connection was accepted.
            Err(error) if concerns_one_connection(&error) => {}
            Err(error) => {
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(%error, "cannot accept connections");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    entrance.hellos.close();
}

fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

impl Entrance {
    /// Performs the TLS handshake of a connection, and passes the connection to the server.
    async fn shake_hands(self, stream: TcpStream, address: SocketAddr, ticket: Ticket) {
        let shake = async {
            stream.set_nodelay(true)?;
            tokio::time::timeout(self.limits.handshake, self.acceptor.accept(stream)).await?
        };
        // Failures are not logged, because strangers could fill the log.
        let Some(Ok(stream)) = ticket.displaced().run_until_cancelled(shake).await else { return };
        let ticket = Arc::new(self.hellos.enter(address.ip()));
        let connection = Connection::new(stream, Caller { address, ticket }, self.limits.hello);
        // If this fails, the server has ended.
        self.accepted.send(connection).await.ok();
    }
}

/// An encrypted connection. Until it is admitted, it breaks at its deadline or when it is displaced.
struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    limit: Option<Limit>,
}

/// What breaks a connection that is not admitted.
struct Limit {
    deadline: Pin<Box<Sleep>>,
    displaced: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Connection {
    fn new(stream: TlsStream<TcpStream>, caller: Caller, within: Duration) -> Self {
        let limit = Limit {
            deadline: Box::pin(tokio::time::sleep(within)),
            displaced: Box::pin(caller.ticket.displaced().clone().cancelled_owned()),
        };
        Self { stream, caller, limit: Some(limit) }
    }

    /// The stream, if it may still be used. Also has the task woken as soon as it may not.
    fn stream(&mut self, context: &mut Context<'_>) -> io::Result<Pin<&mut TlsStream<TcpStream>>> {
        if self.caller.ticket.is_admitted() {
            self.limit = None;
        }
        if let Some(limit) = &mut self.limit {
            let late = limit.deadline.as_mut().poll(context).is_ready();
            if late || limit.displaced.as_mut().poll(context).is_ready() {
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

// The deadline also holds for writing: a peer must not escape it by not reading what it is sent.
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

/// Rejects every call that does not prove the token, always with the same answer.
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

/// Raises this process's limit of open files to the maximum allowed, of which the default is often a fraction.
pub fn raise_file_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Some systems refuse "no limit"; then the limit stays as it was.
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}
