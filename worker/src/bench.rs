//! `worker bench` measures how fast this machine trains; `worker roofline` measures its limits.
//!
//! A step is one whole update of one micro-batch without a group: forward, backward, exact mean, clipping and AdamW.
//! The time per kernel comes from the spans that the model crate opens around its kernels.

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tracing::span::{Attributes, Id};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use ulmus_backend::{IGNORE, Quantum, TrainingBackend};
use ulmus_cpu::{Cpu, Memory};
use ulmus_device::AnyBackend;
use ulmus_evaluator::{Machine, median};
use ulmus_model::{AdapterShape, BatchShape, MicroBatch, ModelError, Objective, Preference, Replica};
use ulmus_plan::{
    AdapterConfig, AdapterKind, Algorithms, Device, ModelConfig, NormKind, Precision, PreferenceLoss,
    TrainConfig,
};

/// What to measure.
#[derive(Debug, Clone)]
pub(crate) struct BenchConfig {
    /// Name of the model.
    pub name: String,
    /// The model.
    pub model: ModelConfig,
    /// Sequences per micro-batch.
    pub batch: usize,
    /// Tokens per sequence.
    pub sequence: usize,
    /// Precision of the operands of matrix products.
    pub precision: Precision,
    /// Whether layers are recomputed in the backward pass.
    pub recompute: bool,
    /// The adapter that is trained instead of all weights.
    pub adapter: Option<AdapterConfig>,
    /// Whether pairs of answers are trained on.
    pub preferences: bool,
    /// The first tokens of each sequence that have no label.
    pub prompt: usize,
    /// How cuBLASLt chooses matrix multiplication algorithms.
    pub algorithms: Algorithms,
    /// The device to compute on.
    pub device: Device,
    /// Compute threads.
    pub threads: usize,
    /// Number of timed steps, at least 1, after one untimed step.
    pub steps: usize,
}

impl BenchConfig {
    /// What is trained, on what, in words.
    fn work(&self) -> String {
        let trained = match &self.adapter {
            None => "all weights".to_owned(),
            Some(AdapterConfig { kind, rank, dropout, .. }) => {
                let kind = match kind {
                    AdapterKind::Lora => "LoRA",
                    AdapterKind::Dora => "DoRA",
                };
                format!("{kind} of rank {rank} with dropout {dropout}")
            }
        };
        let on = if self.preferences { "pairs" } else { "texts" };
        let labels = self.sequence - self.prompt;
        format!("{trained} on {on} with {labels} labels per sequence")
    }
}

/// Weights that are as good as any for measuring, in parts.
fn synthetic_weights(model: &ModelConfig) -> impl Iterator<Item = Vec<f32>> {
    const PART: u64 = 1 << 20;
    let (count, scale) = (model.parameters(), (model.model_dim as f32).powf(-0.5) / 500.0);
    let weight = move |index: u64| ((index * 7919 % 1001) as f32 - 500.0) * scale;
    (0..count).step_by(PART as usize).map(move |start| (start..count.min(start + PART)).map(weight).collect())
}

/// The result of a measurement.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BenchResult {
    /// Name of the model.
    pub model: String,
    /// Number of parameters of the model.
    pub parameters: u64,
    /// Kind of the model's norms.
    pub norm: NormKind,
    /// Sequences per micro-batch.
    pub batch: usize,
    /// Tokens per sequence.
    pub sequence: usize,
    /// Precision of the operands of matrix products.
    pub dtype: &'static str,
    /// Whether layers are recomputed in the backward pass.
    pub recompute: bool,
    /// What is trained, on what.
    pub work: String,
    /// Number of parameters that are trained.
    pub trained: u64,
    /// How cuBLASLt chooses matrix multiplication algorithms.
    pub algorithms: Algorithms,
    /// The device to compute on.
    pub device: String,
    /// Compute threads.
    pub threads: usize,
    /// Tokens trained per second, in the median step.
    pub tokens_per_second: f64,
    /// 10^12 operations per second at that speed: three times those of a forward pass with all attention scores,
    /// including masked ones, as is usual for such figures. A step that leaves some of these operations out, because weights
    /// are frozen or positions have no label, seems so much faster.
    pub model_tflops: f64,
    /// Time of each step in seconds, in order.
    pub step_seconds: Vec<f64>,
    /// Time per step in each kernel, longest first; `other` is the time outside all kernels.
    pub kernels: Vec<KernelTime>,
    /// Peak resident memory of this process, if the system reports it.
    pub peak_rss_bytes: Option<u64>,
    /// Memory that was planned before the start.
    pub planned_bytes: u64,
    /// The machine.
    pub machine: Machine,
}

/// Mean time per step in one kernel.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct KernelTime {
    /// Name of the kernel.
    pub kernel: String,
    /// Seconds per step.
    pub seconds: f64,
}

/// Trains on random tokens and measures that. Call it once per process: it installs the subscriber that times spans.
///
/// # Errors
/// If memory does not suffice for the model.
pub(crate) fn bench(config: BenchConfig) -> Result<BenchResult, ModelError> {
    match AnyBackend::new(config.device, config.threads, 0)? {
        AnyBackend::Cpu(backend) => bench_on(backend, config),
        AnyBackend::Cuda(backend) => bench_on(backend, config),
    }
}

fn bench_on<B: TrainingBackend>(backend: B, config: BenchConfig) -> Result<BenchResult, ModelError> {
    let work = config.work();
    let BenchConfig { name, model, batch, sequence, precision, recompute, adapter, preferences, .. } = config;
    let BenchConfig { prompt, algorithms, threads, steps, .. } = config;
    let spans = SpanTimes::default();
    // If another subscriber is already installed, there are no kernel times.
    drop(tracing::subscriber::set_global_default(tracing_subscriber::registry().with(spans.clone())));

    let sequences = batch as u64;
    let recipe = TrainConfig { sequences, micro_batch: sequences, recompute, ..TrainConfig::default() };
    let shape = BatchShape { sequences: batch, length: sequence, recompute };
    let backend = backend.with_precision(precision);
    let objective = if preferences {
        let loss = PreferenceLoss::Sigmoid;
        Objective::Preferences(Preference { loss, beta: 0.1, label_smoothing: 0.0, length_normalised: false })
    } else if adapter.is_some() || prompt > 0 {
        Objective::Answers { z_loss: 0.0 }
    } else {
        Objective::next_token(recipe.z_loss)
    };
    let mut replica = match adapter {
        None => Replica::new(backend.clone(), &model, shape, objective)?,
        Some(adapter) => {
            let adapter = AdapterShape::new(&model, &adapter)?;
            let mut replica = Replica::with_adapter(backend.clone(), &model, &adapter, 0, shape, objective)?;
            replica.load_base(synthetic_weights(&model))?;
            replica
        }
    };
    replica.initialise(0);
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let quantum = Quantum::new((batch * sequence) as u64, 1);
    let mut train = |step: u64| -> Result<f64, ModelError> {
        let mut tokens = || -> Vec<u32> {
            (0..batch * sequence).map(|_| random.random_range(0..model.vocab_size as u32)).collect()
        };
        let (mut inputs, mut targets) = (tokens(), tokens());
        // Both answers of a pair follow the same prompt.
        for pair in inputs.chunks_mut(2 * sequence).filter(|_| preferences) {
            let (one, other) = pair.split_at_mut(sequence);
            other[..prompt].copy_from_slice(&one[..prompt]);
        }
        targets.chunks_mut(sequence).for_each(|targets| targets[..prompt].fill(IGNORE));
        let mut micro_batch = MicroBatch::of_whole_documents(batch, sequence, inputs, targets);
        micro_batch.number = step * batch as u64;
        // References are computed once, before training.
        micro_batch.references = vec![-10.0 * (sequence - prompt) as f64; batch];
        let begun = Instant::now();
        let loss = replica.forward_backward(&micro_batch)?;
        replica.quantise_mean_gradient(&quantum, objective.divisor(&loss))?;
        replica.update(&recipe, recipe.learning_rate(step), step)?;
        Ok(begun.elapsed().as_secs_f64())
    };
    match algorithms {
        Algorithms::Library => train(0)?,
        Algorithms::Measured => backend.choose_algorithms(None, || train(0))?.0?,
    };
    spans.take();
    let steps = steps.max(1) as u64;
    let step_seconds = (1..=steps).map(&mut train).collect::<Result<Vec<_>, _>>()?;
    let serialized = if backend.serialize_kernels() {
        // Kernels that run asynchronously are timed one by one, in additional steps.
        spans.take();
        (1..=steps).map(&mut train).collect::<Result<Vec<_>, _>>()?
    } else {
        step_seconds.clone()
    };
    let kernels = kernel_times(&spans.take(), &serialized);
    let tokens_per_second = (batch * sequence) as f64 / median(&step_seconds);
    Ok(BenchResult {
        model: name,
        parameters: model.parameters(),
        norm: model.norm,
        batch,
        sequence,
        dtype: precision.name(),
        recompute,
        work,
        trained: replica.trainable().parameters() as u64,
        algorithms,
        device: backend.describe(),
        threads,
        tokens_per_second,
        model_tflops: tokens_per_second * training_operations(&model, sequence) / 1e12,
        step_seconds,
        kernels,
        peak_rss_bytes: peak_rss_bytes(),
        planned_bytes: replica.planned_bytes(),
        machine: Machine::this(),
    })
}

/// Operations per trained token: two per weight of every matrix, including the head, and two per element of every key
/// and value; times three with the backward pass.
fn training_operations(model: &ModelConfig, sequence: usize) -> f64 {
    let layers = model.layers();
    let matrices: usize = layers
        .iter()
        .map(|layer| {
            let heads = (2 * layer.q_heads + 2 * layer.kv_heads) * model.head_dim;
            model.model_dim * (heads + 3 * layer.ffn_dim)
        })
        .sum();
    let scores: usize = layers.iter().map(|layer| 2 * sequence * layer.q_heads * model.head_dim).sum();
    (6 * (matrices + model.vocab_size * model.model_dim + scores)) as f64
}

fn kernel_times(spans: &BTreeMap<&'static str, Duration>, step_seconds: &[f64]) -> Vec<KernelTime> {
    let per_step = |seconds: f64| seconds / step_seconds.len() as f64;
    let mut kernels: Vec<KernelTime> = spans
        .iter()
        .map(|(name, time)| KernelTime { kernel: (*name).to_owned(), seconds: per_step(time.as_secs_f64()) })
        .collect();
    let inside: f64 = kernels.iter().map(|kernel| kernel.seconds).sum();
    kernels.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let outside = (per_step(step_seconds.iter().sum()) - inside).max(0.0);
    kernels.push(KernelTime { kernel: "other".to_owned(), seconds: outside });
    kernels
}

/// Peak resident memory so far, in bytes.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// A tracing layer that sums the time spent in spans, by name.
#[derive(Debug, Clone, Default)]
struct SpanTimes(Arc<Mutex<BTreeMap<&'static str, Duration>>>);

/// The time at which a span was opened.
struct Begun(Instant);

impl SpanTimes {
    fn take(&self) -> BTreeMap<&'static str, Duration> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for SpanTimes {
    fn on_new_span(&self, _: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(Begun(Instant::now()));
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let Some(time) = span.extensions().get::<Begun>().map(|begun| begun.0.elapsed()) else { return };
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *times.entry(span.name()).or_default() += time;
    }
}

/// The limits of the machine, each the best of several runs.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Roofline {
    /// Compute threads.
    pub threads: usize,
    /// Multiplications and additions of float32 numbers in registers, 10^9 per second.
    pub f32_gflops: f64,
    /// Multiplications and additions of bfloat16 pairs, summed in float32, 10^9 per second; `None` if the processor has no instruction for it.
    pub bf16_gflops: Option<f64>,
    /// Memory bandwidth of reading, 10^9 bytes per second.
    pub read_gigabytes_per_second: f64,
    /// Memory bandwidth of copying, counting bytes read and written, 10^9 bytes per second.
    pub copy_gigabytes_per_second: f64,
    /// The machine.
    pub machine: Machine,
}

/// Number of runs, of which the best counts.
const ROOFLINE_RUNS: usize = 5;
/// Bytes that each thread reads or copies: more than fit in a cache.
const ROOFLINE_BYTES: usize = 256 << 20;

/// Measures the limits of the machine.
///
/// # Errors
/// [`ModelError::Backend`].
pub(crate) fn roofline(threads: usize) -> Result<Roofline, ModelError> {
    let backend = Cpu::new(threads);
    let arithmetic = |precision| {
        let rates = (0..ROOFLINE_RUNS).map(|_| {
            let begun = Instant::now();
            let operations: f64 = backend.saturate(precision)?;
            Some(operations / begun.elapsed().as_secs_f64() / 1e9)
        });
        rates.collect::<Option<Vec<f64>>>().map(|rates| rates.into_iter().fold(0.0, f64::max))
    };
    Ok(Roofline {
        threads,
        f32_gflops: arithmetic(Precision::F32).expect("every processor computes in float32"),
        bf16_gflops: arithmetic(Precision::Bf16),
        read_gigabytes_per_second: memory_rate(threads, ROOFLINE_BYTES, |from, _| from.read())?,
        copy_gigabytes_per_second: memory_rate(threads, 2 * ROOFLINE_BYTES, |from, to| to.copy_from(from))?,
        machine: Machine::this(),
    })
}

/// Speed of `work` in 10^9 bytes per second. It runs on two buffers per thread and moves `bytes` bytes per thread.
fn memory_rate(
    threads: usize,
    bytes: usize,
    work: impl Fn(&Memory, &mut Memory) + Sync,
) -> Result<f64, ModelError> {
    let memory = || Ok((Memory::new(ROOFLINE_BYTES)?, Memory::new(ROOFLINE_BYTES)?));
    let memories = (0..threads).map(|_| memory()).collect::<Result<Vec<_>, ModelError>>()?;
    let barrier = Barrier::new(threads);
    let rates = memories.into_iter().map(|(from, mut to)| {
        let (barrier, work) = (&barrier, &work);
        move || {
            let run = |_| {
                barrier.wait();
                let begun = Instant::now();
                work(&from, &mut to);
                barrier.wait();
                (threads * bytes) as f64 / begun.elapsed().as_secs_f64() / 1e9
            };
            (0..ROOFLINE_RUNS).map(run).fold(0.0, f64::max)
        }
    });
    Ok(std::thread::scope(|scope| {
        let running: Vec<_> = rates.map(|rate| scope.spawn(rate)).collect();
        running.into_iter().map(|rate| rate.join().expect("no thread panics")).fold(0.0, f64::max)
    }))
}

impl Roofline {
    /// The result as a table for a person.
    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_BORDERS_ONLY).set_header(["limit", "rate"]);
        table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        let bf16 = self.bf16_gflops.map_or("-".to_owned(), |rate| format!("{rate:.0} GFLOP/s"));
        table.add_row(["float32 arithmetic".to_owned(), format!("{:.0} GFLOP/s", self.f32_gflops)]);
        table.add_row(["bfloat16 arithmetic".to_owned(), bf16]);
        table.add_row(["memory read".to_owned(), format!("{:.1} GB/s", self.read_gigabytes_per_second)]);
        table.add_row(["memory copy".to_owned(), format!("{:.1} GB/s", self.copy_gigabytes_per_second)]);
        let Machine { processor, cores, platform } = &self.machine;
        format!(
            "{table}\nbest of {ROOFLINE_RUNS} runs, {} threads\n{processor}, {cores} cores, {platform}",
            self.threads
        )
    }
}

impl BenchResult {
    /// The result as a table for a person.
    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_BORDERS_ONLY).set_header(["kernel", "ms per step", "share"]);
        table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        let total: f64 = self.kernels.iter().map(|kernel| kernel.seconds).sum();
        for KernelTime { kernel, seconds } in &self.kernels {
            let share = 100.0 * seconds / total;
            table.add_row([kernel.clone(), format!("{:.1}", seconds * 1e3), format!("{share:.1} %")]);
        }
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let measured =
            self.peak_rss_bytes.map_or("unknown".to_owned(), |rss| format!("{:.2} GB", gigabytes(rss)));
        format!(
            "{table}\n{:.1} tokens/s (median of {} steps after one untimed step): {} with {} parameters, {}, norm {}, {} x {}, \
             {}, {}, {:.2} TFLOP/s\npeak memory {measured}, planned {:.2} GB\n{}, {} cores, {}",
            self.tokens_per_second,
            self.step_seconds.len(),
            self.model,
            self.parameters,
            self.work,
            self.norm.name(),
            self.batch,
            self.sequence,
            self.dtype,
            self.device,
            self.model_tflops,
            gigabytes(self.planned_bytes),
            self.machine.processor,
            self.machine.cores,
            self.machine.platform,
        )
    }
}

#[cfg(test)]
mod tests {
    use ulmus_plan::Preset;

    use super::*;

    /// With the shapes of the paper and its vocabulary of 32,000.
    #[test]
    fn operations_are_those_of_the_published_shapes() {
        let of = |preset: Preset| {
            let model = ModelConfig { vocab_size: 32_000, ..preset.config() };
            (training_operations(&model, 2048) / 1e6).round() / 1e3
        };
        let all = Preset::ALL.map(of);
        assert_eq!(all, [2.025, 3.315, 7.542, 20.282]);
    }

    #[test]
    fn time_outside_of_kernels_is_told() {
        let spans = BTreeMap::from([("norm", Duration::from_secs(2)), ("linear", Duration::from_secs(4))]);
        let kernels = kernel_times(&spans, &[4.0, 3.0]);
        let times: Vec<(&str, f64)> =
            kernels.iter().map(|kernel| (kernel.kernel.as_str(), kernel.seconds)).collect();
        assert_eq!(times, [("linear", 2.0), ("norm", 1.0), ("other", 0.5)]);
    }

    #[test]
    fn spans_are_added_up_by_name() {
        let times = SpanTimes::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(times.clone()), || {
            for _ in 0..3 {
                let _span = tracing::trace_span!("norm").entered();
            }
            let _span = tracing::trace_span!("linear").entered();
        });
        let taken = times.take();
        assert_eq!(taken.keys().copied().collect::<Vec<_>>(), ["linear", "norm"]);
        assert!(times.take().is_empty());
    }
}
