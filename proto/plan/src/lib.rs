//! The plan: one TOML file that says what a run is, shared by coordinator and workers.
//!
//! It is a crate of its own, free of any I/O and of every compute or data crate, because both sides must read
//! the same plan in the same way, and because a coordinator must build without any of what workers need.

#![forbid(unsafe_code)]

mod adapter;
mod base;
mod bytes;
mod data;
mod device;
mod keys;
mod memory;
mod mistakes;
mod model;
mod norm;
mod parse;
mod plan;
mod prepare;
mod rso;
mod rules;
mod stages;
mod train;
mod tune;

pub use adapter::{ALL_LINEAR, AdaptedModule, AdapterConfig, AdapterKind, AdapterMistake};
pub use base::BaseConfig;
pub use bytes::Bytes;
pub use data::{DataConfig, Format, LEAST_UNIT, Normalize, OnBadUnit, Pack, SourceConfig};
pub use device::Device;
pub use memory::{HEAD_ROWS, MemoryPlan, ROW_BLOCK, data_memory, tuning_memory, worker_memory};
pub use model::{LayerDims, ModelConfig, Multipliers, Preset};
pub use norm::NormKind;
pub use parse::{base_to_read, even_weights, read, shape_overrides, tokenizer_to_count};
pub use plan::{
    BenchmarkConfig, ClusterConfig, EvaluateConfig, LocalConfig, MAY_CHANGE, Plan, RunConfig, StoreConfig,
};
pub use prepare::{PrepareConfig, TokenizerConfig};
pub use rso::{Pairing, RsoConfig};
pub use stages::{BenchConfig, EvaluationConfig, ExportConfig, NEXT_TEXT, WeightType};
pub use train::{Algorithms, CheckpointConfig, Precision, TrainConfig};
pub use tune::{
    ExamplesConfig, Method, OnUseless, PreferenceLoss, Schedule, Tokenization, Truncation, TuneConfig,
};
