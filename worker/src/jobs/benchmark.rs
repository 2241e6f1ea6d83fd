//! Measures the speed of the average.

use serde_json::json;
use ulmus_backend::Backend;
use ulmus_evaluator::{BenchConfig, bench};
use ulmus_run::results::Benchmark;

use super::averaged;
use crate::WorkerError;
use crate::run::Run;

pub(super) fn benchmark<B: Backend>(
    run: &Run,
    backend: &B,
    threads: usize,
) -> Result<Benchmark, WorkerError> {
    let config = &run.plan.benchmark;
    let config = BenchConfig {
        prompt: config.prompt as usize,
        generate: config.generate as usize,
        runs: config.runs as usize,
        batch: 1,
    };
    let result = bench(&averaged(run, backend)?, config, threads)?;
    Ok(Benchmark {
        prompt_tokens_per_second: result.median.prompt,
        generate_tokens_per_second: result.median.generation,
        details: json!(result),
    })
}
