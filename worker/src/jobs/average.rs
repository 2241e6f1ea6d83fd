//! Makes the average of the last milestones, and reads it back.

use ulmus_checkpoint::StoreError;
use ulmus_model::{Layout, weights_to_safetensors};
use ulmus_run::paths;
use ulmus_run::results::{self, Average};
use ulmus_types::{CheckpointId, Digest, FileEntry};

use crate::WorkerError;
use crate::run::Run;
use crate::snapshot::weights;

/// The mean of the checkpoints' weights, summed in f64 in the order of their steps and rounded once.
pub(super) fn average(run: &Run, checkpoints: &[CheckpointId]) -> Result<Average, WorkerError> {
    let layout = Layout::new(&run.plan.model);
    let mut sum = vec![0_f64; layout.parameters()];
    for checkpoint in checkpoints {
        let weights = run.wait(weights(&run.store, *checkpoint, &layout))?;
        for (sum, weight) in sum.iter_mut().zip(&weights) {
            *sum += f64::from(*weight);
        }
    }
    let count = checkpoints.len() as f64;
    let mean: Vec<f32> = sum.into_iter().map(|sum| (sum / count) as f32).collect();
    let file = weights_to_safetensors(&layout, &mean)?;
    let entry = FileEntry::of(&file);
    run.write(paths::AVERAGE, file)?;
    let result = Average {
        checkpoints: checkpoints.to_vec(),
        files: [(paths::WEIGHTS.to_owned(), entry)].into(),
        weights: Digest::of(bytemuck::cast_slice(&mean)),
    };
    run.write(paths::AVERAGE_MANIFEST, results::to_json(&result))?;
    Ok(result)
}

/// The file of the average, verified against its manifest.
pub(super) fn average_file(run: &Run) -> Result<Vec<u8>, WorkerError> {
    let damaged = |file: &str, reason: String| WorkerError::Damaged {
        file: file.to_owned(),
        reason,
        act: "put back a copy of it (export/model.safetensors, if it exists, is the same average), or start a run with \
              another name",
    };
    let read = |path: &str| match run.read(path) {
        Err(StoreError::NotFound { .. }) => Err(damaged(path, "it does not exist".to_owned())),
        read => Ok(read?),
    };
    let manifest: Average = serde_json::from_slice(&read(paths::AVERAGE_MANIFEST)?)
        .map_err(|error| damaged(paths::AVERAGE_MANIFEST, error.to_string()))?;
    let expected = manifest
        .files
        .get(paths::WEIGHTS)
        .ok_or_else(|| damaged(paths::AVERAGE_MANIFEST, format!("it does not list {}", paths::WEIGHTS)))?;
    let file = read(paths::AVERAGE)?;
    let found = FileEntry::of(&file);
    if found != *expected {
        let (has, had) = (found, expected);
        let reason = format!(
            "it has {} bytes and hash {}, but was written with {} bytes and hash {}",
            has.bytes,
            has.digest.short(),
            had.bytes,
            had.digest.short()
        );
        return Err(damaged(paths::AVERAGE, reason));
    }
    Ok(file)
}
