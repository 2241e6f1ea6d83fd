//! From signals to a token that every part of a program watches.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use ulmus_types::ExitStatus;

/// Signals so close to each other are one: `timeout` of GNU signals a process, and then its group.
const ONE_SIGNAL: Duration = Duration::from_millis(100);

/// Which signal asked a program to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: somebody pressed Ctrl-C.
    Interrupt,
    /// SIGTERM: a scheduler, a service manager or a person wants the process gone.
    Terminate,
}

/// Tells a program to save and stop. The second signal ends it at once.
#[derive(Debug, Clone)]
pub struct Shutdown {
    token: CancellationToken,
    signal: Arc<OnceLock<Signal>>,
}

impl Shutdown {
    /// A shutdown that nobody has asked for, and that only [`Self::request`] brings about.
    pub fn manual() -> Self {
        Self { token: CancellationToken::new(), signal: Arc::default() }
    }

    /// A shutdown that SIGINT and SIGTERM bring about.
    ///
    /// # Errors
    /// When the process may not handle signals.
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

    /// Asks for it, as this signal would.
    pub fn request(&self, signal: Signal) {
        self.signal.get_or_init(|| signal);
        self.token.cancel();
    }

    /// Waits until it is asked for. Cancel safe.
    pub async fn requested(&self) -> Signal {
        self.token.cancelled().await;
        *self.signal.get_or_init(|| Signal::Interrupt)
    }
}
