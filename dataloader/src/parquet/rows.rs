//! Reads the texts of some row groups row by row. Only a few pages are in memory, because there are row groups of
//! several gigabytes.

use std::fmt;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, Bytes, BytesMut};
use parquet::basic::ConvertedType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl, get_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;

use super::file::ParquetFile;
use crate::error::DataError;
use crate::store::Steps;

/// Row groups of a file that are being read in *segments*. A row belongs to the segment in which its text begins, where
/// segments are ranges of all texts laid end to end. To start at a later segment, the rows before it are decoded and
/// discarded.
pub(crate) struct Rows {
    metadata: ParquetMetaData,
    column: usize,
    groups: Range<usize>,
    bytes: Arc<Mutex<Held>>,
    group: Option<Group>,
    /// Number of the next row in the file.
    number: u64,
    /// Bytes of the texts before that row.
    at: u64,
    segment: u64,
    limit: u64,
    name: String,
    place: String,
}

/// A row group that is being read.
struct Group {
    number: usize,
    left: usize,
    reader: ColumnReaderImpl<ByteArrayType>,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rows({}, groups {:?}, segment {})", self.place, self.groups, self.segment)
    }
}

impl Rows {
    /// Begins to read the texts of `column` in some row groups, in segments of at most `limit` bytes, at `segment`.
    pub(crate) fn open(
        file: ParquetFile<'_>,
        column: &str,
        groups: Range<usize>,
        limit: u64,
        segment: u64,
    ) -> Result<Self, DataError> {
        let found = file.text_column(column)?;
        let place = file.folder.place(&file.file.path);
        let metadata = file.metadata;
        let damaged = |reason| DataError::Damaged { file: place.clone(), reason };
        let index = found.ok_or_else(|| damaged(format!("its column {column:?} has no texts any more")))?;
        let before = metadata.row_groups().iter().take(groups.start);
        let number = before.map(|group| group.num_rows().max(0).cast_unsigned()).sum();
        let mut ranges = Vec::new();
        for number in groups.clone() {
            let group = metadata.row_groups().get(number);
            let group = group.ok_or_else(|| damaged(format!("it has no row group {number}")))?;
            let range = byte_range(group.column(index)).filter(|range| range.end <= file.file.size);
            ranges.push(range.ok_or_else(|| damaged(format!("its row group {number} has no valid offset")))?);
        }
        let steps = Steps::new(file.folder, file.file, ranges);
        let bytes = Arc::new(Mutex::new(Held { steps, start: 0, bytes: Bytes::new(), error: None }));
        let name = column.to_owned();
        let mut rows = Self {
            metadata,
            column: index,
            groups,
            bytes,
            group: None,
            number,
            at: 0,
            segment,
            limit,
            name,
            place,
        };
        rows.read_to(segment * limit, |_| ())?;
        Ok(rows)
    }

    /// Number of the segment that [`Self::next`] returns.
    pub(crate) const fn segment(&self) -> u64 {
        self.segment
    }

    /// Bytes of text that have been read or skipped.
    pub(crate) const fn passed(&self) -> u64 {
        self.at
    }

    /// Whether all rows have been read.
    pub(crate) fn ends(&self) -> bool {
        self.groups.is_empty() && self.group.is_none()
    }

    /// Numbers and texts of the rows in the next segment, without rows that have no text. `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<(u64, String)>>, DataError> {
        if self.ends() {
            return Ok(None);
        }
        self.segment += 1;
        let mut rows = Vec::new();
        self.read_to(self.segment * self.limit, |row| rows.push(row))?;
        Ok(Some(rows))
    }

    /// Reads the rows that begin before `end`.
    fn read_to(&mut self, end: u64, mut give: impl FnMut((u64, String))) -> Result<(), DataError> {
        while self.at < end && !self.ends() {
            let row = self.number;
            if let Some((number, value)) = self.row()? {
                self.at += value.len() as u64;
                let text = String::from_utf8(value.data().to_vec()).map_err(|error| {
                    self.not_text(format!(
                        "row {row}, in row group {number}, column {:?}: {error}",
                        self.name
                    ))
                })?;
                give((row, text));
            }
        }
        Ok(())
    }

    /// The value of the next row and its group, if it has one.
    fn row(&mut self) -> Result<Option<(usize, ByteArray)>, DataError> {
        let number = self.group.as_ref().map_or(self.groups.start, |group| group.number);
        // The decoder panics on some invalid page headers. Headers have no checksum, so a single flipped bit can lead
        // to one. Nothing that the decoder was working on is used afterwards.
        let value = match catch_unwind(AssertUnwindSafe(|| self.try_row())) {
            Ok(value) => value.map_err(|error| error.to_string()),
            Err(_) => Err("a page header is not valid".to_owned()),
        };
        value.map(|value| value.map(|value| (number, value))).map_err(|reason| {
            let store = self.bytes.lock().unwrap_or_else(PoisonError::into_inner).error.take();
            store.unwrap_or_else(|| self.damaged(format!("row group {number}: {reason}")))
        })
    }

    fn try_row(&mut self) -> ParquetResult<Option<ByteArray>> {
        let group = match &mut self.group {
            Some(group) => group,
            None => match self.groups.next() {
                Some(number) => {
                    let group = self.open_group(number)?;
                    self.group.insert(group)
                }
                None => return Ok(None),
            },
        };
        let mut values = Vec::with_capacity(1);
        if group.left > 0 {
            let (read, ..) = group.reader.read_records(1, Some(&mut Vec::new()), None, &mut values)?;
            if read == 0 {
                return Err(ParquetError::General(format!("{} rows are missing", group.left)));
            }
            group.left -= 1;
            self.number += 1;
        }
        if group.left == 0 {
            self.group = None;
        }
        Ok(values.pop())
    }

    fn open_group(&self, number: usize) -> ParquetResult<Group> {
        let metadata = self.metadata.row_group(number);
        let chunk = metadata.column(self.column);
        let rows = usize::try_from(metadata.num_rows())?;
        let range = byte_range(chunk).unwrap_or_default();
        let bytes = Chunk { end: range.end, held: Arc::clone(&self.bytes) };
        let pages = SerializedPageReader::new(Arc::new(bytes), chunk, rows, None)?;
        match get_column_reader(chunk.column_descr_ptr(), Box::new(pages)) {
            ColumnReader::ByteArrayColumnReader(reader) => Ok(Group { number, left: rows, reader }),
            _ => Err(ParquetError::General("the column does not hold strings".to_owned())),
        }
    }

    /// The error for a value that is not UTF-8: a column of strings is damaged, while a column of bytes may hold
    /// anything.
    fn not_text(&self, reason: String) -> DataError {
        let column = self.metadata.file_metadata().schema_descr().column(self.column);
        if column.converted_type() == ConvertedType::UTF8 {
            return self.damaged(reason);
        }
        let reason =
            format!("{reason}; the column holds bytes: rewrite it as text, or name a column of text");
        DataError::Format { file: self.place.clone(), format: "text in UTF-8", reason }
    }

    fn damaged(&self, reason: String) -> DataError {
        DataError::Damaged { file: self.place.clone(), reason }
    }
}

/// The range of bytes that a column chunk takes in its file.
fn byte_range(chunk: &ColumnChunkMetaData) -> Option<Range<u64>> {
    let start = u64::try_from(chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset())).ok()?;
    let length = u64::try_from(chunk.compressed_size()).ok()?;
    Some(start..start.checked_add(length)?)
}

/// Bytes of the file that have been fetched and are still needed.
struct Held {
    steps: Steps,
    /// Offset of these bytes in the file.
    start: u64,
    bytes: Bytes,
    /// The error that the store gave, if any.
    error: Option<DataError>,
}

impl Held {
    /// `length` bytes of the file from `start` on, which must be within one range, or fewer at the end of that range. Bytes
    /// before `start` are dropped.
    fn get(&mut self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let outside = || ParquetError::General(format!("byte {start} lies outside its column"));
        if start < self.start {
            return Err(outside());
        }
        while self.end() <= start {
            let Some(step) = self.step()? else { return Err(outside()) };
            (self.start, self.bytes) = step;
        }
        self.bytes.advance(start.checked_sub(self.start).ok_or_else(outside)? as usize);
        self.start = start;
        if self.bytes.len() < length {
            let mut joined = BytesMut::with_capacity(length + (1 << 20));
            joined.extend_from_slice(&self.bytes);
            while joined.len() < length
                && let Some((_, bytes)) = self.step()?
            {
                joined.extend_from_slice(&bytes);
            }
            self.bytes = joined.freeze();
        }
        Ok(self.bytes.slice(..length.min(self.bytes.len())))
    }

    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn step(&mut self) -> ParquetResult<Option<(u64, Bytes)>> {
        self.steps.next().map_err(|error| {
            let told = ParquetError::General(error.to_string());
            self.error = Some(error);
            told
        })
    }
}

/// The bytes of a column chunk, addressed by their offset in the file, which must not decrease.
struct Chunk {
    end: u64,
    held: Arc<Mutex<Held>>,
}

impl Chunk {
    fn get(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let left = self.end.saturating_sub(start);
        let length = length.min(usize::try_from(left).unwrap_or(usize::MAX));
        self.held.lock().unwrap_or_else(PoisonError::into_inner).get(start, length)
    }
}

impl Length for Chunk {
    fn len(&self) -> u64 {
        self.end
    }
}

impl ChunkReader for Chunk {
    type T = Header;

    fn get_read(&self, start: u64) -> ParquetResult<Header> {
        Ok(Header {
            chunk: Self { end: self.end, held: Arc::clone(&self.held) },
            at: start,
            bytes: Bytes::new(),
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let bytes = self.get(start, length)?;
        if bytes.len() < length {
            return Err(ParquetError::General(format!("a page of {length} bytes extends beyond its column")));
        }
        Ok(bytes)
    }
}

/// Reads a page header, whose length is not known in advance.
struct Header {
    chunk: Chunk,
    at: u64,
    bytes: Bytes,
}

/// Bytes that are read for a header at first. Most headers are shorter.
const HEADER: usize = 512;

impl io::Read for Header {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_empty() && self.at < self.chunk.end {
            self.bytes = self.chunk.get(self.at, HEADER).map_err(io::Error::other)?;
            self.at += self.bytes.len() as u64;
        }
        let length = buffer.len().min(self.bytes.len());
        self.bytes.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}
