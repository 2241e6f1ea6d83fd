//! Reads compressed files of JSON lines, which cannot be entered in the middle.
//!
//! Such a file is read from its beginning, in *segments* of at most `data.unit` of text. A line belongs to the segment
//! in whose bytes of the decompressed stream it begins, so segments do not depend on how the file is stored or read. To
//! start at a later segment, everything before it is decompressed and discarded.
//!
//! A segment is complete before any of it is used. A gzip member has its checksum at the end, so damage may be detected
//! only segments later; the error then names the file. A zstd frame may have no checksum.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::GzDecoder;
use ulmus_plan::Format;
use ulmus_storage::FileInfo;

use crate::contents::refuse_pointer;
use crate::error::DataError;
use crate::store::Folder;
use crate::stored::Stored;

/// Size in bytes of the buffer for decompressed text.
const BUFFER: usize = 256 << 10;

/// The largest window of a zstd frame, as a power of two: the format's own limit. Some corpora are stored with
/// `--long=31`, and need that much memory.
const MAX_WINDOW_LOG: u32 = 31;

/// A compressed file that is being read.
pub(crate) struct CompressedReader {
    text: BufReader<Box<dyn Read + Send>>,
    place: String,
    /// Offset of the next line in the decompressed stream.
    at: u64,
    segment: u64,
    limit: u64,
    /// Stored bytes that the decoder has consumed.
    taken: Arc<AtomicU64>,
}

impl fmt::Debug for CompressedReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CompressedReader({}, segment {})", self.place, self.segment)
    }
}

/// A line, and its offset in the decompressed stream.
pub(crate) struct Line {
    pub(crate) at: u64,
    pub(crate) bytes: Vec<u8>,
}

impl CompressedReader {
    /// Opens a file at the beginning of `segment`.
    pub(crate) fn open(
        folder: &Folder,
        file: &FileInfo,
        format: Format,
        limit: u64,
        segment: u64,
    ) -> Result<Self, DataError> {
        let place = folder.place(&file.path);
        let taken = Arc::new(AtomicU64::new(0));
        let mut stored = Stored::open(folder, file, Arc::clone(&taken));
        refuse_pointer(folder, file, stored.fill_buf().map_err(|error| unreadable(&place, error))?)?;
        let text = decompressed(stored, format).map_err(|error| unreadable(&place, error))?;
        let text = BufReader::with_capacity(BUFFER, text);
        let mut reader = Self { text, place, at: 0, segment, limit, taken };
        if segment > 0 {
            // The byte before the segment shows whether a line begins exactly at the segment.
            reader.skip_to(segment * limit - 1)?;
            let rest = reader.text.skip_until(b'\n').map_err(|error| unreadable(&reader.place, error))?;
            reader.at += rest as u64;
        }
        Ok(reader)
    }

    /// The URL of the file, for messages.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    /// Number of the segment that [`Self::next`] returns.
    pub(crate) const fn segment(&self) -> u64 {
        self.segment
    }

    /// Bytes of the stored file that have been consumed.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// The lines of the next segment, or `None` at the end of the file.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<Line>>, DataError> {
        if self.ends()? {
            return Ok(None);
        }
        self.segment += 1;
        let end = self.segment * self.limit;
        let mut lines = Vec::new();
        while self.at < end {
            let mut bytes = Vec::new();
            let read =
                self.text.read_until(b'\n', &mut bytes).map_err(|error| unreadable(&self.place, error))?;
            if read == 0 {
                break;
            }
            lines.push(Line { at: self.at, bytes });
            self.at += read as u64;
        }
        Ok(Some(lines))
    }

    /// Whether the file is at its end, with all of its checksums verified.
    pub(crate) fn ends(&mut self) -> Result<bool, DataError> {
        let place = &self.place;
        self.text.fill_buf().map(<[u8]>::is_empty).map_err(|error| unreadable(place, error))
    }

    /// Decompresses and discards everything before offset `to`.
    fn skip_to(&mut self, to: u64) -> Result<(), DataError> {
        let mut before = (&mut self.text).take(to - self.at);
        let skipped =
            io::copy(&mut before, &mut io::sink()).map_err(|error| unreadable(&self.place, error))?;
        self.at += skipped;
        Ok(())
    }
}

/// The text of a compressed file.
///
/// # Errors
/// When its beginning cannot be read.
pub(crate) fn decompressed(
    stored: impl BufRead + Send + 'static,
    format: Format,
) -> io::Result<Box<dyn Read + Send>> {
    if format == Format::JsonZst {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(stored)?;
        decoder.window_log_max(MAX_WINDOW_LOG)?;
        Ok(Box::new(decoder))
    } else {
        Ok(Box::new(Members(Some(GzDecoder::new(stored)))))
    }
}

/// The error behind a failed read: that of the store, or else damage that the decoder found.
pub(crate) fn unreadable(place: &str, error: io::Error) -> DataError {
    error
        .downcast::<DataError>()
        .unwrap_or_else(|error| DataError::Damaged { file: place.to_owned(), reason: error.to_string() })
}

/// The members of a gzip file. Zeros after a member are padding, as for `gzip` and Python.
struct Members<R>(Option<GzDecoder<R>>);

impl<R: BufRead> Read for Members<R> {
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

/// Skips zeros, and returns whether anything follows them.
pub(crate) fn skip_zeros(stored: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let bytes = stored.fill_buf()?;
        let (zeros, whole) = (bytes.iter().take_while(|byte| **byte == 0).count(), bytes.len());
        stored.consume(zeros);
        if zeros < whole || whole == 0 {
            return Ok(whole > 0);
        }
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

    /// The lines of each segment, from segment `from` on.
    fn segments(
        (folder, info): &(Folder, FileInfo),
        format: Format,
        limit: u64,
        from: u64,
    ) -> Result<Vec<Vec<Vec<u8>>>, DataError> {
        let mut reader = CompressedReader::open(folder, info, format, limit, from)?;
        let mut all = Vec::new();
        while let Some(lines) = reader.next()? {
            all.push(lines.into_iter().map(|line| line.bytes).collect());
            assert_eq!(reader.segment(), from + all.len() as u64);
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
            // A line belongs to the segment in which it begins.
            let mut at = 0;
            for (number, lines) in (0..).zip(&all) {
                for line in lines {
                    prop_assert_eq!(at / limit, number);
                    at += line.len() as u64;
                }
            }
            // A reader that starts at a later segment reads the same lines.
            for from in 0..all.len() {
                prop_assert_eq!(&all[from..], segments(&members, Format::JsonGz, limit, from as u64).unwrap());
            }
        }
    }

    #[test]
    fn zeros_after_a_member_are_padding() {
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
    fn a_missing_file_is_not_called_damaged() {
        let (folder, mut info) = file(gzip(b"x"));
        info.path = "b.json.gz".to_owned();
        let error = segments(&(folder, info), Format::JsonGz, 10, 0).unwrap_err();
        assert!(matches!(error, DataError::Missing { .. }), "{error}");
    }
}
