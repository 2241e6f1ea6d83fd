//! What an error of the library below means: whether it may pass, whether it is a disk's, what the server has answered.
//!
//! The library tells apart what is missing and what is forbidden, and puts everything else under one name, `Generic`; part
//! of what is needed here it says in words alone.

use std::error::Error;
use std::io;

use object_store::Error as Cause;

/// Whether the same may work in a minute: an outage, a busy server, a time-out, an answer that broke off.
pub(crate) fn is_transient(error: &Cause) -> bool {
    matches!(error, Cause::Generic { .. })
        && of_disk(error).is_none()
        && !lacks_ranges(error)
        && !is_out_of_range(error)
        && !is_final(error)
}

/// The error of a disk that takes nothing, or does not let this user in. It will be the same in a minute; the caller decides
/// for how long it waits for somebody to free space.
pub(crate) fn of_disk(error: &Cause) -> Option<&io::Error> {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let is_of_disk = |error: &&io::Error| {
        matches!(error.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem | PermissionDenied)
    };
    causes(error).filter_map(|cause| cause.downcast_ref()).find(is_of_disk)
}

/// Whether a store would say the same in a minute: the caller has no right to what it asked for, or asked for something
/// that cannot be.
fn is_final(error: &Cause) -> bool {
    if let Some(status) = status(error) {
        let told = error.to_string();
        // S3 says this of a request that was slow, or whose token is about to be renewed.
        let passes = ["RequestTimeout", "ExpiredToken"].iter().any(|code| told.contains(code));
        return matches!(status, 300..=401 | 403..=405 | 410 | 416) && !passes;
    }
    for cause in causes(error) {
        // A bucket of another region, which the store does not name.
        if cause.to_string().starts_with("Received redirect without LOCATION") {
            return true;
        }
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            // The kind of a circle of links has no name yet.
            return matches!(io.kind(), io::ErrorKind::NotADirectory | io::ErrorKind::InvalidFilename)
                || format!("{:?}", io.kind()) == "FilesystemLoop";
        }
    }
    false
}

/// The status that a server has answered with. The library keeps it to itself, and tells it in words.
pub(crate) fn status(error: &Cause) -> Option<u16> {
    let told = error.to_string();
    let (_, status) = told.split_once("non-2xx status code: ")?;
    status.get(..3)?.parse().ok()
}

/// Whether a server has sent the whole of a file when it was asked for a part.
pub(crate) fn lacks_ranges(error: &Cause) -> bool {
    let told = error.to_string();
    told.contains("Range request not supported") || told.contains("non-partial response when range requested")
}

/// Whether a part was asked for that lies behind the end of its file.
pub(crate) fn is_out_of_range(error: &Cause) -> bool {
    status(error) == Some(416) || told(error).contains("Wanted range starting at")
}

/// What is wrong with a path.
pub(crate) fn of_path(error: &object_store::path::Error) -> String {
    match error {
        object_store::path::Error::EmptySegment { .. } => "a part of its path is empty".to_owned(),
        object_store::path::Error::BadSegment { source, .. } => {
            format!("its path cannot be asked for: {source}")
        }
        error => error.to_string(),
    }
}

/// An error in words, with causes that it does not tell itself.
pub(crate) fn told(error: &Cause) -> String {
    causes(error).fold(String::new(), |told, cause| match cause.to_string() {
        cause if told.is_empty() => cause,
        cause if told.contains(&cause) => told,
        cause => format!("{told}: {cause}"),
    })
}

/// An error and what caused it.
fn causes(error: &Cause) -> impl Iterator<Item = &(dyn Error + 'static)> {
    let first: &(dyn Error + 'static) = error;
    std::iter::successors(Some(first), |error| (*error).source())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: impl Into<Box<dyn Error + Send + Sync>>) -> Cause {
        Cause::Generic { store: "test", source: source.into() }
    }

    #[test]
    fn what_may_pass_is_told_from_what_will_not() {
        let answer = |status: &str| generic(format!("Server returned non-2xx status code: {status}"));
        for (error, passes) in [
            (generic("the connection broke off"), true),
            (generic(io::Error::from(io::ErrorKind::TimedOut)), true),
            (answer("503 Service Unavailable"), true),
            (answer("400 Bad Request: <Code>RequestTimeout</Code>"), true),
            (answer("400 Bad Request: <Code>ExpiredToken</Code>"), true),
            (answer("400 Bad Request: <Code>InvalidBucketName</Code>"), false),
            (answer("404 Not Found: <Code>NoSuchBucket</Code>"), false),
            (answer("416 Range Not Satisfiable"), false),
            (generic("Range request not supported"), false),
            (generic("Received redirect without LOCATION, this normally indicates"), false),
            (generic(io::Error::from(io::ErrorKind::StorageFull)), false),
            (generic(io::Error::from(io::ErrorKind::NotADirectory)), false),
            (Cause::NotSupported { source: "no".into() }, false),
            (Cause::PermissionDenied { path: "a".to_owned(), source: "no".into() }, false),
        ] {
            assert_eq!(is_transient(&error), passes, "{error}");
        }
    }

    #[test]
    fn causes_are_told_once() {
        let told = told(&generic(io::Error::other("no route")));
        assert_eq!(told, "Generic test error: no route");
    }
}
