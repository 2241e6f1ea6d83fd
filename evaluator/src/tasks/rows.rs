//! Finds and reads the rows of a task: data sets in the layout that the hub gives them, in any folder or store.

use std::collections::BTreeMap;

use bytes::Bytes;
use minijinja::value::Value;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row as ParquetRow};
use ulmus_dataloader::Folder;

use super::definition::Definition;
use crate::error::EvaluatorError;

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
    /// Of all files, sorted.
    paths: Vec<String>,
}

/// The rows of one split of a task.
#[derive(Debug)]
pub(crate) struct Split {
    pub name: String,
    /// The files, for messages.
    pub place: String,
    pub rows: Vec<Value>,
}

impl DataSets {
    /// Lists what folders hold. An address is one that a source of a plan may have.
    ///
    /// # Errors
    /// When a folder is not there, or cannot be listed.
    pub fn open(addresses: &[String]) -> Result<Self, EvaluatorError> {
        let open = |address: &String| {
            let folder = Folder::open(address)?;
            let paths = folder.paths()?;
            Ok(DataFolder { address: address.clone(), folder, paths })
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
        if self.made(task).is_some() || self.find(task, split).is_some() {
            return Ok(());
        }
        let problem = self.missing(task, split);
        Err(EvaluatorError::NoRows { task: task.name.clone(), split: split.to_owned(), problem })
    }

    /// Reads a split of a task.
    ///
    /// # Errors
    /// [`EvaluatorError::NoRows`] if there are no files of it, one cannot be read, or they have no rows.
    pub(crate) fn read(&self, task: &Definition, split: &str) -> Result<Split, EvaluatorError> {
        let wrong =
            |problem| EvaluatorError::NoRows { task: task.name.clone(), split: split.to_owned(), problem };
        if let Some(rows) = self.made(task) {
            let place = task.sources[0].clone();
            return Ok(Split { name: split.to_owned(), place, rows: rows.clone() });
        }
        let Some((folder, files)) = self.find(task, split) else {
            return Err(wrong(self.missing(task, split)));
        };
        let mut rows = Vec::new();
        for file in &files {
            let bytes = folder.folder.read(file)?.ok_or_else(|| wrong(format!("{file} has vanished")))?;
            let read = if file.ends_with(".parquet") { parquet_rows(bytes) } else { json_rows(&bytes) };
            rows.extend(read.map_err(|problem| wrong(format!("{}/{file}: {problem}", folder.address)))?);
        }
        let place = format!("{}/{}", folder.address, files.join(", "));
        if rows.is_empty() {
            return Err(wrong(format!("{place} is empty; get the file again")));
        }
        Ok(Split { name: split.to_owned(), place, rows })
    }

    /// The folder and the files of a split. Names of data sets are tried in order, and then the folders themselves.
    fn find(&self, task: &Definition, split: &str) -> Option<(&DataFolder, Vec<String>)> {
        let names = task.sources.iter().map(String::as_str);
        let short = task.sources.iter().filter_map(|source| Some(source.split_once('/')?.1));
        let roots = names.chain(short).map(|name| format!("{name}/")).chain([String::new()]);
        for root in roots {
            for folder in &self.folders {
                let files = files_of(&folder.paths, &root, task.config.as_deref(), split);
                if !files.is_empty() {
                    return Some((folder, files));
                }
            }
        }
        None
    }

    /// What to say where there are no files.
    fn missing(&self, task: &Definition, split: &str) -> String {
        let source = &task.sources[0];
        let config = task.config.as_ref().map(|config| format!("{config}/")).unwrap_or_default();
        let places: Vec<&str> = self.folders.iter().map(|folder| folder.address.as_str()).collect();
        format!(
            "there is no {source}/{config}{split}-*.parquet (or .jsonl, .json) in {}; \
             {}",
            places.join(", "),
            task.note.clone().unwrap_or_else(|| {
                format!("`evaluator fetch --tasks {} --to DIR` gets the data set", task.name)
            })
        )
    }
}

/// The files of a split among some paths, of which only those below `root` count, in the best format that there is.
pub(super) fn files_of(paths: &[String], root: &str, config: Option<&str>, split: &str) -> Vec<String> {
    let in_format = |format: &str| {
        let found = paths
            .iter()
            .filter(|path| path.strip_prefix(root).is_some_and(|rest| is_of(rest, config, split, format)));
        found.cloned().collect::<Vec<_>>()
    };
    [".parquet", ".jsonl", ".json"]
        .into_iter()
        .map(in_format)
        .find(|files| !files.is_empty())
        .unwrap_or_default()
}

/// Whether a path below a data set's folder is a file of a split: `[data/][CONFIG/][data/]SPLIT-*`, `SPLIT.*` or `SPLIT/*`.
fn is_of(path: &str, config: Option<&str>, split: &str, format: &str) -> bool {
    let Some(path) = path.strip_suffix(format) else { return false };
    let path = path.strip_prefix("data/").unwrap_or(path);
    let in_config = match config {
        Some(config) => path.strip_prefix(config).and_then(|rest| rest.strip_prefix('/')),
        None => Some(path.strip_prefix("default/").unwrap_or(path)),
    };
    let Some(name) = in_config.map(|rest| rest.strip_prefix("data/").unwrap_or(rest)) else { return false };
    let Some(rest) = name.strip_prefix(split) else { return false };
    match rest.chars().next() {
        None => true,
        Some('/') => !rest[1..].contains('/'),
        Some('-' | '.' | '_') => !rest.contains('/'),
        Some(_) => false,
    }
}

fn parquet_rows(bytes: Vec<u8>) -> Result<Vec<Value>, String> {
    let failed =
        |error: parquet::errors::ParquetError| format!("it is no valid Parquet file ({error}); get it again");
    let file = SerializedFileReader::new(Bytes::from(bytes)).map_err(failed)?;
    let rows = file.get_row_iter(None).map_err(failed)?;
    rows.map(|row| row.map(|row| of_row(&row)).map_err(failed)).collect()
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
        other => Value::from(other.to_string()),
    }
}

/// Rows of a JSON list, or of lines.
fn json_rows(bytes: &[u8]) -> Result<Vec<Value>, String> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.trim_ascii_start().starts_with(b"[") {
        return serde_json::from_slice(bytes)
            .map_err(|error| format!("it is no JSON list ({error}); get it again"));
    }
    let lines =
        bytes.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let read = |(index, line): (usize, &[u8])| {
        serde_json::from_slice(line)
            .map_err(|error| format!("line {} is no JSON ({error}); get the file again", index + 1))
    };
    lines.map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_split_have_the_hub_s_names() {
        let all = |config: Option<&str>, path: &str| is_of(path, config, "test", ".parquet");
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
    fn rows_of_json_keep_the_order_of_their_keys() {
        for text in ["[{\"b\": 1, \"a\": [\"x\"]}]", "\n{\"b\": 1, \"a\": [\"x\"]}\n"] {
            let rows = json_rows(text.as_bytes()).unwrap();
            assert_eq!(serde_json::to_string(&rows).unwrap(), "[{\"b\":1,\"a\":[\"x\"]}]");
        }
        assert!(json_rows(b"{}\n{").unwrap_err().contains("line 2"));
    }
}
