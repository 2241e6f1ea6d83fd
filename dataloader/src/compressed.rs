//! Compressed files of JSON lines, which cannot be entered in the middle: *chains*.
//!
//! A chain is read from its beginning, in *segments* of at most `data.unit` of text: a line belongs to the segment in
//! whose bytes of the decompressed stream it begins, so that segments do not depend on how the file is stored or read.
//! To begin at a later segment, what comes before is decompressed and thrown away.
//!
//! A segment is whole before any of it is used. A checksum stands at the end of a gzip member, so damage may show
//! only segments later; the error then names the file. A zstd frame may have none.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes};
use flate2::bufread::GzDecoder;
use ulmus_plan::Format;
use ulmus_storage::FileInfo;

use crate::error::DataError;
use crate::format::refuse_pointer;
use crate::store::{Folder, Steps};

/// Decompressed bytes that are held beside the segment.
const BUFFER: usize = 256 << 10;

/// Of a zstd frame, as a power of two: the format's own limit. Some corpora are stored with `--long=31`, and then take as
/// much memory.
const LONGEST_WINDOW: u32 = 31;

/// A chain that is being read.
pub(crate) struct CompressedReader {
    text: BufReader<Box<dyn Read + Send>>,
    place: String,
    /// Where the next line begins in the decompressed stream.
    at: u64,
    segment: u64,
    limit: u64,
    /// Stored bytes that the decoder has taken.
    taken: Arc<AtomicU64>,
}

impl fmt::Debug for CompressedReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CompressedReader({}, segment {})", self.place, self.segment)
    }
}

/// A line of a chain, and where it begins.
pub(crate) struct Line {
    pub(crate) at: u64,
    pub(crate) bytes: Vec<u8>,
}

impl CompressedReader {
    /// Opens a file at the beginning of a segment.
    pub(crate) fn open(
        folder: &Folder,
        file: &FileInfo,
        format: Format,
        limit: u64,
        segment: u64,
    ) -> Result<Self, DataError> {
        let place = folder.place(&file.path);
        let taken = Arc::new(AtomicU64::new(0));
        let mut stored = Stored {
            steps: Steps::new(folder, file, std::iter::once(0..file.size)),
            fetched: Bytes::new(),
            taken: Arc::clone(&taken),
        };
        refuse_pointer(folder, file, stored.fill_buf().map_err(|error| told(&place, error))?)?;
        let text: Box<dyn Read + Send> = if format == Format::JsonZst {
            let decoder = zstd::stream::read::Decoder::with_buffer(stored).and_then(|mut decoder| {
                decoder.window_log_max(LONGEST_WINDOW)?;
                Ok(decoder)
            });
            Box::new(decoder.map_err(|error| told(&place, error))?)
        } else {
            Box::new(Members(Some(GzDecoder::new(stored))))
        };
        let text = BufReader::with_capacity(BUFFER, text);
        let mut chain = Self { text, place, at: 0, segment, limit, taken };
        if segment > 0 {
            // Up to the byte before: it tells whether a line begins exactly at the segment.
            chain.pass(segment * limit - 1)?;
            let rest = chain.text.skip_until(b'\n').map_err(|error| told(&chain.place, error))?;
            chain.at += rest as u64;
        }
        Ok(chain)
    }

    /// The file, for messages.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    /// The next segment that is read.
    pub(crate) const fn segment(&self) -> u64 {
        self.segment
    }

    /// Bytes of the file, as it is stored, that have been used up.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// The lines of the next segment; none at the end of the file.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<Line>>, DataError> {
        if self.ends()? {
            return Ok(None);
        }
        self.segment += 1;
        let end = self.segment * self.limit;
        let mut lines = Vec::new();
        while self.at < end {
            let mut bytes = Vec::new();
            let read = self.text.read_until(b'\n', &mut bytes).map_err(|error| told(&self.place, error))?;
            if read == 0 {
                break;
            }
            lines.push(Line { at: self.at, bytes });
            self.at += read as u64;
        }
        Ok(Some(lines))
    }

    /// Whether nothing is left. Everything has been checked then.
    pub(crate) fn ends(&mut self) -> Result<bool, DataError> {
        let place = &self.place;
        self.text.fill_buf().map(<[u8]>::is_empty).map_err(|error| told(place, error))
    }

    /// Throws away what comes before a byte.
    fn pass(&mut self, to: u64) -> Result<(), DataError> {
        let mut before = (&mut self.text).take(to - self.at);
        let passed = io::copy(&mut before, &mut io::sink()).map_err(|error| told(&self.place, error))?;
        self.at += passed;
        Ok(())
    }
}

/// What an error of a decoder means: damage, unless the store gave it.
fn told(place: &str, error: io::Error) -> DataError {
    error
        .downcast::<DataError>()
        .unwrap_or_else(|error| DataError::Damaged { file: place.to_owned(), reason: error.to_string() })
}

/// The members of a gzip file. Zeros behind one are padding, as `gzip` and Python take them.
struct Members(Option<GzDecoder<Stored>>);

impl Read for Members {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.0 {
            let read = member.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            let more = skip_zeros(member.get_mut())?;
            let ended = self.0.take().filter(|_| more);
            self.0 = ended.map(|member| GzDecoder::new(member.into_inner()));
        }
        Ok(0)
    }
}

/// Whether anything comes behind them.
fn skip_zeros(stored: &mut Stored) -> io::Result<bool> {
    loop {
        let bytes = stored.fill_buf()?;
        let (zeros, whole) = (bytes.iter().take_while(|byte| **byte == 0).count(), bytes.len());
        stored.consume(zeros);
        if zeros < whole || whole == 0 {
            return Ok(whole > 0);
        }
    }
}

/// The bytes of a file as they are stored.
struct Stored {
    steps: Steps,
    fetched: Bytes,
    taken: Arc<AtomicU64>,
}

impl BufRead for Stored {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.fetched.is_empty()
            && let Some((_, bytes)) = self.steps.next().map_err(io::Error::other)?
        {
            self.fetched = bytes;
        }
        Ok(&self.fetched)
    }

    fn consume(&mut self, amount: usize) {
        self.fetched.advance(amount);
        self.taken.fetch_add(amount as u64, Ordering::Relaxed);
    }
}

impl Read for Stored {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::*;
    use crate::store::tests::{memory, stat};

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn file(bytes: Vec<u8>) -> (Folder, FileInfo) {
        let folder = memory();
        folder.write("a.json.gz", bytes).unwrap();
        let info = stat(&folder, "a.json.gz");
        (folder, info)
    }

    /// The lines of each segment from one on.
    fn segments(
        (folder, info): &(Folder, FileInfo),
        format: Format,
        limit: u64,
        from: u64,
    ) -> Result<Vec<Vec<Vec<u8>>>, DataError> {
        let mut chain = CompressedReader::open(folder, info, format, limit, from)?;
        let mut all = Vec::new();
        while let Some(lines) = chain.next()? {
            all.push(lines.into_iter().map(|line| line.bytes).collect());
            assert_eq!(chain.segment(), from + all.len() as u64);
        }
        Ok(all)
    }

    proptest! {
        #[test]
        fn segments_do_not_depend_on_how_a_file_is_stored(
            lengths in prop::collection::vec(0_usize..60, 1..40),
            limit in 1_u64..150,
            cut in 0.0..1.0_f64,
            newline: bool,
        ) {
            let mut text = lengths.iter().map(|length| "x".repeat(*length)).collect::<Vec<_>>().join("\n");
            if newline {
                text.push('\n');
            }
            prop_assume!(!text.is_empty());
            let (first, second) = text.as_bytes().split_at((cut * text.len() as f64) as usize);
            let members = file([gzip(first), gzip(second)].concat());
            let frames = file([zstd::encode_all(first, 1).unwrap(), zstd::encode_all(second, 9).unwrap()].concat());
            let all = segments(&members, Format::JsonGz, limit, 0).unwrap();
            prop_assert_eq!(&all, &segments(&frames, Format::JsonZst, limit, 0).unwrap());
            prop_assert_eq!(all.concat().concat(), text.as_bytes());
            // A line is in the segment in which it begins.
            let mut at = 0;
            for (number, lines) in (0..).zip(&all) {
                for line in lines {
                    prop_assert_eq!(at / limit, number);
                    at += line.len() as u64;
                }
            }
            // Whoever begins later reads the same.
            for from in 0..all.len() {
                prop_assert_eq!(&all[from..], segments(&members, Format::JsonGz, limit, from as u64).unwrap());
            }
        }
    }

    #[test]
    fn zeros_behind_a_member_are_padding() {
        let zeros = vec![0; 70_000];
        let padded = [gzip(b"a\nb"), zeros.clone(), gzip(b"c\n"), vec![0], gzip(b""), zeros].concat();
        assert_eq!(
            segments(&file(padded.clone()), Format::JsonGz, 100, 0).unwrap(),
            [[&b"a\n"[..], b"bc\n"]]
        );
        for behind in [&b"x"[..], b"\x1f\x8b"] {
            let error = segments(&file([&padded, behind].concat()), Format::JsonGz, 100, 0).unwrap_err();
            assert!(matches!(error, DataError::Damaged { .. }), "{error}");
        }
    }

    #[test]
    fn damage_is_an_error_that_names_the_file() {
        let text = (0..2000).map(|line| format!("line {line}")).collect::<Vec<_>>().join("\n");
        let mut zstd = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
        zstd.include_checksum(true).unwrap();
        zstd.write_all(text.as_bytes()).unwrap();
        let wholes = [(Format::JsonGz, gzip(text.as_bytes())), (Format::JsonZst, zstd.finish().unwrap())];
        for (format, whole) in wholes {
            let cut = whole[..whole.len() - 5].to_vec();
            let mut flipped = whole.clone();
            flipped[whole.len() / 2] ^= 1;
            for bytes in [cut, flipped, b"no archive at all".to_vec()] {
                let error = segments(&file(bytes), format, 1000, 0).unwrap_err();
                assert!(
                    matches!(&error, DataError::Damaged { file, .. } if file == "run:a.json.gz"),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn a_file_that_is_gone_is_not_called_damaged() {
        let (folder, mut info) = file(gzip(b"x"));
        info.path = "b.json.gz".to_owned();
        let error = segments(&(folder, info), Format::JsonGz, 10, 0).unwrap_err();
        assert!(matches!(error, DataError::Missing { .. }), "{error}");
    }
}
