//! A copy of the training state in host memory, held until its checkpoint is committed.
//!
//! The copy is hashed, encoded and stored in parallel with training. On a GPU it is also made in parallel with
//! training, except that the next update waits for it.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use ulmus_checkpoint::{CheckpointError, Manifest, Store, optimizer_shards, read_file};
use ulmus_model::{
    Layout, State, StateCopy, StatePart, Trainable, weights_from_safetensors, weights_to_safetensors,
};
use ulmus_run::{FormatError, TrainState, paths};
use ulmus_types::{CheckpointId, CheckpointKind, Digest, Snapshot};

use crate::WorkerError;

/// A copy of the state after a step.
#[derive(Debug)]
pub(crate) struct PendingSnapshot {
    pub(crate) checkpoint: CheckpointId,
    pub(crate) kind: CheckpointKind,
    pub(crate) layout: Arc<Layout>,
    /// Parameters that have moments.
    pub(crate) trainable: usize,
    pub(crate) tensors: StateCopy,
    pub(crate) train: TrainState,
    /// The store to which it will be written.
    pub(crate) store: Store,
    /// Limits how many copies are in memory at once.
    pub(crate) _slot: OwnedSemaphorePermit,
}

impl PendingSnapshot {
    /// What the coordinator is told about this state. Hashes the whole state.
    pub(crate) fn announce(&self) -> Snapshot {
        let mut hasher = blake3::Hasher::new();
        for part in StatePart::ALL {
            hasher.update(bytemuck::cast_slice(self.tensors.part(part)));
        }
        hasher.update(&self.train.to_json());
        Snapshot {
            checkpoint: self.checkpoint,
            kind: self.kind,
            state: Digest::from_bytes(*hasher.finalize().as_bytes()),
            files: ulmus_checkpoint::files_of(self.trainable),
        }
    }

    /// The content of one of the checkpoint's files; `None` if there is no such file.
    pub(crate) fn encode(&self, file: &str) -> Result<Option<Vec<u8>>, WorkerError> {
        let part = |part| self.tensors.part(part);
        Ok(match file {
            paths::WEIGHTS => Some(weights_to_safetensors(&self.layout, part(StatePart::Weights))?),
            paths::STATE => Some(self.train.to_json()),
            _ => optimizer_shards(self.trainable)
                .into_iter()
                .find(|shard| shard.file_name() == file)
                .map(|shard| shard.encode(part(StatePart::FirstMoment), part(StatePart::SecondMoment))),
        })
    }
}

/// Reads back a whole state, and verifies every file against the manifest.
pub(crate) async fn restore(
    store: &Store,
    manifest: &Manifest,
    layout: &Layout,
    trainable: &Trainable,
) -> Result<(State, TrainState), WorkerError> {
    let weights = read_file(store, manifest, paths::WEIGHTS).await?;
    let mut state = State {
        weights: weights_from_safetensors(layout, &weights)?,
        first_moment: vec![0.0; trainable.parameters()],
        second_moment: vec![0.0; trainable.parameters()],
    };
    for shard in optimizer_shards(trainable.parameters()) {
        let contents = read_file(store, manifest, &shard.file_name()).await?;
        shard.decode(&contents, &mut state.first_moment, &mut state.second_moment)?;
    }
    let train = TrainState::from_json(&read_file(store, manifest, paths::STATE).await?)
        .map_err(|FormatError { file, reason }| CheckpointError::Form { file, reason })?;
    Ok((state, train))
}

/// Reads the weights of a checkpoint.
pub(crate) async fn weights(
    store: &Store,
    checkpoint: CheckpointId,
    layout: &Layout,
) -> Result<Vec<f32>, WorkerError> {
    let manifest = ulmus_checkpoint::read_manifest(store, checkpoint).await?;
    let contents = read_file(store, &manifest, paths::WEIGHTS).await?;
    weights_from_safetensors(layout, &contents).map_err(|error| {
        let form = CheckpointError::Form { file: paths::WEIGHTS.to_owned(), reason: error.to_string() };
        WorkerError::Checkpoint(form)
    })
}
