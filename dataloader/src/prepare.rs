//! Makes a corpus of text that is already on the machine: sources of crates that cargo has fetched, or any folders.
//!
//! The same list gives the same shards, byte for byte, on every machine: the order is that of the plan and of
//! sorted paths, and nothing of the machine (absolute paths, times, threads) goes in. Equal texts are taken once,
//! and of the files that hold licences one of each name. There is a single writer.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};
use ulmus_plan::PrepareConfig;
use ulmus_types::Digest;

use crate::error::DataError;
use crate::parquet;
use crate::store::Folder;

/// What was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// Shards.
    pub shards: usize,
    /// Documents.
    pub documents: usize,
    /// Bytes of text.
    pub bytes: u64,
    /// Hash of all shards in order.
    pub digest: Digest,
}

/// A file to take: its place on this machine, and its name in the corpus.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Found {
    name: String,
    path: PathBuf,
}

/// Where cargo keeps its files: `$CARGO_HOME`, else `.cargo` in the home folder.
pub fn cargo_home() -> PathBuf {
    match std::env::var_os("CARGO_HOME") {
        Some(home) => home.into(),
        None => std::env::home_dir().unwrap_or_default().join(".cargo"),
    }
}

/// Writes the text that `config` names to `shards` as `part-00000.parquet`, …, with columns `text` and `path`.
/// Row groups hold at most `unit` bytes of text, so that each can be a unit.
///
/// # Errors
/// When a crate or path is not there, nothing matches, or the store does not take a shard.
pub fn prepare(
    config: &PrepareConfig,
    cargo_home: &Path,
    unit: u64,
    shards: &Folder,
) -> Result<Prepared, DataError> {
    let documents = documents(config, cargo_home)?;
    let mut hasher = blake3::Hasher::new();
    let parts = split(&documents, config.shard.get());
    for (number, part) in parts.iter().enumerate() {
        let groups: Vec<Vec<Vec<String>>> = split(part, unit)
            .into_iter()
            .map(|group| group.iter().map(|d| vec![d.text.clone(), d.path.clone()]).collect())
            .collect();
        let file = parquet::write(&["text", "path"], &groups);
        hasher.update(&file);
        shards.write(&format!("part-{number:05}.parquet"), file)?;
    }
    Ok(Prepared {
        shards: parts.len(),
        documents: documents.len(),
        bytes: documents.iter().map(|document| document.text.len() as u64).sum(),
        digest: Digest::from_bytes(*hasher.finalize().as_bytes()),
    })
}

/// How many files `config` names; reads none of them.
///
/// # Errors
/// When a crate or path is not there, or nothing matches.
pub fn matching_files(config: &PrepareConfig, cargo_home: &Path) -> Result<usize, DataError> {
    let globs = config.include.iter().map(|pattern| glob(pattern)).collect::<Result<Vec<_>, _>>()?;
    let found = find(config, cargo_home)?;
    Ok(found.iter().filter(|found| globs.iter().any(|glob| glob.is_match(&found.name))).count())
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Document {
    text: String,
    path: String,
}

/// Cuts a list of documents into runs of at most `limit` bytes of text, at least one document each.
fn split(documents: &[Document], limit: u64) -> Vec<&[Document]> {
    let mut runs = Vec::new();
    let (mut first, mut bytes) = (0, 0);
    for (index, document) in documents.iter().enumerate() {
        let more = document.text.len() as u64;
        if index > first && bytes + more > limit {
            runs.push(&documents[first..index]);
            (first, bytes) = (index, 0);
        }
        bytes += more;
    }
    if first < documents.len() {
        runs.push(&documents[first..]);
    }
    runs
}

/// Reads what the plan names, up to its cap: everything that the first glob matches, then the second, …
fn documents(config: &PrepareConfig, cargo_home: &Path) -> Result<Vec<Document>, DataError> {
    let found = find(config, cargo_home)?;
    let mut documents = Vec::new();
    let mut taken = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut licences = BTreeSet::new();
    let mut left = config.cap.get();
    for pattern in &config.include {
        let glob = glob(pattern)?;
        for Found { name, path } in found.iter().filter(|found| glob.is_match(&found.name)) {
            if !taken.insert(name) || licence(name).is_some_and(|licence| !licences.insert(licence)) {
                continue;
            }
            let bytes = std::fs::read(path).map_err(|error| DataError::Store {
                file: path.display().to_string(),
                reason: error.to_string(),
            })?;
            // Files that are no text are no documents.
            let Ok(text) = String::from_utf8(bytes) else { continue };
            if text.is_empty() || !seen.insert(fingerprint(&text)) {
                continue;
            }
            match left.checked_sub(text.len() as u64) {
                Some(rest) => left = rest,
                None => return Ok(documents),
            }
            documents.push(Document { text, path: name.clone() });
        }
    }
    if documents.is_empty() {
        return Err(DataError::NoText {
            places: config.crates.iter().chain(&config.paths).cloned().collect(),
            include: config.include.clone(),
        });
    }
    Ok(documents)
}

fn glob(pattern: &str) -> Result<GlobMatcher, DataError> {
    let glob = GlobBuilder::new(pattern).literal_separator(true).build();
    let glob = glob.map_err(|error| DataError::Pattern {
        pattern: pattern.to_owned(),
        reason: error.kind().to_string(),
    })?;
    Ok(glob.compile_matcher())
}

/// Equal for texts that differ in white space only.
fn fingerprint(text: &str) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for word in text.split_whitespace() {
        hasher.update(word.as_bytes()).update(b" ");
    }
    Digest::from_bytes(*hasher.finalize().as_bytes())
}

/// The name of a file that holds a licence, in capitals and without suffix.
fn licence(name: &str) -> Option<String> {
    let file = name.rsplit('/').next().unwrap_or(name).to_uppercase();
    let stem = file.split('.').next().unwrap_or(&file);
    let begins = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "UNLICENSE", "NOTICE"];
    begins.iter().any(|word| stem.starts_with(word)).then(|| stem.to_owned())
}

/// All files below the crates and paths of the plan, in its order; within each, sorted by path.
fn find(config: &PrepareConfig, cargo_home: &Path) -> Result<Vec<Found>, DataError> {
    let mut found = Vec::new();
    for entry in &config.crates {
        let folder_name = entry.replace(' ', "-");
        let sources = cargo_home.join("registry/src");
        let registries = children(&sources).unwrap_or_default();
        let folder =
            registries.into_iter().map(|registry| registry.join(&folder_name)).find(|path| path.is_dir());
        let folder = folder
            .ok_or_else(|| DataError::Crate { name: entry.clone(), folder: sources.display().to_string() })?;
        walk(&folder, &folder_name, &mut found)?;
    }
    for path in &config.paths {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or("files").to_owned();
        if path.is_file() {
            found.push(Found { name, path });
        } else if path.is_dir() {
            walk(&path, &name, &mut found)?;
        } else {
            return Err(DataError::Missing { file: path.display().to_string() });
        }
    }
    Ok(found)
}

/// Files below a folder, sorted by name. Hidden ones, links and names that are not UTF-8 are passed over.
fn walk(folder: &Path, name: &str, found: &mut Vec<Found>) -> Result<(), DataError> {
    let entries = children(folder).map_err(|error| DataError::Store {
        file: folder.display().to_string(),
        reason: error.to_string(),
    })?;
    for path in entries {
        let Some(last) = path.file_name().and_then(OsStr::to_str).filter(|last| !last.starts_with('.'))
        else {
            continue;
        };
        let name = format!("{name}/{last}");
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            walk(&path, &name, found)?;
        } else {
            found.push(Found { name, path });
        }
    }
    Ok(())
}

/// What lies directly in a folder, sorted.
fn children(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use ulmus_plan::Bytes;

    use super::*;
    use crate::store::tests::memory;

    fn write(place: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = place.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    }

    fn machine() -> tempfile::TempDir {
        let place = tempfile::tempdir().unwrap();
        write(
            place.path(),
            &[
                ("registry/src/index-1/a-1.0.0/README.md", "Read me."),
                ("registry/src/index-1/a-1.0.0/LICENSE.md", "Permission is granted to A."),
                ("registry/src/index-1/a-1.0.0/src/lib.rs", "fn a() {}"),
                ("registry/src/index-1/a-1.0.0/.hidden.md", "hidden"),
                ("registry/src/index-2/b-2.0.0/README.md", "Read  me.\n"),
                ("registry/src/index-2/b-2.0.0/LICENSE.md", "Permission is granted to B."),
                ("registry/src/index-2/b-2.0.0/docs/guide.md", "A guide."),
                ("notes/one.md", "One note."),
            ],
        );
        std::fs::write(place.path().join("notes/binary.md"), b"\xff\xfe").unwrap();
        place
    }

    fn config(place: &Path, cap: u64) -> PrepareConfig {
        PrepareConfig {
            crates: vec!["a 1.0.0".to_owned(), "b 2.0.0".to_owned()],
            paths: vec![place.join("notes").to_str().unwrap().to_owned()],
            cap: Bytes::new(cap),
            ..PrepareConfig::default()
        }
    }

    fn names(documents: &[Document]) -> Vec<&str> {
        documents.iter().map(|document| document.path.as_str()).collect()
    }

    #[test]
    fn prose_comes_first_and_copies_once() {
        let place = machine();
        let all = documents(&config(place.path(), 1000), place.path()).unwrap();
        let expected = [
            "a-1.0.0/LICENSE.md",
            "a-1.0.0/README.md",
            "b-2.0.0/docs/guide.md",
            "notes/one.md",
            "a-1.0.0/src/lib.rs",
        ];
        assert_eq!(names(&all), expected);
        let some = documents(&config(place.path(), 45), place.path()).unwrap();
        assert_eq!(names(&some), expected[..3]);
    }

    #[test]
    fn two_machines_make_the_same_shards() {
        let make = || {
            let (place, shards) = (machine(), memory());
            let config = PrepareConfig { shard: Bytes::new(40), ..config(place.path(), 1000) };
            (prepare(&config, place.path(), 20, &shards).unwrap(), shards)
        };
        let ((first, shards), (second, _)) = (make(), make());
        assert_eq!(first, second);
        assert_eq!((first.shards, first.documents, first.bytes), (2, 5, 61));
        let files = shards.list().unwrap();
        assert_eq!(files[1].path, "part-00001.parquet");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let place = machine();
        for (change, words) in [
            (
                PrepareConfig { crates: vec!["c 3.0.0".to_owned()], ..config(place.path(), 1000) },
                "\"c 3.0.0\" is not unpacked",
            ),
            (
                PrepareConfig { paths: vec!["/no/such".to_owned()], ..config(place.path(), 1000) },
                "/no/such does not exist",
            ),
            (
                PrepareConfig { include: vec!["**/*.tex".to_owned()], ..config(place.path(), 1000) },
                "no text was found",
            ),
        ] {
            let message = documents(&change, place.path()).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
