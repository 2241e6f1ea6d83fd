//! Secrets that prove a worker's identity, all derived from one secret of the run.
//!
//! None of them is ever printed: `Debug` hides the bytes. Comparisons take constant time.

use std::fmt;

use crate::{Generation, GroupKey, WorkerId};

/// The secret of a run, known to its coordinator alone.
#[derive(Clone)]
pub struct RunSecret([u8; 32]);

impl RunSecret {
    /// Builds a secret from random bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The secret that a worker gets with its welcome. It is always the same for the same worker, so that a restarted
    /// coordinator recognizes its workers.
    pub fn session(&self, worker: &WorkerId) -> SessionSecret {
        SessionSecret(self.derive("session", worker.to_string().as_bytes()))
    }

    /// The key of a generation's group. One key reveals nothing about another.
    pub fn group(&self, generation: Generation) -> GroupKey {
        GroupKey::from_bytes(self.derive("ring", &generation.get().to_le_bytes()))
    }

    fn derive(&self, purpose: &str, of: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(purpose.as_bytes()).update(&[0]).update(of);
        *hasher.finalize().as_bytes()
    }
}

impl fmt::Debug for RunSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RunSecret(..)")
    }
}

/// The secret with which a worker proves its identity when it reconnects.
#[derive(Clone, Copy)]
pub struct SessionSecret([u8; 32]);

impl SessionSecret {
    /// Wraps bytes received over the wire.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the secret.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for SessionSecret {
    fn eq(&self, other: &Self) -> bool {
        // `blake3::Hash` compares in constant time.
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

impl Eq for SessionSecret {}

impl fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionSecret(..)")
    }
}

#[cfg(test)]
mod tests {
    use crate::Incarnation;

    use super::*;

    #[test]
    fn every_life_of_a_worker_has_its_own_secret() {
        let (run, other) = (RunSecret::from_bytes([1; 32]), RunSecret::from_bytes([2; 32]));
        let worker = |life| WorkerId::new("w", Incarnation::new(life)).unwrap();
        assert_eq!(run.session(&worker(1)), run.session(&worker(1)));
        assert_ne!(run.session(&worker(1)), run.session(&worker(2)));
        assert_ne!(run.session(&worker(1)), other.session(&worker(1)));
        assert_eq!(format!("{:?}", run.session(&worker(1))), "SessionSecret(..)");
    }

    #[test]
    fn every_generation_has_a_key_of_its_own_that_is_not_printed() {
        let key =
            |secret: u8, generation| RunSecret::from_bytes([secret; 32]).group(Generation::new(generation));
        assert_eq!(key(1, 1).as_bytes(), key(1, 1).as_bytes());
        assert_ne!(key(1, 1).as_bytes(), key(1, 2).as_bytes());
        assert_ne!(key(1, 1).as_bytes(), key(2, 1).as_bytes());
        assert_eq!(format!("{:?}", key(1, 1)), "GroupKey(hidden)");
    }
}
