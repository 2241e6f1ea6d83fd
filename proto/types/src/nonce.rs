//! How a worker proves that it can read the run's store: it reads a file there whose content nobody can guess.
//!
//! The name of the file is part of the contract, and the answer is a hash that serves no other purpose. So not even a
//! malicious coordinator can make a worker reveal the content of a file.

use crate::Digest;

/// The answer of a worker that has read `content` there.
pub fn nonce_digest(content: &[u8]) -> Digest {
    Digest::from_bytes(blake3::derive_key("Ulmus, nonce of a run's store", content))
}
