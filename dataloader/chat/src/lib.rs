//! Conversations, instructions and preferences as training examples.
//!
//! A [`Row`] of a data file is recognised by its columns ([`Form`]) and read as a [`Lesson`], whatever form it had. A chat
//! [`Template`] makes [`Texts`] of its conversation, and a tokenizer an [`Example`] or a [`Pair`]: token ids, and which of them
//! are learned. [`Preprocessor`] does all of this for one row, or says why the row is left out ([`Reason`]); [`Renderer`] does it
//! up to the texts.
//!
//! Nothing here reads files or knows the time: what a row becomes depends on the row, the template, the tokenizer and the
//! [`Rules`] alone.

#![forbid(unsafe_code)]

mod bins;
mod encode;
mod error;
mod example;
mod forbidden;
mod form;
mod instruction;
mod lesson;
mod message;
mod preprocess;
mod reason;
mod row;
mod show;
mod template;
mod texts;

pub use bins::bins;
pub use encode::Rules;
pub use error::ChatError;
pub use example::{Example, Pair};
pub use forbidden::Forbidden;
pub use form::Form;
pub use lesson::{Lesson, Turns};
pub use message::Message;
pub use preprocess::{Item, Prepare, Prepared, Preprocessor, Renderer};
pub use reason::Reason;
pub use row::{Cell, Row};
pub use show::{Viewer, show_texts};
pub use template::{RECIPE, Rendered, SpecialNames, Template, TokenizerConfig};
pub use texts::Texts;
pub use ulmus_types::IGNORE;
