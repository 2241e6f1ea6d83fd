//! The coordinator: the single writer of a run's state.
//!
//! It is a thin shell around `ulmus_coord_core`: gRPC sessions in, effects out. It never sees a document or a gradient.
//! `main.rs` parses the command line; everything else can be called from tests.

#![forbid(unsafe_code)]

pub mod args;
mod cards;
mod check;
mod console;
mod database;
mod driver;
mod figure;
mod folder;
mod local;
mod metrics;
mod options;
pub mod plans;
mod quarantine;
mod recover;
mod run;
mod server;
mod summary;
mod tuned;

pub use check::check;
pub use options::Options;
pub use run::run;
