//! Logs: structured, to a file or to standard error. `RUST_LOG` chooses what is written.

use std::fs::OpenOptions;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;

/// Where logs go.
#[derive(Debug, Clone)]
pub enum LogTarget {
    /// Standard error.
    Stderr,
    /// Appended to a file.
    File(PathBuf),
}

/// Starts logging for the whole process; the first call counts.
///
/// # Errors
/// When the log file cannot be opened.
pub fn init(target: &LogTarget) -> std::io::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    // A second call, as tests in one process make it, keeps the first subscriber.
    let started = match target {
        // Standard error may be a file too: colours are for terminals.
        LogTarget::Stderr => {
            builder.with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).try_init()
        }
        LogTarget::File(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            builder.with_ansi(false).with_writer(Mutex::new(file)).try_init()
        }
    };
    drop(started);
    Ok(())
}
