//! Reads and writes shards of token ids: little-endian integers of 2 or 4 bytes, one document after the other.
//!
//! Three formats are read: plain ids (nanoGPT's `.bin`, and the memory maps that OLMo calls `.npy`), llm.c's `.bin`
//! with its header of 1024 bytes, and the `.npy` of `NumPy` itself. Documents are separated by the BOS and EOS tokens
//! of the plan's tokenizer; it does not matter whether a document has one of them, both, or one twice. A document
//! belongs to the unit in whose bytes it begins.

use bytes::Bytes;
use ulmus_plan::Format;
use ulmus_storage::FileInfo;

use crate::contents::refuse_pointer;
use crate::error::DataError;
use crate::store::Folder;
use crate::unit::{TAIL_STEPS, Unit};

/// Maximum size of a header in bytes.
const HEADER: u64 = 4096;
/// The first number in a file of llm.c, and the format of the file's ids. The third number is their count.
const LLM_C: [(u32, Format); 2] = [(20_240_520, Format::U16), (20_240_801, Format::U32)];
const LLM_C_HEADER: usize = 1024;
const NUMPY: &[u8] = b"\x93NUMPY";
/// Size in bytes of the header of a `.npy` file that we write: a multiple of 64, as readers expect.
const NUMPY_HEADER: usize = 128;
/// Fewer ids than this are not enough to recognise a wrong width.
const FEW: usize = 16;
/// Maximum number of tokens in a document. Beyond, the file is assumed to have no separators.
const MAX_DOCUMENT: usize = 1 << 28;

/// The meaning of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Vocabulary {
    /// BOS and EOS, which separate documents.
    pub(crate) ends: [u32; 2],
    /// All ids are below this number.
    pub(crate) pieces: u32,
}

/// The header before the ids in a file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Header {
    bytes: usize,
    /// Format and number of the ids, if the header states them.
    holds: Option<(Format, u64)>,
}

impl Header {
    /// Reads the header at the beginning of a file; an empty one if there is none.
    fn read(file: &[u8]) -> Result<Self, String> {
        if let Some(rest) = file.strip_prefix(NUMPY) {
            return Self::numpy(rest).ok_or("its NumPy header is not valid".to_owned())?;
        }
        let word = |index: usize| Some(u32::from_le_bytes(*file.get(4 * index..)?.first_chunk()?));
        let known = LLM_C.iter().find(|(magic, _)| file.len() >= LLM_C_HEADER && word(0) == Some(*magic));
        Ok(match (known, word(2)) {
            (Some((_, format)), Some(count)) => {
                Self { bytes: LLM_C_HEADER, holds: Some((*format, u64::from(count))) }
            }
            _ => Self::default(),
        })
    }

    /// Checks the header against the expected format and the size of the file.
    fn check(&self, folder: &Folder, file: &FileInfo, format: Format) -> Result<(), DataError> {
        let damaged = |reason| DataError::Damaged { file: folder.place(&file.path), reason };
        let (width, size) = (width(format), file.size - self.bytes as u64);
        match self.holds {
            Some((other, _)) if other != format => {
                let reason =
                    format!("its header says that its numbers are {}, not {}", name(other), name(format));
                Err(refused(folder, file, reason))
            }
            Some((_, count)) if count != size / width => {
                Err(damaged(format!("its header states {count} tokens, but there are {}", size / width)))
            }
            _ if !size.is_multiple_of(width) => {
                Err(damaged(format!("its size of {} bytes is not a multiple of {width}", file.size)))
            }
            _ => Ok(()),
        }
    }

    /// Reads what follows the magic bytes of a `.npy` file: version, length, and a Python dictionary.
    fn numpy(rest: &[u8]) -> Option<Result<Self, String>> {
        let (begin, length) = match rest.first()? {
            1 => (4, usize::from(u16::from_le_bytes(*rest.get(2..)?.first_chunk()?))),
            _ => (6, u32::from_le_bytes(*rest.get(2..)?.first_chunk()?) as usize),
        };
        let text = std::str::from_utf8(rest.get(begin..begin + length)?).ok()?;
        let value = |key: &str| Some(text.split_once(key)?.1.trim_start_matches([':', ' ']));
        let dtype = value("'descr'")?.strip_prefix('\'')?.split('\'').next()?;
        let format = match dtype {
            "<u2" => Format::U16,
            "<u4" => Format::U32,
            other => {
                return Some(Err(format!("its numbers are {other:?}; write them as uint16 or uint32")));
            }
        };
        let (shape, _) = value("'shape'")?.strip_prefix('(')?.split_once(')')?;
        let sides = shape.split(',').map(str::trim).filter(|side| !side.is_empty());
        let count = sides
            .map(|side| side.parse::<u64>().ok())
            .try_fold(1_u64, |count, side| count.checked_mul(side?))?;
        if count > 0 && value("'fortran_order'")?.starts_with("True") {
            return Some(Err("it is in Fortran order; write it in C order".to_owned()));
        }
        Some(Ok(Self { bytes: NUMPY.len() + begin + length, holds: Some((format, count)) }))
    }
}

/// Size of a token in bytes.
pub(crate) const fn width(format: Format) -> u64 {
    if matches!(format, Format::U16) { 2 } else { 4 }
}

/// Size in bytes of a unit that holds about `text` bytes of text, at four bytes per token. The first unit includes the
/// header.
pub(crate) fn step(format: Format, text: u64) -> u64 {
    (text / 4 * width(format)).max(HEADER)
}

const fn name(format: Format) -> &'static str {
    if matches!(format, Format::U16) { "u16" } else { "u32" }
}

/// The format that a file's header states.
pub(crate) fn format_of(folder: &Folder, file: &FileInfo) -> Result<Format, DataError> {
    let unknown = || {
        let reason =
            "it has no header; write format = \"u16\" or \"u32\" in the plan, for the width of its numbers";
        refused(folder, file, reason.to_owned())
    };
    header(folder, file)?.0.holds.map(|(format, _)| format).ok_or_else(unknown)
}

/// Checks that a file's header, if there is one, agrees with the format and the file's size.
pub(crate) fn check(folder: &Folder, file: &FileInfo, format: Format) -> Result<(), DataError> {
    let (header, begin) = header(folder, file)?;
    header.check(folder, file, format)?;
    if header.holds.is_none() && has_empty_halves(&ids(format, &begin)) {
        let (width, twice) = (width(format), 2 * width(format));
        let reason = format!(
            "every second number of {width} bytes is 0, so its numbers seem to have {twice} bytes; {}",
            if twice == 4 { "write format = \"u32\"" } else { "write them as uint16 or uint32" }
        );
        return Err(refused(folder, file, reason));
    }
    Ok(())
}

/// Whether ids look like the halves of wider, small numbers.
fn has_empty_halves(ids: &[u32]) -> bool {
    let halves = |first: usize| ids.iter().skip(first).step_by(2);
    ids.len() >= FEW && halves(1).all(|half| *half == 0) && halves(0).any(|half| *half != 0)
}

/// The header of a file, and the bytes that were read to get it.
fn header(folder: &Folder, file: &FileInfo) -> Result<(Header, Bytes), DataError> {
    let first = folder.read_range(file, 0..file.size.min(HEADER))?;
    refuse_pointer(folder, file, &first)?;
    let header = Header::read(&first).map_err(|reason| refused(folder, file, reason))?;
    Ok((header, first))
}

fn refused(folder: &Folder, file: &FileInfo, reason: String) -> DataError {
    DataError::Format { file: folder.place(&file.path), format: "a shard of token ids", reason }
}

/// The offset in bytes at which a document begins in its file, and its ids.
pub(crate) type Tokens = (u64, Vec<u32>);

/// The documents that begin within the unit, without the tokens that separate them. Without a vocabulary, all ids of
/// the unit are one document.
pub(crate) fn documents(
    folder: &Folder,
    file: &FileInfo,
    format: Format,
    unit: Unit,
    vocabulary: Option<Vocabulary>,
) -> Result<Vec<Tokens>, DataError> {
    let refuse = |reason| refused(folder, file, reason);
    let width = width(format);
    let decode = |from: u64, bytes: &[u8]| {
        let ids = ids(format, bytes);
        match (vocabulary, ids.iter().max()) {
            (Some(Vocabulary { pieces, .. }), Some(most)) if *most >= pieces => Err(refuse(format!(
                "it has token {most} after byte {from}, but the tokenizer has {pieces} pieces; name the tokenizer that \
                 made it in tokenizer.file, and the width of its numbers as format"
            ))),
            _ => Ok(ids),
        }
    };
    // A unit that begins right after the header begins the data, as the first unit usually does.
    let follows_header =
        (1..=HEADER).contains(&unit.first) && header(folder, file)?.0.bytes as u64 == unit.first;
    let begins_text = unit.first == 0 || follows_header;
    // The token before the unit shows whether a document begins exactly at the unit.
    let mut at = if begins_text { unit.first } else { unit.first - width };
    let mut bytes = folder.read_range(file, at..unit.end)?;
    if unit.first == 0 {
        let header = Header::read(&bytes).map_err(refuse)?;
        header.check(folder, file, format)?;
        at = header.bytes as u64;
        bytes = bytes.slice(header.bytes..);
    }
    let first = decode(at, &bytes)?;
    let Some(Vocabulary { ends, .. }) = vocabulary else { return Ok(vec![(at, first)]) };
    let is_end = |id: &u32| ends.contains(id);
    let mut documents: Vec<Tokens> = Vec::new();
    // Tokens before the first separator belong to a document of an earlier unit, if there is one.
    let mut begins_here = begins_text;
    let mut unfinished = false;
    for tokens in first.split(is_end) {
        unfinished = begins_here && !tokens.is_empty();
        if unfinished {
            documents.push((at, tokens.to_vec()));
        }
        begins_here = true;
        at += (tokens.len() as u64 + 1) * width;
    }
    let (mut end, [mut step, most]) = (unit.end, TAIL_STEPS);
    while unfinished && end < file.size {
        let more = end..(end + step).min(file.size);
        step = (2 * step).min(most);
        let ids = decode(end, &folder.read_range(file, more.clone())?)?;
        let (begin, tokens) = documents.last_mut().expect("there is an unfinished document");
        let rest = ids.split(is_end).next().unwrap_or_default();
        tokens.extend(rest);
        if tokens.len() > MAX_DOCUMENT {
            let [bos, eos] = ends;
            let length = tokens.len();
            return Err(refuse(format!(
                "the document at byte {begin} has {length} tokens or more without token {bos} or {eos}, which separate \
                 documents; name the token that ends documents in this file as tokenizer.eos"
            )));
        }
        unfinished = rest.len() == ids.len();
        end = more.end;
    }
    Ok(documents)
}

fn ids(format: Format, bytes: &[u8]) -> Vec<u32> {
    match format {
        Format::U16 => bytes.as_chunks().0.iter().map(|id| u32::from(u16::from_le_bytes(*id))).collect(),
        _ => bytes.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect(),
    }
}

/// Builds a file of ids, with a `.npy` header or without.
#[derive(Debug)]
pub(crate) struct Writer {
    format: Format,
    header: usize,
    file: Vec<u8>,
}

impl Writer {
    pub(crate) fn new(format: Format, header: bool) -> Self {
        let header = if header { NUMPY_HEADER } else { 0 };
        Self { format, header, file: vec![b' '; header] }
    }

    /// Appends ids, which must fit in the format.
    pub(crate) fn push(&mut self, ids: &[u32]) {
        match self.format {
            Format::U16 => self.file.extend(ids.iter().flat_map(|id| (*id as u16).to_le_bytes())),
            _ => self.file.extend(ids.iter().flat_map(|id| id.to_le_bytes())),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.file.len() == self.header
    }

    /// The complete file.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        if self.header > 0 {
            let width = width(self.format);
            let count = (self.file.len() - self.header) as u64 / width;
            let text = format!("{{'descr': '<u{width}', 'fortran_order': False, 'shape': ({count},), }}");
            // Version 1.0, and the length of the rest of the header: the dictionary, spaces and a line end.
            let begin = [NUMPY, &[1, 0], &((NUMPY_HEADER - NUMPY.len() - 4) as u16).to_le_bytes()].concat();
            self.file[..begin.len()].copy_from_slice(&begin);
            self.file[begin.len()..begin.len() + text.len()].copy_from_slice(text.as_bytes());
            self.file[NUMPY_HEADER - 1] = b'\n';
        }
        self.file
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::tests::{memory, stat};

    const BOS: u32 = 1;
    const EOS: u32 = 2;
    fn write(ids: &[u32], format: Format, header: bool) -> Vec<u8> {
        let mut writer = Writer::new(format, header);
        writer.push(ids);
        writer.finish()
    }

    const VOCABULARY: Vocabulary = Vocabulary { ends: [BOS, EOS], pieces: 60_000 };

    fn llm_c(ids: &[u32]) -> Vec<u8> {
        let mut header = [20_240_520, 1, ids.len() as u32].map(u32::to_le_bytes).concat();
        header.resize(LLM_C_HEADER, 0);
        [header, write(ids, Format::U16, false)].concat()
    }

    fn file(bytes: Vec<u8>) -> (Folder, FileInfo) {
        let folder = memory();
        folder.write("a.bin", bytes).unwrap();
        let info = stat(&folder, "a.bin");
        (folder, info)
    }

    fn read(
        (folder, info): &(Folder, FileInfo),
        format: Format,
        step: u64,
    ) -> Result<Vec<Vec<u32>>, DataError> {
        let starts = (0..info.size).step_by(step as usize);
        let units =
            starts.map(|first| Unit { file: 0, first, end: (first + step).min(info.size), bytes: step });
        let read = |unit| documents(folder, info, format, unit, Some(VOCABULARY));
        let documents = units.map(read).collect::<Result<Vec<_>, _>>()?.concat();
        Ok(documents.into_iter().map(|(_, ids)| ids).collect())
    }

    proptest! {
        #[test]
        fn every_document_is_in_one_unit(
            lengths in prop::collection::vec(1_usize..3000, 0..20),
            leads: bool,
            trails: bool,
            step in 1024_u64..5000,
        ) {
            prop_assume!(leads || trails);
            let documents: Vec<Vec<u32>> =
                (0..).zip(&lengths).map(|(number, length)| vec![100 + number; *length]).collect();
            let stream: Vec<u32> = documents
                .iter()
                .flat_map(|d| leads.then_some(BOS).into_iter().chain(d.iter().copied()).chain(trails.then_some(EOS)))
                .collect();
            let step = step / 4 * 4;
            for format in [Format::U16, Format::U32] {
                for header in [false, true] {
                    let file = file(write(&stream, format, header));
                    prop_assert_eq!(&read(&file, format, step).unwrap(), &documents);
                }
            }
            prop_assert_eq!(&read(&file(llm_c(&stream)), Format::U16, step).unwrap(), &documents);
        }
    }

    #[test]
    fn a_unit_may_begin_where_the_header_ends() {
        let documents = [vec![100_u32], vec![101, 101]];
        let stream = [100, EOS, 101, 101, EOS];
        assert_eq!(read(&file(llm_c(&stream)), Format::U16, HEADER).unwrap(), documents);
    }

    #[test]
    fn headers_state_the_width_of_numbers() {
        let of = |bytes: Vec<u8>| {
            let (folder, info) = file(bytes);
            format_of(&folder, &info)
        };
        assert_eq!(of(write(&[1, 70_000], Format::U32, true)).unwrap(), Format::U32);
        assert_eq!(of(write(&[1, 7], Format::U16, true)).unwrap(), Format::U16);
        assert_eq!(of(llm_c(&[1, 7])).unwrap(), Format::U16);
        let message = of(write(&[1, 7], Format::U16, false)).unwrap_err().to_string();
        assert!(message.contains("write format = \"u16\" or \"u32\""), "{message}");
        // This is what `numpy.save` writes for int64, in two rows of three.
        let numpy =
            |dict: &str| [NUMPY, &[1, 0], &(dict.len() as u16).to_le_bytes()[..], dict.as_bytes()].concat();
        let message = of(numpy("{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }")).unwrap_err();
        assert!(message.to_string().contains("\"<i8\"; write them as uint16"), "{message}");
        let header =
            Header::read(&numpy("{'descr': '<u2', 'fortran_order': False, 'shape': (2, 3), }")).unwrap();
        assert_eq!(header.holds, Some((Format::U16, 6)));
    }

    #[test]
    fn mistakes_and_damage_are_reported() {
        let whole = write(&[BOS, 500, 501, EOS], Format::U16, true);
        let (cut, odd) = (whole[..whole.len() - 2].to_vec(), [&whole[..], &[0]].concat());
        for (bytes, format, words) in [
            (cut, Format::U16, "states 4 tokens, but there are 3"),
            (odd, Format::U16, "is not a multiple of 2"),
            (whole, Format::U32, "its numbers are u16, not u32"),
            (write(&[5, 60_000], Format::U16, false), Format::U16, "the tokenizer has 60000 pieces"),
        ] {
            let message = read(&file(bytes), format, 1024).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
