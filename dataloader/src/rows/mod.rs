//! Rows of data files as objects with columns: parquet, Arrow, JSON lines and JSON lists, compressed or not.
//!
//! Unlike a corpus, such a file is read whole where all of its rows are learned from: data sets of rows are small. Its bytes are
//! hashed, so that what was learned from them can be named. Where some rows are enough, no more is read than they take.

mod json;
mod parquet;

use std::io::{BufRead, BufReader, Cursor};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use ulmus_chat::Row;
use ulmus_plan::Format;
use ulmus_storage::FileInfo;
use ulmus_types::Digest;

use crate::arrow::{self, Batches};
use crate::compressed::{decompressed, unreadable};
use crate::contents::refuse_pointer;
use crate::error::DataError;
use crate::store::{Folder, Steps};
use crate::stored::Stored;

/// Bytes in which the pointer of a file that Git LFS keeps would be recognised.
const LOOKED_AT: u64 = 1024;

/// Rows that are decoded as they are taken.
pub(crate) type Rows = Box<dyn Iterator<Item = Result<Row, DataError>> + Send>;

/// A file of rows.
pub(crate) struct RowFile {
    /// Number of the rows, if the file says it.
    pub(crate) count: Option<u64>,
    /// The rows.
    pub(crate) rows: Rows,
}

impl RowFile {
    /// Reads a whole file, and hashes its bytes.
    ///
    /// # Errors
    /// When the store does not give it, or its format holds no rows. Damage is found as the rows are taken.
    pub(crate) fn open(
        folder: &Folder,
        file: &FileInfo,
        format: Format,
    ) -> Result<(Self, Digest), DataError> {
        let bytes = whole(folder, file)?;
        refuse_pointer(folder, file, &bytes)?;
        let digest = Digest::of(&bytes);
        let place = folder.place(&file.path);
        let opened = match format {
            Format::Parquet => parquet::rows(bytes, place)?,
            format => {
                let part = |range: Range<u64>| Ok(bytes.slice(range.start as usize..range.end as usize));
                let end = arrow::stream_end(bytes.len() as u64, &bytes, &place, part)?;
                Self::sequential(Cursor::new(bytes), end, format, place)?
            }
        };
        Ok((opened, digest))
    }

    /// Opens a file that is read as its rows are taken.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub(crate) fn begin(folder: &Folder, file: &FileInfo, format: Format) -> Result<Self, DataError> {
        let begin = folder.read_range(file, 0..file.size.min(LOOKED_AT))?;
        refuse_pointer(folder, file, &begin)?;
        let place = folder.place(&file.path);
        match format {
            Format::Parquet => parquet::rows(parquet::Ranges::new(folder, file), place),
            format => {
                let part = |range| folder.read_range(file, range);
                let end = arrow::stream_end(file.size, &begin, &place, part)?;
                Self::sequential(Stored::open(folder, file, Arc::default()), end, format, place)
            }
        }
    }

    /// The rows of a file that is read from its beginning; `end` is where its stream ends if it is one of Arrow.
    fn sequential(
        stored: impl BufRead + Send + 'static,
        end: u64,
        format: Format,
        place: String,
    ) -> Result<Self, DataError> {
        let rows = match format {
            Format::Arrow => of_batches(Batches::open(stored, end, place)?),
            Format::Json | Format::Jsonl => json::rows(stored, place)?,
            Format::JsonGz | Format::JsonZst => {
                let text = decompressed(stored, format).map_err(|error| unreadable(&place, error))?;
                json::rows(BufReader::new(text), place)?
            }
            Format::Parquet | Format::Text | Format::U16 | Format::U32 => {
                let reason = "it has texts or token ids alone; name files of rows".to_owned();
                return Err(DataError::Format { file: place, format: "a file of rows", reason });
            }
        };
        Ok(Self { count: None, rows })
    }
}

/// The rows of a file below a folder, whose suffix names its format.
///
/// # Errors
/// When the file is not there, has no known suffix, is damaged, or holds no rows.
pub fn read_rows(folder: &Folder, path: &str) -> Result<Vec<Row>, DataError> {
    let file = folder.stat(vec![path.to_owned()])?.remove(0);
    RowFile::open(folder, &file, format_of(folder, path)?)?.0.rows.collect()
}

/// The format of a file of rows, by its suffix.
pub(crate) fn format_of(folder: &Folder, path: &str) -> Result<Format, DataError> {
    Format::of_file(path).filter(|format| format.holds_rows()).ok_or_else(|| DataError::Format {
        file: folder.place(path),
        format: "of a known suffix",
        reason: "rows are in files of .parquet, .arrow, .jsonl, .json, or .jsonl.gz and .jsonl.zst"
            .to_owned(),
    })
}

/// The bytes of a file.
fn whole(folder: &Folder, file: &FileInfo) -> Result<Bytes, DataError> {
    let mut steps = Steps::new(folder, file, std::iter::once(0..file.size));
    let mut bytes = Vec::with_capacity(usize::try_from(file.size).unwrap_or_default());
    while let Some((_, step)) = steps.next()? {
        bytes.extend_from_slice(&step);
    }
    Ok(bytes.into())
}

fn of_batches(mut batches: Batches<impl BufRead + Send + 'static>) -> Rows {
    let rows = std::iter::from_fn(move || batches.next().transpose());
    Box::new(rows.flat_map(|batch| -> Rows {
        match batch {
            Ok(batch) => Box::new((0..batch.num_rows()).map(move |row| Ok(arrow::row(&batch, row)))),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }))
}
