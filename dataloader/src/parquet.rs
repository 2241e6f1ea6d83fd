//! One text column of parquet files: read by row groups, written with page checksums.
//!
//! Damage is caught by the CRC-32 of each page. Most writers leave it out, crate `parquet` among them, so
//! [`write()`] adds it to the page headers itself; in files without checksums only the decoder's own checks apply.
//! A row group is decoded whole or not at all.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as Physical, ZstdLevel};
use parquet::column::page::{CompressedPage, PageWriteSpec, PageWriter};
use parquet::column::reader::{ColumnReader, get_column_reader};
use parquet::column::writer::{ColumnCloseResult, ColumnWriter, get_column_writer};
use parquet::data_type::ByteArray;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterPropertiesPtr};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::file::writer::{SerializedFileWriter, SerializedPageWriter, TrackedWrite};
use parquet::schema::types::{ColumnDescPtr, Type};

use crate::error::DataError;
use crate::store::{FileInfo, Folder};

/// Bytes that are read from the end of a file in the hope that its whole footer is among them.
const TAIL: u64 = 64 << 10;

/// A parquet file whose footer has been read.
#[derive(Debug)]
pub(crate) struct ParquetFile<'a> {
    folder: &'a Folder,
    file: &'a FileInfo,
    metadata: ParquetMetaData,
}

impl<'a> ParquetFile<'a> {
    /// Reads the footer.
    pub(crate) fn open(folder: &'a Folder, file: &'a FileInfo) -> Result<Self, DataError> {
        let mut reader = ParquetMetaDataReader::new();
        let mut wanted = TAIL.min(file.size);
        loop {
            let tail = folder.read_range(file, file.size - wanted..file.size)?;
            match reader.try_parse_sized(&tail, file.size) {
                Ok(()) => break,
                Err(ParquetError::NeedMoreData(needed)) => wanted = needed as u64,
                Err(error) => return Err(not_parquet(folder, file, &error)),
            }
        }
        let metadata = reader.finish().map_err(|error| not_parquet(folder, file, &error))?;
        Ok(Self { folder, file, metadata })
    }

    /// Names and types of the columns, for people.
    pub(crate) fn schema(&self) -> String {
        let columns = self.metadata.file_metadata().schema_descr().columns().iter();
        columns.map(|c| format!("{}: {}", c.path().string(), type_name(c))).collect::<Vec<_>>().join(", ")
    }

    /// Index of the string column of that name.
    fn text_column(&self, name: &str) -> Result<usize, DataError> {
        let columns = self.metadata.file_metadata().schema_descr().columns();
        let place = || self.folder.place(&self.file.path);
        let found =
            columns.iter().position(|c| c.path().string() == name).ok_or_else(|| DataError::Column {
                file: place(),
                column: name.to_owned(),
                columns: columns.iter().map(|c| c.path().string()).collect(),
            })?;
        let column = &columns[found];
        let is_text = column.physical_type() == Physical::BYTE_ARRAY
            && column.max_rep_level() == 0
            && matches!(column.converted_type(), ConvertedType::UTF8 | ConvertedType::NONE);
        if !is_text {
            return Err(DataError::ColumnType {
                file: place(),
                column: name.to_owned(),
                found: type_name(column),
            });
        }
        Ok(found)
    }

    /// Bytes of text in each row group, as the footer tells them: without encodings that share equal values.
    pub(crate) fn row_group_sizes(&self, column: &str) -> Result<Vec<u64>, DataError> {
        let column = self.text_column(column)?;
        let sizes = self.metadata.row_groups().iter();
        Ok(sizes.map(|group| group.column(column).uncompressed_size().max(0).cast_unsigned()).collect())
    }

    /// The texts of `column` in the row groups of `groups`, rows without text left out.
    pub(crate) fn texts(&self, column: &str, groups: Range<usize>) -> Result<Vec<String>, DataError> {
        let index = self.text_column(column)?;
        let damaged =
            |reason: String| DataError::Damaged { file: self.folder.place(&self.file.path), reason };
        let mut texts = Vec::new();
        for number in groups {
            let group = self
                .metadata
                .row_groups()
                .get(number)
                .ok_or_else(|| damaged(format!("it has no row group {number}")))?;
            let chunk = group.column(index);
            let range =
                byte_range(chunk).ok_or_else(|| damaged(format!("row group {number} lies nowhere")))?;
            let start = range.start;
            let bytes = self.folder.read_range(self.file, range)?;
            let rows = usize::try_from(group.num_rows()).unwrap_or(0);
            let values = decode(start, bytes, chunk, rows)
                .map_err(|reason| damaged(format!("row group {number}: {reason}")))?;
            for value in values {
                let text = String::from_utf8(value.data().to_vec())
                    .map_err(|error| damaged(format!("row group {number}, column {column:?}: {error}")))?;
                texts.push(text);
            }
        }
        Ok(texts)
    }
}

/// All values of a column chunk that lies at `start` of its file, or what is wrong with it.
fn decode(
    start: u64,
    bytes: Bytes,
    chunk: &ColumnChunkMetaData,
    rows: usize,
) -> Result<Vec<ByteArray>, String> {
    let decode = || {
        let pages = SerializedPageReader::new(Arc::new(Chunk { start, bytes }), chunk, rows, None)?;
        read_column(chunk.column_descr_ptr(), Box::new(pages), rows)
    };
    // The decoder panics on some page headers that no writer writes. Headers are under no checksum, so a single
    // flipped bit can make one. Nothing that it was working on is used afterwards.
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(values) => values.map_err(|error: ParquetError| error.to_string()),
        Err(_) => Err("a page header is not possible".to_owned()),
    }
}

/// Where a column chunk lies in its file.
fn byte_range(chunk: &ColumnChunkMetaData) -> Option<Range<u64>> {
    let start = u64::try_from(chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset())).ok()?;
    let length = u64::try_from(chunk.compressed_size()).ok()?;
    Some(start..start.checked_add(length)?)
}

fn type_name(column: &ColumnDescPtr) -> String {
    let list = if column.max_rep_level() > 0 { "list of " } else { "" };
    match column.logical_type_ref() {
        Some(logical) => format!("{list}{logical:?}"),
        None => format!("{list}{:?}", column.physical_type()),
    }
}

fn not_parquet(folder: &Folder, file: &FileInfo, error: &ParquetError) -> DataError {
    DataError::Format { file: folder.place(&file.path), format: "parquet", reason: error.to_string() }
}

/// All values of a column chunk of `rows` rows; fewer or more rows are an error.
fn read_column(
    descr: ColumnDescPtr,
    pages: Box<dyn parquet::column::page::PageReader>,
    rows: usize,
) -> ParquetResult<Vec<ByteArray>> {
    let ColumnReader::ByteArrayColumnReader(mut reader) = get_column_reader(descr, pages) else {
        return Err(ParquetError::General("the column holds no strings".to_owned()));
    };
    let mut values = Vec::new();
    let mut levels = Vec::new();
    let mut read = 0;
    while read < rows {
        levels.clear();
        let (records, _, _) = reader.read_records(rows - read, Some(&mut levels), None, &mut values)?;
        if records == 0 {
            return Err(ParquetError::General(format!("{rows} rows are announced, {read} are there")));
        }
        read += records;
    }
    Ok(values)
}

/// The bytes of a column chunk, addressed by their place in the file.
#[derive(Debug)]
struct Chunk {
    start: u64,
    bytes: Bytes,
}

impl Chunk {
    fn from(&self, start: u64) -> ParquetResult<Bytes> {
        let at = start.checked_sub(self.start).and_then(|at| usize::try_from(at).ok());
        match at.filter(|at| *at <= self.bytes.len()) {
            Some(at) => Ok(self.bytes.slice(at..)),
            None => Err(ParquetError::General(format!("byte {start} lies outside of its column"))),
        }
    }
}

impl Length for Chunk {
    fn len(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

impl ChunkReader for Chunk {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(self.from(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let bytes = self.from(start)?;
        if length > bytes.len() {
            return Err(ParquetError::General(format!("a page of {length} bytes leaves its column")));
        }
        Ok(bytes.slice(..length))
    }
}

/// A parquet file of string columns (zstd, page checksums). Each row group is a list of rows, each row one value
/// per column of `names`.
pub(crate) fn write(names: &[&str], groups: &[Vec<Vec<String>>]) -> Vec<u8> {
    try_write(names, groups).expect("rows of strings can be written to memory")
}

fn try_write(names: &[&str], groups: &[Vec<Vec<String>>]) -> ParquetResult<Vec<u8>> {
    let mut fields = Vec::new();
    for name in names {
        let field = Type::primitive_type_builder(name, Physical::BYTE_ARRAY)
            .with_repetition(Repetition::REQUIRED)
            .with_logical_type(Some(LogicalType::String));
        fields.push(Arc::new(field.build()?));
    }
    let schema = Arc::new(Type::group_type_builder("schema").with_fields(fields).build()?);
    let properties = Arc::new(
        WriterProperties::builder()
            .set_created_by("ulmus".to_owned())
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_dictionary_enabled(false)
            .set_statistics_enabled(EnabledStatistics::None)
            .build(),
    );
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::clone(&properties))?;
    let columns = writer.schema_descr().columns().to_vec();
    for rows in groups {
        let mut group = writer.next_row_group()?;
        for (index, descr) in columns.iter().enumerate() {
            let values: Vec<ByteArray> =
                rows.iter().map(|row| ByteArray::from(row[index].as_str())).collect();
            let mut chunk = Vec::new();
            let closed = write_column(descr, &properties, &values, &mut chunk)?;
            group.append_column(&Bytes::from(chunk), closed)?;
        }
        group.close()?;
    }
    writer.into_inner()
}

fn write_column(
    descr: &ColumnDescPtr,
    properties: &WriterPropertiesPtr,
    values: &[ByteArray],
    chunk: &mut Vec<u8>,
) -> ParquetResult<ColumnCloseResult> {
    let pages = Box::new(ChecksummedPages { chunk });
    match get_column_writer(Arc::clone(descr), Arc::clone(properties), pages) {
        ColumnWriter::ByteArrayColumnWriter(mut column) => {
            column.write_batch(values, None, None)?;
            column.close()
        }
        _ => Err(ParquetError::General("the column holds no strings".to_owned())),
    }
}

/// Writes the pages of one column chunk, each with the checksum of its bytes in its header.
struct ChecksummedPages<'a> {
    chunk: &'a mut Vec<u8>,
}

impl PageWriter for ChecksummedPages<'_> {
    fn write_page(&mut self, page: CompressedPage) -> ParquetResult<PageWriteSpec> {
        let mut plain = TrackedWrite::new(Vec::new());
        let data = page.compressed_page().buffer().clone();
        let mut spec = SerializedPageWriter::new(&mut plain).write_page(page)?;
        let plain = plain.into_inner()?;
        let header = &plain[..plain.len() - data.len()];
        let checksummed = with_checksum(header, crc32fast::hash(&data))
            .ok_or_else(|| ParquetError::General("a page header has an unknown form".to_owned()))?;
        let longer = checksummed.len() - header.len();
        spec.offset = self.chunk.len() as u64;
        spec.uncompressed_size += longer;
        spec.compressed_size += longer;
        spec.bytes_written += longer as u64;
        self.chunk.extend(checksummed);
        self.chunk.extend(data);
        Ok(spec)
    }

    fn close(&mut self) -> ParquetResult<()> {
        Ok(())
    }
}

/// Puts field 4, the CRC-32 of the page, into a page header in Thrift's compact form.
///
/// The header begins with fields 1 to 3, three 32-bit numbers. Each field begins with a byte whose high half is
/// the distance from the field before, so the one that follows comes one closer.
fn with_checksum(header: &[u8], crc: u32) -> Option<Vec<u8>> {
    const NEXT_I32: u8 = 0x15;
    let mut at = 0;
    for _ in 0..3 {
        if *header.get(at)? != NEXT_I32 {
            return None;
        }
        at += 1;
        while *header.get(at)? & 0x80 != 0 {
            at += 1;
        }
        at += 1;
    }
    let follows = *header.get(at)?;
    if follows >> 4 < 2 {
        return None;
    }
    let mut longer = header[..at].to_vec();
    longer.push(NEXT_I32);
    let signed = crc.cast_signed();
    let mut zigzag = ((signed << 1) ^ (signed >> 31)).cast_unsigned();
    while zigzag >= 0x80 {
        longer.push(zigzag as u8 | 0x80);
        zigzag >>= 7;
    }
    longer.push(zigzag as u8);
    longer.push(follows - 0x10);
    longer.extend(&header[at + 1..]);
    Some(longer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
        file.texts(column, 0..groups)
    }

    #[test]
    fn what_is_written_is_read() {
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
    fn mistakes_are_told_with_the_columns() {
        let bytes = write(&["text", "path"], &[rows(&["one"])]);
        let message = read(bytes.clone(), "content").unwrap_err().to_string();
        assert!(message.contains(r#"set text of its source to one of ["text", "path"]"#), "{message}");
        let message = read(b"PAR1 no parquet".to_vec(), "text").unwrap_err().to_string();
        assert!(message.contains("a.parquet is not parquet"), "{message}");
        assert!(read(bytes[..bytes.len() - 3].to_vec(), "text").is_err());
        assert!(read(Vec::new(), "text").is_err());
    }

    proptest! {
        /// Damage to a page is an error. A header is not under the checksum, but must not change the text either.
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
