//! The worker's side of its session with the coordinator: a pure state machine, which the worker drives with real
//! connections, threads and states, and the simulation of the coordinator with simulated ones.
//!
//! A shell feeds a [`Session`] with what the coordinator says ([`Session::received`]), what the trainer reports
//! ([`Session::reported`]) and what has been done meanwhile, and performs the [`Action`]s that it gets back. A state that
//! waits to be stored is the shell's: the session keeps a handle `S` to it, and gives that back when the state is to be
//! hashed or written.

#![forbid(unsafe_code)]

mod session;

pub use session::{Action, Report, Session};
