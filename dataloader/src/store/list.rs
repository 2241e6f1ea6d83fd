//! Which files a folder has: listed, found by patterns, or looked up by name.

use std::collections::BTreeSet;
use std::io;

use futures::{StreamExt, TryStreamExt};
use ulmus_storage::{FileInfo, check_path, is_unfinished};

use super::folder::Folder;
use super::runtime::wait_for;
use crate::error::DataError;
use crate::glob::FileGlob;
use crate::walk::{Passed, Walked, walk};

/// Files that are looked up at once.
const LOOK_UPS_IN_FLIGHT: usize = 16;

impl Folder {
    /// Paths of all files below the folder, sorted.
    ///
    /// # Errors
    /// When the store does not list them.
    pub fn paths(&self) -> Result<Vec<String>, DataError> {
        Ok(self.list()?.into_iter().map(|file| file.path).collect())
    }

    /// Links below the folder that lead nowhere, so that what they stood for is missing.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn dangling(&self) -> Result<Vec<String>, DataError> {
        let Some(folder) = self.store.directory().filter(|folder| folder.is_dir()) else {
            return Ok(Vec::new());
        };
        let passed = walk(folder, true).map_err(|(folder, error)| of_walk(&folder, &error))?.passed;
        Ok(passed.into_iter().filter(|(why, _)| *why == Passed::Dangling).map(|(_, name)| name).collect())
    }

    /// All files below the folder that can be asked for, sorted by path.
    pub(crate) fn list(&self) -> Result<Vec<FileInfo>, DataError> {
        if self.is_on_disk() {
            let walked = self.walk(true)?.into_iter().filter(|file| askable(file).is_ok());
            let mut paths: Vec<String> = walked.map(|file| file.name).collect();
            paths.sort();
            return self.stat(paths);
        }
        #[cfg(feature = "http")]
        if let Some(hub) = &self.hub {
            let mut files = wait_for(hub.list()).map_err(|failed| failed.of(self.url()))?;
            files.sort_by(|a, b| a.path.cmp(&b.path));
            return Ok(files);
        }
        Ok(wait_for(self.store.list(""))?.into_iter().map(|file| self.known(file)).collect())
    }

    /// The files below the folder that each of some patterns names, sorted by path.
    ///
    /// # Errors
    /// When the folder cannot be listed, or a pattern names a file that cannot be asked for.
    pub(crate) fn find(&self, globs: &[FileGlob]) -> Result<Vec<Vec<FileInfo>>, DataError> {
        let refuse = |path: &str, reason| DataError::Name { file: self.place(path), reason };
        if !self.is_on_disk() {
            let listed = self.list()?;
            let names = |path: &str| globs.iter().any(|glob| glob.matches(path));
            if let Some(path) = self.store.odd_names().iter().find(|path| names(path)) {
                return Err(refuse(path, "its path cannot be asked for".to_owned()));
            }
            let found =
                |glob: &FileGlob| listed.iter().filter(|file| glob.matches(&file.path)).cloned().collect();
            return Ok(globs.iter().map(found).collect());
        }
        let walked = self.walk(globs.iter().any(FileGlob::names_hidden))?;
        let again: BTreeSet<&str> =
            walked.iter().filter(|file| file.is_again).map(|file| file.name.as_str()).collect();
        // A file that is read under its own name is not read again through a link, unless the link itself is named.
        let names =
            |glob: &FileGlob, path: &str| glob.matches(path) && !(glob.is_deep() && again.contains(path));
        let mut paths = BTreeSet::new();
        for file in walked.iter().filter(|file| globs.iter().any(|glob| names(glob, &file.name))) {
            askable(file).map_err(|reason| refuse(&file.name, reason))?;
            paths.insert(file.name.clone());
        }
        let listed = self.stat(paths.into_iter().collect())?;
        let found = |glob: &FileGlob| listed.iter().filter(|file| names(glob, &file.path)).cloned().collect();
        Ok(globs.iter().map(found).collect())
    }

    /// The files below a folder of this machine.
    fn walk(&self, enters_hidden: bool) -> Result<Vec<Walked>, DataError> {
        let Some(folder) = self.store.directory() else { return Ok(Vec::new()) };
        match walk(folder, enters_hidden) {
            Ok(walk) => Ok(walk.files),
            Err((_, error)) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err((folder, error)) => Err(of_walk(&folder, &error)),
        }
    }

    /// Size and version of the files at `paths`, in their order.
    pub(crate) fn stat(&self, paths: Vec<String>) -> Result<Vec<FileInfo>, DataError> {
        for path in &paths {
            check_path(path).map_err(|reason| DataError::Name { file: self.place(path), reason })?;
        }
        #[cfg(feature = "http")]
        if self.hub.is_some() {
            // One listing instead of a request for each file.
            let all = self.list()?;
            let find = |path: String| match all.binary_search_by(|file| file.path.cmp(&path)) {
                Ok(found) => Ok(all[found].clone()),
                Err(_) => Err(DataError::Missing { file: self.place(&path) }),
            };
            return paths.into_iter().map(find).collect();
        }
        let looked_up = futures::stream::iter(paths).map(|path| async move { self.look_up(&path).await });
        wait_for(looked_up.buffered(LOOK_UPS_IN_FLIGHT).try_collect())
    }

    /// Size and version of a file.
    pub(crate) async fn look_up(&self, path: &str) -> Result<FileInfo, DataError> {
        Ok(self.known(self.store.stat(path).await?))
    }

    /// Whether a file is there, and the one that was described.
    pub(crate) async fn is_still(&self, file: &FileInfo) -> Result<bool, DataError> {
        Ok(self.store.is_still(&self.known(file.clone())).await?)
    }
}

/// Paths of the wanted files below a folder of this machine, sorted, with `/` between their parts. Hidden files are
/// skipped, and so are links that lead upwards or to something that is in the folder anyway.
///
/// # Errors
/// When a folder cannot be listed, or a file that is wanted has a name that cannot be asked for.
pub fn files_below(
    folder: &std::path::Path,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<String>, DataError> {
    let found = walk(folder, false).map_err(|(folder, error)| of_walk(&folder, &error))?;
    let mut paths = Vec::new();
    for file in found.files.into_iter().filter(|file| !file.is_again && wanted(&file.name)) {
        askable(&file).map_err(|reason| DataError::Name { file: file.path.display().to_string(), reason })?;
        paths.push(file.name);
    }
    paths.sort();
    Ok(paths)
}

/// An error of a folder that cannot be listed.
pub(crate) fn of_walk(folder: &std::path::Path, error: &io::Error) -> DataError {
    DataError::Disk { file: folder.display().to_string(), reason: error.to_string() }
}

/// Makes sure that a file can be asked for by its name.
fn askable(file: &Walked) -> Result<(), String> {
    if !file.is_utf8 {
        return Err("its name is not UTF-8".to_owned());
    }
    if is_unfinished(&file.name) {
        return Err("names that end in # and a number are those of files that are being written".to_owned());
    }
    check_path(&file.name)
}
