//! Process matters that all three programs share: logs, signals and exit codes.

#![forbid(unsafe_code)]

mod exit;
mod shutdown;
mod telemetry;

pub use exit::{Failure, finish_output, print, report};
pub use shutdown::Shutdown;
pub use telemetry::{LogTarget, init as init_telemetry};
