//! Recognises what a file is by its bytes, whatever its name says.

use ulmus_storage::FileInfo;

use crate::error::DataError;
use crate::store::Folder;

/// Why the bytes of a file are not text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoText {
    #[error("it is {0}; convert it with `iconv -f {0} -t UTF-8`")]
    Wide(&'static str),
    #[error(
        "byte {0} is not valid UTF-8; convert it, for example with `iconv -f LATIN1 -t UTF-8`, or leave it out"
    )]
    Other(usize),
}

/// A whole file as text, without its byte order mark.
pub(crate) fn text_of(file: &[u8]) -> Result<&str, NoText> {
    if let Some(encoding) = wide_encoding(file) {
        return Err(NoText::Wide(encoding));
    }
    let text = ulmus_types::without_mark(file);
    let mark = file.len() - text.len();
    std::str::from_utf8(text).map_err(|error| NoText::Other(mark + error.valid_up_to()))
}

/// Refuses a file that Git LFS has left a pointer for, given its first bytes.
pub(crate) fn refuse_pointer(folder: &Folder, file: &FileInfo, begin: &[u8]) -> Result<(), DataError> {
    if ulmus_types::is_pointer(begin, file.size) {
        return Err(DataError::Pointer { file: folder.place(&file.path) });
    }
    Ok(())
}

/// The encoding of a file whose characters take 2 or 4 bytes. It is recognised by its byte order mark, or because about
/// half of its first bytes, or more, are zero, which never happens in UTF-8 text.
fn wide_encoding(file: &[u8]) -> Option<&'static str> {
    const LOOKED_AT: usize = 1024;
    let marks: [(&[u8], _); 4] = [
        (b"\xff\xfe\0\0", "UTF-32"),
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ];
    if let Some((_, encoding)) = marks.into_iter().find(|(mark, _)| file.starts_with(mark)) {
        return Some(encoding);
    }
    let begin = &file[..file.len().min(LOOKED_AT)];
    let zeros = |first: usize| {
        let bytes = begin.iter().skip(first).step_by(2);
        (bytes.clone().filter(|byte| **byte == 0).count(), bytes.count())
    };
    let mostly = |(zeros, all): (usize, usize)| all > 1 && zeros * 10 >= all * 9;
    match (mostly(zeros(0)), mostly(zeros(1))) {
        (true, false) => Some("UTF-16BE"),
        (false, true) => Some("UTF-16LE"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_in_a_wide_encoding_is_refused() {
        let text = "Words, and more of them.\n";
        let wide = |bytes: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(bytes).collect::<Vec<u8>>();
        let marked = |mark: &[u8], bytes: Vec<u8>| [mark, &bytes].concat();
        let utf32: Vec<u8> = text.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
        for (file, encoding) in [
            (wide(u16::to_le_bytes), "UTF-16LE"),
            (wide(u16::to_be_bytes), "UTF-16BE"),
            (marked(b"\xff\xfe", wide(u16::to_le_bytes)), "UTF-16"),
            (marked(b"\xfe\xff", wide(u16::to_be_bytes)), "UTF-16"),
            (marked(b"\xff\xfe\0\0", utf32), "UTF-32"),
        ] {
            assert_eq!(text_of(&file), Err(NoText::Wide(encoding)));
        }
        for text in [text, "", "\0", "a\0b", "\u{feff}x"] {
            assert!(text_of(text.as_bytes()).is_ok(), "{text:?}");
        }
    }
}
