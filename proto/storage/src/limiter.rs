//! A limit on how many bytes pass in a second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Keeps one rate over all files that are copied with it.
#[derive(Debug)]
pub struct RateLimiter {
    rate: Option<u64>,
    begun: Instant,
    passed: AtomicU64,
}

impl RateLimiter {
    /// A limit of `rate` bytes per second from now on, or none.
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate, begun: Instant::now(), passed: AtomicU64::new(0) }
    }

    /// Waits until `bytes` more are within the rate.
    pub async fn acquire(&self, bytes: u64) {
        let before = self.passed.fetch_add(bytes, Ordering::Relaxed);
        if let Some(rate) = self.rate {
            let due = Duration::from_secs_f64(before as f64 / rate.max(1) as f64);
            tokio::time::sleep_until(self.begun + due).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_kept_over_all_that_passes() {
        let (limited, free) = (RateLimiter::new(Some(100)), RateLimiter::new(None));
        let begun = Instant::now();
        for _ in 0..5 {
            free.acquire(1 << 30).await;
        }
        assert_eq!(begun.elapsed(), Duration::ZERO);
        for _ in 0..5 {
            limited.acquire(50).await;
        }
        // The fifth waits for the four before it.
        assert_eq!(begun.elapsed().as_secs(), 2);
    }
}
