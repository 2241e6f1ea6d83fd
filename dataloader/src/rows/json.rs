//! Rows of a JSON list, or of lines.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use ulmus_chat::Row;

use super::Rows;
use crate::contents::text_of;
use crate::error::DataError;
use crate::line::without_lone_surrogates;

/// The rows of a file: of a list if it begins with a bracket, or else of lines, where empty lines do not count.
pub(super) fn rows(bytes: &[u8], place: &str) -> Result<Rows, DataError> {
    let wrong = |format, reason| DataError::Format { file: place.to_owned(), format, reason };
    let text = text_of(bytes).map_err(|error| wrong("UTF-8", error.to_string()))?.as_bytes();
    let json = without_lone_surrogates(text).map_or(Cow::Borrowed(text), Cow::Owned);
    if text.trim_ascii_start().starts_with(b"[") {
        let rows: Vec<Row> = read(&json).map_err(|error| wrong("a JSON list of rows", error.to_string()))?;
        return Ok(Box::new(rows.into_iter().map(Ok)));
    }
    let lines = json.split(|byte| *byte == b'\n').enumerate();
    let row = |(index, line): (usize, &[u8])| {
        read::<Row>(line).map_err(|error| {
            if index == 0 && read::<Row>(&json).is_ok() {
                let reason = "it is a single JSON object, where rows are a list or each is a line";
                return wrong("a file of rows", reason.to_owned());
            }
            wrong("JSON lines", format!("line {}: {error}", index + 1))
        })
    };
    let rows: Vec<Row> =
        lines.filter(|(_, line)| !line.trim_ascii().is_empty()).map(row).collect::<Result<_, _>>()?;
    Ok(Box::new(rows.into_iter().map(Ok)))
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
        let rows = rows(text.as_bytes(), "a.json").map_err(|error| error.to_string())?;
        Ok(rows.map(|row| serde_json::to_string(&row.unwrap()).unwrap()).collect())
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
        assert!(written("{}\n{").unwrap_err().contains("line 2"));
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
