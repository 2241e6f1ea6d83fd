//! The secret by which the members of one group recognize each other.

use std::fmt;

/// The key of one generation's group. Holding it proves membership; it is never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GroupKey([u8; 32]);

impl GroupKey {
    /// Wraps a key that was derived, or received over the wire.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupKey(hidden)")
    }
}
