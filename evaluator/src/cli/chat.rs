//! `evaluator generate --chat`: a conversation in a terminal.

use std::io::{self, BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::Arc;

use ulmus_backend::Backend;
use ulmus_chat::Message;
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
    pub(super) messages: Vec<Message>,
}

/// The chat template beside a tokenizer, or the one that is named.
pub(super) fn template(choice: &str, folder: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate, Failure> {
    let folder = Folder::open(folder).map_err(failure)?;
    read_template(choice, &folder, tokenizer, Some(render::now())).map_err(failure)
}

impl<B: Backend> Chat<'_, B> {
    /// Answers each line of the standard input, until it ends.
    pub(super) fn run(mut self) -> Result<(), Failure> {
        let (mut input, mut out) = (io::stdin().lock(), io::stdout().lock());
        let asks = io::stdin().is_terminal();
        let mut written = Ok(());
        loop {
            if asks {
                written = written.and_then(|()| write!(out, "> ")).and_then(|()| out.flush());
            }
            let mut line = String::new();
            let read = input.read_line(&mut line).map_err(|error| Failure::of(ErrorKind::InvalidInput, &error))?;
            if read == 0 || written.is_err() {
                return finish_output(written);
            }
            if line.trim().is_empty() {
                continue;
            }
            self.messages.push(Message::new("user", line.trim_end_matches(['\r', '\n'])));
            let answer;
            (answer, written) = self.answer(&mut out)?;
            self.messages.push(Message::new("assistant", &answer));
        }
    }

    /// Generates an answer to the last message and prints it on the way.
    fn answer(&mut self, out: &mut impl Write) -> Result<(String, io::Result<()>), Failure> {
        let rendered = self.template.template.render(&self.messages, true);
        let rendered = rendered.map_err(|error| Failure::new(ExitStatus::InvalidInput, error.to_string()))?;
        let prompt = self.tokenizer.special_encoder().encode(&rendered.text);
        let context = self.model.config().max_context_length;
        let room = context.saturating_sub(prompt.len()).min(self.max_tokens);
        if room == 0 {
            let message = format!(
                "the conversation has {} tokens, and the model a context of {context}; begin a new one",
                prompt.len()
            );
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        let mut generator = Generator::new(Arc::clone(&self.model), prompt.len() + room).map_err(failure)?;
        let mut transcript = Transcript::after(self.tokenizer, &prompt);
        // What the prompt leaves open is not the model's.
        transcript.pending();
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
        Ok((answer.trim_end_matches('\n').to_owned(), written))
    }
}
