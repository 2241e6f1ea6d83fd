//! What can go wrong in an evaluation.

use std::path::PathBuf;

use ulmus_backend::BackendError;
use ulmus_dataloader::DataError;
use ulmus_model::ModelError;
use ulmus_tokenizer::TokenizerError;
use ulmus_types::ErrorKind;

/// An error of the evaluator crate.
#[derive(Debug, thiserror::Error)]
pub enum EvaluatorError {
    /// The device cannot be used.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The model cannot be read or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The texts or the tokenizer cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A directory does not hold an exported model.
    #[error(
        "{} is not a model folder: {there} no {missing}; name a folder such as runs/NAME/export, or a .pt file of CoreNet",
        path.display()
    )]
    NotAModel {
        /// The directory that was named.
        path: PathBuf,
        /// Whether the directory is there: what stands before "no".
        there: &'static str,
        /// A file that every model folder has.
        missing: &'static str,
    },
    /// A directory does not hold an adapter.
    #[error(
        "{} is not an adapter: it has no adapter_config.json; name a folder in PEFT's layout, such as \
         runs/NAME/tune/STAGE/adapter",
        path.display()
    )]
    NotAnAdapter {
        /// The directory that was named.
        path: PathBuf,
    },
    /// A model comes without a tokenizer, as those of OpenELM do.
    #[error(
        "{} has neither tokenizer.model nor tokenizer.json; get the model's tokenizer (for OpenELM that of \
         meta-llama/Llama-2-7b-hf) and put it there, or name it: with --tokenizer, in a plan with tokenizer.file, or for a model \
         that a stage measures with that stage's tokenizer",
        path.display()
    )]
    NoTokenizer {
        /// The model folder.
        path: PathBuf,
    },
    /// A file is only a Git LFS pointer.
    #[error("{} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository", path.display())]
    Pointer {
        /// The pointer.
        path: PathBuf,
    },
    /// Tokenizer and model do not belong together.
    #[error("the tokenizer in {} does not fit its model: {reason}; use the files of a single export", path.display())]
    Mismatch {
        /// The model folder.
        path: PathBuf,
        /// What differs, with both values.
        reason: String,
    },
    /// No texts can be read from a path.
    #[error("{}: {reason}", path.display())]
    Texts {
        /// The path that was named.
        path: PathBuf,
        /// Why it cannot be read, and what to do about it.
        reason: &'static str,
    },
    /// There is nothing to score.
    #[error("there is no text to evaluate in {0}; name files with at least one document that is not empty")]
    NoText(String),
    /// The definition of a task is wrong.
    #[error("{file}: {problem}")]
    Tasks {
        /// The file of the definition.
        file: String,
        /// What is wrong, and where.
        problem: String,
    },
    /// There is no task of a name.
    #[error("there is no task, group or suite {name}; did you mean {nearest}? `evaluator tasks` lists them")]
    UnknownTask {
        /// The name that was given.
        name: String,
        /// What is there instead.
        nearest: String,
    },
    /// A task is asked for twice, in different ways.
    #[error(
        "{task} is asked for by name and by a group that has its own examples for it; measure them in two runs"
    )]
    TwoWays {
        /// The task.
        task: String,
    },
    /// A task's rows are not where they are looked for.
    #[error("{task} has no rows of split {split}: {problem}")]
    NoRows {
        /// The task.
        task: String,
        /// The split.
        split: String,
        /// Where was looked and what would be found, or what is wrong with the file.
        problem: String,
    },
    /// A data set cannot be copied from the hub.
    #[error("the data set of {task} cannot be fetched: {problem}")]
    NotFetched {
        /// The task.
        task: String,
        /// Where was looked, and what was wrong there.
        problem: String,
    },
    /// A row is not as the task expects it.
    #[error("{task}, row {row} (from 0) of {place}: {problem}")]
    Row {
        /// The task.
        task: String,
        /// Number of the row in its file, from 0.
        row: usize,
        /// The file.
        place: String,
        /// The key of the definition, and what was found.
        problem: String,
    },
    /// The model gives a likelihood that is no number.
    #[error(
        "{task}: the model finds a likelihood that is no finite number; its weights or --dtype are at fault"
    )]
    NotFinite {
        /// The task.
        task: String,
    },
    /// The journal of answered requests cannot be used.
    #[error("{}: {problem}", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A line of the journal of answered requests is not what was written.
    #[error("{}: line {line} is damaged; leave out --resume to begin anew", path.display())]
    DamagedJournal {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// A file of results cannot be written.
    #[error("cannot write {}: {error}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// More examples are asked for than there are.
    #[error(
        "{task} has {have} rows to draw examples from in split {split}, and {wanted} are drawn for each row; use a smaller \
         --num-fewshot (`shots` in a plan)"
    )]
    Shots {
        /// The task.
        task: String,
        /// The split of the examples.
        split: String,
        /// Rows of the split.
        have: usize,
        /// Examples drawn at once.
        wanted: usize,
    },
    /// The model cannot process the lengths of a benchmark.
    #[error(
        "{prompt} prompt tokens and {generate} generated ones cannot be timed with a context of {context}: \
         use --prompt of at least 1, --generate of at least 2, and a sum of at most {context}"
    )]
    Lengths {
        /// Prompt tokens.
        prompt: usize,
        /// Tokens to generate.
        generate: usize,
        /// The model's maximum context length.
        context: usize,
    },
}

impl EvaluatorError {
    /// What the caller can do about the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Backend(error) => error.kind(),
            Self::Model(error) => error.kind(),
            Self::Data(error) => error.kind(),
            Self::Tokenizer(error) => error.kind(),
            Self::Write { .. } => ErrorKind::Disk,
            Self::NotFinite { .. } | Self::DamagedJournal { .. } => ErrorKind::Corrupt,
            _ => ErrorKind::InvalidInput,
        }
    }
}
