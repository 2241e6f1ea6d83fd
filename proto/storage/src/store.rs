//! A folder in a store: how it is opened, and how its files are named.

use std::fmt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use tokio::time::Instant;

use crate::address;
use crate::cause;
use crate::counters::Counters;
use crate::error::StoreError;
use crate::retry::{Retries, retried};

/// What a folder is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To read its files.
    Read,
    /// To write files as well. A folder of this machine must be there.
    Write,
    /// To write files as well. A folder of this machine is made if it is not there.
    Create,
}

/// How a folder is opened.
#[derive(Debug, Clone, Copy)]
pub struct OpenOptions {
    /// What it is opened for.
    pub access: Access,
    /// How long the store is given.
    pub retries: Retries,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { access: Access::Write, retries: Retries::RUN }
    }
}

/// A folder on a disk or in an object store; cheap to clone. Paths of files are relative to it, with `/` between their parts.
#[derive(Clone)]
pub struct Store {
    pub(crate) objects: Arc<dyn ObjectStore>,
    prefix: Path,
    /// For messages.
    location: Arc<str>,
    directory: Option<Arc<FilePath>>,
    can_list: bool,
    pub(crate) retries: Retries,
    pub(crate) counters: Arc<Counters>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.location)
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.location)
    }
}

impl Store {
    /// Opens the existing folder at `url` to read and write: a path, a `file://` address, or a folder of an object store,
    /// such as `s3://bucket/path`, which is not asked for anything yet.
    ///
    /// # Errors
    /// [`StoreError::Address`] when there is no such folder, or no such kind of store in this build.
    pub fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, OpenOptions::default())
    }

    /// As [`Store::open`], but makes a folder of this machine first if need be.
    ///
    /// # Errors
    /// [`StoreError::Address`] when it cannot be made, or when there is no such kind of store in this build.
    pub fn create(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, OpenOptions { access: Access::Create, ..OpenOptions::default() })
    }

    /// Opens the folder at `url`. To read, it may be on a web server as well.
    ///
    /// # Errors
    /// [`StoreError::Address`] when there is no such folder, when it cannot be made, or when there is no such kind of store
    /// in this build.
    pub fn open_with(url: &str, options: OpenOptions) -> Result<Self, StoreError> {
        let refuse = |reason: String| StoreError::Address { url: url.to_owned(), reason };
        if options.access != Access::Read && !address::is_writable(url) {
            let reason = "nothing can be written there; use a path, file://, s3://, gs:// or az://";
            return Err(refuse(reason.to_owned()));
        }
        if let Some(directory) = address::directory_of(url).map_err(refuse)? {
            if options.access == Access::Create {
                std::fs::create_dir_all(&directory).map_err(|error| refuse(error.to_string()))?;
            }
            return Self::local(url, directory, options.retries).map_err(refuse);
        }
        let counters = Arc::default();
        let (objects, prefix) = address::open(url, options.retries, &counters).map_err(refuse)?;
        let can_list = !address::is_web_server(url);
        let (location, retries) = (url.into(), options.retries);
        Ok(Self { objects, prefix, location, directory: None, can_list, retries, counters })
    }

    fn local(url: &str, directory: PathBuf, retries: Retries) -> Result<Self, String> {
        match std::fs::metadata(&directory) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err("it is a file; name a folder".to_owned()),
            Err(error) => {
                let place = directory.display();
                return Err(format!(
                    "{place} is not a folder on this machine ({error}); correct the path, or share the folder with this \
                     machine"
                ));
            }
        }
        let objects = LocalFileSystem::new_with_prefix(&directory).map_err(|error| error.to_string())?;
        Ok(Self {
            // Without fsync a file could vanish with the machine's power after others rely on it: the parts of a checkpoint
            // behind its manifest, a copy behind its note.
            objects: Arc::new(objects.with_fsync(true)),
            prefix: Path::default(),
            location: url.into(),
            directory: Some(directory.into()),
            can_list: true,
            retries,
            counters: Arc::default(),
        })
    }

    /// A folder of any object store. `location` names it in messages.
    pub fn from_objects(objects: Arc<dyn ObjectStore>, prefix: Path, location: &str) -> Self {
        let (retries, counters) = (Retries::RUN, Arc::default());
        Self {
            objects,
            prefix,
            location: location.into(),
            directory: None,
            can_list: true,
            retries,
            counters,
        }
    }

    /// The same folder whose operations are repeated in another way. Single requests stay as they were opened.
    #[must_use]
    pub fn with_retries(self, retries: Retries) -> Self {
        Self { retries, ..self }
    }

    /// The same folder with counters that something else counts with, too.
    #[must_use]
    pub fn with_counters(self, counters: Arc<Counters>) -> Self {
        Self { counters, ..self }
    }

    /// The same folder under another name in messages.
    #[must_use]
    pub fn named(self, location: &str) -> Self {
        Self { location: location.into(), ..self }
    }

    /// The folder `path` of this one, which need not exist yet.
    #[must_use]
    pub fn folder(&self, path: &str) -> Self {
        Self {
            prefix: self.resolve(path),
            location: self.place(path).into(),
            directory: self
                .directory
                .as_deref()
                .map(|directory| directory.join(parsed(path).as_ref()).into()),
            ..self.clone()
        }
    }

    /// Where the folder is, as it was given.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// The folder on this machine's disk, where it is on one; for what needs a real file, such as a database.
    pub fn directory(&self) -> Option<&FilePath> {
        self.directory.as_deref()
    }

    /// Whether [`Store::list`] works.
    pub const fn can_list(&self) -> bool {
        self.can_list
    }

    /// What has been read, and what went wrong on the way.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The address of a file, for messages.
    pub fn place(&self, path: &str) -> String {
        let separator = if self.location.ends_with([':', '/']) { "" } else { "/" };
        format!("{}{separator}{path}", self.location)
    }

    /// The path of a file within the whole store.
    pub(crate) fn resolve(&self, path: &str) -> Path {
        self.prefix.parts().chain(parsed(path).parts()).collect()
    }

    /// The path below this folder of a file of the whole store, if it lies there.
    pub(crate) fn relative(&self, path: &Path) -> Option<String> {
        let parts: Vec<String> =
            path.prefix_match(&self.prefix)?.map(|part| part.as_ref().to_owned()).collect();
        Some(parts.join("/"))
    }

    /// Does an operation on a file, again if need be, and explains why it failed.
    pub(crate) async fn attempt<T, R: Future<Output = object_store::Result<T>>>(
        &self,
        act: &'static str,
        path: &str,
        operation: impl FnMut() -> R,
    ) -> Result<T, StoreError> {
        let begun = Instant::now();
        retried(self.retries.deadline, 0, cause::is_transient, operation)
            .await
            .map_err(|error| self.error(act, path, &error).after(begun.elapsed()))
    }

    /// What an error means for a file of this folder.
    pub(crate) fn error(&self, act: &'static str, path: &str, error: &object_store::Error) -> StoreError {
        match StoreError::of(act, self.place(path), error) {
            // A file need not be there to be written. A folder of a disk is made.
            StoreError::NotFound { .. } if act == "write" => StoreError::Address {
                url: self.location.to_string(),
                reason: "there is no such bucket or container; create it, or correct the name".to_owned(),
            },
            error => error,
        }
    }
}

/// A path as listings tell it; one that no listing has is encoded.
pub(crate) fn parsed(path: &str) -> Path {
    Path::parse(path).unwrap_or_else(|_| Path::from(path))
}

#[cfg(test)]
mod tests {
    use ulmus_types::ErrorKind;

    use super::*;

    #[tokio::test]
    async fn a_url_and_its_path_are_the_same_folder() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a #1?");
        Store::create(path.to_str().unwrap()).unwrap().put("a", "1").await.unwrap();
        let store = Store::open(&format!("file://{}", path.display())).unwrap();
        assert_eq!(store.get("a").await.unwrap(), "1");
        assert_eq!(store.directory(), Some(&*path));
    }

    #[test]
    fn what_is_no_folder_is_refused_with_the_reason() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("file");
        std::fs::write(&file, "x").unwrap();
        for (url, reason) in [
            ("https://host/run", "nothing can be written there"),
            ("ftp://host/run", "ftp:// is not known"),
            ("", "empty"),
            ("file:relative", "share the folder with this machine"),
            ("/nowhere/at/all", "not a folder on this machine"),
            (file.to_str().unwrap(), "is a file"),
        ] {
            let error = Store::open(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            let message = error.to_string();
            assert!(message.contains(reason) && message.contains(url), "{message}");
        }
        assert!(Store::create(file.join("below").to_str().unwrap()).is_err());
    }

    /// The disk and the store must mean the same folder by a path.
    #[tokio::test]
    async fn a_folder_lies_within_the_one_that_it_is_of() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::create(home.path().join("run").to_str().unwrap()).unwrap();
        for path in ["/shards", "../other", "a/../b", "shards"] {
            let folder = store.folder(path);
            folder.put("a.txt", "1").await.unwrap();
            let directory = folder.directory().unwrap().to_owned();
            assert!(directory.starts_with(home.path().join("run")), "{}", directory.display());
            assert!(directory.join("a.txt").exists(), "{}", directory.display());
        }
    }

    #[test]
    fn files_are_named_by_their_addresses() {
        let at = |location| Store::from_objects(Arc::new(LocalFileSystem::new()), Path::default(), location);
        assert_eq!(at("s3://b/x").folder("y").place("z"), "s3://b/x/y/z");
        assert_eq!(at("s3://b/x/").place("y"), "s3://b/x/y");
        assert_eq!(at("run:").folder("shards").place("a.txt"), "run:shards/a.txt");
        assert_eq!(at("a").named("b").place("c"), "b/c");
    }
}
