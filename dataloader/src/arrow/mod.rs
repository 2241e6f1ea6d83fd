//! Arrow's IPC format: streams, as the library `datasets` keeps them on disk, and files. A file is a stream between its mark and
//! its table of contents, so both are read from the beginning, batch by batch.

mod cells;
mod texts;

use std::io::BufRead;
use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow_array::RecordBatch;
use arrow_ipc::reader::StreamReader;
use arrow_schema::{ArrowError, SchemaRef};

use crate::compressed::unreadable;
use crate::error::DataError;

pub(crate) use self::cells::row;
pub(crate) use self::texts::ArrowTexts;

/// What a file begins with, padded to a multiple of 8 bytes.
const MARK: &[u8; 8] = b"ARROW1\0\0";

/// The batches of a file or a stream.
pub(crate) struct Batches<R> {
    reader: StreamReader<R>,
    place: String,
    number: usize,
}

impl<R: BufRead> Batches<R> {
    /// Reads the schema.
    pub(crate) fn open(mut stored: R, place: String) -> Result<Self, DataError> {
        let begin = stored.fill_buf().map_err(|error| unreadable(&place, error))?;
        if begin.starts_with(MARK) {
            stored.consume(MARK.len());
        }
        // The decoder panics on some damaged files. Nothing that it was working on is used afterwards.
        match catch_unwind(AssertUnwindSafe(|| StreamReader::try_new(stored, None))) {
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
