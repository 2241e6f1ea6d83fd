//! The worker's side of its session with the coordinator, as a pure state machine. The worker drives it with real
//! connections, threads and states; the coordinator's simulation drives it with simulated ones.
//!
//! A shell passes a [`Session`] the coordinator's messages ([`Session::on_message`]), the trainer's reports
//! ([`Session::on_report`]) and what it has done itself, and performs the [`Action`]s that it gets back. States that
//! wait to be stored belong to the shell: the session keeps a handle `S` to each, and returns it when the state is to
//! be hashed or written.

#![forbid(unsafe_code)]

mod session;

pub use session::{Action, Report, Session};
