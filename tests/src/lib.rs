//! The test kit: runs the real programs in their own folder, and examines what they leave behind.
//!
//! Nothing is simulated here. A [`Sandbox`] is a temporary folder with text and a tiny plan; [`Process`]es are started
//! in it as a person would start them; a [`RunFolder`] reads what a run has written. Tests wait for conditions, always
//! with a deadline, and never for a fixed time. A failing test prints the output of every process and every log. No
//! process outlives its sandbox.
//!
//! The pure parts of Ulmus have their own, faster tests. This crate is for promises that only whole programs can keep
//! or break: exit codes, signals, killed processes, files.

#![forbid(unsafe_code)]

mod cloud;
mod disk;
mod freeze;
mod network;
mod plans;
mod process;
mod programs;
mod random;
mod run;
mod sandbox;
mod wait;

pub use cloud::Cloud;
pub use disk::SmallDisk;
pub use freeze::{Frozen, freeze_thread, has_thread};
pub use network::Network;
pub use plans::{CHAIN, TINY, TUNED, write_examples, write_prose};
pub use process::{Ended, Process};
pub use programs::{Programs, programs, repository};
pub use random::Random;
pub use run::{Bits, RunFolder};
pub use sandbox::Sandbox;
pub use wait::until;
