//! The coordinator as a pure state machine.
//!
//! [`Coordinator::on`] takes the time and one [`Event`] and returns [`Effect`]s. There is no clock, no I/O, no
//! randomness and no hash order in here, so that the same events always give the same effects: production, unit
//! tests and property tests drive the same code.
//!
//! # How a run goes
//! 1. Workers say hello, prove that they see the run's store, and tell the fingerprint of their arithmetic.
//! 2. One of them prepares the data. Then a *group* is formed: a new generation is stored, then assigned.
//! 3. The group trains by itself. The coordinator files reports, and gathers the parts of checkpoints.
//! 4. A lost worker ends the generation: the others are told to abort, leave, and are assigned anew. A worker
//!    that joins waits until the group has paused at a step that all its members agreed on.
//! 5. When every update is done and the last checkpoint is stored, the remaining jobs run on idle workers.
//!
//! The caller performs effects in order. Those that begin with `Save` must be durable before the next one is
//! performed: a generation that was assigned but not stored could be assigned twice.
//!
//! What a worker says is held against who it is and what is possible now before it is heard; see `check`.

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
mod training;
mod work;

pub use coordinator::{Coordinator, PersistentState, Settings};
pub use effect::{Effect, Notification, Outcome};
pub use event::Event;
