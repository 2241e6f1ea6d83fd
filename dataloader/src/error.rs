//! What can go wrong between a corpus and a sequence. Every message names the file or source and the next act.

use ulmus_storage::StoreError;
use ulmus_tokenizer::TokenizerError;
use ulmus_types::{ErrorKind, counted};

use crate::address::RUN;

/// An error of the data plane.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A source's URL names no folder that can be opened.
    #[error("{url:?} is not a folder of files: {reason}")]
    Url {
        /// As written in the plan.
        url: String,
        /// What is wrong, and what to write.
        reason: String,
    },
    /// What is to be prepared is not there.
    #[error("{path} does not exist; correct prepare.paths")]
    NoPath {
        /// As it is named.
        path: String,
    },
    /// A file is not there.
    #[error("{file} does not exist; {}", or_restore(file, "check url, files and list of its source"))]
    Missing {
        /// The file, with its address.
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
    /// A file that stands for one in Git LFS.
    #[error("{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository")]
    Pointer {
        /// The file, with its address.
        file: String,
    },
    /// The disk is full, or does not let this user in.
    #[error(
        "{file} cannot be accessed: {reason}; free some space or correct the permissions, then run the same command again"
    )]
    Disk {
        /// The file, with its address.
        file: String,
        /// The system's own words.
        reason: String,
    },
    /// The folder of the cache cannot be used.
    #[error("the cache {folder} cannot be opened: {error}; correct data.cache, or leave it out")]
    Cache {
        /// As written in the plan.
        folder: String,
        /// Of the file system.
        #[source]
        error: std::io::Error,
    },
    /// A source matches nothing.
    #[error("source {name:?} has no files: nothing in {url} matches {files:?}; correct url or files")]
    NoFiles {
        /// The source.
        name: String,
        /// Its folder.
        url: String,
        /// Its patterns.
        files: Vec<String>,
    },
    /// A pattern that cannot be used.
    #[error("{pattern:?} is not a usable file pattern: {reason}")]
    Pattern {
        /// As written in the plan.
        pattern: String,
        /// What is wrong, and what to write.
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
    /// The text column or key is not there.
    #[error("{file} has no column {column:?}; set text of its source to one of {columns:?}")]
    Column {
        /// The file, with its address.
        file: String,
        /// The name in the plan.
        column: String,
        /// The names in the file.
        columns: Vec<String>,
    },
    /// The text column or key holds something else.
    #[error(
        "column {column:?} of {file} holds {found}, not text; set text of its source to a column of strings"
    )]
    ColumnType {
        /// The file, with its address.
        file: String,
        /// The name in the plan.
        column: String,
        /// Its type.
        found: String,
    },
    /// A column that is there more than once.
    #[error("{file} has {count} columns {column:?}; write it with a name for each")]
    Columns {
        /// The file, with its address.
        file: String,
        /// The name in the plan.
        column: String,
        /// How many columns have this name.
        count: usize,
    },
    /// An encrypted column.
    #[error(
        "column {column:?} of {file} is encrypted, and no keys are kept here; write it without encryption"
    )]
    Encrypted {
        /// The file, with its address.
        file: String,
        /// The name in the plan.
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
    /// A unit cannot be read, and was read again in vain.
    #[error("{error} (unit {unit} of source {name:?})")]
    BadUnit {
        /// The source.
        name: String,
        /// Its number in the manifest.
        unit: usize,
        /// Why it cannot be read.
        error: Box<DataError>,
    },
    /// A file is not the one that the manifest was frozen with.
    #[error(
        "{file} has changed since the run began: {what} was {then}, now {now}; restore it, or start a new run"
    )]
    Changed {
        /// The file, with its address.
        file: String,
        /// The property that differs.
        what: &'static str,
        /// Its value in the manifest.
        then: String,
        /// Its value now.
        now: String,
    },
    /// The manifest itself cannot be read.
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
        /// Names in the manifest.
        manifest: Vec<String>,
        /// Names in the plan.
        plan: Vec<String>,
    },
    /// A source is cut into fewer units than lanes read it.
    #[error(
        "source {name:?} has {} for the {lanes} lanes that read it; use data.lanes of at most {most}, or a smaller data.unit, \
         or more text; a compressed file is one unit of any size, so store it in several",
        counted(*units, "unit")
    )]
    FewUnits {
        /// The source.
        name: String,
        /// Units in the manifest.
        units: usize,
        /// Lanes that read it.
        lanes: usize,
        /// A number of lanes that would do.
        most: usize,
    },
    /// No document is left to train on.
    #[error(
        "no document of source {name:?} is left to train on: each is empty, shorter than data.min_characters or \
         data.min_tokens, or held out; lower those and data.holdout, or give it more or longer texts"
    )]
    Empty {
        /// The source.
        name: String,
    },
    /// A source was read as often as the plan allows.
    #[error("source {name:?} is used up: all {epochs} epochs that max_epochs allows are read")]
    Exhausted {
        /// The source.
        name: String,
        /// Its `max_epochs`.
        epochs: u64,
    },
    /// Cursors of another plan.
    #[error(
        "{words} cursor words do not fit the plan, which has {expected}; resume with the plan of the run"
    )]
    Cursors {
        /// The number of words that was given.
        words: usize,
        /// The number of words that the plan needs.
        expected: usize,
    },
    /// A cursor that points behind the end of its window.
    #[error(
        "a cursor of source {name:?} lies outside of its window; its files or the tokenizer are not those of the run"
    )]
    Position {
        /// The source.
        name: String,
    },
    /// A tokenizer that cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Token ids where text is needed.
    #[error(
        "source {name:?} holds token ids, and this needs text; name the tokenizer that made them in tokenizer.file, or \
         give another source"
    )]
    Tokens {
        /// The source.
        name: String,
    },
    /// Shards of token ids hold whole documents.
    #[error(
        "the plan cuts documents into pieces of words (data.pack = \"corenet\"), and shards of token ids hold whole ones; add --set \
         data.pack=concat, and write that in the plan that reads them"
    )]
    Pieces,
    /// Token ids cannot be cut into pieces of a number of words.
    #[error("token ids of source {name:?} cannot be cut into pieces of words; set data.pack = \"concat\"")]
    Words {
        /// The source.
        name: String,
    },
    /// A folder that shards or copies cannot be written to.
    #[error("{folder} cannot be written to: {reason}; name another folder, or empty it")]
    Target {
        /// The file, with its address.
        folder: String,
        /// What is there.
        reason: String,
    },
    /// A crate whose sources are not on the machine.
    #[error(
        "crate {name:?} is not unpacked in {folder}; run `cargo fetch`, or take it out of prepare.crates"
    )]
    Crate {
        /// "name version".
        name: String,
        /// Where it was looked for.
        folder: String,
    },
    /// There is nothing to prepare.
    #[error(
        "no text was found: nothing in {places:?} that matches {include:?} was taken ({found}); correct prepare.paths, \
         prepare.include or prepare.cap"
    )]
    NoText {
        /// Crates and paths of the plan.
        places: Vec<String>,
        /// Globs of the plan.
        include: Vec<String>,
        /// What was found, and why it was passed by.
        found: String,
    },
    /// A reading thread ended before its work was done.
    #[error("a reading thread stopped; this is a defect, see the log for its panic")]
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

    /// What a caller can do about it.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Store(error) => error.kind(),
            Self::Damaged { .. } | Self::Changed { .. } | Self::Manifest { .. } | Self::Position { .. } => {
                ErrorKind::Corrupt
            }
            Self::BadUnit { error, .. } => error.kind(),
            Self::Tokenizer(error) => error.kind(),
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
