//! The tasks: what a model can be measured on, by name.

use std::sync::Arc;

use serde::Serialize;
use ulmus_backend::Backend;
use ulmus_model::Model;
use ulmus_run::results::Perplexity;
use ulmus_tokenizer::Tokenizer;

use crate::error::EvaluatorError;
use crate::perplexity::perplexity;

/// Something that a model can be measured on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// Perplexity per token and bits per byte of some texts.
    Perplexity,
}

/// What a task finds. It is serialised as the result of the task alone; the task's name stands beside it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum TaskResult {
    /// Of [`Task::Perplexity`].
    Perplexity(Perplexity),
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 1] = [Self::Perplexity];

    /// Its name, on the command line and in result files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Perplexity => "perplexity",
        }
    }

    /// What it measures, for a person.
    pub const fn purpose(self) -> &'static str {
        match self {
            Self::Perplexity => "Perplexity per token and bits per byte of the texts, beside `zstd -19`",
        }
    }

    /// Measures a model, with a context of up to `context` tokens.
    ///
    /// # Errors
    /// Those of the task: of perplexity, that there is no text, or no memory for the context.
    pub fn run<B: Backend>(
        self,
        model: &Arc<Model<B>>,
        tokenizer: &Tokenizer,
        texts: &[String],
        context: usize,
    ) -> Result<TaskResult, EvaluatorError> {
        match self {
            Self::Perplexity => perplexity(model, tokenizer, texts, context).map(TaskResult::Perplexity),
        }
    }
}
