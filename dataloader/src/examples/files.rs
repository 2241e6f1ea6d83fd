//! Finds the files of a tuning stage: those that the plan names, or those of a split.

use std::collections::BTreeMap;

use ulmus_plan::{DataConfig, ExamplesConfig, Format, SourceConfig};
use ulmus_storage::FileInfo;

use crate::address::folder_and_name;
use crate::error::DataError;
use crate::manifest;
use crate::rows;
use crate::splits::files_of_split;
use crate::store::{Folder, Stores};

/// Files of the library `datasets` that have no rows.
const NO_ROWS: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];

/// The files of a tuning stage, in their order.
#[derive(Debug)]
pub struct ExampleFiles(pub(super) Vec<ExampleFile>);

#[derive(Debug)]
pub(super) struct ExampleFile {
    pub(super) folder: Folder,
    pub(super) file: FileInfo,
    pub(super) format: Format,
}

impl ExampleFiles {
    /// Finds the files that a stage of a plan names. They are read as the plan's corpora are: through its cache, with its limit
    /// of a request. `run` is the run's own folder.
    ///
    /// # Errors
    /// When a folder cannot be opened or listed, when it has no such files, or when it is unclear which are meant.
    pub fn find(
        data: &[ExamplesConfig],
        corpora: &DataConfig,
        run: Option<&Folder>,
    ) -> Result<Self, DataError> {
        let stores = Stores::new(corpora, run)?;
        let mut files = Vec::new();
        for config in data {
            let (url, patterns) = taken_apart(config);
            let folder = stores.open(url)?;
            for file in files_of(config, url, &patterns, &folder, &stores)? {
                let format = config.format.map_or_else(|| rows::format_of(&folder, &file.path), Ok)?;
                files.push(ExampleFile { folder: folder.clone(), file, format });
            }
        }
        Ok(Self(files))
    }

    /// Where the files lie.
    pub fn places(&self) -> Vec<String> {
        self.0.iter().map(|file| file.folder.place(&file.file.path)).collect()
    }
}

/// The folder and the patterns of files. An address may be that of a file, or end in a glob.
fn taken_apart(config: &ExamplesConfig) -> (&str, Vec<String>) {
    let url = config.url.as_str();
    if !config.files.is_empty() {
        return (url, config.files.clone());
    }
    let is_file = Format::of_file(url).is_some_and(Format::holds_rows);
    let before_glob = url.find(['*', '?', '[']).map(|glob| &url[..glob]);
    if before_glob.is_none() && !is_file {
        return (url, Vec::new());
    }
    let (folder, begin) = folder_and_name(before_glob.unwrap_or(url));
    (folder, vec![url[before_glob.map_or(url.len(), str::len) - begin.len()..].to_owned()])
}

fn files_of(
    config: &ExamplesConfig,
    url: &str,
    patterns: &[String],
    folder: &Folder,
    stores: &Stores,
) -> Result<Vec<FileInfo>, DataError> {
    let found = if patterns.is_empty() {
        let is_of_rows = |file: &FileInfo| {
            let name = file.path.rsplit('/').next().unwrap_or_default();
            let is_hidden = file.path.split('/').any(|part| part.starts_with('.'));
            let format = config.format.or_else(|| Format::of_file(&file.path));
            !is_hidden && !NO_ROWS.contains(&name) && format.is_some_and(Format::holds_rows)
        };
        folder.list()?.into_iter().filter(is_of_rows).collect()
    } else {
        let source = SourceConfig {
            name: url.to_owned(),
            url: url.to_owned(),
            files: patterns.to_vec(),
            ..SourceConfig::default()
        };
        manifest::list(&source, folder, stores)?
    };
    let wrong = |reason: String| DataError::Examples { url: url.to_owned(), reason };
    let paths: Vec<String> = found.iter().map(|file| file.path.clone()).collect();
    let kinds: BTreeMap<String, &str> =
        paths.iter().rev().map(|path| (without_shard(path), path.as_str())).collect();
    let listed = || kinds.keys().cloned().collect::<Vec<_>>().join(", ");
    let chosen = match (&config.split, kinds.len()) {
        (Some(split), _) => {
            let files = files_of_split(&paths, "", None, split).map_err(wrong)?;
            if files.is_empty() {
                let there = if kinds.is_empty() { "no files of rows".to_owned() } else { listed() };
                return Err(wrong(format!(
                    "it has no files of split {split:?} but {there}; correct split, or name files"
                )));
            }
            files
        }
        (None, 0) => {
            let reason =
                "it has no files of rows (.parquet, .arrow, .jsonl, .json); correct url, or name files";
            return Err(wrong(reason.to_owned()));
        }
        (None, 1) if patterns.is_empty() => {
            let kind = kinds.keys().next().map_or("", String::as_str);
            let at = kind.rfind('/').map_or(0, |at| at + 1);
            files_of_split(&paths, &kind[..at], None, &kind[at..]).map_err(wrong)?
        }
        (None, _) if patterns.is_empty() => {
            return Err(wrong(format!(
                "it has several kinds of files: {}; set split, or name files",
                listed()
            )));
        }
        (None, _) => paths,
    };
    let by_path: BTreeMap<&str, &FileInfo> = found.iter().map(|file| (file.path.as_str(), file)).collect();
    Ok(chosen.iter().filter_map(|path| by_path.get(path.as_str()).copied().cloned()).collect())
}

/// The path of a file without what tells it from the other files of its split: its number, and its suffix.
fn without_shard(path: &str) -> String {
    let (folder, name) = path.rsplit_once('/').map_or(("", path), |(folder, name)| (folder, name));
    let stem = name.split('.').next().unwrap_or_default();
    let mut parts: Vec<&str> = stem.split('-').collect();
    if let Some(of) = parts.iter().position(|part| *part == "of").filter(|of| *of > 1) {
        parts.truncate(of - 1);
    }
    let kept = parts.join("-");
    if folder.is_empty() { kept } else { format!("{folder}/{kept}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::memory;

    fn find(paths: &[&str], config: &ExamplesConfig) -> Result<Vec<String>, String> {
        let folder = memory();
        for path in paths {
            folder.write(path, b"{}".to_vec()).unwrap();
        }
        let config = ExamplesConfig { url: format!("run:{}", config.url), ..config.clone() };
        let files = ExampleFiles::find(&[config], &DataConfig::default(), Some(&folder))
            .map_err(|error| error.to_string())?;
        Ok(files.0.iter().map(|file| file.file.path.clone()).collect())
    }

    fn of_split(split: Option<&str>) -> ExamplesConfig {
        ExamplesConfig { split: split.map(str::to_owned), ..ExamplesConfig::default() }
    }

    #[test]
    fn a_split_is_named_or_the_only_one() {
        let shards = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"];
        let all =
            [&shards[..], &["data/test-00000-of-00001.parquet", "README.md", ".hidden/x.jsonl"]].concat();
        assert_eq!(find(&all, &of_split(Some("train"))).unwrap(), shards);
        assert_eq!(find(&shards, &of_split(None)).unwrap(), shards);
        // What `save_to_disk` of the library `datasets` writes.
        let saved = [
            "dataset_dict.json",
            "train/data-00000-of-00001.arrow",
            "train/dataset_info.json",
            "train/state.json",
        ];
        for split in [None, Some("train")] {
            assert_eq!(find(&saved, &of_split(split)).unwrap(), ["train/data-00000-of-00001.arrow"]);
        }
        for (paths, split, words) in [
            (&all[..], None, "several kinds of files: data/test, data/train; set split"),
            (&all[..], Some("val"), "no files of split \"val\" but data/test, data/train"),
            (&["README.md"][..], None, "no files of rows"),
            (&["README.md"][..], Some("train"), "no files of rows"),
            (&shards[1..], Some("train"), "shard 00000 of 00002 is missing"),
        ] {
            let message = find(paths, &of_split(split)).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn files_may_be_named_by_an_address_or_by_patterns() {
        let paths = ["a/one.jsonl", "a/two.jsonl", "a/three.json"];
        let at = |url: &str, files: &[&str]| {
            let files = files.iter().map(|file| (*file).to_owned()).collect();
            ExamplesConfig { url: url.to_owned(), files, ..ExamplesConfig::default() }
        };
        assert_eq!(find(&paths, &at("a/three.json", &[])).unwrap(), ["three.json"]);
        assert_eq!(find(&paths, &at("a/*.jsonl", &[])).unwrap(), ["one.jsonl", "two.jsonl"]);
        assert_eq!(
            find(&paths, &at("a", &["two.jsonl", "three.json"])).unwrap(),
            ["two.jsonl", "three.json"]
        );
        assert!(find(&paths, &at("a", &["four.json"])).unwrap_err().contains("four.json does not exist"));
    }
}
