//! Measures the speed of a model.

use serde_json::json;
use ulmus_backend::{Backend, WeightFormat};
use ulmus_evaluator::{BenchConfig, bench};
use ulmus_plan::WeightType;
use ulmus_run::results::Benchmark;
use ulmus_types::{Job, Subject};

use super::subject;
use crate::WorkerError;
use crate::run::Run;

pub(super) fn benchmark<B: Backend>(
    run: &Run,
    job: &Job,
    backend: &B,
    threads: usize,
) -> Result<Benchmark, WorkerError> {
    let (prompt, generate, runs, dtype) = if let Subject::Stage(_) = job.subject() {
        let config = &run.plan.benchmark;
        (config.prompt, config.generate, config.runs, WeightType::F32)
    } else {
        let config = run.plan.bench.iter().find(|config| config.name == job.stage().as_str());
        let config = config.ok_or_else(|| super::no_stage(job))?;
        (config.prompt, config.generate, config.runs, config.dtype)
    };
    let format = match dtype {
        WeightType::F32 => WeightFormat::F32,
        WeightType::F16 => WeightFormat::F16,
        WeightType::Bf16 => WeightFormat::Bf16,
        WeightType::Q8_0 => WeightFormat::Q8_0,
    };
    let config =
        BenchConfig { prompt: prompt as usize, generate: generate as usize, runs: runs as usize, batch: 1 };
    let result = bench(&subject::model(run, job, backend, format)?, config, threads)?;
    Ok(Benchmark {
        prompt_tokens_per_second: result.median.prompt,
        generate_tokens_per_second: result.median.generation,
        details: json!(result),
    })
}
