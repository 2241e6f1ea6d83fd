//! Jobs: everything around training that one worker does alone.
//!
//! A job reads its input from the run folder and writes its output there atomically under fixed names, so that doing it
//! twice, on any worker, gives the same files. Results are also kept as `results/NAME.json`.

mod average;
pub(crate) mod base;
mod benchmark;
mod candidates;
mod evaluate;
pub(crate) mod evaluation;
pub(crate) mod examples;
mod export;
mod next_text;
pub(crate) mod prepare;
mod reward;
mod selection;
pub(crate) mod subject;
#[cfg(test)]
mod tests;

use serde::Serialize;
use ulmus_backend::{Backend, WeightFormat};
use ulmus_run::{paths, results};
use ulmus_types::{Job, StageKind};

pub use base::base_shape;
pub(crate) use subject::weights_of;

use crate::WorkerError;
use crate::run::Run;

/// Does a job. Returns its result as JSON, in the type of its stage in [`ulmus_run::results`]. `say` tells a person what
/// cannot wait for the end of the run.
pub(crate) fn work<B: Backend>(
    run: &Run,
    backend: &B,
    threads: usize,
    job: &Job,
    say: &dyn Fn(String),
) -> Result<String, WorkerError> {
    let checkpoints = job.checkpoints();
    let graph = run.plan.graph();
    let stage = graph.stage(job.stage()).ok_or_else(|| no_stage(job))?;
    match stage.kind {
        StageKind::Prepare => {
            let prepared = prepare::prepare(run, say)?;
            // People see the summary at once; the result is for programs.
            for line in prepared.prepared.iter().flat_map(|shards| shards.summary.lines()) {
                say(format!("prepare {line}"));
            }
            keep(run, job, &prepared)
        }
        StageKind::Examples => keep(run, job, &examples::make(run, job, say)?),
        StageKind::Reward => keep(run, job, &reward::learn(run, job, backend, say)?),
        StageKind::Candidates => keep(run, job, &candidates::sample(run, job, backend, say)?),
        StageKind::Selection => keep(run, job, &selection::select(run, job, say)?),
        StageKind::Average => keep(run, job, &average::average(run, checkpoints)?),
        StageKind::Perplexity => {
            let model = || subject::model(run, job, backend, WeightFormat::F32);
            keep(run, job, &evaluate::evaluate(run, say, model)?)
        }
        StageKind::Continuations => keep(run, job, &evaluate::continue_text(run, say, checkpoints, backend)?),
        StageKind::Export => keep(run, job, &export::export(run, job)?),
        // Groups train, and compute what training compares with.
        StageKind::Train | StageKind::Tune | StageKind::Reference => Err(no_stage(job)),
        StageKind::Evaluation => evaluation::evaluate(run, say, job, backend),
        StageKind::Benchmark => keep(run, job, &benchmark::benchmark(run, job, backend, threads)?),
    }
}

/// The job belongs to a stage that the plan does not have.
fn no_stage(job: &Job) -> WorkerError {
    WorkerError::Plan(format!(
        "the plan has no stage {}; start the coordinator and this worker again",
        job.stage()
    ))
}

/// Writes the result of a job.
fn keep(run: &Run, job: &Job, result: &impl Serialize) -> Result<String, WorkerError> {
    run.write(&paths::result(&job.name()), results::to_json(result))?;
    Ok(serde_json::to_string(result).expect("results have text keys"))
}
