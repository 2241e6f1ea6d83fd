//! The run folder: the one handle through which a run's files are written and read.
//!
//! It protects two properties. A file is there whole or not at all: [`Store::put`] is atomic, and on a local disk
//! durable when it returns. And a busy store is not a failed one: what may work when tried again is tried
//! again, with growing, jittered pauses, before the caller hears of it. Every operation may be repeated without
//! harm, so an answer that was lost after the work was done costs nothing.
//!
//! Paths are relative to the folder, with `/` between their parts. The store does not interpret contents.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, WriteMultipart};
use tokio::time::Instant;
use ulmus_storage::{Requests, of_disk};
use ulmus_types::ErrorKind;

/// What a request of a remote store may take.
const REQUEST: Duration = Duration::from_mins(1);
/// How long an operation is begun again.
const RETRY_DEADLINE: Duration = Duration::from_mins(1);
/// Larger files go up in pieces, so that one lost packet does not repeat gigabytes and no store's limit on the
/// size of a single request (5 GiB at the smallest) is met.
const PIECE_BYTES: usize = 16 << 20;
/// Pieces of one file that are under way at the same time.
const PIECES_IN_FLIGHT: usize = 4;
/// Files are hashed while they are read, in pieces that keep a thread of the runtime for half a millisecond.
const READ_BYTES: u64 = 2 << 20;
const READS_IN_FLIGHT: usize = 4;

/// A failed operation on a run folder.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing of this name is there.
    #[error("{path} does not exist in {store}")]
    NotFound {
        /// The path within the store.
        path: String,
        /// The store.
        store: String,
    },
    /// The location cannot be a run folder of this build.
    #[error("{location:?} cannot be used as a run folder: {reason}")]
    Location {
        /// What was given.
        location: String,
        /// Why not, and what to write instead.
        reason: String,
    },
    /// It may not be used.
    #[error(
        "no access to {path} in {store}; look at the credentials in the environment, or in the files of the store's own tools"
    )]
    Denied {
        /// The path within the store.
        path: String,
        /// The store.
        store: String,
        /// The store's own error.
        source: Box<object_store::Error>,
    },
    /// Its disk takes nothing.
    #[error("cannot {act} {path} in {store}: {why}; free space there, or give this user the right to write")]
    Disk {
        /// What was tried.
        act: &'static str,
        /// The path within the store.
        path: String,
        /// The store.
        store: String,
        /// What the system says.
        why: io::ErrorKind,
    },
    /// The store answered with an error, on every attempt if trying again could have helped.
    #[error("cannot {act} {path} in {store}")]
    Operation {
        /// What was tried.
        act: &'static str,
        /// The path within the store.
        path: String,
        /// The store.
        store: String,
        /// The store's own error.
        source: Box<object_store::Error>,
    },
}

impl StoreError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Operation { source, .. } if is_transient(source) => ErrorKind::Retry,
            Self::Disk { .. } => ErrorKind::Disk,
            Self::NotFound { .. } | Self::Location { .. } | Self::Denied { .. } | Self::Operation { .. } => {
                ErrorKind::InvalidInput
            }
        }
    }
}

/// Stores put outages, throttling and time-outs under `Generic`; everything else says the same the next time.
fn is_transient(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::Generic { .. }) && of_disk(error).is_none()
}

fn is_taken(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::AlreadyExists { .. })
}

/// A file in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// Its path, relative to the store.
    pub path: String,
    /// Its length.
    pub bytes: u64,
}

/// A folder of an object store; cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    prefix: Path,
    location: Arc<str>,
    directory: Option<Arc<FilePath>>,
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.location)
    }
}

impl Store {
    /// Opens the existing folder at `location`: a path, a `file://` URL, or a folder of an object store, such as
    /// `s3://bucket/path`, which is not asked for anything yet.
    ///
    /// # Errors
    /// [`StoreError::Location`] when there is no such folder, or no such kind of store in this build.
    pub fn open(location: &str) -> Result<Self, StoreError> {
        if is_remote(location) {
            return Self::remote(location);
        }
        Self::at(location, local_directory(location)?)
    }

    /// Opens the folder at `location` and makes it first if need be.
    ///
    /// # Errors
    /// [`StoreError::Location`] when it cannot be made, or when there is no such kind of store in this build.
    pub fn create(location: &str) -> Result<Self, StoreError> {
        if is_remote(location) {
            return Self::remote(location);
        }
        let directory = local_directory(location)?;
        std::fs::create_dir_all(&directory).map_err(|error| StoreError::Location {
            location: location.to_owned(),
            reason: error.to_string(),
        })?;
        Self::at(location, directory)
    }

    fn remote(location: &str) -> Result<Self, StoreError> {
        let requests = Requests { timeout: REQUEST };
        let opened = ulmus_storage::open(location, requests, &Arc::default());
        let (objects, prefix) =
            opened.map_err(|reason| StoreError::Location { location: location.to_owned(), reason })?;
        Ok(Self::from_objects(objects, prefix, location))
    }

    fn at(location: &str, directory: PathBuf) -> Result<Self, StoreError> {
        let refuse = |reason: String| StoreError::Location { location: location.to_owned(), reason };
        let metadata = std::fs::metadata(&directory)
            .map_err(|error| refuse(format!("{error}; is the folder shared with this machine?")))?;
        if !metadata.is_dir() {
            return Err(refuse("it is a file; name a folder".to_owned()));
        }
        let objects =
            LocalFileSystem::new_with_prefix(&directory).map_err(|error| refuse(error.to_string()))?;
        Ok(Self {
            // Without fsync a checkpoint could be committed and lose its parts with the machine's power.
            objects: Arc::new(objects.with_fsync(true)),
            prefix: Path::default(),
            location: location.into(),
            directory: Some(directory.into()),
        })
    }

    /// A folder of any object store. `location` names the store in messages.
    pub fn from_objects(objects: Arc<dyn ObjectStore>, prefix: Path, location: &str) -> Self {
        Self { objects, prefix, location: location.into(), directory: None }
    }

    /// The folder `path` of this store, which need not exist yet.
    #[must_use]
    pub fn folder(&self, path: &str) -> Self {
        Self {
            objects: Arc::clone(&self.objects),
            prefix: self.resolve(path),
            location: format!("{}/{path}", self.location).into(),
            directory: self.directory.as_deref().map(|directory| directory.join(path).into()),
        }
    }

    /// Where the store is, as it was given.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// The folder on this machine's disk, where the store is one; for what needs a real file, such as a database.
    pub fn directory(&self) -> Option<&FilePath> {
        self.directory.as_deref()
    }

    /// The object store and the prefix within it, for readers that bring their own access pattern.
    pub fn objects(&self) -> (Arc<dyn ObjectStore>, Path) {
        (Arc::clone(&self.objects), self.prefix.clone())
    }

    /// Writes a whole file and replaces what was there. Readers see the old or the new contents, never a part.
    ///
    /// # Errors
    /// When the store refuses, or is out of order for longer than a minute.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the old or the new contents.
    pub async fn put(&self, path: &str, contents: impl Into<Bytes>) -> Result<(), StoreError> {
        let contents = contents.into();
        let target = self.resolve(path);
        self.attempt("write", path, || self.put_once(&target, contents.clone())).await
    }

    /// Writes a whole file unless there is one of this name; answers whether it wrote it.
    ///
    /// # Errors
    /// As [`Store::put`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves the file absent or whole.
    pub async fn put_new(&self, path: &str, contents: impl Into<Bytes>) -> Result<bool, StoreError> {
        let contents = contents.into();
        let target = self.resolve(path);
        let written = self
            .attempt("write", path, || async {
                self.objects.put_opts(&target, contents.clone().into(), PutMode::Create.into()).await
            })
            .await;
        match written {
            Ok(_) => Ok(true),
            Err(StoreError::Operation { source, .. }) if is_taken(&source) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn put_once(&self, target: &Path, contents: Bytes) -> object_store::Result<()> {
        if contents.len() <= PIECE_BYTES {
            return self.objects.put(target, contents.into()).await.map(drop);
        }
        let upload = self.objects.put_multipart(target).await?;
        let mut pieces = WriteMultipart::new_with_chunk_size(upload, PIECE_BYTES);
        for start in (0..contents.len()).step_by(PIECE_BYTES) {
            if let Err(error) = pieces.wait_for_capacity(PIECES_IN_FLIGHT).await {
                // Best effort: what is left may be paid for until a rule of the bucket drops it.
                drop(pieces.abort().await);
                return Err(error);
            }
            pieces.put(contents.slice(start..contents.len().min(start + PIECE_BYTES)));
        }
        match pieces.finish().await {
            // The answer to the request that ended the upload was lost, and when asked again, the store knows of none. What
            // is there tells whether that is so.
            Err(lost @ object_store::Error::NotFound { .. }) => match self.objects.head(target).await {
                Ok(found) if found.size == contents.len() as u64 => Ok(()),
                _ => Err(object_store::Error::Generic { store: "upload", source: Box::new(lost) }),
            },
            finished => finished.map(drop),
        }
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or when the store refuses or is out of order.
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        let target = self.resolve(path);
        let read = || async {
            let found = self.objects.get(&target).await?;
            let size = found.meta.size;
            // What is small comes as it is at one moment.
            Ok(if size <= READ_BYTES { Ok(found.bytes().await?) } else { Err(size) })
        };
        match self.attempt("read", path, read).await? {
            Ok(bytes) => Ok(bytes),
            Err(size) => {
                let mut whole = Vec::with_capacity(size as usize);
                self.read_pieces(path, |piece| whole.extend_from_slice(piece)).await?;
                Ok(whole.into())
            }
        }
    }

    /// Gives a file to `take`, piece by piece and in order, while the next ones are under way.
    pub(crate) async fn read_pieces(
        &self,
        path: &str,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), StoreError> {
        let target = self.resolve(path);
        let size = self.attempt("read", path, || self.objects.head(&target)).await?.size;
        let pieces = (0..size).step_by(READ_BYTES as usize).map(|start| {
            let range = start..size.min(start + READ_BYTES);
            let target = &target;
            self.attempt("read", path, move || self.objects.get_range(target, range.clone()))
        });
        let mut pieces = futures::stream::iter(pieces).buffered(READS_IN_FLIGHT);
        while let Some(piece) = pieces.next().await {
            take(&piece?);
        }
        Ok(())
    }

    /// All files below the folder `path`, at any depth, in the order of their paths.
    ///
    /// # Errors
    /// When the store refuses or is out of order. A folder that does not exist has no files.
    pub async fn list(&self, path: &str) -> Result<Vec<StoredFile>, StoreError> {
        let target = self.resolve(path);
        let found: Vec<_> =
            self.attempt("list", path, || self.objects.list(Some(&target)).try_collect::<Vec<_>>()).await?;
        let mut files: Vec<_> = found
            .into_iter()
            .map(|object| StoredFile { path: self.relative(&object.location), bytes: object.size })
            .collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    /// The names of the folders directly in the folder `path`, sorted.
    ///
    /// # Errors
    /// As [`Store::list`].
    pub async fn list_folders(&self, path: &str) -> Result<Vec<String>, StoreError> {
        let target = self.resolve(path);
        let found = self.attempt("list", path, || self.objects.list_with_delimiter(Some(&target))).await?;
        let mut names: Vec<_> =
            found.common_prefixes.iter().filter_map(|folder| folder.filename()).map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// Deletes a file; one that does not exist is deleted already.
    ///
    /// # Errors
    /// When the store refuses or is out of order.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let target = self.resolve(path);
        match self.attempt("delete", path, || self.objects.delete(&target)).await {
            Err(StoreError::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// Whether there is a file of this name.
    ///
    /// # Errors
    /// When the store refuses or is out of order.
    pub async fn exists(&self, path: &str) -> Result<bool, StoreError> {
        let target = self.resolve(path);
        match self.attempt("look up", path, || self.objects.head(&target)).await {
            Ok(_) => Ok(true),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn resolve(&self, path: &str) -> Path {
        self.prefix.parts().chain(Path::from(path).parts()).collect()
    }

    fn relative(&self, path: &Path) -> String {
        match path.prefix_match(&self.prefix) {
            Some(parts) => parts.collect::<Path>().to_string(),
            None => path.to_string(),
        }
    }

    async fn attempt<T, F, R>(&self, act: &'static str, path: &str, operation: F) -> Result<T, StoreError>
    where
        F: FnMut() -> R,
        R: Future<Output = object_store::Result<T>>,
    {
        // 0.1, 0.2, ... 6.4 s, each up to doubled by chance so that many workers do not return in step.
        let pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(10))
            .with_max_times(7)
            .with_jitter();
        let begun = Instant::now();
        operation
            .retry(pauses)
            .when(|error| is_transient(error) && begun.elapsed() < RETRY_DEADLINE)
            .notify(|error, pause| tracing::debug!(%error, ?pause, act, path, "store unavailable, retrying"))
            .await
            .map_err(|source| match source {
                source if let Some(why) = of_disk(&source).map(io::Error::kind) => {
                    StoreError::Disk { act, path: path.to_owned(), store: self.location.to_string(), why }
                }
                object_store::Error::NotFound { .. } if act == "write" => StoreError::Location {
                    location: self.location.to_string(),
                    reason: "there is no such bucket or container; make it, or correct the name".to_owned(),
                },
                object_store::Error::NotFound { .. } => {
                    StoreError::NotFound { path: path.to_owned(), store: self.location.to_string() }
                }
                source @ (object_store::Error::PermissionDenied { .. }
                | object_store::Error::Unauthenticated { .. }) => StoreError::Denied {
                    path: path.to_owned(),
                    store: self.location.to_string(),
                    source: source.into(),
                },
                source => StoreError::Operation {
                    act,
                    path: path.to_owned(),
                    store: self.location.to_string(),
                    source: source.into(),
                },
            })
    }
}

/// Whether `location` is in an object store that runs can be kept in.
fn is_remote(location: &str) -> bool {
    let scheme = location.split_once("://").map_or("", |(scheme, _)| scheme);
    matches!(scheme, "s3" | "s3a" | "gs" | "az" | "abfs" | "abfss")
}

/// The absolute directory that `location` names.
fn local_directory(location: &str) -> Result<PathBuf, StoreError> {
    let refuse = |reason: String| StoreError::Location { location: location.to_owned(), reason };
    let path = if let Some((scheme, _)) = location.split_once("://") {
        if scheme != "file" {
            let rule = "write a path, file://, s3://, gs:// or az://";
            return Err(refuse(format!("no run can be kept behind {scheme}://; {rule}")));
        }
        let url = url::Url::parse(location).map_err(|error| refuse(error.to_string()))?;
        url.to_file_path().map_err(|()| refuse("a file:// URL has an absolute path".to_owned()))?
    } else if location.is_empty() {
        return Err(refuse("it is empty; write a path, file://, s3://, gs:// or az://".to_owned()));
    } else {
        PathBuf::from(location)
    };
    std::path::absolute(path).map_err(|error| refuse(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_are_written_listed_and_deleted_in_their_folder() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::create(home.path().join("runs/a b").to_str().unwrap()).unwrap();
        let shards = store.folder("shards");
        shards.put("x/1.bin", vec![1, 2, 3]).await.unwrap();
        let large: Vec<u8> = (0..PIECE_BYTES * 2 + 5).map(|at| (at / 1000) as u8).collect();
        shards.put("x/0.bin", large.clone()).await.unwrap();

        let files = store.list("shards").await.unwrap();
        let found: Vec<_> = files.iter().map(|file| (file.path.as_str(), file.bytes)).collect();
        assert_eq!(found, [("shards/x/0.bin", PIECE_BYTES as u64 * 2 + 5), ("shards/x/1.bin", 3)]);
        assert_eq!(shards.list("").await.unwrap()[1].path, "x/1.bin");
        assert_eq!(store.list_folders("").await.unwrap(), ["shards"]);
        assert_eq!(&store.get("shards/x/1.bin").await.unwrap()[..], [1, 2, 3]);
        assert!(store.get("shards/x/0.bin").await.unwrap() == large);
        assert!(shards.directory().unwrap().join("x/1.bin").is_file());

        assert!(!shards.put_new("x/1.bin", vec![9]).await.unwrap());
        assert!(shards.put_new("x/2.bin", vec![9]).await.unwrap());
        assert!(shards.exists("x/1.bin").await.unwrap());
        shards.delete("x/1.bin").await.unwrap();
        shards.delete("x/1.bin").await.unwrap();
        assert!(!shards.exists("x/1.bin").await.unwrap());
        let error = shards.get("x/1.bin").await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
        assert!(store.list("nothing").await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_url_and_its_path_are_the_same_store() {
        let home = tempfile::tempdir().unwrap();
        let url = url::Url::from_directory_path(home.path()).unwrap();
        Store::open(url.as_str()).unwrap().put("a", "1").await.unwrap();
        let store = Store::open(home.path().to_str().unwrap()).unwrap();
        assert_eq!(store.get("a").await.unwrap(), "1");
    }

    #[test]
    fn what_is_no_folder_is_refused_with_the_reason() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("file");
        std::fs::write(&file, "x").unwrap();
        for (location, reason) in [
            ("https://host/run", "no run can be kept behind https://"),
            ("", "empty"),
            ("file:relative", "shared with this machine"),
            ("/nowhere/at/all", "shared with this machine"),
            (file.to_str().unwrap(), "is a file"),
        ] {
            let error = Store::open(location).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(reason), "{error}");
        }
        assert!(Store::create(file.join("below").to_str().unwrap()).is_err());
    }
}
