//! Turns raw public corpora into training sequences, exactly and resumably.
//!
//! A [`Manifest`] freezes what is read. [`Sources`] turns its units into documents, a [`Corpus`] turns documents into
//! packed tokens, and a [`Loader`] hands out the sequences of some of the plan's lanes, the same ones for any number of
//! workers and threads. [`prepare()`] makes a corpus from text that is on the machine already, and [`train()`] a
//! tokenizer.
//!
//! What is read depends on the plan and the files alone, and not on the clock, the order of listings or the number of
//! threads. All calls that read block; they are meant for plain threads, not for async code.

#![forbid(unsafe_code)]

mod address;
mod arrow;
mod compressed;
mod contents;
mod corpus;
mod cursors;
mod document;
mod error;
mod examples;
mod explain;
mod format;
mod ftfy;
mod glob;
mod line;
mod loader;
mod manifest;
mod mirror;
mod order;
mod pack;
mod parquet;
mod prepare;
mod rows;
mod shards;
mod sources;
mod splits;
mod store;
mod stored;
mod tokens;
mod unit;
mod walk;

pub use corpus::{Corpus, Counts, HeldOut};
pub use cursors::Cursors;
pub use document::normalized;
pub use error::DataError;
pub use examples::{
    CHAT_TEMPLATE, ChatTemplate, Dropped, Epochs, ExampleFiles, Examples, ExamplesReport, FileGlance,
    FileReport, Glance, PlanTokenizer, RowContent, RowLine, RowOutcome, RowPart, Update, preprocessor,
    read_forbidden, read_named, read_template, renderer, stage_template, template_files, tokenizer_folder,
};
pub use explain::{Excerpt, Explanation};
pub use line::without_lone_surrogates;
pub use loader::{Loader, Origin};
pub use manifest::{Manifest, SourceSummary};
pub use mirror::{Mirrored, mirror};
pub use pack::{IGNORE, Sequence};
pub use prepare::{Prepared, cargo_home, matching_files, prepare, prepared_units};
pub use rows::read_rows;
pub use shards::{Written, pack, tokenize};
pub use sources::{Inspection, SourceReport, Sources, check_prepared, inspect};
pub use splits::files_of_split;
pub use store::{Folder, Traffic, files_below};
