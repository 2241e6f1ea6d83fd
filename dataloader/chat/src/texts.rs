//! The texts of a lesson: conversations go through a template, and texts stay as they are.

use std::ops::Range;

use ulmus_plan::Tokenization;

use crate::error::ChatError;
use crate::lesson::{Lesson, Turns};
use crate::message::Message;
use crate::template::Template;

/// The texts of a lesson.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Texts {
    /// One text.
    One {
        /// The text.
        text: String,
        /// The parts of it that are answers, as ranges of bytes, in order.
        answers: Vec<Range<usize>>,
    },
    /// Two answers to a prompt.
    Two {
        /// The prompt.
        prompt: String,
        /// The prompt with the better answer.
        chosen: String,
        /// The prompt with the other answer.
        rejected: String,
    },
}

impl Texts {
    /// The texts of a lesson, whose conversations `template` renders: with the generation prompt as a part of the prompt or,
    /// as in the recipe, with an empty system message and each answer rendered by itself.
    ///
    /// # Errors
    /// When the template refuses a conversation.
    pub fn of(lesson: &Lesson, template: &Template, tokenization: Tokenization) -> Result<Self, ChatError> {
        let scribe = Scribe { template, tokenization };
        match lesson {
            Lesson::Text { text } => {
                let whole = 0..text.len();
                Ok(Self::One { text: text.clone(), answers: vec![whole] })
            }
            Lesson::Conversation { messages } => scribe.conversation(messages),
            Lesson::Prompt { prompt } => {
                let text = match prompt {
                    Turns::Text(text) => text.clone(),
                    Turns::Messages(messages) => scribe.prompt(&scribe.complete(messages))?,
                };
                Ok(Self::One { text, answers: Vec::new() })
            }
            Lesson::Completion { prompt, completion } => {
                let (prompt, text) = scribe.answered(prompt, completion)?;
                let answer = shared(&prompt, &text)..text.len();
                Ok(Self::One { text, answers: vec![answer] })
            }
            Lesson::Preference { prompt, chosen, rejected } => {
                let (_, chosen) = scribe.answered(prompt, chosen)?;
                let (prompt, rejected) = scribe.answered(prompt, rejected)?;
                Ok(Self::Two { prompt, chosen, rejected })
            }
        }
    }

    /// Whether what every message of a conversation says is in it.
    pub(crate) fn has_all(&self, lesson: &Lesson) -> bool {
        let (Self::One { text, .. }, Lesson::Conversation { messages }) = (self, lesson) else { return true };
        messages.iter().all(|message| text.contains(message.content.trim()))
    }

    /// Whether the template renders a conversation up to each answer as it does in the whole, or marks the answers itself.
    ///
    /// # Errors
    /// When the template refuses a part of the conversation.
    pub(crate) fn goes_on(
        &self,
        lesson: &Lesson,
        template: &Template,
        tokenization: Tokenization,
    ) -> Result<bool, ChatError> {
        let (Self::One { text, .. }, Lesson::Conversation { messages }) = (self, lesson) else {
            return Ok(true);
        };
        if template.marks_answers() && tokenization == Tokenization::Chat {
            return Ok(true);
        }
        let messages = Scribe { template, tokenization }.complete(messages);
        for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.is_of_assistant()) {
            for part in [&messages[..index], &messages[..=index]] {
                // Blanks at the end of a part may go when more follows.
                if !part.is_empty() && !text.starts_with(template.render(part, false)?.text.trim_end()) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The prompt and what follows it in each of the two answers; of one text, the text and nothing.
    pub fn parts(&self) -> [&str; 3] {
        match self {
            Self::One { text, .. } => [text, "", ""],
            Self::Two { prompt, chosen, rejected } => {
                [prompt, &chosen[shared(prompt, chosen)..], &rejected[shared(prompt, rejected)..]]
            }
        }
    }
}

struct Scribe<'a> {
    template: &'a Template,
    tokenization: Tokenization,
}

impl Scribe<'_> {
    /// The messages as they go to the template.
    fn complete(&self, messages: &[Message]) -> Vec<Message> {
        match self.tokenization {
            Tokenization::Chat => messages.to_vec(),
            Tokenization::Recipe => self.template.with_empty_system(messages),
        }
    }

    /// The text before an answer.
    fn prompt(&self, messages: &[Message]) -> Result<String, ChatError> {
        let generation_prompt = self.tokenization == Tokenization::Chat;
        Ok(self.template.render(messages, generation_prompt)?.text)
    }

    /// A prompt, and the prompt with an answer.
    fn answered(&self, prompt: &Turns, answer: &Turns) -> Result<(String, String), ChatError> {
        match (prompt, answer) {
            (Turns::Messages(prompt), Turns::Messages(answer)) => {
                let messages = self.complete(prompt);
                let prompt = self.prompt(&messages)?;
                let whole = match self.tokenization {
                    Tokenization::Chat => {
                        self.template.render(&[&messages[..], answer].concat(), false)?.text
                    }
                    Tokenization::Recipe => prompt.clone() + &self.template.render(answer, false)?.text,
                };
                Ok((prompt, whole))
            }
            (prompt, answer) => {
                let text = |turns: &Turns| match turns {
                    Turns::Text(text) => text.clone(),
                    Turns::Messages(messages) => {
                        messages.iter().map(|message| message.content.as_str()).collect()
                    }
                };
                let prompt = text(prompt);
                let whole = prompt.clone() + &text(answer);
                Ok((prompt, whole))
            }
        }
    }

    /// A conversation and what the assistant says in it: what the template marks, or else what each of its messages adds.
    fn conversation(&self, messages: &[Message]) -> Result<Texts, ChatError> {
        let messages = self.complete(messages);
        let rendered = self.template.render(&messages, false)?;
        let text = rendered.text;
        if self.template.marks_answers() && self.tokenization == Tokenization::Chat {
            return Ok(Texts::One { text, answers: rendered.answers });
        }
        let mut answers: Vec<Range<usize>> = Vec::new();
        for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.is_of_assistant()) {
            let before = if index == 0 { String::new() } else { self.prompt(&messages[..index])? };
            let through = self.template.render(&messages[..=index], false)?.text;
            let begin = shared(&before, &text);
            answers.push(begin..shared(&through, &text).max(begin));
        }
        Ok(Texts::One { text, answers })
    }
}

/// Number of bytes that two texts begin with and share, at the border of a character.
fn shared(one: &str, other: &str) -> usize {
    let equal = one.chars().zip(other.chars()).take_while(|(one, other)| one == other);
    equal.map(|(character, _)| character.len_utf8()).sum()
}
