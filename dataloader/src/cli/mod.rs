//! Arguments of the program, with a module for each group of commands.

mod count;
mod examples;
mod explain;
mod inspect;
mod mirror;
mod run;
mod shards;
mod tokens;

use std::path::Path;

use clap::{Parser, Subcommand};
use ulmus_dataloader::DataError;
use ulmus_plan::{DataConfig, ModelConfig, Plan, SourceConfig, even_weights};
use ulmus_process::{Failure, load_plans};
use ulmus_tokenizer::count_pieces;
use ulmus_types::{ErrorKind, ExitStatus};

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong input (the message says what to change), \
                          5 damaged data, 6 no answer in time.";

/// Inspects corpora, and turns texts into tokens and back.
#[derive(Debug, Parser)]
#[command(name = "dataloader", version, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Count the documents, characters and tokens of a plan's sources, and what the filters drop.
    ///
    /// Example: dataloader count --plan pretrain.toml --source pile --json
    Count(count::Count),
    /// Show the files, rows, columns and first text of a plan's sources.
    ///
    /// Example: dataloader inspect --plan pretrain.toml
    Inspect(inspect::Inspect),
    /// Show the exact documents in a training sequence, with file and row.
    ///
    /// Example: dataloader explain --plan pretrain.toml --step 1200 --sequence 17
    Explain(explain::Explain),
    /// Show what a tuning stage learns from its rows: an object per line with file, row, kept, reason, and texts with ids and labels
    /// (-100 where nothing is learned).
    ///
    /// Example: dataloader examples --plan plans/quickstart-tune.toml --stage instruct
    Examples(examples::Examples),
    /// Copy a plan's sources to a store of your own. If interrupted, the same command continues.
    ///
    /// Example: dataloader mirror --plan pretrain.toml --to /mnt/corpora --rate 200MB
    Mirror(mirror::Mirror),
    /// Write the texts of a plan's sources to parquet shards of even size, which can be entered anywhere and shuffled.
    /// If interrupted, the same command continues.
    ///
    /// Example: dataloader pack --plan pretrain.toml --source books --to /mnt/corpora
    Pack(shards::PackShards),
    /// Write the documents of a plan's sources, filtered and tokenized, to shards of token ids. If interrupted, the
    /// same command continues.
    ///
    /// Example: dataloader tokenize --plan pretrain.toml --to /mnt/tokens
    Tokenize(shards::Tokenize),
    /// Turn texts into token ids: reads a JSON string per line, and writes a JSON list per line.
    ///
    /// Example: echo '"Hello"' | dataloader encode --tokenizer tokenizer.model
    Encode(tokens::Encode),
    /// Turn token ids into texts: reads a JSON list per line, and writes a JSON string per line.
    ///
    /// Example: echo '[1, 15043]' | dataloader decode --tokenizer tokenizer.model
    Decode(tokens::Decode),
    /// Normalise texts as a plan does before it tokenizes them: reads and writes a JSON string per line.
    ///
    /// Example: echo '"schÃ¶n &amp; gut"' | dataloader normalize --as ftfy
    Normalize(tokens::Normalize),
}

impl Arguments {
    /// Runs the command that was given.
    pub(crate) fn run(self) -> Result<ExitStatus, Failure> {
        match self.command {
            Command::Count(count) => count.run(),
            Command::Inspect(inspect) => inspect.run(),
            Command::Explain(explain) => explain.run(),
            Command::Examples(examples) => examples.run(),
            Command::Mirror(mirror) => mirror.run(),
            Command::Pack(pack) => pack.run(),
            Command::Tokenize(tokenize) => tokenize.run(),
            Command::Encode(encode) => encode.run(),
            Command::Decode(decode) => decode.run(),
            Command::Normalize(normalize) => normalize.run(),
        }?;
        Ok(ExitStatus::Done)
    }
}

/// The plan in a file. Its sources need no weights here, because they are not mixed.
fn load(plan: &Path, overrides: &[String]) -> Result<Plan, Failure> {
    load_weighted(plan, &with_even_weights(plan, overrides))
}

/// The same of a base of any shape: rows become the same examples for all models.
fn load_of_any_shape(plan: &Path, overrides: &[String]) -> Result<Plan, Failure> {
    load_with(plan, &with_even_weights(plan, overrides), ModelConfig::largest())
}

/// The plan in a file. Variants of a plan share their corpora, so the first one is used.
fn load_weighted(plan: &Path, overrides: &[String]) -> Result<Plan, Failure> {
    load_with(plan, overrides, ModelConfig::default())
}

fn with_even_weights(plan: &Path, overrides: &[String]) -> Vec<String> {
    // A file that cannot be read is reported later.
    let text = std::fs::read_to_string(plan).unwrap_or_default();
    [overrides, &even_weights(&text, overrides)].concat()
}

/// The plan in a file. If it does not say the shape of its model but names a base, it is given this one: no base is read here.
fn load_with(plan: &Path, overrides: &[String], shape: ModelConfig) -> Result<Plan, Failure> {
    let pieces = |file: &str| count_pieces(&std::fs::read(file).ok()?);
    Ok(load_plans(plan, overrides, pieces, |_, _| Ok(shape))?.swap_remove(0))
}

/// Whether a source lies in the folder of the run.
fn is_own(source: &SourceConfig) -> bool {
    source.url.starts_with("run:")
}

/// Refuses sources that a run makes for itself.
fn refuse_own(data: &DataConfig) -> Result<(), Failure> {
    match data.source.iter().find(|source| is_own(source)) {
        Some(source) => {
            let message =
                format!("source {:?} is made by the run itself; name others with --source", source.name);
            Err(wrong(message))
        }
        None => Ok(()),
    }
}

/// Keeps only the sources with these names, or all if no names are given.
fn choose(data: &mut DataConfig, names: &[String]) -> Result<(), Failure> {
    let known: Vec<&str> = data.source.iter().map(|source| source.name.as_str()).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        let message = format!("the plan has no source {name:?}; use one of {known:?}");
        return Err(wrong(message));
    }
    data.source.retain(|source| names.is_empty() || names.contains(&source.name));
    Ok(())
}

fn wrong(message: String) -> Failure {
    Failure::new(ExitStatus::InvalidInput, message)
}

fn unreadable(what: &impl std::fmt::Display) -> Failure {
    Failure::new(ErrorKind::Corrupt.into(), format!("{what}; restore it"))
}

fn failure(error: &DataError) -> Failure {
    Failure::of(error.kind(), error)
}
