//! Why a conversation or a row cannot be used.

use ulmus_types::ErrorKind;

/// An error of templates, rows and files of texts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// A template is not in the language of templates.
    #[error(
        "the chat template {template} cannot be used: {reason}; correct it, or set template = \"recipe\""
    )]
    Template {
        /// Where the template is from.
        template: String,
        /// What is wrong, and in which line.
        reason: String,
    },
    /// A template does not take a conversation.
    #[error(
        "the chat template {template} refuses the conversation: {reason}; change the conversation, or use another template"
    )]
    Refused {
        /// Where the template is from.
        template: String,
        /// What the template says, or what failed in it.
        reason: String,
    },
    /// The configuration of a tokenizer cannot be read.
    #[error("{file} is not the configuration of a tokenizer: {reason}; get it again, or name a template")]
    TokenizerConfig {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// The columns of a file are not those of any known form.
    #[error("the columns {columns:?} are {found}; {wanted}")]
    Form {
        /// The columns that are there.
        columns: Vec<String>,
        /// What they are instead.
        found: &'static str,
        /// What to write instead.
        wanted: &'static str,
    },
    /// A value of a row is not what its form says.
    #[error("column {column:?}: {problem}")]
    Column {
        /// The column.
        column: String,
        /// What is there, and what to write instead.
        problem: String,
    },
    /// The recipe cannot tell prompt and answer of a pair apart.
    #[error(
        "the last word of the prompt and the first of the {answer} answer become one token, which tokenization = \"recipe\" \
         cannot divide; begin answers with a space or a new line, or set tokenization = \"chat\""
    )]
    Border {
        /// Which answer.
        answer: &'static str,
    },
    /// A file of forbidden texts has none.
    #[error("it holds no texts; write a JSON list of texts, or one per line, or leave decontaminate out")]
    NoTexts,
    /// A file of forbidden texts is a list of something else.
    #[error("it is not a JSON list of texts ({reason}); write a JSON list of texts, or one per line")]
    NotTexts {
        /// What is wrong.
        reason: String,
    },
}

impl ChatError {
    /// What the caller can do about the error.
    pub const fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidInput
    }
}
