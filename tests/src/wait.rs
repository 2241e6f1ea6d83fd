//! Waits for a condition, with a deadline.
//!
//! Deadlines are far longer than anything takes on an idle machine: they only end tests that hang.

use std::time::{Duration, Instant};

/// How long anything may take.
pub(crate) const DEADLINE: Duration = Duration::from_mins(2);

/// Time between two evaluations of a condition.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Polls until `condition` returns a value. For files and foreign processes, which cannot notify.
///
/// # Panics
/// When the condition returns nothing for too long. `what` names what was waited for.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(began.elapsed() < DEADLINE, "waited {DEADLINE:?} in vain for {what}");
        std::thread::park_timeout(LOOK_EVERY);
    }
}
