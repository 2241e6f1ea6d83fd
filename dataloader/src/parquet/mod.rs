//! Parquet files with a text column: read by row groups, written with page checksums.
//!
//! The CRC-32 of each page detects damage. Most writers leave it out, including the crate `parquet`, so [`write()`]
//! adds it to the page headers itself. In files without checksums, only the decoder's own checks apply.

mod rows;
mod write;

use std::ops::Range;

use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::schema::types::ColumnDescPtr;
use ulmus_storage::FileInfo;

pub(crate) use self::rows::Rows;
pub(crate) use self::write::write;

use crate::contents::refuse_pointer;
use crate::error::DataError;
use crate::store::Folder;

/// Bytes that are read from the end of a file at first. They usually contain the whole footer.
const TAIL: u64 = 64 << 10;

/// A parquet file whose footer has been read.
#[derive(Debug)]
pub(crate) struct ParquetFile<'a> {
    folder: &'a Folder,
    file: &'a FileInfo,
    metadata: ParquetMetaData,
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
    fn text_column(&self, name: &str) -> Result<Option<usize>, DataError> {
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

    /// Begins to read the texts of `column` in some row groups, in segments of at most `limit` bytes, at `segment`.
    pub(crate) fn rows(
        self,
        column: &str,
        groups: Range<usize>,
        limit: u64,
        segment: u64,
    ) -> Result<Rows, DataError> {
        Rows::open(self, column, groups, limit, segment)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ulmus_types::ErrorKind;

    use super::*;
    use crate::store::tests::{memory, stat};

    fn rows(texts: &[&str]) -> Vec<Vec<String>> {
        texts.iter().enumerate().map(|(i, text)| vec![(*text).to_owned(), format!("path-{i}")]).collect()
    }

    fn file_of(bytes: Vec<u8>) -> (Folder, FileInfo) {
        let folder = memory();
        folder.write("a.parquet", bytes).unwrap();
        let info = stat(&folder, "a.parquet");
        (folder, info)
    }

    fn read(bytes: Vec<u8>, column: &str) -> Result<Vec<String>, DataError> {
        let (folder, info) = file_of(bytes);
        let file = ParquetFile::open(&folder, &info)?;
        let groups = file.row_group_sizes(column)?.len();
        let mut rows = file.rows(column, 0..groups, u64::MAX, 0)?;
        Ok(rows.next()?.unwrap_or_default().into_iter().map(|(_, text)| text).collect())
    }

    #[test]
    fn written_files_are_read() {
        let long = "word ".repeat(500_000);
        let bytes = write(&["text", "path"], &[rows(&["one", "", "zwölf"]), rows(&[&long])]);
        assert_eq!(read(bytes.clone(), "text").unwrap(), ["one", "", "zwölf", &long]);
        assert_eq!(read(bytes.clone(), "path").unwrap(), ["path-0", "path-1", "path-2", "path-0"]);
        assert_eq!(bytes, write(&["text", "path"], &[rows(&["one", "", "zwölf"]), rows(&[&long])]));
        let (folder, info) = file_of(bytes);
        let file = ParquetFile::open(&folder, &info).unwrap();
        assert!(file.row_group_sizes("text").unwrap()[1] >= long.len() as u64);
        assert_eq!(file.schema(), "text: String, path: String");
    }

    #[test]
    fn segments_of_a_group_are_the_same_from_any_start() {
        let texts: Vec<String> =
            (0..400).map(|n| format!("{n} ").repeat(n * 7 % 90 + usize::from(n == 200) * 900_000)).collect();
        let rows = |texts: &[String]| texts.iter().map(|text| vec![text.clone()]).collect::<Vec<_>>();
        let (folder, info) =
            file_of(write(&["text"], &[rows(&texts[..250]), Vec::new(), rows(&texts[250..])]));
        let segments = |from: u64, limit: u64| {
            let mut rows =
                ParquetFile::open(&folder, &info).unwrap().rows("text", 0..3, limit, from).unwrap();
            let mut segments = Vec::new();
            while let Some(segment) = rows.next().unwrap() {
                segments.push(segment);
                assert_eq!(rows.segment(), from + segments.len() as u64);
            }
            assert!(rows.ends());
            segments
        };
        for limit in [100, 4000, 1 << 20, 1 << 40] {
            let all = segments(0, limit);
            let numbered: Vec<(u64, String)> = (0..).zip(texts.iter().cloned()).collect();
            assert_eq!(all.concat(), numbered);
            let mut at = 0;
            for (number, segment) in (0..).zip(&all) {
                for (_, text) in segment {
                    assert!((number * limit..(number + 1) * limit).contains(&at), "{number} {at}");
                    at += text.len() as u64;
                }
            }
            for from in [1, 2, all.len() / 2, all.len() - 1].into_iter().filter(|from| *from < all.len()) {
                assert_eq!(segments(from as u64, limit), all[from..]);
            }
        }
    }

    #[test]
    fn errors_name_the_columns() {
        let bytes = write(&["text", "path"], &[rows(&["one"])]);
        let message = read(bytes.clone(), "content").unwrap_err().to_string();
        assert!(message.contains(r#"set text of its source to one of ["text", "path"]"#), "{message}");
        let message = read(b"not parquet".to_vec(), "text").unwrap_err().to_string();
        assert!(message.contains("a.parquet is not parquet"), "{message}");
        let cut = read(bytes[..bytes.len() - 3].to_vec(), "text").unwrap_err();
        assert_eq!(cut.kind(), ErrorKind::Corrupt, "{cut}");
        assert!(read(Vec::new(), "text").is_err());
    }

    proptest! {
        /// Damage to a page is an error. Headers have no checksum, but damage to one must not change the text either.
        #[test]
        fn a_flipped_bit_never_gives_other_text(at in 0.0..1.0_f64, bit in 0..8_u32) {
            let text = "The quick brown fox jumps over the lazy dog; ".repeat(20);
            let mut bytes = write(&["text"], &[vec![vec![text.clone()], vec![text[5..].to_owned()]]]);
            let footer = u32::from_le_bytes(bytes[bytes.len() - 8..bytes.len() - 4].try_into().unwrap()) as usize;
            let pages = 4..bytes.len() - 8 - footer;
            let at = pages.start + (at * pages.len() as f64) as usize;
            bytes[at] ^= 1 << bit;
            if let Ok(texts) = read(bytes, "text") {
                prop_assert_eq!(texts, [text.clone(), text[5..].to_owned()]);
            }
        }
    }
}
