//! A whole plan and the relations between its parts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ulmus_types::{Digest, Graph, HEARTBEAT_INTERVAL, Of, Problems, RunName, StageName};

use crate::base::BaseConfig;
use crate::bytes::Bytes;
use crate::data::{DataConfig, SourceConfig, secret};
use crate::device::Device;
use crate::model::ModelConfig;
use crate::prepare::{PrepareConfig, TokenizerConfig};
use crate::rules::{range, range_or, sound};
use crate::stages::{self, BenchConfig, EvaluationConfig, ExportConfig};
use crate::train::{CheckpointConfig, TrainConfig};
use crate::tune::{self, TuneConfig};

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
            "a plan is stored, shown and sent to workers, so an address in it must carry no secret",
            "leave out the part before @ and the part after ?, and put credentials in the environment or in the files of the store's own tools",
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
            "runs cannot be kept in a store of this kind",
            "use a path, file://, s3://, gs:// or az://",
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
    /// Compute threads of each local worker.
    pub threads: u64,
    /// What local workers compute on: `auto`, `cpu`, `cuda` or `cuda:N`. With several GPUs, the n-th worker gets the n-th GPU.
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
    /// A worker is declared dead after this long without a heartbeat. Workers send one every second, and at least three must fit in.
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

/// A whole plan: everything that defines a run. Only [`crate::read`] makes one, so it satisfies every rule.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Plan {
    /// Name and seed of the run.
    pub run: RunConfig,
    /// Where the run folder is kept.
    pub store: StoreConfig,
    /// Workers on the coordinator's own machine.
    pub local: LocalConfig,
    /// When training starts, and when a worker counts as dead.
    pub cluster: ClusterConfig,
    /// A model to begin from, in place of the seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseConfig>,
    /// Shape of the model; by default that of the base, if there is one.
    pub model: ModelConfig,
    /// The tokenizer: a file, or one that is trained.
    pub tokenizer: TokenizerConfig,
    /// Text on this machine to make shards of. Without this section the sources must exist already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepare: Option<PrepareConfig>,
    /// The corpora, and how they become sequences.
    pub data: DataConfig,
    /// The recipe: optimizer, schedule and batch.
    pub train: TrainConfig,
    /// When checkpoints are written, and how many are averaged.
    pub checkpoint: CheckpointConfig,
    /// Evaluation of the finished models.
    pub evaluate: EvaluateConfig,
    /// Throughput benchmark.
    pub benchmark: BenchmarkConfig,
    /// Fine-tuning, one stage after the other.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tune: Vec<TuneConfig>,
    /// Evaluations on tasks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub evaluation: Vec<EvaluationConfig>,
    /// Further exports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub export: Vec<ExportConfig>,
    /// Further benchmarks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bench: Vec<BenchConfig>,
}

/// The largest amount of text that models are measured on.
const MAX_TEXT: Bytes = Bytes::mib(1 << 20);

/// Keys that may change between two starts of the same run, because no trained bit depends on them.
pub const MAY_CHANGE: [&str; 15] = [
    "local.",
    "cluster.",
    "store.",
    "checkpoint.recovery",
    "checkpoint.max_age",
    "evaluate.",
    "benchmark.",
    "evaluation",
    "export",
    "bench",
    "data.threads",
    "data.cache",
    "data.request_timeout",
    "data.on_bad_unit",
    "data.max_bad_units",
];

/// Keys that were added after the first version, with the values that plans without them imply. With those values they do not
/// count, so a run can continue from its checkpoints after an update.
const ADDED: [(&str, &str); 4] = [
    ("checkpoint.export", "true"),
    ("model.norm", "\"rms\""),
    ("data.piece_words", "2048"),
    ("train.algorithms", "\"library\""),
];

/// Keys of stages after pretraining. Its bits do not depend on them; each of these stages has a digest of its own.
const LATER: &str = "tune";

/// Names the rule by which a plan's digest is made; a new rule gets a new line.
const DIGEST_FORM: &str = "ulmus plan, form 2\n";

/// Keeps the keys on which trained bits depend, with their values.
fn kept(mut flat: BTreeMap<String, String>) -> BTreeMap<String, String> {
    flat.retain(|key, value| !may_change(key) && !key.starts_with(LATER) && !ADDED.contains(&(key, value)));
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

    /// Hash of everything on which trained bits depend: of [`DIGEST_FORM`], and a line `key = value` for each of those keys,
    /// sorted by key, with the value as compact JSON.
    pub fn digest(&self) -> Digest {
        let mut flat = BTreeMap::new();
        let value = serde_json::to_value(self).expect("a plan has text keys");
        flatten_json(String::new(), value, &mut flat);
        let lines = kept(flat).into_iter().map(|(key, value)| format!("{key} = {value}\n"));
        Digest::of([DIGEST_FORM.to_owned()].into_iter().chain(lines).collect::<String>().as_bytes())
    }

    /// Hash of everything on which the bits of a training stage depend: for pretraining [`Self::digest`], and for a tuning stage
    /// that, its own keys, and those of the stages that it goes on from.
    pub fn digest_of(&self, training: StageName) -> Digest {
        let Some(tuning) = self.tuning(training) else { return self.digest() };
        let before = match &tuning.of {
            Of::Tuned(name) if self.tuned_by(&Of::Tuned(training)).is_some() => self.digest_of(*name),
            _ => self.digest(),
        };
        let own = serde_json::to_string(tuning).expect("a stage has text keys");
        Digest::of(format!("ulmus tuning, form 1\n{before}\n{own}\n").as_bytes())
    }

    /// Whether a hash is that of a training stage of this plan.
    pub fn has_digest_of(&self, training: StageName, digest: Digest) -> bool {
        match self.tuning(training) {
            Some(_) => digest == self.digest_of(training),
            None => self.has_digest(digest),
        }
    }

    /// The shape of a model of the run. It is that of the plan, but the head has weights of its own behind a stage that has
    /// adapted the embedding.
    pub fn shape_of(&self, model: &Of) -> ModelConfig {
        let Some(tuning) = self.tuned_by(model) else { return self.model.clone() };
        let shape = self.shape_of(&tuning.of);
        let unties = tuning.adapter.as_ref().and_then(|adapter| adapter.modules(&shape).ok());
        let unties = unties.is_some_and(|modules| modules.iter().any(|module| module.is_embedding));
        ModelConfig { share_input_output_layers: shape.share_input_output_layers && !unties, ..shape }
    }

    /// The stage that has made a model of the run, if it is one of those before the stage that asks.
    fn tuned_by(&self, model: &Of) -> Option<&TuneConfig> {
        let Of::Tuned(name) = model else { return None };
        let (index, tuning) =
            self.tune.iter().enumerate().find(|(_, tuning)| tuning.name == name.as_str())?;
        // A plan in which stages go on from each other in a circle does not run.
        let is_earlier = |of: &Of| match of {
            Of::Tuned(before) => self.tune[..index].iter().any(|other| other.name == before.as_str()),
            _ => true,
        };
        is_earlier(&tuning.of).then_some(tuning)
    }

    /// The tuning stage of this name.
    pub fn tuning(&self, name: StageName) -> Option<&TuneConfig> {
        self.tune.iter().find(|tuning| tuning.name == name.as_str())
    }

    /// Whether the run trains on text. One that begins from a base does so only if it has text.
    pub fn pretrains(&self) -> bool {
        self.base.is_none() || self.prepare.is_some() || !self.data.source.is_empty()
    }

    /// Whether a hash is this plan's, by the rule of [`Self::digest`] or by that of the first programs.
    pub fn has_digest(&self, digest: Digest) -> bool {
        // The first rule depends on how the standard library and the crate `toml` print.
        let first = || Digest::of(format!("{:?}", kept(self.flat())).as_bytes());
        digest == self.digest() || digest == first()
    }

    /// The keys that differ from `earlier`, each with the earlier and the present value, if trained bits depend
    /// on them.
    pub fn changed_keys(&self, earlier: &Self) -> Vec<(String, String, String)> {
        differences(&earlier.flat(), &self.flat(), |key| !may_change(key) && !key.starts_with(LATER))
    }

    /// The tuning stages of which trained bits differ from those of `earlier`, or that only `earlier` has.
    pub fn changed_tunings(&self, earlier: &Self) -> Vec<StageName> {
        let names = earlier.tune.iter().filter_map(|tuning| tuning.name.parse().ok());
        let is_same = |name: &StageName| {
            self.tuning(*name).is_some() && self.digest_of(*name) == earlier.digest_of(*name)
        };
        names.filter(|name| !is_same(name)).collect()
    }

    /// What has changed of a tuning stage since `earlier`: its keys, each with the earlier and the present value.
    pub fn changed_keys_of(&self, earlier: &Self, name: StageName) -> Vec<(String, String, String)> {
        let of = |plan: &Self| plan.tuning(name).map(flat).unwrap_or_default();
        differences(&of(earlier), &of(self), |_| true)
    }

    fn flat(&self) -> BTreeMap<String, String> {
        flat(self)
    }

    /// Fills in values that follow from other keys.
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
            // The file decides how many pieces there are, and `model.vocab_size` follows from them already.
            self.tokenizer.pieces = TokenizerConfig::default().pieces;
        }
        self.cluster.min_workers = self.cluster.min_workers.max(1);
        for index in 0..self.tune.len() {
            let (before, rest) = self.tune.split_at_mut(index);
            rest[0].complete(before);
        }
    }

    /// Reports every rule that the plan breaks.
    pub(crate) fn check(&self, problems: &mut Problems) {
        self.model.check("model", problems);
        if let Some(prepare) = &self.prepare {
            prepare.check(problems);
        }
        if let Some(base) = &self.base {
            base.check(problems);
        }
        // A base model brings its tokenizer along.
        if self.base.is_none() || self.tokenizer.file.is_some() {
            self.tokenizer.check(self.prepare.is_some(), self.model.vocab_size as u64, problems);
        }
        if self.pretrains() {
            self.train.check(&self.model, problems);
            self.data.check(&self.train, problems);
            self.checkpoint.check(&self.train, problems);
        }
        self.store.check(problems);
        self.check_processes(problems);
        self.check_evaluation(problems);
        self.check_stages(problems);
        problems.check(
            !self.pretrains() || !self.data.source.is_empty() || !sound(problems, &["prepare"]),
            "data.source",
            "missing",
            "a run needs text",
            "add [[data.source]] with name, url, files and text, or a [prepare] section",
        );
        problems.check(
            self.pretrains() || !self.tune.is_empty() || !sound(problems, &["tune"]),
            "tune",
            "missing",
            "a run that begins from a base and has no text has nothing to train",
            "add [[tune]] with name, of, method and [[tune.data]], or [[data.source]] to pretrain further",
        );
    }

    /// How many processes there are, and when they count as lost.
    fn check_processes(&self, problems: &mut Problems) {
        let Self { local, cluster, train, .. } = self;
        range(problems, "local.workers", local.workers, 0..=256);
        range(problems, "local.threads", local.threads, 1..=1024);
        let (least, most) = (3 * HEARTBEAT_INTERVAL, Duration::from_hours(1));
        range(problems, "cluster.dead_after", cluster.dead_after, least..=most);
        range(problems, "cluster.rejoin_window", cluster.rejoin_window, ..=Duration::from_hours(24));
        if sound(problems, &["train.sequences", "train.micro_batch"]) {
            let most = train.micro_batches();
            problems.check(
                cluster.min_workers <= most,
                "cluster.min_workers",
                cluster.min_workers,
                format!(
                    "each worker needs a micro-batch, and train.sequences = {} are {most} of {}",
                    train.sequences, train.micro_batch
                ),
                format!("set it to {most}, or lower train.micro_batch"),
            );
        }
    }

    /// The stages of a run with this plan.
    pub fn graph(&self) -> Graph {
        let added = stages::stages(&self.evaluation, &self.export, &self.bench);
        let tunings = tune::tunings(&self.tune);
        if self.pretrains() {
            Graph::new(self.checkpoint.average, self.checkpoint.export, self.base.is_some(), &tunings, added)
        } else {
            Graph::of_base(&tunings, added)
        }
    }

    /// What the run calls the models that it has before it tunes any.
    fn models(&self) -> impl Iterator<Item = &'static str> {
        let base = self.base.is_some().then_some("base");
        let of_text = self.pretrains().then_some(["average", "last", "milestones"]);
        base.into_iter().chain(of_text.into_iter().flatten())
    }

    /// The stages that the plan adds.
    fn check_stages(&self, problems: &mut Problems) {
        let models: Vec<&str> = self.models().collect();
        tune::check(&self.tune, &self.model, &models, problems);
        let tuned = self.tune.iter().map(|tuning| &tuning.name[..]);
        let models: Vec<&str> = models.into_iter().chain(tuned).collect();
        stages::check(&self.evaluation, &self.export, &self.bench, &models, problems);
        for (index, config) in self.bench.iter().enumerate() {
            let [prompt, generate] = ["prompt", "generate"].map(|key| format!("bench.{index}.{key}"));
            if config.of.iter().all(|of| matches!(of, Of::Model(_))) {
                // The context of another model is known when it is read.
                range(problems, prompt, config.prompt, 1..);
                range(problems, generate, config.generate, 2..);
            } else {
                self.check_room(problems, [&prompt, &generate], [config.prompt, config.generate], [1, 2]);
            }
        }
    }

    /// What happens to the finished models.
    fn check_evaluation(&self, problems: &mut Problems) {
        // Only what a run pretrains is evaluated without being asked.
        if !self.pretrains() {
            return;
        }
        let Self { benchmark, evaluate, .. } = self;
        if sound(problems, &["data.holdout", "train.held_out_every"]) {
            problems.check(
                self.train.held_out_every == 0 || self.data.holdout > 0.0,
                "data.holdout",
                self.data.holdout,
                "the held-out loss needs held-out documents",
                "set it to 0.0005, or train.held_out_every to 0 for a run that is not evaluated",
            );
        }
        range(problems, "benchmark.runs", benchmark.runs, 1..=1000);
        range(problems, "evaluate.text", evaluate.text, ..=MAX_TEXT);
        // The first new token is part of the prompt's processing, so that one alone has no time of its own.
        for (keys, tokens, least) in [
            (["benchmark.prompt", "benchmark.generate"], [benchmark.prompt, benchmark.generate], [1, 2]),
            (["evaluate.prompt", "evaluate.continuation"], [evaluate.prompt, evaluate.continuation], [0, 0]),
        ] {
            self.check_room(problems, keys, tokens, least);
        }
    }

    /// A prompt and the tokens that follow it must fit in the model's context, and each has a least number of tokens.
    fn check_room(
        &self,
        problems: &mut Problems,
        [prompt_key, more_key]: [&str; 2],
        [prompt, more]: [u64; 2],
        [least_prompt, least_more]: [u64; 2],
    ) {
        range(problems, more_key, more, least_more..);
        if !sound(problems, &["model.max_context_length"]) {
            return;
        }
        let context = self.model.max_context_length as u64;
        let longest = context.saturating_sub(least_more).max(least_prompt);
        let room = context.saturating_sub(more.max(least_more)).clamp(least_prompt, longest);
        let advice = format!("set it to {}", prompt.clamp(least_prompt, room));
        range_or(problems, prompt_key, prompt, least_prompt..=longest, advice);
        if sound(problems, &[prompt_key, more_key]) {
            problems.check(
                prompt + more <= context,
                more_key,
                more,
                format!(
                    "these and the {prompt} tokens of {prompt_key} must have room in model.max_context_length = {context}"
                ),
                format!("set it to at most {}, or lower {prompt_key}", context.saturating_sub(prompt)),
            );
        }
    }
}

fn may_change(key: &str) -> bool {
    MAY_CHANGE.iter().any(|allowed| key.starts_with(allowed))
}

/// The keys of a part of a plan, with their values.
fn flat(part: &impl Serialize) -> BTreeMap<String, String> {
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
    let value = toml::Value::try_from(part).expect("a plan has no value that TOML lacks");
    walk(String::new(), &value, &mut flat);
    flat
}

/// The keys whose values differ, each with the earlier and the present value, as far as they `count`.
fn differences(
    old: &BTreeMap<String, String>,
    new: &BTreeMap<String, String>,
    counts: impl Fn(&str) -> bool,
) -> Vec<(String, String, String)> {
    let value = |side: &BTreeMap<String, String>, key: &str| {
        side.get(key).map_or_else(|| "not set".to_owned(), String::clone)
    };
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    keys.into_iter()
        .filter(|key| old.get(*key) != new.get(*key) && counts(key))
        .map(|key| (key.clone(), value(old, key), value(new, key)))
        .collect()
}
