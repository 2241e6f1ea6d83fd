//! The gRPC contract, and its translation into the messages that the rest of Ulmus speaks.
//!
//! Generated types stay in this crate and in the two thin ends of the stream: everything else uses
//! [`ulmus_types::ToCoordinator`] and [`ulmus_types::ToWorker`].

#![forbid(unsafe_code)]

/// Code generated from `ulmus/v1/coordinator.proto`.
#[expect(missing_docs, clippy::pedantic, reason = "generated; the .proto file documents it")]
pub mod v1 {
    tonic::include_proto!("ulmus.v1");
}

mod convert;
mod status;

pub use convert::{WireError, from_worker};
pub use status::{kind_of, status_of};

/// Largest message that either side takes, in bytes: a resolved plan with thousands of file names, or the reports of steps of a
/// worker that was alone for long.
pub const MESSAGE_LIMIT: usize = 16 << 20;
