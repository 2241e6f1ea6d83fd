//! Reads the texts of one column in segments, as those of a compressed file: a text belongs to the segment in which it begins,
//! where segments are ranges of all texts laid end to end. To start at a later segment, what is before it is decoded and
//! discarded.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::RecordBatch;
use arrow_schema::{DataType, SchemaRef};
use ulmus_chat::Cell;
use ulmus_storage::FileInfo;

use super::Batches;
use super::cells::cell;
use crate::contents::refuse_pointer;
use crate::error::DataError;
use crate::store::Folder;
use crate::stored::Stored;

/// A file that is being read.
pub(crate) struct ArrowTexts {
    batches: Batches<Stored>,
    column: Column,
    /// The batch that is being read, and the next row in it.
    batch: Option<(RecordBatch, usize)>,
    is_finished: bool,
    /// Number of the next row in the file.
    number: u64,
    /// Bytes of the texts before that row.
    at: u64,
    segment: u64,
    limit: u64,
    /// Stored bytes that have been consumed.
    taken: Arc<AtomicU64>,
}

/// A column of texts: its index, and the names of fields within it.
struct Column {
    index: usize,
    inner: Vec<String>,
}

impl fmt::Debug for ArrowTexts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ArrowTexts({}, segment {})", self.batches.place(), self.segment)
    }
}

/// Opens a file, whose stored bytes `taken` counts.
pub(super) fn open(
    folder: &Folder,
    file: &FileInfo,
    taken: Arc<AtomicU64>,
) -> Result<Batches<Stored>, DataError> {
    let begin = folder.read_range(file, 0..file.size.min(1024))?;
    refuse_pointer(folder, file, &begin)?;
    let place = folder.place(&file.path);
    let end = super::stream_end(file.size, &begin, &place, |range| folder.read_range(file, range))?;
    Batches::open(Stored::open(folder, file, taken), end, place)
}

impl ArrowTexts {
    /// The columns of a file, for people.
    pub(crate) fn schema(folder: &Folder, file: &FileInfo) -> Result<String, DataError> {
        Ok(super::schema_for_people(&open(folder, file, Arc::default())?.schema()))
    }

    /// Begins to read the texts of a column, in segments of at most `limit` bytes, at `segment`.
    pub(crate) fn open(
        folder: &Folder,
        file: &FileInfo,
        column: &str,
        limit: u64,
        segment: u64,
    ) -> Result<Self, DataError> {
        let taken = Arc::new(AtomicU64::new(0));
        let batches = open(folder, file, Arc::clone(&taken))?;
        let column = Column::find(&batches.schema(), column, batches.place())?;
        let mut texts = Self {
            batches,
            column,
            batch: None,
            is_finished: false,
            number: 0,
            at: 0,
            segment,
            limit,
            taken,
        };
        texts.read_to(segment * limit, |_| ())?;
        Ok(texts)
    }

    /// Number of the segment that [`Self::next`] returns.
    pub(crate) const fn segment(&self) -> u64 {
        self.segment
    }

    /// Bytes of the stored file that have been consumed.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Whether all rows have been read.
    pub(crate) fn ends(&mut self) -> Result<bool, DataError> {
        self.fill()?;
        Ok(self.is_finished)
    }

    /// Numbers and texts of the rows in the next segment, without rows that have no text. `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<(u64, String)>>, DataError> {
        if self.ends()? {
            return Ok(None);
        }
        self.segment += 1;
        let mut rows = Vec::new();
        self.read_to(self.segment * self.limit, |row| rows.push(row))?;
        Ok(Some(rows))
    }

    /// Reads the rows that begin before `end`.
    fn read_to(&mut self, end: u64, mut give: impl FnMut((u64, String))) -> Result<(), DataError> {
        while self.at < end && !self.ends()? {
            let Some((batch, row)) = &mut self.batch else { break };
            if let Some(text) = self.column.text(batch, *row) {
                self.at += text.len() as u64;
                give((self.number, text));
            }
            *row += 1;
            self.number += 1;
        }
        Ok(())
    }

    /// Reads batches until there is a row, or the end.
    fn fill(&mut self) -> Result<(), DataError> {
        while !self.is_finished && self.batch.as_ref().is_none_or(|(batch, row)| *row >= batch.num_rows()) {
            self.batch = self.batches.next()?.map(|batch| (batch, 0));
            self.is_finished = self.batch.is_none();
        }
        Ok(())
    }
}

impl Column {
    fn find(schema: &SchemaRef, name: &str, place: &str) -> Result<Self, DataError> {
        let fields = schema.fields();
        let of_name = |name: &str| fields.iter().position(|field| field.name() == name);
        let found = of_name(name).map(|index| (index, Vec::new())).or_else(|| {
            let mut parts = name.split('.').map(str::to_owned);
            Some((of_name(&parts.next()?)?, parts.collect()))
        });
        let texts =
            || fields.iter().filter(|field| holds_text(field.data_type())).map(|field| field.name().clone());
        let missing = || DataError::Column {
            file: place.to_owned(),
            column: name.to_owned(),
            columns: texts().collect(),
        };
        let (index, inner): (usize, Vec<String>) = found.ok_or_else(missing)?;
        let mut kind = fields[index].data_type();
        for part in &inner {
            let DataType::Struct(fields) = kind else { return Err(missing()) };
            kind = fields.iter().find(|field| field.name() == part).ok_or_else(missing)?.data_type();
        }
        if !holds_text(kind) {
            let found = kind.to_string();
            return Err(DataError::ColumnType { file: place.to_owned(), column: name.to_owned(), found });
        }
        Ok(Self { index, inner })
    }

    fn text(&self, batch: &RecordBatch, row: usize) -> Option<String> {
        let mut value = cell(batch.column(self.index), row);
        for name in &self.inner {
            let Cell::Struct(fields) = value else { return None };
            value = fields.into_iter().find(|(other, _)| other == name)?.1;
        }
        match value {
            Cell::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// Whether a column holds a string per row, or nothing at all.
fn holds_text(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => true,
        DataType::Dictionary(_, values) => holds_text(values),
        _ => false,
    }
}
