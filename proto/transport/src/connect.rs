//! The worker's end: finds the token, authenticates the coordinator, and only then shows the secret.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use ulmus_types::ErrorKind;

use crate::identity::{HTTP2, provider};
use crate::source::{Found, LookupError, TokenSource, in_runtime_folder};
use crate::token::{JoinToken, KeyHash};

/// How long connecting to the coordinator may take.
const REACH_WITHIN: Duration = Duration::from_secs(3);
/// How long the TLS handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// Interval of keep-alive pings, which the other side has to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Why there is no session with a coordinator.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address is invalid.
    #[error("invalid address {0:?}: {1}; use --join HOST:PORT")]
    Address(String, io::Error),
    /// Nothing answers at the address as a coordinator does.
    #[error("{0}: {1}")]
    Unreachable(String, String),
    /// The worker has no token to show.
    #[error("cannot join {0}: {1}")]
    Token(String, LookupError),
    /// The other side has a different key from the one in the token.
    #[error(
        "the key of the coordinator at {0} is not the one in the token from {1}, so it was told nothing; correct \
         --join, or pass the join.token of the coordinator at that address"
    )]
    OtherKey(String, String),
    /// The coordinator has the right key and does not accept the secret.
    #[error(
        "the coordinator at {0} does not accept the secret in the token from {1}; pass the token that it was started \
         with: its --token-file, or its join.token"
    )]
    WrongSecret(String, String),
}

impl ConnectError {
    /// What can be done about it.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Address(..) => ErrorKind::InvalidInput,
            Self::Unreachable(..) => ErrorKind::Retry,
            Self::Token(..) | Self::OtherKey(..) | Self::WrongSecret(..) => ErrorKind::Refused,
        }
    }
}

/// A connection to a coordinator with the right key.
#[derive(Debug)]
pub struct Link {
    channel: Channel,
    address: String,
    found: Found,
}

/// Opens a connection to the coordinator at `address` (`host:port`). Every call looks up the token again.
///
/// # Errors
/// When nothing answers, when there is no token, or when the other side does not have the key in the token. In all
/// these cases the other side was told nothing.
pub async fn connect(address: &str, source: &TokenSource) -> Result<Link, ConnectError> {
    let token_error = |error| ConnectError::Token(address.to_owned(), error);
    let known = match source.look_up() {
        // Reaching a coordinator could not change this.
        Err(error @ LookupError::Malformed(..)) => return Err(token_error(error)),
        known => known,
    };
    let unreachable = |why: String| ConnectError::Unreachable(address.to_owned(), why);
    let stream = match tokio::time::timeout(REACH_WITHIN, TcpStream::connect(address)).await {
        Err(_) => return Err(unreachable(format!("no answer within {REACH_WITHIN:?}"))),
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidInput => {
            return Err(ConnectError::Address(address.to_owned(), error));
        }
        Ok(stream) => stream.map_err(|error| unreachable(error.to_string()))?,
    };
    let failed = |error: io::Error| unreachable(error.to_string());
    // A missing token is an error only once something listens: a coordinator publishes the token before it does.
    let found = if let Some(found) = known.map_err(token_error)? {
        found
    } else {
        let (here, there) = (stream.local_addr().map_err(failed)?, stream.peer_addr().map_err(failed)?);
        let is_here = there.ip().to_canonical().is_loopback() || here.ip() == there.ip();
        in_runtime_folder(there.port(), is_here).map_err(token_error)?
    };
    stream.set_nodelay(true).map_err(failed)?;
    let stream = match tokio::time::timeout(HANDSHAKE_WITHIN, encrypt(stream, found.token.key())).await {
        Err(_) => return Err(unreachable(format!("no TLS handshake within {HANDSHAKE_WITHIN:?}"))),
        Ok(Err(error)) if is_other_key(&error) => {
            return Err(ConnectError::OtherKey(address.to_owned(), found.origin));
        }
        Ok(stream) => stream.map_err(|error| unreachable(format!("TLS 1.3 failed: {error}")))?,
    };
    let channel = http2_over(stream).await.map_err(|error| unreachable(error.to_string()))?;
    Ok(Link { channel, address: address.to_owned(), found })
}

impl Link {
    /// The service through which calls are made. It shows the secret with each of them.
    pub fn service(&self) -> InterceptedService<Channel, Bearer> {
        InterceptedService::new(self.channel.clone(), Bearer::new(&self.found.token))
    }

    /// The error behind the status of a failed call, if the transport is the reason for it.
    pub fn refusal(&self, status: &Status) -> Option<ConnectError> {
        (status.code() == Code::Unauthenticated)
            .then(|| ConnectError::WrongSecret(self.address.clone(), self.found.origin.clone()))
    }
}

/// Adds the secret to every call.
#[derive(Clone)]
pub struct Bearer(AsciiMetadataValue);

impl Bearer {
    fn new(token: &JoinToken) -> Self {
        let mut value: AsciiMetadataValue =
            token.bearer().parse().expect("hexadecimal digits are valid in a header");
        value.set_sensitive(true);
        Self(value)
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer(…)")
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// HTTP/2 over this one stream. The channel ends with the stream.
async fn http2_over(stream: TlsStream<TcpStream>) -> Result<Channel, tonic::transport::Error> {
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().ok_or(io::ErrorKind::NotConnected);
        async move { stream.map_err(io::Error::from) }
    });
    // The stream is already encrypted, and the name is never resolved.
    Endpoint::from_static("http://coordinator")
        .http2_keep_alive_interval(KEEP_ALIVE)
        .connect_with_connector(connector)
        .await
}

async fn encrypt(stream: TcpStream, key: KeyHash) -> io::Result<TlsStream<TcpStream>> {
    let provider = provider();
    let verifier = Arc::new(Pinned { key, provider: Arc::clone(&provider) });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    let unused = ServerName::try_from("coordinator").expect("it is a name");
    TlsConnector::from(Arc::new(config)).connect(unused, stream).await
}

/// Accepts a single key, regardless of the names, dates and signers in its certificate.
#[derive(Debug)]
struct Pinned {
    key: KeyHash,
    provider: Arc<CryptoProvider>,
}

/// The error with which [`Pinned`] rejects a different key.
const OTHER_KEY: rustls::Error =
    rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);

fn is_other_key(error: &io::Error) -> bool {
    let error = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    error.is_some_and(|error| *error == OTHER_KEY)
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if KeyHash::of(certificate) == Some(self.key) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(OTHER_KEY)
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not supported".to_owned()))
    }

    /// Verifies that the other side holds the key, not only its certificate.
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
