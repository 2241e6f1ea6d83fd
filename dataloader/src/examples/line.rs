//! A row of a stage as a line of JSON, for people and programs that want to see what is trained on.

use serde::Serialize;
use ulmus_chat::{Example, IGNORE, Item, Prepared};

use super::read::RowOutcome;

/// What a label is where nothing is learned, as the libraries for Python write it.
const NOT_LEARNED: i64 = -100;

/// A row, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RowLine {
    /// The file.
    pub file: String,
    /// Number of the row in its file, from 0.
    pub row: u64,
    /// Whether it is trained on.
    pub kept: bool,
    /// Why it is not.
    pub reason: Option<&'static str>,
    /// What is trained on.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub content: Option<RowContent>,
}

/// What is trained on of a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum RowContent {
    /// A text.
    One(RowPart),
    /// A prompt, and two texts of which each follows it.
    Two {
        /// What both sequences begin with.
        prompt: RowPart,
        /// The better answer.
        chosen: RowPart,
        /// The other one.
        rejected: RowPart,
    },
}

/// A text and its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RowPart {
    /// The text, before anything was cut off.
    pub text: String,
    /// The ids.
    pub ids: Vec<u32>,
    /// For each id, the id again if it is learned, or −100.
    pub labels: Vec<i64>,
}

impl RowPart {
    fn new(text: &str, example: &Example) -> Self {
        let label = |label: &u32| if *label == IGNORE { NOT_LEARNED } else { i64::from(*label) };
        let labels = example.labels.iter().map(label).collect();
        Self { text: text.to_owned(), ids: example.ids.clone(), labels }
    }

    /// A text of which nothing is learned.
    fn of_prompt(text: &str, ids: &[u32]) -> Self {
        Self::new(text, &Example { ids: ids.to_vec(), labels: vec![IGNORE; ids.len()] })
    }
}

impl From<&RowOutcome> for RowLine {
    fn from(RowOutcome { file, row, outcome }: &RowOutcome) -> Self {
        let content = outcome.as_ref().ok().map(RowContent::from);
        let (file, reason) = (file.clone(), outcome.as_ref().err().map(|reason| reason.name()));
        Self { file, row: *row, kept: content.is_some(), reason, content }
    }
}

impl From<&Prepared> for RowContent {
    fn from(Prepared { texts, item, .. }: &Prepared) -> Self {
        let [prompt, chosen, rejected] = texts.parts();
        match item {
            Item::Example(example) => Self::One(RowPart::new(prompt, example)),
            Item::Prompt(ids) => Self::One(RowPart::of_prompt(prompt, ids)),
            Item::Pair(pair) => Self::Two {
                prompt: RowPart::of_prompt(prompt, &pair.prompt),
                chosen: RowPart::new(chosen, &pair.chosen),
                rejected: RowPart::new(rejected, &pair.rejected),
            },
        }
    }
}
