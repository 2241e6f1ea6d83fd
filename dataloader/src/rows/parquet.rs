//! Rows of Parquet files, with all of their columns.

use std::io::{self, BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as ParquetRow};
use ulmus_chat::{Cell, Row};
use ulmus_storage::FileInfo;

use super::RowFile;
use crate::compressed::unreadable;
use crate::error::DataError;
use crate::store::Folder;

/// The rows of a file.
pub(super) fn rows(bytes: impl ChunkReader + 'static, place: String) -> Result<RowFile, DataError> {
    let reader = SerializedFileReader::new(bytes).map_err(|error| of_store(&place, error))?;
    let count = reader.metadata().file_metadata().num_rows().max(0).cast_unsigned();
    let mut rows = Some(RowIter::from_file_into(Box::new(reader)));
    let rows = std::iter::from_fn(move || {
        // The decoder panics on some damaged files. Nothing that it was working on is used afterwards.
        let next = catch_unwind(AssertUnwindSafe(|| rows.as_mut()?.next()));
        let row = match next {
            Ok(row) => row?.map_err(|error| of_store(&place, error)),
            Err(_) => {
                Err(DataError::Damaged { file: place.clone(), reason: "its pages are damaged".to_owned() })
            }
        };
        if row.is_err() {
            rows = None;
        }
        Some(row.map(|row| Row(of_row(&row))))
    });
    Ok(RowFile { count: Some(count), rows: Box::new(rows) })
}

/// The error of the store behind one of the decoder, or else damage that it found.
fn of_store(place: &str, error: ParquetError) -> DataError {
    match error {
        ParquetError::External(error) if error.is::<io::Error>() => match error.downcast::<io::Error>() {
            Ok(error) => unreadable(place, *error),
            Err(error) => DataError::Damaged { file: place.to_owned(), reason: error.to_string() },
        },
        error => DataError::Damaged { file: place.to_owned(), reason: error.to_string() },
    }
}

/// A stored file of which only what is asked for is read.
pub(super) struct Ranges {
    folder: Folder,
    file: FileInfo,
}

impl Ranges {
    pub(super) fn new(folder: &Folder, file: &FileInfo) -> Self {
        Self { folder: folder.clone(), file: file.clone() }
    }
}

impl Length for Ranges {
    fn len(&self) -> u64 {
        self.file.size
    }
}

impl ChunkReader for Ranges {
    type T = BufReader<Tail>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(BufReader::new(Tail { folder: self.folder.clone(), file: self.file.clone(), at: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let end = start.saturating_add(length as u64);
        if end > self.file.size {
            return Err(ParquetError::EOF(format!("bytes up to {end} of {}", self.file.size)));
        }
        Ok(self.folder.read_range(&self.file, start..end).map_err(io::Error::other)?)
    }
}

/// A stored file from some byte on.
pub(super) struct Tail {
    folder: Folder,
    file: FileInfo,
    at: u64,
}

impl Read for Tail {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let end = self.file.size.min(self.at.saturating_add(buffer.len() as u64)).max(self.at);
        let bytes = self.folder.read_range(&self.file, self.at..end).map_err(io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}

fn of_row(row: &ParquetRow) -> Vec<(String, Cell)> {
    row.get_column_iter().map(|(name, field)| (name.clone(), of_field(field))).collect()
}

fn of_field(field: &Field) -> Cell {
    match field {
        Field::Null => Cell::Null,
        Field::Bool(value) => Cell::Bool(*value),
        Field::Byte(value) => Cell::Int((*value).into()),
        Field::Short(value) => Cell::Int((*value).into()),
        Field::Int(value) => Cell::Int((*value).into()),
        Field::Long(value) => Cell::Int(*value),
        Field::UByte(value) => Cell::Int((*value).into()),
        Field::UShort(value) => Cell::Int((*value).into()),
        Field::UInt(value) => Cell::Int((*value).into()),
        Field::ULong(value) => Cell::from(*value),
        Field::Float(value) => Cell::Float((*value).into()),
        Field::Double(value) => Cell::Float(*value),
        Field::Str(value) => Cell::Text(value.clone()),
        Field::Bytes(bytes) => String::from_utf8(bytes.data().to_vec())
            .map_or_else(|bytes| Cell::Bytes(bytes.into_bytes()), Cell::Text),
        Field::Group(row) => Cell::Struct(of_row(row)),
        Field::ListInternal(list) => Cell::List(list.elements().iter().map(of_field).collect()),
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, value)| {
                let key = match key {
                    Field::Str(key) => key.clone(),
                    other => other.to_string(),
                };
                (key, of_field(value))
            });
            Cell::Struct(entries.collect())
        }
        // Dates and times as they are stored: most years have no name in a calendar.
        Field::Date(days) => Cell::Int((*days).into()),
        Field::TimeMillis(time) => Cell::Int((*time).into()),
        Field::TimeMicros(time) | Field::TimestampMillis(time) | Field::TimestampMicros(time) => {
            Cell::Int(*time)
        }
        other => Cell::Text(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_files_and_impossible_dates_end_nothing() {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/tune/data/train_prefs-00000-of-00001.parquet"
        );
        let whole = std::fs::read(file).unwrap();
        let read = |bytes: Vec<u8>| {
            rows(Bytes::from(bytes), "a.parquet".to_owned())?.rows.collect::<Result<Vec<_>, _>>()
        };
        assert_eq!(read(whole.clone()).unwrap().len(), 8);
        let mut refused = 0;
        for at in (0..whole.len()).step_by(97) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0xff;
            refused += usize::from(read(damaged).is_err());
        }
        assert!(refused > 0);
        assert_eq!(of_field(&Field::Date(i32::MAX)), Cell::Int(i32::MAX.into()));
        assert_eq!(of_field(&Field::TimestampMicros(i64::MIN)), Cell::Int(i64::MIN));
    }
}
