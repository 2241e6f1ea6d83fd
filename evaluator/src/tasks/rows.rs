//! Finds and reads the rows of a task: data sets in the layout that the hub gives them, in any folder or store.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use minijinja::value::{Value, ValueKind};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row as ParquetRow};
use ulmus_dataloader::Folder;
use ulmus_types::for_people;

use super::definition::Definition;
use super::template::kind;
use crate::error::EvaluatorError;

/// The longest description of what is wrong with a row, in characters.
const PROBLEM_LENGTH: usize = 400;

/// Folders with data sets, and rows that were made.
#[derive(Debug)]
pub struct DataSets {
    folders: Vec<DataFolder>,
    /// By the name of the data set.
    made: BTreeMap<String, Vec<Value>>,
}

#[derive(Debug)]
struct DataFolder {
    address: String,
    folder: Folder,
    /// Of all files, sorted, with links that lead nowhere.
    paths: Vec<String>,
    dangling: Vec<String>,
}

/// The rows of one split of a task.
#[derive(Debug)]
pub(crate) struct Split {
    pub name: String,
    pub rows: Vec<Value>,
    /// The files, for messages, and the number of the first row of each.
    files: Vec<(String, usize)>,
}

impl Split {
    /// The files.
    pub(crate) fn place(&self) -> String {
        self.files.iter().map(|(file, _)| file.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// An error about a row.
    pub(crate) fn wrong(&self, task: &Definition, row: usize, problem: &str) -> EvaluatorError {
        let after = self.files.partition_point(|(_, first)| *first <= row);
        let (place, first) = &self.files[after.saturating_sub(1)];
        let problem = for_people(problem, PROBLEM_LENGTH);
        EvaluatorError::Row { task: task.name.clone(), row: row - first, place: place.clone(), problem }
    }
}

impl DataSets {
    /// Lists what folders hold. An address is one that a source of a plan may have.
    ///
    /// # Errors
    /// When a folder is not there, or cannot be listed.
    pub fn open(addresses: &[String]) -> Result<Self, EvaluatorError> {
        let open = |address: &String| {
            let folder = Folder::open(address)?;
            let dangling = folder.dangling()?;
            let mut paths = [folder.paths()?, dangling.clone()].concat();
            paths.sort();
            Ok(DataFolder { address: address.clone(), folder, paths, dangling })
        };
        let folders = addresses.iter().map(open).collect::<Result<_, EvaluatorError>>()?;
        Ok(Self { folders, made: BTreeMap::new() })
    }

    /// Adds rows that stand for all splits of a data set.
    pub fn add_rows(&mut self, source: &str, rows: Vec<serde_json::Value>) {
        let value = |row| serde_json::from_value(row).expect("every JSON value is a value of templates");
        self.made.insert(source.to_owned(), rows.into_iter().map(value).collect());
    }

    fn made(&self, task: &Definition) -> Option<&Vec<Value>> {
        task.sources.iter().find_map(|source| self.made.get(source))
    }

    /// Whether there are files of a split.
    ///
    /// # Errors
    /// [`EvaluatorError::NoRows`] if there are none.
    pub(crate) fn look_for(&self, task: &Definition, split: &str) -> Result<(), EvaluatorError> {
        if self.made(task).is_none() {
            self.find(task, split)?;
        }
        Ok(())
    }

    /// Reads a split of a task.
    ///
    /// # Errors
    /// [`EvaluatorError::NoRows`] if there are no files of it, one cannot be read, or they have no rows.
    pub(crate) fn read(&self, task: &Definition, split: &str) -> Result<Split, EvaluatorError> {
        let wrong =
            |problem| EvaluatorError::NoRows { task: task.name.clone(), split: split.to_owned(), problem };
        if let Some(rows) = self.made(task) {
            let files = vec![(task.sources[0].clone(), 0)];
            return Ok(Split { name: split.to_owned(), rows: rows.clone(), files });
        }
        let (folder, files) = self.find(task, split)?;
        let mut rows = Vec::new();
        let mut first_rows = Vec::new();
        for file in &files {
            first_rows.push((format!("{}/{file}", folder.address), rows.len()));
            let in_file = |problem: String| wrong(format!("{}/{file}: {problem}", folder.address));
            let bytes = folder.folder.read(file)?;
            let bytes = bytes.ok_or_else(|| in_file("it is not there; get it again".to_owned()))?;
            let read = if file.ends_with(".parquet") { parquet_rows(bytes) } else { json_rows(&bytes) };
            rows.extend(read.map_err(in_file)?);
        }
        let split = Split { name: split.to_owned(), rows, files: first_rows };
        if split.rows.is_empty() {
            return Err(wrong(format!("{} is empty; get the file again", split.place())));
        }
        Ok(split)
    }

    /// The folder and the files of a split. Names of data sets are tried in order, and then the folders themselves.
    ///
    /// # Errors
    /// [`EvaluatorError::NoRows`] if there are none, or it is unclear which they are.
    fn find(&self, task: &Definition, split: &str) -> Result<(&DataFolder, Vec<String>), EvaluatorError> {
        let wrong =
            |problem| EvaluatorError::NoRows { task: task.name.clone(), split: split.to_owned(), problem };
        let names = task.sources.iter().map(String::as_str);
        let short = task.sources.iter().filter_map(|source| Some(source.split_once('/')?.1));
        let roots = names.chain(short).map(|name| format!("{name}/")).chain([String::new()]);
        for root in roots {
            for folder in &self.folders {
                let files = files_of(&folder.paths, &root, task.config.as_deref(), split);
                let files = files.map_err(|problem| wrong(format!("{}: {problem}", folder.address)))?;
                if let Some(file) = files.iter().find(|file| folder.dangling.contains(file)) {
                    let place = format!("{}/{file}", folder.address);
                    return Err(wrong(format!("{place} is a link that leads nowhere; get the file again")));
                }
                if !files.is_empty() {
                    return Ok((folder, files));
                }
            }
        }
        Err(wrong(self.missing(task, split)))
    }

    /// What to say where there are no files.
    fn missing(&self, task: &Definition, split: &str) -> String {
        let source = &task.sources[0];
        let config = task.config.as_ref().map(|config| format!("{config}/")).unwrap_or_default();
        let places: Vec<&str> = self.folders.iter().map(|folder| folder.address.as_str()).collect();
        let near = |path: &&String| {
            let name = path.rsplit('/').next().unwrap_or_default();
            let below = format!("{}/", source.rsplit('/').next().unwrap_or_default());
            let is_of_source = path.split_once(&below).is_some_and(|(_, rest)| rest.contains(&config));
            name.starts_with(split) && is_of_source
        };
        let there: Vec<&String> = self.folders.iter().flat_map(|folder| &folder.paths).filter(near).collect();
        let there = there.first().map(|path| format!(" ({path} has another name or format)"));
        format!(
            "there is no {source}/{config}{split}-*.parquet (or .jsonl, .json) in {}{}; {}",
            places.join(", "),
            there.unwrap_or_default(),
            task.note.clone().unwrap_or_else(|| {
                format!("`evaluator fetch --tasks {} --to DIR` gets the data set", task.name)
            })
        )
    }
}

/// The files of a split among some paths, of which only those below `root` count, in the best format that there is.
///
/// # Errors
/// Which files of the split are there in two ways, or are missing.
pub(super) fn files_of(
    paths: &[String],
    root: &str,
    config: Option<&str>,
    split: &str,
) -> Result<Vec<String>, String> {
    for format in [".parquet", ".jsonl", ".json"] {
        // By how they are named, since rows would be counted twice if two ways were read.
        let mut found: BTreeMap<Naming<'_>, BTreeMap<(usize, &str), &String>> = BTreeMap::new();
        for path in paths {
            let below = path.strip_prefix(root).and_then(|path| path.strip_suffix(format));
            if let Some((naming, shard)) = below.and_then(|path| Naming::of(path, config, split)) {
                found.entry(naming).or_default().insert((shard, path), path);
            }
        }
        let mut ways = found.into_iter();
        let Some((naming, files)) = ways.next() else { continue };
        let first =
            |files: &BTreeMap<_, &String>| files.values().next().map(ToString::to_string).unwrap_or_default();
        if let Some((_, others)) = ways.next() {
            let (one, other) = (first(&files), first(&others));
            return Err(format!("both {one} and {other} look like split {split}; leave one of them there"));
        }
        if let Some(shards) = naming.shards {
            let there: BTreeSet<usize> = files.keys().map(|(shard, _)| *shard).collect();
            let beside = first(&files);
            if let Some(missing) = (0..shards).find(|shard| !there.contains(shard)) {
                return Err(format!(
                    "shard {missing:05} of {shards:05} is missing beside {beside}; get it again"
                ));
            }
            if files.len() != shards {
                return Err(format!(
                    "there are {} files of {shards} beside {beside}; get all again",
                    files.len()
                ));
            }
        }
        return Ok(files.into_values().cloned().collect());
    }
    Ok(Vec::new())
}

/// How the files of a split are named below a data set's folder: `[data/][CONFIG/][data/]` and then `SPLIT`, `SPLIT/*`,
/// `SPLIT.*`, `SPLIT-0*` or `SPLIT-00000-of-00002*`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Naming<'a> {
    folder: &'a str,
    separator: Option<char>,
    /// How many files there must be.
    shards: Option<usize>,
}

impl<'a> Naming<'a> {
    /// How a file is named, if it is of the split, and which shard it is. `path` has no suffix.
    fn of(path: &'a str, config: Option<&str>, split: &str) -> Option<(Self, usize)> {
        let inner = path.strip_prefix("data/").unwrap_or(path);
        let name = match config {
            Some(config) => inner.strip_prefix(config)?.strip_prefix('/')?,
            None => inner.strip_prefix("default/").unwrap_or(inner),
        };
        let name = name.strip_prefix("data/").unwrap_or(name);
        let folder = &path[..path.len() - name.len()];
        let rest = name.strip_prefix(split)?;
        let separator = rest.chars().next();
        let numbers = rest.get(1..).unwrap_or_default();
        let is_of_split = match separator {
            None => true,
            Some('/' | '.') => !numbers.contains('/'),
            Some('-' | '_') => {
                numbers.starts_with(|first: char| first.is_ascii_digit()) && !numbers.contains('/')
            }
            Some(_) => false,
        };
        let shard = numbers.split_once("-of-").and_then(|(number, count)| {
            // Some writers add a hash.
            let count = count.split('-').next().unwrap_or_default();
            Some((number.parse().ok()?, count.parse().ok()?))
        });
        let (number, shards) = shard.map_or((0, None), |(number, shards)| (number, Some(shards)));
        is_of_split.then_some((Self { folder, separator, shards }, number))
    }
}

fn parquet_rows(bytes: Vec<u8>) -> Result<Vec<Value>, String> {
    let failed = |reason: String| format!("it is no valid Parquet file ({reason}); get it again");
    let read = || {
        let file = SerializedFileReader::new(Bytes::from(bytes))?;
        file.get_row_iter(None)?
            .map(|row| row.map(|row| of_row(&row)))
            .collect::<parquet::errors::Result<_>>()
    };
    // The decoder panics on some damaged files, with a message of its own. Nothing that it was working on is used afterwards.
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(rows) => rows.map_err(|error| failed(error.to_string())),
        Err(_) => Err(failed("its pages are damaged".to_owned())),
    }
}

fn of_row(row: &ParquetRow) -> Value {
    let columns = row.get_column_iter().map(|(name, field)| (Value::from(name.as_str()), of_field(field)));
    Value::from_pairs(columns)
}

fn of_field(field: &Field) -> Value {
    match field {
        Field::Null => Value::from(()),
        Field::Bool(value) => Value::from(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) => Value::from(*value),
        Field::Long(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float(value) => Value::from(*value),
        Field::Double(value) => Value::from(*value),
        Field::Str(value) => Value::from(value.as_str()),
        Field::Bytes(bytes) => String::from_utf8(bytes.data().to_vec())
            .map_or_else(|bytes| Value::from_bytes(bytes.into_bytes()), Value::from),
        Field::Group(row) => of_row(row),
        Field::ListInternal(list) => list.elements().iter().map(of_field).collect(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, value)| (of_field(key), of_field(value)));
            Value::from_pairs(entries)
        }
        // Dates and times as they are stored: most years have no name in a calendar.
        Field::Date(days) => Value::from(*days),
        Field::TimeMillis(time) => Value::from(*time),
        Field::TimeMicros(time) | Field::TimestampMillis(time) | Field::TimestampMicros(time) => {
            Value::from(*time)
        }
        other => Value::from(other.to_string()),
    }
}

/// Rows of a JSON list, or of lines.
fn json_rows(bytes: &[u8]) -> Result<Vec<Value>, String> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.trim_ascii_start().starts_with(b"[") {
        let rows: Vec<Value> = serde_json::from_slice(bytes)
            .map_err(|error| format!("it is no JSON list ({error}); get it again"))?;
        return match rows.iter().position(|row| row.kind() != ValueKind::Map) {
            Some(row) => Err(format!("row {row} is {}, and not an object with columns", kind(&rows[row]))),
            None => Ok(rows),
        };
    }
    let lines =
        bytes.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let read = |(index, line): (usize, &[u8])| {
        let row: Result<Value, _> = serde_json::from_slice(line);
        if let Some(other) = row.as_ref().ok().filter(|row| row.kind() != ValueKind::Map) {
            return Err(format!("line {} is {}, and not an object with columns", index + 1, kind(other)));
        }
        row.map_err(|error| {
            if serde_json::from_slice::<serde_json::Value>(bytes).is_ok() {
                return "it is a single JSON object; rows are a JSON list, or each is a line".to_owned();
            }
            format!("line {} is no JSON ({error}); get the file again", index + 1)
        })
    };
    lines.map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_split_have_the_hub_s_names() {
        let all = |config: Option<&str>, path: &str| {
            path.strip_suffix(".parquet").is_some_and(|path| Naming::of(path, config, "test").is_some())
        };
        for path in [
            "test-00000-of-00001.parquet",
            "data/test-0.parquet",
            "test.parquet",
            "test/0000.parquet",
            "default/test-0.parquet",
        ] {
            assert!(all(None, path), "{path}");
        }
        for path in ["x/test-0.parquet", "x/test/0.parquet", "data/x/test.parquet", "x/data/test-0.parquet"] {
            assert!(all(Some("x"), path) && !all(None, path), "{path}");
        }
        for path in ["tests.parquet", "test-0.jsonl", "test/a/0.parquet", "train-test.parquet"] {
            assert!(!all(None, path), "{path}");
        }
    }

    #[test]
    fn files_of_one_naming_are_read_and_all_of_them() {
        let files = |paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|path| format!("own/{path}")).collect();
            files_of(&paths, "own/", None, "test").map(|files| files.len())
        };
        assert_eq!(
            files(&["test-00000-of-00002.parquet", "test-00001-of-00002.parquet", "test.jsonl"]),
            Ok(2)
        );
        assert_eq!(
            files(&["test-00000-of-00001.parquet", "test_unlabelled.parquet", "test-a.parquet"]),
            Ok(1)
        );
        assert_eq!(files(&["test-00000-of-00001-5ab3.parquet"]), Ok(1));
        let twice = files(&["test-00000-of-00001-5ab3.parquet", "test-00000-of-00001-6bc4.parquet"]);
        assert!(twice.unwrap_err().starts_with("there are 2 files of 1"));
        assert_eq!(files(&["train.parquet"]), Ok(0));
        for twice in ["test.parquet", "data/test-00000-of-00001.parquet", "test-00001-of-00002.parquet"] {
            let error = files(&["test-00000-of-00001.parquet", twice]).unwrap_err();
            assert!(error.contains(twice) && error.contains("look like split test"), "{error}");
        }
        for missing in [
            &["test-00000-of-00003.parquet", "test-00002-of-00003.parquet"][..],
            &["test-00000-of-00002-5ab3.parquet"],
        ] {
            let error = files(missing).unwrap_err();
            assert!(error.starts_with("shard 00001 of 0000"), "{error}");
        }
    }

    #[test]
    fn damaged_files_and_impossible_dates_end_nothing() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/evaluation/data");
        let whole =
            std::fs::read(folder.join("allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet")).unwrap();
        let rows = parquet_rows(whole.clone()).unwrap().len();
        let mut refused = 0;
        for at in (0..whole.len()).step_by(97) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0xff;
            refused += usize::from(parquet_rows(damaged).is_err());
        }
        assert!(rows > 0 && refused > 0);
        assert_eq!(of_field(&Field::Date(i32::MAX)), Value::from(i32::MAX));
        assert_eq!(of_field(&Field::TimestampMicros(i64::MIN)), Value::from(i64::MIN));
    }

    #[test]
    fn a_link_that_leads_nowhere_is_a_file_that_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("ai2_arc/ARC-Easy");
        std::fs::create_dir_all(&place).unwrap();
        std::os::unix::fs::symlink("/nowhere", place.join("test.parquet")).unwrap();
        let data = DataSets::open(&[folder.path().display().to_string()]).unwrap();
        let catalogue =
            super::super::definition::Catalogue::built_in(super::super::definition::Revision::Current);
        let error = data.look_for(&catalogue.tasks["arc_easy"], "test").unwrap_err().to_string();
        assert!(error.contains("ARC-Easy/test.parquet is a link that leads nowhere"), "{error}");
    }

    #[test]
    fn rows_of_json_keep_the_order_of_their_keys() {
        for text in ["[{\"b\": 1, \"a\": [\"x\"]}]", "\n{\"b\": 1, \"a\": [\"x\"]}\n"] {
            let rows = json_rows(text.as_bytes()).unwrap();
            assert_eq!(serde_json::to_string(&rows).unwrap(), "[{\"b\":1,\"a\":[\"x\"]}]");
        }
        assert!(json_rows(b"{}\n{").unwrap_err().contains("line 2"));
        assert!(json_rows(b"{\n\"a\": 1\n}").unwrap_err().contains("a single JSON object"));
    }
}
