//! Datasets on the Hugging Face hub, `hf://datasets/<organisation>/<name>[@revision][/<folder>]`, and models,
//! `hf://<organisation>/<name>[@revision][/<folder>]`.
//!
//! A revision is resolved to its commit once, and everything is read of that commit: files of a commit never change.
//! The hub answers a request for a file by sending the client on to its content network; the place is remembered
//! for a while, so that most ranges cost one request and the hub's rate limit is spent on listings.
//!
//! `HF_ENDPOINT` names another hub; the token is `HF_TOKEN`, or the one that the hub's own tools have stored.
//! It is sent to the hub alone.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use object_store::ObjectStore;
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
    HttpResponse, HttpService,
};
use object_store::http::HttpBuilder;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LINK, LOCATION};
use reqwest::{Method, StatusCode, redirect};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};
use tokio::sync::OnceCell;
use tokio::time::Instant;
use ulmus_process::with_causes;
use ulmus_storage::{Counters, FileInfo, Retries, StoreError, retried};
use ulmus_types::Digest;
use url::Url;

use super::open::HubKind;
use crate::error::DataError;

const SCHEME: &str = "hf://";
const ENDPOINT: &str = "https://huggingface.co";
/// Places on the content network are signed for an hour.
const REMEMBERED: Duration = Duration::from_mins(10);
const MOST_REDIRECTS: usize = 5;

/// A repository at one commit.
#[derive(Debug)]
pub(super) struct Hub {
    client: Client,
    repository: Repository,
    commit: String,
    files: OnceCell<Vec<FileInfo>>,
}

impl HubKind {
    /// What stands before the name in an address.
    const fn prefix(self) -> &'static str {
        match self {
            Self::Dataset => "datasets",
            Self::Model => "",
        }
    }

    const fn in_api(self) -> &'static str {
        match self {
            Self::Dataset => "datasets",
            Self::Model => "models",
        }
    }

    const fn form(self) -> &'static str {
        match self {
            Self::Dataset => {
                "a dataset is written hf://datasets/<organisation>/<name>[@<revision>][/<folder>]"
            }
            Self::Model => "a model is written hf://<organisation>/<name>[@<revision>][/<folder>]",
        }
    }
}

/// What an address names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Repository {
    kind: HubKind,
    /// `organisation/name`.
    id: String,
    revision: String,
    folder: String,
}

impl Repository {
    fn parse(kind: HubKind, url: &str) -> Result<Self, String> {
        let form = kind.form();
        let rest = url.strip_prefix(SCHEME).and_then(|rest| match kind {
            HubKind::Dataset => rest.strip_prefix("datasets/"),
            HubKind::Model => Some(rest).filter(|rest| !rest.starts_with("datasets/")),
        });
        let rest = rest.ok_or_else(|| form.to_owned())?;
        let mut parts = rest.split('/').filter(|part| !part.is_empty());
        let (Some(organisation), Some(name)) = (parts.next(), parts.next()) else {
            return Err(form.to_owned());
        };
        let (name, revision) = match name.split_once('@') {
            // The one kind of revision that has slashes: refs/convert/parquet, refs/pr/1.
            Some((name, "refs")) => {
                let rest = [parts.next(), parts.next()].into_iter().flatten().collect::<Vec<_>>();
                (name, format!("refs/{}", rest.join("/")))
            }
            Some((name, revision)) => (name, revision.replace("%2F", "/")),
            None => (name, "main".to_owned()),
        };
        if revision.is_empty() {
            return Err(form.to_owned());
        }
        let folder = parts.collect::<Vec<_>>().join("/");
        Ok(Self { kind, id: format!("{organisation}/{name}"), revision, folder })
    }
}

/// Whether a revision is the name of a commit, which never changes.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Hub {
    /// Finds the commit that an address names, and a store for the files of its folder.
    pub(super) async fn open(
        kind: HubKind,
        url: &str,
        retries: Retries,
        counters: &Arc<Counters>,
    ) -> Result<(Self, Arc<dyn ObjectStore>), Failed> {
        let repository = Repository::parse(kind, url).map_err(Failed::finally)?;
        let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| ENDPOINT.to_owned());
        let client = Client::new(endpoint.trim_end_matches('/'), retries.request_timeout, counters)
            .map_err(Failed::finally)?;
        let Repository { id, revision, .. } = &repository;
        let commit = if is_commit(revision) {
            revision.clone()
        } else {
            let path = ["api", kind.in_api()].into_iter().chain(id.split('/')).chain(["revision", revision]);
            client.json::<Revision>(client.address(path)?.as_str()).await?.0.sha
        };
        let files = [kind.prefix()].into_iter().chain(id.split('/')).chain(["resolve", &commit]);
        let builder = HttpBuilder::new()
            .with_url(client.address(files.chain(repository.folder.split('/')))?)
            .with_retry(ulmus_storage::wire_retries(retries))
            .with_http_connector(Redirects::new(client.clone()));
        let builder = ulmus_storage::settings(retries)
            .into_iter()
            .fold(builder, |builder, (key, value)| builder.with_config(key, value));
        let store = builder.build().map_err(|error| Failed::finally(error.to_string()))?;
        Ok((Self { client, repository, commit, files: OnceCell::new() }, Arc::new(store)))
    }

    /// The address of the same folder at its commit.
    pub(super) fn pinned(&self) -> String {
        let Repository { kind, id, folder, .. } = &self.repository;
        let parts = [kind.prefix(), &format!("{id}@{}", self.commit), folder];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        format!("{SCHEME}{}", parts.join("/"))
    }

    /// All files below the folder, in any order. Their versions are hashes of their contents. Since a commit never changes, the
    /// hub is asked once.
    pub(super) async fn list(&self) -> Result<Vec<FileInfo>, Failed> {
        self.files.get_or_try_init(|| self.ask_for_list()).await.cloned()
    }

    async fn ask_for_list(&self) -> Result<Vec<FileInfo>, Failed> {
        let Repository { kind, id, folder, .. } = &self.repository;
        let tree = ["api", kind.in_api()].into_iter().chain(id.split('/')).chain(["tree", &self.commit]);
        let tree = self.client.address(tree.chain(folder.split('/')))?;
        let mut next = Some(format!("{tree}?recursive=true"));
        let mut files = Vec::new();
        while let Some(page) = next {
            let entries: Vec<Entry>;
            (entries, next) = self.client.json(&page).await?;
            for Entry { kind, path, size, oid, lfs } in entries {
                let below = if folder.is_empty() {
                    Some(path.as_str())
                } else {
                    path.strip_prefix(folder).and_then(|path| path.strip_prefix('/'))
                };
                if let Some(path) = below.filter(|_| kind == "file") {
                    let path = path.to_owned();
                    files.push(FileInfo { path, size, version: Some(lfs.map_or(oid, |lfs| lfs.oid)) });
                }
            }
        }
        Ok(files)
    }
}

/// Whether a file has the contents that the hub names by a version, as far as that can be said: large files are named by their
/// SHA-256, and others by a hash of Git's.
pub(super) fn has_version(path: &Path, version: &str) -> io::Result<bool> {
    if version.len() != 64 {
        return Ok(true);
    }
    let (mut file, mut hash, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Digest::from_bytes(hash.finalize().into()).to_string() == version),
            read => hash.update(&buffer[..read]),
        }
    }
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    /// SHA-256 of the contents.
    oid: String,
}

/// A client of the hub that follows no redirect.
#[derive(Debug, Clone)]
struct Client {
    endpoint: String,
    http: HttpClient,
    token: Option<HeaderValue>,
}

impl Client {
    fn new(endpoint: &str, timeout: Duration, counters: &Arc<Counters>) -> Result<Self, String> {
        // The first caller decides for the process; later ones find that it has one.
        let _known = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .user_agent(concat!("ulmus/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .timeout(timeout)
            .build()
            .map_err(|error| error.to_string())?;
        let token = token().map(|token| {
            let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| "the hub's token has characters that no token can have".to_owned())?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        });
        Ok(Self {
            // Written as in the addresses that are made from it.
            endpoint: Url::parse(endpoint)
                .map_or_else(|_| endpoint.to_owned(), |url| url.as_str().trim_end_matches('/').to_owned()),
            http: ulmus_storage::watched(HttpClient::new(http), counters),
            token: token.transpose()?,
        })
    }

    /// The address of a path on the hub. Its parts may have any characters; empty ones are left out.
    fn address<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> Result<Url, Failed> {
        let refuse = |reason: String| {
            Failed::finally(format!("HF_ENDPOINT = {:?} cannot be used: {reason}", self.endpoint))
        };
        let mut url = Url::parse(&self.endpoint).map_err(|error| refuse(error.to_string()))?;
        let mut path = url.path_segments_mut().map_err(|()| refuse("it has no path".to_owned()))?;
        path.pop_if_empty().extend(parts.into_iter().filter(|part| !part.is_empty()));
        drop(path);
        Ok(url)
    }

    /// One request, with the token where it goes to the hub.
    async fn send(&self, method: &Method, url: &str, headers: &HeaderMap) -> Result<HttpResponse, HttpError> {
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.uri_mut() =
            url.parse().map_err(|error| HttpError::new(HttpErrorKind::Decode, Refused::from(error)))?;
        request.method_mut().clone_from(method);
        request.headers_mut().clone_from(headers);
        if url.starts_with(&format!("{}/", self.endpoint))
            && let Some(token) = &self.token
        {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        self.http.execute(request).await
    }

    /// What the hub's API answers, and the address of the next page.
    async fn json<T: DeserializeOwned>(&self, url: &str) -> Result<(T, Option<String>), Failed> {
        let attempt = || async {
            // A dataset may have moved.
            let redirects = Redirects::new(self.clone());
            let answer = redirects.follow(&Method::GET, url, &HeaderMap::new()).await;
            let (answer, _) = answer.map_err(|error| {
                let for_now = error.kind() != HttpErrorKind::Decode;
                Failed { reason: with_causes(&error), for_now }
            })?;
            let (parts, body) = answer.into_parts();
            let (status, next) = (parts.status, next_page(&parts.headers));
            if !status.is_success() {
                let for_now = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
                return Err(Failed { reason: told(status, self.token.is_some()), for_now });
            }
            let body = body.bytes().await;
            let body = body.map_err(|error| Failed::for_now(with_causes(&error)))?;
            let value = serde_json::from_slice(&body).map_err(|error| {
                Failed::finally(format!("the answer of {url} cannot be understood: {error}"))
            })?;
            Ok((value, next))
        };
        retried(Retries::CORPUS.deadline, 0, |failed: &Failed| failed.for_now, attempt).await
    }
}

/// Why the hub gave nothing.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub(super) struct Failed {
    reason: String,
    /// Whether it may answer later.
    for_now: bool,
}

impl Failed {
    const fn for_now(reason: String) -> Self {
        Self { reason, for_now: true }
    }

    const fn finally(reason: String) -> Self {
        Self { reason, for_now: false }
    }

    /// The error about a dataset.
    pub(super) fn of(self, url: &str) -> DataError {
        let (url, Self { reason, for_now }) = (url.to_owned(), self);
        if for_now {
            DataError::Store(StoreError::Transient { act: "read", file: url, reason })
        } else {
            DataError::Url { url, reason }
        }
    }
}

/// Why a redirect of the hub is not followed.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the hub redirects to an invalid address: {0}")]
    Address(#[from] http::uri::InvalidUri),
    #[error("the hub redirects in a circle")]
    Circle,
}

fn told(status: StatusCode, has_token: bool) -> String {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if has_token => format!(
            "the hub answers {status}: the token may not read this repository, or none has this name and revision"
        ),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => format!(
            "the hub answers {status}: there is no repository of this name, or it needs a token; set HF_TOKEN"
        ),
        StatusCode::NOT_FOUND => {
            format!(
                "the hub answers {status}: it has no such repository, revision or folder; correct the address"
            )
        }
        _ => format!("the hub answers {status}"),
    }
}

/// The token of the environment, or the one that was stored by logging in.
fn token() -> Option<String> {
    let variable = |name| std::env::var_os(name);
    let stored = || {
        let path = variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| {
            let home = variable("HF_HOME").map(PathBuf::from);
            Some(home.or_else(|| Some(std::env::home_dir()?.join(".cache/huggingface")))?.join("token"))
        });
        std::fs::read_to_string(path?).ok()
    };
    let token = std::env::var("HF_TOKEN").ok().or_else(stored)?.trim().to_owned();
    (!token.is_empty()).then_some(token)
}

/// The address of `rel="next"` (RFC 8288).
fn next_page(headers: &HeaderMap) -> Option<String> {
    headers
        .get_all(LINK)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|link| {
            let (address, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
            parameters.contains("rel=\"next\"").then(|| address.to_owned())
        })
}

/// Follows the hub to its content network, and remembers the way.
#[derive(Debug, Clone)]
struct Redirects {
    client: Client,
    known: Arc<Mutex<HashMap<String, (String, Instant)>>>,
}

impl Redirects {
    fn new(client: Client) -> Self {
        Self { client, known: Arc::default() }
    }

    /// The answer at the end of all redirects, and where that is.
    async fn follow(
        &self,
        method: &Method,
        url: &str,
        headers: &HeaderMap,
    ) -> Result<(HttpResponse, String), HttpError> {
        let mut at = url.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let answer = self.client.send(method, &at, headers).await?;
            let location = answer.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let Some(location) = location.filter(|_| answer.status().is_redirection()) else {
                return Ok((answer, at));
            };
            let next = Url::parse(&at).and_then(|at| at.join(location));
            at = next.map_or_else(|_| location.to_owned(), String::from);
        }
        Err(HttpError::new(HttpErrorKind::Decode, Refused::Circle))
    }

    fn known(&self, url: &str) -> Option<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(url).filter(|(_, since)| since.elapsed() < REMEMBERED).map(|(place, _)| place.clone())
    }

    fn remember(&self, url: &str, place: Option<String>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, (_, since)| since.elapsed() < REMEMBERED);
        match place {
            Some(place) => known.insert(url.to_owned(), (place, Instant::now())),
            None => known.remove(url),
        };
    }
}

impl HttpConnector for Redirects {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait::async_trait]
impl HttpService for Redirects {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (method, headers) = (request.method(), request.headers());
        let asked = request.uri().to_string();
        if let Some(place) = self.known(&asked) {
            let answer = self.client.send(method, &place, headers).await?;
            // The signature has expired.
            if !answer.status().is_client_error() || answer.status() == StatusCode::TOO_MANY_REQUESTS {
                return Ok(answer);
            }
            self.remember(&asked, None);
        }
        let (answer, at) = self.follow(method, &asked, headers).await?;
        if at != asked && answer.status().is_success() {
            self.remember(&asked, Some(at));
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_name_dataset_revision_and_folder() {
        let parse = |url: &str| {
            let Repository { id, revision, folder, .. } = Repository::parse(HubKind::Dataset, url)?;
            Ok::<_, String>([id, revision, folder].join(" "))
        };
        for (url, expected) in [
            ("hf://datasets/tiiuae/falcon-refinedweb", "tiiuae/falcon-refinedweb main "),
            ("hf://datasets/a/b@v1.0/data/x", "a/b v1.0 data/x"),
            ("hf://datasets/a/b@refs/convert/parquet/default", "a/b refs/convert/parquet default"),
            ("hf://datasets/a/b@refs%2Fpr%2F1/", "a/b refs/pr/1 "),
        ] {
            assert_eq!(parse(url).as_deref(), Ok(expected), "{url}");
        }
        for url in ["hf://datasets/a", "hf://models/a/b", "hf://datasets/a/b@"] {
            assert!(parse(url).unwrap_err().contains("hf://datasets/<organisation>/<name>"), "{url}");
        }
        let model = Repository::parse(HubKind::Model, "hf://apple/OpenELM-270M@v1").unwrap();
        assert_eq!([model.id, model.revision, model.folder], ["apple/OpenELM-270M", "v1", ""]);
        assert!(
            Repository::parse(HubKind::Model, "hf://datasets/a/b")
                .unwrap_err()
                .contains("a model is written")
        );
    }

    #[test]
    fn addresses_have_signs_that_mean_something() {
        let client = Client::new("https://hub/x", Duration::from_secs(1), &Arc::default()).unwrap();
        for (folder, expected) in [
            ("my folder/a#b", "https://hub/x/tree/my%20folder/a%23b"),
            ("what?/100%/a+b", "https://hub/x/tree/what%3F/100%25/a+b"),
            ("größe/", "https://hub/x/tree/gr%C3%B6%C3%9Fe"),
            ("", "https://hub/x/tree"),
        ] {
            let address = client.address(["tree"].into_iter().chain(folder.split('/')));
            assert_eq!(address.ok().map(String::from).as_deref(), Some(expected));
        }
        let revision = client.address(["revision", "refs/pr/1"]);
        assert_eq!(revision.ok().map(String::from).as_deref(), Some("https://hub/x/revision/refs%2Fpr%2F1"));
    }

    #[test]
    fn the_next_page_is_found_among_links() {
        let links = |value: &'static str| HeaderMap::from_iter([(LINK, HeaderValue::from_static(value))]);
        let two = links("<https://h/a?cursor=1>; rel=\"prev\", <https://h/a?cursor=3>; rel=\"next\"");
        assert_eq!(next_page(&two).as_deref(), Some("https://h/a?cursor=3"));
        assert_eq!(next_page(&links("<https://h/a>; rel=\"prev\"")), None);
    }
}
