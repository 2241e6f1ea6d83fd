//! The coordinator as a pure state machine.
//!
//! [`Coordinator::on`] takes the time and one [`Event`] and returns [`Effect`]s. There is no clock, no I/O, no
//! randomness and no hash order here, so the same events always give the same effects: production, unit tests and
//! property tests drive the same code.
//!
//! # How a run works
//! 1. Workers say hello, prove that they can read the run folder, and report the fingerprint of their arithmetic.
//! 2. One of them prepares the data. Then a *group* is formed: a new generation is stored, then assigned.
//! 3. The group trains by itself. The coordinator records its reports and has the parts of checkpoints stored.
//! 4. A lost worker ends the generation: the others are told to abort, leave the group, and are assigned again. A
//!    worker that joins waits until the group has paused at a step on which all its members agreed.
//! 5. When every update is done and the last checkpoint is stored, the remaining jobs run on idle workers.
//!
//! The caller performs effects in order. An effect whose name begins with `Save` must be durable before the next one is
//! performed: a generation that was assigned but not stored could be assigned twice.
//!
//! Every message is checked against its sender and the current state before it is acted on; see `check`.

#![forbid(unsafe_code)]

mod check;
mod checkpoints;
mod coordinator;
mod deadlines;
mod effect;
mod event;
mod group;
mod invariants;
mod jobs;
mod joining;
mod members;
mod snapshots;
mod state;
mod status;
mod training;
mod trainings;
mod work;

pub use effect::{Effect, Notification, Outcome};
pub use event::Event;
pub use jobs::JobStatus;
pub use members::Roster;
pub use state::{Coordinator, PersistentState, Settings};
pub use status::{Doing, MemberStatus, Phase, Status};
pub use trainings::{TrainingRecord, TrainingSettings};
