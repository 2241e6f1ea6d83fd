//! From addresses to stores. Credentials come from the environment and the files that each provider's own tools
//! write, never from an address.

use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::path::Path;

use super::Counters;

/// Everything behind one address form.
type Opened = Result<(Arc<dyn ObjectStore>, Path), String>;

/// Opens the store of a remote address, and the path within it.
pub(super) fn open(scheme: &str, url: &str, timeout: Duration, counters: &Arc<Counters>) -> Opened {
    match scheme {
        "http" | "https" => http(url, timeout, counters),
        "s3" | "s3a" => s3(url, timeout, counters),
        "gs" => gcs(url, timeout, counters),
        "az" | "abfs" | "abfss" => azure(url, timeout, counters),
        _ => Err(format!(
            "{scheme}:// is not known; write a path, file://, s3://, gs://, az://, hf://datasets/, http://, https:// or run:"
        )),
    }
}

/// What is told where a store was left out of the program.
#[cfg(not(all(feature = "http", feature = "aws", feature = "gcp", feature = "azure")))]
fn left_out(feature: &str) -> Opened {
    Err(format!("this program was built without the feature `{feature}`; build with it, or write a path"))
}

#[cfg(feature = "http")]
fn http(url: &str, timeout: Duration, counters: &Arc<Counters>) -> Opened {
    use object_store::http::HttpBuilder;

    let builder = HttpBuilder::new().with_url(url).with_retry(super::wire::retries());
    let builder = super::wire::settings(timeout)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(key, value));
    let store = builder.with_http_connector(super::wire::Connector(Arc::clone(counters))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), Path::default()))
}

#[cfg(not(feature = "http"))]
fn http(_: &str, _: Duration, _: &Arc<Counters>) -> Opened {
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
fn s3(url: &str, timeout: Duration, counters: &Arc<Counters>) -> Opened {
    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};

    let builder = AmazonS3Builder::from_env().with_url(url).with_retry(super::wire::retries());
    let builder = super::wire::settings(timeout)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(AmazonS3ConfigKey::Client(key), value));
    let builder = super::profile::fill(builder)?;
    let store = builder.with_http_connector(super::wire::Connector(Arc::clone(counters))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), path_of(url)?))
}

#[cfg(not(feature = "aws"))]
fn s3(_: &str, _: Duration, _: &Arc<Counters>) -> Opened {
    left_out("aws")
}

#[cfg(feature = "gcp")]
fn gcs(url: &str, timeout: Duration, counters: &Arc<Counters>) -> Opened {
    use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};

    let builder = GoogleCloudStorageBuilder::from_env().with_url(url).with_retry(super::wire::retries());
    let builder = super::wire::settings(timeout)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(GoogleConfigKey::Client(key), value));
    let store = builder.with_http_connector(super::wire::Connector(Arc::clone(counters))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), path_of(url)?))
}

#[cfg(not(feature = "gcp"))]
fn gcs(_: &str, _: Duration, _: &Arc<Counters>) -> Opened {
    left_out("gcp")
}

#[cfg(feature = "azure")]
fn azure(url: &str, timeout: Duration, counters: &Arc<Counters>) -> Opened {
    use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};

    let builder = MicrosoftAzureBuilder::from_env().with_url(url).with_retry(super::wire::retries());
    let builder = super::wire::settings(timeout)
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(AzureConfigKey::Client(key), value));
    let store = builder.with_http_connector(super::wire::Connector(Arc::clone(counters))).build();
    Ok((Arc::new(store.map_err(|error| error.to_string())?), path_of(url)?))
}

#[cfg(not(feature = "azure"))]
fn azure(_: &str, _: Duration, _: &Arc<Counters>) -> Opened {
    left_out("azure")
}
