//! From a row to an example: form, conversation, texts, ids.

use ulmus_plan::OnUseless;
use ulmus_tokenizer::Tokenizer;

use crate::encode::{Encoding, Rules};
use crate::error::ChatError;
use crate::example::{Example, Pair};
use crate::forbidden::Forbidden;
use crate::form::Form;
use crate::lesson::{Lesson, Turns};
use crate::reason::Reason;
use crate::row::Row;
use crate::template::Template;
use crate::texts::Texts;

/// What a row becomes. It depends on the row alone; each thread uses its own clone.
pub trait Prepare: Clone + Send + Sync {
    /// What a row becomes.
    type Prepared: Send;

    /// The form of a file, by its columns.
    ///
    /// # Errors
    /// [`ChatError::Form`] if the method cannot learn from these columns.
    fn form(&self, columns: &[&str]) -> Result<Form, ChatError>;

    /// What a row of a form becomes, or why it is left out.
    ///
    /// # Errors
    /// When the row has not what its form says, the template refuses its conversation, or the recipe cannot divide it.
    fn prepare(&mut self, form: Form, row: &Row) -> Result<Result<Self::Prepared, Reason>, ChatError>;
}

/// Turns rows into texts, which takes no tokenizer.
#[derive(Debug, Clone)]
pub struct Renderer {
    template: Template,
    rules: Rules,
    forbidden: Option<Forbidden>,
}

/// Turns rows into examples. What it gives depends on the row alone; each thread uses its own.
#[derive(Debug, Clone)]
pub struct Preprocessor {
    renderer: Renderer,
    encoding: Encoding,
}

/// What is trained on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Answers to imitate.
    Example(Example),
    /// A better and another answer.
    Pair(Pair),
    /// What is to be answered.
    Prompt(Vec<u32>),
}

/// A row as it is trained on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Its texts.
    pub texts: Texts,
    /// Its tokens.
    pub item: Item,
    /// Whether the row writes out names of special pieces, which have become these pieces.
    pub has_special: bool,
}

impl Renderer {
    /// A renderer for rows of some rules; those that contain one of the texts of `forbidden` are dropped.
    pub fn new(rules: Rules, template: Template, forbidden: Option<Forbidden>) -> Self {
        Self { template, rules, forbidden }
    }

    /// What a row of a form teaches, or why it is left out.
    fn lesson(&self, form: Form, row: &Row) -> Result<Result<Lesson, Reason>, ChatError> {
        let lesson = Lesson::read(form, row)?;
        if self.forbidden.as_ref().is_some_and(|forbidden| forbidden.is_in(&lesson.texts())) {
            return Ok(Err(Reason::Forbidden));
        }
        let lesson = if self.rules.prompts_only { lesson.prompt() } else { lesson };
        Ok(match Reason::of(&lesson, self.rules.on_useless) {
            Some(reason) => Err(reason),
            None => Ok(lesson),
        })
    }

    /// The texts of a lesson, or why it teaches the wrong thing.
    fn texts(&self, lesson: &Lesson) -> Result<Result<Texts, Reason>, ChatError> {
        let Rules { tokenization, on_useless, .. } = self.rules;
        let texts = Texts::of(lesson, &self.template, tokenization)?;
        if on_useless == OnUseless::Keep {
            return Ok(Ok(texts));
        }
        Ok(if !texts.has_all(lesson) {
            Err(Reason::LeftOut)
        } else if !texts.goes_on(lesson, &self.template, tokenization)? {
            Err(Reason::Rewritten)
        } else {
            Ok(texts)
        })
    }
}

impl Prepare for Renderer {
    type Prepared = Texts;

    fn form(&self, columns: &[&str]) -> Result<Form, ChatError> {
        if self.rules.prompts_only { Form::of_prompts(columns) } else { Form::of(columns, self.rules.method) }
    }

    fn prepare(&mut self, form: Form, row: &Row) -> Result<Result<Texts, Reason>, ChatError> {
        match self.lesson(form, row)? {
            Ok(lesson) => self.texts(&lesson),
            Err(reason) => Ok(Err(reason)),
        }
    }
}

impl Preprocessor {
    /// A preprocessor for examples of some rules. `adds_bos` says whether plain texts begin with BOS; rows that contain one of
    /// the texts of `forbidden` are dropped.
    pub fn new(
        rules: Rules,
        template: Template,
        tokenizer: &Tokenizer,
        adds_bos: bool,
        forbidden: Option<Forbidden>,
    ) -> Self {
        let encoding = Encoding::new(tokenizer, adds_bos, rules);
        Self { renderer: Renderer::new(rules, template, forbidden), encoding }
    }
}

impl Prepare for Preprocessor {
    type Prepared = Prepared;

    fn form(&self, columns: &[&str]) -> Result<Form, ChatError> {
        self.renderer.form(columns)
    }

    fn prepare(&mut self, form: Form, row: &Row) -> Result<Result<Prepared, Reason>, ChatError> {
        let lesson = match self.renderer.lesson(form, row)? {
            Ok(lesson) => lesson,
            Err(reason) => return Ok(Err(reason)),
        };
        let has_special = self.encoding.has_special(&lesson.texts());
        let texts = match self.renderer.texts(&lesson)? {
            Ok(texts) => texts,
            Err(reason) => return Ok(Err(reason)),
        };
        let is_plain = match &lesson {
            Lesson::Conversation { .. } => false,
            Lesson::Text { .. } => true,
            Lesson::Prompt { prompt }
            | Lesson::Completion { prompt, .. }
            | Lesson::Preference { prompt, .. } => {
                matches!(prompt, Turns::Text(_))
            }
        };
        let item = match &texts {
            Texts::One { text, .. } if self.renderer.rules.prompts_only => {
                self.encoding.prompt(text, is_plain).map(Item::Prompt)
            }
            Texts::One { text, answers } => self.encoding.example(text, answers, is_plain).map(Item::Example),
            Texts::Two { prompt, chosen, rejected } => {
                self.encoding.pair([prompt, chosen, rejected], is_plain)?.map(Item::Pair)
            }
        };
        Ok(item.map(|item| Prepared { texts, item, has_special }))
    }
}
