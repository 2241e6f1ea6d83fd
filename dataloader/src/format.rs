//! Decodes the bytes of a unit into its documents.
//!
//! A unit, or a segment of one, is decoded completely before any of it is used, so that damage found late cannot leave
//! half of it in use. The units of a file do not overlap and leave nothing out: each row group or line belongs to
//! exactly one of them.

use rayon::prelude::*;
use ulmus_plan::Format;
use ulmus_storage::FileInfo;

use crate::arrow::ArrowTexts;
use crate::compressed::{CompressedReader, Line};
use crate::contents::{refuse_pointer, text_of};
use crate::error::DataError;
use crate::line::{is_blank, text_of_line};
use crate::parquet::{ParquetFile, Rows};
use crate::store::Folder;
use crate::tokens::{self, Vocabulary};
use crate::unit::{TAIL_STEPS, Unit};

/// How the files of a source are read.
#[derive(Debug, Clone)]
pub(crate) struct UnitReader {
    pub(crate) format: Format,
    /// Column or key that holds the text.
    pub(crate) text: String,
    /// Maximum bytes of text in a unit, and in a segment of one.
    pub(crate) limit: u64,
    /// The vocabulary of files that hold token ids.
    pub(crate) vocabulary: Option<Vocabulary>,
}

impl UnitReader {
    /// Cuts files into units of at most `limit` bytes of text where that is possible. Empty files have no units.
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
                // Headers may have to be fetched from a distant server, so several are requested at once.
                files.par_iter().try_for_each(|file| tokens::check(folder, file, *format))?;
                let step = tokens::step(*format, limit);
                (0..).zip(files).for_each(|(index, file)| cut(index, file.size, step));
            }
            Format::Parquet => {
                // Footers may have to be fetched from a distant server, so several are requested at once.
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
            Format::JsonGz | Format::JsonZst | Format::Arrow => {
                let whole = (0..).zip(files).filter(|(_, file)| file.size > 0);
                units.extend(whole.map(|(index, file)| Unit {
                    file: index,
                    first: 0,
                    end: file.size,
                    bytes: file.size,
                }));
            }
            Format::Json => return Err(no_documents(folder, files)),
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

    /// Opens a unit at the beginning of `segment`.
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
                let reader = CompressedReader::open(folder, file, *format, *limit, segment)?;
                return Ok(Segments::Lines(reader, unit.file, key.clone()));
            }
            Format::Parquet => {
                let groups = unit.first as usize..unit.end as usize;
                let rows = Rows::open(ParquetFile::open(folder, file)?, key, groups, *limit, segment)?;
                return Ok(Segments::Rows(Box::new(rows), unit.file));
            }
            Format::Arrow => {
                let texts = ArrowTexts::open(folder, file, key, *limit, segment)?;
                return Ok(Segments::Arrow(Box::new(texts), unit.file));
            }
            Format::Json => return Err(no_documents(folder, files)),
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

/// Joins neighbours as long as their sum stays within `limit`, and returns `(first, end, sum)` for each run.
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

/// A document, and where it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Document {
    /// Index of the document's file in the source.
    pub(crate) file: u32,
    /// Position in the file: the row (parquet, arrow), or the offset of the line or the ids in the decompressed file.
    pub(crate) at: u64,
    pub(crate) content: Content,
}

/// The content of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    Text(String),
    /// The token ids of a text, without BOS and EOS.
    Tokens(Vec<u32>),
}

impl Content {
    /// A text without its byte order mark: the value may once have been a file.
    pub(crate) fn text(text: String) -> Self {
        Self::Text(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
    }
}

/// A unit that is being read, one segment at a time. Compressed files and large row groups have several segments.
#[derive(Debug)]
pub(crate) enum Segments {
    /// All documents of the unit, until they are taken.
    Whole(Option<Vec<Document>>),
    /// Rows of a parquet file, and the index of the file.
    Rows(Box<Rows>, u32),
    /// Rows of an Arrow file, and the index of the file.
    Arrow(Box<ArrowTexts>, u32),
    /// Lines of a compressed file, the index of the file, and the key that holds the text.
    Lines(CompressedReader, u32, String),
}

impl Segments {
    /// The documents of the next segment, in order, or `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<Document>>, DataError> {
        match self {
            Self::Whole(documents) => Ok(documents.take()),
            Self::Rows(rows, file) => {
                let document = |(at, text)| Document { file: *file, at, content: Content::text(text) };
                Ok(rows.next()?.map(|rows| rows.into_iter().map(document).collect()))
            }
            Self::Arrow(texts, file) => {
                let document = |(at, text)| Document { file: *file, at, content: Content::text(text) };
                Ok(texts.next()?.map(|rows| rows.into_iter().map(document).collect()))
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

    /// Number of the segment that [`Self::next`] returns.
    pub(crate) const fn position(&self) -> u64 {
        match self {
            Self::Whole(documents) => documents.is_none() as u64,
            Self::Rows(rows, _) => rows.segment(),
            Self::Arrow(texts, _) => texts.segment(),
            Self::Lines(reader, ..) => reader.segment(),
        }
    }

    /// How much of the unit has been read, in the measure of [`Unit::bytes`]; approximate where that counts more than
    /// text, and 0 for a unit that is read at once, until it is finished.
    pub(crate) fn passed(&self) -> u64 {
        match self {
            Self::Whole(_) => 0,
            Self::Rows(rows, _) => rows.passed(),
            Self::Arrow(texts, _) => texts.taken(),
            Self::Lines(reader, ..) => reader.taken(),
        }
    }

    /// Whether all segments have been read.
    pub(crate) fn ended(&mut self) -> Result<bool, DataError> {
        match self {
            Self::Whole(documents) => Ok(documents.is_none()),
            Self::Rows(rows, _) => Ok(rows.ends()),
            Self::Arrow(texts, _) => texts.ends(),
            Self::Lines(reader, ..) => reader.ends(),
        }
    }
}

/// The error for files whose format is one of rows alone.
fn no_documents(folder: &Folder, files: &[FileInfo]) -> DataError {
    DataError::Format {
        file: files.first().map(|file| folder.place(&file.path)).unwrap_or_default(),
        format: "a file of documents",
        reason: "it is a list of JSON objects; write them one per line".to_owned(),
    }
}

fn text(folder: &Folder, file: &FileInfo) -> Result<String, DataError> {
    let bytes = folder.read_all(file)?;
    refuse_pointer(folder, file, &bytes)?;
    text_of(&bytes).map(str::to_owned).map_err(|reason| DataError::Format {
        file: folder.place(&file.path),
        format: "UTF-8",
        reason: reason.to_string(),
    })
}

/// The texts in the JSON objects on those lines that begin within the unit.
fn lines(folder: &Folder, file: &FileInfo, key: &str, unit: Unit) -> Result<Vec<Document>, DataError> {
    // The byte before the unit shows whether a line begins exactly at the unit.
    let begin = unit.first.saturating_sub(1);
    let mut bytes = folder.read_range(file, begin..unit.end)?.to_vec();
    if unit.first == 0 {
        refuse_pointer(folder, file, &bytes)?;
    }
    let first_line = match unit.first {
        0 => Some(0),
        // A line that begins in an earlier unit belongs to that unit.
        _ => bytes.iter().position(|byte| *byte == b'\n').map(|newline| newline + 1),
    };
    // No line begins within a unit that lies inside a longer line.
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

/// Number of rows in a file, if the format states it.
pub(crate) fn rows(folder: &Folder, file: &FileInfo, format: Format) -> Result<Option<u64>, DataError> {
    match format {
        Format::Parquet => Ok(Some(ParquetFile::open(folder, file)?.row_count())),
        _ => Ok(None),
    }
}

/// A description of a file's columns and their types, for people.
pub(crate) fn schema(folder: &Folder, file: &FileInfo, format: Format) -> Result<String, DataError> {
    Ok(match format {
        Format::Parquet => ParquetFile::open(folder, file)?.schema(),
        Format::Arrow => ArrowTexts::schema(folder, file)?,
        Format::Jsonl | Format::JsonGz | Format::JsonZst => "one JSON object per line".to_owned(),
        Format::Json => "a list of JSON objects".to_owned(),
        Format::Text => "one document per file".to_owned(),
        Format::U16 | Format::U32 => format!("token ids of {} bytes each", tokens::width(format)),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::tests::{memory, stat};

    fn read(folder: &Folder, format: Format, limit: u64) -> Result<Vec<String>, DataError> {
        let files = folder.list()?;
        let reader = reader(format, limit);
        let mut texts = Vec::new();
        for unit in reader.units(folder, &files)? {
            let mut segments = reader.open(folder, &files, unit, 0)?;
            while let Some(documents) = segments.next()? {
                texts.extend(documents.into_iter().map(|document| match document.content {
                    Content::Text(text) => text,
                    Content::Tokens(ids) => format!("{ids:?}"),
                }));
            }
        }
        Ok(texts)
    }

    fn reader(format: Format, limit: u64) -> UnitReader {
        UnitReader { format, text: "text".to_owned(), limit, vocabulary: None }
    }

    #[test]
    fn a_byte_order_mark_before_a_value_is_dropped() {
        assert_eq!(Content::text("\u{feff}text\u{feff}".into()), Content::Text("text\u{feff}".into()));
    }

    #[test]
    fn oddities_of_crawled_lines_do_not_cost_a_document() {
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
        assert_eq!(reader(Format::Text, 4).units(&folder, &files).unwrap().len(), 2);
        assert_eq!(read(&folder, Format::Text, 4).unwrap(), ["a", "bb", "ccccccccc"]);
    }

    #[test]
    fn errors_name_the_place() {
        for (line, words) in [
            ("{\"text\": ", "a.jsonl at byte 17 is not jsonl"),
            ("[1]", "not a JSON object"),
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
        let message = reader(Format::Text, 4).open(&folder, &[info], unit, 0).unwrap_err().to_string();
        assert!(message.contains("a.txt is not UTF-8"), "{message}");
    }
}
