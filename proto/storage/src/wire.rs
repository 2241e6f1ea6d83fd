//! The HTTP client below every remote store: a deadline for each request, attempts that are counted, and pauses that
//! a server asks for. The retries of single requests are those of crate `object_store`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::BodyExt;
use object_store::client::{
    ClientConfigKey, ClientOptions, HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService, ReqwestConnector,
};
use object_store::path::Path;
use object_store::{BackoffConfig, RetryConfig};
use reqwest::StatusCode;
use reqwest::header::{CONTENT_LENGTH, HeaderMap, RETRY_AFTER};
use tokio::time::Instant;

use crate::counters::Counters;
use crate::retry::{FIRST_PAUSE, LONGEST_PAUSE, Retries};

/// No pause that a server asks for is kept for longer.
const LONGEST_REQUESTED_PAUSE: Duration = Duration::from_mins(5);
const CONNECT: Duration = Duration::from_secs(10);

/// How often a single request is made again, for the builder of any store.
pub fn wire_retries(retries: Retries) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig { init_backoff: FIRST_PAUSE, max_backoff: LONGEST_PAUSE, base: 2.0 },
        max_retries: retries.requests,
        retry_timeout: Duration::from_mins(5),
    }
}

/// Settings of a client, for the builder of any store. HTTP without TLS is used only where an address says `http://`.
pub fn settings(Retries { request_timeout: timeout, .. }: Retries) -> [(ClientConfigKey, String); 3] {
    [
        (ClientConfigKey::Timeout, format!("{}ms", timeout.as_millis())),
        (ClientConfigKey::ConnectTimeout, format!("{}ms", CONNECT.min(timeout).as_millis())),
        (ClientConfigKey::AllowHttp, "true".to_owned()),
    ]
}

/// Makes clients that report to the counters of a store.
#[derive(Debug)]
pub(crate) struct Connector(pub(crate) Arc<Counters>);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        // The first caller decides for the process; later ones find that it has one.
        let _known = rustls::crypto::ring::default_provider().install_default();
        Ok(watched(ReqwestConnector::default().connect(options)?, &self.0))
    }
}

/// A client that counts what fails, and waits when its server asks for it.
pub fn watched(client: HttpClient, counters: &Arc<Counters>) -> HttpClient {
    HttpClient::new(Watched { client, counters: Arc::clone(counters), resume: Mutex::new(None) })
}

#[derive(Debug)]
struct Watched {
    client: HttpClient,
    counters: Arc<Counters>,
    /// Until then the server wants no requests.
    resume: Mutex<Option<Instant>>,
}

#[async_trait::async_trait]
impl HttpService for Watched {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let resume = *self.resume.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(resume) = resume {
            tokio::time::sleep_until(resume).await;
        }
        let lists = is_listing(&request);
        let response = self.client.execute(request).await.inspect_err(|_| self.counters.add_failed())?;
        let (status, wanted) = (response.status(), pause(response.headers()));
        if let Some(wanted) = wanted.filter(|_| is_overload(status) || exhausted(response.headers())) {
            let resume = Instant::now() + wanted.min(LONGEST_REQUESTED_PAUSE);
            *self.resume.lock().unwrap_or_else(PoisonError::into_inner) = Some(resume);
            tracing::info!(seconds = wanted.as_secs(), "the server asks for a pause");
        }
        if is_overload(status) || status.is_server_error() {
            self.counters.add_failed();
        }
        if lists && status.is_success() {
            return self.without_odd_names(response).await.inspect_err(|_| self.counters.add_failed());
        }
        // A connection that is cut fails while the body is read.
        let counters = Arc::clone(&self.counters);
        Ok(response.map(|body| {
            HttpResponseBody::new(body.map_err(move |error| {
                counters.add_failed();
                error
            }))
        }))
    }
}

impl Watched {
    /// The answer to a listing without names that no request can be made for: a single one would cost the whole answer.
    async fn without_odd_names(&self, response: HttpResponse) -> Result<HttpResponse, HttpError> {
        let (mut parts, body) = response.into_parts();
        let body = body.bytes().await?;
        let Ok(text) = std::str::from_utf8(&body) else {
            return Ok(HttpResponse::from_parts(parts, body.into()));
        };
        let (kept, odd) = cleaned(text);
        for name in odd {
            self.counters.add_odd_name(name);
        }
        parts.headers.remove(CONTENT_LENGTH);
        Ok(HttpResponse::from_parts(parts, kept.into()))
    }
}

/// Whether a request asks for a listing, as S3 and Google or as Azure know it.
fn is_listing(request: &HttpRequest) -> bool {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').any(|pair| matches!(pair, "list-type=2" | "comp=list"))
}

/// A listing without the entries whose names no request can be made for, and those names. Entries that stand for folders are
/// left out as well, and are not named.
fn cleaned(listing: &str) -> (String, Vec<String>) {
    let is_azure = listing.contains("<Blob>");
    let (begin, end, name) =
        if is_azure { ("<Blob>", "</Blob>", "Name") } else { ("<Contents>", "</Contents>", "Key") };
    let (mut kept, mut odd) = (String::with_capacity(listing.len()), Vec::new());
    let mut rest = listing;
    while let Some(at) = rest.find(begin)
        && let Some(length) = rest[at..].find(end)
    {
        let (entry, after) = rest.split_at(at + length + end.len());
        let (before, entry) = entry.split_at(at);
        kept.push_str(before);
        match name_of(entry, name) {
            Some(name) if name.ends_with('/') => (),
            Some(name) if name.starts_with('/') || Path::parse(&name).is_err() => odd.push(name),
            _ => kept.push_str(entry),
        }
        rest = after;
    }
    kept.push_str(rest);
    (kept, odd)
}

/// The text of an element within an entry.
fn name_of(entry: &str, element: &str) -> Option<String> {
    let (_, rest) = entry.split_once(&format!("<{element}>"))?;
    let (text, _) = rest.split_once(&format!("</{element}>"))?;
    let mut parts = text.split('&');
    let mut name = parts.next()?.to_owned();
    for part in parts {
        let (escape, rest) = part.split_once(';')?;
        name.push(match escape {
            "amp" => '&',
            "lt" => '<',
            "gt" => '>',
            "quot" => '"',
            "apos" => '\'',
            number => {
                let number = number.strip_prefix('#')?;
                let code = match number.strip_prefix(['x', 'X']) {
                    Some(digits) => u32::from_str_radix(digits, 16),
                    None => number.parse(),
                };
                char::from_u32(code.ok()?)?
            }
        });
        name.push_str(rest);
    }
    Some(name)
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
    fn odd_names_do_not_cost_a_listing() {
        let entry = |key: &str| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>");
        let of = |keys: &[&str]| {
            let entries: String = keys.iter().map(|key| entry(key)).collect();
            format!("<ListBucketResult><Name>b</Name>{entries}<KeyCount>1</KeyCount></ListBucketResult>")
        };
        let all = ["a/b.jsonl", "a/x//y.jsonl", "a/./c", "/d", "a/", "e&amp;f&#x20;g", "h&#10;i", "j/../k"];
        let (kept, odd) = cleaned(&of(&all));
        assert_eq!(kept, of(&["a/b.jsonl", "e&amp;f&#x20;g"]));
        assert_eq!(odd, ["a/x//y.jsonl", "a/./c", "/d", "h\ni", "j/../k"]);
        let azure = "<Blobs><Blob><Name>a</Name></Blob><Blob><Name>b//c</Name></Blob></Blobs><NextMarker/>";
        assert_eq!(cleaned(azure).0, "<Blobs><Blob><Name>a</Name></Blob></Blobs><NextMarker/>");
    }

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
