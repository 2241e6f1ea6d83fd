//! Paths of files in a run folder, relative to it. The join token and the coordinator's key are named where they are made, in
//! `ulmus-transport`.

use ulmus_types::{CheckpointId, Digest, JobName, StageName};

/// The plan with the value of every key.
pub const PLAN: &str = "plan.resolved.toml";
/// Folder of the text that the run has prepared, as parquet.
pub const SHARDS: &str = "shards";
/// The frozen list of all data that the run reads.
pub const DATA_MANIFEST: &str = "data/manifest.json";
/// The tokenizer in SentencePiece's format.
pub const TOKENIZER_MODEL: &str = "tokenizer.model";
/// The tokenizer in Hugging Face's format.
pub const TOKENIZER_JSON: &str = "tokenizer.json";
/// Units that every worker skips; see [`crate::quarantine`].
pub const QUARANTINE: &str = "quarantine.json";

/// Folder of the checkpoints of pretraining, or below that of a tuning stage, of that stage.
pub const CHECKPOINTS: &str = "checkpoints";
/// The name of the newest checkpoint, beside [`CHECKPOINTS`].
pub const LATEST: &str = "latest";
/// Folder of the tuning stages.
pub const TUNE: &str = "tune";
/// Weights with Hugging Face names, in the folder of a checkpoint or of the average.
pub const WEIGHTS: &str = "model.safetensors";
/// The [`TrainState`](crate::TrainState) of a checkpoint, in its folder.
pub const STATE: &str = "state.json";
/// The list of a checkpoint's files and their hashes, in its folder.
pub const MANIFEST: &str = "manifest.json";

/// Folder of the average.
pub const AVERAGE_FOLDER: &str = "average";
/// The mean of the last milestones.
pub const AVERAGE: &str = "average/model.safetensors";
/// The checkpoints that were averaged, and the hash of the average: an [`Average`](crate::results::Average).
pub const AVERAGE_MANIFEST: &str = "average/manifest.json";
/// Folder of the exported model.
pub const EXPORT: &str = "export";
/// The model card in the folder of a model.
pub const CARD: &str = "README.md";
/// Folder of the models that stages of the plan export.
pub const EXPORTS: &str = "exports";
/// Folder of the results of jobs.
pub const RESULTS: &str = "results";

/// Metrics, one row per step. If the run is in an object store, this file and those below are on the coordinator's
/// disk; when the run ends, the store gets a copy of this one and the next.
pub const METRICS: &str = "metrics.csv";
/// Reading statistics, one row per source and worker at each checkpoint.
pub const SOURCES: &str = "sources.csv";
/// The coordinator's database.
pub const DATABASE: &str = "run.sqlite";
/// Folder of the logs.
pub const LOGS: &str = "logs";
/// File that is locked by the coordinator that leads the run.
pub const LOCK: &str = "lock";
/// Address at which the coordinator listens.
pub const ADDRESS: &str = "coordinator.address";
/// A mark both in the store and in the coordinator's folder, which shows that the two belong together.
pub const MARK: &str = "coordinator.mark";
/// The nonce in the store, with which a worker proves that it can read the store.
pub const NONCE: &str = "coordinator.nonce";

/// What a tuning stage has learned from, and how it ended; in its folder.
pub const TUNED_RESULTS: &str = "results.json";

/// Examples of a tuning stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExampleSet {
    /// Those of its data: what it trains on, or prompts of which answers are sampled.
    Data,
    /// Those that it is evaluated on.
    Eval,
    /// Those from which its reward head learns.
    Reward,
    /// Pairs of sampled answers, which it trains on.
    Pairs,
}

/// A file or folder of a training stage: in the run folder for pretraining, and in one of its own for a tuning stage.
pub fn of_training(training: StageName, name: &str) -> String {
    if training == StageName::pretraining() { name.to_owned() } else { format!("{TUNE}/{training}/{name}") }
}

/// Folder of the checkpoints of a training stage.
pub fn checkpoints(training: StageName) -> String {
    of_training(training, CHECKPOINTS)
}

/// The folder of a checkpoint.
pub fn checkpoint(id: CheckpointId) -> String {
    format!("{}/{}", checkpoints(id.training()), id.directory())
}

/// A file of a checkpoint.
pub fn checkpoint_file(id: CheckpointId, file: &str) -> String {
    format!("{}/{file}", checkpoint(id))
}

/// A file of the exported model.
pub fn export_file(file: &str) -> String {
    format!("{EXPORT}/{file}")
}

/// The tokens of some rows of a tuning stage.
pub fn examples(tuning: StageName, what: ExampleSet) -> String {
    let name = match what {
        ExampleSet::Data => "examples",
        ExampleSet::Eval => "eval_examples",
        ExampleSet::Reward => "reward_examples",
        ExampleSet::Pairs => "pairs",
    };
    format!("{TUNE}/{tuning}/{name}.jsonl.zst")
}

/// The answers that were sampled for a tuning stage: a JSON line for each prompt.
pub fn candidates(tuning: StageName) -> String {
    format!("{TUNE}/{tuning}/candidates.jsonl")
}

/// Folder of sampled answers, some prompts in each file, made from what has this key.
pub fn sampled(tuning: StageName, key: Digest) -> String {
    format!("{TUNE}/{tuning}/candidates-{}", &key.to_string()[..16])
}

/// The reward head of a tuning stage.
pub fn reward_head(tuning: StageName) -> String {
    format!("{TUNE}/{tuning}/reward_head.safetensors")
}

/// A few examples of a tuning stage, for people.
pub fn shown_examples(tuning: StageName) -> String {
    format!("{TUNE}/{tuning}/examples.txt")
}

/// Folder of the log-probabilities that a tuning stage compares with, computed from what has this key.
pub fn references(tuning: StageName, key: Digest) -> String {
    format!("{TUNE}/{tuning}/reference-{}", &key.to_string()[..16])
}

/// The model that a tuning stage has made, in Hugging Face layout.
pub fn tuned(tuning: StageName) -> String {
    format!("{TUNE}/{tuning}/{EXPORT}")
}

/// A model that a stage of the plan exports.
pub fn exported(job: &JobName) -> String {
    format!("{EXPORTS}/{job}")
}

/// The adapter that a tuning stage has made, in PEFT's layout.
pub fn adapter(tuning: StageName) -> String {
    format!("{TUNE}/{tuning}/adapter")
}

/// The result of a job.
pub fn result(job: &JobName) -> String {
    format!("{RESULTS}/{job}.json")
}

/// What a part of an evaluation has answered: the journal of an evaluation.
pub fn answers(part: &JobName) -> String {
    format!("{RESULTS}/{part}.jsonl")
}

/// What a stage has found of the milestones, as a figure in a format.
pub fn figure(stage: &StageName, format: &str) -> String {
    format!("{RESULTS}/{stage}/milestones.{format}")
}

/// The algorithms that were chosen on a device with this description.
pub fn algorithms(device: &str) -> String {
    format!("algorithms-{}.json", &Digest::of(device.as_bytes()).to_string()[..12])
}

/// The process of a local worker.
pub fn pid(name: &str) -> String {
    format!("{LOGS}/{name}.pid")
}

/// The log of the coordinator or of a local worker.
pub fn log(name: &str) -> String {
    format!("{LOGS}/{name}.log")
}
