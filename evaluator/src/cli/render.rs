//! `evaluator render`: what a chat template makes of conversations.

use std::io::{self, BufRead, BufWriter, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use clap::Args;
use serde::Serialize;
use ulmus_chat::{ChatError, Example, IGNORE, Message, Rendered};
use ulmus_dataloader::{ChatTemplate, Folder, read_template, without_lone_surrogates};
use ulmus_evaluator::read_tokenizer;
use ulmus_process::{Failure, finish_output};
use ulmus_tokenizer::SpecialEncoder;
use ulmus_types::{ErrorKind, ExitStatus, without_mark};

use super::failure;

#[derive(Debug, Args)]
pub(super) struct Render {
    /// Model folder, of which the tokenizer and its chat template are read.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The chat template: auto (the tokenizer's own, or else the recipe's), recipe, or a file.
    #[arg(long, value_name = "NAME|FILE", default_value = "auto")]
    template: String,
    /// End with what comes before an answer.
    #[arg(long)]
    generation_prompt: bool,
    /// Put an empty system message before conversations that begin with another one, as the published recipe did.
    #[arg(long)]
    empty_system: bool,
    /// Add `assistant_mask`: which ids are the assistant's, as the template marks them with {% generation %}.
    #[arg(long)]
    mask: bool,
}

/// A line of output.
#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Rendered {
        text: String,
        ids: Vec<u32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        assistant_mask: Option<Vec<u8>>,
    },
    Refused {
        error: String,
    },
}

impl Render {
    #[expect(clippy::print_stderr, reason = "a remark stands beside the results on standard output")]
    pub(super) fn run(&self) -> Result<(), Failure> {
        let tokenizer = read_tokenizer(&self.model).map_err(failure)?;
        let folder = Folder::open(&self.model.display().to_string()).map_err(failure)?;
        let chat = read_template(&self.template, &folder, &tokenizer, Some(now())).map_err(failure)?;
        if self.mask && !chat.template.marks_answers() {
            eprintln!(
                "the chat template {} does not mark what the assistant says, so no id counts as its own; to mark it, put \
                 {{% generation %}} and {{% endgeneration %}} around it in a copy, and name that with --template",
                chat.template.name()
            );
        }
        let mut encoder = tokenizer.special_encoder();
        let mut input = io::stdin().lock();
        let mut out = BufWriter::new(io::stdout().lock());
        let mut line = Vec::new();
        for number in 1_u64.. {
            line.clear();
            let read = input.read_until(b'\n', &mut line);
            if read.map_err(|error| Failure::of(ErrorKind::Internal, &error))? == 0 {
                break;
            }
            let messages = messages(without_mark(&line)).map_err(|error| {
                let message = format!("line {number} of the input is not a JSON list of messages: {error}");
                Failure::new(ExitStatus::InvalidInput, message)
            })?;
            let answer = match self.render(&chat, &messages) {
                Ok(rendered) => self.answer(rendered, &mut encoder),
                Err(error) => Answer::Refused { error: error.to_string() },
            };
            let written = serde_json::to_writer(&mut out, &answer).map_err(io::Error::from);
            if let Err(error) = written.and_then(|()| out.write_all(b"\n")) {
                return finish_output(Err(error));
            }
        }
        finish_output(out.flush())
    }

    fn render(&self, chat: &ChatTemplate, messages: &[Message]) -> Result<Rendered, ChatError> {
        let template = &chat.template;
        let messages =
            if self.empty_system { template.with_empty_system(messages) } else { messages.to_vec() };
        template.render(&messages, self.generation_prompt)
    }

    fn answer(&self, rendered: Rendered, encoder: &mut SpecialEncoder) -> Answer {
        let Example { ids, labels } = Example::of_rendered(&rendered, encoder);
        let mask = || labels.iter().map(|label| u8::from(*label != IGNORE)).collect();
        Answer::Rendered { text: rendered.text, ids, assistant_mask: self.mask.then(mask) }
    }
}

#[expect(clippy::disallowed_methods, reason = "a chat template may tell the model today's date")]
pub(super) fn now() -> SystemTime {
    SystemTime::now()
}

fn messages(line: &[u8]) -> serde_json::Result<Vec<Message>> {
    serde_json::from_slice(line).or_else(|error| {
        let mended = without_lone_surrogates(line).ok_or(error)?;
        serde_json::from_slice(&mended)
    })
}
