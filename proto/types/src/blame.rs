//! Which neighbour ended a group, as one of its members saw it.

use serde::{Deserialize, Serialize};

/// What a member of a ring reports about a neighbour. Each member sees only its own two links, so a single report is a
/// hint: a member that leaves because of its own trouble is [`Lost`](Blame::Lost) to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// While the group formed, nothing at its address answered as a member of the group.
    Unreachable,
    /// While the group formed, it did not connect.
    Absent,
    /// Its connection was closed: it died, or left the group.
    Lost,
    /// It sent nothing for too long, or its machine is gone.
    Silent,
    /// Its data was damaged on the way.
    Damaged,
}
