//! Writes parquet files whose pages have checksums.

use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{Compression, LogicalType, Repetition, Type as Physical, ZstdLevel};
use parquet::column::page::{CompressedPage, PageWriteSpec, PageWriter};
use parquet::column::writer::{ColumnCloseResult, ColumnWriter, get_column_writer};
use parquet::data_type::ByteArray;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterPropertiesPtr};
use parquet::file::writer::{SerializedFileWriter, SerializedPageWriter, TrackedWrite};
use parquet::schema::types::{ColumnDescPtr, Type};

/// A parquet file of string columns, with zstd compression and page checksums. Each row group is a list of rows, and
/// each row has one value per column in `names`.
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
        _ => Err(ParquetError::General("the column does not hold strings".to_owned())),
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
            .ok_or_else(|| ParquetError::General("a page header has an unknown layout".to_owned()))?;
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

/// Inserts field 4, the CRC-32 of the page, into a page header in Thrift's compact protocol.
///
/// The header begins with the fields 1 to 3, which are 32-bit numbers. Each field begins with a byte whose high half is
/// the distance from the previous field's number, so the distance of the field after the new one shrinks by one.
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
