//! Jobs: everything around training that one worker does alone.
//!
//! A job reads its input from the run folder and writes its output there atomically under fixed names, so that doing it
//! twice, on any worker, gives the same files. Results are also kept as `results/NAME.json`.

mod average;
mod benchmark;
mod evaluate;
mod export;
mod prepare;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::Serialize;
use ulmus_backend::Backend;
use ulmus_model::{Layout, Model, weights_from_safetensors};
use ulmus_run::{paths, results};
use ulmus_types::{CheckpointId, Job, JobKind};

use crate::WorkerError;
use crate::run::Run;
use crate::snapshot::weights;

/// Does a job. Returns its result as JSON, in the job's type in [`ulmus_run::results`]. `say` tells a person what
/// cannot wait for the end of the run.
pub(crate) fn work<B: Backend>(
    run: &Run,
    backend: &B,
    threads: usize,
    job: &Job,
    say: &dyn Fn(String),
) -> Result<String, WorkerError> {
    let checkpoints = job.checkpoints();
    match job.kind() {
        JobKind::Prepare => {
            let prepared = prepare::prepare(run, say)?;
            // People see the summary at once; the result is for programs.
            for line in prepared.prepared.iter().flat_map(|shards| shards.summary.lines()) {
                say(format!("prepare {line}"));
            }
            keep(run, job, &prepared)
        }
        JobKind::Average => keep(run, job, &average::average(run, checkpoints)?),
        JobKind::EvaluateAverage => keep(run, job, &evaluate::evaluate(run, say, || averaged(run, backend))?),
        JobKind::EvaluateLast => {
            keep(run, job, &evaluate::evaluate(run, say, || trained(run, checkpoints[0], backend))?)
        }
        JobKind::Continuations => keep(run, job, &evaluate::continue_text(run, say, checkpoints, backend)?),
        JobKind::Export => keep(run, job, &export::export(run)?),
        JobKind::Benchmark => keep(run, job, &benchmark::benchmark(run, backend, threads)?),
    }
}

/// Writes the result of a job.
fn keep(run: &Run, job: &Job, result: &impl Serialize) -> Result<String, WorkerError> {
    run.write(&paths::result(job.kind()), results::to_json(result))?;
    Ok(serde_json::to_string(result).expect("results have text keys"))
}

fn averaged<B: Backend>(run: &Run, backend: &B) -> Result<Arc<Model<B>>, WorkerError> {
    model(
        run,
        &weights_from_safetensors(&Layout::new(&run.plan.model), &average::average_file(run)?)?,
        backend,
    )
}

fn trained<B: Backend>(
    run: &Run,
    checkpoint: CheckpointId,
    backend: &B,
) -> Result<Arc<Model<B>>, WorkerError> {
    let layout = Layout::new(&run.plan.model);
    model(run, &run.wait(weights(&run.store, checkpoint, &layout))?, backend)
}

fn model<B: Backend>(run: &Run, weights: &[f32], backend: &B) -> Result<Arc<Model<B>>, WorkerError> {
    Ok(Arc::new(Model::new(backend.clone(), &run.plan.model, weights)?))
}
