//! Arguments of the program; a module for each group of commands.

mod count;
mod explain;
mod inspect;
mod tokens;

use clap::{Parser, Subcommand};
use ulmus_dataloader::DataError;
use ulmus_rt::Failure;
use ulmus_types::ExitStatus;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong input (the message says what to change), \
                          5 damaged data, 6 nothing answered in time.";

/// Looks at corpora, and turns texts into tokens and back.
#[derive(Debug, Parser)]
#[command(name = "dataloader", version, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Count documents, characters and tokens of a plan's sources, and what the filters drop.
    ///
    /// Example: dataloader count --plan pretrain.toml --source pile --json
    Count(count::Count),
    /// Show files, rows, columns and the first text of a plan's sources.
    ///
    /// Example: dataloader inspect --plan pretrain.toml
    Inspect(inspect::Inspect),
    /// Show the exact documents, with file and row, of a sequence of a step.
    ///
    /// Example: dataloader explain --plan pretrain.toml --step 1200 --sequence 17
    Explain(explain::Explain),
    /// Turn texts into token ids: a JSON string per line to a JSON list per line.
    ///
    /// Example: echo '"Hello"' | dataloader encode --tokenizer tokenizer.model
    Encode(tokens::Encode),
    /// Turn token ids into texts: a JSON list per line to a JSON string per line.
    ///
    /// Example: echo '[1, 15043]' | dataloader decode --tokenizer tokenizer.model
    Decode(tokens::Decode),
    /// Do to texts what a plan does before it tokenizes them: a JSON string per line to the same.
    ///
    /// Example: echo '"schÃ¶n &amp; gut"' | dataloader normalize --as ftfy
    Normalize(tokens::Normalize),
}

impl Arguments {
    /// Does what was asked for.
    pub(crate) fn run(self) -> Result<ExitStatus, Failure> {
        match self.command {
            Command::Count(count) => count.run(),
            Command::Inspect(inspect) => inspect.run(),
            Command::Explain(explain) => explain.run(),
            Command::Encode(encode) => encode.run(),
            Command::Decode(decode) => decode.run(),
            Command::Normalize(normalize) => normalize.run(),
        }?;
        Ok(ExitStatus::Done)
    }
}

fn failure(error: &DataError) -> Failure {
    Failure::of(error.kind(), error)
}
