//! `worker bench`: how fast this machine trains; `worker roofline`: what it could do at most.
//!
//! A step is one whole update of one micro-batch without a group: forward, backward, exact mean, clipping and AdamW. The time per
//! kernel is that of the spans that the model crate opens around its kernels.

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
use ulmus_backend::{Quantum, TrainingBackend};
use ulmus_cpu::{Cpu, Memory};
use ulmus_device::AnyBackend;
use ulmus_evaluator::{Machine, median};
use ulmus_model::{BatchShape, MicroBatch, ModelError, Objective, Replica};
use ulmus_plan::{Algorithms, Device, ModelConfig, NormKind, Precision, TrainConfig};

/// What is timed.
#[derive(Debug, Clone)]
pub(crate) struct BenchConfig {
    /// Name of the shape.
    pub name: String,
    /// The shape.
    pub model: ModelConfig,
    /// Sequences of the micro-batch.
    pub batch: usize,
    /// Positions per sequence.
    pub sequence: usize,
    /// Operands of matrix products.
    pub precision: Precision,
    /// Whether layers are computed again in the backward.
    pub recompute: bool,
    /// How a GPU's library multiplies.
    pub algorithms: Algorithms,
    /// What computes.
    pub device: Device,
    /// Compute threads.
    pub threads: usize,
    /// Timed steps, at least 1, after one that is not.
    pub steps: usize,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BenchResult {
    /// Name of the shape.
    pub model: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// Kind of its norms.
    pub norm: NormKind,
    /// Sequences of the micro-batch.
    pub batch: usize,
    /// Positions per sequence.
    pub sequence: usize,
    /// Operands of matrix products.
    pub dtype: &'static str,
    /// Whether layers are computed again in the backward.
    pub recompute: bool,
    /// How a GPU's library multiplies.
    pub algorithms: Algorithms,
    /// What computes.
    pub device: String,
    /// Compute threads.
    pub threads: usize,
    /// Positions trained per second, by the median step.
    pub tokens_per_second: f64,
    /// 10^12 operations per second of that: three times those of a forward with all scores of attention, whether
    /// they count or not, as is usual for such figures.
    pub model_tflops: f64,
    /// Seconds of each step, in order.
    pub step_seconds: Vec<f64>,
    /// Seconds per step in each kernel, the longest first; `other` is outside all of them.
    pub kernels: Vec<KernelTime>,
    /// Most memory that this process has held, where the system tells it.
    pub peak_rss_bytes: Option<u64>,
    /// What was planned before the start.
    pub planned_bytes: u64,
    /// The machine.
    pub machine: Machine,
}

/// Mean time per step in one kernel.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct KernelTime {
    /// Its name.
    pub kernel: String,
    /// Seconds per step.
    pub seconds: f64,
}

/// Trains random tokens and measures it. To be called once in a process: it installs the subscriber that times spans.
///
/// # Errors
/// If the model has no memory.
pub(crate) fn bench(config: BenchConfig) -> Result<BenchResult, ModelError> {
    match AnyBackend::new(config.device, config.threads, 0)? {
        AnyBackend::Cpu(backend) => bench_on(backend, config),
        AnyBackend::Cuda(backend) => bench_on(backend, config),
    }
}

fn bench_on<B: TrainingBackend>(backend: B, config: BenchConfig) -> Result<BenchResult, ModelError> {
    let BenchConfig {
        name, model, batch, sequence, precision, recompute, algorithms, threads, steps, ..
    } = config;
    let spans = SpanTimes::default();
    // Somebody who has installed another one gets no kernel times.
    drop(tracing::subscriber::set_global_default(tracing_subscriber::registry().with(spans.clone())));

    let sequences = batch as u64;
    let recipe = TrainConfig { sequences, micro_batch: sequences, recompute, ..TrainConfig::default() };
    let shape = BatchShape { sequences: batch, length: sequence, recompute };
    let backend = backend.with_precision(precision);
    let mut replica = Replica::new(backend.clone(), &model, shape, Objective::next_token(recipe.z_loss))?;
    replica.initialise(0);
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let quantum = Quantum::new((batch * sequence) as u64, 1);
    let mut train = |step: u64| -> Result<f64, ModelError> {
        let mut tokens = || -> Vec<u32> {
            (0..batch * sequence).map(|_| random.random_range(0..model.vocab_size as u32)).collect()
        };
        let micro_batch = MicroBatch::of_whole_documents(batch, sequence, tokens(), tokens());
        let begun = Instant::now();
        let loss = replica.forward_backward(&micro_batch)?;
        replica.quantise_mean_gradient(&quantum, loss.valid)?;
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
    let apart = if backend.serialize_kernels() {
        // Kernels that run beside the host are timed one by one, in steps that count for nothing else.
        spans.take();
        (1..=steps).map(&mut train).collect::<Result<Vec<_>, _>>()?
    } else {
        step_seconds.clone()
    };
    let kernels = kernel_times(&spans.take(), &apart);
    let tokens_per_second = (batch * sequence) as f64 / median(&step_seconds);
    Ok(BenchResult {
        model: name,
        parameters: model.parameters(),
        norm: model.norm,
        batch,
        sequence,
        dtype: precision.name(),
        recompute,
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

/// Operations per trained position: two per weight of a matrix, the head included, and two per number of each key and
/// value; three times that with the backward.
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

/// Most resident memory so far.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// A layer that adds up the time spent in spans, by name.
#[derive(Debug, Clone, Default)]
struct SpanTimes(Arc<Mutex<BTreeMap<&'static str, Duration>>>);

/// When a span was opened.
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

/// What the machine can do at most, by the best of some runs.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Roofline {
    /// Compute threads.
    pub threads: usize,
    /// Multiplications and additions of float32 in registers, 10^9 per second.
    pub f32_gflops: f64,
    /// The same of bfloat16 pairs added up in float32; nothing where the processor has no instruction for it.
    pub bf16_gflops: Option<f64>,
    /// Memory read, 10^9 bytes per second.
    pub read_gigabytes_per_second: f64,
    /// Memory copied, bytes read and written counted, 10^9 per second.
    pub copy_gigabytes_per_second: f64,
    /// The machine.
    pub machine: Machine,
}

/// Runs of which the best counts.
const ROOFLINE_RUNS: usize = 5;
/// Bytes that a thread reads or copies: more than a cache holds.
const ROOFLINE_BYTES: usize = 256 << 20;

/// Measures the machine.
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

/// 10^9 bytes per second of `work` on two buffers per thread, which moves that many bytes.
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
    /// The result for people.
    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_BORDERS_ONLY).set_header(["limit", "rate"]);
        table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        let bf16 = self.bf16_gflops.map_or("-".to_owned(), |rate| format!("{rate:.0} GFLOP/s"));
        table.add_row(["float32 arithmetic".to_owned(), format!("{:.0} GFLOP/s", self.f32_gflops)]);
        table.add_row(["bfloat16 arithmetic".to_owned(), bf16]);
        table.add_row(["memory read".to_owned(), format!("{:.1} GB/s", self.read_gigabytes_per_second)]);
        table.add_row(["memory copied".to_owned(), format!("{:.1} GB/s", self.copy_gigabytes_per_second)]);
        let Machine { processor, cores, platform } = &self.machine;
        format!(
            "{table}\nbest of some runs, {} threads\n{processor}, {cores} cores, {platform}",
            self.threads
        )
    }
}

impl BenchResult {
    /// The result for people.
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
            "{table}\n{:.1} tokens/s (median of {} steps after one that is not counted): {} of {} parameters, norm {}, {} x {}, {}, \
             {}, {:.2} TFLOP/s\npeak memory {measured}, planned {:.2} GB\n{}, {} cores, {}",
            self.tokens_per_second,
            self.step_seconds.len(),
            self.model,
            self.parameters,
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

    /// By the shapes of the paper, with its vocabulary of 32,000.
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
        let told: Vec<(&str, f64)> =
            kernels.iter().map(|kernel| (kernel.kernel.as_str(), kernel.seconds)).collect();
        assert_eq!(told, [("linear", 2.0), ("norm", 1.0), ("other", 0.5)]);
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
