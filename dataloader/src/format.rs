//! From the bytes of a unit to its documents.
//!
//! A unit, or a segment of a chain, is decoded whole before any of it is used: damage that shows late cannot leave
//! half of it behind.
//! Units of a file do not overlap and leave nothing out: a row group or line belongs to exactly one of them.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use ulmus_plan::Format;
use ulmus_storage::FileInfo;

use crate::compressed::{CompressedReader, Line};
use crate::contents;
use crate::error::DataError;
use crate::line::{is_blank, text_of_line};
use crate::parquet::{ParquetFile, Rows};
use crate::store::Folder;
use crate::tokens::{self, Vocabulary};

/// Bytes that are read beyond the end of a unit to find the end of its last document, at first and at most.
pub(crate) const TAIL_STEPS: [u64; 2] = [64 << 10, 8 << 20];

/// What is shuffled: as much as fits into `data.unit`, at least one row group, line or file. Row groups that are larger,
/// and chains, are read in segments. Written as `[file, first, end, bytes]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u64, u64, u64)", into = "(u32, u64, u64, u64)")]
pub(crate) struct Unit {
    /// Index of its (first) file in the source.
    pub(crate) file: u32,
    /// Where it begins: row group (parquet), byte (jsonl and token ids; the first line or document that begins here or
    /// later), file (text); chains have stored bytes here, all of the file.
    pub(crate) first: u64,
    /// Where it ends, in the same measure; not included.
    pub(crate) end: u64,
    /// Bytes of text, as far as can be told without decoding: those that are stored.
    pub(crate) bytes: u64,
}

impl From<(u32, u64, u64, u64)> for Unit {
    fn from((file, first, end, bytes): (u32, u64, u64, u64)) -> Self {
        Self { file, first, end, bytes }
    }
}

impl From<Unit> for (u32, u64, u64, u64) {
    fn from(unit: Unit) -> Self {
        (unit.file, unit.first, unit.end, unit.bytes)
    }
}

/// How the files of a source are read.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) format: Format,
    /// Column or key of the text.
    pub(crate) text: String,
    /// Most bytes of text in a unit, and in a segment of one.
    pub(crate) limit: u64,
    /// What ids mean, where files hold them.
    pub(crate) vocabulary: Option<Vocabulary>,
}

impl Layout {
    /// Cuts files into units of at most `limit` bytes of text where that is possible. Empty files have none.
    pub(crate) fn units(&self, folder: &Folder, files: &[FileInfo]) -> Result<Vec<Unit>, DataError> {
        let Self { format, text, limit, .. } = self;
        let limit = *limit;
        let mut units = Vec::new();
        let mut cut = |file: u32, size: u64, step: u64| {
            let ends = (1..).map(|n| n * step).take_while(|end| *end < size).chain([size]);
            let mut first = 0;
            for end in ends.filter(|end| *end > 0) {
                units.push(Unit { file, first, end, bytes: end - first });
                first = end;
            }
        };
        match format {
            Format::Jsonl => (0..).zip(files).for_each(|(index, file)| cut(index, file.size, limit)),
            Format::U16 | Format::U32 => {
                // Headers may lie on a server far away, so several are asked for at once.
                files.par_iter().try_for_each(|file| tokens::check(folder, file, *format))?;
                let step = tokens::step(*format, limit);
                (0..).zip(files).for_each(|(index, file)| cut(index, file.size, step));
            }
            Format::Parquet => {
                // Footers may lie on a server far away, so several are asked for at once.
                let sizes: Vec<Vec<u64>> = files
                    .par_iter()
                    .map(|file| ParquetFile::open(folder, file)?.row_group_sizes(text))
                    .collect::<Result<_, _>>()?;
                for (index, sizes) in (0..).zip(&sizes) {
                    units.extend(runs(sizes, limit).map(|(first, end, bytes)| Unit {
                        file: index,
                        first,
                        end,
                        bytes,
                    }));
                }
            }
            Format::JsonGz | Format::JsonZst => {
                let chains = (0..).zip(files).filter(|(_, file)| file.size > 0);
                units.extend(chains.map(|(index, file)| Unit {
                    file: index,
                    first: 0,
                    end: file.size,
                    bytes: file.size,
                }));
            }
            Format::Text => {
                let sizes: Vec<u64> = files.iter().map(|file| file.size).collect();
                units.extend(runs(&sizes, limit).map(|(first, end, bytes)| Unit {
                    file: first as u32,
                    first,
                    end,
                    bytes,
                }));
            }
        }
        Ok(units)
    }

    /// Opens a unit at a segment.
    pub(crate) fn open(
        &self,
        folder: &Folder,
        files: &[FileInfo],
        unit: Unit,
        segment: u64,
    ) -> Result<Segments, DataError> {
        let Self { format, text: key, limit, vocabulary } = self;
        let file = &files[unit.file as usize];
        let documents = match format {
            Format::JsonGz | Format::JsonZst => {
                let chain = CompressedReader::open(folder, file, *format, *limit, segment)?;
                return Ok(Segments::Lines(chain, unit.file, key.clone()));
            }
            Format::Parquet => {
                let groups = unit.first as usize..unit.end as usize;
                let rows = ParquetFile::open(folder, file)?.rows(key, groups, *limit, segment)?;
                return Ok(Segments::Rows(Box::new(rows), unit.file));
            }
            _ if segment > 0 => None,
            Format::Jsonl => Some(lines(folder, file, key, unit)?),
            Format::U16 | Format::U32 => {
                let documents = tokens::documents(folder, file, *format, unit, *vocabulary)?;
                let document = |(at, ids)| Document { file: unit.file, at, content: Content::Tokens(ids) };
                Some(documents.into_iter().map(document).collect())
            }
            Format::Text => {
                let read = |number: u64| {
                    let file = &files[number as usize];
                    let content = Content::Text(text(folder, file)?);
                    Ok(Document { file: number as u32, at: 0, content })
                };
                Some((unit.first..unit.end).map(read).collect::<Result<_, DataError>>()?)
            }
        };
        Ok(Segments::Whole(documents))
    }
}

/// Joins neighbours as long as their sum stays within `limit`: `(first, end, sum)` of each run.
pub(crate) fn runs(sizes: &[u64], limit: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = at;
        let mut sum = *sizes.get(at)?;
        at += 1;
        while let Some(more) = sizes.get(at).filter(|more| sum + **more <= limit) {
            sum += more;
            at += 1;
        }
        Some((first as u64, at as u64, sum))
    })
}

/// A document, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Document {
    /// Index of its file in the source.
    pub(crate) file: u32,
    /// Where it stands in the file: row (parquet), or byte of the (decompressed) file at which its line or its ids begin.
    pub(crate) at: u64,
    pub(crate) content: Content,
}

/// What a document says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    Text(String),
    /// Ids of a text, without BOS and EOS.
    Tokens(Vec<u32>),
}

impl Content {
    /// The text of a value, without a mark of its encoding: it was a file once.
    pub(crate) fn text(text: String) -> Self {
        Self::Text(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
    }
}

/// A unit that is being read, a segment at a time. Chains and large row groups have more than one.
#[derive(Debug)]
pub(crate) enum Segments {
    /// Documents that were read at once, until they are taken.
    Whole(Option<Vec<Document>>),
    /// Rows of a parquet file.
    Rows(Box<Rows>, u32),
    /// Lines of a compressed file, and the key of their texts.
    Lines(CompressedReader, u32, String),
}

impl Segments {
    /// The documents of the next segment, in order; none at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<Document>>, DataError> {
        match self {
            Self::Whole(documents) => Ok(documents.take()),
            Self::Rows(rows, file) => {
                let document = |(at, text)| Document { file: *file, at, content: Content::text(text) };
                Ok(rows.next()?.map(|rows| rows.into_iter().map(document).collect()))
            }
            Self::Lines(reader, file, key) => {
                let Some(lines) = reader.next()? else { return Ok(None) };
                let document = |Line { at, bytes }: Line| {
                    if is_blank(&bytes) {
                        return None;
                    }
                    let place = || format!("{} at byte {at} of its text", reader.place());
                    let text = text_of_line(&bytes, key, place).transpose()?;
                    Some(text.map(|text| Document { file: *file, at, content: Content::text(text) }))
                };
                lines.into_iter().filter_map(document).collect::<Result<_, _>>().map(Some)
            }
        }
    }

    /// The segment that comes next.
    pub(crate) const fn position(&self) -> u64 {
        match self {
            Self::Whole(documents) => documents.is_none() as u64,
            Self::Rows(rows, _) => rows.segment(),
            Self::Lines(chain, ..) => chain.segment(),
        }
    }

    /// How much of the unit is behind the segments that were read, in the measure of [`Unit::bytes`]; about, where that
    /// counts what is not text. Of a unit that is read at once nothing, until it is over.
    pub(crate) fn passed(&self) -> u64 {
        match self {
            Self::Whole(_) => 0,
            Self::Rows(rows, _) => rows.passed(),
            Self::Lines(chain, ..) => chain.taken(),
        }
    }

    /// Whether nothing is left.
    pub(crate) fn ended(&mut self) -> Result<bool, DataError> {
        match self {
            Self::Whole(documents) => Ok(documents.is_none()),
            Self::Rows(rows, _) => Ok(rows.ends()),
            Self::Lines(chain, ..) => chain.ends(),
        }
    }
}

fn text(folder: &Folder, file: &FileInfo) -> Result<String, DataError> {
    let bytes = folder.read_all(file)?;
    refuse_pointer(folder, file, &bytes)?;
    contents::text_of(&bytes).map(str::to_owned).map_err(|reason| DataError::Format {
        file: folder.place(&file.path),
        format: "UTF-8",
        reason: reason.to_string(),
    })
}

/// Makes sure that a file, which begins so, is not what Git LFS leaves in its place.
pub(crate) fn refuse_pointer(folder: &Folder, file: &FileInfo, begin: &[u8]) -> Result<(), DataError> {
    if ulmus_types::is_pointer(begin, file.size) {
        return Err(DataError::Pointer { file: folder.place(&file.path) });
    }
    Ok(())
}

/// The texts of the JSON objects on the lines that begin within the unit.
fn lines(folder: &Folder, file: &FileInfo, key: &str, unit: Unit) -> Result<Vec<Document>, DataError> {
    // One byte more in front tells whether a line begins exactly at the unit.
    let begin = unit.first.saturating_sub(1);
    let mut bytes = folder.read_range(file, begin..unit.end)?.to_vec();
    if unit.first == 0 {
        refuse_pointer(folder, file, &bytes)?;
    }
    let first_line = match unit.first {
        0 => Some(0),
        // A line that begins in an earlier unit is read there.
        _ => bytes.iter().position(|byte| *byte == b'\n').map(|newline| newline + 1),
    };
    // Within a line that is longer than a unit none begins.
    let Some(first_line) = first_line.filter(|at| begin + (*at as u64) < unit.end) else {
        return Ok(Vec::new());
    };
    let (mut end, [mut step, most]) = (unit.end, TAIL_STEPS);
    while bytes.last() != Some(&b'\n') && end < file.size {
        let more = folder.read_range(file, end..(end + step).min(file.size))?;
        end += more.len() as u64;
        step = (2 * step).min(most);
        match more.iter().position(|byte| *byte == b'\n') {
            Some(newline) => bytes.extend(&more[..=newline]),
            None => bytes.extend(more),
        }
    }
    let mut documents = Vec::new();
    let mut at = first_line;
    for line in bytes[first_line..].split_inclusive(|byte| *byte == b'\n') {
        if !is_blank(line) {
            let at = begin + at as u64;
            let text = text_of_line(line, key, || format!("{} at byte {at}", folder.place(&file.path)))?;
            documents.extend(text.map(|text| Document { file: unit.file, at, content: Content::text(text) }));
        }
        at += line.len();
    }
    Ok(documents)
}

/// Rows of a file, if it tells them without being read.
pub(crate) fn rows(folder: &Folder, file: &FileInfo, format: Format) -> Result<Option<u64>, DataError> {
    match format {
        Format::Parquet => Ok(Some(ParquetFile::open(folder, file)?.row_count())),
        _ => Ok(None),
    }
}

/// Names and types of what a file holds, for people.
pub(crate) fn schema(folder: &Folder, file: &FileInfo, format: Format) -> Result<String, DataError> {
    Ok(match format {
        Format::Parquet => ParquetFile::open(folder, file)?.schema(),
        Format::Jsonl | Format::JsonGz | Format::JsonZst => "one JSON object per line".to_owned(),
        Format::Text => "one document per file".to_owned(),
        Format::U16 | Format::U32 => format!("token ids of {} bytes", tokens::width(format)),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::tests::{memory, stat};

    fn read(folder: &Folder, format: Format, limit: u64) -> Result<Vec<String>, DataError> {
        let files = folder.list()?;
        let layout = layout(format, limit);
        let mut texts = Vec::new();
        for unit in layout.units(folder, &files)? {
            let mut segments = layout.open(folder, &files, unit, 0)?;
            while let Some(documents) = segments.next()? {
                texts.extend(documents.into_iter().map(|document| match document.content {
                    Content::Text(text) => text,
                    Content::Tokens(ids) => format!("{ids:?}"),
                }));
            }
        }
        Ok(texts)
    }

    fn layout(format: Format, limit: u64) -> Layout {
        Layout { format, text: "text".to_owned(), limit, vocabulary: None }
    }

    #[test]
    fn a_byte_order_mark_before_a_value_is_no_text() {
        assert_eq!(Content::text("\u{feff}text\u{feff}".into()), Content::Text("text\u{feff}".into()));
    }

    #[test]
    fn what_crawled_lines_have_does_not_cost_a_document() {
        let folder = memory();
        let lines = [
            r#"\u{feff}{"text": "marked"}"#.replace(r"\u{feff}", "\u{feff}"),
            r#"{"text": "half \ud83d, other half \udE00, both \ud83d\ude00, none \\ud83d"}"#.to_owned(),
            r#"{"text": "\ud83d\ud83d\ude00"}"#.to_owned(),
        ];
        folder.write("a.jsonl", lines.join("\n").into()).unwrap();
        assert_eq!(
            read(&folder, Format::Jsonl, 1 << 20).unwrap(),
            [
                "marked",
                "half \u{fffd}, other half \u{fffd}, both \u{1f600}, none \\ud83d",
                "\u{fffd}\u{1f600}"
            ]
        );
        folder.write("a.jsonl", br#"{"text": "\ud83d\x"}"#.to_vec()).unwrap();
        let message = read(&folder, Format::Jsonl, 1 << 20).unwrap_err().to_string();
        assert!(message.contains("invalid escape at character 18"), "{message}");
    }

    proptest! {
        #[test]
        fn every_line_is_in_one_unit(lengths in prop::collection::vec(0_usize..40, 0..30), limit in 1_u64..200, newline: bool) {
            let texts: Vec<String> = lengths.iter().enumerate().map(|(i, n)| format!("{i} {}", "é".repeat(*n))).collect();
            let mut file = texts.iter().map(|t| serde_json::json!({"text": t, "n": 1}).to_string()).collect::<Vec<_>>().join("\n");
            if newline {
                file.push('\n');
            }
            let folder = memory();
            folder.write("a.jsonl", file.into_bytes()).unwrap();
            prop_assert_eq!(read(&folder, Format::Jsonl, limit).unwrap(), texts);
        }

        #[test]
        fn runs_cover_everything_within_the_limit(sizes in prop::collection::vec(0_u64..50, 0..40), limit in 1_u64..120) {
            let mut next = 0;
            for (first, end, sum) in runs(&sizes, limit) {
                prop_assert_eq!(first, next);
                prop_assert_eq!(sum, sizes[first as usize..end as usize].iter().sum::<u64>());
                prop_assert!(sum <= limit || end - first == 1);
                next = end;
            }
            prop_assert_eq!(next, sizes.len() as u64);
        }
    }

    #[test]
    fn small_texts_share_a_unit() {
        let folder = memory();
        for (name, text) in [("b.txt", "bb"), ("a.txt", "a"), ("c.txt", "c".repeat(9).as_str())] {
            folder.write(name, text.as_bytes().to_vec()).unwrap();
        }
        let files = folder.list().unwrap();
        assert_eq!(layout(Format::Text, 4).units(&folder, &files).unwrap().len(), 2);
        assert_eq!(read(&folder, Format::Text, 4).unwrap(), ["a", "bb", "ccccccccc"]);
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        for (line, words) in [
            ("{\"text\": ", "a.jsonl at byte 17 is not jsonl"),
            ("[1]", "no JSON object"),
            (
                "{\"content\": \"x\", \"id\": 1}",
                "no column \"text\"; set text of its source to one of [\"content\", \"id\"]",
            ),
            ("{\"text\": 7}", "holds a number"),
        ] {
            let folder = memory();
            folder.write("a.jsonl", format!("{{\"text\": \"fine\"}}\n{line}\n").into_bytes()).unwrap();
            let message = read(&folder, Format::Jsonl, 1000).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        let folder = memory();
        folder.write("a.txt", b"caf\xe9".to_vec()).unwrap();
        let info = stat(&folder, "a.txt");
        let unit = Unit { file: 0, first: 0, end: 1, bytes: 4 };
        let message = layout(Format::Text, 4).open(&folder, &[info], unit, 0).unwrap_err().to_string();
        assert!(message.contains("a.txt is not UTF-8"), "{message}");
    }
}
