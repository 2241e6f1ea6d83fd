//! Copies the data sets of tasks from the hub, in the layout in which tasks look for them.

use std::collections::BTreeSet;
use std::path::Path;

use ulmus_dataloader::{DataError, Folder, files_of_split};

use super::definition::Definition;
use super::select::{Item, Selection};
use crate::error::EvaluatorError;

/// A file that has been copied, or was there already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Its path below the target.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Whether it was there already.
    pub was_there: bool,
}

/// Copies the splits that the tasks of a selection read to the folder `to`. Files that are there whole are not copied again.
///
/// # Errors
/// When a data set is not on the hub or does not have a split, the hub does not answer, or a file cannot be written.
pub fn fetch(
    selection: &Selection,
    to: &Path,
    on_file: &mut dyn FnMut(Fetched),
) -> Result<(), EvaluatorError> {
    // A folder that cannot be written is told before the hub is asked.
    std::fs::create_dir_all(to).map_err(|error| EvaluatorError::Write { path: to.to_owned(), error })?;
    let mut done = BTreeSet::new();
    for item in &selection.items {
        let Item::Task { task, .. } = item else { continue };
        let splits: BTreeSet<&str> =
            [task.measured_split(), task.examples_split()].into_iter().flatten().collect();
        if let Some(note) = &task.note {
            return Err(EvaluatorError::NotFetched { task: task.name.clone(), problem: note.clone() });
        }
        let (folder, files) = find(task, &splits)?;
        for path in files {
            let target = to.join(&task.sources[0]).join(&path);
            if !done.insert(target.clone()) {
                continue;
            }
            let named = format!("{}/{path}", task.sources[0]);
            if let Some(bytes) = folder.copy_of(&path, &target)? {
                on_file(Fetched { path: named, bytes, was_there: true });
                continue;
            }
            let bytes = folder.download(&path, &target)?;
            on_file(Fetched { path: named, bytes, was_there: false });
        }
    }
    Ok(())
}

/// The place on the hub that has all splits, and their files.
fn find(task: &Definition, splits: &BTreeSet<&str>) -> Result<(Folder, Vec<String>), EvaluatorError> {
    let mut tried = Vec::new();
    for source in &task.sources {
        // Data sets without Parquet files of their own have them on a branch that the hub makes.
        for revision in ["", "@refs/convert/parquet"] {
            let address = format!("hf://datasets/{source}{revision}");
            let listed = Folder::open(&address).and_then(|folder| Ok((folder.paths()?, folder)));
            let (paths, folder) = match listed {
                Ok(listed) => listed,
                Err(error) if is_missing(&error) => {
                    tried.push(format!("{address}: {error}"));
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let of_split = |split: &&str| files_of_split(&paths, "", task.config.as_deref(), split);
            let files: Result<Vec<Vec<String>>, String> = splits.iter().map(of_split).collect();
            let files = match files {
                Ok(files) => files,
                Err(problem) => {
                    tried.push(format!("{address}: {problem}"));
                    continue;
                }
            };
            match splits.iter().zip(&files).find(|(_, files)| files.is_empty()) {
                None => return Ok((folder, files.concat())),
                Some((split, _)) => tried.push(format!("{address} has no files of split {split}")),
            }
        }
    }
    Err(EvaluatorError::NotFetched { task: task.name.clone(), problem: tried.join("; ") })
}

/// Whether a data set is not there, and may be under another name.
fn is_missing(error: &DataError) -> bool {
    error.kind() == ulmus_types::ErrorKind::InvalidInput
}
