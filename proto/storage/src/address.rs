//! From addresses to object stores, and to folders of this machine.

use std::path::PathBuf;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::path::Path;

use crate::counters::Counters;
#[cfg(feature = "aws")]
use crate::profile;
use crate::retry::Retries;
#[cfg(feature = "http")]
use crate::wire;

/// An object store, and the path within it; or why there is none, in words.
type Opened = Result<(Arc<dyn ObjectStore>, Path), String>;

/// The folder of this machine that an address names, if it names one: a path, or `file://`.
///
/// # Errors
/// In words, when it would be one and cannot be.
pub fn directory_of(url: &str) -> Result<Option<PathBuf>, String> {
    let path = match url.split_once("://") {
        None if url.is_empty() => {
            return Err("it is empty; use a path, file://, s3://, gs:// or az://".to_owned());
        }
        None => PathBuf::from(url),
        Some(("file", path)) => {
            // Neither sign can begin anything else in the address of a file.
            let address = format!("file://{}", path.replace('#', "%23").replace('?', "%3F"));
            let address = url::Url::parse(&address).map_err(|error| error.to_string())?;
            address.to_file_path().map_err(|()| "a file:// address has an absolute path".to_owned())?
        }
        Some(_) => return Ok(None),
    };
    std::path::absolute(path).map(Some).map_err(|error| error.to_string())
}

/// Whether files can be written behind an address. A web server gives files and takes none.
pub(crate) fn is_writable(url: &str) -> bool {
    !is_web_server(url)
}

/// Whether an address is of a web server, which has no listing of its files.
pub(crate) fn is_web_server(url: &str) -> bool {
    matches!(scheme(url), "http" | "https")
}

fn scheme(url: &str) -> &str {
    url.split_once("://").map_or("", |(scheme, _)| scheme)
}

/// Opens the store of an address such as `s3://bucket/path`, and gives the path within it. The store is not asked for
/// anything yet. Single requests are made as `retries` says.
///
/// # Errors
/// In words, when there is no such store, or it is not part of this build.
pub(crate) fn open(url: &str, retries: Retries, counters: &Arc<Counters>) -> Opened {
    let scheme = scheme(url);
    // Addresses have neither fragments nor queries here, and a percent sign may stand for itself.
    let url = &literal(url);
    match scheme {
        "http" | "https" => http(url, retries, counters),
        "s3" | "s3a" => s3(url, retries, counters),
        "gs" => gcs(url, retries, counters),
        "az" | "abfs" | "abfss" => azure(url, retries, counters),
        _ => Err(format!(
            "{scheme}:// is not known; use a path, file://, s3://, gs:// or az://, or where text is only read, \
             hf://datasets/, http://, https:// or run:"
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

/// The error where a kind of store was left out of the program.
#[cfg(not(all(feature = "http", feature = "aws", feature = "gcp", feature = "azure")))]
fn left_out(feature: &str) -> Opened {
    Err(format!("this program was built without the feature `{feature}`; build with it, or use a path"))
}

#[cfg(feature = "http")]
fn http(url: &str, retries: Retries, counters: &Arc<Counters>) -> Opened {
    use object_store::http::HttpBuilder;

    let builder = HttpBuilder::new().with_url(url).with_retry(wire::wire_retries(retries));
    let builder = wire::settings(retries)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(key, value));
    let store = builder.with_http_connector(wire::Connector(Arc::clone(counters))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), Path::default()))
}

#[cfg(not(feature = "http"))]
fn http(_: &str, _: Retries, _: &Arc<Counters>) -> Opened {
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
fn s3(url: &str, retries: Retries, counters: &Arc<Counters>) -> Opened {
    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};

    let builder = AmazonS3Builder::from_env().with_url(url).with_retry(wire::wire_retries(retries));
    let builder = wire::settings(retries)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(AmazonS3ConfigKey::Client(key), value));
    let builder = profile::fill(builder)?;
    let store = builder.with_http_connector(wire::Connector(Arc::clone(counters))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), path_of(url)?))
}

#[cfg(not(feature = "aws"))]
fn s3(_: &str, _: Retries, _: &Arc<Counters>) -> Opened {
    left_out("aws")
}

#[cfg(feature = "gcp")]
fn gcs(url: &str, retries: Retries, counters: &Arc<Counters>) -> Opened {
    use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};

    let builder = GoogleCloudStorageBuilder::from_env().with_url(url).with_retry(wire::wire_retries(retries));
    let builder = wire::settings(retries)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(GoogleConfigKey::Client(key), value));
    let store = builder.with_http_connector(wire::Connector(Arc::clone(counters))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), path_of(url)?))
}

#[cfg(not(feature = "gcp"))]
fn gcs(_: &str, _: Retries, _: &Arc<Counters>) -> Opened {
    left_out("gcp")
}

#[cfg(feature = "azure")]
fn azure(url: &str, retries: Retries, counters: &Arc<Counters>) -> Opened {
    use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};

    let builder = MicrosoftAzureBuilder::from_env().with_url(url).with_retry(wire::wire_retries(retries));
    let builder = wire::settings(retries)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(AzureConfigKey::Client(key), value));
    let store = builder.with_http_connector(wire::Connector(Arc::clone(counters))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), path_of(url)?))
}

#[cfg(not(feature = "azure"))]
fn azure(_: &str, _: Retries, _: &Arc<Counters>) -> Opened {
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
