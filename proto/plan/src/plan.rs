//! A whole plan and the relations between its parts.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ulmus_types::{Digest, HEARTBEAT_INTERVAL, Problems, RunName};

use crate::bytes::Bytes;
use crate::data::{DataConfig, SourceConfig, secret};
use crate::device::Device;
use crate::model::ModelConfig;
use crate::norm::NormKind;
use crate::prepare::{PrepareConfig, TokenizerConfig};
use crate::train::{CheckpointConfig, TrainConfig};

/// Which run this is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunConfig {
    /// Name of the run and of its folder.
    pub name: RunName,
    /// Random seed of the initial weights, the order of the data and the choice of held-out documents.
    pub seed: u64,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self { name: "run".parse().expect("\"run\" is a valid name"), seed: 0 }
    }
}

/// Where the run folder lives. Every worker must reach it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreConfig {
    /// Folder of run folders: a path, `file://`, or in an object store (`s3://`, `gs://`, `az://`). Every worker must reach it.
    pub url: String,
    /// Folder on the coordinator's disk for its own files (database, lock, logs, metrics), if `url` is in an object store.
    pub local: String,
}

impl StoreConfig {
    fn check(&self, problems: &mut Problems) {
        let shown = secret(&self.url);
        problems.check(
            shown.is_none(),
            "store.url",
            shown.as_deref().unwrap_or_default(),
            "an address stands in the run's plan, and is shown and sent to workers, so it carries no secret",
            "leave out what is before @ and behind ?, and give credentials in the environment or in the files of the store's own tools",
        );
        for (key, folder) in [("store.url", &self.url), ("store.local", &self.local)] {
            problems.check(
                !folder.trim().is_empty(),
                key,
                "\"\"",
                "a run must be kept somewhere",
                "write a folder, for instance runs",
            );
        }
        let scheme = self.url.split_once("://").map_or("file", |(scheme, _)| scheme);
        problems.check(
            ["file", "s3", "s3a", "gs", "az", "abfs", "abfss"].contains(&scheme),
            "store.url",
            &self.url,
            "no run can be kept there",
            "write a path, file://, s3://, gs:// or az://",
        );
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { url: "runs".to_owned(), local: "runs".to_owned() }
    }
}

/// Workers that the coordinator starts itself, as child processes on its own machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LocalConfig {
    /// Workers that the coordinator starts itself; 0 when they join from elsewhere.
    pub workers: u64,
    /// Compute threads of each of them.
    pub threads: u64,
    /// What they compute on: `auto`, `cpu`, `cuda` or `cuda:N`. Of several GPUs the n-th worker gets the n-th.
    pub device: Device,
}

impl Default for LocalConfig {
    fn default() -> Self {
        Self { workers: 0, threads: 1, device: Device::default() }
    }
}

/// Membership: when training starts, and when a worker counts as dead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterConfig {
    /// Minimum number of workers needed to start and to continue.
    pub min_workers: u64,
    /// A worker is declared dead after this long without a heartbeat. Heartbeats come every second; at least three of them.
    #[serde(with = "humantime_serde")]
    pub dead_after: Duration,
    /// How long a restarted coordinator waits for the members of its last group, and a new one for more workers than the
    /// minimum.
    #[serde(with = "humantime_serde")]
    pub rejoin_window: Duration,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self { min_workers: 1, dead_after: Duration::from_secs(3), rejoin_window: Duration::from_secs(10) }
    }
}

/// What the finished models are measured on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluateConfig {
    /// Maximum amount of held-out text to evaluate on; 0 for no evaluation.
    pub text: Bytes,
    /// Tokens of held-out text that each continuation is prompted with.
    pub prompt: u64,
    /// Tokens of each greedy continuation.
    pub continuation: u64,
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self { text: Bytes::mib(1), prompt: 40, continuation: 48 }
    }
}

/// Throughput of generation, measured as in the paper.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BenchmarkConfig {
    /// Tokens of the prompt.
    pub prompt: u64,
    /// Tokens to generate.
    pub generate: u64,
    /// Measured runs, after a warm-up run.
    pub runs: u64,
}

impl Default for BenchmarkConfig {
    fn default() -> Self {
        Self { prompt: 35, generate: 1024, runs: 3 }
    }
}

/// Everything that a run is. Made only by [`crate::read`]; what it holds satisfies every rule.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Plan {
    /// Name and seed.
    pub run: RunConfig,
    /// Place of the run folder.
    pub store: StoreConfig,
    /// Workers of the coordinator's own machine.
    pub local: LocalConfig,
    /// Membership.
    pub cluster: ClusterConfig,
    /// Shape of the model.
    pub model: ModelConfig,
    /// Tokenizer.
    pub tokenizer: TokenizerConfig,
    /// Text to make shards of; without it the sources exist already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepare: Option<PrepareConfig>,
    /// Corpora and how they become sequences.
    pub data: DataConfig,
    /// Recipe.
    pub train: TrainConfig,
    /// Grid and averaging.
    pub checkpoint: CheckpointConfig,
    /// Evaluation of the finished models.
    pub evaluate: EvaluateConfig,
    /// Throughput benchmark.
    pub benchmark: BenchmarkConfig,
}

/// Most text that models are measured on.
const MOST_TEXT: Bytes = Bytes::mib(1 << 20);
/// Nats that a sum of losses over one update may reach, as integers carry it round a group.
const MOST_NATS: f64 = (1_u64 << 31) as f64;

/// Longest text that any model takes.
const MOST_TOKENS: u64 = 1 << 20;

/// Keys that may change between two starts of the same run, because no trained bit depends on them.
const MAY_CHANGE: [&str; 12] = [
    "local.",
    "cluster.",
    "store.",
    "checkpoint.recovery",
    "checkpoint.max_age",
    "evaluate.",
    "benchmark.",
    "data.threads",
    "data.cache",
    "data.request_timeout",
    "data.on_bad_unit",
    "data.max_bad_units",
];

/// Keys that the first plans did not have, and what those plans meant. They count only with another value, so that a
/// run can go on from its checkpoints after an update.
const ADDED: [(&str, &str); 4] = [
    ("checkpoint.export", "true"),
    ("model.norm", "\"rms\""),
    ("data.piece_words", "2048"),
    ("train.algorithms", "\"library\""),
];

/// How a plan's digest is made; another rule has another line.
const DIGEST_FORM: &str = "ulmus plan, form 2\n";

/// What trained bits depend on, of all keys with their values.
fn kept(mut flat: BTreeMap<String, String>) -> BTreeMap<String, String> {
    flat.retain(|key, value| !may_change(key) && !ADDED.contains(&(key, value)));
    flat
}

/// Every key below `at` that has a value, with its value as JSON.
fn flatten_json(at: String, value: serde_json::Value, flat: &mut BTreeMap<String, String>) {
    match value {
        serde_json::Value::Null => {}
        serde_json::Value::Object(table) => {
            for (key, value) in table {
                let path = if at.is_empty() { key } else { format!("{at}.{key}") };
                flatten_json(path, value, flat);
            }
        }
        leaf => {
            flat.insert(at, leaf.to_string());
        }
    }
}

impl Plan {
    /// Tokens of one update, padding included.
    pub fn tokens_per_step(&self) -> u64 {
        self.train.sequences * self.model.max_context_length as u64
    }

    /// Length of a training sequence in tokens.
    pub const fn sequence_length(&self) -> usize {
        self.model.max_context_length
    }

    /// The plan as the TOML text that the run folder keeps.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a plan has no value that TOML lacks")
    }

    /// Hash of everything that trained bits depend on: of [`DIGEST_FORM`] and a line `key = value` for each of those keys,
    /// sorted by key, each value as compact JSON.
    pub fn digest(&self) -> Digest {
        let mut flat = BTreeMap::new();
        let value = serde_json::to_value(self).expect("a plan has text keys");
        flatten_json(String::new(), value, &mut flat);
        let lines = kept(flat).into_iter().map(|(key, value)| format!("{key} = {value}\n"));
        Digest::of([DIGEST_FORM.to_owned()].into_iter().chain(lines).collect::<String>().as_bytes())
    }

    /// Whether a hash is this plan's, by the rule of [`Self::digest`] or by that of the first programs.
    pub fn has_digest(&self, digest: Digest) -> bool {
        // It rests on how the standard library and the crate `toml` print.
        let first = || Digest::of(format!("{:?}", kept(self.flat())).as_bytes());
        digest == self.digest() || digest == first()
    }

    /// The keys that differ from `earlier`, each with the earlier and the present value, if trained bits depend
    /// on them.
    pub fn changed_keys(&self, earlier: &Self) -> Vec<(String, String, String)> {
        let (old, new) = (earlier.flat(), self.flat());
        let missing = "not set".to_owned();
        let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
        keys.sort();
        keys.dedup();
        keys.into_iter()
            .filter(|key| old.get(*key) != new.get(*key) && !may_change(key))
            .map(|key| {
                let value = |side: &BTreeMap<String, String>| side.get(key).unwrap_or(&missing).clone();
                (key.clone(), value(&old), value(&new))
            })
            .collect()
    }

    fn flat(&self) -> BTreeMap<String, String> {
        fn walk(at: String, value: &toml::Value, flat: &mut BTreeMap<String, String>) {
            match value {
                toml::Value::Table(table) => {
                    for (key, value) in table {
                        let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                        walk(path, value, flat);
                    }
                }
                leaf => {
                    flat.insert(at, leaf.to_string());
                }
            }
        }
        let mut flat = BTreeMap::new();
        let value = toml::Value::try_from(self).expect("a plan has no value that TOML lacks");
        walk(String::new(), &value, &mut flat);
        flat
    }

    /// Fills in what follows from other keys.
    pub(crate) fn complete(&mut self) {
        if self.prepare.is_some() && self.data.source.is_empty() {
            self.data.source.push(SourceConfig {
                name: "prepared".to_owned(),
                url: "run:shards".to_owned(),
                files: vec!["*.parquet".to_owned()],
                text: "text".to_owned(),
                ..SourceConfig::default()
            });
        }
        self.data.source.iter_mut().for_each(SourceConfig::complete);
        if self.tokenizer.file.is_some() {
            // The file has as many as it has; what followed from them is in the vocabulary.
            self.tokenizer.pieces = TokenizerConfig::default().pieces;
        }
        self.cluster.min_workers = self.cluster.min_workers.max(1);
    }

    /// Every rule that the plan breaks.
    pub(crate) fn check(&self, problems: &mut Problems) {
        self.model.check("model", problems);
        if let Some(prepare) = &self.prepare {
            prepare.check(problems);
        }
        self.tokenizer.check(self.prepare.is_some(), self.model.vocab_size as u64, problems);
        self.train.check(problems);
        self.data.check(self.train.sequences, self.train.micro_batch, problems);
        self.checkpoint.check(self.train.iterations, problems);
        self.store.check(problems);
        problems.check(
            !self.checkpoint.export || self.model.norm != NormKind::Layer,
            "checkpoint.export",
            self.checkpoint.export,
            "a model with model.norm = \"layer\" has no Hugging Face layout: OpenELM's code there knows RMS norm alone",
            "set it to false, or model.norm to \"rms\"",
        );
        problems.check(
            !self.data.source.is_empty(),
            "data.source",
            "missing",
            "a run needs text",
            "add [[data.source]] with name, url, files and text, or a [prepare] section",
        );
        problems.check(
            self.train.held_out_every == 0 || self.data.holdout > 0.0,
            "data.holdout",
            self.data.holdout,
            "the held-out loss needs held-out documents",
            "set it to 0.0005, or train.held_out_every to 0 for a run that is not evaluated",
        );
        problems.check(
            self.local.workers <= 256,
            "local.workers",
            self.local.workers,
            "it must be at most 256 processes",
            "write the number of cores, or 0",
        );
        problems.check(
            (1..=1024).contains(&self.local.threads),
            "local.threads",
            self.local.threads,
            "each worker must compute with 1 to 1024 threads",
            "write 1",
        );
        problems.check(
            self.cluster.min_workers <= self.train.micro_batches().max(1),
            "cluster.min_workers",
            self.cluster.min_workers,
            format!("an update has {} micro-batches, and a worker needs one", self.train.micro_batches()),
            "lower it, or lower train.micro_batch",
        );
        problems.check(
            (3 * HEARTBEAT_INTERVAL..=Duration::from_hours(1)).contains(&self.cluster.dead_after),
            "cluster.dead_after",
            humantime_serde::re::humantime::format_duration(self.cluster.dead_after),
            "it must be 3s, which is three heartbeats, to 1h",
            "write \"3s\"",
        );
        problems.check(
            self.cluster.rejoin_window <= Duration::from_hours(24),
            "cluster.rejoin_window",
            humantime_serde::re::humantime::format_duration(self.cluster.rejoin_window),
            "it must be at most 24h",
            "write \"10s\"",
        );
        let Self { benchmark, evaluate, .. } = self;
        // The first new token is part of the prompt's processing, so that one alone has no time of its own.
        for (key, value, least, most, fix) in [
            ("benchmark.prompt", benchmark.prompt, 1, MOST_TOKENS, "write 35"),
            ("benchmark.generate", benchmark.generate, 2, MOST_TOKENS, "write 1024"),
            ("benchmark.runs", benchmark.runs, 1, 1000, "write 3"),
            ("evaluate.prompt", evaluate.prompt, 0, MOST_TOKENS, "write 40"),
            ("evaluate.continuation", evaluate.continuation, 0, MOST_TOKENS, "write 48"),
        ] {
            let rule = format!("{least} to {most}");
            problems.check((least..=most).contains(&value), key, value, rule, fix);
        }
        problems.check(
            evaluate.text <= MOST_TEXT,
            "evaluate.text",
            evaluate.text,
            format!("it must be at most {MOST_TEXT}"),
            "write \"1MiB\"",
        );
        self.check_update(problems);
        let context = self.model.max_context_length as u64;
        for (key, prompt, more, least) in [
            ("benchmark.generate", benchmark.prompt, benchmark.generate, 2),
            ("evaluate.continuation", evaluate.prompt, evaluate.continuation, 0),
        ] {
            let (section, _) = key.split_once('.').expect("the keys above have a section");
            problems.check(
                prompt.saturating_add(more) <= context,
                key,
                more,
                format!(
                    "the {prompt} tokens of {section}.prompt and these must have room in model.max_context_length = {context}"
                ),
                match context.checked_sub(prompt).filter(|room| *room >= least) {
                    Some(room) => format!("set it to at most {room}, or lower {section}.prompt"),
                    None => format!("lower {section}.prompt to at most {}", context.saturating_sub(least)),
                },
            );
        }
    }

    /// Losses of an untrained model must have room in the sums of an update: `ln V` per token, and of the z-loss its square.
    fn check_update(&self, problems: &mut Problems) {
        let per_token = (self.model.vocab_size.max(3) as f64).ln().powi(2);
        let most = MOST_NATS / (per_token * self.model.max_context_length.max(1) as f64);
        let most = (most as u64).max(1);
        let micro = self.train.micro_batch.max(1);
        problems.check(
            self.train.sequences <= most,
            "train.sequences",
            self.train.sequences,
            format!(
                "the losses of an update are summed up to 2^31: of {most} sequences of {} tokens at most",
                self.model.max_context_length
            ),
            format!("set train.sequences to {}", (most / micro).max(1) * micro),
        );
    }
}

fn may_change(key: &str) -> bool {
    MAY_CHANGE.iter().any(|allowed| key.starts_with(allowed))
}
