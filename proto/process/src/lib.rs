//! What all programs do as processes: reading plan files, logging, handling signals, and exit codes.

#![forbid(unsafe_code)]

mod address;
mod exit;
mod plans;
mod shutdown;
mod telemetry;

pub use address::HostPort;
pub use exit::{Failure, arguments, finish_output, print, report, with_causes};
pub use plans::{cannot_run, load_plans};
pub use shutdown::{Shutdown, Signal};
pub use telemetry::{LogTarget, init as init_telemetry};
