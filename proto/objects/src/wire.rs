//! The HTTP client below every remote store: a deadline for each request, attempts that are counted, and pauses that
//! a server asks for. The retries themselves are those of crate `object_store`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::BodyExt;
use object_store::client::{
    ClientConfigKey, ClientOptions, HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService, ReqwestConnector,
};
use object_store::{BackoffConfig, RetryConfig};
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use tokio::time::Instant;

use super::Failures;

/// No pause is longer, whatever a server asks for.
const LONGEST_PAUSE: Duration = Duration::from_mins(5);
const CONNECT: Duration = Duration::from_secs(10);

/// Back-off with jitter, for a request that is made again so often. The attempts above give a server a minute, so that its
/// restart is no error.
pub fn retries(max_retries: usize) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(15),
            base: 2.0,
        },
        max_retries,
        retry_timeout: Duration::from_mins(5),
    }
}

/// Settings of a client, for the builder of any store. HTTP without TLS is used only where an address says `http://`.
pub fn settings(timeout: Duration) -> [(ClientConfigKey, String); 3] {
    [
        (ClientConfigKey::Timeout, format!("{}ms", timeout.as_millis())),
        (ClientConfigKey::ConnectTimeout, format!("{}ms", CONNECT.min(timeout).as_millis())),
        (ClientConfigKey::AllowHttp, "true".to_owned()),
    ]
}

/// Makes clients that report to a source's failures.
#[derive(Debug)]
pub(super) struct Connector(pub(super) Arc<Failures>);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        // The first caller decides for the process; later ones find that it has one.
        let _known = rustls::crypto::ring::default_provider().install_default();
        Ok(watched(ReqwestConnector::default().connect(options)?, &self.0))
    }
}

/// A client that counts what fails, and waits when its server asks for it.
pub fn watched(client: HttpClient, failures: &Arc<Failures>) -> HttpClient {
    HttpClient::new(Watched { client, failures: Arc::clone(failures), resume: Mutex::new(None) })
}

#[derive(Debug)]
struct Watched {
    client: HttpClient,
    failures: Arc<Failures>,
    /// When the server wants to be asked again.
    resume: Mutex<Option<Instant>>,
}

#[async_trait::async_trait]
impl HttpService for Watched {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let resume = *self.resume.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(resume) = resume {
            tokio::time::sleep_until(resume).await;
        }
        let response = self.client.execute(request).await.inspect_err(|_| self.failures.add())?;
        let (status, wanted) = (response.status(), pause(response.headers()));
        if let Some(wanted) = wanted.filter(|_| is_overload(status) || exhausted(response.headers())) {
            let resume = Instant::now() + wanted.min(LONGEST_PAUSE);
            *self.resume.lock().unwrap_or_else(PoisonError::into_inner) = Some(resume);
            tracing::info!(seconds = wanted.as_secs(), "the server asks for a pause");
        }
        if is_overload(status) || status.is_server_error() {
            self.failures.add();
        }
        // A connection that is cut fails while the body is read.
        let failures = Arc::clone(&self.failures);
        Ok(response.map(|body| {
            HttpResponseBody::new(body.map_err(move |error| {
                failures.add();
                error
            }))
        }))
    }
}

fn is_overload(status: StatusCode) -> bool {
    matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
}

/// Seconds that a server wants to be left alone for: `Retry-After` (RFC 9110, section 10.2.3), or `t` of `RateLimit`
/// (draft-ietf-httpapi-ratelimit-headers).
fn pause(headers: &HeaderMap) -> Option<Duration> {
    let after = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    after.or_else(|| rate_limit(headers, "t=")).map(Duration::from_secs)
}

/// Whether the request that was answered was the last one for a while.
fn exhausted(headers: &HeaderMap) -> bool {
    rate_limit(headers, "r=") == Some(0)
}

fn rate_limit(headers: &HeaderMap, parameter: &str) -> Option<u64> {
    let value = headers.get("ratelimit")?.to_str().ok()?;
    value.split([';', ',']).find_map(|part| part.trim().strip_prefix(parameter)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_read_from_both_headers() {
        let headers = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())])
        };
        assert_eq!(pause(&headers("retry-after", "7")), Some(Duration::from_secs(7)));
        let spent = headers("ratelimit", "\"resolvers\";r=0;t=93");
        assert_eq!((pause(&spent), exhausted(&spent)), (Some(Duration::from_secs(93)), true));
        let left = headers("ratelimit", "\"api\"; r=12; t=93");
        assert_eq!((pause(&left), exhausted(&left)), (Some(Duration::from_secs(93)), false));
        assert_eq!(pause(&headers("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT")), None);
    }
}
