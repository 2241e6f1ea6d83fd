//! `evaluator bench`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use ulmus_backend::Backend;
use ulmus_device::AnyBackend;
use ulmus_evaluator::{
    BenchConfig, BenchResult, LoadedModel, Measured, SpeedRow, Speeds, bench, synthetic_weights,
};
use ulmus_model::Model;
use ulmus_model::hf::read_config;
use ulmus_plan::{ModelConfig, NormKind, Preset};
use ulmus_process::{Failure, print};
use ulmus_types::{ExitStatus, counted};

use super::{DeviceChoice, Dtype, adapted, all_threads, failure, json, parse_device, table};

/// The default length of the prompt, where the context has room for it.
const PROMPT_TOKENS: usize = 35;
/// The default number of tokens to generate, where the context has room for them.
const MAX_TOKENS: usize = 128;
/// The number of tokens that the paper generates.
const PAPER_TOKENS: usize = 1024;

#[derive(Debug, Args)]
pub(super) struct Bench {
    #[command(flatten)]
    subject: Subject,
    /// Folder with an adapter of that model in PEFT's layout, which is added to its weights.
    #[arg(long, value_name = "DIR", requires = "model")]
    adapter: Option<PathBuf>,
    /// Kind of norm for a preset: `rms`, `naive_rms` or `layer`. Model folders always use `rms`.
    #[arg(long, value_name = "KIND", default_value = "rms", conflicts_with = "model")]
    norm: NormKind,
    /// Tokens in the prompt [default: 35, or as many as fit in the context].
    #[arg(long, value_name = "N")]
    prompt: Option<usize>,
    /// Tokens to generate; the first counts as part of prompt processing [default: 128, with --paper 1024, or as many as fit in
    /// the context].
    #[arg(long, value_name = "N")]
    generate: Option<usize>,
    /// Timed runs after the warm-up run; the median is reported.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Data types of the weights, one or several.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "f32")]
    dtype: Vec<Dtype>,
    /// Sequences to decode side by side; rates count the tokens of all of them.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// Number of compute threads, which does not change results [default: all cores].
    #[arg(long, value_name = "N", env = "ULMUS_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Devices to compute on, one or several: auto (an NVIDIA GPU if there is one), cpu, cuda, cuda:N, or metal if built with it.
    #[arg(long, env = "ULMUS_DEVICE", value_name = "DEVICES", value_delimiter = ',', default_value = "auto", value_parser = parse_device)]
    device: Vec<DeviceChoice>,
    /// Write the speeds of all models, devices and data types to this folder, as speeds.json, speeds.md and speeds.svg.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Print how many times each rate is that of an earlier speeds.json.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// The models to time.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Subject {
    /// Model folder; only its config and weights are used.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Published shapes with synthetic weights, one or several: `openelm-270m`, `-450m`, `-1_1b` or `-3b`.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    preset: Vec<Preset>,
    /// The table of the paper: all four shapes, a prompt of 35 tokens, and 1024 to generate.
    #[arg(long)]
    paper: bool,
}

/// A model to time: a folder or a shape.
#[derive(Debug, Clone)]
enum Timed {
    Folder(PathBuf),
    Shape(Preset),
}

impl Timed {
    fn name(&self) -> String {
        match self {
            Self::Folder(folder) => folder.display().to_string(),
            Self::Shape(preset) => preset.name().to_owned(),
        }
    }

    fn config(&self, norm: NormKind) -> Result<ModelConfig, Failure> {
        match self {
            Self::Folder(folder) => Ok(read_config(folder).map_err(failure)?.0),
            Self::Shape(preset) => Ok(ModelConfig { norm, ..preset.config() }),
        }
    }
}

impl Bench {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let models: Vec<Timed> = match &self.subject {
            Subject { model: Some(folder), .. } => vec![Timed::Folder(folder.clone())],
            Subject { paper: true, .. } => Preset::ALL.map(Timed::Shape).to_vec(),
            Subject { preset, .. } => preset.iter().copied().map(Timed::Shape).collect(),
        };
        let before = self.compare.as_deref().map(read).transpose()?;
        // All shapes have the same context.
        let config = self.lengths(models[0].config(self.norm)?.max_context_length);
        if let Some(before) = before.as_ref().filter(|before| !before.compares_with(config)) {
            let BenchConfig { prompt, generate, batch, .. } = before.config;
            let message = format!(
                "--compare has a prompt of {prompt}, {generate} tokens generated and a batch of {batch}, and this would have {}, \
                 {} and {}; use --prompt {prompt} --generate {generate} --batch {batch}",
                config.prompt, config.generate, config.batch
            );
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        let is_one = [models.len(), self.device.len(), self.dtype.len()] == [1, 1, 1];
        if is_one && self.output.is_none() && before.is_none() {
            let result = self.time(&models[0], self.device[0], self.dtype[0], config)?;
            return if self.json { print(json(&result).trim_end()) } else { print(&bench_table(&result)) };
        }
        let mut speeds = Speeds::new(config, Vec::new());
        for model in &models {
            for device in &self.device {
                for dtype in &self.dtype {
                    speeds.rows.push(self.row(model, *device, *dtype, config)?);
                    // What was measured so far is kept if a larger model ends the program.
                    if let Some(folder) = &self.output {
                        write(&speeds, before.as_ref(), folder)?;
                    }
                }
            }
        }
        if self.json {
            print(json(&speeds).trim_end())
        } else {
            print(speeds.markdown(before.as_ref()).trim_end())
        }
    }

    fn lengths(&self, context: usize) -> BenchConfig {
        let prompt = self.prompt.unwrap_or_else(|| context.saturating_sub(2).clamp(1, PROMPT_TOKENS));
        let most = if self.subject.paper { PAPER_TOKENS } else { MAX_TOKENS };
        BenchConfig {
            prompt,
            generate: self.generate.unwrap_or_else(|| context.saturating_sub(prompt).clamp(2, most)),
            runs: self.runs as usize,
            batch: usize::from(self.batch),
        }
    }

    #[expect(clippy::print_stderr, reason = "progress stands beside the results on standard output")]
    fn row(
        &self,
        model: &Timed,
        device: DeviceChoice,
        dtype: Dtype,
        config: BenchConfig,
    ) -> Result<SpeedRow, Failure> {
        let parameters = model.config(self.norm)?.parameters();
        let (described, memory, on_host) = describe(device, self.threads())?;
        // The weights are read in f32 to the host's memory, and then converted.
        let read = if on_host { 4 * parameters } else { 0 };
        let needed = read + dtype.format().bytes(parameters);
        let (device, dtype_name, measured) = if memory.is_some_and(|memory| memory < needed) {
            let gigabytes = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
            let skipped =
                format!("it needs {}, of {}", gigabytes(needed), gigabytes(memory.unwrap_or_default()));
            (described, dtype.format().to_string(), Measured::Skipped { skipped })
        } else {
            eprintln!("timing {} as {} on {described}", model.name(), dtype.format());
            let BenchResult { device, dtype, median, runs, .. } = self.time(model, device, dtype, config)?;
            (device, dtype, Measured::Done { median, runs })
        };
        Ok(SpeedRow { model: model.name(), parameters, device, dtype: dtype_name, measured })
    }

    fn time(
        &self,
        model: &Timed,
        device: DeviceChoice,
        dtype: Dtype,
        config: BenchConfig,
    ) -> Result<BenchResult, Failure> {
        match device {
            DeviceChoice::Device(device) => {
                match AnyBackend::new(device, self.threads(), 0).map_err(failure)? {
                    AnyBackend::Cpu(backend) => self.time_on(backend, model, dtype, config),
                    AnyBackend::Cuda(backend) => self.time_on(backend, model, dtype, config),
                }
            }
            #[cfg(feature = "metal")]
            DeviceChoice::Metal => {
                self.time_on(ulmus_candle::Candle::metal().map_err(failure)?, model, dtype, config)
            }
        }
    }

    fn time_on<B: Backend>(
        &self,
        backend: B,
        model: &Timed,
        dtype: Dtype,
        config: BenchConfig,
    ) -> Result<BenchResult, Failure> {
        let model = match model {
            Timed::Folder(folder) => {
                let read = adapted(folder, self.adapter.as_deref())?;
                LoadedModel::new(&read, backend, dtype.format()).map_err(failure)?.model
            }
            Timed::Shape(_) => {
                let config = model.config(self.norm)?;
                let weights = synthetic_weights(&config);
                Arc::new(Model::in_format(backend, &config, &weights, dtype.format()).map_err(failure)?)
            }
        };
        bench(&model, config, self.threads()).map_err(failure)
    }

    fn threads(&self) -> usize {
        self.threads.map_or_else(all_threads, usize::from)
    }
}

/// What a device is called, how much memory it has if that is known, and whether that is the host's.
fn describe(device: DeviceChoice, threads: usize) -> Result<(String, Option<u64>, bool), Failure> {
    match device {
        DeviceChoice::Device(device) => {
            let opened = AnyBackend::new(device, threads, 0).map_err(failure)?;
            let memory = Some(opened.memory()).filter(|memory| *memory > 0);
            Ok(match &opened {
                AnyBackend::Cpu(backend) => (backend.describe(), memory, true),
                AnyBackend::Cuda(backend) => (backend.describe(), memory, false),
            })
        }
        #[cfg(feature = "metal")]
        DeviceChoice::Metal => Ok((ulmus_candle::Candle::metal().map_err(failure)?.describe(), None, true)),
    }
}

fn read(path: &Path) -> Result<Speeds, Failure> {
    let wrong = |reason: String| {
        let message = format!(
            "{}: {reason}; name a speeds.json that `evaluator bench --output` has written",
            path.display()
        );
        Failure::new(ExitStatus::InvalidInput, message)
    };
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    Speeds::parse(&text).map_err(wrong)
}

fn write(speeds: &Speeds, before: Option<&Speeds>, folder: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(ExitStatus::Failed, format!("cannot write to {}: {error}", folder.display()))
    };
    fs::create_dir_all(folder).map_err(failed)?;
    let files = [
        ("speeds.json", Some(json(speeds))),
        ("speeds.md", Some(speeds.markdown(before))),
        ("speeds.svg", speeds.svg()),
    ];
    for (name, text) in files {
        if let Some(text) = text {
            fs::write(folder.join(name), text).map_err(failed)?;
        }
    }
    Ok(())
}

fn bench_table(result: &BenchResult) -> String {
    let mut table = table(&["benchmark", "tokens", "tokens/s"]);
    let BenchConfig { prompt, generate, batch, .. } = result.config;
    for (name, tokens, rate) in [
        ("prompt processing", batch * prompt, result.median.prompt),
        ("generation", batch * (generate - 1), result.median.generation),
        ("total", batch * (prompt + generate), result.median.total),
    ] {
        table.add_row([name.to_owned(), tokens.to_string(), format!("{rate:.2}")]);
    }
    let machine = &result.machine;
    format!(
        "{table}\nmedian of {} after a warm-up run; {} parameters, norm {}, {}, batch {batch}, {}\n{}, {}, {}",
        counted(result.runs.len(), "run"),
        result.parameters,
        result.norm.name(),
        result.dtype,
        result.device,
        machine.processor,
        counted(machine.cores, "core"),
        machine.platform,
    )
}
