//! Values as Python writes them, where that differs from minijinja.

use std::fmt::Write as _;
use std::io;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// Writes the value of an expression as `str` does.
pub(super) fn write(out: &mut Output, _: &mut State, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => return write_text(out, value.as_str().unwrap_or_default()),
        _ => repr(value)?,
    };
    write_text(out, &text)
}

fn write_text(out: &mut Output, text: &str) -> Result<(), Error> {
    out.write_str(text).map_err(|_| Error::new(ErrorKind::WriteFailure, "the text cannot be written"))
}

/// A value as `repr` writes it.
fn repr(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::String => repr_text(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let items = value.try_iter()?.map(|item| repr(&item)).collect::<Result<Vec<_>, _>>()?;
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let items = value
                .try_iter()?
                .map(|key| Ok(format!("{}: {}", repr(&key)?, repr(&value.get_item(&key)?)?)));
            format!("{{{}}}", items.collect::<Result<Vec<_>, Error>>()?.join(", "))
        }
        _ => value.to_string(),
    })
}

fn repr_text(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut written = String::from(quote);
    for character in text.chars() {
        match character {
            '\n' => written.push_str("\\n"),
            '\r' => written.push_str("\\r"),
            '\t' => written.push_str("\\t"),
            '\\' => written.push_str("\\\\"),
            _ if character == quote => written.extend(['\\', quote]),
            _ if character.is_ascii_control() => _ = write!(written, "\\x{:02x}", u32::from(character)),
            _ => written.push(character),
        }
    }
    written.push(quote);
    written
}

/// The filter `tojson` of transformers: `json.dumps`, by default without escapes of characters beyond ASCII.
pub(super) fn to_json(value: &Value, options: &Kwargs) -> Result<String, Error> {
    let failed =
        |error: &dyn std::fmt::Display| Error::new(ErrorKind::BadSerialization, format!("tojson: {error}"));
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.clone(), key.clone()],
        Some(_) => return Err(failed(&"separators are two texts")),
        None => [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned),
    };
    let formatter = Dumps { indent, item, key, depth: 0, is_empty: true };
    let mut json = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut json, formatter);
    let written = if sorted == Some(true) {
        // The objects of serde_json are sorted by their keys.
        let value = serde_json::to_value(value).map_err(|error| failed(&error))?;
        value.serialize(&mut serializer)
    } else {
        value.serialize(&mut serializer)
    };
    written.map_err(|error| failed(&error))?;
    let json = String::from_utf8(json).map_err(|error| failed(&error))?;
    Ok(if ascii == Some(true) { escaped(&json) } else { json })
}

/// JSON without characters beyond ASCII.
fn escaped(json: &str) -> String {
    let mut written = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_ascii() {
            written.push(character);
        } else {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                _ = write!(written, "\\u{unit:04x}");
            }
        }
    }
    written
}

/// The layout of `json.dumps`.
struct Dumps {
    indent: Option<usize>,
    item: String,
    key: String,
    depth: usize,
    /// Whether the innermost list or object has nothing in it so far.
    is_empty: bool,
}

impl Dumps {
    fn line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => write!(writer, "\n{:1$}", "", indent * self.depth),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: u8) -> io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        writer.write_all(&[bracket])
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: u8) -> io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(&[bracket])
    }

    fn begin_item<W: ?Sized + io::Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }
}

impl Formatter for Dumps {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b'[')
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b']')
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.is_empty = false;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b'{')
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b'}')
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.is_empty = false;
        Ok(())
    }
}
