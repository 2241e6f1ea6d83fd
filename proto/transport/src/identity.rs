//! The coordinator's key, and the certificate that carries it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use ulmus_types::ErrorKind;

use crate::hidden;
use crate::token::KeyHash;

/// Name of the key file in the coordinator's own folder.
pub const IDENTITY_FILE: &str = "coordinator.pem";

/// The protocol inside TLS, as ALPN names it.
pub(crate) const HTTP2: &[u8] = b"h2";

/// The key by which workers recognize a run's coordinator. It is made once, and kept with the run.
#[derive(Debug, Clone)]
pub struct Identity {
    tls: Arc<ServerConfig>,
    hash: KeyHash,
}

/// Why a run has no key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file is incomplete or inconsistent.
    #[error(
        "{0} is damaged: {1}; restore it, or delete it together with join.token: workers then need the new token"
    )]
    Damaged(PathBuf, String),
    /// The file cannot be read or written.
    #[error("{0}: {1}; check that the disk is not full and the folder is not read-only")]
    Io(PathBuf, io::Error),
}

impl IdentityError {
    /// What can be done about it.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Damaged(..) => ErrorKind::Corrupt,
            Self::Io(..) => ErrorKind::Internal,
        }
    }
}

impl Identity {
    /// Loads the identity that is kept in `folder`, or makes one if there is none.
    ///
    /// # Errors
    /// When it is damaged, or cannot be read or written.
    pub fn of_run(folder: &Path) -> Result<Self, IdentityError> {
        let path = folder.join(IDENTITY_FILE);
        let pem = match std::fs::read(&path) {
            Ok(pem) => pem,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let pem = generate();
                hidden::write(&path, &pem).map_err(|error| IdentityError::Io(path.clone(), error))?;
                pem.into_bytes()
            }
            Err(error) => return Err(IdentityError::Io(path, error)),
        };
        Self::read(&pem).map_err(|problem| IdentityError::Damaged(path, problem))
    }

    fn read(pem: &[u8]) -> Result<Self, String> {
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|_| "it has no private key")?;
        let certificate = CertificateDer::from_pem_slice(pem).map_err(|_| "it has no certificate")?;
        let hash = KeyHash::of(&certificate).ok_or("its certificate cannot be read")?;
        // This also checks that the key matches the certificate.
        let tls = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|config| config.with_no_client_auth().with_single_cert(vec![certificate], key));
        let mut tls = tls.map_err(|error| error.to_string())?;
        tls.alpn_protocols = vec![HTTP2.to_vec()];
        // No session resumption: session tickets would be one more secret that outlives a connection.
        tls.send_tls13_tickets = 0;
        Ok(Self { tls: Arc::new(tls), hash })
    }

    /// The hash of the key, which workers compare.
    pub const fn hash(&self) -> KeyHash {
        self.hash
    }

    pub(crate) fn tls(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.tls)
    }
}

/// The cryptography provider that both sides use.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Makes a new key and its certificate. The certificate names neither the run nor the machine and never expires, since
/// only the key matters.
fn generate() -> String {
    let key = KeyPair::generate().expect("the system has random numbers");
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "ulmus coordinator");
    let certificate = params.self_signed(&key).expect("a new key can sign");
    key.serialize_pem() + &certificate.pem()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_run_keeps_its_key_and_nobody_else_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let first = Identity::of_run(folder.path()).unwrap();
        assert_eq!(Identity::of_run(folder.path()).unwrap().hash(), first.hash());
        let mode = fs::metadata(folder.path().join(IDENTITY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        let other = tempfile::tempdir().unwrap();
        assert_ne!(Identity::of_run(other.path()).unwrap().hash(), first.hash());
    }

    #[test]
    fn half_an_identity_is_damaged() {
        let (whole, other) = (generate(), generate());
        let end = whole.find("-----BEGIN CERTIFICATE").unwrap();
        let mixed = whole[..end].to_owned() + &other[other.find("-----BEGIN CERTIFICATE").unwrap()..];
        for damaged in ["", &whole[..end], &whole[end..], &whole[..whole.len() / 2], &mixed] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join(IDENTITY_FILE), damaged).unwrap();
            let error = Identity::of_run(folder.path()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains("join.token"), "{error}");
        }
    }
}
