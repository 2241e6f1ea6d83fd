//! Why a store did not do what it was asked for, sorted by what can be done about it.

use std::io;
use std::time::Duration;

use object_store::Error as Cause;
use ulmus_types::ErrorKind;

use crate::cause;

/// A failed operation on a store. Each message names the file with its address, and what to do next; none has a secret in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The address names no folder that can be used.
    #[error("{url:?} cannot be used as a folder: {reason}")]
    Address {
        /// As it was given.
        url: String,
        /// What is wrong, and what to write.
        reason: String,
    },
    /// The file is not there.
    #[error("{file} does not exist; restore it, or correct the address")]
    NotFound {
        /// The file, with its address.
        file: String,
    },
    /// No request can be made for a file of this name.
    #[error("{file} cannot be read or written: {reason}; rename it")]
    Name {
        /// The file, with its address.
        file: String,
        /// What is wrong with the name.
        reason: String,
    },
    /// The disk is full.
    #[error("cannot {act} {file}: {reason}; free space there")]
    Full {
        /// What was tried.
        act: &'static str,
        /// The file, with its address.
        file: String,
        /// The system's own words.
        reason: String,
    },
    /// The disk does not let this user in.
    #[error("cannot {act} {file}: {reason}; give this user the right to, or make the disk writable")]
    Forbidden {
        /// What was tried.
        act: &'static str,
        /// The file, with its address.
        file: String,
        /// The system's own words.
        reason: String,
    },
    /// The store does not accept the credentials.
    #[error(
        "no access to {file}: {reason}; correct the credentials in the environment, or in the files of the store's own tools"
    )]
    Denied {
        /// The file, with its address.
        file: String,
        /// The store's own words.
        reason: String,
    },
    /// The store has answered, and will not answer otherwise.
    #[error("cannot {act} {file}: {reason}; correct the address, or the credentials in the environment")]
    Refused {
        /// What was tried.
        act: &'static str,
        /// The file, with its address.
        file: String,
        /// The store's own words.
        reason: String,
    },
    /// A web server that gives only whole files.
    #[error(
        "{file} cannot be read in parts: its web server does not support range requests; use a server that \
         does, or fetch the files and use a path"
    )]
    NoRanges {
        /// The file, with its address.
        file: String,
    },
    /// It may work when it is begun again.
    #[error("cannot {act} {file}: {reason}; check the network, then try again")]
    Transient {
        /// What was tried.
        act: &'static str,
        /// The file, with its address.
        file: String,
        /// The store's own words.
        reason: String,
    },
    /// It was begun again until the time for it was over.
    #[error(
        "cannot {act} {file} after trying for {}s: {reason}; check the network and the store, then try again",
        waited.as_secs()
    )]
    Deadline {
        /// What was tried.
        act: &'static str,
        /// The file, with its address.
        file: String,
        /// For how long.
        waited: Duration,
        /// What went wrong the last time.
        reason: String,
    },
    /// A file is not the one that was described.
    #[error("{file} has changed: {what} was {then}, now {now}; restore it, or begin again")]
    Changed {
        /// The file, with its address.
        file: String,
        /// The property that differs.
        what: &'static str,
        /// Its value in the description.
        then: String,
        /// Its value now.
        now: String,
    },
    /// The bytes are not those that should be there.
    #[error("{file} is damaged: {reason}; write it again")]
    Damaged {
        /// The file, with its address.
        file: String,
        /// What was found.
        reason: String,
    },
}

impl StoreError {
    /// What can be done about it.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Transient { .. } | Self::Deadline { .. } => ErrorKind::Retry,
            Self::Full { .. } | Self::Forbidden { .. } => ErrorKind::Disk,
            Self::Changed { .. } | Self::Damaged { .. } => ErrorKind::Corrupt,
            Self::Address { .. }
            | Self::NotFound { .. }
            | Self::Name { .. }
            | Self::Denied { .. }
            | Self::Refused { .. }
            | Self::NoRanges { .. } => ErrorKind::InvalidInput,
        }
    }

    /// Whether the same may work when it is begun again.
    pub(crate) const fn is_transient(&self) -> bool {
        matches!(self.kind(), ErrorKind::Retry)
    }

    /// What the library's error means for a file. It has not been tried again.
    pub(crate) fn of(act: &'static str, file: String, error: &Cause) -> Self {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        let reason = cause::told(error);
        match error {
            Cause::NotFound { .. } => Self::NotFound { file },
            Cause::InvalidPath { source } => Self::Name { file, reason: cause::of_path(source) },
            Cause::PermissionDenied { .. } | Cause::Unauthenticated { .. } => Self::Denied { file, reason },
            error if let Some(io) = cause::of_disk(error) => match io.kind() {
                StorageFull | QuotaExceeded => Self::Full { act, file, reason: io.to_string() },
                _ => Self::Forbidden { act, file, reason: io.to_string() },
            },
            error if cause::lacks_ranges(error) => Self::NoRanges { file },
            error if cause::is_transient(error) => Self::Transient { act, file, reason },
            _ => Self::Refused { act, file, reason },
        }
    }

    /// Says for how long an operation was tried, if it failed for a reason that may pass.
    pub(crate) fn after(self, waited: Duration) -> Self {
        match self {
            Self::Transient { act, file, reason } => Self::Deadline { act, file, waited, reason },
            error => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each says what to do, and a caller can tell what it can do itself.
    #[test]
    fn errors_say_what_can_be_done_about_them() {
        let generic = |source: io::Error| Cause::Generic { store: "test", source: source.into() };
        let disk = |kind: io::ErrorKind| generic(io::Error::from(kind));
        let (path, no) = (|| "a".to_owned(), || "no".into());
        for (error, kind, words) in [
            (disk(io::ErrorKind::StorageFull), ErrorKind::Disk, "free space there"),
            (disk(io::ErrorKind::QuotaExceeded), ErrorKind::Disk, "free space there"),
            (disk(io::ErrorKind::PermissionDenied), ErrorKind::Disk, "give this user the right"),
            (disk(io::ErrorKind::ReadOnlyFilesystem), ErrorKind::Disk, "make the disk writable"),
            (disk(io::ErrorKind::TimedOut), ErrorKind::Retry, "check the network"),
            (Cause::PermissionDenied { path: path(), source: no() }, ErrorKind::InvalidInput, "credentials"),
            (Cause::Unauthenticated { path: path(), source: no() }, ErrorKind::InvalidInput, "credentials"),
            (Cause::NotFound { path: path(), source: no() }, ErrorKind::InvalidInput, "does not exist"),
            (Cause::NotSupported { source: no() }, ErrorKind::InvalidInput, "correct the address"),
        ] {
            let error = StoreError::of("write", "s3://b/a".to_owned(), &error);
            let message = error.to_string();
            assert_eq!(error.kind(), kind, "{message}");
            assert!(message.contains(words) && message.contains("s3://b/a"), "{message}");
        }
        let busy = StoreError::of("read", "s3://b/a".to_owned(), &disk(io::ErrorKind::TimedOut));
        let message = busy.after(Duration::from_secs(61)).to_string();
        assert!(message.starts_with("cannot read s3://b/a after trying for 61s: "), "{message}");
    }
}
