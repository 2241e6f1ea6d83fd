//! Text that is already on the machine, made into a corpus, and the tokenizer that is trained on it.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use ulmus_types::Problems;

use crate::bytes::Bytes;
use crate::rules::{range, range_or, sound};

/// How many pieces a tokenizer that is trained may have; 256 of them are bytes.
pub(crate) const TRAINED_PIECES: RangeInclusive<u64> = 512..=1 << 18;

/// The text that becomes parquet shards before training. The same list gives the same shards on every machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrepareConfig {
    /// Maximum amount of text to take.
    pub cap: Bytes,
    /// Text per shard.
    pub shard: Bytes,
    /// Crates whose sources cargo has unpacked, each as "name version".
    pub crates: Vec<String>,
    /// Folders or files on this machine.
    pub paths: Vec<String>,
    /// Globs of the files to take. Files that match the first glob come first.
    pub include: Vec<String>,
}

impl Default for PrepareConfig {
    fn default() -> Self {
        Self {
            cap: Bytes::mib(32),
            shard: Bytes::mib(4),
            crates: Vec::new(),
            paths: Vec::new(),
            include: vec!["**/*.md".to_owned(), "**/*.txt".to_owned(), "**/*.rs".to_owned()],
        }
    }
}

impl PrepareConfig {
    /// Reports every rule that is broken.
    pub(crate) fn check(&self, problems: &mut Problems) {
        let least = Bytes::new(64 << 10);
        range(problems, "prepare.cap", self.cap, least..);
        range(problems, "prepare.shard", self.shard, least..=Bytes::mib(4 << 10));
        problems.check(
            !(self.crates.is_empty() && self.paths.is_empty()),
            "prepare.paths",
            "[]",
            "no text is named",
            "name folders or files in paths, or crates as \"name version\" in crates",
        );
        problems.check(
            !self.include.is_empty(),
            "prepare.include",
            "[]",
            "no file would be taken",
            "write include = [\"**/*.md\"]",
        );
        for (index, entry) in self.crates.iter().enumerate() {
            problems.check(
                entry.split(' ').count() == 2,
                format!("prepare.crates.{index}"),
                format!("{entry:?}"),
                "a crate is named with its version",
                "write for instance \"tokio 1.54.1\"",
            );
        }
    }
}

/// The tokenizer of a run: a file, or one that is trained on a sample of the prepared text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenizerConfig {
    /// A SentencePiece `tokenizer.model` or a Hugging Face `tokenizer.json`; without it one is trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Name of the BOS token, where the file does not state it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos: Option<String>,
    /// Name of the EOS token, where the file does not state it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eos: Option<String>,
    /// Vocabulary size of a tokenizer that is trained; a `file` has its own. It decides `model.vocab_size` if that is not set.
    pub pieces: u64,
    /// Amount of text on which it is trained.
    pub sample: Bytes,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self { file: None, bos: None, eos: None, pieces: 4095, sample: Bytes::mib(8) }
    }
}

impl TokenizerConfig {
    /// Reports every rule that is broken; `vocab_size` is the model's.
    pub(crate) fn check(&self, prepares: bool, vocab_size: u64, problems: &mut Problems) {
        if self.file.is_some() {
            return;
        }
        problems.check(
            prepares || !sound(problems, &["prepare"]),
            "tokenizer.file",
            "missing",
            "without [prepare] there is no text to train a tokenizer on",
            "write the path of a tokenizer.model or tokenizer.json",
        );
        // No more than the model has rows for.
        let (least, most) = TRAINED_PIECES.into_inner();
        let advised = self.pieces.clamp(least, vocab_size.saturating_sub(1).clamp(least, most));
        range_or(problems, "tokenizer.pieces", self.pieces, TRAINED_PIECES, format!("set it to {advised}"));
        range_or(problems, "tokenizer.sample", self.sample, Bytes::new(1).., "set it to \"8MiB\"");
        if sound(problems, &["tokenizer.pieces", "model.vocab_size"]) {
            problems.check(
                self.pieces < vocab_size,
                "tokenizer.pieces",
                self.pieces,
                format!("pieces and the pad id need rows in model.vocab_size = {vocab_size}"),
                format!("set model.vocab_size to {}", (self.pieces + 1).next_multiple_of(128)),
            );
        }
    }
}
