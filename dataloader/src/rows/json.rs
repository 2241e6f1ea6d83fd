//! Rows of a JSON list, or of lines.

use std::borrow::Cow;
use std::io::BufRead;

use serde::de::DeserializeOwned;
use ulmus_chat::Row;
use ulmus_types::without_mark;

use super::Rows;
use crate::compressed::unreadable;
use crate::contents::text_of;
use crate::error::DataError;
use crate::line::without_lone_surrogates;

/// The rows of a text: of a list if it begins with a bracket, or else of lines, where empty lines do not count.
pub(super) fn rows(text: impl BufRead + Send + 'static, place: String) -> Result<Rows, DataError> {
    let mut lines = Lines { text, place, number: 0 };
    let Some(first) = lines.next()? else { return Ok(Box::new(std::iter::empty())) };
    if without_mark(&first).trim_ascii_start().starts_with(b"[") {
        let list = lines.with_rest(first)?;
        let list = lines.text_of(&list, None)?;
        let rows: Vec<Row> =
            read(&list).map_err(|error| lines.wrong("a JSON list of rows", error.to_string()))?;
        return Ok(Box::new(rows.into_iter().map(Ok)));
    }
    let row = lines.row(&first);
    if row.is_err() {
        let all = lines.with_rest(first)?;
        if lines.text_of(&all, None).is_ok_and(|all| read::<Row>(&all).is_ok()) {
            let reason = "it is a single JSON object, where rows are a list or each is a line";
            return Err(lines.wrong("a file of rows", reason.to_owned()));
        }
    }
    let others = std::iter::from_fn(move || match lines.next() {
        Ok(line) => line.map(|line| lines.row(&line)),
        Err(error) => Some(Err(error)),
    });
    Ok(Box::new(std::iter::once(row).chain(others)))
}

/// The lines of a text that are not blank.
struct Lines<R> {
    text: R,
    place: String,
    /// Number of lines that were read.
    number: usize,
}

impl<R: BufRead> Lines<R> {
    fn next(&mut self) -> Result<Option<Vec<u8>>, DataError> {
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = self.text.read_until(b'\n', &mut line);
            if read.map_err(|error| unreadable(&self.place, error))? == 0 {
                return Ok(None);
            }
            self.number += 1;
            if !without_mark(&line).trim_ascii().is_empty() {
                return Ok(Some(line));
            }
        }
    }

    /// A line and everything behind it.
    fn with_rest(&mut self, mut line: Vec<u8>) -> Result<Vec<u8>, DataError> {
        self.text.read_to_end(&mut line).map_err(|error| unreadable(&self.place, error))?;
        Ok(line)
    }

    /// The row in the line that was read last.
    fn row(&self, line: &[u8]) -> Result<Row, DataError> {
        let json = self.text_of(line, Some(self.number))?;
        read(&json).map_err(|error| self.wrong("JSON lines", format!("line {}: {error}", self.number)))
    }

    /// Bytes as UTF-8 that JSON can be read from; of one line, or of the whole file.
    fn text_of<'a>(&self, bytes: &'a [u8], line: Option<usize>) -> Result<Cow<'a, [u8]>, DataError> {
        let text = text_of(bytes).map_err(|error| {
            let place = line.map_or_else(String::new, |line| format!("line {line}: "));
            self.wrong("UTF-8", format!("{place}{error}"))
        })?;
        Ok(without_lone_surrogates(text.as_bytes()).map_or(Cow::Borrowed(text.as_bytes()), Cow::Owned))
    }

    fn wrong(&self, format: &'static str, reason: String) -> DataError {
        DataError::Format { file: self.place.clone(), format, reason }
    }
}

/// Reads JSON, also as Python's library writes it: with numbers that are none, which become null.
fn read<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(json)
        .or_else(|error| serde_json::from_slice(&without_odd_numbers(json)).map_err(|_| error))
}

/// JSON in which `NaN`, `Infinity` and `-Infinity` have become null.
fn without_odd_numbers(json: &[u8]) -> Vec<u8> {
    const ODD: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
    let mut written = Vec::with_capacity(json.len());
    let (mut at, mut is_text) = (0, false);
    while at < json.len() {
        let rest = &json[at..];
        let odd = ODD.iter().find(|odd| !is_text && rest.starts_with(odd));
        let (length, becomes) = match (odd, rest[0]) {
            (Some(odd), _) => (odd.len(), &b"null"[..]),
            (None, b'\\') => (2.min(rest.len()), &rest[..2.min(rest.len())]),
            (None, byte) => {
                is_text ^= byte == b'"';
                (1, &rest[..1])
            }
        };
        written.extend_from_slice(becomes);
        at += length;
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> Result<Vec<String>, String> {
        let text = std::io::Cursor::new(text.to_owned());
        let rows = rows(text, "a.json".to_owned()).map_err(|error| error.to_string())?;
        rows.map(|row| Ok(serde_json::to_string(&row.map_err(|error| error.to_string())?).unwrap())).collect()
    }

    #[test]
    fn rows_of_json_keep_the_order_of_their_keys() {
        for text in [
            "[{\"b\": 1, \"a\": [\"x\"]}]",
            "\u{feff}\n{\"b\": 1, \"a\": [\"x\"]}\n",
            "\r\n{\"b\": 1, \"a\": [\"x\"]}\r\n",
        ] {
            assert_eq!(written(text).unwrap(), ["{\"b\":1,\"a\":[\"x\"]}"], "{text}");
        }
        assert!(written("{}\n\n{").unwrap_err().contains("line 3"));
        assert!(written("{\n{}").unwrap_err().contains("line 1"));
        assert!(written("{\n\"a\": 1\n}").unwrap_err().contains("a single JSON object"));
        assert!(written("[1]").unwrap_err().contains("a row is an object"));
    }

    #[test]
    fn what_python_writes_is_read() {
        let text = r#"{"a": NaN, "b": [-Infinity, Infinity], "c": "NaN \" NaN", "d": "half \ud83d"}"#;
        let read = "{\"a\":null,\"b\":[null,null],\"c\":\"NaN \\\" NaN\",\"d\":\"half \u{fffd}\"}";
        assert_eq!(written(text).unwrap(), [read]);
        assert_eq!(written(&format!("[{text}]")).unwrap(), [read]);
        assert!(written("{\"a\": NaNa}").is_err());
    }
}
