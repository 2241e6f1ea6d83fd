//! Arrow's IPC format: streams, as the library `datasets` keeps them on disk, and files. A file is a stream between its mark and
//! its table of contents, so both are read from the beginning, batch by batch.

mod cells;
mod messages;
mod texts;

use std::io::BufRead;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow_array::RecordBatch;
use arrow_ipc::reader::StreamReader;
use arrow_schema::{ArrowError, SchemaRef};
use bytes::Bytes;

use crate::compressed::{skip_zeros, unreadable};
use crate::error::DataError;

pub(crate) use self::cells::row;
use self::messages::Messages;
pub(crate) use self::texts::ArrowTexts;

/// What a file begins with, before zeros up to an offset that writers choose, and ends with, after the length of its table of
/// contents.
const MARK: &[u8; 6] = b"ARROW1";

/// Where the stream ends that is stored in `size` bytes, which begin with `begin`: of a file, before its table of contents.
/// `read` reads a range of them.
pub(crate) fn stream_end(
    size: u64,
    begin: &[u8],
    place: &str,
    read: impl FnOnce(Range<u64>) -> Result<Bytes, DataError>,
) -> Result<u64, DataError> {
    if !begin.starts_with(MARK) {
        return Ok(size);
    }
    let length_at = size.saturating_sub(4 + MARK.len() as u64);
    let last = read(length_at..size)?;
    let length = last.split_first_chunk().filter(|(_, mark)| mark == MARK).map(|(length, _)| *length);
    let length = length.and_then(|length| u64::try_from(i32::from_le_bytes(length)).ok());
    let end = length.and_then(|length| length_at.checked_sub(length));
    end.ok_or_else(|| damaged(place, "its end is missing: there is no table of contents".to_owned()))
}

/// The batches of a file or a stream.
pub(crate) struct Batches<R> {
    reader: StreamReader<Messages<R>>,
    place: String,
    number: usize,
}

impl<R: BufRead> Batches<R> {
    /// Reads the schema of a stream that ends at offset `end` of `stored`.
    pub(crate) fn open(stored: R, end: u64, place: String) -> Result<Self, DataError> {
        let mut stored = stored.take(end);
        let begin = stored.fill_buf().map_err(|error| unreadable(&place, error))?;
        if begin.starts_with(MARK) {
            stored.consume(MARK.len());
            skip_zeros(&mut stored).map_err(|error| unreadable(&place, error))?;
        }
        let messages = Messages::new(stored, place.clone());
        // The decoder panics on some damaged files. Nothing that it was working on is used afterwards.
        match catch_unwind(AssertUnwindSafe(|| StreamReader::try_new(messages, None))) {
            Ok(Ok(reader)) => Ok(Self { reader, place, number: 0 }),
            Ok(Err(error)) => Err(of_store(error).unwrap_or_else(|reason| DataError::Format {
                file: place,
                format: "Arrow",
                reason,
            })),
            Err(_) => Err(damaged(&place, "its schema is damaged".to_owned())),
        }
    }

    /// The columns and their types.
    pub(crate) fn schema(&self) -> SchemaRef {
        self.reader.schema()
    }

    /// Where the file lies, for messages.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    /// The next batch.
    pub(crate) fn next(&mut self) -> Result<Option<RecordBatch>, DataError> {
        let number = self.number;
        self.number += 1;
        match catch_unwind(AssertUnwindSafe(|| self.reader.next().transpose())) {
            Ok(Ok(batch)) => Ok(batch),
            Ok(Err(error)) => Err(of_store(error)
                .unwrap_or_else(|reason| damaged(&self.place, format!("record batch {number}: {reason}")))),
            Err(_) => Err(damaged(&self.place, format!("record batch {number} is not valid"))),
        }
    }
}

fn damaged(place: &str, reason: String) -> DataError {
    DataError::Damaged { file: place.to_owned(), reason }
}

/// The error of the store behind one of the decoder, or else the decoder's reason.
fn of_store(error: ArrowError) -> Result<DataError, String> {
    match error {
        ArrowError::IoError(reason, error) => error.downcast::<DataError>().map_err(|_| reason),
        error => Err(error.to_string()),
    }
}

/// The columns and their types, for people.
pub(crate) fn schema_for_people(schema: &SchemaRef) -> String {
    let columns = schema.fields().iter().map(|field| format!("{}: {}", field.name(), field.data_type()));
    columns.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, StringArray};
    use arrow_ipc::writer::{FileWriter, StreamWriter};
    use serde_json::json;
    use ulmus_plan::Format;
    use ulmus_storage::FileInfo;

    use super::*;
    use crate::rows::RowFile;
    use crate::store::Folder;
    use crate::store::tests::{memory, stat};

    fn file_of(bytes: Vec<u8>) -> (Folder, FileInfo) {
        let folder = memory();
        folder.write("a.arrow", bytes).unwrap();
        let info = stat(&folder, "a.arrow");
        (folder, info)
    }

    /// A file that pyarrow has written.
    fn golden(name: &str) -> Vec<u8> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tune/arrow");
        std::fs::read(std::path::Path::new(folder).join(name)).unwrap()
    }

    fn rows(bytes: Vec<u8>) -> Result<Vec<serde_json::Value>, DataError> {
        let (folder, info) = file_of(bytes);
        let rows = RowFile::open(&folder, &info, Format::Arrow)?.0.rows;
        rows.map(|row| Ok(serde_json::to_value(row?).unwrap())).collect()
    }

    fn texts(bytes: Vec<u8>, column: &str) -> Result<Vec<(u64, String)>, DataError> {
        let (folder, info) = file_of(bytes);
        let mut texts = ArrowTexts::open(&folder, &info, column, u64::MAX, 0)?;
        Ok(texts.next()?.unwrap_or_default())
    }

    #[test]
    fn values_of_every_kind_are_read() {
        let expected = [
            json!({"text": "one", "kind": "a", "score": 1.5, "count": 1, "when": 0, "deep": {"text": "x", "list": [1, 2]},
                "bytes": [255], "map": {"k": 1}, "none": null}),
            json!({"text": "", "kind": "b", "score": null, "count": 9_223_372_036_854_775_808_u64, "when": 1, "deep": null,
                "bytes": "ok", "map": {}, "none": null}),
            json!({"text": null, "kind": "a", "score": -2.0, "count": 3, "when": null, "deep": {"text": null, "list": []},
                "bytes": null, "map": null, "none": null}),
            json!({"text": "zw\u{f6}lf", "kind": null, "score": 0.25, "count": null, "when": 1_700_000_000_000_i64,
                "deep": {"text": "y", "list": null}, "bytes": "", "map": {"l": null}, "none": null}),
        ];
        assert_eq!(rows(golden("kinds.arrow")).unwrap(), expected);
        let numbered = |texts: &[(u64, &str)]| -> Vec<(u64, String)> {
            texts.iter().map(|(row, text)| (*row, (*text).to_owned())).collect()
        };
        let read = |column: &str| texts(golden("kinds.arrow"), column);
        assert_eq!(read("text").unwrap(), numbered(&[(0, "one"), (1, ""), (3, "zw\u{f6}lf")]));
        assert_eq!(read("kind").unwrap(), numbered(&[(0, "a"), (1, "b"), (2, "a")]));
        assert_eq!(read("deep.text").unwrap(), numbered(&[(0, "x"), (3, "y")]));
        assert_eq!(read("none").unwrap(), []);
        for (column, words) in [
            ("score", "column \"score\" of run:a.arrow holds Float32, not text"),
            ("deep.list", "not text"),
            ("other", "set text of its source to one of [\"text\", \"kind\", \"none\"]"),
            ("deep.other", "has no column \"deep.other\""),
        ] {
            let message = read(column).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn a_data_set_has_the_same_rows_as_in_parquet() {
        let place = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tune");
        let folder = Folder::open(place).unwrap();
        let read = |path: &str| crate::rows::read_rows(&folder, path).unwrap();
        let arrow = read("arrow/train_prefs.arrow");
        assert_eq!(arrow.len(), 8);
        assert_eq!(arrow, read("data/train_prefs-00000-of-00001.parquet"));
    }

    #[test]
    fn segments_are_the_same_from_any_start() {
        let all: Vec<String> = (0..300).map(|n| format!("{n} ").repeat(n * 7 % 90)).collect();
        let batch = |texts: &[String]| {
            let column: ArrayRef = Arc::new(StringArray::from(texts.to_vec()));
            RecordBatch::try_from_iter([("text", column)]).unwrap()
        };
        let batches = [batch(&all[..120]), batch(&[]), batch(&all[120..])];
        let mut stream = StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
        let mut file = FileWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
        for batch in &batches {
            stream.write(batch).unwrap();
            file.write(batch).unwrap();
        }
        let numbered: Vec<(u64, String)> = (0..).zip(all.iter().cloned()).collect();
        for bytes in [stream.into_inner().unwrap(), file.into_inner().unwrap()] {
            let (folder, info) = file_of(bytes);
            let segments = |from: u64, limit: u64| {
                let mut texts = ArrowTexts::open(&folder, &info, "text", limit, from).unwrap();
                let mut segments = Vec::new();
                while let Some(segment) = texts.next().unwrap() {
                    segments.push(segment);
                    assert_eq!(texts.segment(), from + segments.len() as u64);
                }
                assert!(texts.ends().unwrap());
                segments
            };
            for limit in [100, 4000, 1 << 40] {
                let whole = segments(0, limit);
                assert_eq!(whole.concat(), numbered);
                for from in [1, whole.len() / 2].into_iter().filter(|from| *from < whole.len()) {
                    assert_eq!(segments(from as u64, limit), whole[from..]);
                }
            }
        }
    }

    #[test]
    fn damage_is_an_error_that_names_the_file() {
        for name in ["kinds.arrow", "train_prefs.arrow"] {
            let whole = golden(name);
            let message = rows(whole[..whole.len() / 2].to_vec()).unwrap_err().to_string();
            assert!(message.contains("run:a.arrow is damaged"), "{message}");
        }
        let message = rows(b"not arrow at all".to_vec()).unwrap_err().to_string();
        assert!(message.contains("run:a.arrow is not Arrow"), "{message}");
        assert!(rows(Vec::new()).is_err());
    }
}
