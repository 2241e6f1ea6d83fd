//! Rows of a JSON list, or of lines.

use std::borrow::Cow;

use ulmus_chat::Row;

use super::Rows;
use crate::contents::text_of;
use crate::error::DataError;
use crate::line::without_lone_surrogates;

/// The rows of a file: of a list if it begins with a bracket, or else of lines, where empty lines do not count.
pub(super) fn rows(bytes: &[u8], place: &str) -> Result<Rows, DataError> {
    let wrong = |format, reason| DataError::Format { file: place.to_owned(), format, reason };
    let text = text_of(bytes).map_err(|error| wrong("UTF-8", error.to_string()))?;
    let mended = without_lone_surrogates(text.as_bytes()).map_or(Cow::Borrowed(text.as_bytes()), Cow::Owned);
    if text.trim_start().starts_with('[') {
        let rows: Vec<Row> = serde_json::from_slice(&mended)
            .map_err(|error| wrong("a JSON list of rows", error.to_string()))?;
        return Ok(Box::new(rows.into_iter().map(Ok)));
    }
    let lines = mended.split(|byte| *byte == b'\n').enumerate();
    let read = |(index, line): (usize, &[u8])| {
        serde_json::from_slice::<Row>(line).map_err(|error| {
            if index == 0 && serde_json::from_slice::<Row>(&mended).is_ok() {
                return wrong(
                    "a file of rows",
                    "it is a single JSON object, where rows are a list or each is a line".to_owned(),
                );
            }
            wrong("JSON lines", format!("line {}: {error}", index + 1))
        })
    };
    let rows: Vec<Row> =
        lines.filter(|(_, line)| !line.trim_ascii().is_empty()).map(read).collect::<Result<_, _>>()?;
    Ok(Box::new(rows.into_iter().map(Ok)))
}
