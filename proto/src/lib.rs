//! The gRPC contract, and its translation into the messages that the rest of Ulmus uses.
//!
//! Generated types appear only in this crate and at the two thin ends of the stream. Everything else uses
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

/// What both sides of a session must have in common. The number behind the `+` counts the changes of the contract within a
/// release, so that a worker of another build is told so before it is given anything that it cannot read.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "+1");

/// Largest message that either side accepts, in bytes. It has room for a resolved plan with thousands of file names, or
/// for all the step reports of a worker that was long without a coordinator.
pub const MESSAGE_LIMIT: usize = 16 << 20;
