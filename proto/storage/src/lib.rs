//! From addresses to object stores. Credentials come from the environment and the files that each provider's own tools
//! write, never from an address. Data is read and runs are kept through this.

#[cfg(feature = "aws")]
mod profile;
#[cfg(feature = "http")]
mod wire;

use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use object_store::ObjectStore;
use object_store::path::Path;

#[cfg(feature = "http")]
pub use wire::{retries, settings, watched};

/// The error of a disk that takes nothing, if it is one: it will be the same in a minute. Who asked decides for how long that
/// is waited for.
pub fn of_disk(error: &object_store::Error) -> Option<&io::Error> {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && matches!(io.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem | PermissionDenied)
        {
            return Some(io);
        }
        cause = error.source();
    }
    None
}

/// What went wrong at a store: requests that failed, most of which were then made again, and names that its listings had and
/// that no request can be made for.
#[derive(Debug, Default)]
pub struct Failures {
    requests: AtomicU64,
    names: Mutex<BTreeSet<String>>,
}

impl Failures {
    /// How many requests so far.
    pub fn count(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Names that were left out of listings, as the whole store has them.
    pub fn odd_names(&self) -> BTreeSet<String> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One request more.
    #[cfg(feature = "http")]
    pub(crate) fn add(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Another name.
    #[cfg(feature = "http")]
    pub(crate) fn add_name(&self, name: String) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
    }
}

/// Everything behind one address form.
pub type Opened = Result<(Arc<dyn ObjectStore>, Path), String>;

/// How requests are made.
#[derive(Debug, Clone, Copy)]
pub struct Requests {
    /// One that takes longer has failed.
    pub timeout: Duration,
    /// How often one that has failed is made again.
    pub retries: usize,
}

/// Opens the store of an address such as `s3://bucket/path`, and gives the path within it.
///
/// # Errors
/// In words, when there is no such store, or it is none of this build.
pub fn open(url: &str, requests: Requests, failures: &Arc<Failures>) -> Opened {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    // Addresses have neither fragments nor queries here, and a percent sign may stand for itself.
    let url = &literal(url);
    match scheme {
        "http" | "https" => http(url, requests, failures),
        "s3" | "s3a" => s3(url, requests, failures),
        "gs" => gcs(url, requests, failures),
        "az" | "abfs" | "abfss" => azure(url, requests, failures),
        _ => Err(format!(
            "{scheme}:// is not known; write a path, file://, s3://, gs://, az://, hf://datasets/, http://, https:// or run:"
        )),
    }
}

/// An address in which `#`, and a percent sign that begins no escape, are written so that they mean themselves.
fn literal(url: &str) -> String {
    let is_escape = |at: usize| {
        url.as_bytes().get(at + 1..at + 3).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    let written = |(at, c): (usize, char)| match c {
        '#' => "%23".to_owned(),
        '%' if !is_escape(at) => "%25".to_owned(),
        c => c.to_string(),
    };
    url.char_indices().map(written).collect()
}

/// What is told where a store was left out of the program.
#[cfg(not(all(feature = "http", feature = "aws", feature = "gcp", feature = "azure")))]
fn left_out(feature: &str) -> Opened {
    Err(format!("this program was built without the feature `{feature}`; build with it, or write a path"))
}

#[cfg(feature = "http")]
fn http(url: &str, requests: Requests, failures: &Arc<Failures>) -> Opened {
    use object_store::http::HttpBuilder;

    let builder = HttpBuilder::new().with_url(url).with_retry(wire::retries(requests.retries));
    let builder = wire::settings(requests.timeout)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(key, value));
    let store = builder.with_http_connector(wire::Connector(Arc::clone(failures))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), Path::default()))
}

#[cfg(not(feature = "http"))]
fn http(_: &str, _: Requests, _: &Arc<Failures>) -> Opened {
    left_out("http")
}

/// The path in a bucket or container that an address names.
#[cfg(any(feature = "aws", feature = "gcp", feature = "azure"))]
fn path_of(url: &str) -> Result<Path, String> {
    let url = url::Url::parse(url).map_err(|error| error.to_string())?;
    let (_, path) = object_store::ObjectStoreScheme::parse(&url).map_err(|error| error.to_string())?;
    Ok(path)
}

#[cfg(feature = "aws")]
fn s3(url: &str, requests: Requests, failures: &Arc<Failures>) -> Opened {
    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};

    let builder = AmazonS3Builder::from_env().with_url(url).with_retry(wire::retries(requests.retries));
    let builder = wire::settings(requests.timeout)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(AmazonS3ConfigKey::Client(key), value));
    let builder = profile::fill(builder)?;
    let store = builder.with_http_connector(wire::Connector(Arc::clone(failures))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), path_of(url)?))
}

#[cfg(not(feature = "aws"))]
fn s3(_: &str, _: Requests, _: &Arc<Failures>) -> Opened {
    left_out("aws")
}

#[cfg(feature = "gcp")]
fn gcs(url: &str, requests: Requests, failures: &Arc<Failures>) -> Opened {
    use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};

    let builder =
        GoogleCloudStorageBuilder::from_env().with_url(url).with_retry(wire::retries(requests.retries));
    let builder = wire::settings(requests.timeout)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(GoogleConfigKey::Client(key), value));
    let store = builder.with_http_connector(wire::Connector(Arc::clone(failures))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), path_of(url)?))
}

#[cfg(not(feature = "gcp"))]
fn gcs(_: &str, _: Requests, _: &Arc<Failures>) -> Opened {
    left_out("gcp")
}

#[cfg(feature = "azure")]
fn azure(url: &str, requests: Requests, failures: &Arc<Failures>) -> Opened {
    use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};

    let builder = MicrosoftAzureBuilder::from_env().with_url(url).with_retry(wire::retries(requests.retries));
    let builder = wire::settings(requests.timeout)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(AzureConfigKey::Client(key), value));
    let store = builder.with_http_connector(wire::Connector(Arc::clone(failures))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), path_of(url)?))
}

#[cfg(not(feature = "azure"))]
fn azure(_: &str, _: Requests, _: &Arc<Failures>) -> Opened {
    left_out("azure")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_of_an_address_may_mean_themselves() {
        for (url, expected) in [
            ("s3://b/a#1/x y", "s3://b/a%231/x y"),
            ("https://h/100%/a%20b", "https://h/100%25/a%20b"),
            ("gs://b/50%2", "gs://b/50%252"),
        ] {
            assert_eq!(literal(url), expected);
        }
    }

    #[cfg(feature = "aws")]
    #[test]
    fn folders_of_buckets_have_any_name() {
        for (url, expected) in [
            ("s3://b/my folder/a#1", "my folder/a#1"),
            ("s3://b/a+b/ä", "a+b/ä"),
            ("s3://b/100%/x", "100%/x"),
            ("s3://b/a%20b", "a b"),
        ] {
            assert_eq!(path_of(&literal(url)).unwrap().as_ref(), expected, "{url}");
        }
    }
}
