//! Parquet files with a text column: read by row groups, written with page checksums.
//!
//! The CRC-32 of each page detects damage. Most writers leave it out, including the crate `parquet`, so [`write()`]
//! adds it to the page headers itself. In files without checksums, only the decoder's own checks apply.

mod file;
mod rows;
mod write;

pub(crate) use self::file::ParquetFile;
pub(crate) use self::rows::Rows;
pub(crate) use self::write::write;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ulmus_storage::FileInfo;
    use ulmus_types::ErrorKind;

    use super::*;
    use crate::error::DataError;
    use crate::store::Folder;
    use crate::store::tests::{memory, stat};

    fn rows(texts: &[&str]) -> Vec<Vec<String>> {
        texts.iter().enumerate().map(|(i, text)| vec![(*text).to_owned(), format!("path-{i}")]).collect()
    }

    fn file_of(bytes: Vec<u8>) -> (Folder, FileInfo) {
        let folder = memory();
        folder.write("a.parquet", bytes).unwrap();
        let info = stat(&folder, "a.parquet");
        (folder, info)
    }

    fn read(bytes: Vec<u8>, column: &str) -> Result<Vec<String>, DataError> {
        let (folder, info) = file_of(bytes);
        let file = ParquetFile::open(&folder, &info)?;
        let groups = file.row_group_sizes(column)?.len();
        let mut rows = Rows::open(file, column, 0..groups, u64::MAX, 0)?;
        Ok(rows.next()?.unwrap_or_default().into_iter().map(|(_, text)| text).collect())
    }

    #[test]
    fn written_files_are_read() {
        let long = "word ".repeat(500_000);
        let bytes = write(&["text", "path"], &[rows(&["one", "", "zwölf"]), rows(&[&long])]);
        assert_eq!(read(bytes.clone(), "text").unwrap(), ["one", "", "zwölf", &long]);
        assert_eq!(read(bytes.clone(), "path").unwrap(), ["path-0", "path-1", "path-2", "path-0"]);
        assert_eq!(bytes, write(&["text", "path"], &[rows(&["one", "", "zwölf"]), rows(&[&long])]));
        let (folder, info) = file_of(bytes);
        let file = ParquetFile::open(&folder, &info).unwrap();
        assert!(file.row_group_sizes("text").unwrap()[1] >= long.len() as u64);
        assert_eq!(file.schema(), "text: String, path: String");
    }

    #[test]
    fn segments_of_a_group_are_the_same_from_any_start() {
        let texts: Vec<String> =
            (0..400).map(|n| format!("{n} ").repeat(n * 7 % 90 + usize::from(n == 200) * 900_000)).collect();
        let rows = |texts: &[String]| texts.iter().map(|text| vec![text.clone()]).collect::<Vec<_>>();
        let (folder, info) =
            file_of(write(&["text"], &[rows(&texts[..250]), Vec::new(), rows(&texts[250..])]));
        let segments = |from: u64, limit: u64| {
            let mut rows =
                Rows::open(ParquetFile::open(&folder, &info).unwrap(), "text", 0..3, limit, from).unwrap();
            let mut segments = Vec::new();
            while let Some(segment) = rows.next().unwrap() {
                segments.push(segment);
                assert_eq!(rows.segment(), from + segments.len() as u64);
            }
            assert!(rows.ends());
            segments
        };
        for limit in [100, 4000, 1 << 20, 1 << 40] {
            let all = segments(0, limit);
            let numbered: Vec<(u64, String)> = (0..).zip(texts.iter().cloned()).collect();
            assert_eq!(all.concat(), numbered);
            let mut at = 0;
            for (number, segment) in (0..).zip(&all) {
                for (_, text) in segment {
                    assert!((number * limit..(number + 1) * limit).contains(&at), "{number} {at}");
                    at += text.len() as u64;
                }
            }
            for from in [1, 2, all.len() / 2, all.len() - 1].into_iter().filter(|from| *from < all.len()) {
                assert_eq!(segments(from as u64, limit), all[from..]);
            }
        }
    }

    #[test]
    fn errors_name_the_columns() {
        let bytes = write(&["text", "path"], &[rows(&["one"])]);
        let message = read(bytes.clone(), "content").unwrap_err().to_string();
        assert!(message.contains(r#"set text of its source to one of ["text", "path"]"#), "{message}");
        let message = read(b"not parquet".to_vec(), "text").unwrap_err().to_string();
        assert!(message.contains("a.parquet is not parquet"), "{message}");
        let cut = read(bytes[..bytes.len() - 3].to_vec(), "text").unwrap_err();
        assert_eq!(cut.kind(), ErrorKind::Corrupt, "{cut}");
        assert!(read(Vec::new(), "text").is_err());
    }

    proptest! {
        /// Damage to a page is an error. Headers have no checksum, but damage to one must not change the text either.
        #[test]
        fn a_flipped_bit_never_gives_other_text(at in 0.0..1.0_f64, bit in 0..8_u32) {
            let text = "The quick brown fox jumps over the lazy dog; ".repeat(20);
            let mut bytes = write(&["text"], &[vec![vec![text.clone()], vec![text[5..].to_owned()]]]);
            let footer = u32::from_le_bytes(bytes[bytes.len() - 8..bytes.len() - 4].try_into().unwrap()) as usize;
            let pages = 4..bytes.len() - 8 - footer;
            let at = pages.start + (at * pages.len() as f64) as usize;
            bytes[at] ^= 1 << bit;
            if let Ok(texts) = read(bytes, "text") {
                prop_assert_eq!(texts, [text.clone(), text[5..].to_owned()]);
            }
        }
    }
}
