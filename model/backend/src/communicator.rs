//! Groups of devices that sum among themselves: how their members find each other, and how they fail.

use std::fmt;

/// Called repeatedly while an operation is unfinished; returns the reason to give it up now, if there is one.
pub type GiveUp<'a> = &'a (dyn Fn() -> Option<String> + Sync);

/// Why an operation, or forming a group, failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommunicatorError {
    /// Devices of this kind cannot form groups.
    #[error("{device} cannot be in a group of devices; sum on the host")]
    Unsupported {
        /// The device, as the backend describes it.
        device: String,
    },
    /// The library cannot be loaded or is too old.
    #[error(
        "{problem}; install NCCL 2.18 or newer (in Python's package nvidia-nccl-cu13, for instance) and set \
         LD_LIBRARY_PATH to the folder that has libnccl.so.2"
    )]
    Library {
        /// What is wrong with it.
        problem: String,
    },
    /// The library refused or failed.
    #[error("NCCL failed to {act}: {problem}")]
    Refused {
        /// What was tried.
        act: &'static str,
        /// The library's own message.
        problem: String,
    },
    /// The caller's [`GiveUp`] returned a reason.
    #[error("gave up waiting for NCCL to {act}: {reason}")]
    GivenUp {
        /// What was tried.
        act: &'static str,
        /// The reason.
        reason: String,
    },
}

/// What the members of a group find each other by. The process that makes it must live until the group is formed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommunicatorId([u8; 128]);

impl fmt::Debug for CommunicatorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = self.0.iter().take(8);
        f.write_str("CommunicatorId(")?;
        start.into_iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("..)")
    }
}

impl CommunicatorId {
    /// The id of these bytes, which [`CommunicatorId::to_bytes`] made on any member.
    pub fn from_bytes(bytes: [u8; 128]) -> Self {
        Self(bytes)
    }

    /// The bytes to send to the other members.
    pub fn to_bytes(self) -> [u8; 128] {
        self.0
    }
}
