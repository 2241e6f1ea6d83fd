//! Why a row is left out.

use std::fmt;

use ulmus_plan::OnUseless;

use crate::lesson::{Lesson, Turns};
use crate::message::Message;

/// Why a row teaches nothing, or the wrong thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// It contains a text that no row may contain.
    Forbidden,
    /// Chosen and rejected answer are equal.
    Identical,
    /// An answer, or the text, is empty or blank.
    Empty,
    /// An answer does not end with a message of the assistant.
    NoAnswer,
    /// No message stands before the answers.
    NoPrompt,
    /// The prompt alone is as long as an example may be.
    LongPrompt,
    /// The prompt is longer than one may be of which answers are sampled.
    OverMaxPrompt,
    /// An answer alone is as long as an example may be.
    LongAnswer,
    /// The template leaves out what one of its messages says.
    LeftOut,
    /// The template renders the beginning of the conversation in other words when more follows, so that nobody knows what in it the
    /// assistant says.
    Rewritten,
    /// No token of it is learned.
    NothingLearned,
}

impl Reason {
    /// The reason in words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forbidden => "contains a text of decontaminate",
            Self::Identical => "chosen and rejected are equal",
            Self::Empty => "an answer is empty",
            Self::NoAnswer => "an answer does not end with the assistant",
            Self::NoPrompt => "nothing stands before the answer",
            Self::LongPrompt => "the prompt fills max_length",
            Self::OverMaxPrompt => "the prompt is longer than max_prompt",
            Self::LongAnswer => "an answer fills max_length",
            Self::LeftOut => "the template leaves out a message",
            Self::Rewritten => "the template renders its beginning otherwise when more follows",
            Self::NothingLearned => "nothing in it is learned",
        }
    }

    /// Why a lesson is useless, if it is, before it has become tokens. A row without a prompt can never be used.
    pub(crate) fn of(lesson: &Lesson, on_useless: OnUseless) -> Option<Self> {
        let ends_otherwise = |turns: &Turns| match turns {
            Turns::Text(_) => false,
            Turns::Messages(messages) => !messages.last().is_some_and(Message::is_of_assistant),
        };
        let reason = match lesson {
            Lesson::Preference { prompt: Turns::Messages(prompt), .. } if prompt.is_empty() => {
                return Some(Self::NoPrompt);
            }
            Lesson::Prompt { prompt } => return prompt.is_blank().then_some(Self::NoPrompt),
            Lesson::Preference { chosen, rejected, .. } => {
                if chosen == rejected {
                    Some(Self::Identical)
                } else if chosen.is_blank() || rejected.is_blank() {
                    Some(Self::Empty)
                } else {
                    (ends_otherwise(chosen) || ends_otherwise(rejected)).then_some(Self::NoAnswer)
                }
            }
            Lesson::Completion { completion, .. } if completion.is_blank() => Some(Self::Empty),
            Lesson::Completion { completion, .. } => ends_otherwise(completion).then_some(Self::NoAnswer),
            Lesson::Conversation { messages } => {
                let ends_blank = |last: &Message| last.is_of_assistant() && last.content.trim().is_empty();
                messages.last().is_some_and(ends_blank).then_some(Self::Empty)
            }
            Lesson::Text { text } => text.trim().is_empty().then_some(Self::Empty),
        };
        reason.filter(|_| on_useless == OnUseless::Drop)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
