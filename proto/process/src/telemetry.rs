//! Structured logs, to a file or to standard error. `RUST_LOG` selects what is logged.

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
    /// A file, to which they are appended.
    File(PathBuf),
}

/// Starts logging for the whole process. Later calls have no effect.
///
/// # Errors
/// When the log file cannot be opened.
pub fn init(target: &LogTarget) -> std::io::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    // A second call, which tests in one process make, keeps the first subscriber.
    let started = match target {
        // Standard error may also be a file: colours are for terminals.
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
