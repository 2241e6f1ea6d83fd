//! Arguments, tables and result files of the program. The numbers come from the library.

mod bench;
mod chat;
mod compare;
mod merge;
mod render;
mod run;
mod tasks;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use ulmus_backend::{Backend, WeightFormat};
use ulmus_dataloader::CHAT_TEMPLATE;
use ulmus_device::AnyBackend;
use ulmus_evaluator::{
    EvaluatorError, LoadedModel, Transcript, folder_of, load_tokenizer, model_folder, read_adapted,
    tokenizer_place,
};
use ulmus_model::hf::HfModel;
use ulmus_model::{Generator, Sampler, Sampling};
use ulmus_plan::Device;
use ulmus_process::{Failure, finish_output};
use ulmus_types::ExitStatus;

use bench::Bench;
use chat::Chat;
use compare::Compare;
use merge::Merge;
use render::Render;
use run::Run;
use tasks::{Fetch, Tasks};

/// The default number of tokens to generate, where the context has room for them.
const MAX_TOKENS: usize = 128;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong input (the message says what to change), 5 damaged data, 6 the store or the hub does \
     not answer.";

/// Evaluates, benchmarks and samples models in Hugging Face layout, and checkpoints of CoreNet.
///
/// A model folder holds config.json, model.safetensors and tokenizer.model or tokenizer.json, like the `export` folder of a
/// run.
#[derive(Debug, Parser)]
#[command(name = "evaluator", version, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure a model on texts: prints a table and, if asked, writes JSON.
    ///
    /// Example: evaluator run --model runs/quickstart/export --tasks perplexity --data notes.txt --output result.json
    Run(Box<Run>),
    /// List the tasks that `run` knows.
    Tasks(Tasks),
    /// Copy the data sets of tasks from the hub to a folder, for `run --data`.
    ///
    /// Example: evaluator fetch --suite openllm --to datasets
    Fetch(Fetch),
    /// Print results files side by side, and which differences exceed their standard errors.
    ///
    /// Example: evaluator compare before.json after.json
    Compare(Compare),
    /// Time prompt processing and generation separately, after a warm-up run.
    ///
    /// Example: evaluator bench --preset openelm-270m --prompt 35 --generate 128 --threads 8
    ///
    /// The table of the paper: evaluator bench --paper --device cpu,cuda:0 --dtype f32,bf16 --output speeds
    Bench(Box<Bench>),
    /// Continue a prompt, or answer in a conversation; text is printed as it is generated.
    ///
    /// Example: evaluator generate --model runs/quickstart/export --prompt "The trait" --max-tokens 64 --greedy
    ///
    /// A conversation: evaluator generate --model runs/quickstart-tune/tune/instruct/export --chat
    Generate(Generate),
    /// Add an adapter in PEFT's layout to its model, and write that as a model of its own.
    ///
    /// Example: evaluator merge --model runs/lora/export --adapter runs/lora/tune/adapt/adapter --to merged
    Merge(Merge),
    /// Show what a chat template makes of conversations: reads a JSON list of messages per line, and writes an object with the
    /// text and its token ids per line, or with the error where the template refuses.
    ///
    /// Example: echo '[{"role": "user", "content": "Hello"}]' | evaluator render --model runs/quickstart/export --generation-prompt
    Render(Render),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    /// 32-bit floats.
    F32,
    /// IEEE 754 half precision; activations stay f32.
    F16,
    /// bfloat16, for weights and activations.
    Bf16,
    /// 8-bit integers with a scale per 32 of them, for weights and activations.
    #[value(name = "q8_0")]
    Q8_0,
}

impl Dtype {
    fn format(self) -> WeightFormat {
        match self {
            Self::F32 => WeightFormat::F32,
            Self::F16 => WeightFormat::F16,
            Self::Bf16 => WeightFormat::Bf16,
            Self::Q8_0 => WeightFormat::Q8_0,
        }
    }
}

#[derive(Debug, Args)]
struct Generate {
    /// Model folder, a checkpoint of CoreNet (`.pt`), or a model on the hub: `hf://ORG/NAME[@REVISION]`.
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Folder with an adapter of that model in PEFT's layout, which is added to its weights.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Tokenizer file, or a folder with one [default: the model folder].
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// The text to continue; with --chat, the first message.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, required_unless_present = "chat")]
    prompt: Option<String>,
    /// Hold a conversation: each line of the input is a message, and the model answers it by its chat template.
    #[arg(long)]
    chat: bool,
    /// The chat template: auto (the tokenizer's own, or else the recipe's), recipe, or a file.
    #[arg(long, value_name = "NAME|FILE", default_value = "auto", requires = "chat")]
    template: String,
    /// What the conversation begins with, as a message of the system.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, requires = "chat")]
    system: Option<String>,
    /// Maximum number of tokens to generate; the model may end the text earlier [default: 128, or as many as fit in its
    /// context].
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Always take the most likely token; this is the default.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p"])]
    greedy: bool,
    /// Sampling temperature: 1 samples the model's distribution, lower is more deterministic, 0 is greedy.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Sample only from the K most likely tokens.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Nucleus sampling: sample only from the most likely tokens whose probabilities add up to P.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Random seed; the same seed gives the same text.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Data type of the weights.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Debug, Args)]
struct Compute {
    /// Number of compute threads, which does not change results [default: all cores].
    #[arg(long, value_name = "N", env = "ULMUS_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Device to compute on: auto (an NVIDIA GPU if there is one), cpu, cuda, cuda:N, or metal if built with it.
    #[arg(long, env = "ULMUS_DEVICE", value_name = "DEVICE", default_value = "auto", value_parser = parse_device)]
    device: DeviceChoice,
}

/// What `--device` names.
#[derive(Debug, Clone, Copy)]
enum DeviceChoice {
    Device(Device),
    #[cfg(feature = "metal")]
    Metal,
}

fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    #[cfg(feature = "metal")]
    if text == "metal" {
        return Ok(DeviceChoice::Metal);
    }
    #[cfg(not(feature = "metal"))]
    if text == "metal" {
        return Err("this evaluator was built without Metal; build it with --features metal".to_owned());
    }
    text.parse().map(DeviceChoice::Device)
}

/// A command that computes on a device.
trait OnDevice {
    fn run<B: Backend>(&self, backend: B) -> Result<(), Failure>;
}

impl Compute {
    fn run(&self, command: &impl OnDevice) -> Result<(), Failure> {
        match self.device {
            DeviceChoice::Device(device) => {
                match AnyBackend::new(device, self.threads(), 0).map_err(failure)? {
                    AnyBackend::Cpu(backend) => command.run(backend),
                    AnyBackend::Cuda(backend) => command.run(backend),
                }
            }
            #[cfg(feature = "metal")]
            DeviceChoice::Metal => command.run(ulmus_candle::Candle::metal().map_err(failure)?),
        }
    }

    fn threads(&self) -> usize {
        self.threads.map_or_else(all_threads, usize::from)
    }
}

fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl Arguments {
    /// Runs the command that was given.
    pub(crate) fn run(self) -> Result<ExitStatus, Failure> {
        match &self.command {
            Command::Run(run) => run.run(),
            Command::Tasks(tasks) => tasks.run(),
            Command::Compare(compare) => compare.run(),
            Command::Fetch(fetch) => fetch.run(),
            Command::Bench(bench) => bench.run(),
            Command::Generate(generate) => generate.compute.run(generate),
            Command::Render(render) => render.run(),
            Command::Merge(merge) => merge.run(),
        }?;
        Ok(ExitStatus::Done)
    }
}

fn failure(error: impl Into<EvaluatorError>) -> Failure {
    let error = error.into();
    Failure::of(error.kind(), &error)
}

/// Reads a model with its adapter, if there is one.
#[expect(clippy::print_stderr, reason = "a remark stands beside the results on standard output")]
fn adapted(model: &Path, adapter: Option<&Path>) -> Result<HfModel, Failure> {
    let (read, remark) = read_adapted(model, adapter).map_err(failure)?;
    if let Some(remark) = remark {
        eprintln!("warning: {remark}");
    }
    Ok(read)
}

impl Generate {
    /// The sampling that the flags describe. Without `--temperature`, top-k and top-p imply a temperature of 1.
    fn sampling(&self) -> Result<Sampling, Failure> {
        let chance = self.top_k.is_some() || self.top_p.is_some();
        let temperature = self.temperature.unwrap_or(if chance { 1.0 } else { 0.0 });
        Sampling::new(temperature, self.top_k, self.top_p.unwrap_or(1.0))
            .map_err(|message| Failure::new(ExitStatus::InvalidInput, message))
    }
}

impl Generate {
    /// How many tokens to generate after a prompt of `prompt` tokens (BOS included), within the model's `context`.
    fn room(&self, prompt: usize, context: usize) -> Result<usize, Failure> {
        let room = context.saturating_sub(prompt);
        let message = match self.max_tokens {
            None if room > 0 => return Ok(room.min(MAX_TOKENS)),
            Some(wanted) if prompt <= context && wanted <= room => return Ok(wanted),
            Some(wanted) if room > 0 => format!(
                "a prompt of {prompt} tokens and --max-tokens {wanted} do not fit in the model's context of {context}; \
                 shorten the prompt or use --max-tokens {room}"
            ),
            _ => format!(
                "a prompt of {prompt} tokens, including BOS, leaves no room in the model's context of {context}; \
                 shorten it to at most {}",
                context.saturating_sub(1)
            ),
        };
        Err(Failure::new(ExitStatus::InvalidInput, message))
    }
}

impl OnDevice for Generate {
    fn run<B: Backend>(&self, backend: B) -> Result<(), Failure> {
        let mut sampler = Sampler::new(self.sampling()?, self.seed, 0);
        let model = model_folder(&self.model).map_err(failure)?;
        let read = adapted(&model, self.adapter.as_deref())?;
        let loaded = LoadedModel::new(&read, backend, self.dtype.format()).map_err(failure)?;
        let of_tokenizer = self.tokenizer.as_deref().unwrap_or_else(|| tokenizer_place(&model));
        let tokenizer = load_tokenizer(of_tokenizer, &loaded).map_err(failure)?;
        let LoadedModel { model, .. } = loaded;
        if self.chat {
            let own = self.adapter.as_ref().map(|adapter| adapter.join(CHAT_TEMPLATE));
            let own = own.filter(|file| self.template == "auto" && file.is_file());
            let choice = own.map_or_else(|| self.template.clone(), |file| file.display().to_string());
            let template = chat::template(&choice, folder_of(of_tokenizer), &tokenizer)?;
            let max_tokens = self.max_tokens.unwrap_or(MAX_TOKENS);
            let chat = Chat { model, tokenizer: &tokenizer, template, sampler, max_tokens };
            return chat.run(self.system.as_deref(), self.prompt.as_deref());
        }
        let text = self.prompt.as_deref().unwrap_or_default();
        let prompt = tokenizer.encode(text);
        let begun: Vec<u32> = std::iter::once(tokenizer.bos()).chain(prompt.iter().copied()).collect();
        let max_tokens = self.room(begun.len(), model.config().max_context_length)?;
        let wanted = begun.len() + max_tokens;
        let mut generator = Generator::new(model, wanted).map_err(failure)?;
        let mut transcript = Transcript::after(&tokenizer, &prompt);
        let mut stdout = io::stdout().lock();
        // The end of the prompt may still change with the next tokens, so it is printed along with them.
        let pending = transcript.pending();
        let settled = text.strip_suffix(&pending).unwrap_or(text);
        let mut written = stdout.write_all(settled.as_bytes()).and_then(|()| stdout.flush());
        if written.is_ok() {
            generator
                .generate_with(&mut sampler, &begun, max_tokens, Some(tokenizer.eos()), |token| {
                    written =
                        stdout.write_all(transcript.push(token).as_bytes()).and_then(|()| stdout.flush());
                    if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                })
                .map_err(failure)?;
        }
        finish_output(written.and_then(|()| writeln!(stdout, "{}", transcript.finish())))
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header(header);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

fn json(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("plain data is valid JSON");
    text.push('\n');
    text
}
