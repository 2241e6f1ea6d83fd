//! What a row teaches, the same for all forms of data.

use serde::Serialize;

use crate::error::ChatError;
use crate::form::Form;
use crate::instruction;
use crate::message::{ASSISTANT, Message, USER};
use crate::row::{Cell, Row};

/// A text, or some messages.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Turns {
    /// A text without a conversation around it.
    Text(String),
    /// Messages of a conversation.
    Messages(Vec<Message>),
}

/// What a row teaches.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Lesson {
    /// All that an assistant says in a conversation.
    Conversation {
        /// The conversation.
        messages: Vec<Message>,
    },
    /// A completion of a prompt. Both are texts or both messages.
    Completion {
        /// The prompt.
        prompt: Turns,
        /// What follows it.
        completion: Turns,
    },
    /// A text.
    Text {
        /// The text.
        text: String,
    },
    /// What is to be answered: a text, or messages.
    Prompt {
        /// The prompt.
        prompt: Turns,
    },
    /// Which of two answers is better. All are texts or all messages.
    Preference {
        /// The prompt.
        prompt: Turns,
        /// The better answer.
        chosen: Turns,
        /// The other one.
        rejected: Turns,
    },
}

impl Turns {
    /// Whether there is nothing but blanks in it.
    pub(crate) fn is_blank(&self) -> bool {
        match self {
            Self::Text(text) => text.trim().is_empty(),
            Self::Messages(messages) => messages.iter().all(|message| message.content.trim().is_empty()),
        }
    }

    /// Its texts.
    fn texts(&self) -> Vec<&str> {
        match self {
            Self::Text(text) => vec![text],
            Self::Messages(messages) => messages.iter().map(|message| message.content.as_str()).collect(),
        }
    }
}

impl Lesson {
    /// Reads a row.
    ///
    /// # Errors
    /// [`ChatError::Column`] if a value is missing, or is not what the form says.
    pub fn read(form: Form, row: &Row) -> Result<Self, ChatError> {
        let turns = |column| turns(row, column);
        match form {
            Form::Messages => Ok(Self::Conversation { messages: messages(row, "messages")? }),
            Form::ShareGpt => Ok(Self::Conversation { messages: share_gpt(row)? }),
            Form::Text => Ok(Self::Text { text: text(row, "text")? }),
            Form::Prompts => Ok(Self::Prompt { prompt: turns("prompt")? }),
            Form::Instructions => {
                let input = match row.get("input") {
                    None | Some(Cell::Null) => String::new(),
                    Some(_) => text(row, "input")?,
                };
                let prompt = Turns::Text(instruction::prompt(&text(row, "instruction")?, &input));
                Ok(Self::Completion { prompt, completion: Turns::Text(text(row, "output")?) })
            }
            Form::PromptCompletion => {
                let (prompt, completion) = (turns("prompt")?, turns("completion")?);
                alike(&prompt, &completion, "completion", "prompt")?;
                Ok(Self::Completion { prompt, completion })
            }
            Form::ImplicitPreferences => {
                let (chosen, rejected) = (turns("chosen")?, turns("rejected")?);
                alike(&chosen, &rejected, "rejected", "chosen")?;
                Ok(apart(chosen, rejected))
            }
            Form::Preferences | Form::UltraFeedback | Form::UltraFeedbackCleaned => {
                let (prompt, chosen, rejected) = (turns("prompt")?, turns("chosen")?, turns("rejected")?);
                alike(&chosen, &rejected, "rejected", "chosen")?;
                match (prompt, chosen, rejected) {
                    // A prompt that is text beside conversations repeats what is in them.
                    (Turns::Text(_), Turns::Messages(chosen), Turns::Messages(rejected)) => {
                        Ok(last(chosen, rejected))
                    }
                    (prompt, chosen, rejected) => {
                        alike(&prompt, &chosen, "chosen", "prompt")?;
                        Ok(Self::Preference { prompt, chosen, rejected })
                    }
                }
            }
        }
    }

    /// What is to be answered, without the answers.
    pub(crate) fn prompt(self) -> Self {
        let prompt = match self {
            Self::Conversation { mut messages } => {
                while messages.last().is_some_and(Message::is_of_assistant) {
                    messages.pop();
                }
                Turns::Messages(messages)
            }
            Self::Text { text } => Turns::Text(text),
            Self::Prompt { prompt } | Self::Completion { prompt, .. } | Self::Preference { prompt, .. } => {
                prompt
            }
        };
        Self::Prompt { prompt }
    }

    /// All texts of the row.
    pub(crate) fn texts(&self) -> Vec<&str> {
        match self {
            Self::Conversation { messages } => {
                messages.iter().map(|message| message.content.as_str()).collect()
            }
            Self::Completion { prompt, completion } => [prompt.texts(), completion.texts()].concat(),
            Self::Text { text } => vec![text],
            Self::Prompt { prompt } => prompt.texts(),
            Self::Preference { prompt, chosen, rejected } => {
                [prompt.texts(), chosen.texts(), rejected.texts()].concat()
            }
        }
    }
}

fn wrong(column: &str, problem: impl Into<String>) -> ChatError {
    ChatError::Column { column: column.to_owned(), problem: problem.into() }
}

fn cell<'a>(row: &'a Row, column: &str) -> Result<&'a Cell, ChatError> {
    match row.get(column) {
        None => Err(wrong(column, "it is missing; every row needs it")),
        Some(Cell::Null) => Err(wrong(column, "it is null; give it a value, or leave the row out")),
        Some(cell) => Ok(cell),
    }
}

fn text(row: &Row, column: &str) -> Result<String, ChatError> {
    match cell(row, column)? {
        Cell::Text(text) => Ok(text.clone()),
        other => Err(wrong(column, format!("it is {}, and not text; rewrite it as text", other.kind()))),
    }
}

fn messages_of(column: &str, cells: &[Cell], names: [&str; 2]) -> Result<Vec<Message>, ChatError> {
    if cells.is_empty() {
        return Err(wrong(column, "it has no messages; leave the row out"));
    }
    let message = |(index, cell)| {
        let [role, content] = names;
        Message::of_cell(cell, names).map_err(|problem| {
            wrong(
                column,
                format!(
                    "message {index}: {problem}; a message has a {role:?} and a {content:?}, which are text"
                ),
            )
        })
    };
    cells.iter().enumerate().map(message).collect()
}

fn messages(row: &Row, column: &str) -> Result<Vec<Message>, ChatError> {
    match cell(row, column)? {
        Cell::List(cells) => messages_of(column, cells, ["role", "content"]),
        other => Err(wrong(column, format!("it is {}, and not a list of messages", other.kind()))),
    }
}

/// The conversation of a row of `ShareGPT`, with the usual names of roles.
fn share_gpt(row: &Row) -> Result<Vec<Message>, ChatError> {
    const COLUMN: &str = "conversations";
    let Cell::List(cells) = cell(row, COLUMN)? else {
        return messages(row, COLUMN);
    };
    let mut messages = messages_of(COLUMN, cells, ["from", "value"])?;
    for message in &mut messages {
        match message.role.to_lowercase().as_str() {
            "human" | "user" => USER.clone_into(&mut message.role),
            "gpt" | "chatgpt" | "assistant" | "model" => ASSISTANT.clone_into(&mut message.role),
            _ => {}
        }
    }
    Ok(messages)
}

fn turns(row: &Row, column: &str) -> Result<Turns, ChatError> {
    match cell(row, column)? {
        Cell::Text(text) => Ok(Turns::Text(text.clone())),
        Cell::List(cells) => Ok(Turns::Messages(messages_of(column, cells, ["role", "content"])?)),
        other => {
            Err(wrong(column, format!("it is {}, and neither text nor a list of messages", other.kind())))
        }
    }
}

/// Makes sure that two columns are both texts or both messages.
fn alike(one: &Turns, other: &Turns, column: &str, beside: &str) -> Result<(), ChatError> {
    let name = |turns: &Turns| match turns {
        Turns::Text(_) => "text",
        Turns::Messages(_) => "messages",
    };
    if name(one) == name(other) {
        return Ok(());
    }
    let problem = format!(
        "it is not like {beside:?}: of {:?} and {:?}, both must be one of the two",
        name(one),
        name(other)
    );
    Err(wrong(column, problem))
}

/// Conversations whose last messages are the answers, and all before the last of the better one the prompt.
fn last(mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> Lesson {
    let answer = |messages: &mut Vec<Message>| Turns::Messages(messages.pop().into_iter().collect());
    let answers = [answer(&mut chosen), answer(&mut rejected)];
    let [better, other] = answers;
    Lesson::Preference { prompt: Turns::Messages(chosen), chosen: better, rejected: other }
}

/// Takes what two answers begin with as their prompt: up to the first message that differs, or the first character, without a
/// space before it. Of equal ones, everything before the last is prompt.
fn apart(chosen: Turns, rejected: Turns) -> Lesson {
    match (chosen, rejected) {
        (Turns::Messages(chosen), Turns::Messages(rejected)) => {
            let shared = shared(&chosen, &rejected);
            let rest = |messages: &[Message]| Turns::Messages(messages[shared..].to_vec());
            Lesson::Preference {
                prompt: Turns::Messages(chosen[..shared].to_vec()),
                chosen: rest(&chosen),
                rejected: rest(&rejected),
            }
        }
        (chosen, rejected) => {
            let characters = |turns: &Turns| turns.texts().concat().chars().collect::<Vec<_>>();
            let (chosen, rejected) = (characters(&chosen), characters(&rejected));
            let mut shared = shared(&chosen, &rejected);
            if shared > 0 && chosen[..shared] == rejected[..shared] && chosen[shared - 1] == ' ' {
                shared -= 1;
            }
            let text = |characters: &[char]| Turns::Text(characters.iter().collect());
            Lesson::Preference {
                prompt: text(&chosen[..shared]),
                chosen: text(&chosen[shared..]),
                rejected: text(&rejected[shared..]),
            }
        }
    }
}

/// How many elements two lists begin with that are equal, at most all but the last of the shorter one.
fn shared<T: PartialEq>(one: &[T], other: &[T]) -> usize {
    let equal = one.iter().zip(other).take_while(|(one, other)| one == other).count();
    equal.min(one.len().min(other.len()).saturating_sub(1))
}
