//! From signals to a token that every part of a program watches.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use ulmus_types::ExitStatus;

/// Tells a program to save and stop. The second signal ends it at once.
#[derive(Debug, Clone)]
pub struct Shutdown {
    token: CancellationToken,
}

impl Shutdown {
    /// A shutdown that nobody has asked for, and that only [`Self::request`] brings about.
    pub fn manual() -> Self {
        Self { token: CancellationToken::new() }
    }

    /// A shutdown that SIGINT and SIGTERM bring about.
    ///
    /// # Errors
    /// When the process may not handle signals.
    pub fn on_signals(tasks: &TaskTracker) -> std::io::Result<Self> {
        let shutdown = Self::manual();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let token = shutdown.token.clone();
        tasks.spawn(async move {
            for count in 0.. {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if count > 0 {
                    std::process::exit(i32::from(ExitStatus::Interrupted.code()));
                }
                token.cancel();
            }
        });
        Ok(shutdown)
    }

    /// Asks for it.
    pub fn request(&self) {
        self.token.cancel();
    }

    /// Whether it was asked for.
    pub fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until it is asked for. Cancel safe.
    pub async fn requested(&self) {
        self.token.cancelled().await;
    }
}
