//! Reads corpora as other programs and people leave them: with empty parts, hidden files, circular links, odd names,
//! byte order marks, and unused values of all kinds.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use parquet::basic::{Compression, LogicalType, Repetition, Type as Physical};
use parquet::data_type::ByteArrayType;
use parquet::encryption::encrypt::FileEncryptionProperties;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use tempfile::TempDir;
use ulmus_dataloader::{DataError, Manifest, Sources, files_below, inspect};
use ulmus_plan::{Bytes, DataConfig, Format, SourceConfig};
use ulmus_types::ErrorKind;

fn write(place: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    let path = place.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn config(place: &TempDir, files: &[&str]) -> DataConfig {
    let source = SourceConfig {
        name: "s".to_owned(),
        url: place.path().display().to_string(),
        files: files.iter().map(|file| (*file).to_owned()).collect(),
        text: "text".to_owned(),
        ..SourceConfig::default()
    };
    DataConfig { lanes: 1, unit: Bytes::new(64 << 10), source: vec![source], ..DataConfig::default() }
}

fn read(config: &DataConfig) -> Result<Vec<String>, DataError> {
    let manifest = Manifest::freeze(config, None)?;
    let sources = Sources::open(config, &manifest, None)?;
    Ok(sources.all_documents().collect::<Result<Vec<_>, _>>()?.concat())
}

/// The message for a corpus that must be refused at once as invalid input.
#[track_caller]
fn refused(config: &DataConfig) -> String {
    let begun = Instant::now();
    let error = read(config).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{error}");
    error.to_string()
}

/// A parquet file with one column of texts in row groups.
fn parquet(groups: &[Vec<Option<&str>>], properties: WriterProperties) -> Vec<u8> {
    let column = Type::primitive_type_builder("text", Physical::BYTE_ARRAY)
        .with_repetition(Repetition::OPTIONAL)
        .with_logical_type(Some(LogicalType::String));
    of_columns(vec![column.build().unwrap()], groups, properties)
}

fn of_columns(columns: Vec<Type>, groups: &[Vec<Option<&str>>], properties: WriterProperties) -> Vec<u8> {
    let columns = columns.into_iter().map(Into::into).collect();
    let schema = Type::group_type_builder("schema").with_fields(columns).build().unwrap();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema.into(), properties.into()).unwrap();
    for texts in groups {
        let mut group = writer.next_row_group().unwrap();
        while let Some(mut column) = group.next_column().unwrap() {
            let values: Vec<_> = texts.iter().flatten().map(|text| (*text).into()).collect();
            let levels: Vec<i16> = texts.iter().map(|text| i16::from(text.is_some())).collect();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.into_inner().unwrap()
}

fn plain() -> WriterProperties {
    WriterProperties::builder().set_compression(Compression::UNCOMPRESSED).build()
}

/// A file of nulls without a type, as pandas writes an empty column.
fn untyped() -> Vec<u8> {
    let column = Type::primitive_type_builder("text", Physical::INT32)
        .with_repetition(Repetition::OPTIONAL)
        .with_logical_type(Some(LogicalType::Unknown));
    of_columns(vec![column.build().unwrap()], &[], plain())
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// Files of a source, by name.
type Files = Vec<(&'static str, Vec<u8>)>;

#[test]
fn empty_files_and_rows_are_skipped_to_find_the_first_document() {
    let line = "{\"text\": \"some words\"}\n";
    let nulls = "{\"text\": null}\n".repeat(10_000);
    let cases: Vec<(&str, Files)> = vec![
        (
            "*.parquet",
            vec![
                ("0.parquet", parquet(&[], plain())),
                ("1.parquet", parquet(&[vec![]], plain())),
                ("2.parquet", untyped()),
                ("3.parquet", parquet(&[vec![None; 40], vec![None, Some("some words")]], plain())),
            ],
        ),
        (
            "*.jsonl",
            vec![
                ("0.jsonl", Vec::new()),
                ("1.jsonl", b"\n \n\xef\xbb\xbf\n".to_vec()),
                ("2.jsonl", b"\xef\xbb\xbf".to_vec()),
                ("3.jsonl", (nulls.clone() + line).into_bytes()),
            ],
        ),
        (
            "*.json.gz",
            vec![
                ("0.json.gz", Vec::new()),
                ("1.json.gz", gzip("")),
                ("2.json.gz", gzip("\n\n")),
                ("3.json.gz", gzip(&(nulls + line))),
            ],
        ),
        ("*.txt", vec![("0.txt", Vec::new()), ("1.txt", b"\n".to_vec()), ("2.txt", b"some words".to_vec())]),
        (
            "*.npy",
            vec![
                ("0.npy", Vec::new()),
                ("1.npy", {
                    let dictionary = "{'descr': '<u2', 'fortran_order': False, 'shape': (2,), }\n";
                    let begin = [b"\x93NUMPY\x01\0".as_slice(), &[dictionary.len() as u8, 0]].concat();
                    [&begin, dictionary.as_bytes(), &[7, 0, 8, 0]].concat()
                }),
            ],
        ),
    ];
    for (glob, files) in cases {
        let place = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            write(place.path(), name, bytes);
        }
        let inspection = inspect(&config(&place, &[glob]), None);
        assert!(inspection.problems.is_empty(), "{glob}: {}", inspection.problems);
        let sample = inspection.reports[0].sample.as_str();
        assert_eq!(sample, if glob == "*.npy" { "[7, 8]" } else { "some words" });
    }
    let place = tempfile::tempdir().unwrap();
    write(place.path(), "0.jsonl", "{\"text\": null}\n");
    let inspection = inspect(&config(&place, &["*.jsonl"]), None);
    assert!(inspection.problems.to_string().contains("no document"), "{}", inspection.problems);
}

#[test]
fn unused_values_may_be_anything() {
    let lines = "{\"text\": \"one\", \"score\": NaN}\n{\"score\": [-Infinity, 1e999], \"text\": \"two\"}\n";
    for (name, bytes) in [
        ("a.jsonl", lines.as_bytes().to_vec()),
        ("a.json.gz", gzip(lines)),
        ("a.json.zst", zstd::encode_all(lines.as_bytes(), 1).unwrap()),
    ] {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), name, bytes);
        assert_eq!(read(&config(&place, &[name])).unwrap(), ["one", "two"], "{name}");
    }
}

#[test]
fn hidden_files_are_read_only_if_the_pattern_has_their_dot() {
    let place = tempfile::tempdir().unwrap();
    write(place.path(), "a.jsonl", "{\"text\": \"a\"}\n");
    write(place.path(), "._a.jsonl", b"\0\x05\x16\x07");
    write(place.path(), ".ipynb_checkpoints/a-checkpoint.jsonl", "{\"text\": \"old\"}\n");
    assert_eq!(read(&config(&place, &["*.jsonl"])).unwrap(), ["a"]);
    assert_eq!(read(&config(&place, &["**/*.jsonl"])).unwrap(), ["a"]);
    assert_eq!(read(&config(&place, &[".ipynb_checkpoints/*.jsonl"])).unwrap(), ["old"]);
    assert_eq!(files_below(place.path(), |_| true).unwrap(), ["a.jsonl"]);
}

#[test]
fn byte_order_marks_are_dropped() {
    let place = tempfile::tempdir().unwrap();
    write(place.path(), "a.txt", b"\xef\xbb\xbfhello \xef\xbb\xbf");
    write(place.path(), "names", b"\xef\xbb\xbf./a.txt\r\n");
    assert_eq!(read(&config(&place, &["*.txt"])).unwrap(), ["hello \u{feff}"]);
    let mut listed = config(&place, &["*.txt"]);
    listed.source[0].list = Some(place.path().join("names").display().to_string());
    assert_eq!(read(&listed).unwrap(), ["hello \u{feff}"]);
    write(place.path(), "a.txt", b"\xff\xfeh\0");
    let message = refused(&config(&place, &["*.txt"]));
    assert!(message.contains("a.txt") && message.contains("UTF-16"), "{message}");
}

#[test]
fn a_name_may_be_written_in_several_ways() {
    let place = tempfile::tempdir().unwrap();
    write(place.path(), "my folder/a#1 50%.jsonl", "{\"text\": \"a\"}\n");
    for name in ["./my folder/a#1 50%.jsonl", "my folder//./a#1 50%.jsonl", "./my folder/*.jsonl"] {
        assert_eq!(read(&config(&place, &[name])).unwrap(), ["a"], "{name}");
    }
    let mut addressed = config(&place, &["a#1 50%.jsonl"]);
    for url in ["my%20folder", "my folder"] {
        addressed.source[0].url = format!("file://{}/{url}", place.path().display());
        assert_eq!(read(&addressed).unwrap(), ["a"], "{url}");
    }
    let message = refused(&config(&place, &["../a.jsonl"]));
    assert!(message.contains("../a.jsonl"), "{message}");
}

#[test]
fn git_lfs_pointers_are_refused() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    for (name, format) in [
        ("a.txt", None),
        ("a.jsonl", None),
        ("a.json.gz", None),
        ("a.json.zst", None),
        ("a.parquet", None),
        ("a.npy", None),
        ("a.bin", Some(Format::U16)),
    ] {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), name, pointer);
        let mut config = config(&place, &[name]);
        config.source[0].format = format;
        let message = refused(&config);
        assert!(message.contains(name) && message.contains("git lfs pull"), "{name}: {message}");
    }
}

#[test]
fn ids_of_another_width_are_refused() {
    let ids: Vec<u8> = (0..100_u32).flat_map(|id| (7 + id).to_le_bytes()).collect();
    let place = tempfile::tempdir().unwrap();
    write(place.path(), "a.bin", &ids);
    let mut config = config(&place, &["a.bin"]);
    config.source[0].format = Some(Format::U16);
    let message = refused(&config);
    assert!(message.contains("its numbers seem to have 4 bytes; write format = \"u32\""), "{message}");
    config.source[0].format = Some(Format::U32);
    Manifest::freeze(&config, None).unwrap();
    let wide: Vec<u8> = (0..100_u64).flat_map(|id| (7 + id).to_le_bytes()).collect();
    write(place.path(), "a.bin", &wide);
    let message = refused(&config);
    assert!(message.contains("its numbers seem to have 8 bytes"), "{message}");
}

#[test]
fn columns_that_cannot_be_read_are_refused() {
    let texts = &[vec![Some("a text"); 20]];
    let key = b"0123456789abcdef".to_vec();
    let encryption = FileEncryptionProperties::builder(key.clone())
        .with_plaintext_footer(true)
        .with_column_key("text", key)
        .build()
        .unwrap();
    let encrypted = WriterProperties::builder().with_file_encryption_properties(encryption).build();
    let text = || {
        Type::primitive_type_builder("text", Physical::BYTE_ARRAY)
            .with_repetition(Repetition::OPTIONAL)
            .with_logical_type(Some(LogicalType::String))
            .build()
            .unwrap()
    };
    let within = |name: &str, repetition, field: Type| {
        let group = Type::group_type_builder(name).with_repetition(repetition);
        group.with_fields(vec![field.into()]).build().unwrap()
    };
    let list = within("text", Repetition::REQUIRED, within("list", Repetition::REPEATED, text()));
    let with_list = of_columns(vec![list], &[], plain());
    for (file, words) in [
        (parquet(texts, encrypted), "is encrypted"),
        (with_list, "holds list of String, not text"),
        (of_columns(vec![text(), text()], &[], plain()), "has 2 columns named \"text\""),
    ] {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), "a.parquet", file);
        let message = refused(&config(&place, &["a.parquet"]));
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn a_binary_column_of_text_is_text() {
    let column =
        Type::primitive_type_builder("text", Physical::BYTE_ARRAY).with_repetition(Repetition::OPTIONAL);
    let file =
        of_columns(vec![column.build().unwrap()], &[vec![Some("some words"), None, Some("é")]], plain());
    let place = tempfile::tempdir().unwrap();
    write(place.path(), "a.parquet", file);
    let documents = read(&config(&place, &["a.parquet"])).unwrap();
    assert!(documents.iter().any(|text| text == "some words") && documents.iter().any(|text| text == "é"));
}

#[cfg(unix)]
mod unix {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_that_lead_upwards_are_skipped() {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), "x.txt", "text");
        for (target, link) in [(".", "self"), (".", "again"), ("..", "up"), ("round.txt", "round.txt")] {
            symlink(target, place.path().join(link)).unwrap();
        }
        let begun = Instant::now();
        assert_eq!(read(&config(&place, &["**/*.txt"])).unwrap(), ["text"]);
        assert_eq!(files_below(place.path(), |_| true).unwrap(), ["x.txt"]);
        assert!(begun.elapsed() < Duration::from_secs(10));
        let message = refused(&config(&place, &["round.txt"]));
        assert!(message.contains("round.txt"), "{message}");
    }

    #[test]
    fn folders_behind_links_are_read_where_they_are_named() {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), "v1/x.txt", "text");
        symlink("v1", place.path().join("latest")).unwrap();
        assert_eq!(read(&config(&place, &["latest/*.txt"])).unwrap(), ["text"]);
        assert_eq!(read(&config(&place, &["**/*.txt"])).unwrap(), ["text"]);
    }

    #[test]
    fn odd_names_matter_only_where_a_pattern_matches_them() {
        for odd in [&b"note\n1.txt"[..], b"caf\xe9.txt", b"below/caf\xe9/a.txt", b"b\x01.txt", b"a.jsonl#1"] {
            let place = tempfile::tempdir().unwrap();
            write(place.path(), "a.jsonl", "{\"text\": \"a\"}\n");
            let path = place.path().join(OsStr::from_bytes(odd));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "text").unwrap();
            assert_eq!(read(&config(&place, &["*.jsonl"])).unwrap(), ["a"]);
            assert_eq!(read(&config(&place, &["**/*.jsonl"])).unwrap(), ["a"]);
            let glob = if odd.ends_with(b".txt") { "**/*.txt" } else { "*" };
            let message = refused(&config(&place, &[glob]));
            assert!(message.contains("rename it"), "{message}");
        }
    }
}

/// A file that was restored from a backup with its time is the file that was frozen; with another time it is not.
#[test]
fn a_file_that_is_restored_with_its_time_is_the_same() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("a.txt");
    std::fs::write(&path, "some text").unwrap();
    let source = ulmus_plan::SourceConfig {
        name: "texts".into(),
        url: place.path().display().to_string(),
        files: vec!["*.txt".into()],
        text: "text".into(),
        ..Default::default()
    };
    let config = ulmus_plan::DataConfig { source: vec![source], ..Default::default() };
    let manifest = Manifest::freeze(&config, None).unwrap();
    let read = || {
        let sources = Sources::open(&config, &manifest, None)?;
        sources.all_documents().collect::<Result<Vec<_>, DataError>>()
    };
    let time = std::fs::metadata(&path).unwrap().modified().unwrap();
    let restore = |time| {
        std::fs::rename(&path, place.path().join("away")).unwrap();
        std::fs::write(&path, "some text").unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    };
    restore(time);
    assert_eq!(read().unwrap().concat(), ["some text"]);
    restore(time + std::time::Duration::from_secs(9));
    assert!(matches!(read().unwrap_err(), DataError::BadUnit { .. } | DataError::Changed { .. }));
}
