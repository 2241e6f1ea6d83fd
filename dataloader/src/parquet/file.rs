//! A parquet file, as its footer describes it.

use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::schema::types::ColumnDescPtr;
use ulmus_storage::FileInfo;

use crate::contents::refuse_pointer;
use crate::error::DataError;
use crate::store::Folder;

/// Bytes that are read from the end of a file at first. They usually contain the whole footer.
const TAIL: u64 = 64 << 10;

/// A parquet file whose footer has been read.
#[derive(Debug)]
pub(crate) struct ParquetFile<'a> {
    pub(super) folder: &'a Folder,
    pub(super) file: &'a FileInfo,
    pub(super) metadata: ParquetMetaData,
}

impl<'a> ParquetFile<'a> {
    /// Opens a file by reading its footer.
    pub(crate) fn open(folder: &'a Folder, file: &'a FileInfo) -> Result<Self, DataError> {
        let mut reader = ParquetMetaDataReader::new();
        let mut wanted = TAIL.min(file.size);
        loop {
            let tail = folder.read_range(file, file.size - wanted..file.size)?;
            refuse_pointer(folder, file, &tail)?;
            match reader.try_parse_sized(&tail, file.size) {
                Ok(()) => break,
                Err(ParquetError::NeedMoreData(needed)) => wanted = needed as u64,
                Err(error) => return Err(not_parquet(folder, file, &error)),
            }
        }
        let metadata = reader.finish().map_err(|error| not_parquet(folder, file, &error))?;
        Ok(Self { folder, file, metadata })
    }

    /// The columns and their types, for people.
    pub(crate) fn schema(&self) -> String {
        let columns = self.metadata.file_metadata().schema_descr().columns().iter();
        columns.map(|c| format!("{}: {}", c.path().string(), type_name(c))).collect::<Vec<_>>().join(", ")
    }

    /// Number of rows in all row groups.
    pub(crate) fn row_count(&self) -> u64 {
        self.metadata.file_metadata().num_rows().max(0).cast_unsigned()
    }

    /// Index of the string column `name`, or `None` if the column has no type because all of its rows are null.
    pub(super) fn text_column(&self, name: &str) -> Result<Option<usize>, DataError> {
        let columns = self.metadata.file_metadata().schema_descr().columns();
        let (place, column) = (|| self.folder.place(&self.file.path), || name.to_owned());
        let of_name: Vec<usize> =
            (0..columns.len()).filter(|at| columns[*at].path().string() == name).collect();
        let found = match of_name[..] {
            [found] => found,
            [] => {
                let is_below = |c: &&ColumnDescPtr| {
                    c.path().string().strip_prefix(name).is_some_and(|rest| rest.starts_with('.'))
                };
                let texts = |c: &&ColumnDescPtr| is_text(c);
                return Err(match columns.iter().find(is_below) {
                    // A column within a list cannot be named.
                    Some(inner) if inner.max_rep_level() > 0 => {
                        DataError::ColumnType { file: place(), column: column(), found: type_name(inner) }
                    }
                    _ => DataError::Column {
                        file: place(),
                        column: column(),
                        columns: columns.iter().filter(texts).map(|c| c.path().string()).collect(),
                    },
                });
            }
            _ => {
                let count = of_name.len();
                return Err(DataError::Columns { file: place(), column: column(), count });
            }
        };
        if matches!(columns[found].logical_type_ref(), Some(LogicalType::Unknown)) {
            return Ok(None);
        }
        if !is_text(&columns[found]) {
            return Err(DataError::ColumnType {
                file: place(),
                column: column(),
                found: type_name(&columns[found]),
            });
        }
        let groups = self.metadata.row_groups();
        if groups.iter().any(|group| group.column(found).crypto_metadata().is_some()) {
            return Err(DataError::Encrypted { file: place(), column: column() });
        }
        Ok(Some(found))
    }

    /// Bytes of text in each row group according to the footer, in which equal values may be stored once. Empty if no
    /// row has a text.
    pub(crate) fn row_group_sizes(&self, column: &str) -> Result<Vec<u64>, DataError> {
        let Some(column) = self.text_column(column)? else { return Ok(Vec::new()) };
        let sizes = self.metadata.row_groups().iter();
        Ok(sizes.map(|group| group.column(column).uncompressed_size().max(0).cast_unsigned()).collect())
    }
}

/// Whether a column holds one string per row.
fn is_text(column: &ColumnDescPtr) -> bool {
    column.physical_type() == Physical::BYTE_ARRAY
        && column.max_rep_level() == 0
        && matches!(column.converted_type(), ConvertedType::UTF8 | ConvertedType::NONE)
}

fn type_name(column: &ColumnDescPtr) -> String {
    let list = if column.max_rep_level() > 0 { "list of " } else { "" };
    match column.logical_type_ref() {
        Some(logical) => format!("{list}{logical:?}"),
        None => format!("{list}{:?}", column.physical_type()),
    }
}

/// The error for a file without a valid footer. A file that begins like parquet has been truncated.
fn not_parquet(folder: &Folder, file: &FileInfo, error: &ParquetError) -> DataError {
    const MAGIC: &[u8] = b"PAR1";
    let (place, reason) = (folder.place(&file.path), error.to_string());
    let begin = folder.read_range(file, 0..file.size.min(MAGIC.len() as u64));
    if begin.is_ok_and(|begin| begin == MAGIC) {
        return DataError::Damaged { file: place, reason };
    }
    DataError::Format { file: place, format: "parquet", reason }
}
