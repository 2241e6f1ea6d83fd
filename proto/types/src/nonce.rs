//! How a worker proves that it sees the run's store: it reads a file there that nobody can guess.
//!
//! The name of the file is part of the contract, and what goes back is a hash that serves no other purpose. So not
//! even a coordinator that should not be trusted can ask a worker for what is in a file.

use crate::Digest;

/// What a worker answers that has read `content` there.
pub fn nonce_digest(content: &[u8]) -> Digest {
    Digest::from_bytes(blake3::derive_key("Ulmus, nonce of a run's store", content))
}
