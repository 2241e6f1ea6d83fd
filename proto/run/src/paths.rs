//! Names of the files of a run folder, relative to it.

use ulmus_types::{CheckpointId, Digest, JobKind};

/// Every key of the plan, with its value.
pub const PLAN: &str = "plan.resolved.toml";
/// Text that the run has prepared, as parquet.
pub const SHARDS: &str = "shards";
/// The frozen list of everything that is read.
pub const DATA_MANIFEST: &str = "data/manifest.json";
/// The tokenizer as SentencePiece reads it.
pub const TOKENIZER_MODEL: &str = "tokenizer.model";
/// The same tokenizer as transformers reads it.
pub const TOKENIZER_JSON: &str = "tokenizer.json";
/// Units that are left out; see [`crate::quarantine`].
pub const QUARANTINE: &str = "quarantine.json";

/// Folder of the checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// The name of the newest checkpoint.
pub const LATEST: &str = "latest";
/// In the folder of a checkpoint, and beside the average: the weights, with Hugging Face names.
pub const WEIGHTS: &str = "model.safetensors";
/// In the folder of a checkpoint: its [`TrainState`](crate::TrainState).
pub const STATE: &str = "state.json";
/// In the folder of a checkpoint: what it consists of.
pub const MANIFEST: &str = "manifest.json";

/// The mean of the last milestones.
pub const AVERAGE: &str = "average/model.safetensors";
/// What it is the mean of, and its hash: an [`Average`](crate::results::Average).
pub const AVERAGE_MANIFEST: &str = "average/manifest.json";
/// Folder of the exported model.
pub const EXPORT: &str = "export";
/// Folder of the jobs' results.
pub const RESULTS: &str = "results";

/// One row per step. This and the following are on the coordinator's own disk, if the run is in an object store.
pub const METRICS: &str = "metrics.csv";
/// One row per source and worker, at each of its checkpoints.
pub const SOURCES: &str = "sources.csv";
/// The coordinator's database.
pub const DATABASE: &str = "run.sqlite";
/// Folder of the logs.
pub const LOGS: &str = "logs";
/// Locked by the coordinator that leads the run.
pub const LOCK: &str = "lock";
/// Where that coordinator listens.
pub const ADDRESS: &str = "coordinator.address";
/// In the store as well: shows that it and the coordinator's own folder belong together.
pub const MARK: &str = "coordinator.mark";
/// In the store: what a worker proves with that it sees the same store.
pub const NONCE: &str = "coordinator.nonce";

/// The folder of a checkpoint.
pub fn checkpoint(id: CheckpointId) -> String {
    format!("{CHECKPOINTS}/{id}")
}

/// A file of a checkpoint.
pub fn checkpoint_file(id: CheckpointId, file: &str) -> String {
    format!("{CHECKPOINTS}/{id}/{file}")
}

/// A file of the exported model.
pub fn export_file(file: &str) -> String {
    format!("{EXPORT}/{file}")
}

/// The result of a job.
pub fn result(kind: JobKind) -> String {
    format!("{RESULTS}/{}.json", kind.name())
}

/// The algorithms that a device has chosen, which describes itself so.
pub fn algorithms(device: &str) -> String {
    format!("algorithms-{}.json", &Digest::of(device.as_bytes()).to_string()[..12])
}

/// The log of the coordinator or of a local worker.
pub fn log(name: &str) -> String {
    format!("{LOGS}/{name}.log")
}
