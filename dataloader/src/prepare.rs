//! Makes a corpus from text that is already on the machine: sources of crates that cargo has fetched, or any folders.
//!
//! The same list gives the same shards, byte for byte, on every machine: the order follows the plan and sorted paths,
//! and nothing specific to the machine (absolute paths, times, threads) goes in. Of equal texts only one is taken, and
//! of the licences in crates only one of each name. Skipped files are counted. There is a single writer.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use ulmus_plan::PrepareConfig;
use ulmus_run::results::PassedBy;
use ulmus_types::Digest;

use crate::contents::{self, NoText};
use crate::error::DataError;
use crate::glob::FileGlob;
use crate::parquet;
use crate::store::{Folder, of_walk};
use crate::walk::{self, Walked, walk};

/// The result of preparing a corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Number of shards.
    pub shards: usize,
    /// Number of documents.
    pub documents: usize,
    /// Bytes of text.
    pub bytes: u64,
    /// Hash of all shards in order.
    pub digest: Digest,
    /// Number of files and folders that were found, whether or not they were taken.
    pub found: usize,
    /// Why the others were skipped.
    pub passed_by: Vec<PassedBy>,
}

impl Prepared {
    /// What was found and taken, in one line for people.
    pub fn summary(&self) -> String {
        let Self { found, documents, bytes, passed_by, .. } = self;
        format!("took {documents} of {found} files, {bytes} bytes of text{}", after("; skipped: ", passed_by))
    }
}

/// A description of everything that was skipped, after `prefix`; empty if nothing was.
fn after(prefix: &str, passed_by: &[PassedBy]) -> String {
    let phrase =
        |PassedBy { reason, count, first }: &PassedBy| format!("{count} {reason} (first: {first:?})");
    if passed_by.is_empty() {
        return String::new();
    }
    format!("{prefix}{}", passed_by.iter().map(phrase).collect::<Vec<_>>().join(", "))
}

/// A file that was found: its name in the corpus, and its path on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    name: String,
    /// The name that globs are matched against. It differs from `name` where two paths in the plan have the same last
    /// part.
    matched: String,
    path: PathBuf,
    of_crate: bool,
}

/// Why a file is skipped, in the order in which reasons are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    Cap { size: u64, cap: u64 },
    NoRoom,
    Wide(&'static str),
    NotUtf8,
    Pointer,
    Equal,
    Licence,
    Empty,
    NotIncluded,
    Name,
    Walk(walk::Passed),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cap { size, cap } => {
                return write!(f, "larger than prepare.cap ({size} bytes, the limit is {cap})");
            }
            Self::NoRoom => "beyond prepare.cap",
            Self::Wide(encoding) => return write!(f, "in {encoding}, not UTF-8"),
            Self::NotUtf8 => "not UTF-8",
            Self::Pointer => "a Git LFS pointer (run `git lfs pull`)",
            Self::Equal => "with the same text as another file, except for whitespace",
            Self::Licence => "a licence that another crate contains as well",
            Self::Empty => "empty",
            Self::NotIncluded => "not in prepare.include",
            Self::Name => "with a name that is not UTF-8",
            Self::Walk(walk::Passed::Hidden) => "hidden (the name begins with a dot)",
            Self::Walk(walk::Passed::Loop) => "a link to a folder that contains it",
            Self::Walk(walk::Passed::Dangling) => "a dangling link",
            Self::Walk(walk::Passed::Special) => "neither a file nor a folder",
        })
    }
}

/// What was skipped: for each reason the number of files, and the first one.
#[derive(Debug, Default)]
struct Tally(BTreeMap<Reason, (usize, String)>);

impl Tally {
    fn add(&mut self, reason: Reason, name: &str) {
        self.0.entry(reason).or_insert_with(|| (0, name.to_owned())).0 += 1;
    }

    fn count(&self) -> usize {
        self.0.values().map(|(count, _)| count).sum()
    }

    fn passed_by(self) -> Vec<PassedBy> {
        let entry =
            |(reason, (count, first)): (Reason, _)| PassedBy { reason: reason.to_string(), count, first };
        self.0.into_iter().map(entry).collect()
    }
}

/// The folder in which cargo keeps its files: `$CARGO_HOME`, or `.cargo` in the home folder.
pub fn cargo_home() -> PathBuf {
    match std::env::var_os("CARGO_HOME") {
        Some(home) => home.into(),
        None => std::env::home_dir().unwrap_or_default().join(".cargo"),
    }
}

/// Writes the text that `config` names to `shards` as `part-00000.parquet`, …, with the columns `text` and `path`.
/// Row groups hold at most `unit` bytes of text, so that each can be a unit.
///
/// # Errors
/// When a crate or path does not exist, no text was found, or a shard cannot be written.
pub fn prepare(
    config: &PrepareConfig,
    cargo_home: &Path,
    unit: u64,
    shards: &Folder,
) -> Result<Prepared, DataError> {
    let (documents, tally) = documents(config, cargo_home)?;
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
        found: documents.len() + tally.count(),
        passed_by: tally.passed_by(),
    })
}

/// Number of files that `config` names, without reading them.
///
/// # Errors
/// When a crate or path does not exist, or nothing matches.
pub fn matching_files(config: &PrepareConfig, cargo_home: &Path) -> Result<usize, DataError> {
    let globs = globs(config)?;
    let found = find(config, cargo_home, &mut Tally::default())?;
    Ok(found.iter().filter(|found| globs.iter().any(|glob| glob.fits(&found.matched))).count())
}

/// How many units of at most `unit` bytes the text that `config` names will have. Reads all of it, and writes nothing.
///
/// # Errors
/// As for [`prepare`], but for the store.
pub fn prepared_units(config: &PrepareConfig, cargo_home: &Path, unit: u64) -> Result<usize, DataError> {
    let (documents, _) = documents(config, cargo_home)?;
    let shards = split(&documents, config.shard.get());
    Ok(shards.into_iter().map(|shard| split(shard, unit).len()).sum())
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

/// Reads what the plan names, up to its cap: first everything that the first glob matches, then the second, …
fn documents(config: &PrepareConfig, cargo_home: &Path) -> Result<(Vec<Document>, Tally), DataError> {
    let mut tally = Tally::default();
    let globs = globs(config)?;
    let found = find(config, cargo_home, &mut tally)?;
    // The first glob that matches a file decides when it is read.
    let mut files: Vec<Vec<&Found>> = vec![Vec::new(); globs.len()];
    for file in &found {
        match globs.iter().position(|glob| glob.fits(&file.matched)) {
            Some(glob) => files[glob].push(file),
            None => tally.add(Reason::NotIncluded, &file.name),
        }
    }
    let cap = config.cap.get();
    // The bytes left under the cap, or `None` once a file did not fit.
    let mut left = Some(cap);
    let mut documents = Vec::new();
    let (mut seen, mut licences) = (BTreeSet::new(), BTreeSet::new());
    for Found { name, path, of_crate, .. } in files.into_iter().flatten() {
        let Some(room) = left else {
            // After the first file that does not fit, all others are left out, too: the cap truncates the list instead
            // of favouring small files.
            tally.add(Reason::NoRoom, name);
            continue;
        };
        let licence = licence(name).filter(|_| *of_crate);
        let text = if licence.is_some_and(|licence| !licences.insert(licence)) {
            Err(Reason::Licence)
        } else {
            text(path, cap)?
        };
        let taken = text.and_then(|text| {
            if text.is_empty() {
                return Err(Reason::Empty);
            }
            if !seen.insert(fingerprint(&text)) {
                return Err(Reason::Equal);
            }
            left = room.checked_sub(text.len() as u64);
            left.map(|_| Document { text, path: name.clone() }).ok_or(Reason::NoRoom)
        });
        match taken {
            Ok(document) => documents.push(document),
            Err(reason) => tally.add(reason, name),
        }
    }
    if documents.is_empty() {
        let passed_by = tally.passed_by();
        let found =
            if passed_by.is_empty() { "there are no files".to_owned() } else { after("", &passed_by) };
        return Err(DataError::NoText {
            places: config.crates.iter().chain(&config.paths).cloned().collect(),
            include: config.include.clone(),
            found,
        });
    }
    Ok((documents, tally))
}

/// The text of a file, or the reason to skip it.
fn text(path: &Path, cap: u64) -> Result<Result<String, Reason>, DataError> {
    let failed = |error: std::io::Error| DataError::Disk {
        file: path.display().to_string(),
        reason: error.to_string(),
    };
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > cap {
        return Ok(Err(Reason::Cap { size, cap }));
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    if ulmus_types::is_pointer(&bytes, bytes.len() as u64) {
        return Ok(Err(Reason::Pointer));
    }
    Ok(contents::text_of(&bytes).map(str::to_owned).map_err(|reason| match reason {
        NoText::Wide(encoding) => Reason::Wide(encoding),
        NoText::Other(_) => Reason::NotUtf8,
    }))
}

fn globs(config: &PrepareConfig) -> Result<Vec<FileGlob>, DataError> {
    config.include.iter().map(|pattern| FileGlob::new(pattern)).collect()
}

/// A hash that is the same for texts that differ only in whitespace.
fn fingerprint(text: &str) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for word in text.split_whitespace() {
        hasher.update(word.as_bytes()).update(b" ");
    }
    Digest::from_bytes(*hasher.finalize().as_bytes())
}

/// The name of a licence file, in upper case and without suffix; `None` for other files.
fn licence(name: &str) -> Option<String> {
    let file = name.rsplit('/').next().unwrap_or(name).to_uppercase();
    let stem = file.split('.').next().unwrap_or(&file);
    let begins = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "UNLICENSE", "NOTICE"];
    begins.iter().any(|word| stem.starts_with(word)).then(|| stem.to_owned())
}

/// All files below the crates and paths of the plan, in the order of the plan, and sorted by path within each.
fn find(config: &PrepareConfig, cargo_home: &Path, tally: &mut Tally) -> Result<Vec<Found>, DataError> {
    let mut found = Vec::new();
    let mut taken = BTreeSet::new();
    for entry in &config.crates {
        let folder_name = entry.replace(' ', "-");
        let sources = cargo_home.join("registry/src");
        let registries = children(&sources).unwrap_or_default();
        let folder =
            registries.into_iter().map(|registry| registry.join(&folder_name)).find(|path| path.is_dir());
        let folder = folder
            .ok_or_else(|| DataError::Crate { name: entry.clone(), folder: sources.display().to_string() })?;
        // A crate that is named twice is read once.
        if taken.insert(folder_name.clone()) {
            add(&folder, [&folder_name, &folder_name], true, &mut found, tally)?;
        }
    }
    for path in &config.paths {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
        let matched = path.file_name().and_then(OsStr::to_str).unwrap_or("files").to_owned();
        // Two paths may have the same last part. The rest depends on the machine, so the names are numbered instead.
        let (stem, suffix) = match matched.rsplit_once('.') {
            Some((stem, suffix)) if path.is_file() && !stem.is_empty() => (stem, format!(".{suffix}")),
            _ => (matched.as_str(), String::new()),
        };
        let mut name = matched.clone();
        for number in 2.. {
            if taken.insert(name.clone()) {
                break;
            }
            name = format!("{stem}-{number}{suffix}");
        }
        if path.is_file() {
            found.push(Found { name, matched, path, of_crate: false });
        } else if path.is_dir() {
            add(&path, [&name, &matched], false, &mut found, tally)?;
        } else {
            return Err(DataError::NoPath { path: path.display().to_string() });
        }
    }
    Ok(found)
}

/// Adds the files below a folder, which has one name in the corpus and possibly another one for globs.
fn add(
    folder: &Path,
    [name, matched]: [&str; 2],
    of_crate: bool,
    found: &mut Vec<Found>,
    tally: &mut Tally,
) -> Result<(), DataError> {
    let walk = walk(folder, false).map_err(|(folder, error)| of_walk(&folder, &error))?;
    for (reason, below) in walk.passed {
        tally.add(Reason::Walk(reason), &format!("{name}/{below}"));
    }
    for Walked { name: below, path, is_utf8, is_again } in walk.files {
        let name = format!("{name}/{below}");
        if !is_utf8 {
            tally.add(Reason::Name, &name);
        } else if !is_again {
            found.push(Found { name, matched: format!("{matched}/{below}"), path, of_crate });
        }
    }
    Ok(())
}

/// The entries of a folder, sorted.
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
        let (all, tally) = documents(&config(place.path(), 1000), place.path()).unwrap();
        let expected = [
            "a-1.0.0/LICENSE.md",
            "a-1.0.0/README.md",
            "b-2.0.0/docs/guide.md",
            "notes/one.md",
            "a-1.0.0/src/lib.rs",
        ];
        assert_eq!(names(&all), expected);
        let told = |reason: &str, count, first: &str| PassedBy {
            reason: reason.to_owned(),
            count,
            first: first.to_owned(),
        };
        let expected_passed = [
            told("in UTF-16, not UTF-8", 1, "notes/binary.md"),
            told("with the same text as another file, except for whitespace", 1, "b-2.0.0/README.md"),
            told("a licence that another crate contains as well", 1, "b-2.0.0/LICENSE.md"),
            told("hidden (the name begins with a dot)", 1, "a-1.0.0/.hidden.md"),
        ];
        assert_eq!(tally.passed_by(), expected_passed);
        let (some, _) = documents(&config(place.path(), 45), place.path()).unwrap();
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
    fn paths_that_end_alike_are_both_taken() {
        let place = tempfile::tempdir().unwrap();
        for language in ["en", "de"] {
            for number in 0..40 {
                let name = format!("{language}/texts/{number}.txt");
                write(place.path(), &[(&name, &format!("{language} text number {number}"))]);
            }
            write(place.path(), &[(&format!("{language}/a-1.0.0/b.txt"), &format!("{language} b"))]);
        }
        write(place.path(), &[("registry/src/index/a-1.0.0/b.txt", "of the crate")]);
        let of = |paths: &[&str]| {
            let paths = paths.iter().map(|path| place.path().join(path).display().to_string()).collect();
            let include = vec!["texts/*.txt".to_owned(), "**/*.txt".to_owned()];
            let crates = vec!["a 1.0.0".to_owned()];
            PrepareConfig { crates, paths, include, ..PrepareConfig::default() }
        };
        let read = |paths: &[&str]| documents(&of(paths), place.path()).unwrap().0;
        let folders = read(&["en/texts", "de/texts"]);
        assert_eq!(folders.len(), 81);
        // Globs are matched against the folder's own name.
        assert_eq!(
            (folders[40].path.as_str(), folders[40].text.as_str()),
            ("texts-2/0.txt", "de text number 0")
        );
        let files = read(&["en/texts/1.txt", "de/texts/1.txt", "de/texts/1.txt"]);
        assert_eq!(names(&files), ["a-1.0.0/b.txt", "1.txt", "1-2.txt"]);
        let crates = read(&["en/a-1.0.0", "de/a-1.0.0"]);
        assert_eq!(names(&crates), ["a-1.0.0/b.txt", "a-1.0.0-2/b.txt", "a-1.0.0-3/b.txt"]);
    }

    #[test]
    fn licence_names_matter_in_crates_alone() {
        let place = tempfile::tempdir().unwrap();
        let stems = ["notice", "Notices-2021", "copyright law", "copying", "LICENSE"];
        for (number, stem) in (0..40).zip(stems.iter().cycle()) {
            write(place.path(), &[(&format!("all/m{number}/{stem}.txt"), &format!("text {number}"))]);
        }
        let config = PrepareConfig {
            paths: vec![place.path().join("all").display().to_string()],
            ..PrepareConfig::default()
        };
        assert_eq!(documents(&config, place.path()).unwrap().0.len(), 40);
    }

    #[test]
    fn skipped_files_are_counted_and_named() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("all");
        let latin1 = |number: u8| [b"caf\xe9 ".as_slice(), &[b'a' + number]].concat();
        std::fs::create_dir(&folder).unwrap();
        for number in 0..20 {
            std::fs::write(folder.join(format!("good{number}.txt")), format!("text {number}")).unwrap();
            std::fs::write(folder.join(format!("latin{number}.txt")), latin1(number)).unwrap();
        }
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
        let big = vec![b'x'; 70_000];
        for (name, bytes) in [
            ("marked.txt", &b"\xef\xbb\xbfmarked"[..]),
            ("wide.txt", b"\xff\xfea\0"),
            ("big.txt", &big),
            ("empty.txt", b""),
            ("large.txt", pointer.as_bytes()),
            ("table.csv", b"1,2"),
        ] {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
        let config = PrepareConfig {
            paths: vec![folder.display().to_string()],
            cap: Bytes::new(64 << 10),
            ..PrepareConfig::default()
        };
        let shards = memory();
        let prepared = prepare(&config, place.path(), 1 << 20, &shards).unwrap();
        assert_eq!((prepared.documents, prepared.found), (21, 46));
        let passed_by: Vec<_> =
            prepared.passed_by.iter().map(|p| (p.reason.as_str(), p.count, p.first.as_str())).collect();
        assert_eq!(
            passed_by,
            [
                ("larger than prepare.cap (70000 bytes, the limit is 65536)", 1, "all/big.txt"),
                ("in UTF-16, not UTF-8", 1, "all/wide.txt"),
                ("not UTF-8", 20, "all/latin0.txt"),
                ("a Git LFS pointer (run `git lfs pull`)", 1, "all/large.txt"),
                ("empty", 1, "all/empty.txt"),
                ("not in prepare.include", 1, "all/table.csv"),
            ]
        );
        let summary = prepared.summary();
        let words = [
            "took 21 of 46 files",
            "1 larger than prepare.cap (70000 bytes, the limit is 65536) (first: \"all/big.txt\")",
            "20 not UTF-8 (first: \"all/latin0.txt\")",
        ];
        assert!(words.iter().all(|words| summary.contains(words)), "{summary}");
        let (all, _) = documents(&config, place.path()).unwrap();
        assert!(all.iter().any(|document| document.text == "marked"));

        let only = PrepareConfig { paths: vec![folder.join("big.txt").display().to_string()], ..config };
        let message = documents(&only, place.path()).unwrap_err().to_string();
        let words = ["\"big.txt\"", "70000 bytes", "prepare.cap"];
        assert!(words.iter().all(|words| message.contains(words)), "{message}");
    }

    #[test]
    fn a_file_that_can_never_fit_does_not_exclude_others() {
        let place = tempfile::tempdir().unwrap();
        let text = |size: usize, letter: &str| letter.repeat(size);
        write(
            place.path(),
            &[
                ("all/a.txt", &text(70_000, "a")),
                ("all/b.txt", &text(40_000, "b")),
                ("all/c.txt", &text(40_000, "c")),
                ("all/d.txt", &text(10_000, "d")),
            ],
        );
        let config = PrepareConfig {
            paths: vec![place.path().join("all").display().to_string()],
            cap: Bytes::new(64 << 10),
            ..PrepareConfig::default()
        };
        let (documents, tally) = documents(&config, place.path()).unwrap();
        assert_eq!(names(&documents), ["all/b.txt"]);
        let passed_by: Vec<_> = tally.passed_by().into_iter().map(|p| (p.first, p.count)).collect();
        assert_eq!(passed_by, [("all/a.txt".to_owned(), 1), ("all/c.txt".to_owned(), 2)]);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed() {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), &[("hub/blobs/1", "first"), ("hub/blobs/2", "second")]);
        let snapshot = place.path().join("hub/snapshots/main");
        std::fs::create_dir_all(&snapshot).unwrap();
        for (target, link) in [("../../blobs/1", "1.txt"), ("../../blobs/2", "2.txt"), ("..", "up")] {
            std::os::unix::fs::symlink(target, snapshot.join(link)).unwrap();
        }
        let config =
            PrepareConfig { paths: vec![snapshot.display().to_string()], ..PrepareConfig::default() };
        let (documents, tally) = documents(&config, place.path()).unwrap();
        assert_eq!(names(&documents), ["main/1.txt", "main/2.txt"]);
        assert_eq!(tally.passed_by()[0].first, "main/up");
    }

    #[test]
    fn missing_crates_and_paths_are_named() {
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
