//! Recognizes files by their first bytes, whatever their names say.

/// U+FEFF in UTF-8, which some editors put at the start of a text file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// How a Git LFS pointer begins, and the size in bytes that it stays below.
const POINTER: (&[u8], usize) = (b"version https://git-lfs.github.com/spec/", 1024);

/// `text` without a leading byte order mark.
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Whether a file is a Git LFS pointer, judged by its first bytes and its size in bytes.
pub fn is_pointer(begin: &[u8], size: u64) -> bool {
    size < POINTER.1 as u64 && begin.starts_with(POINTER.0)
}
