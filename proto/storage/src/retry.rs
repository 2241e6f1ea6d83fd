//! When something that failed is tried again: the one policy of all stores, with its limits.
//!
//! A single request that gets no answer, or a busy one, is made again at once by the client below ([`REQUEST_RETRIES`]).
//! What still fails is begun again here, as a whole, with growing pauses, until a minute has passed: long enough for a server
//! to be restarted. Every operation may be repeated without harm, so an answer that was lost after the work was done costs
//! nothing.

use std::fmt::Display;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::time::Instant;

/// No operation is begun again later than this after it was first begun.
pub(crate) const RETRY_DEADLINE: Duration = Duration::from_mins(1);
/// An upload in parts is begun again so often at least, as the first attempt alone may take longer than the deadline.
pub(crate) const UPLOAD_RETRIES: usize = 1;
/// The same for a copy, which may take hours.
pub(crate) const COPY_RETRIES: usize = 4;
/// How often a single request is made again by itself.
#[cfg(feature = "http")]
pub(crate) const REQUEST_RETRIES: usize = 2;
/// What a single request may take, where a caller sets no limit of its own. Its body is one piece at most.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) const FIRST_PAUSE: Duration = Duration::from_millis(100);
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Does an operation again while its errors are transient, for a minute, and `at_least` so often whatever it takes. Pauses
/// double each time, and are lengthened by chance so that many workers do not return in step.
///
/// # Errors
/// With the last error.
///
/// # Cancel safety
/// As safe as the operation is.
pub async fn retried<T, E: Display, R: Future<Output = Result<T, E>>>(
    at_least: usize,
    is_transient: impl Fn(&E) -> bool,
    mut operation: impl FnMut() -> R,
) -> Result<T, E> {
    let pauses = ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .without_max_times()
        .with_jitter();
    let begun = Instant::now();
    for (failed, pause) in pauses.build().enumerate() {
        match operation().await {
            Err(error) if is_transient(&error) && (failed < at_least || begun.elapsed() < RETRY_DEADLINE) => {
                tracing::debug!(%error, ?pause, "store unavailable, retrying");
                tokio::time::sleep(pause).await;
            }
            result => return result,
        }
    }
    operation().await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often an operation that always fails is begun, where each attempt takes `each`.
    async fn attempts(at_least: usize, error: &str, each: Duration) -> u32 {
        let mut begun = 0;
        let operation = || {
            begun += 1;
            async move {
                tokio::time::sleep(each).await;
                Err::<(), _>(error.to_owned())
            }
        };
        retried(at_least, |error| error == "busy", operation).await.unwrap_err();
        begun
    }

    #[tokio::test(start_paused = true)]
    async fn a_minute_is_bridged_and_no_more() {
        let begun = Instant::now();
        let quick = attempts(0, "busy", Duration::ZERO).await;
        let took = begun.elapsed();
        assert!(quick >= 8, "{quick}");
        assert!((60..120).contains(&took.as_secs()), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_longer_than_the_limit_is_begun_again_if_it_should_be() {
        let slow = Duration::from_mins(2);
        assert_eq!(attempts(0, "busy", slow).await, 1);
        assert_eq!(attempts(COPY_RETRIES, "busy", slow).await, 5);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_final_is_told_at_once() {
        let begun = Instant::now();
        assert_eq!(attempts(COPY_RETRIES, "no", Duration::ZERO).await, 1);
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
