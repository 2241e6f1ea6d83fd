//! `evaluator generate --chat`: a conversation in a terminal.

use std::io::{self, BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use ulmus_backend::Backend;
use ulmus_chat::{Example, Message};
use ulmus_dataloader::{ChatTemplate, Folder, read_template};
use ulmus_evaluator::Transcript;
use ulmus_model::{Generator, Model, Sampler};
use ulmus_process::{Failure, finish_output};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{ErrorKind, ExitStatus};

use super::{failure, render};

/// A conversation with a model.
pub(super) struct Chat<'a, B: Backend> {
    pub(super) model: Arc<Model<B>>,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) template: ChatTemplate,
    pub(super) sampler: Sampler,
    /// The most tokens of an answer.
    pub(super) max_tokens: usize,
}

/// The chat template beside a tokenizer, or the one that is named.
pub(super) fn template(choice: &str, folder: &Path, tokenizer: &Tokenizer) -> Result<ChatTemplate, Failure> {
    let folder = Folder::open(&folder.display().to_string()).map_err(failure)?;
    read_template(choice, &folder, tokenizer, Some(render::now())).map_err(failure)
}

impl<B: Backend> Chat<'_, B> {
    /// Answers the message `first`, if there is one, and then each line of the standard input until it ends.
    pub(super) fn run(mut self, system: Option<&str>, first: Option<&str>) -> Result<(), Failure> {
        let mut messages: Vec<Message> =
            system.map(|text| Message::new("system", text)).into_iter().collect();
        let mut next = first.map(str::to_owned);
        let (mut input, mut out) = (io::stdin().lock(), io::stdout().lock());
        let asks = io::stdin().is_terminal();
        let mut written = Ok(());
        while written.is_ok() {
            if next.is_none() && asks {
                written = write!(out, "> ").and_then(|()| out.flush());
            }
            let message = if let Some(message) = next.take() {
                message
            } else {
                let mut line = String::new();
                let read = input.read_line(&mut line);
                if read.map_err(|error| Failure::of(ErrorKind::InvalidInput, &error))? == 0 {
                    break;
                }
                line.trim_end_matches(['\r', '\n']).to_owned()
            };
            if message.trim().is_empty() {
                continue;
            }
            messages.push(Message::new("user", &message));
            let answer;
            (answer, written) = self.answer(&messages, &mut out)?;
            messages.push(Message::new("assistant", &answer));
        }
        finish_output(written)
    }

    /// Generates an answer to the last message and prints it on the way.
    fn answer(
        &mut self,
        messages: &[Message],
        out: &mut impl Write,
    ) -> Result<(String, io::Result<()>), Failure> {
        let rendered = self.template.template.render(messages, true);
        let rendered = rendered.map_err(|error| Failure::new(ExitStatus::InvalidInput, error.to_string()))?;
        let prompt = Example::of_rendered(&rendered, &mut self.tokenizer.special_encoder()).ids;
        if prompt.is_empty() {
            let message = format!(
                "the chat template {} makes no text of the conversation; name another with --template",
                self.template.template.name()
            );
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        let context = self.model.config().max_context_length;
        let room = context.saturating_sub(prompt.len());
        if room == 0 {
            let message = format!(
                "the conversation has {} tokens, and the model a context of {context}; begin a new one",
                prompt.len()
            );
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        let room = room.min(self.max_tokens);
        let mut generator = Generator::new(Arc::clone(&self.model), prompt.len() + room).map_err(failure)?;
        // The answer is a text of its own: it does not go on with the last line of the prompt.
        let mut transcript = Transcript::after(self.tokenizer, &[]);
        let (mut answer, mut written) = (String::new(), Ok(()));
        let eos = self.tokenizer.eos();
        generator
            .generate_with(&mut self.sampler, &prompt, room, Some(eos), |token| {
                let text = transcript.push(token);
                answer.push_str(&text);
                written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
                if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
            .map_err(failure)?;
        let rest = transcript.finish();
        answer.push_str(&rest);
        let written = written.and_then(|()| writeln!(out, "{rest}"));
        Ok((answer, written))
    }
}
