//! Opens and accepts all connections: the sessions between the coordinator and its workers, and the [`ring`] of a group.
//!
//! Every session runs over TLS 1.3. The coordinator's key is made once per run and signed by nobody: a worker
//! recognizes it by its hash, which is one half of the *join token*. The other half is a secret, which the worker shows
//! inside TLS once it has verified the key. So neither side tells the other anything, not even its version, before it
//! knows whom it is talking to:
//!
//! 1. The worker connects, and gives up unless the other side holds the key in its token.
//! 2. It opens the stream with the secret in the header `authorization`. Without the right secret, every call to any
//!    method is answered with `UNAUTHENTICATED`.
//! 3. It says hello, and the coordinator [admits](Caller::admit) the connection.
//!
//! Until then a connection has two deadlines and counts against limits, so that strangers cost little and keep nobody
//! out: see [`Limits`]. This crate does not look at the messages of a session.

#![forbid(unsafe_code)]

mod connect;
mod credentials;
mod gate;
mod hidden;
mod identity;
mod incoming;
pub mod ring;
mod runtime;
mod source;
mod token;

pub use connect::{ConnectError, Link, connect};
pub use credentials::{Credentials, CredentialsError, TOKEN_FILE};
pub use gate::Limits;
pub use identity::{IDENTITY_FILE, Identity, IdentityError};
pub use incoming::{Bound, Caller, raise_file_limit, serve};
pub use runtime::{Published, RuntimeError, publish};
pub use source::{LookupError, TokenSource};
pub use token::{JoinToken, KeyHash, MalformedToken};
