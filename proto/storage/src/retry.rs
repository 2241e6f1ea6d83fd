//! When something that failed is tried again: the one policy of all stores, with its limits.
//!
//! An operation that fails for now is begun again as a whole, with growing pauses, until the deadline of its [`Retries`] has
//! passed. Every operation may be repeated without harm, so an answer that was lost after the work was done costs nothing.

use std::fmt::Display;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::time::Instant;
use ulmus_types::{RUN_STORE_DEADLINE, RUN_STORE_REQUEST};

/// How long a store is given. Who waits for whom decides: behind a corpus is a queue of read-ahead data, behind the files of
/// a run are processes that are judged by their silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// No operation is begun again later than this after it was first begun.
    pub deadline: Duration,
    /// A single request that takes longer has failed.
    pub request_timeout: Duration,
    /// How often a single request that gets no answer, or a busy one, is made again by itself.
    pub requests: usize,
}

impl Retries {
    /// For corpora: long enough for a server to be restarted.
    pub const CORPUS: Self =
        Self { deadline: Duration::from_mins(1), request_timeout: Duration::from_secs(30), requests: 2 };
    /// For the files of a run: an operation ends before the coordinator considers the process that waits for it stuck
    /// ([`FORM_STILL_FOR`](ulmus_types::FORM_STILL_FOR)), and a request before the coordinator gives up a worker that is reading
    /// the store to join ([`GREETED_WITHIN`](ulmus_types::GREETED_WITHIN)).
    pub const RUN: Self =
        Self { deadline: RUN_STORE_DEADLINE, request_timeout: RUN_STORE_REQUEST, requests: 0 };
}

/// Minimum number of retries of an upload in parts, because its first attempt alone may take longer than the deadline.
pub(crate) const UPLOAD_RETRIES: usize = 1;
/// Minimum number of retries of a copy, which may take hours.
pub(crate) const COPY_RETRIES: usize = 4;

pub(crate) const FIRST_PAUSE: Duration = Duration::from_millis(100);
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Retries an operation while its errors are transient: until `deadline` has passed, and `at_least` times however long that
/// takes. Pauses double each time, with jitter, so that many workers do not return in step.
///
/// # Errors
/// With the last error.
///
/// # Cancel safety
/// As safe as the operation is.
pub async fn retried<T, E: Display, R: Future<Output = Result<T, E>>>(
    deadline: Duration,
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
        let error = match operation().await {
            Err(error) if is_transient(&error) => error,
            result => return result,
        };
        let left = deadline.saturating_sub(begun.elapsed());
        if left.is_zero() && failed >= at_least {
            return Err(error);
        }
        // The last attempt is made at the deadline.
        let pause = if left.is_zero() { pause } else { pause.min(left) };
        tracing::debug!(%error, ?pause, "store unavailable, retrying");
        tokio::time::sleep(pause).await;
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
        retried(Retries::CORPUS.deadline, at_least, |error| error == "busy", operation).await.unwrap_err();
        begun
    }

    #[tokio::test(start_paused = true)]
    async fn a_minute_is_bridged_and_no_more() {
        let begun = Instant::now();
        let quick = attempts(0, "busy", Duration::ZERO).await;
        let took = begun.elapsed();
        assert!(quick >= 8, "{quick}");
        assert_eq!(took, Retries::CORPUS.deadline);
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
