//! Finds and reads the rows of a task: data sets in the layout that the hub gives them, in any folder or store.

use std::collections::BTreeMap;

use minijinja::value::{Serde, Value};
use ulmus_dataloader::{Folder, files_of_split, read_rows};
use ulmus_types::for_people;

use super::definition::Definition;
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
            rows.extend(read_rows(&folder.folder, file)?.into_iter().map(|row| Value::from(Serde(row))));
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
                let files = files_of_split(&folder.paths, &root, task.config.as_deref(), split);
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
