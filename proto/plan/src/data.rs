//! Where text comes from and how it becomes sequences.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use ulmus_types::{Problems, RunName};

use crate::bytes::Bytes;
use crate::rules::{range, range_or, sound};
use crate::train::TrainConfig;

/// How a file holds its documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Rows of one string column.
    Parquet,
    /// The same in Arrow's IPC format, as a stream or a file.
    Arrow,
    /// One JSON object per line.
    Jsonl,
    /// One JSON object per line, compressed with gzip.
    #[serde(rename = "json.gz")]
    JsonGz,
    /// One JSON object per line, compressed with zstd.
    #[serde(rename = "json.zst")]
    JsonZst,
    /// A list of JSON objects; only for the rows that a model is tuned on.
    Json,
    /// One document per file.
    Text,
    /// Token ids of two bytes each; the text was tokenized before.
    U16,
    /// Token ids of four bytes each; the text was tokenized before.
    U32,
}

impl Format {
    /// The formats that hold text.
    pub const TEXT: [Self; 6] =
        [Self::Parquet, Self::Arrow, Self::Jsonl, Self::JsonGz, Self::JsonZst, Self::Text];

    /// The word for it in a plan.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Arrow => "arrow",
            Self::Jsonl => "jsonl",
            Self::JsonGz => "json.gz",
            Self::JsonZst => "json.zst",
            Self::Json => "json",
            Self::Text => "text",
            Self::U16 => "u16",
            Self::U32 => "u32",
        }
    }

    /// Whether a file holds token ids instead of text.
    pub const fn holds_tokens(self) -> bool {
        matches!(self, Self::U16 | Self::U32)
    }

    /// Whether a file holds rows with columns.
    pub const fn holds_rows(self) -> bool {
        matches!(self, Self::Parquet | Self::Arrow | Self::Jsonl | Self::JsonGz | Self::JsonZst | Self::Json)
    }

    /// Whether a file of this name may hold token ids. Its suffix does not tell how many bytes an id has.
    pub fn may_be_tokens(name: &str) -> bool {
        matches!(name.rsplit_once('.'), Some((_, "bin" | "npy")))
    }

    /// The format that the suffix of a file name stands for.
    pub fn of_file(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let (stem, suffix) = name.rsplit_once('.')?;
        let lines =
            || matches!(stem.rsplit_once('.').map(|(_, inner)| inner), Some("json" | "jsonl" | "ndjson"));
        match suffix {
            "parquet" => Some(Self::Parquet),
            "arrow" => Some(Self::Arrow),
            "jsonl" | "ndjson" => Some(Self::Jsonl),
            "gz" if lines() => Some(Self::JsonGz),
            "zst" if lines() => Some(Self::JsonZst),
            "json" => Some(Self::Json),
            "txt" | "md" | "rs" => Some(Self::Text),
            _ => None,
        }
    }
}

/// How the text of a document is normalised before it is filtered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalize {
    /// Unicode normal form C.
    #[default]
    Nfc,
    /// What Python's ftfy does (the published recipe): repairs wrongly decoded text, entities, curly quotes and control
    /// characters; then form C.
    Ftfy,
    /// The text stays as it is.
    None,
}

/// How documents become sequences of fixed length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pack {
    /// Documents are joined with BOS and EOS and cut; attention never crosses from one into another.
    #[default]
    Concat,
    /// The published recipe: documents are split into pieces of `piece_words` words, and each piece is a sequence, truncated
    /// or padded.
    Corenet,
}

/// What to do about a unit that is still damaged or missing after retries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadUnit {
    /// Stop the run.
    #[default]
    Fail,
    /// Record it and skip it on all workers.
    Quarantine,
}

/// The largest number of files that a range may name.
const MAX_FILES: u64 = 10_000_000;
/// The largest weight of a source. The sum over many sources still fits in 64 bits.
const MAX_TOKENS: u64 = 1_000_000_000_000_000;

/// One corpus, or one part of a corpus with a share of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceConfig {
    /// Name of the source in reports.
    pub name: String,
    /// Folder of the files: a path, `file://`, `s3://`, `gs://`, `az://`, `hf://datasets/<organisation>/<name>`,
    /// `http(s)://`, or `run:` for the run's own folder. An address that ends in a glob sets `files` too.
    pub url: String,
    /// Files below `url`: names, globs, or patterns such as `part-{:05}.parquet`, which `range` fills in.
    pub files: Vec<String>,
    /// A text file with one address or name per line, used instead of listing `url`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub list: Option<String>,
    /// File ids `[first, end)` for the patterns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<[u64; 2]>,
    /// Format of the files; by default that of their suffix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Column or key of the text, such as `text` or `doc.body.text`; required for Parquet and JSON lines, and for nothing else.
    pub text: String,
    /// Weight of the source in the mixture, in tokens; required if there are several sources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Where the number in `tokens` comes from, as a note for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_from: Option<String>,
    /// Number of epochs after which the run ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_epochs: Option<u64>,
}

/// The least that `data.unit` may be.
pub const LEAST_UNIT: Bytes = Bytes::new(64 << 10);

/// How the corpora become one stream of sequences.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataConfig {
    /// Number of logical streams, K; must divide `train.sequences`. Each gives the same number of sequences to every step.
    pub lanes: u64,
    /// Maximum size of a unit, the smallest piece of text that is read whole.
    pub unit: Bytes,
    /// Sequences that are shuffled together within a lane.
    pub window: u64,
    /// Fraction of the documents that is held out for validation and never trained on.
    pub holdout: f64,
    /// Minimum length of a document in characters: code points of its lower-cased text without ASCII punctuation and repeated
    /// blanks, as in the published recipe.
    pub min_characters: u64,
    /// Minimum length of a document in tokens, BOS and EOS included.
    pub min_tokens: u64,
    /// Text normalisation.
    pub normalize: Normalize,
    /// How documents become sequences.
    pub pack: Pack,
    /// Words per piece of a document, with `pack = "corenet"`.
    pub piece_words: u64,
    /// What to do if a unit is still unreadable after retries.
    pub on_bad_unit: OnBadUnit,
    /// Maximum number of units that may be skipped.
    pub max_bad_units: u64,
    /// Threads that read and tokenize, per worker.
    pub threads: u64,
    /// Folder on each worker's disk that caches what was read from remote stores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<String>,
    /// Maximum size of that cache.
    pub cache_limit: Bytes,
    /// Timeout of a request to a remote store, which is for 8 MiB at most. Failed requests are retried.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// The corpora.
    pub source: Vec<SourceConfig>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            lanes: 512,
            unit: Bytes::mib(8),
            window: 64,
            holdout: 0.0005,
            min_characters: 200,
            min_tokens: 256,
            normalize: Normalize::Nfc,
            pack: Pack::Concat,
            piece_words: 2048,
            on_bad_unit: OnBadUnit::Fail,
            max_bad_units: 16,
            threads: 2,
            cache: None,
            cache_limit: Bytes::mib(100 << 10),
            request_timeout: Duration::from_mins(1),
            source: Vec::new(),
        }
    }
}

impl DataConfig {
    /// Reports every rule that is broken; `train` is checked before.
    pub(crate) fn check(&self, train: &TrainConfig, problems: &mut Problems) {
        range(problems, "data.unit", self.unit, LEAST_UNIT..=Bytes::mib(1 << 10));
        range(problems, "data.window", self.window, 1..=1 << 20);
        // A run that is evaluated needs held-out documents, so 0 is not advised.
        let advised = if self.holdout > 0.5 { 0.5 } else { 0.0005 };
        range_or(problems, "data.holdout", self.holdout, 0.0..=0.5, format!("set it to {advised}"));
        range(problems, "data.piece_words", self.piece_words, 1..=1 << 20);
        range(problems, "data.max_bad_units", self.max_bad_units, 1..=10_000);
        range(problems, "data.threads", self.threads, 1..=256);
        let (least, most) = (Duration::from_secs(1), Duration::from_hours(1));
        range(problems, "data.request_timeout", self.request_timeout, least..=most);
        range(problems, "data.lanes", self.lanes, 1..);
        self.check_lanes(train, problems);
        for (index, source) in self.source.iter().enumerate() {
            source.check(&format!("data.source.{index}"), self.source.len() > 1, problems);
        }
        for (index, source) in self.source.iter().enumerate() {
            problems.check(
                self.source[..index].iter().all(|other| other.name != source.name),
                format!("data.source.{index}.name"),
                &source.name,
                "every source must have a name of its own",
                "rename one of them",
            );
        }
    }

    /// Lanes share the sequences of an update evenly, and a micro-batch is some whole lanes.
    fn check_lanes(&self, train: &TrainConfig, problems: &mut Problems) {
        let (lanes, sequences, micro_batch) = (self.lanes, train.sequences, train.micro_batch);
        if sound(problems, &["data.lanes", "train.sequences"]) {
            problems.check(
                lanes <= sequences && sequences.is_multiple_of(lanes),
                "data.lanes",
                lanes,
                format!(
                    "every lane must give the same number of sequences to an update of train.sequences = {sequences}"
                ),
                format!("set it to {}", largest_divisor(sequences, lanes)),
            );
        }
        if sound(problems, &["data.lanes", "train.sequences", "train.micro_batch"]) {
            let per_lane = sequences / lanes;
            problems.check(
                micro_batch.is_multiple_of(per_lane),
                "train.micro_batch",
                micro_batch,
                format!("a micro-batch must be whole lanes of {per_lane} sequences"),
                format!("set it to {} or data.lanes to {sequences}", micro_batch.next_multiple_of(per_lane)),
            );
        }
    }
}

impl SourceConfig {
    /// Splits an address that ends in a glob into `url` and `files`.
    pub(crate) fn complete(&mut self) {
        if self.files.is_empty()
            && secret(&self.url).is_none()
            && let Some(glob) = self.url.find(['*', '?', '[', '{'])
            && let Some(folder) = self.url[..glob].rfind('/')
        {
            self.files = vec![self.url[folder + 1..].to_owned()];
            self.url.truncate(folder);
        }
    }

    /// Whether documents are fields of rows or objects, so that the plan must name the field. No file has been opened yet,
    /// so suffixes decide.
    fn has_text_key(&self) -> bool {
        let format = |file: &String| self.format.or_else(|| Format::of_file(file));
        let has = |file: &String| match format(file) {
            Some(format) => format != Format::Text && !format.holds_tokens(),
            None => !Format::may_be_tokens(file),
        };
        self.files.is_empty() || self.files.iter().any(has)
    }

    fn check(&self, at: &str, mixed: bool, problems: &mut Problems) {
        let key = |name: &str| format!("{at}.{name}");
        for (name, value, example) in [
            ("name", &self.name, "refinedweb"),
            ("url", &self.url, "https://host/folder"),
            ("text", &self.text, "text"),
        ] {
            problems.check(
                !value.is_empty() || name == "text" && !self.has_text_key(),
                key(name),
                "missing",
                "every source needs it",
                format!("write {name} = {example:?}"),
            );
        }
        problems.check(
            self.name.is_empty() || self.name.parse::<RunName>().is_ok(),
            key("name"),
            format!("{:?}", self.name),
            "it names a folder: 1 to 64 letters, digits, '-', '_' and '.', beginning with a letter or digit",
            "write name = \"web\"",
        );
        for (name, address) in [("url", Some(&self.url)), ("list", self.list.as_ref())] {
            if let Some(address) = address {
                refuse_secret(problems, key(name), address);
            }
        }
        problems.check(
            self.format != Some(Format::Json),
            key("format"),
            "\"json\"",
            "a list of JSON objects cannot be entered in the middle, so no corpus is read from it",
            "write the objects one per line, and format = \"jsonl\"",
        );
        problems.check(
            !self.files.is_empty(),
            key("files"),
            "[]",
            "every source must name its files",
            "write files = [\"*.parquet\"]",
        );
        let counted = self.files.iter().any(|file| file.contains('{'));
        match self.range {
            Some([first, end]) => {
                problems.check(
                    first < end,
                    key("range"),
                    format!("[{first}, {end}]"),
                    "a range must be [first, end) with first < end",
                    format!("write range = [{first}, {}]", first + 1),
                );
                problems.check(
                    end.saturating_sub(first) <= MAX_FILES,
                    key("range"),
                    format!("[{first}, {end}]"),
                    format!("a range may name at most {MAX_FILES} files"),
                    "write a shorter range, or name the files by a list",
                );
                problems.check(
                    counted,
                    key("files"),
                    format!("{:?}", self.files),
                    "range fills in {} or {:05}, and no file pattern has either",
                    "write for instance files = [\"part-{:05}.parquet\"], or leave range out",
                );
            }
            None => problems.check(
                !counted,
                key("range"),
                "missing",
                "a file pattern with {} needs it",
                "write range = [0, 100]",
            ),
        }
        match self.tokens {
            Some(0) if mixed => problems.add(
                key("tokens"),
                0,
                format!("it must be from 1 to {MAX_TOKENS}, as sources are mixed in proportion to it"),
                "write the number that `dataloader count` tells",
            ),
            Some(tokens) => range(problems, key("tokens"), tokens, ..=MAX_TOKENS),
            None => problems.check(
                !mixed,
                key("tokens"),
                "missing",
                "several sources are mixed in proportion to their token counts, so each needs one",
                "write tokens = 665_000_000_000 and tokens_from = \"where the count comes from\"",
            ),
        }
        problems.check(
            self.max_epochs != Some(0),
            key("max_epochs"),
            0,
            "it must be at least 1",
            "set it to 1, or leave it out to read the source without end",
        );
    }
}

/// Reports an address that may carry a secret. Returns whether it does.
pub(crate) fn refuse_secret(problems: &mut Problems, key: String, address: &str) -> bool {
    let Some(shown) = secret(address) else { return false };
    problems.add(
        key,
        shown,
        "a plan is stored and shown, so an address in it has no password, token or query",
        "leave that out; credentials come from the environment or the files of the provider's own tools"
            .to_owned(),
    );
    true
}

/// If an address may carry a secret: the address without it, as it may be shown.
pub(crate) fn secret(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    // Only in this scheme does `@` stand between a container and its account.
    let user = if scheme.starts_with("abfs") { None } else { host.rsplit_once('@') };
    let shown = user.map_or(host, |(_, host)| host);
    (user.is_some() || rest.contains('?')).then(|| format!("{scheme}://…{shown}/…"))
}

/// The largest divisor of `n` that is at most `limit`.
fn largest_divisor(n: u64, limit: u64) -> u64 {
    let small = (1..=n.isqrt()).filter(|divisor| n.is_multiple_of(*divisor));
    small.flat_map(|divisor| [divisor, n / divisor]).filter(|divisor| *divisor <= limit).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_end_in_a_glob() {
        let taken_apart = |url: &str, files: &[&str]| {
            let files = files.iter().map(|file| (*file).to_owned()).collect();
            let mut source = SourceConfig { url: url.to_owned(), files, ..SourceConfig::default() };
            source.complete();
            (source.url, source.files.join(" "))
        };
        let expected = |url: &str, files: &str| (url.to_owned(), files.to_owned());
        assert_eq!(
            taken_apart("hf://datasets/a/b@v1/data/*.parquet", &[]),
            expected("hf://datasets/a/b@v1/data", "*.parquet")
        );
        assert_eq!(taken_apart("s3://b/x/**/part-{:05}.gz", &[]), expected("s3://b/x", "**/part-{:05}.gz"));
        assert_eq!(taken_apart("s3://b/[x]", &["a"]), expected("s3://b/[x]", "a"));
        assert_eq!(taken_apart("s3://b/x", &[]), expected("s3://b/x", ""));
    }

    #[test]
    fn an_address_carries_no_secret() {
        for (url, shown) in [
            ("https://me:hidden@host/folder", Some("https://…host/…")),
            ("https://host/folder?sig=hidden", Some("https://…host/…")),
            ("s3://id:hidden@bucket/a", Some("s3://…bucket/…")),
            ("abfss://container@account.dfs.core.windows.net/a", None),
            ("hf://datasets/a/b@main/c", None),
            ("https://host/a@b", None),
            ("data/what?", None),
        ] {
            assert_eq!(secret(url).as_deref(), shown, "{url}");
        }
        let source = SourceConfig {
            name: "web".to_owned(),
            url: "https://host/folder?sig=hidden".to_owned(),
            files: vec!["a".to_owned()],
            text: "text".to_owned(),
            ..SourceConfig::default()
        };
        let mut whole = SourceConfig { files: Vec::new(), ..source.clone() };
        whole.complete();
        assert_eq!(whole.url, source.url);
        let mut problems = Problems::new();
        source.check("data.source.0", false, &mut problems);
        assert_eq!(
            problems.iter().map(|problem| problem.key.as_str()).collect::<Vec<_>>(),
            ["data.source.0.url"]
        );
        assert!(!problems.to_string().contains("hidden"));
    }

    #[test]
    fn lanes_must_divide_the_batch() {
        let mut problems = Problems::new();
        let train = TrainConfig { sequences: 128, ..TrainConfig::default() };
        DataConfig { lanes: 48, ..DataConfig::default() }.check(&train, &mut problems);
        let problem = problems.iter().next().expect("48 does not divide 128");
        assert_eq!((problem.key.as_str(), problem.fix.as_str()), ("data.lanes", "set it to 32"));
    }
}
