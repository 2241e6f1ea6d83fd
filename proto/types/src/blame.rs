//! Which neighbour ended a group, as one of its members saw it.

use serde::{Deserialize, Serialize};

/// What a member of a ring holds against a neighbour. Each sees its own two links alone, so the word of one is a hint: a
/// member that leaves because of its own trouble is [`Lost`](Blame::Lost) to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// While the group formed, nothing at its address answered as a member of the group.
    Unreachable,
    /// While the group formed, it did not call.
    Absent,
    /// Its connection was closed: it died, or left the group.
    Lost,
    /// It sent nothing for too long, or its machine is no longer there.
    Silent,
    /// What came from it is not what it sent.
    Damaged,
}
