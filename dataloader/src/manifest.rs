//! The frozen list of everything that a run reads: files, and the units that they are cut into.
//!
//! The manifest is made once and stored with the run: it decides what is read, and in which order. If a file differs
//! from its entry, reading the file is an error; the run does not change.

use object_store::path::Path;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use ulmus_plan::{DataConfig, Format, SourceConfig};
use ulmus_run::signed::{self, Style};
use ulmus_storage::FileInfo;
use ulmus_types::Digest;

use crate::contents;
use crate::error::DataError;
use crate::format::UnitReader;
use crate::glob::FileGlob;
use crate::store::{Folder, Stores};
use crate::tokens;
use crate::unit::Unit;
use ulmus_tokenizer::Tokenizer;

const FORMAT_VERSION: u32 = 2;
/// The first format version, without a digest.
const UNSIGNED: u32 = 1;

/// Files and units of all sources, and the tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    format_version: u32,
    pub(crate) sources: Vec<SourceManifest>,
    /// The file of the tokenizer, once it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokenizer: Option<TokenizerFile>,
}

/// Identifies a tokenizer file. Publishers state the SHA-256 of such files, too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct TokenizerFile {
    bytes: u64,
    sha256: Digest,
}

impl TokenizerFile {
    fn of(tokenizer: &Tokenizer) -> Self {
        let (_, file) = tokenizer.file();
        Self { bytes: file.len() as u64, sha256: Digest::from_bytes(Sha256::digest(file).into()) }
    }
}

/// Files and units of one source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SourceManifest {
    pub(crate) name: String,
    /// The address that was listed, if the one in the plan may later mean something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) url: Option<String>,
    pub(crate) format: Format,
    pub(crate) files: Vec<FileInfo>,
    pub(crate) units: Vec<Unit>,
}

/// What a manifest lists of one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceSummary {
    /// Its name in the plan.
    pub name: String,
    /// Its address, with the revision that was read if it has revisions.
    pub address: String,
    /// Number of files.
    pub files: usize,
    /// Bytes of text, as [`Manifest::bytes`] counts them.
    pub bytes: u64,
    /// Hash of names, sizes and units, as [`Manifest::digest`] computes that of all sources.
    pub digest: Digest,
}

impl Manifest {
    /// Lists the files of every source and cuts them into units. `run` is the run's own folder.
    ///
    /// Blocks, and may take minutes for thousands of remote files.
    ///
    /// # Errors
    /// When a source cannot be opened, has no files, or a file is not what the plan says.
    pub fn freeze(config: &DataConfig, run: Option<&Folder>) -> Result<Self, DataError> {
        let stores = Stores::new(config, run)?;
        let sources = config.source.iter().map(|source| freeze(source, config.unit.get(), &stores));
        let sources = sources.collect::<Result<_, _>>()?;
        Ok(Self { format_version: FORMAT_VERSION, sources, tokenizer: None })
    }

    /// Adds the tokenizer that the corpus is read with.
    #[must_use]
    pub fn with_tokenizer(self, tokenizer: &Tokenizer) -> Self {
        Self { tokenizer: Some(TokenizerFile::of(tokenizer)), ..self }
    }

    /// Checks that `tokenizer` is the one in the manifest, if there is one.
    ///
    /// # Errors
    /// When the manifest names another tokenizer.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<(), DataError> {
        let (now, name) = (TokenizerFile::of(tokenizer), tokenizer.file().0);
        match &self.tokenizer {
            Some(then) if *then != now => Err(DataError::Changed {
                file: name.to_owned(),
                what: "the SHA-256",
                then: then.sha256.to_string(),
                now: now.sha256.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Reads the result of [`Self::to_json`].
    ///
    /// # Errors
    /// When it is not a manifest, has a newer version, or has been changed since it was written.
    pub fn from_json(json: &[u8]) -> Result<Self, DataError> {
        let refuse = |reason: String| DataError::Manifest { reason };
        let manifest: Self = serde_json::from_slice(json).map_err(|error| refuse(error.to_string()))?;
        match manifest.format_version {
            FORMAT_VERSION => {
                signed::verify(json).map_err(refuse)?;
                Ok(manifest)
            }
            UNSIGNED => Ok(Self { format_version: FORMAT_VERSION, ..manifest }),
            version => {
                Err(refuse(format!("it has version {version}, but this program knows only {FORMAT_VERSION}")))
            }
        }
    }

    /// The stored form, which contains a digest of itself: a flipped bit would change the stream.
    pub fn to_json(&self) -> Vec<u8> {
        signed::to_json(self, Style::Compact).into_bytes()
    }

    fn to_unsigned(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest can be written as JSON")
    }

    /// Hash of everything that decides the stream: names, sizes and units. Locations and version marks are left out,
    /// because they differ for the same files in another store.
    pub fn digest(&self) -> Digest {
        let mut content = Self { format_version: UNSIGNED, ..self.clone() };
        for source in &mut content.sources {
            source.url = None;
            source.files.iter_mut().for_each(|file| file.version = None);
        }
        Digest::of(&content.to_unsigned())
    }

    /// What there is of each source of `config`, which the manifest was made for.
    pub fn summary(&self, config: &DataConfig) -> Vec<SourceSummary> {
        let summary = |(source, config): (&SourceManifest, &SourceConfig)| {
            let mut content = SourceManifest { url: None, ..source.clone() };
            content.files.iter_mut().for_each(|file| file.version = None);
            let content = serde_json::to_vec(&content).expect("a manifest can be written as JSON");
            SourceSummary {
                name: source.name.clone(),
                address: source.url.clone().unwrap_or_else(|| config.url.clone()),
                files: source.files.len(),
                bytes: source.units.iter().map(|unit| unit.bytes).sum(),
                digest: Digest::of(&content),
            }
        };
        self.sources.iter().zip(&config.source).map(summary).collect()
    }

    /// Number of files, over all sources.
    pub fn files(&self) -> usize {
        self.sources.iter().map(|source| source.files.len()).sum()
    }

    /// Bytes of text over all sources, as far as they are known without decoding: for compressed files the stored
    /// bytes.
    pub fn bytes(&self) -> u64 {
        self.sources.iter().flat_map(|source| &source.units).map(|unit| unit.bytes).sum()
    }
}

fn freeze(source: &SourceConfig, limit: u64, stores: &Stores) -> Result<SourceManifest, DataError> {
    let folder = stores.open(&source.url)?;
    let files = list(source, &folder, stores)?;
    if !folder.can_list() {
        check_ranges(&folder, &files)?;
    }
    let format = format_of(source, &folder, &files)?;
    let reader = UnitReader { format, text: source.text.clone(), limit, vocabulary: None };
    let units = reader.units(&folder, &files)?;
    if units.is_empty() {
        return Err(DataError::Empty { name: source.name.clone() });
    }
    let url = folder.pinned().map(str::to_owned);
    Ok(SourceManifest { name: source.name.clone(), url, format, files, units })
}

/// Checks now, and not in the first step, that a web server supports range requests.
pub(crate) fn check_ranges(folder: &Folder, files: &[FileInfo]) -> Result<(), DataError> {
    // A range that is the whole file would prove nothing.
    match files.iter().find(|file| file.size > 1) {
        Some(file) => folder.read_range(file, 0..1).map(drop),
        None => Ok(()),
    }
}

/// The files of a source: sorted if a pattern finds them, or in the order in which a list or the plan names them.
pub(crate) fn list(
    source: &SourceConfig,
    folder: &Folder,
    stores: &Stores,
) -> Result<Vec<FileInfo>, DataError> {
    let named = source.list.as_ref().map(|list| names_of_list(list, source, folder, stores)).transpose()?;
    let patterns: Vec<String> = source.files.iter().map(|pattern| plain(pattern, folder)).collect();
    let is_glob = |pattern: &&String| pattern.contains(['*', '?', '[']);
    let globs =
        patterns.iter().filter(is_glob).map(|glob| FileGlob::new(glob)).collect::<Result<Vec<_>, _>>()?;
    if let Some(pattern) = patterns.iter().find(is_glob).filter(|_| named.is_none() && !folder.can_list()) {
        return Err(DataError::Pattern {
            pattern: pattern.clone(),
            reason:
                "a web server does not list its files; name them, number them with {:05} and range, or give a \
                     list of them"
                    .to_owned(),
        });
    }
    let found = match (&named, &source.list) {
        (Some(named), Some(list)) => globs
            .iter()
            .map(|glob| folder.stat(named.iter().filter(|name| glob.matches(name)).cloned().collect()))
            .collect::<Result<_, _>>()
            .map_err(|error| named_by(list, error))?,
        _ if globs.is_empty() => Vec::new(),
        _ => folder.find(&globs)?,
    };
    let mut found = found.into_iter();
    let mut files = Vec::new();
    for pattern in &patterns {
        if is_glob(&pattern) {
            files.extend(found.next().into_iter().flatten());
            continue;
        }
        let [first, end] = source.range.unwrap_or([0, 1]);
        let names = match counter(pattern)? {
            Some((before, width, after)) => {
                (first..end).map(|id| format!("{before}{id:0width$}{after}")).collect()
            }
            None => vec![pattern.clone()],
        };
        files.extend(folder.stat(names)?);
    }
    // A file that two patterns match is read once.
    let mut seen = std::collections::BTreeSet::new();
    files.retain(|file| seen.insert(file.path.clone()));
    if files.is_empty() {
        return Err(DataError::NoFiles {
            name: source.name.clone(),
            url: folder.url().to_owned(),
            files: source.files.clone(),
        });
    }
    Ok(files)
}

/// A name below a folder without redundant parts: `./a` becomes `a`. On a disk, `a//b` also becomes `a/b`; in other
/// stores these are two names.
fn plain(name: &str, folder: &Folder) -> String {
    let parts = name.split('/').filter(|part| *part != "." && !(part.is_empty() && folder.is_on_disk()));
    parts.collect::<Vec<_>>().join("/")
}

/// The error for a file that a list names.
fn named_by(list: &str, error: DataError) -> DataError {
    match error {
        DataError::Missing { file } => DataError::Format {
            file: list.to_owned(),
            format: "a list of files",
            reason: format!("it names {file}, which does not exist"),
        },
        error => error,
    }
}

/// The names of files below a source's `url` in its list, which has one address or name per line.
fn names_of_list(
    list: &str,
    source: &SourceConfig,
    below: &Folder,
    stores: &Stores,
) -> Result<Vec<String>, DataError> {
    let (folder, name) = list.rsplit_once('/').unwrap_or((".", list));
    let folder = stores.open(folder)?;
    let bytes = folder.read_all(&folder.stat(vec![name.to_owned()])?[0])?;
    let refuse =
        |reason: String| DataError::Format { file: folder.place(name), format: "a list of files", reason };
    let text = contents::text_of(&bytes).map_err(|error| refuse(error.to_string()))?;
    let root = format!("{}/", source.url.trim_end_matches('/'));
    let mut names = Vec::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        match line.strip_prefix(&root) {
            _ if line.is_empty() || line.starts_with('#') => {}
            // In web addresses, names are percent-encoded.
            Some(name) if root.starts_with("http") => names.push(decoded(name)),
            Some(name) => names.push(plain(name, below)),
            None if line.contains("://") => {
                return Err(refuse(format!("line {number} is not below url = {:?}", source.url)));
            }
            None => names.push(plain(line, below)),
        }
    }
    Ok(names)
}

/// A percent-decoded name, or the name itself if the result would not be UTF-8.
fn decoded(name: &str) -> String {
    Path::from_url_path(name).map_or_else(|_| name.to_owned(), |path| path.to_string())
}

/// Splits a name such as `part-{:05}.parquet` into the parts before and after the counter, and the counter's width.
fn counter(pattern: &str) -> Result<Option<(&str, usize, &str)>, DataError> {
    let Some((before, rest)) = pattern.split_once('{') else { return Ok(None) };
    let parts = rest.split_once('}').and_then(|(inside, after)| {
        let width = match inside.strip_prefix(":0") {
            Some(width) => width.parse().ok().filter(|width| *width <= 20)?,
            None => inside.is_empty().then_some(0)?,
        };
        (!after.contains('{')).then_some((before, width, after))
    });
    parts.map(Some).ok_or_else(|| DataError::Pattern {
        pattern: pattern.to_owned(),
        reason: "write one counter, as {} or {:05}".to_owned(),
    })
}

/// The format that the plan states, or that the suffixes of all files imply.
pub(crate) fn format_of(
    source: &SourceConfig,
    folder: &Folder,
    files: &[FileInfo],
) -> Result<Format, DataError> {
    if let Some(format) = source.format {
        return Ok(format);
    }
    let mut rest = files.iter().map(|file| (file, Format::of_file(&file.path)));
    let unknown = |file: &FileInfo, reason: &str| DataError::Format {
        file: folder.place(&file.path),
        format: "of a known suffix",
        reason: reason.to_owned(),
    };
    let mixed =
        |file| unknown(file, "all files of a source must have the same format; split it into two sources");
    let first = match rest.next() {
        Some((file, Some(Format::Json))) => {
            let reason = "write its objects one per line, in a file of .jsonl; if they are so already, write format = \"jsonl\" in the plan";
            return Err(unknown(file, reason));
        }
        Some((_, Some(format))) => format,
        Some((file, None)) if Format::may_be_tokens(&file.path) => {
            if let Some((other, _)) = rest.find(|(file, _)| !Format::may_be_tokens(&file.path)) {
                return Err(mixed(other));
            }
            // An empty file has no header.
            let full = files.iter().find(|file| file.size > 0);
            return tokens::format_of(folder, full.unwrap_or(file));
        }
        Some((file, None)) => {
            return Err(unknown(
                file,
                "write format = \"parquet\", \"arrow\", \"jsonl\", \"json.gz\", \"json.zst\", \"text\", \"u16\" or \"u32\" in \
                 the plan",
            ));
        }
        None => return Err(DataError::Empty { name: source.name.clone() }),
    };
    match rest.find(|(_, format)| *format != Some(first)) {
        Some((file, _)) => Err(mixed(file)),
        None => Ok(first),
    }
}

#[cfg(test)]
mod tests {
    use ulmus_plan::Bytes;

    use super::*;
    use crate::store::tests::memory;

    fn source(files: &[&str], range: Option<[u64; 2]>) -> DataConfig {
        let source = SourceConfig {
            name: "web".to_owned(),
            url: "run:".to_owned(),
            files: files.iter().map(|file| (*file).to_owned()).collect(),
            range,
            text: "text".to_owned(),
            ..SourceConfig::default()
        };
        DataConfig { source: vec![source], unit: Bytes::new(10), ..DataConfig::default() }
    }

    fn corpus() -> Folder {
        let folder = memory();
        for name in ["x/00010.txt", "x/00009.txt", "x/00008.md", "y.jsonl"] {
            folder.write(name, b"twelve bytes".to_vec()).unwrap();
        }
        folder
    }

    #[test]
    fn globs_names_and_counters_find_files() {
        let folder = corpus();
        let paths = |files: &[&str], range| {
            let manifest = Manifest::freeze(&source(files, range), Some(&folder)).unwrap();
            manifest.sources[0].files.iter().map(|file| file.path.clone()).collect::<Vec<_>>()
        };
        assert_eq!(paths(&["**/*.txt", "x/00008.md"], None), ["x/00009.txt", "x/00010.txt", "x/00008.md"]);
        assert_eq!(paths(&["x/{:05}.txt"], Some([9, 11])), ["x/00009.txt", "x/00010.txt"]);
        assert_eq!(paths(&["x/*", "x/0001{}.txt"], Some([0, 1])).len(), 3);
    }

    #[test]
    fn another_tokenizer_is_refused() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny/tokenizer");
        let read = |suffix: &str| {
            let bytes = std::fs::read(format!("{path}.{suffix}")).unwrap();
            Tokenizer::read(&bytes, suffix, None, None).unwrap()
        };
        let manifest = Manifest::freeze(&source(&["y.jsonl"], None), Some(&corpus())).unwrap();
        let manifest = manifest.with_tokenizer(&read("model"));
        let stored = manifest.to_json();
        // A flipped bit is always detected.
        for at in (0..stored.len()).step_by(7) {
            let mut damaged = stored.clone();
            damaged[at] ^= 4;
            assert!(Manifest::from_json(&damaged).is_err(), "byte {at}");
        }
        // The first format version is still read.
        let old = Manifest { format_version: UNSIGNED, ..manifest.clone() };
        assert_eq!(Manifest::from_json(&old.to_unsigned()).unwrap(), manifest);
        // This is the output of sha256sum.
        let sha256 = "fbec0020c50e2132ff4f419cb494796008c17ecb3535a880065753d4412e3ca3";
        assert!(String::from_utf8_lossy(&stored).contains(sha256));
        let manifest = Manifest::from_json(&stored).unwrap();
        manifest.check_tokenizer(&read("model")).unwrap();
        let message = manifest.check_tokenizer(&read("json")).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json has changed") && message.contains(sha256), "{message}");
    }

    #[test]
    fn mistakes_name_what_to_write() {
        let folder = corpus();
        for (files, range, words) in [
            (["*.parquet"], None, "nothing in run: matches [\"*.parquet\"]"),
            (["x/{:05}.txt"], Some([9, 12]), "run:x/00011.txt does not exist"),
            (["x/{id}.txt"], Some([9, 12]), "write one counter, as {} or {:05}"),
            (["x[.txt"], None, "not a usable file pattern"),
        ] {
            let message = Manifest::freeze(&source(&files, range), Some(&folder)).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        folder.write("z.xyz", Vec::new()).unwrap();
        for files in [&["z.xyz"][..], &["y.jsonl", "x/00009.txt"]] {
            let message = Manifest::freeze(&source(files, None), Some(&folder)).unwrap_err().to_string();
            assert!(message.contains("of a known suffix"), "{message}");
        }
    }

    #[test]
    fn the_stored_form_round_trips_and_is_hashed() {
        let folder = corpus();
        let manifest = Manifest::freeze(&source(&["**/*.txt"], None), Some(&folder)).unwrap();
        assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
        assert_eq!((manifest.files(), manifest.bytes()), (2, 24));
        let mut marked = manifest.clone();
        marked.sources[0].files[0].version = Some("other".to_owned());
        assert_eq!(marked.digest(), manifest.digest());
        marked.sources[0].files[0].size += 1;
        assert_ne!(marked.digest(), manifest.digest());
        let newer = Manifest { format_version: FORMAT_VERSION + 1, ..manifest };
        let message = Manifest::from_json(&newer.to_json()).unwrap_err().to_string();
        assert!(message.contains("version 3"), "{message}");
    }
}
