//! Turns signals into a token that every part of a program watches.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use ulmus_types::ExitStatus;

/// Signals this close together count as one: GNU `timeout` signals a process, and then its whole group.
const ONE_SIGNAL: Duration = Duration::from_millis(100);

/// Which signal asked a program to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: a person pressed Ctrl-C.
    Interrupt,
    /// SIGTERM: a scheduler, a service manager or a person wants the process to end.
    Terminate,
}

/// Tells a program to save and stop. A second signal ends it at once.
#[derive(Debug, Clone)]
pub struct Shutdown {
    token: CancellationToken,
    signal: Arc<OnceLock<Signal>>,
}

impl Shutdown {
    /// A shutdown that only [`Self::request`] triggers.
    pub fn manual() -> Self {
        Self { token: CancellationToken::new(), signal: Arc::default() }
    }

    /// A shutdown that SIGINT and SIGTERM trigger.
    ///
    /// # Errors
    /// When signal handlers cannot be installed.
    pub fn on_signals(tasks: &TaskTracker) -> std::io::Result<Self> {
        let shutdown = Self::manual();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let asked = shutdown.clone();
        tasks.spawn(async move {
            let mut first: Option<Instant> = None;
            loop {
                let signal = tokio::select! {
                    _ = interrupt.recv() => Signal::Interrupt,
                    _ = terminate.recv() => Signal::Terminate,
                };
                match first {
                    None => {
                        first = Some(Instant::now());
                        asked.request(signal);
                    }
                    Some(first) if first.elapsed() < ONE_SIGNAL => {}
                    Some(_) => std::process::exit(i32::from(ExitStatus::Interrupted.code())),
                }
            }
        });
        Ok(shutdown)
    }

    /// Requests the shutdown as this signal would.
    pub fn request(&self, signal: Signal) {
        self.signal.get_or_init(|| signal);
        self.token.cancel();
    }

    /// Waits until the shutdown is requested. Cancel safe.
    pub async fn requested(&self) -> Signal {
        self.token.cancelled().await;
        *self.signal.get_or_init(|| Signal::Interrupt)
    }
}
