//! Folders of files behind one address form: a path, `file://`, `http(s)://`, or `run:` for the run's own folder.
//!
//! Calls block, and are for plain threads: they must not be made from async code. The I/O itself runs on one
//! small runtime for the whole process, so that pooled connections live as long as the process does.
//!
//! HTTP servers have no listing: files below `http(s)://` are named, or counted by a pattern with `{:05}`.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::error::DataError;

static IO: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("ulmus-data-io")
        .enable_all()
        .build()
        .expect("a thread for reading can be started")
});

/// A folder in a store.
#[derive(Clone)]
pub struct Folder {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    /// For messages.
    url: String,
    can_list: bool,
    /// Whether files are told apart by the store's version mark. Not in a run's own folder: its files are written
    /// once, and a copy of the folder on another disk is the same run.
    has_versions: bool,
}

/// What a store knows of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileInfo {
    /// Path below the folder.
    pub(crate) path: String,
    /// Size in bytes.
    pub(crate) size: u64,
    /// The store's mark for these contents, where it gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<String>,
}

impl fmt::Debug for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Folder({})", self.url)
    }
}

impl Folder {
    /// The folder `prefix` of a run's own store.
    pub fn of_run(store: Arc<dyn ObjectStore>, prefix: &str) -> Self {
        Self {
            store,
            prefix: Path::from(prefix),
            url: "run:".to_owned(),
            can_list: true,
            has_versions: false,
        }
    }

    /// Opens the folder that `url` names; `run` is the run's own folder, for `run:…`.
    ///
    /// # Errors
    /// When the address has an unknown form, or is no folder.
    pub fn open(url: &str, run: Option<&Self>) -> Result<Self, DataError> {
        let refuse = |reason: String| DataError::Url { url: url.to_owned(), reason };
        if let Some(path) = url.strip_prefix("run:") {
            let run = run.ok_or_else(|| refuse("there is no run folder here; write a path".to_owned()))?;
            return Ok(run.child(path));
        }
        let path = match url.split_once("://") {
            None => url.to_owned(),
            Some(("file", path)) => path.to_owned(),
            Some(("http" | "https", _)) => return open_http(url),
            Some((scheme, _)) => {
                return Err(refuse(format!(
                    "{scheme}:// is not known; write a path, file://, http://, https:// or run:"
                )));
            }
        };
        let path = std::path::absolute(&path).map_err(|error| refuse(error.to_string()))?;
        if !path.is_dir() {
            return Err(refuse(format!(
                "{} is not a folder on this machine; correct the path",
                path.display()
            )));
        }
        let store = LocalFileSystem::new_with_prefix(&path).map_err(|error| refuse(error.to_string()))?;
        Ok(Self {
            store: Arc::new(store),
            prefix: Path::default(),
            url: url.to_owned(),
            can_list: true,
            has_versions: true,
        })
    }

    /// A folder below this one.
    #[must_use]
    pub fn child(&self, path: &str) -> Self {
        let prefix = self.prefix.parts().chain(Path::from(path).parts()).collect();
        let separator = if self.url.ends_with([':', '/']) { "" } else { "/" };
        Self { prefix, url: format!("{}{separator}{path}", self.url), ..self.clone() }
    }

    /// Whether [`Self::list`] works.
    pub(crate) const fn can_list(&self) -> bool {
        self.can_list
    }

    /// The address, for messages.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Where a file lies, for messages.
    pub(crate) fn place(&self, path: &str) -> String {
        let separator = if self.url.ends_with([':', '/']) { "" } else { "/" };
        format!("{}{separator}{path}", self.url)
    }

    /// All files below the folder, sorted by path.
    pub(crate) fn list(&self) -> Result<Vec<FileInfo>, DataError> {
        let prefix = (!self.prefix.as_ref().is_empty()).then_some(&self.prefix);
        let found: Vec<ObjectMeta> =
            IO.block_on(self.store.list(prefix).try_collect()).map_err(|error| self.error("", &error))?;
        let mut files: Vec<FileInfo> = found
            .iter()
            .filter_map(|meta| {
                let rest = meta.location.prefix_match(&self.prefix)?;
                let path = rest.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
                Some(self.info(path, meta))
            })
            .collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    /// Size and version of the files at `paths`, in their order.
    pub(crate) fn stat(&self, paths: Vec<String>) -> Result<Vec<FileInfo>, DataError> {
        let head = async |path: String| {
            let meta = self.store.head(&self.at(&path)).await.map_err(|error| self.error(&path, &error))?;
            Ok(self.info(path, &meta))
        };
        IO.block_on(futures::stream::iter(paths).map(head).buffered(16).try_collect())
    }

    /// The bytes of `range` of a file, which must still be the one that `file` describes.
    pub(crate) fn read_range(&self, file: &FileInfo, range: Range<u64>) -> Result<Bytes, DataError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let length = range.end - range.start;
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let read = async {
            let result = self.store.get_opts(&self.at(&file.path), options).await?;
            let now = self.info(file.path.clone(), &result.meta);
            Ok((now, result.bytes().await?))
        };
        let (now, bytes) = IO.block_on(read).map_err(|error| self.error(&file.path, &error))?;
        self.compare(file, &now)?;
        if bytes.len() as u64 != length {
            return Err(DataError::Damaged {
                file: self.place(&file.path),
                reason: format!("{length} bytes were asked for, {} came", bytes.len()),
            });
        }
        Ok(bytes)
    }

    /// The whole file, which must still be the one that `file` describes.
    pub(crate) fn read_all(&self, file: &FileInfo) -> Result<Bytes, DataError> {
        self.read_range(file, 0..file.size)
    }

    /// Writes a file whole.
    pub(crate) fn write(&self, path: &str, bytes: Vec<u8>) -> Result<(), DataError> {
        IO.block_on(self.store.put(&self.at(path), bytes.into()))
            .map_err(|error| self.error(path, &error))?;
        Ok(())
    }

    fn at(&self, path: &str) -> Path {
        self.prefix.parts().chain(Path::from(path).parts()).collect()
    }

    fn info(&self, path: String, meta: &ObjectMeta) -> FileInfo {
        let version = meta.e_tag.clone().unwrap_or_else(|| meta.last_modified.to_rfc3339());
        FileInfo { path, size: meta.size, version: self.has_versions.then_some(version) }
    }

    fn compare(&self, then: &FileInfo, now: &FileInfo) -> Result<(), DataError> {
        let path = &then.path;
        let changed = |what, then: String, now: String| {
            Err(DataError::Changed { file: self.place(path), what, then, now })
        };
        if then.size != now.size {
            return changed("size", then.size.to_string(), now.size.to_string());
        }
        match (&then.version, &now.version) {
            (Some(then), Some(now)) if then != now => changed("version", then.clone(), now.clone()),
            _ => Ok(()),
        }
    }

    fn error(&self, path: &str, error: &object_store::Error) -> DataError {
        let file = self.place(path);
        match error {
            object_store::Error::NotFound { .. } => DataError::Missing { file },
            error => DataError::Store { file, reason: error.to_string() },
        }
    }
}

#[cfg(feature = "http")]
fn open_http(url: &str) -> Result<Folder, DataError> {
    // The first caller decides for the process; later ones find that it has one.
    let _known = rustls::crypto::ring::default_provider().install_default();
    let options = object_store::ClientOptions::new().with_allow_http(true);
    let store = object_store::http::HttpBuilder::new().with_url(url).with_client_options(options).build();
    let store = store.map_err(|error| DataError::Url { url: url.to_owned(), reason: error.to_string() })?;
    Ok(Folder {
        store: Arc::new(store),
        prefix: Path::default(),
        url: url.to_owned(),
        can_list: false,
        has_versions: true,
    })
}

#[cfg(not(feature = "http"))]
fn open_http(url: &str) -> Result<Folder, DataError> {
    let reason =
        "this program was built without the feature `http`; build with it, or write a path".to_owned();
    Err(DataError::Url { url: url.to_owned(), reason })
}

#[cfg(test)]
pub(crate) mod tests {
    use object_store::memory::InMemory;

    use super::*;

    /// An empty folder in memory.
    pub(crate) fn memory() -> Folder {
        Folder::of_run(Arc::new(InMemory::new()), "")
    }

    /// What the folder knows of one file.
    pub(crate) fn stat(folder: &Folder, path: &str) -> FileInfo {
        folder.stat(vec![path.to_owned()]).unwrap().remove(0)
    }

    #[test]
    fn local_files_are_listed_read_and_watched() {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir(place.path().join("b")).unwrap();
        std::fs::write(place.path().join("b/two words.txt"), "two").unwrap();
        std::fs::write(place.path().join("a.txt"), "one").unwrap();
        let folder = Folder::open(place.path().to_str().unwrap(), None).unwrap();
        let files = folder.list().unwrap();
        assert_eq!(
            files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(),
            ["a.txt", "b/two words.txt"]
        );
        assert_eq!(folder.read_all(&files[1]).unwrap(), "two");
        assert_eq!(folder.read_range(&files[0], 1..3).unwrap(), "ne");

        std::fs::write(place.path().join("a.txt"), "longer").unwrap();
        let message = folder.read_all(&files[0]).unwrap_err().to_string();
        assert!(message.contains("a.txt has changed since the run began: size was 3, now 6"), "{message}");
        std::fs::remove_file(place.path().join("a.txt")).unwrap();
        assert!(matches!(folder.read_all(&files[0]), Err(DataError::Missing { .. })));
    }

    #[test]
    fn addresses_that_lead_nowhere_are_refused() {
        for (url, word) in [
            ("/no/such/folder", "not a folder on this machine"),
            ("s3://bucket/x", "s3:// is not known"),
            ("run:shards", "no run folder"),
        ] {
            let message = Folder::open(url, None).unwrap_err().to_string();
            assert!(message.contains(word) && message.contains(url), "{message}");
        }
    }

    #[test]
    fn a_run_folder_has_folders() {
        let run = memory();
        let shards = Folder::open("run:shards", Some(&run)).unwrap();
        shards.write("a.txt", b"x".to_vec()).unwrap();
        assert_eq!(run.list().unwrap()[0].path, "shards/a.txt");
        assert_eq!(shards.list().unwrap()[0], FileInfo { path: "a.txt".to_owned(), size: 1, version: None });
        assert_eq!(shards.place("a.txt"), "run:shards/a.txt");
    }
}
