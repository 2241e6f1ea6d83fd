//! Errors of reading corpora. Every message names the file or source, and what to do next.

use ulmus_chat::ChatError;
use ulmus_storage::StoreError;
use ulmus_tokenizer::TokenizerError;
use ulmus_types::{ErrorKind, counted};

use crate::address::RUN;

/// An error of the data plane.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A source's URL is not a folder that can be opened.
    #[error("{url:?} is not a folder of files: {reason}")]
    Url {
        /// The URL in the plan.
        url: String,
        /// What is wrong, and what to write instead.
        reason: String,
    },
    /// A path to prepare does not exist.
    #[error("{path} does not exist; correct prepare.paths")]
    NoPath {
        /// The path in the plan.
        path: String,
    },
    /// A file is not there.
    #[error("{file} does not exist; {}", or_restore(file, "check url, files and list of its source"))]
    Missing {
        /// The file, with its address.
        file: String,
    },
    /// A file that a plan or a command names is not there.
    #[error("{file} does not exist, or is a folder; correct its name")]
    NoFile {
        /// The file.
        file: String,
    },
    /// The store did not give or take a file.
    #[error(transparent)]
    Store(StoreError),
    /// A file of a name that cannot be asked for.
    #[error("{file} cannot be read: {reason}; rename it, or correct files")]
    Name {
        /// The file, with its address.
        file: String,
        /// What is wrong with the name.
        reason: String,
    },
    /// The file is only a Git LFS pointer.
    #[error("{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")]
    Pointer {
        /// The file, with its address.
        file: String,
    },
    /// A disk is full, or its permissions do not allow access.
    #[error(
        "{file} cannot be accessed: {reason}; free some space or correct the permissions, then run the same command again"
    )]
    Disk {
        /// The file, with its address.
        file: String,
        /// The operating system's error.
        reason: String,
    },
    /// The folder for the cache cannot be used.
    #[error("the cache {folder} cannot be opened: {error}; correct data.cache, or leave it out")]
    Cache {
        /// The folder in the plan.
        folder: String,
        /// The file system's error.
        #[source]
        error: std::io::Error,
    },
    /// No file matches the patterns of a source.
    #[error("source {name:?} has no files: nothing in {url} matches {files:?}; correct url or files")]
    NoFiles {
        /// Name of the source.
        name: String,
        /// Folder of the source.
        url: String,
        /// File patterns of the source.
        files: Vec<String>,
    },
    /// A file pattern is invalid.
    #[error("{pattern:?} is not a usable file pattern: {reason}")]
    Pattern {
        /// The pattern in the plan.
        pattern: String,
        /// What is wrong, and what to write instead.
        reason: String,
    },
    /// The bytes are not what the format says.
    #[error(
        "{file} is not {format}: {reason}; {}",
        or_restore(file, "correct files or format of its source")
    )]
    Format {
        /// The file, with its address.
        file: String,
        /// The format that was expected.
        format: &'static str,
        /// What was found.
        reason: String,
    },
    /// A file lacks the text column or key.
    #[error("{file} has no column {column:?}; set text of its source to one of {columns:?}")]
    Column {
        /// The file, with its address.
        file: String,
        /// The column in the plan.
        column: String,
        /// The columns in the file.
        columns: Vec<String>,
    },
    /// The text column or key does not hold strings.
    #[error(
        "column {column:?} of {file} holds {found}, not text; set text of its source to a column of strings"
    )]
    ColumnType {
        /// The file, with its address.
        file: String,
        /// The column in the plan.
        column: String,
        /// What the column holds instead.
        found: String,
    },
    /// Several columns of a file have the name of the text column.
    #[error("{file} has {count} columns named {column:?}; rewrite it with unique column names")]
    Columns {
        /// The file, with its address.
        file: String,
        /// The column in the plan.
        column: String,
        /// How many columns have this name.
        count: usize,
    },
    /// An Arrow file with compressed batches.
    #[error(
        "the batches of {file} are compressed with {codec}, which is not supported; rewrite it without compression, or as Parquet"
    )]
    CompressedArrow {
        /// The file, with its address.
        file: String,
        /// What they are compressed with.
        codec: &'static str,
    },
    /// An encrypted column.
    #[error(
        "column {column:?} of {file} is encrypted, which is not supported; rewrite it without encryption"
    )]
    Encrypted {
        /// The file, with its address.
        file: String,
        /// The column in the plan.
        column: String,
    },
    /// Stored bytes are damaged.
    #[error("{file} is damaged: {reason}; {}", or_restore(file, "fetch it again from its origin"))]
    Damaged {
        /// The file, with its address.
        file: String,
        /// What was found.
        reason: String,
    },
    /// A unit still cannot be read after retries.
    #[error("{error} (unit {unit} of source {name:?})")]
    BadUnit {
        /// Name of the source.
        name: String,
        /// Index of the unit in the manifest.
        unit: usize,
        /// Why it cannot be read.
        error: Box<DataError>,
    },
    /// A file has changed since the manifest was frozen.
    #[error(
        "{file} has changed since the run began: {what} was {then}, now {now}; restore it, or start a new run"
    )]
    Changed {
        /// The file, with its address.
        file: String,
        /// The property that differs.
        what: &'static str,
        /// The value in the manifest.
        then: String,
        /// The value now.
        now: String,
    },
    /// The manifest cannot be read.
    #[error("the manifest cannot be read: {reason}; restore manifest.json of the run")]
    Manifest {
        /// What was found.
        reason: String,
    },
    /// The manifest belongs to other sources.
    #[error(
        "the manifest lists the sources {manifest:?}, the plan {plan:?}; start a new run for other sources"
    )]
    OtherSources {
        /// Names of the sources in the manifest.
        manifest: Vec<String>,
        /// Names of the sources in the plan.
        plan: Vec<String>,
    },
    /// More lanes read a source than it has units.
    #[error(
        "source {name:?} has {} for the {lanes} lanes that read it; use data.lanes of at most {most} (and a \
         train.micro_batch that is a multiple of train.sequences / data.lanes), or a smaller data.unit, or more text; a compressed \
         file is one unit of any size, so store it in several",
        counted(*units, "unit")
    )]
    FewUnits {
        /// Name of the source.
        name: String,
        /// Number of its units in the manifest.
        units: usize,
        /// Number of lanes that read it.
        lanes: usize,
        /// The largest `data.lanes` that would work.
        most: usize,
    },
    /// A source has no document to train on.
    #[error(
        "no document of source {name:?} is left to train on: each is empty, shorter than data.min_characters or \
         data.min_tokens, or held out; lower these limits or data.holdout, or add more or longer texts"
    )]
    Empty {
        /// The source.
        name: String,
    },
    /// A source has been read as often as the plan allows.
    #[error("source {name:?} is exhausted: all {epochs} epochs that max_epochs allows have been read")]
    Exhausted {
        /// Name of the source.
        name: String,
        /// `max_epochs` of the source.
        epochs: u64,
    },
    /// Cursors belong to another plan.
    #[error(
        "the cursors have {numbers} numbers, but the plan needs {expected}; resume with the plan of the run"
    )]
    Cursors {
        /// How many numbers were given.
        numbers: usize,
        /// How many the plan needs.
        expected: usize,
    },
    /// A cursor points beyond the end of its window.
    #[error(
        "a cursor of source {name:?} lies outside its window, so its files or the tokenizer are not those of the run; \
         restore them"
    )]
    Position {
        /// Name of the source.
        name: String,
    },
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A folder has no tokenizer.
    #[error("{folder} has no tokenizer.model and no tokenizer.json; name a tokenizer in tokenizer.file")]
    NoTokenizer {
        /// The folder, with its address.
        folder: String,
    },
    /// A source holds token ids where text is needed.
    #[error(
        "source {name:?} holds token ids, but text is needed here; name the tokenizer that made them in \
         tokenizer.file, or use another source"
    )]
    Tokens {
        /// Name of the source.
        name: String,
    },
    /// The plan cuts documents into pieces, but shards of token ids hold whole documents.
    #[error(
        "the plan cuts documents into pieces of words (data.pack = \"corenet\"), but shards of token ids hold whole \
         documents; add --set data.pack=concat, and write the same in the plan that reads the shards"
    )]
    Pieces,
    /// Token ids cannot be cut into pieces of a number of words.
    #[error("token ids of source {name:?} cannot be cut into pieces of words; set data.pack = \"concat\"")]
    Words {
        /// Name of the source.
        name: String,
    },
    /// Shards or copies cannot be written to a folder.
    #[error("{folder} cannot be written to: {reason}; name another folder, or empty it")]
    Target {
        /// The file, with its address.
        folder: String,
        /// Why nothing can be written there.
        reason: String,
    },
    /// The sources of a crate are not on the machine.
    #[error(
        "crate {name:?} is not unpacked in {folder}; run `cargo fetch`, or remove it from prepare.crates"
    )]
    Crate {
        /// Name and version of the crate.
        name: String,
        /// The folder in which it was expected.
        folder: String,
    },
    /// There is nothing to prepare.
    #[error(
        "no text was found: nothing in {places:?} that matches {include:?} was taken ({found}); correct prepare.paths, \
         prepare.include or prepare.cap"
    )]
    NoText {
        /// Crates and paths in the plan.
        places: Vec<String>,
        /// Patterns in the plan.
        include: Vec<String>,
        /// What was found, and why it was skipped.
        found: String,
    },
    /// It is unclear which files a tuning stage has, or there are none.
    #[error("{url}: {reason}")]
    Examples {
        /// The folder in the plan.
        url: String,
        /// What is there, and what to write instead.
        reason: String,
    },
    /// A file has no rows.
    #[error("{file} has no rows; get it again, or leave it out")]
    NoRows {
        /// The file, with its address.
        file: String,
    },
    /// No row of a tuning stage is left to learn from.
    #[error(
        "no row of {files:?} is left to learn from: {dropped}; correct the rows, or raise max_length of the stage"
    )]
    NoExamples {
        /// The files, with their addresses.
        files: Vec<String>,
        /// How many rows were left out for which reasons.
        dropped: String,
    },
    /// A file of rows cannot be used.
    #[error("{file}: {error}")]
    Rows {
        /// The file, with its address.
        file: String,
        /// What is wrong, and what to write instead.
        error: ChatError,
    },
    /// A row cannot be used.
    #[error("{file}, row {row} (from 0): {error}")]
    Row {
        /// The file, with its address.
        file: String,
        /// Number of the row in the file, from 0.
        row: u64,
        /// What is wrong, and what to write instead.
        error: ChatError,
    },
    /// A chat template cannot be used.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A reading thread panicked.
    #[error("a reading thread panicked, which is a bug; see the log for the panic")]
    Stopped,
}

/// What to do about a file: another thing if it is one that the run has made, which has no source elsewhere.
fn or_restore<'a>(file: &str, advice: &'a str) -> &'a str {
    let is_own = file.starts_with(RUN);
    if is_own {
        "put back a copy of it, or start a run of another name, which makes it again"
    } else {
        advice
    }
}

impl From<StoreError> for DataError {
    /// Where a plan says more about what to do than a store can, the error is the plan's.
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Address { url, reason } => Self::Url { url, reason },
            StoreError::NotFound { file } => Self::Missing { file },
            StoreError::Name { file, reason } => Self::Name { file, reason },
            StoreError::Changed { file, what, then, now } => Self::Changed { file, what, then, now },
            StoreError::Damaged { file, reason } => Self::Damaged { file, reason },
            error => Self::Store(error),
        }
    }
}

impl DataError {
    /// Whether the error is about the contents of one file, so that others may be fine.
    pub(crate) const fn is_of_unit(&self) -> bool {
        matches!(
            self,
            Self::Missing { .. }
                | Self::Format { .. }
                | Self::Pointer { .. }
                | Self::Columns { .. }
                | Self::Encrypted { .. }
                | Self::CompressedArrow { .. }
                | Self::Column { .. }
                | Self::ColumnType { .. }
                | Self::Damaged { .. }
        )
    }

    /// Names the unit that the error is about, if it is about one.
    pub(crate) fn of_unit(self, name: &str, unit: usize) -> Self {
        if self.is_of_unit() {
            Self::BadUnit { name: name.to_owned(), unit, error: Box::new(self) }
        } else {
            self
        }
    }

    /// What the caller can do about the error.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Store(error) => error.kind(),
            Self::Damaged { .. } | Self::Changed { .. } | Self::Manifest { .. } | Self::Position { .. } => {
                ErrorKind::Corrupt
            }
            Self::BadUnit { error, .. } => error.kind(),
            Self::Tokenizer(error) => error.kind(),
            Self::Rows { error, .. } | Self::Row { error, .. } | Self::Chat(error) => error.kind(),
            Self::Disk { .. } => ErrorKind::Disk,
            Self::Stopped => ErrorKind::Internal,
            _ => ErrorKind::InvalidInput,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_file_of_the_run_is_not_looked_for_elsewhere() {
        let missing = |file: &str| DataError::Missing { file: file.to_owned() }.to_string();
        assert_eq!(
            missing("s3://b/a.txt"),
            "s3://b/a.txt does not exist; check url, files and list of its source"
        );
        let own = "run:shards/part-00000.parquet";
        let advice = "put back a copy of it, or start a run of another name, which makes it again";
        assert_eq!(missing(own), format!("{own} does not exist; {advice}"));
        let damaged = DataError::Damaged { file: own.to_owned(), reason: "it is cut".to_owned() };
        assert_eq!(damaged.to_string(), format!("{own} is damaged: it is cut; {advice}"));
    }
}
