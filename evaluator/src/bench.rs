//! Measures how fast a model processes prompts and generates tokens.
//!
//! This is the protocol of the OpenELM paper: one sequence at a time (or several side by side, if asked for), with a KV
//! cache. Prompt processing and generation are timed separately, after a full warm-up run with the same lengths. The first
//! new token follows from the prompt and counts as part of its processing. Nothing stops generation early, and the work
//! does not depend on which tokens are processed.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use ulmus_backend::{Backend, greedy};
use ulmus_model::{Generator, Initial, Layout, Model, ModelError};
use ulmus_plan::{ModelConfig, NormKind};

use crate::error::EvaluatorError;

/// The lengths and repetitions of a benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BenchConfig {
    /// Tokens in the prompt, at least 1.
    pub prompt: usize,
    /// Tokens to generate, at least 2. The first counts as part of prompt processing.
    pub generate: usize,
    /// Timed runs after the warm-up run, at least 1.
    pub runs: usize,
    /// Sequences that are decoded side by side, at least 1. Each has its own prompt, and prompts are processed one after
    /// the other. Rates count the tokens of all sequences.
    #[serde(default = "one")]
    pub batch: usize,
}

fn one() -> usize {
    1
}

/// How long the two phases of one run took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Seconds until every sequence has its first new token.
    pub prompt_seconds: f64,
    /// Seconds from there to the last new token.
    pub generation_seconds: f64,
}

/// Rates in tokens per second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Prompt tokens per second of prompt processing.
    pub prompt: f64,
    /// New tokens per second of generation, not counting the first of each sequence.
    pub generation: f64,
    /// All tokens per second of the whole run.
    pub total: f64,
}

/// The result of a benchmark, and the model and machine that it was measured with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchResult {
    /// The lengths that were timed.
    pub config: BenchConfig,
    /// Number of the model's parameters.
    pub parameters: u64,
    /// The kind of the model's norms.
    #[serde(default)]
    pub norm: NormKind,
    /// Number of compute threads.
    pub threads: usize,
    /// Description of the device that computed.
    #[serde(default)]
    pub device: String,
    /// Type of weights and activations.
    pub dtype: String,
    /// Median over the runs: prompt tokens per second of prompt processing.
    #[serde(default)]
    pub prompt_tokens_per_second: f64,
    /// Median over the runs: new tokens per second of generation, not counting the first of each sequence.
    #[serde(default)]
    pub generate_tokens_per_second: f64,
    /// The median of each rate over the runs.
    pub median: Rates,
    /// The times of all runs, in order.
    pub runs: Vec<Timing>,
    /// The machine that computed.
    pub machine: Machine,
}

/// The machine that a measurement comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the processor, or `unknown processor` where the system does not say.
    pub processor: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Instruction set and operating system.
    pub platform: String,
}

impl Machine {
    /// The machine that this process runs on.
    pub fn this() -> Self {
        Self {
            processor: ulmus_device::processor(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            platform: format!("{} {}", std::env::consts::ARCH, std::env::consts::OS),
        }
    }
}

/// Times a model. `threads` is only recorded in the result.
///
/// # Errors
/// [`EvaluatorError::Lengths`] for lengths that cannot be timed, or a model error when there is no memory for them.
pub fn bench<B: Backend>(
    model: &Arc<Model<B>>,
    config: BenchConfig,
    threads: usize,
) -> Result<BenchResult, EvaluatorError> {
    let BenchConfig { prompt, generate, runs, batch } = config;
    let context = model.config().max_context_length;
    if prompt == 0 || generate < 2 || prompt.saturating_add(generate) > context {
        return Err(EvaluatorError::Lengths { prompt, generate, context });
    }
    let mut generator = Generator::with_sequences(Arc::clone(model), prompt + generate, batch)?;
    let vocabulary = model.config().vocab_size;
    let tokens: Vec<u32> = (0..prompt).map(|index| (index * 7919 % vocabulary) as u32).collect();
    time_once(&mut generator, &tokens, generate)?;
    let timings = (0..runs.max(1))
        .map(|_| time_once(&mut generator, &tokens, generate))
        .collect::<Result<Vec<_>, _>>()?;
    let median = median_rates(config, &timings);
    Ok(BenchResult {
        config,
        parameters: model.config().parameters(),
        norm: model.config().norm,
        threads,
        device: model.backend().describe(),
        dtype: model.format().to_string(),
        prompt_tokens_per_second: median.prompt,
        generate_tokens_per_second: median.generation,
        median,
        runs: timings,
        machine: Machine::this(),
    })
}

fn time_once<B: Backend>(
    generator: &mut Generator<B>,
    prompt: &[u32],
    generate: usize,
) -> Result<Timing, ModelError> {
    generator.reset();
    let mut next = Vec::with_capacity(generator.sequences());
    let start = Instant::now();
    for sequence in 0..generator.sequences() {
        next.push((sequence, greedy(generator.feed_to(sequence, prompt)?)));
    }
    let prompt_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    for _ in 1..generate {
        let likeliest = generator.feed_greedy(&next)?;
        next.iter_mut().zip(likeliest).for_each(|((_, token), next)| *token = *next);
    }
    Ok(Timing { prompt_seconds, generation_seconds: start.elapsed().as_secs_f64() })
}

/// The median of at least one value: the middle one, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}

fn median_rates(config: BenchConfig, timings: &[Timing]) -> Rates {
    let batch = config.batch.max(1) as f64;
    let (prompt, generated) = (batch * config.prompt as f64, batch * (config.generate - 1) as f64);
    let median = |rate: &dyn Fn(&Timing) -> f64| {
        let rates: Vec<f64> = timings.iter().map(rate).collect();
        self::median(&rates)
    };
    Rates {
        prompt: median(&|timing| prompt / timing.prompt_seconds),
        generation: median(&|timing| generated / timing.generation_seconds),
        total: median(&|timing| {
            (prompt + generated + batch) / (timing.prompt_seconds + timing.generation_seconds)
        }),
    }
}

/// Random weights with the standard deviations of initial ones, to time the shape of a model without its weights.
pub fn synthetic_weights(config: &ModelConfig) -> Vec<f32> {
    let layout = Layout::new(config);
    let mut weights = vec![1.0; layout.parameters()];
    // Marsaglia's xorshift is random enough: speed does not depend on the values, as long as none is denormal.
    let mut state = 0x9E37_79B9_u32;
    for tensor in layout.tensors() {
        let Initial::Normal(std) = tensor.initial else { continue };
        let width = std as f32 * 12.0_f32.sqrt();
        for weight in &mut weights[tensor.range.clone()] {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            *weight = (state as f32 / u32::MAX as f32 - 0.5) * width;
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use ulmus_cpu::Cpu;
    use ulmus_plan::Multipliers;

    use super::*;

    #[test]
    fn rates_are_medians_over_runs() {
        let config = BenchConfig { prompt: 10, generate: 5, runs: 3, batch: 1 };
        let timing = |prompt_seconds, generation_seconds| Timing { prompt_seconds, generation_seconds };
        let odd = median_rates(config, &[timing(1.0, 4.0), timing(2.0, 1.0), timing(5.0, 2.0)]);
        assert_eq!((odd.prompt, odd.generation), (5.0, 2.0));
        assert_eq!(odd.total, 3.0);
        let even = median_rates(config, &[timing(1.0, 4.0), timing(2.0, 1.0)]);
        assert_eq!((even.prompt, even.generation), (7.5, 2.5));
        let four = median_rates(BenchConfig { batch: 4, ..config }, &[timing(1.0, 4.0)]);
        assert_eq!((four.prompt, four.generation, four.total), (40.0, 4.0, 12.0));
    }

    #[test]
    fn a_shape_without_weights_can_be_timed() {
        let config = ModelConfig {
            vocab_size: 64,
            max_context_length: 32,
            num_transformer_layers: 2,
            model_dim: 32,
            head_dim: 16,
            num_gqa_groups: 1,
            qkv_multipliers: Multipliers::Uniform(1.0),
            ffn_multipliers: Multipliers::Uniform(1.0),
            ffn_dim_divisor: 16,
            norm: NormKind::Layer,
            ..ModelConfig::default()
        };
        let weights = synthetic_weights(&config);
        assert!(weights.iter().all(|weight| weight.is_finite() && weight.abs() <= 1.0));
        let model = Arc::new(Model::new(Cpu::new(1), &config, &weights).unwrap());
        let lengths =
            |prompt, generate| bench(&model, BenchConfig { prompt, generate, runs: 2, batch: 3 }, 1);
        let result = lengths(8, 24).unwrap();
        assert_eq!(result.prompt_tokens_per_second, result.median.prompt);
        assert_eq!(result.generate_tokens_per_second, result.median.generation);
        assert_eq!((result.runs.len(), result.norm), (2, NormKind::Layer));
        assert!(result.median.prompt > 0.0 && result.median.generation > 0.0);
        for (prompt, generate) in [(0, 4), (4, 1), (30, 3)] {
            let error = lengths(prompt, generate).unwrap_err();
            assert!(error.to_string().contains("context of 32"), "{error}");
        }
    }
}
