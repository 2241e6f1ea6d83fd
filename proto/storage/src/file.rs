//! What a store knows of a file, and whether that is still true.

use object_store::ObjectMeta;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::cause;

/// What a store knows of a file. Manifests keep it under these names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Path below the folder, with `/` between its parts.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// The store's mark for these contents, where there is one that can be compared later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl FileInfo {
    /// What a store has told of a file, under its path below a folder.
    pub(crate) fn of(path: String, meta: &ObjectMeta) -> Self {
        let version = meta.e_tag.clone().unwrap_or_else(|| meta.last_modified.to_rfc3339());
        Self { path, size: meta.size, version: Some(version) }
    }

    /// The first property in which a file is not what it was, with both values. A file of this machine is the same as a copy
    /// of it that kept its time.
    pub(crate) fn difference(&self, now: &Self, is_local: bool) -> Option<(&'static str, String, String)> {
        if self.size != now.size {
            return Some(("size", self.size.to_string(), now.size.to_string()));
        }
        match (&self.version, &now.version) {
            (Some(then), Some(now)) if mark(then, is_local) != mark(now, is_local) => {
                Some(("version", then.clone(), now.clone()))
            }
            _ => None,
        }
    }
}

/// What tells a version from another: an entity tag without its quotes, which some stores leave out of listings, and of a
/// file of this machine without the number that a copy of it does not keep.
fn mark(version: &str, is_local: bool) -> &str {
    let bare = version.trim_matches('"');
    match bare.split_once('-') {
        Some((_inode, time_and_size)) if is_local => time_and_size,
        _ => bare,
    }
}

/// Makes sure that a file can be asked for by its path.
///
/// # Errors
/// With what is wrong with the path.
pub fn check_path(path: &str) -> Result<(), String> {
    Path::parse(path).map(drop).map_err(|error| cause::of_path(&error))
}

/// Whether a file of a disk has a name to which a store writes first what appears under its own name when it is whole: `name#1`.
pub fn is_unfinished(path: &str) -> bool {
    let last = path.rsplit('/').next().unwrap_or_default();
    let number = last.split_once('#').map_or("", |(_, number)| number);
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_that_kept_their_time_are_the_same_file() {
        let file =
            |version: &str| FileInfo { path: "a".to_owned(), size: 3, version: Some(version.to_owned()) };
        let difference = |then, now, is_local| file(then).difference(&file(now), is_local);
        assert_eq!(difference("7-aa-3", "8-aa-3", true), None);
        assert!(difference("7-aa-3", "8-bb-3", true).is_some());
        assert!(difference("7-aa-3", "8-aa-3", false).is_some());
        assert_eq!(difference("\"etag\"", "etag", false), None);
        let unmarked = FileInfo { version: None, ..file("") };
        assert_eq!(unmarked.difference(&file("1"), false), None);
        let longer = FileInfo { size: 4, ..unmarked };
        assert_eq!(longer.difference(&file("1"), false).unwrap().0, "size");
    }

    #[test]
    fn paths_that_no_request_can_be_made_for_are_told() {
        for path in ["a", "a/b c", "a#1", "50%", "ä"] {
            assert_eq!(check_path(path), Ok(()), "{path}");
        }
        for path in ["a//b", "./a", "a/../b", "a\nb"] {
            assert!(check_path(path).is_err(), "{path:?}");
        }
        let unfinished = ["a#1", "b/a.bin#12", "a#", "a#1/b", "1", "a#x"].map(is_unfinished);
        assert_eq!(unfinished, [true, true, false, false, false, false]);
    }
}
