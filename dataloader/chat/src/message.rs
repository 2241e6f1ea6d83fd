//! Messages of a conversation.

use serde::{Deserialize, Serialize};

use crate::row::{Cell, field};

/// Who speaks where the rest of a prompt does.
pub(crate) const SYSTEM: &str = "system";
/// Who speaks where a person does.
pub(crate) const USER: &str = "user";
/// Who speaks where the model does: what is trained on.
pub(crate) const ASSISTANT: &str = "assistant";

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or another role that the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Whatever else the message has, for templates that use it.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A message with a role and a content alone.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned(), more: serde_json::Map::new() }
    }

    pub(crate) fn is_of_assistant(&self) -> bool {
        self.role == ASSISTANT
    }

    /// A message from a row, whose role and content have some names. A content in parts is joined if all parts are text.
    ///
    /// # Errors
    /// What is wrong.
    pub(crate) fn of_cell(cell: &Cell, [role, content]: [&str; 2]) -> Result<Self, String> {
        let Cell::Struct(fields) = cell else {
            return Err(format!("it is {}, and not an object with {role:?} and {content:?}", cell.kind()));
        };
        let text = |name: &str| match field(fields, name) {
            Some(Cell::Text(text)) => Ok(text.clone()),
            Some(Cell::List(parts)) if name == content => joined(parts),
            Some(other) => Err(format!("its {name:?} is {}, and not text", other.kind())),
            None => {
                let there: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
                Err(format!("it has no {name:?} but {there:?}"))
            }
        };
        let more =
            fields.iter().filter(|(name, cell)| name != role && name != content && *cell != Cell::Null);
        let more = more.map(|(name, cell)| {
            (name.clone(), serde_json::to_value(cell).expect("names are text, and numbers finite or null"))
        });
        Ok(Self { role: text(role)?, content: text(content)?, more: more.collect() })
    }
}

/// The text of a content in parts: `[{"type": "text", "text": …}, …]`.
fn joined(parts: &[Cell]) -> Result<String, String> {
    let text = |part: &Cell| match part {
        Cell::Text(text) => Ok(text.clone()),
        Cell::Struct(fields) => match (field(fields, "type"), field(fields, "text")) {
            (Some(Cell::Text(kind)), Some(Cell::Text(text))) if kind == "text" => Ok(text.clone()),
            (Some(Cell::Text(kind)), _) if kind != "text" => {
                Err(format!("a part of its content is of type {kind:?}, and not text"))
            }
            _ => Err("a part of its content has no text".to_owned()),
        },
        other => Err(format!("a part of its content is {}, and not text", other.kind())),
    };
    parts.iter().map(text).collect()
}
