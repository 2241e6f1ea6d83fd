//! How sessions are opened and accepted, and what strangers get instead.
//!
//! Deadlines are short here: the tests check only that they are kept.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt, stream};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use ulmus_proto::v1;
use ulmus_proto::v1::coordinator_client::CoordinatorClient;
use ulmus_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use ulmus_transport::{
    Bound, Caller, ConnectError, Credentials, IDENTITY_FILE, JoinToken, Limits, TokenSource, connect,
    publish, serve,
};
use ulmus_types::ErrorKind;

/// Each of the two deadlines of a stranger's connection.
const LIMIT: Duration = Duration::from_millis(500);
/// Much longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long joining may take, whatever strangers do.
const JOIN_WITHIN: Duration = Duration::from_secs(2);

/// Admits every peer that says hello, and answers with the peer's own address.
struct Echo;

#[tonic::async_trait]
impl Coordinator for Echo {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<v1::FromCoordinator, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::FromWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = Caller::of(&request)?;
        let mut incoming = request.into_inner();
        incoming.message().await?;
        caller.admit();
        let reason = v1::Failure { kind: 0, message: caller.address().to_string() };
        let answer = v1::FromCoordinator { message: Some(v1::from_coordinator::Message::Refused(reason)) };
        let rest = incoming.map(|_| Ok(v1::FromCoordinator::default()));
        Ok(Response::new(Box::pin(stream::once(async { Ok(answer) }).chain(rest))))
    }
}

/// A coordinator's end on a free port, for as long as the value lives.
struct Server {
    address: SocketAddr,
    credentials: Credentials,
    folder: tempfile::TempDir,
    _close: oneshot::Sender<()>,
    _tasks: JoinSet<()>,
}

fn limits() -> Limits {
    Limits { handshake: LIMIT, hello: LIMIT, per_address: 32, total: 64 }
}

fn server_with(limits: Limits) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let credentials = Credentials::of_run(folder.path(), &TokenSource::Unspecified).unwrap();
    let bound = Bound::new(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = bound.address().unwrap();
    let listener = bound.listen().unwrap();
    let (close, closed) = oneshot::channel::<()>();
    let mut tasks = JoinSet::new();
    let own = credentials.clone();
    tasks.spawn(async move {
        let routes = Routes::new(CoordinatorServer::new(Echo));
        let closed = async { drop(closed.await) };
        serve(listener, routes, &own, limits, closed).await.unwrap();
    });
    Server { address, credentials, folder, _close: close, _tasks: tasks }
}

fn server() -> Server {
    server_with(limits())
}

impl Server {
    fn token(&self) -> TokenSource {
        TokenSource::File(self.folder.path().join("join.token"))
    }

    /// Joins as a worker does, and returns the first answer.
    async fn join(&self, source: &TokenSource) -> Result<String, ConnectError> {
        let (mut incoming, _open) = self.session(source).await?;
        match incoming.message().await.unwrap().unwrap().message.unwrap() {
            v1::from_coordinator::Message::Refused(answer) => Ok(answer.message),
            other => panic!("{other:?}"),
        }
    }

    async fn session(
        &self,
        source: &TokenSource,
    ) -> Result<(Streaming<v1::FromCoordinator>, oneshot::Sender<v1::FromWorker>), ConnectError> {
        let link = connect(&self.address.to_string(), source).await?;
        let (more, later) = oneshot::channel();
        let outgoing =
            stream::iter([v1::FromWorker::default()]).chain(stream::once(async { later.await.unwrap() }));
        match CoordinatorClient::new(link.service()).session(outgoing).await {
            Ok(incoming) => Ok((incoming.into_inner(), more)),
            Err(status) => Err(link.refusal(&status).unwrap_or_else(|| panic!("{status:?}"))),
        }
    }

    /// Connects as a stranger that completes the TLS handshake with any key.
    async fn encrypted(&self) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        let pem = std::fs::read(self.folder.path().join(IDENTITY_FILE)).unwrap();
        roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.dangerous().set_certificate_verifier(Arc::new(anything::Anything(provider)));
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("anybody").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }
}

mod anything {
    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::crypto::CryptoProvider;
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    /// Accepts any certificate, as a stranger would.
    #[derive(Debug)]
    pub(crate) struct Anything(pub(crate) Arc<CryptoProvider>);

    impl ServerCertVerifier for Anything {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}

/// Everything that the other side sends until it closes the connection. Fails if it does not.
async fn everything(mut stream: impl AsyncReadExt + Unpin) -> Vec<u8> {
    let mut all = Vec::new();
    let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut all)).await;
    // It may be closed in any way: without a TLS goodbye, or by a reset.
    drop(read.expect("the connection is closed"));
    all
}

fn other_token() -> String {
    let folder = tempfile::tempdir().unwrap();
    Credentials::of_run(folder.path(), &TokenSource::Unspecified).unwrap().token.reveal()
}

#[tokio::test]
async fn whoever_has_the_token_joins_and_stays() {
    let server = server();
    let (mut incoming, more) = server.session(&server.token()).await.unwrap();
    let answer = incoming.message().await.unwrap().unwrap();
    let v1::from_coordinator::Message::Refused(told) = answer.message.unwrap() else { panic!() };
    assert!(told.message.starts_with("127.0.0.1:"), "the caller's own address: {}", told.message);
    // Silence for longer than any deadline of strangers.
    let silent = tokio::time::timeout(3 * LIMIT, incoming.message()).await;
    assert!(silent.is_err(), "{silent:?}");
    more.send(v1::FromWorker::default()).unwrap();
    assert!(incoming.message().await.unwrap().is_some());
}

#[tokio::test]
async fn a_worker_of_the_same_user_finds_the_token_by_the_port() {
    let server = server();
    let error = server.join(&TokenSource::Unspecified).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let port = server.address.port();
    for text in ["ULMUS_TOKEN", "--token-file", &format!("{port}.token does not exist")] {
        assert!(error.to_string().contains(text), "{error}");
    }
    let published = publish(port, &server.credentials.token).unwrap();
    server.join(&TokenSource::Unspecified).await.unwrap();
    drop(published);
    assert!(server.join(&TokenSource::Unspecified).await.is_err(), "it is gone with its coordinator");
}

#[tokio::test]
async fn a_wrong_token_is_refused_and_named() {
    let server = server();
    let other = TokenSource::Text(other_token());
    let error = server.join(&other).await.unwrap_err();
    assert!(matches!(error, ConnectError::OtherKey(..)), "{error}");
    let right_key = JoinToken::new(server.credentials.identity.hash());
    let error = server.join(&TokenSource::Text(right_key.reveal())).await.unwrap_err();
    assert!(matches!(error, ConnectError::WrongSecret(..)), "{error}");
    assert!(error.to_string().contains("ULMUS_TOKEN") && !error.to_string().contains("ulmus-"), "{error}");
    let error = server.join(&TokenSource::File("no.token".into())).await.unwrap_err();
    assert!(error.to_string().contains("no.token does not exist"), "{error}");
    let error = server.join(&TokenSource::Text("hunter2".into())).await.unwrap_err();
    assert!(error.to_string().contains("7 characters") && !error.to_string().contains("hunter2"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Refused);
}

#[tokio::test]
async fn without_a_token_there_is_nothing_to_learn() {
    let server = server();
    // Plaintext, as earlier clients sent it, and garbage.
    for said in ["PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", "\u{0}\u{1}\u{2}"] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        let told = everything(stream).await;
        // A TLS alert, if anything.
        assert!(told.len() <= 7 && !told.starts_with(b"HTTP"), "{told:?}");
    }
    // Every call to any service has the same answer.
    for path in ["/ulmus.v1.Coordinator/Session", "/grpc.health.v1.Health/Check", "/"] {
        let mut answers = Vec::new();
        for bearer in [None, Some("Bearer 00"), Some("Basic dTpw")] {
            answers.push(call(&server, path, bearer).await);
        }
        for status in answers {
            assert_eq!(status.code(), tonic::Code::Unauthenticated, "{path}: {status:?}");
            assert_eq!(status.message(), "show the join token");
        }
    }
}

/// Calls a method over TLS as a stranger.
async fn call(server: &Server, path: &'static str, bearer: Option<&'static str>) -> Status {
    let stream = server.encrypted().await;
    let mut stream = Some(hyper_util::rt::TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().unwrap();
        async move { Ok::<_, std::io::Error>(stream) }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://coordinator");
    let channel = endpoint.connect_with_connector(connector).await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let mut request = Request::new(stream::pending::<v1::FromWorker>());
    if let Some(bearer) = bearer {
        request.metadata_mut().insert("authorization", bearer.parse().unwrap());
    }
    let codec = tonic_prost::ProstCodec::<v1::FromWorker, v1::FromCoordinator>::default();
    client.streaming(request, path.parse().unwrap(), codec).await.unwrap_err()
}

#[tokio::test]
async fn whoever_says_nothing_is_dropped() {
    let server = server();
    let began = Instant::now();
    let silent = TcpStream::connect(server.address).await.unwrap();
    assert_eq!(everything(silent).await, b"");
    let mut encrypted = server.encrypted().await;
    // The HTTP/2 preface, one byte at a time: each is progress, and none is enough.
    let (mut reading, mut writing) = tokio::io::split(encrypted);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut tick = tokio::time::interval(LIMIT / 10);
        for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".iter().cycle() {
            tick.tick().await;
            if writing.write_all(&[*byte]).await.is_err() {
                return;
            }
        }
    });
    everything(&mut reading).await;
    // A whole preface and settings, then nothing: the server sends its settings and no more.
    encrypted = server.encrypted().await;
    encrypted.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    everything(encrypted).await;
    assert!(began.elapsed() >= LIMIT && began.elapsed() < DEADLINE);
}

#[tokio::test]
async fn a_secret_without_hello_is_not_enough_to_stay() {
    let server = server();
    let link = connect(&server.address.to_string(), &server.token()).await.unwrap();
    let mut client = CoordinatorClient::new(link.service());
    let call = client.session(stream::pending::<v1::FromWorker>());
    let status = tokio::time::timeout(DEADLINE, call).await.expect("it is dropped in time").err().unwrap();
    assert!(link.refusal(&status).is_none(), "{status:?}");
}

#[tokio::test]
async fn a_worker_joins_whatever_strangers_do() {
    // Strangers may stay as long as they like, so all places are always taken.
    let server = server_with(Limits { handshake: DEADLINE, hello: DEADLINE, ..limits() });
    let mut half_open = Vec::new();
    for _ in 0..500 {
        half_open.push(TcpStream::connect(server.address).await.unwrap());
    }
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(server.encrypted().await);
    }
    let began = Instant::now();
    server.join(&server.token()).await.unwrap();
    assert!(began.elapsed() < JOIN_WITHIN, "{:?}", began.elapsed());
    // The first ones had to make room for the others.
    for stream in half_open.into_iter().take(500 - 32) {
        assert_eq!(everything(stream).await, b"");
    }
    for stream in silent.into_iter().take(100 - 32) {
        everything(stream).await;
    }
}

#[tokio::test]
async fn a_rogue_coordinator_learns_nothing() {
    let (ours, rogue) = (server(), tempfile::tempdir().unwrap());
    Credentials::of_run(rogue.path(), &TokenSource::Unspecified).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(rogue_tls(rogue.path())));
    let token = ours.token();
    let (joined, accepted) = tokio::join!(connect(&address, &token), async {
        acceptor.accept(listener.accept().await.unwrap().0).await
    });
    assert!(matches!(joined, Err(ConnectError::OtherKey(..))), "{joined:?}");
    // The handshake fails before there is anything to read.
    assert!(accepted.is_err());
}

fn rogue_tls(folder: &Path) -> rustls::ServerConfig {
    let pem = std::fs::read(folder.join(IDENTITY_FILE)).unwrap();
    let mut config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(&pem).unwrap()],
                PrivateKeyDer::from_pem_slice(&pem).unwrap(),
            )
            .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

#[tokio::test]
async fn nobody_connects_before_the_token_can_be_found() {
    let bound = Bound::new(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = bound.address().unwrap();
    assert!(TcpStream::connect(address).await.is_err());
    let _listener = bound.listen().unwrap();
    TcpStream::connect(address).await.unwrap();
    assert!(Bound::new(address).is_err(), "the address is taken");
}

#[tokio::test]
async fn a_certificate_without_its_key_is_another_key() {
    // Everybody who has ever joined knows the certificate. What counts is who can sign with its key.
    let server = server();
    let copied = std::fs::read(server.folder.path().join(IDENTITY_FILE)).unwrap();
    let own = tempfile::tempdir().unwrap();
    Credentials::of_run(own.path(), &TokenSource::Unspecified).unwrap();
    let own = std::fs::read(own.path().join(IDENTITY_FILE)).unwrap();
    let provider = rustls::crypto::ring::default_provider();
    let key = provider.key_provider.load_private_key(PrivateKeyDer::from_pem_slice(&own).unwrap()).unwrap();
    let chain = vec![CertificateDer::from_pem_slice(&copied).unwrap()];
    let stolen = rustls::sign::CertifiedKey::new(chain, key);
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(stolen)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let token = server.token();
    let (joined, accepted) = tokio::join!(connect(&address, &token), async {
        acceptor.accept(listener.accept().await.unwrap().0).await
    });
    assert!(joined.is_err() && accepted.is_err(), "{joined:?}");
}
