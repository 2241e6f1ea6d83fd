//! Sessions between the coordinator and its workers: the one place where they are opened and accepted.
//!
//! Every session runs over TLS 1.3. The coordinator's key is made once per run, and nobody signs it: a worker knows it
//! by its hash, which is half of the *join token*. The other half is a secret, which the worker shows inside TLS, once
//! the key has proved right. So neither side tells the other anything, its version included, before it knows whom it
//! talks to:
//!
//! 1. The worker connects, and gives up unless the other side holds the key of its token.
//! 2. It opens the stream with the secret in the header `authorization`. Without the right one every call is answered
//!    with `UNAUTHENTICATED`, whatever was called.
//! 3. It says hello, and the coordinator [admits](Caller::admit) the connection.
//!
//! Until then a connection has two deadlines and counts against limits, so that strangers cost little and keep
//! nobody out: see [`Limits`]. What is said on a session is none of this crate's concern.

#![forbid(unsafe_code)]

mod connect;
mod credentials;
mod gate;
mod hidden;
mod identity;
mod incoming;
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
