//! A row of a data file, in whatever format the file is: columns in their order, with values as JSON has them.

use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A row: the names of its columns, and their values.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row(pub Vec<(String, Cell)>);

/// A value in a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// No value.
    Null,
    /// True or false.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// An integer that is too large for [`Self::Int`].
    Large(u64),
    /// Any other number.
    Float(f64),
    /// A text.
    Text(String),
    /// Bytes that are not text.
    Bytes(Vec<u8>),
    /// Values in order.
    List(Vec<Cell>),
    /// Values with names, in order.
    Struct(Vec<(String, Cell)>),
}

impl Row {
    /// The value of a column; `None` if there is no such column. Of several, the last one counts, as in JSON.
    pub fn get(&self, column: &str) -> Option<&Cell> {
        field(&self.0, column)
    }

    /// The names of the columns.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }
}

/// The value of a name.
pub(crate) fn field<'a>(fields: &'a [(String, Cell)], name: &str) -> Option<&'a Cell> {
    fields.iter().rev().find(|(other, _)| other == name).map(|(_, cell)| cell)
}

impl Cell {
    /// What the value is, for messages.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Int(_) | Self::Large(_) | Self::Float(_) => "a number",
            Self::Text(_) => "text",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "a list",
            Self::Struct(_) => "a struct",
        }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u64> for Cell {
    fn from(number: u64) -> Self {
        i64::try_from(number).map_or(Self::Large(number), Self::Int)
    }
}

fn serialize_fields<S: Serializer>(fields: &[(String, Cell)], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(fields.len()))?;
    fields.iter().try_for_each(|(name, cell)| map.serialize_entry(name, cell))?;
    map.end()
}

impl Serialize for Row {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_fields(&self.0, serializer)
    }
}

impl Serialize for Cell {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
            Self::Large(value) => serializer.serialize_u64(*value),
            Self::Float(value) => serializer.serialize_f64(*value),
            Self::Text(text) => serializer.serialize_str(text),
            Self::Bytes(bytes) => serializer.serialize_bytes(bytes),
            Self::List(cells) => {
                let mut list = serializer.serialize_seq(Some(cells.len()))?;
                cells.iter().try_for_each(|cell| list.serialize_element(cell))?;
                list.end()
            }
            Self::Struct(fields) => serialize_fields(fields, serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Cell::deserialize(deserializer)? {
            Cell::Struct(fields) => Ok(Self(fields)),
            other => {
                let problem = format!("a row is an object with columns, and this is {}", other.kind());
                Err(serde::de::Error::custom(problem))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CellVisitor)
    }
}

struct CellVisitor;

impl<'de> Visitor<'de> for CellVisitor {
    type Value = Cell;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value of JSON")
    }

    fn visit_unit<E>(self) -> Result<Cell, E> {
        Ok(Cell::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Cell, E> {
        Ok(Cell::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Cell, E> {
        Ok(Cell::Int(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Cell, E> {
        Ok(Cell::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Cell, E> {
        Ok(Cell::Float(value))
    }

    fn visit_str<E>(self, text: &str) -> Result<Cell, E> {
        Ok(Cell::from(text))
    }

    fn visit_string<E>(self, text: String) -> Result<Cell, E> {
        Ok(Cell::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Cell, A::Error> {
        let mut cells = Vec::new();
        while let Some(cell) = list.next_element()? {
            cells.push(cell);
        }
        Ok(Cell::List(cells))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Cell, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Cell::Struct(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_read_and_written_in_its_order() {
        let text = r#"{"b":[1,-2,18446744073709551615,0.5,null,true],"a":{"z":"x","y":[]}}"#;
        let row: Row = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&row).unwrap(), text);
        assert_eq!(row.columns().collect::<Vec<_>>(), ["b", "a"]);
        let again: Row = serde_json::from_str(r#"{"a": 1, "a": 2}"#).unwrap();
        assert_eq!(again.get("a"), Some(&Cell::Int(2)));
        let message = serde_json::from_str::<Row>("[1]").unwrap_err().to_string();
        assert!(message.contains("this is a list"), "{message}");
    }
}
