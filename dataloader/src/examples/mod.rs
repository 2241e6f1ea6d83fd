//! The examples of a tuning stage: which files hold them, what their rows become, and in which order they are learned.

mod epochs;
mod files;
mod line;
mod read;
mod template;
mod tokenizer;

pub use self::epochs::{Epochs, Update};
pub use self::files::ExampleFiles;
pub use self::line::{RowContent, RowLine, RowPart};
pub use self::read::{Dropped, Examples, ExamplesReport, FileGlance, FileReport, Glance, RowOutcome};
pub use self::template::{
    CHAT_TEMPLATE, ChatTemplate, preprocessor, read_forbidden, read_named, read_template, renderer,
    stage_template, template_files,
};
pub use self::tokenizer::{PlanTokenizer, tokenizer_folder};
