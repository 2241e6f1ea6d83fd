//! What the first bytes of a file say it is, whatever its name says.

/// U+FEFF in UTF-8, which some editors write in front of a text.
const MARK: &[u8] = b"\xef\xbb\xbf";
/// What a pointer of Git LFS begins with, and what it is smaller than.
const POINTER: (&[u8], usize) = (b"version https://git-lfs.github.com/spec/", 1024);

/// A text without the byte order mark in front of it.
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(MARK).unwrap_or(text)
}

/// Whether a file stands for one that Git LFS keeps elsewhere; it is enough to know how it begins and how long it is.
pub fn is_pointer(begin: &[u8], size: u64) -> bool {
    size < POINTER.1 as u64 && begin.starts_with(POINTER.0)
}
