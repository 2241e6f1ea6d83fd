//! `evaluator run`.

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use ulmus_backend::Backend;
use ulmus_evaluator::tasks::{
    Batching, Catalogue, DataSets, Evaluation, Journal, Limit, Outcome, PERPLEXITY, Progress, Selection,
    Settings, TaskPlan, average, beside_published, description, kind_of_device, markdown, results_file,
};
use ulmus_evaluator::{
    EvaluatorError, LoadedModel, adds_bos, load_tokenizer, model_folder, perplexity, read_texts,
    tokenizer_place,
};
use ulmus_process::{Failure, print};
use ulmus_run::results::Perplexity;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{ExitStatus, counted};

use super::tasks::HarnessRev;
use super::{Compute, Dtype, OnDevice, adapted, failure, json as to_json, table};

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(super) struct Run {
    /// Model folder, a checkpoint of CoreNet (`.pt`), or a model on the hub: `hf://ORG/NAME[@REVISION]`.
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Folder with an adapter of that model in PEFT's layout, which is added to its weights.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Tokenizer file, or a folder with one [default: the model folder].
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// Tasks, groups and patterns, such as `hellaswag`, `mmlu` or `arc_*`; `evaluator tasks` lists them. `perplexity` measures
    /// the texts that --data names.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = PERPLEXITY, conflicts_with = "suite")]
    tasks: Vec<String>,
    /// A published set of tasks with their numbers of examples: zeroshot, openllm, llm360 or adapters.
    #[arg(long, value_name = "NAME", conflicts_with = "num_fewshot")]
    suite: Option<String>,
    /// File with more tasks, defined like the built-in ones (docs/evaluator.md).
    #[arg(long, value_name = "FILE.toml")]
    include: Vec<PathBuf>,
    /// For tasks, folders or stores with data sets in the hub's layout; for `perplexity`, texts: parquet, jsonl, json.gz,
    /// json.zst, txt or md files, or folders of them.
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    data: Vec<String>,
    /// Column (parquet) or key (jsonl) that holds the text, for `perplexity`.
    #[arg(long, value_name = "NAME", default_value = "text", allow_hyphen_values = true)]
    text: String,
    /// Number of examples before each question [default: 0].
    #[arg(long, value_name = "N")]
    num_fewshot: Option<usize>,
    /// The split that examples are drawn from [default: the task's].
    #[arg(long, value_name = "SPLIT")]
    fewshot_split: Option<String>,
    /// Use only the first N rows of each task, or that part of them if it is below 1.
    #[arg(long, value_name = "N", value_parser = parse_limit)]
    limit: Option<Limit>,
    /// Maximum number of context tokens for a prediction [default: the model's maximum].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Tokens that are remembered at once, which bounds the memory and changes no result.
    #[arg(long, value_name = "N", default_value = "auto", value_parser = parse_batch)]
    batch_tokens: Batching,
    /// Whether texts begin with BOS; `auto` does what the tokenizer's configuration says, or else adds it.
    #[arg(long, value_enum, default_value = "auto")]
    add_bos: AddBos,
    /// The revision of lm-evaluation-harness whose numbers are met: 0.4.13, or that of the OpenELM model cards.
    #[arg(long, value_enum, default_value = "current")]
    harness_rev: HarnessRev,
    /// Random seed of the examples.
    #[arg(long, value_name = "SEED", default_value_t = 1234)]
    seed: u64,
    /// Data type of the weights.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// Where results go: a .json file, or a folder for results.json and the samples.
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Write each row with what the model was asked and answered to `samples_TASK.jsonl`.
    #[arg(long, requires = "output")]
    log_samples: bool,
    /// Go on where an evaluation with the same --output was interrupted.
    #[arg(long, requires = "output")]
    resume: bool,
    /// Read the rows and say what would be asked, and how much memory that takes; the model is not asked.
    #[arg(long)]
    check: bool,
    /// Print what the model is asked about the first row of each task; the model is not asked.
    #[arg(long)]
    print_prompts: bool,
    /// Print the results file instead of tables.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AddBos {
    Auto,
    Yes,
    No,
}

fn parse_limit(text: &str) -> Result<Limit, String> {
    if let Ok(rows) = text.parse::<usize>()
        && rows > 0
    {
        return Ok(Limit::Rows(rows));
    }
    match text.parse::<f64>() {
        Ok(share) if share > 0.0 && share < 1.0 => Ok(Limit::Share(share)),
        _ => Err("a number of rows from 1, or a part of them between 0 and 1".to_owned()),
    }
}

fn parse_batch(text: &str) -> Result<Batching, String> {
    if text == "auto" {
        return Ok(Batching::default());
    }
    match text.parse::<usize>() {
        Ok(remembered) if remembered > 0 => Ok(Batching { remembered, ..Batching::default() }),
        _ => Err("`auto`, or a number of tokens from 1".to_owned()),
    }
}

/// Where the files of a run go.
#[derive(Debug)]
struct Output {
    results: PathBuf,
    /// For everything else.
    folder: PathBuf,
}

impl Output {
    /// An output that cannot be written is reported before the work, not after it.
    fn new(path: &Path) -> Result<Self, Failure> {
        let refuse = |path: &Path, reason: &str| {
            let message = format!("cannot write {}: {reason}", path.display());
            Err(Failure::new(ExitStatus::InvalidInput, message))
        };
        let is_folder = path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/");
        let is_file = path.extension().is_some_and(|extension| extension == "json") && !is_folder;
        let output = if is_file {
            let folder =
                path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !folder.is_dir() {
                return refuse(path, "it needs an existing folder and a file name");
            }
            Self { results: path.to_owned(), folder: folder.to_owned() }
        } else {
            if let Err(error) = fs::create_dir_all(path) {
                return refuse(path, &error.to_string());
            }
            Self { results: path.join("results.json"), folder: path.to_owned() }
        };
        if output.results.is_dir() {
            return refuse(&output.results, "it is a folder");
        }
        match tempfile::tempfile_in(&output.folder) {
            Ok(_) => Ok(output),
            Err(error) => refuse(&output.folder, &error.to_string()),
        }
    }

    fn samples(&self, task: &str) -> PathBuf {
        self.folder.join(format!("samples_{task}.jsonl"))
    }

    /// Of the requests that are answered before there are results.
    fn journal(&self) -> PathBuf {
        self.results.with_extension("journal")
    }

    /// Refuses to replace samples in a folder without these results: another evaluation has written them.
    fn refuse_samples(&self, selection: &Selection) -> Result<(), Failure> {
        let own = self.results.is_file() || self.journal().is_file();
        for path in selection.tasks().map(|task| self.samples(task)) {
            if path.is_dir() || (path.exists() && !own) {
                let message = format!(
                    "{} is there, and does not belong to {}; name another folder with --output, or remove it",
                    path.display(),
                    self.results.display()
                );
                return Err(Failure::new(ExitStatus::InvalidInput, message));
            }
        }
        Ok(())
    }

    fn write(path: &Path, text: &str) -> Result<(), EvaluatorError> {
        // The old file stays until the new one is whole.
        let part = path.with_extension(format!("part-{}", std::process::id()));
        fs::write(&part, text).and_then(|()| fs::rename(&part, path)).map_err(|error| {
            fs::remove_file(&part).ok();
            EvaluatorError::Write { path: path.to_owned(), error }
        })
    }
}

impl Run {
    pub(super) fn run(&self) -> Result<(), Failure> {
        self.compute.run(self)
    }

    /// Refuses flags that have no meaning where only texts are measured.
    fn refuse_for_texts(&self) -> Result<(), Failure> {
        if self.tasks.iter().any(|name| !Self::is_perplexity(name)) {
            return Ok(());
        }
        let given = [
            ("--limit", self.limit.is_some()),
            ("--num-fewshot", self.num_fewshot.is_some()),
            ("--fewshot-split", self.fewshot_split.is_some()),
            ("--log-samples", self.log_samples),
            ("--resume", self.resume),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((flag, _)) => {
                let message = format!(
                    "{flag} means nothing for {PERPLEXITY}; omit it, or name other tasks with --tasks"
                );
                Err(Failure::new(ExitStatus::InvalidInput, message))
            }
        }
    }

    fn is_perplexity(name: &str) -> bool {
        name == PERPLEXITY
    }

    fn selection(&self) -> Result<Selection, Failure> {
        let catalogue = Catalogue::including(&self.include, self.harness_rev.revision()).map_err(failure)?;
        if let Some(suite) = &self.suite {
            return catalogue.select_suite(suite).map_err(failure);
        }
        let names: Vec<String> =
            self.tasks.iter().filter(|name| !Self::is_perplexity(name)).cloned().collect();
        catalogue.select(&names).map_err(failure)
    }

    fn context(&self, most: usize) -> Result<usize, Failure> {
        match self.context {
            None => Ok(most),
            Some(context) if context as usize <= most => Ok(context as usize),
            Some(context) => {
                let message =
                    format!("--context {context} exceeds the model's maximum of {most}; use at most {most}");
                Err(Failure::new(ExitStatus::InvalidInput, message))
            }
        }
    }

    fn settings(&self, context: usize, tokenizer_folder: &Path) -> Result<Settings, Failure> {
        let add_bos = match self.add_bos {
            AddBos::Yes => true,
            AddBos::No => false,
            AddBos::Auto => adds_bos(tokenizer_folder).map_err(failure)?.unwrap_or(true),
        };
        Ok(Settings {
            shots: self.num_fewshot,
            fewshot_split: self.fewshot_split.clone(),
            limit: self.limit,
            context,
            add_bos,
            revision: self.harness_rev.revision(),
            seed: self.seed,
        })
    }

    /// Prints what would be asked.
    fn tell<B: Backend>(&self, subject: &Subject<B>, selection: &Selection) -> Result<(), Failure> {
        let model = &subject.loaded.model;
        let weights = model.format().bytes(model.config().parameters());
        let data = self.data_of(selection)?;
        let evaluation = subject.evaluation(&data, self.batch_tokens);
        let plans = evaluation.plan(selection).map_err(failure)?;
        let tokens = |texts: &Vec<String>| -> usize {
            texts.iter().map(|text| 1 + subject.tokenizer.encode(text).len()).sum()
        };
        let texts = subject.texts.as_ref().map(|texts| (texts.len(), tokens(texts)));
        let memory = || -> Result<u64, Failure> {
            let each = plans.iter().map(|plan| evaluation.memory(plan));
            Ok(each.collect::<Result<Vec<_>, _>>().map_err(failure)?.into_iter().max().unwrap_or(0))
        };
        if self.json {
            let mut told = json!({ "tasks": plans, "weights": weights, "memory": memory()? });
            if let Some((documents, tokens)) = texts {
                told[PERPLEXITY] = json!({ "documents": documents, "tokens": tokens });
            }
            return print(to_json(&told).trim_end());
        }
        if let Some((documents, tokens)) = texts {
            print(&format!("{PERPLEXITY}: {} of {tokens} tokens", counted(documents, "document")))?;
        }
        for TaskPlan { task, prompts, notes, .. } in &plans {
            for note in notes {
                print(&format!("{task}: {note}"))?;
            }
            for (context, continuation) in prompts.iter().filter(|_| self.print_prompts) {
                print(&format!("{task}: {context:?}\n{task}: ... {continuation:?}"))?;
            }
        }
        if !self.check || plans.is_empty() {
            return Ok(());
        }
        let mut rows = table(&["task", "rows", "examples", "requests", "tokens", "read once", "longest"]);
        for plan in &plans {
            let numbers = [plan.rows, plan.shots, plan.requests, plan.tokens, plan.read, plan.longest];
            rows.add_row([plan.task.clone()].into_iter().chain(numbers.map(|number| number.to_string())));
        }
        print(&rows.to_string())?;
        print(&format!(
            "{:.1} MB for the weights, and at most {:.1} MB for what the model remembers and computes at once",
            weights as f64 / 1e6,
            memory()? as f64 / 1e6
        ))
    }

    /// The data sets of tasks, which are looked for where there are tasks.
    fn data_of(&self, selection: &Selection) -> Result<DataSets, Failure> {
        let places: &[String] = if selection.is_empty() { &[] } else { &self.data };
        DataSets::open(places).map_err(failure)
    }

    /// Measures the tasks. What is answered goes to the journal at once.
    #[expect(clippy::print_stderr, reason = "progress stands beside the results on standard output")]
    fn measure_tasks<B: Backend>(
        &self,
        subject: &Subject<B>,
        selection: &Selection,
        output: Option<&Output>,
        journal: &mut Journal,
    ) -> Result<Vec<Outcome>, Failure> {
        if self.resume && journal.is_empty() {
            eprintln!("there is nothing to resume: all requests are asked");
        }
        if let Some(kept) = journal.kept() {
            eprintln!(
                "an evaluation was interrupted here, and --resume is not given: its answers are kept in {}; to go on with them, \
                 stop, give that file its old name, and add --resume",
                kept.display()
            );
        }
        let data = self.data_of(selection)?;
        let mut progress = ProgressBar::hidden();
        let mut on_progress = |event: Progress<'_>| {
            match event {
                Progress::Planned(requests) => progress = bar(requests),
                Progress::Begun { task, notes } => {
                    progress.set_message(task.to_owned());
                    for note in notes {
                        progress.suspend(|| eprintln!("{task}: {note}"));
                    }
                }
                Progress::Answered(requests) => progress.inc(requests as u64),
                Progress::Done { task, samples } => {
                    if let Some(output) = output.filter(|_| self.log_samples) {
                        Output::write(&output.samples(task), &samples)?;
                    }
                }
            }
            Ok(())
        };
        let evaluation = subject.evaluation(&data, self.batch_tokens);
        let outcomes = evaluation.run(selection, journal, &mut on_progress).map_err(failure)?;
        progress.finish_and_clear();
        Ok(outcomes)
    }

    fn measure<B: Backend>(
        &self,
        subject: &Subject<B>,
        selection: &Selection,
        output: Option<&Output>,
    ) -> Result<(), Failure> {
        let Subject { loaded, tokenizer, settings, texts } = subject;
        let mut outcomes = Vec::new();
        // Until all results are written, nobody else may write to it.
        let mut journal = Journal::default();
        if !selection.is_empty() {
            if let Some(output) = output {
                let (device, format) = (kind_of_device(&loaded.model), loaded.model.format().to_string());
                journal = Journal::open(&output.journal(), loaded.digest, &device, &format, self.resume)
                    .map_err(failure)?;
            }
            outcomes = self.measure_tasks(subject, selection, output, &mut journal)?;
        }
        let mut file =
            results_file(&outcomes, description(&self.model, loaded, tokenizer, &self.data, settings));
        if let Some(texts) = texts {
            let found = perplexity(&loaded.model, tokenizer, texts, settings.context).map_err(failure)?;
            if !self.json {
                print(&perplexity_table(&found))?;
            }
            file["results"][PERPLEXITY] = serde_json::to_value(&found).expect("plain data is valid JSON");
        }
        let mean = average(selection, &outcomes);
        if let Some(mean) = mean {
            file["average"] = json!(mean);
        }
        if let Some(output) = output {
            Output::write(&output.results, &to_json(&file)).map_err(failure)?;
            // A whole result needs no journal.
            if !outcomes.is_empty() {
                fs::remove_file(output.journal()).ok();
            }
        }
        drop(journal);
        if self.json {
            return print(to_json(&file).trim_end());
        }
        if !outcomes.is_empty() {
            print(markdown(&outcomes).trim_end())?;
        }
        if let Some(mean) = mean {
            let suite = self.suite.as_deref().unwrap_or_default();
            print(&format!("average of {suite}: {:.2} %\n", 100.0 * mean))?;
            print(beside_published(suite, &self.model, selection, &outcomes).trim_end())?;
        }
        Ok(())
    }
}

/// A model, and what it is measured with.
struct Subject<B: Backend> {
    loaded: LoadedModel<B>,
    tokenizer: Tokenizer,
    settings: Settings,
    /// Of the user, for perplexity.
    texts: Option<Vec<String>>,
}

impl<B: Backend> Subject<B> {
    fn evaluation<'a>(&'a self, data: &'a DataSets, batching: Batching) -> Evaluation<'a, B> {
        let Self { loaded, tokenizer, settings, .. } = self;
        Evaluation { model: &loaded.model, tokenizer, data, settings, batching }
    }
}

/// Answers of requests, shown where there is a terminal.
fn bar(requests: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} requests, {eta} left");
    let bar = ProgressBar::new(requests as u64).with_style(style.expect("the template is valid"));
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}

impl OnDevice for Run {
    fn run<B: Backend>(&self, backend: B) -> Result<(), Failure> {
        let asks = !self.check && !self.print_prompts;
        let output = self.output.as_deref().filter(|_| asks).map(Output::new).transpose()?;
        let selection = self.selection()?;
        if let Some(output) = output.as_ref().filter(|_| self.log_samples) {
            output.refuse_samples(&selection)?;
        }
        let model = model_folder(&self.model).map_err(failure)?;
        let read = adapted(&model, self.adapter.as_deref())?;
        let loaded = LoadedModel::new(&read, backend, self.dtype.format()).map_err(failure)?;
        let of_tokenizer = self.tokenizer.as_deref().unwrap_or_else(|| tokenizer_place(&model));
        let tokenizer = load_tokenizer(of_tokenizer, &loaded).map_err(failure)?;
        let context = self.context(loaded.model.config().max_context_length)?;
        let settings = self.settings(context, of_tokenizer)?;
        let mut texts = None;
        if self.suite.is_none() && self.tasks.iter().any(|name| Self::is_perplexity(name)) {
            self.refuse_for_texts()?;
            let paths: Vec<PathBuf> = self.data.iter().map(PathBuf::from).collect();
            texts = Some(read_texts(&paths, &self.text).map_err(failure)?);
        }
        let subject = Subject { loaded, tokenizer, settings, texts };
        if asks {
            self.measure(&subject, &selection, output.as_ref())
        } else {
            self.tell(&subject, &selection)
        }
    }
}

fn perplexity_table(result: &Perplexity) -> String {
    let mut table = table(&["perplexity", "value"]);
    for (name, value) in [
        ("documents", result.documents.to_string()),
        ("bytes", result.bytes.to_string()),
        ("tokens", result.tokens.to_string()),
        ("loss per token (nats)", format!("{:.4}", result.loss)),
        ("perplexity per token", format!("{:.3}", result.perplexity)),
        ("bits per byte", format!("{:.4}", result.bits_per_byte)),
        ("zstd -19, bits per byte", format!("{:.4}", result.zstd_bits_per_byte)),
    ] {
        table.add_row([name.to_owned(), value]);
    }
    table.to_string()
}
