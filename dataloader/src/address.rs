//! Addresses in a plan: which are in the run's own folder, and which name a folder of this machine.

use std::path::PathBuf;

/// What addresses in the run's own folder begin with.
pub(crate) const RUN: &str = "run:";

/// The folder of this machine that an address names, if it names one.
///
/// # Errors
/// In words, when it would be one and cannot be.
pub(crate) fn on_disk(url: &str) -> Result<Option<PathBuf>, String> {
    if url.starts_with(RUN) { Ok(None) } else { ulmus_storage::directory_of(url) }
}

/// The folder and the name of a file at an address.
pub(crate) fn folder_and_name(address: &str) -> (&str, &str) {
    match address.rfind(['/', ':']) {
        None => (".", address),
        Some(0) => ("/", &address[1..]),
        Some(at) if address.as_bytes()[at] == b'/' => (&address[..at], &address[at + 1..]),
        Some(at) => address.split_at(at + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_lies_in_a_folder() {
        for (address, folder, name) in [
            ("a.json", ".", "a.json"),
            ("/a.json", "/", "a.json"),
            ("s3://b/c/a.json", "s3://b/c", "a.json"),
            ("run:a.json", "run:", "a.json"),
            ("run:c/a.json", "run:c", "a.json"),
        ] {
            assert_eq!(folder_and_name(address), (folder, name));
        }
    }
}
