//! What the bytes of a file say it is, whatever its name says.

/// U+FEFF in UTF-8, which some editors write in front of a text.
const MARK: &[u8] = b"\xef\xbb\xbf";
/// What a pointer of Git LFS begins with, and what it is smaller than.
const POINTER: (&[u8], usize) = (b"version https://git-lfs.github.com/spec/", 1024);

/// A text without the byte order mark in front of it.
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(MARK).unwrap_or(text)
}

/// Whether a file stands for one that Git LFS keeps elsewhere; it is enough to know how it begins and how long it is.
pub(crate) fn is_pointer(begin: &[u8], size: u64) -> bool {
    size < POINTER.1 as u64 && begin.starts_with(POINTER.0)
}

/// Why a file is no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoText {
    #[error("its byte order mark is that of UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`")]
    Utf16,
    #[error(
        "byte {0} begins no character; convert it, for instance with `iconv -f LATIN1 -t UTF-8`, or leave it out"
    )]
    Other(usize),
}

/// A whole file as text, without its byte order mark.
pub(crate) fn text_of(file: &[u8]) -> Result<&str, NoText> {
    if file.starts_with(b"\xff\xfe") || file.starts_with(b"\xfe\xff") {
        return Err(NoText::Utf16);
    }
    let text = without_mark(file);
    let mark = file.len() - text.len();
    std::str::from_utf8(text).map_err(|error| NoText::Other(mark + error.valid_up_to()))
}
