//! Groups of devices that sum among themselves: what their members find one another by, and how they fail.

use std::fmt;

/// Asked again and again while an operation is not done: why to give it up now, if so.
pub type GiveUp<'a> = &'a (dyn Fn() -> Option<String> + Sync);

/// Why an operation, or the forming of a group, did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommunicatorError {
    /// Devices of this kind form no groups.
    #[error("{device} forms no group of devices; sum on the host")]
    Unsupported {
        /// As the backend describes it.
        device: String,
    },
    /// There is no library to call.
    #[error(
        "{problem}; install NCCL 2.18 or newer (in Python's package nvidia-nccl-cu13, for instance) and set \
         LD_LIBRARY_PATH to the folder that has libnccl.so.2"
    )]
    Library {
        /// What is the matter with it.
        problem: String,
    },
    /// The library does not do it, or failed at it.
    #[error("NCCL failed to {act}: {problem}")]
    Refused {
        /// What was tried.
        act: &'static str,
        /// What it said.
        problem: String,
    },
    /// The caller's patience has ended.
    #[error("gave up waiting for NCCL to {act}: {reason}")]
    GivenUp {
        /// What was tried.
        act: &'static str,
        /// Why.
        reason: String,
    },
}

/// What the members of a group find one another by. Who makes it must live until the group is formed.
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
    /// What [`CommunicatorId::to_bytes`] gave, here or elsewhere.
    pub fn from_bytes(bytes: [u8; 128]) -> Self {
        Self(bytes)
    }

    /// To be sent to the members.
    pub fn to_bytes(self) -> [u8; 128] {
        self.0
    }
}
