//! Reads documents from files and folders that a person names.
//!
//! The data loader reads the files by the same rules as in training, but nothing is filtered or normalised: the text is
//! measured as it is.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ulmus_dataloader::{Manifest, Sources, files_below};
use ulmus_plan::{DataConfig, Format, SourceConfig};

use crate::error::EvaluatorError;

/// Reads the documents of all `paths` in order. A path is a file (parquet, arrow, jsonl, json.gz, json.zst, text) or a folder with
/// such files at any depth, which are read sorted by name. A file that is named twice is read once. `column` is the
/// column or key that holds the text.
///
/// # Errors
/// When a path does not exist or its suffix is unknown, when a file is damaged, or when there is no text.
pub fn read_texts(paths: &[PathBuf], column: &str) -> Result<Vec<String>, EvaluatorError> {
    let mut seen = BTreeSet::new();
    let sources =
        paths.iter().map(|path| sources_of(path, column, &mut seen)).collect::<Result<Vec<_>, _>>()?;
    let source = sources.into_iter().flatten().collect();
    let config = DataConfig { source, ..DataConfig::default() };
    let manifest = Manifest::freeze(&config, None)?;
    let sources = Sources::open(&config, &manifest, None)?;
    let texts = sources.all_documents().collect::<Result<Vec<_>, _>>()?.concat();
    if texts.iter().all(String::is_empty) {
        let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        return Err(EvaluatorError::NoText(names.join(", ")));
    }
    Ok(texts)
}

/// The sources below `path`, without the files that are in `seen` already.
fn sources_of(
    path: &Path,
    column: &str,
    seen: &mut BTreeSet<PathBuf>,
) -> Result<Vec<SourceConfig>, EvaluatorError> {
    let mut is_new = |path: &Path| path.canonicalize().map_or(true, |real| seen.insert(real));
    let refuse = |reason| EvaluatorError::Texts { path: path.to_owned(), reason };
    let source = |folder: &Path, format: Format, files: Vec<String>| SourceConfig {
        name: format!("{} {format:?}", path.display()),
        url: folder.display().to_string(),
        files,
        format: Some(format),
        text: column.to_owned(),
        ..SourceConfig::default()
    };
    if path.is_dir() {
        let names = files_below(path, |name| {
            Format::of_file(name).is_some_and(|format| Format::TEXT.contains(&format))
        })?;
        if names.is_empty() {
            return Err(refuse(
                "the folder has no .parquet, .arrow, .jsonl, .json.gz, .json.zst, .txt or .md files",
            ));
        }
        let names: Vec<String> = names.into_iter().filter(|name| is_new(&path.join(name))).collect();
        let of_format = |format| {
            let files: Vec<String> = names
                .iter()
                .filter(|name| Format::of_file(name) == Some(format))
                .map(|name| literal(name))
                .collect();
            (!files.is_empty()).then(|| source(path, format, files))
        };
        return Ok(Format::TEXT.into_iter().filter_map(of_format).collect());
    }
    if !path.is_file() {
        let is_there = path.exists();
        return Err(refuse(if is_there {
            "this is neither a file nor a folder; save its contents to a file and name that"
        } else {
            "there is no such file or folder"
        }));
    }
    let name =
        path.file_name().and_then(|name| name.to_str()).ok_or_else(|| refuse("the name is not UTF-8"))?;
    let format = Format::of_file(name).ok_or_else(|| {
        refuse("unknown suffix; use .parquet, .arrow, .jsonl, .json.gz, .json.zst, .txt or .md")
    })?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let files = is_new(path).then(|| source(folder, format, vec![literal(name)]));
    Ok(files.into_iter().collect())
}

/// The pattern that matches `name` and nothing else.
fn literal(name: &str) -> String {
    name.chars().map(|c| if "*?[]{}".contains(c) { format!("[{c}]") } else { c.to_string() }).collect()
}

#[cfg(test)]
mod tests {
    use ulmus_types::ErrorKind;

    use super::*;

    #[test]
    fn files_and_folders_are_read_in_order() {
        let home = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = home.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            path
        };
        let lines = write("lines.jsonl", "{\"body\":\"one\"}\n{\"body\":\"two\"}\n");
        write("folder/b.txt", "b");
        write("folder/a/x.md", "a");
        write("folder/ignored.bin", "\u{0}");
        let texts = read_texts(&[lines, home.path().join("folder")], "body").unwrap();
        assert_eq!(texts, ["one", "two", "a", "b"]);
        let folder = home.path().join("folder");
        let twice =
            read_texts(&[folder.join("b.txt"), folder.clone(), folder.join("a/x.md")], "body").unwrap();
        assert_eq!(twice, ["b", "a"]);
    }

    #[cfg(unix)]
    #[test]
    fn every_file_of_a_folder_is_read_once() {
        use std::os::unix::fs::symlink;

        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("b");
        std::fs::create_dir_all(folder.join("real")).unwrap();
        for (name, text) in [
            ("x.txt", "\u{feff}text"),
            ("real/y.txt", "more"),
            ("._x.txt", "\0"),
            (".notes.txt", "hidden"),
            ("[z].jsonl", "{\"body\": \"line\", \"score\": NaN}"),
        ] {
            std::fs::write(folder.join(name), text).unwrap();
        }
        for (target, link) in [(".", "self"), (".", "again"), ("..", "up"), ("real", "other")] {
            symlink(target, folder.join(link)).unwrap();
        }
        let read = |name: &str| read_texts(&[folder.join(name)], "body").unwrap();
        assert_eq!(read(""), ["line", "more", "text"]);
        assert_eq!(read(".notes.txt"), ["hidden"]);
        std::fs::write(folder.join("a\n.txt"), "lost").unwrap();
        let error = read_texts(&[folder], "body").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("rename it"), "{error}");
    }

    #[test]
    fn wildcards_in_a_name_are_escaped() {
        assert_eq!(literal("a/[1]{x}*?.md"), "a/[[]1[]][{]x[}][*][?].md");
    }

    #[test]
    fn errors_name_the_path_that_cannot_be_read() {
        let home = tempfile::tempdir().unwrap();
        let unknown = home.path().join("data.bin");
        let empty = home.path().join("empty.txt");
        std::fs::write(&unknown, "x").unwrap();
        std::fs::write(&empty, "").unwrap();
        for (path, reason) in [
            (home.path().join("missing.txt"), "no such file"),
            (unknown, "unknown suffix"),
            (PathBuf::from("/dev/null"), "neither a file nor a folder"),
            (empty, "no text to evaluate"),
        ] {
            let error = read_texts(std::slice::from_ref(&path), "text").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(reason), "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
    }
}
