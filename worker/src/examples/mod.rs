//! The examples of a tuning stage: how they are kept in the run folder, and how they become micro-batches.
//!
//! A job reads the plan's files once and keeps what is trained on, so that every worker sees the same rows in the same order,
//! whatever becomes of the files.

mod batch;
mod file;
mod stored;

pub(crate) use batch::{masked, micro_batch};
pub(crate) use file::{from_bytes, to_bytes};
pub(crate) use stored::{digest_of, made_by, result, stored};

use ulmus_chat::Item;

/// A row that is trained or evaluated on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    /// Number of the row among all rows of its files, from 1.
    pub(crate) row: u64,
    /// Its tokens.
    pub(crate) item: Item,
}

/// The log-probabilities of both answers of a pair before tuning, in nats.
pub(crate) type Reference = [f64; 2];
