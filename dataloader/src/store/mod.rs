//! Folders of files behind one address form: a path, `file://`, an object store (`s3://`, `gs://`, `az://`), a
//! dataset on the Hugging Face hub (`hf://datasets/`), a web server (`http(s)://`), or `run:` for the run's own folder.
//!
//! Calls block, and are for plain threads: they must not be made from async code. The I/O itself runs on one
//! small runtime for the whole process, so that pooled connections live as long as the process does.
//!
//! Web servers have no listing: files below `http(s)://` are named, counted by a pattern with `{:05}`, or listed
//! elsewhere (`list` of a source).

mod cache;
#[cfg(feature = "http")]
mod hub;
mod steps;

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart,
};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use ulmus_plan::{DataConfig, SourceConfig};
use ulmus_storage::{Failures, Requests, of_disk};

pub(crate) use self::steps::Steps;

use self::cache::Cache;
use crate::error::DataError;
use crate::glob::FileGlob;
use crate::mirror::RateLimiter;
use crate::walk::{Walked, walk};

/// Most bytes of one request, so that its deadline is one for a known amount.
const PIECE: u64 = 8 << 20;
/// Parts of an upload that S3 takes.
const MOST_PARTS: u64 = 10_000;
/// Requests of one read that are under way at once.
const AT_ONCE: usize = 4;
/// How long an operation is begun again.
const RETRY_DEADLINE: Duration = Duration::from_mins(1);
/// Files that are asked about at once.
const STATS_AT_ONCE: usize = 16;

static IO: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("ulmus-data-io")
        .enable_all()
        .build()
        .expect("a thread for reading can be started")
});

/// What folders are opened with.
#[derive(Debug, Clone)]
pub(crate) struct Stores {
    run: Option<Folder>,
    cache: Option<Arc<Cache>>,
    timeout: Duration,
}

/// A folder in a store.
#[derive(Clone)]
pub struct Folder {
    store: Arc<dyn ObjectStore>,
    /// Where the store is, if it is on this machine and others do not write to it as well.
    root: Option<PathBuf>,
    prefix: Path,
    /// For messages.
    url: String,
    listing: Listing,
    /// Whether files are told apart by the store's version mark. Not in a run's own folder: its files are written
    /// once, and a copy of the folder on another disk is the same run. Nor where an address holds fixed contents.
    has_versions: bool,
    cache: Option<Arc<Cache>>,
    /// Whether what is in the cache is in doubt.
    afresh: bool,
    counters: Arc<Counters>,
}

/// Who knows which files a folder has.
#[derive(Debug, Clone)]
enum Listing {
    /// The store itself.
    Store,
    /// Nobody.
    None,
    #[cfg(feature = "http")]
    Hub(Arc<hub::Hub>),
}

/// What a folder's files have cost so far.
#[derive(Debug, Default)]
struct Counters {
    fetched: AtomicU64,
    cached: AtomicU64,
    failures: Arc<Failures>,
}

/// What reading a source has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Bytes that came from its store.
    pub fetched_bytes: u64,
    /// Bytes that came from the cache on disk instead.
    pub cached_bytes: u64,
    /// Requests that failed, most of which were then made again.
    pub failed_requests: u64,
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

impl Stores {
    /// What a plan says of them; `run` is the run's own folder.
    pub(crate) fn new(config: &DataConfig, run: Option<&Folder>) -> Result<Self, DataError> {
        let cache = config.cache.as_ref().map(|folder| {
            let cache = Cache::open(folder.as_ref(), config.cache_limit.get());
            cache.map(Arc::new).map_err(|error| DataError::Cache { folder: folder.clone(), error })
        });
        Ok(Self { run: run.cloned(), cache: cache.transpose()?, timeout: config.request_timeout })
    }

    /// Opens the folder that `url` names.
    ///
    /// # Errors
    /// When the address has an unknown form, or is no folder.
    pub(crate) fn open(&self, url: &str) -> Result<Folder, DataError> {
        let refuse = |reason: String| DataError::Url { url: url.to_owned(), reason };
        if let Some(path) = url.strip_prefix("run:") {
            let run = self.run.as_ref();
            let run = run.ok_or_else(|| refuse("there is no run folder here; write a path".to_owned()))?;
            return Ok(run.child(path));
        }
        if let Some(path) = on_disk(url).map_err(refuse)? {
            return Folder::local(url, path).map_err(refuse);
        }
        match url.split_once("://").map_or("", |(scheme, _)| scheme) {
            "hf" => open_hub(self, url),
            scheme => {
                let counters = Arc::new(Counters::default());
                let requests = Requests { timeout: self.timeout };
                let opened = ulmus_storage::open(url, requests, &counters.failures);
                let (store, prefix) = opened.map_err(refuse)?;
                let listing = if matches!(scheme, "http" | "https") { Listing::None } else { Listing::Store };
                let cache = self.cache.clone();
                Ok(Folder {
                    store,
                    root: None,
                    prefix,
                    url: url.to_owned(),
                    listing,
                    has_versions: true,
                    cache,
                    afresh: false,
                    counters,
                })
            }
        }
    }
}

#[cfg(feature = "http")]
fn open_hub(stores: &Stores, url: &str) -> Result<Folder, DataError> {
    let counters = Arc::new(Counters::default());
    let opened = IO.block_on(hub::Hub::open(url, stores.timeout, &counters.failures));
    let (hub, store) = opened.map_err(|failed| hub_error(url, failed))?;
    Ok(Folder {
        store,
        root: None,
        prefix: Path::default(),
        url: hub.pinned(),
        listing: Listing::Hub(Arc::new(hub)),
        has_versions: false,
        cache: stores.cache.clone(),
        afresh: false,
        counters,
    })
}

#[cfg(not(feature = "http"))]
fn open_hub(_: &Stores, url: &str) -> Result<Folder, DataError> {
    let reason = "this program was built without the feature `http`; build with it, or write a path";
    Err(DataError::Url { url: url.to_owned(), reason: reason.to_owned() })
}

impl Stores {
    /// As [`Self::make`], but refuses a folder in which something would be read that is written there: a source's own, or one
    /// below it that a glob reaches.
    ///
    /// # Errors
    /// As for [`Self::make`], and when it is such a folder.
    pub(crate) fn make_apart(&self, url: &str, sources: &[SourceConfig]) -> Result<Folder, DataError> {
        let folder = self.make(url)?;
        let real = |url: &str| std::fs::canonicalize(on_disk(url).ok()??).ok();
        let Some(target) = real(url) else { return Ok(folder) };
        let is_read = |source: &&SourceConfig| {
            real(&source.url).is_some_and(|read| {
                let reaches = source.files.iter().any(|file| file.contains("**"));
                target.join(&source.name) == read || reaches && target.starts_with(read)
            })
        };
        match sources.iter().find(is_read) {
            Some(source) => Err(DataError::Target {
                folder: url.to_owned(),
                reason: format!("source {:?} is read from there", source.name),
            }),
            None => Ok(folder),
        }
    }

    /// Opens a folder to write to; one on this machine is made if it is not there.
    ///
    /// # Errors
    /// When the address has an unknown form, or the folder cannot be made.
    pub(crate) fn make(&self, url: &str) -> Result<Folder, DataError> {
        let refuse = |reason: String| DataError::Url { url: url.to_owned(), reason };
        if matches!(url.split_once("://"), Some(("http" | "https" | "hf", _))) {
            return Err(refuse(
                "nothing can be written there; write a path, s3://, gs:// or az://".to_owned(),
            ));
        }
        if let Some(path) = on_disk(url).map_err(refuse)? {
            std::fs::create_dir_all(path).map_err(|error| refuse(error.to_string()))?;
        }
        self.open(url)
    }
}

/// The folder of this machine that an address names, if it names one.
fn on_disk(url: &str) -> Result<Option<PathBuf>, String> {
    match url.split_once("://") {
        None if url.starts_with("run:") => Ok(None),
        None => Ok(Some(url.into())),
        Some(("file", path)) => {
            // Neither can begin anything else in the address of a file.
            let address = format!("file://{}", path.replace('#', "%23").replace('?', "%3F"));
            let address = url::Url::parse(&address).map_err(|error| error.to_string())?;
            let path =
                address.to_file_path().map_err(|()| "a file:// address has an absolute path".to_owned())?;
            Ok(Some(path))
        }
        Some(_) => Ok(None),
    }
}

/// Paths of the files below a folder of this machine that are wanted, sorted, with `/` between their parts. Hidden ones
/// are passed by, and so are links that lead upwards, or to what is in the folder anyway.
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
    // A store on disk writes to names like this first.
    let last = file.name.rsplit('/').next().unwrap_or_default();
    let is_unfinished =
        |(_, number): (&str, &str)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    if last.split_once('#').is_some_and(is_unfinished) {
        return Err("names that end in # and a number are those of files that are being written".to_owned());
    }
    Path::parse(&file.name).map(drop).map_err(|error| told(&error))
}

/// What is wrong with a path.
fn told(error: &object_store::path::Error) -> String {
    match error {
        object_store::path::Error::EmptySegment { .. } => "a part of its path is empty".to_owned(),
        object_store::path::Error::BadSegment { source, .. } => {
            format!("its path cannot be asked for: {source}")
        }
        error => error.to_string(),
    }
}

/// Waits for what the runtime of this module does.
pub(crate) fn wait_for<T>(operation: impl Future<Output = T>) -> T {
    IO.block_on(operation)
}

impl Folder {
    /// The folder `prefix` of a run's own store.
    pub fn of_run(store: Arc<dyn ObjectStore>, prefix: Path) -> Self {
        Self {
            store,
            root: None,
            prefix,
            url: "run:".to_owned(),
            listing: Listing::Store,
            has_versions: false,
            cache: None,
            afresh: false,
            counters: Arc::default(),
        }
    }

    /// The folder of a run, on a disk or in an object store; `None` if it is on a disk and not there.
    ///
    /// # Errors
    /// When the address has an unknown form.
    pub fn find_run(url: &str) -> Result<Option<Self>, DataError> {
        let path = on_disk(url).map_err(|reason| DataError::Url { url: url.to_owned(), reason })?;
        if path.is_some_and(|path| !path.is_dir()) {
            return Ok(None);
        }
        let folder = Stores::new(&DataConfig::default(), None)?.open(url)?;
        Ok(Some(Self { url: "run:".to_owned(), has_versions: false, ..folder }))
    }

    /// A whole file; `None` if it is not there.
    ///
    /// # Errors
    /// When the store does not give it.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>, DataError> {
        match self.stat(vec![path.to_owned()]) {
            Ok(found) => self.read_all(&found[0]).map(|bytes| Some(bytes.into())),
            Err(DataError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Paths of all files below the folder, sorted.
    ///
    /// # Errors
    /// When the store does not list them.
    pub fn paths(&self) -> Result<Vec<String>, DataError> {
        Ok(self.list()?.into_iter().map(|file| file.path).collect())
    }

    fn local(url: &str, path: PathBuf) -> Result<Self, String> {
        let path = std::path::absolute(path).map_err(|error| error.to_string())?;
        if !path.is_dir() {
            return Err(format!("{} is not a folder on this machine; correct the path", path.display()));
        }
        let store = LocalFileSystem::new_with_prefix(&path).map_err(|error| error.to_string())?;
        Ok(Self {
            store: Arc::new(store),
            root: Some(path),
            prefix: Path::default(),
            url: url.to_owned(),
            listing: Listing::Store,
            has_versions: true,
            cache: None,
            afresh: false,
            counters: Arc::default(),
        })
    }

    /// A folder below this one.
    #[must_use]
    pub fn child(&self, path: &str) -> Self {
        let prefix = self.prefix.parts().chain(parsed(path).parts()).collect();
        Self { prefix, url: self.place(path), ..self.clone() }
    }

    /// The same folder, whose cache is written and not read.
    pub(crate) fn afresh(&self) -> Self {
        Self { afresh: true, ..self.clone() }
    }

    /// Whether it is a folder of this machine, named by its path.
    pub(crate) const fn is_on_disk(&self) -> bool {
        self.root.is_some()
    }

    /// Whether [`Self::list`] works.
    pub(crate) const fn can_list(&self) -> bool {
        !matches!(self.listing, Listing::None)
    }

    /// The address, for messages.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// An address of the files as they are now, where the one that was opened may have others later.
    pub(crate) fn pinned(&self) -> Option<&str> {
        match self.listing {
            Listing::Store | Listing::None => None,
            #[cfg(feature = "http")]
            Listing::Hub(_) => Some(&self.url),
        }
    }

    /// What reading has cost.
    pub(crate) fn traffic(&self) -> Traffic {
        let Counters { fetched, cached, failures } = &*self.counters;
        Traffic {
            fetched_bytes: fetched.load(Ordering::Relaxed),
            cached_bytes: cached.load(Ordering::Relaxed),
            failed_requests: failures.failed_requests(),
        }
    }

    /// Where a file lies, for messages.
    pub(crate) fn place(&self, path: &str) -> String {
        let separator = if self.url.ends_with([':', '/']) { "" } else { "/" };
        format!("{}{separator}{path}", self.url)
    }

    /// All files below the folder that can be asked for, sorted by path.
    pub(crate) fn list(&self) -> Result<Vec<FileInfo>, DataError> {
        if self.root.is_some() {
            let walked = self.walk(true)?.into_iter().filter(|file| askable(file).is_ok());
            let mut paths: Vec<String> = walked.map(|file| file.name).collect();
            paths.sort();
            return self.stat(paths);
        }
        let mut files = match &self.listing {
            #[cfg(feature = "http")]
            Listing::Hub(hub) => IO.block_on(hub.list()).map_err(|failed| hub_error(&self.url, failed))?,
            Listing::Store | Listing::None => self.list_store()?,
        };
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    /// The files below the folder that each of some patterns names, sorted by path.
    ///
    /// # Errors
    /// When the folder cannot be listed, or a pattern names a file that cannot be asked for.
    pub(crate) fn find(&self, globs: &[FileGlob]) -> Result<Vec<Vec<FileInfo>>, DataError> {
        let refuse = |path: &str, reason| DataError::Name { file: self.place(path), reason };
        if self.root.is_none() {
            let listed = self.list()?;
            let names = |path: &str| globs.iter().any(|glob| glob.matches(path));
            let below = format!("{}/", self.prefix);
            for name in self.counters.failures.odd_names() {
                let path = if below == "/" { Some(name.as_str()) } else { name.strip_prefix(&below) };
                if let Some(path) = path.filter(|path| names(path)) {
                    return Err(refuse(path, "its path cannot be asked for".to_owned()));
                }
            }
            let found =
                |glob: &FileGlob| listed.iter().filter(|file| glob.matches(&file.path)).cloned().collect();
            return Ok(globs.iter().map(found).collect());
        }
        let walked = self.walk(globs.iter().any(FileGlob::names_hidden))?;
        let again: BTreeSet<&str> =
            walked.iter().filter(|file| file.is_again).map(|file| file.name.as_str()).collect();
        // What is read under its own name is not read again, unless that is asked for.
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

    /// What lies below the folder, where it is on this machine.
    fn walk(&self, enters_hidden: bool) -> Result<Vec<Walked>, DataError> {
        let folder = self.root.iter().map(|root| root.join(self.prefix.as_ref())).collect::<PathBuf>();
        match walk(&folder, enters_hidden) {
            Ok(walk) => Ok(walk.files),
            Err((_, error)) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err((folder, error)) => Err(of_walk(&folder, &error)),
        }
    }

    fn list_store(&self) -> Result<Vec<FileInfo>, DataError> {
        let prefix = (!self.prefix.as_ref().is_empty()).then_some(&self.prefix);
        let list = || self.store.list(prefix).try_collect();
        let found: Vec<ObjectMeta> = IO.block_on(retried(list)).map_err(|error| self.error("", &error))?;
        let below = found.iter().filter_map(|meta| {
            let rest = meta.location.prefix_match(&self.prefix)?;
            let path = rest.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
            Some(self.info(path, meta))
        });
        Ok(below.collect())
    }

    /// Size and version of the files at `paths`, in their order.
    pub(crate) fn stat(&self, paths: Vec<String>) -> Result<Vec<FileInfo>, DataError> {
        for path in &paths {
            let refuse = |error| DataError::Name { file: self.place(path), reason: told(&error) };
            Path::parse(path).map_err(refuse)?;
        }
        #[cfg(feature = "http")]
        if let Listing::Hub(_) = self.listing {
            // One listing instead of a request for each file.
            let all = self.list()?;
            let find = |path: String| match all.binary_search_by(|file| file.path.cmp(&path)) {
                Ok(found) => Ok(all[found].clone()),
                Err(_) => Err(DataError::Missing { file: self.place(&path) }),
            };
            return paths.into_iter().map(find).collect();
        }
        let heads = futures::stream::iter(paths).map(|path| self.head(path));
        IO.block_on(heads.buffered(STATS_AT_ONCE).try_collect())
    }

    /// Size and version of a file.
    pub(crate) async fn head(&self, path: String) -> Result<FileInfo, DataError> {
        let at = self.at(&path);
        let meta = match retried(|| self.store.head(&at)).await {
            // Some web servers know of no HEAD. The size of a file is told with any part of it, too.
            Err(error) if status(&error) == Some(405) => {
                let options = GetOptions { range: Some(GetRange::Bounded(0..1)), ..GetOptions::default() };
                retried(|| self.store.get_opts(&at, options.clone())).await.map(|begin| begin.meta)
            }
            meta => meta,
        };
        Ok(self.info(path.clone(), &meta.map_err(|error| self.error(&path, &error))?))
    }

    /// Whether a file is there, and the one that was described.
    pub(crate) async fn is_still(&self, file: &FileInfo) -> Result<bool, DataError> {
        match self.head(file.path.clone()).await {
            Ok(now) => Ok(self.compare(file, &now).is_ok()),
            Err(DataError::Missing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The bytes of `range` of a file, which must still be the one that `file` describes.
    pub(crate) fn read_range(&self, file: &FileInfo, range: Range<u64>) -> Result<Bytes, DataError> {
        self.start_reading(file, range).wait()
    }

    /// The whole file, which must still be the one that `file` describes.
    pub(crate) fn read_all(&self, file: &FileInfo) -> Result<Bytes, DataError> {
        self.read_range(file, 0..file.size)
    }

    /// Begins to read a range.
    pub(crate) fn start_reading(&self, file: &FileInfo, range: Range<u64>) -> Reading {
        if range.is_empty() {
            return Reading::Here(Bytes::new());
        }
        let (folder, file) = (self.clone(), file.clone());
        let Some(cache) = self.cache.clone() else {
            return Reading::Under(IO.spawn(async move { folder.fetch(&file, range).await }));
        };
        if !self.afresh
            && let Some(bytes) = cache.get(&self.url, &file, &range)
        {
            self.counters.cached.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            return Reading::Here(bytes);
        }
        Reading::Under(IO.spawn(async move {
            let bytes = folder.fetch(&file, range.clone()).await?;
            let kept = bytes.clone();
            tokio::task::spawn_blocking(move || cache.put(&folder.url, &file, &range, &kept));
            Ok(bytes)
        }))
    }

    /// Reads a range in pieces, several at once.
    pub(crate) async fn fetch(&self, file: &FileInfo, range: Range<u64>) -> Result<Bytes, DataError> {
        let mut pieces = futures::stream::iter(in_pieces(range.clone()))
            .map(|piece| self.piece(file, piece))
            .buffered(AT_ONCE);
        let first = pieces.try_next().await?.unwrap_or_default();
        if first.len() as u64 == range.end - range.start {
            return Ok(first);
        }
        let mut whole = Vec::with_capacity((range.end - range.start) as usize);
        whole.extend_from_slice(&first);
        while let Some(piece) = pieces.try_next().await? {
            whole.extend_from_slice(&piece);
        }
        Ok(whole.into())
    }

    async fn piece(&self, file: &FileInfo, range: Range<u64>) -> Result<Bytes, DataError> {
        let length = range.end - range.start;
        let at = self.at(&file.path);
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let read = async || {
            let result = self.store.get_opts(&at, options.clone()).await?;
            let now = self.info(file.path.clone(), &result.meta);
            Ok((now, result.bytes().await?))
        };
        let (now, bytes) = retried(read).await.map_err(|error| self.error(&file.path, &error))?;
        self.compare(file, &now)?;
        if bytes.len() as u64 != length {
            return Err(DataError::Damaged {
                file: self.place(&file.path),
                reason: format!("{length} bytes were asked for, {} came", bytes.len()),
            });
        }
        self.counters.fetched.fetch_add(length, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Writes a file whole.
    pub(crate) fn write(&self, path: &str, bytes: Vec<u8>) -> Result<(), DataError> {
        IO.block_on(self.put(path, bytes))
    }

    /// Writes a file whole.
    pub(crate) async fn put(&self, path: &str, bytes: Vec<u8>) -> Result<(), DataError> {
        let (at, bytes) = (self.at(path), PutPayload::from(bytes));
        self.remove_left_over(&at);
        let put = || self.store.put(&at, bytes.clone());
        retried(put).await.map_err(|error| self.error(path, &error))?;
        Ok(())
    }

    /// Copies a file to the same path of another folder, reads the copy back, and gives the hash of both.
    pub(crate) async fn copy(
        &self,
        file: &FileInfo,
        to: &Self,
        limiter: &RateLimiter,
        done: impl Fn(u64),
    ) -> Result<String, DataError> {
        let failed = |error: object_store::Error| to.error(&file.path, &error);
        let mut hasher = blake3::Hasher::new();
        let mut pieces = futures::stream::iter(in_pieces(0..file.size))
            .map(async |piece| {
                limiter.acquire(piece.end - piece.start).await;
                self.fetch(file, piece).await
            })
            .buffered(AT_ONCE);
        if file.size <= PIECE {
            let bytes = pieces.try_next().await?.unwrap_or_default();
            hasher.update(&bytes);
            done(bytes.len() as u64);
            to.put(&file.path, bytes.into()).await?;
        } else {
            to.remove_left_over(&to.at(&file.path));
            let upload = to.store.put_multipart(&to.at(&file.path)).await.map_err(failed)?;
            // Stores take so many parts of an upload, and no more.
            let part = PIECE.max(file.size.div_ceil(MOST_PARTS));
            let mut upload = WriteMultipart::new_with_chunk_size(upload, part as usize);
            let copied = async {
                while let Some(bytes) = pieces.try_next().await? {
                    upload.wait_for_capacity(AT_ONCE).await.map_err(failed)?;
                    hasher.update(&bytes);
                    done(bytes.len() as u64);
                    upload.put(bytes);
                }
                Ok(())
            };
            if let Err(error) = copied.await {
                // What is left of it would be paid for. When that fails too, the first error is the one to tell.
                let _left_over = upload.abort().await;
                return Err(error);
            }
            match upload.finish().await {
                // The answer to a request that ended the upload was lost, and when asked again, the store knows of none. What
                // is read back tells whether that is so.
                Ok(_) | Err(object_store::Error::NotFound { .. }) => (),
                Err(error) => return Err(failed(error)),
            }
        }
        let read = hasher.finalize();
        let mut written = blake3::Hasher::new();
        let copy = FileInfo { version: None, ..file.clone() };
        let mut pieces = futures::stream::iter(in_pieces(0..file.size))
            .map(|piece| to.fetch(&copy, piece))
            .buffered(AT_ONCE);
        while let Some(bytes) = pieces.try_next().await? {
            written.update(&bytes);
        }
        if written.finalize() != read {
            return Err(DataError::Damaged {
                file: to.place(&file.path),
                reason: format!("it is another than {}, of which it is a copy", self.place(&file.path)),
            });
        }
        Ok(read.to_hex().to_string())
    }

    /// Removes what a program that was killed has left of a file: a store on disk writes to `name#1` beside it, or the
    /// next that is free.
    fn remove_left_over(&self, at: &Path) {
        let Some(root) = &self.root else { return };
        let beside = |number: u32| root.join(format!("{at}#{number}"));
        let mut number = 1;
        while std::fs::remove_file(beside(number)).is_ok() {
            number += 1;
        }
    }

    fn at(&self, path: &str) -> Path {
        self.prefix.parts().chain(parsed(path).parts()).collect()
    }

    fn info(&self, path: String, meta: &ObjectMeta) -> FileInfo {
        let version = meta.e_tag.clone().unwrap_or_else(|| meta.last_modified.to_rfc3339());
        FileInfo { path, size: meta.size, version: self.has_versions.then_some(version) }
    }

    /// What tells a version from another: an entity tag without its quotes, which some stores leave out of listings, and of a
    /// file of this machine without the number that a copy of it does not keep.
    fn mark<'a>(&self, version: &'a str) -> &'a str {
        let bare = version.trim_matches('"');
        match bare.split_once('-') {
            Some((_inode, time_and_size)) if self.root.is_some() => time_and_size,
            _ => bare,
        }
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
            (Some(then), Some(now)) if self.mark(then) != self.mark(now) => {
                changed("version", then.clone(), now.clone())
            }
            _ => Ok(()),
        }
    }

    fn error(&self, path: &str, error: &object_store::Error) -> DataError {
        let file = self.place(path);
        match error {
            object_store::Error::NotFound { .. } => DataError::Missing { file },
            object_store::Error::InvalidPath { source } => DataError::Name { file, reason: told(source) },
            error if let Some(io) = of_disk(error) => DataError::Disk { file, reason: io.to_string() },
            error if lacks_ranges(error) => DataError::NoRanges { file },
            error if is_final(error) => DataError::Refused { file, reason: error.to_string() },
            error => DataError::Store { file, reason: error.to_string() },
        }
    }
}

/// A range in pieces.
fn in_pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let starts = (range.start..range.end).step_by(PIECE as usize);
    starts.map(move |start| start..(start + PIECE).min(range.end))
}

/// Makes an operation again that failed for a reason that may pass. Single requests are made again below
/// (`ulmus_storage::wire_retries`); here that is for answers that begin well and then break off.
async fn retried<T, F: Future<Output = object_store::Result<T>>>(
    operation: impl FnMut() -> F,
) -> object_store::Result<T> {
    let backoff = ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(15))
        .with_max_times(20);
    let begun = Instant::now();
    let worth_it = |error: &object_store::Error| {
        matches!(error, object_store::Error::Generic { .. })
            && of_disk(error).is_none()
            && !lacks_ranges(error)
            && !is_final(error)
            && begun.elapsed() < RETRY_DEADLINE
    };
    operation.retry(backoff).when(worth_it).await
}

/// Whether a store would say the same in a minute: who asks has no right to, or what was asked for is wrong.
fn is_final(error: &object_store::Error) -> bool {
    use object_store::Error::{NotImplemented, NotSupported, PermissionDenied, Unauthenticated};
    if matches!(
        error,
        PermissionDenied { .. } | Unauthenticated { .. } | NotSupported { .. } | NotImplemented { .. }
    ) {
        return true;
    }
    if let Some(status) = status(error) {
        let told = error.to_string();
        // S3 says so of a request that was slow, or whose token is about to be renewed.
        let passes = ["RequestTimeout", "ExpiredToken"].iter().any(|code| told.contains(code));
        return matches!(status, 300..=401 | 403..=405 | 410 | 416) && !passes;
    }
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        // A bucket of another region, which the store does not name.
        if error.to_string().starts_with("Received redirect without LOCATION") {
            return true;
        }
        if let Some(io) = error.downcast_ref::<io::Error>() {
            // The kind of a circle of links has no name yet.
            return matches!(io.kind(), io::ErrorKind::NotADirectory | io::ErrorKind::InvalidFilename)
                || format!("{:?}", io.kind()) == "FilesystemLoop";
        }
        cause = error.source();
    }
    false
}

/// The status that a server has answered with. The library keeps it to itself, and tells it in words.
fn status(error: &object_store::Error) -> Option<u16> {
    let told = error.to_string();
    let (_, status) = told.split_once("non-2xx status code: ")?;
    status.get(..3)?.parse().ok()
}

/// Whether a server has sent the whole of a file when it was asked for a part.
fn lacks_ranges(error: &object_store::Error) -> bool {
    let told = error.to_string();
    told.contains("Range request not supported") || told.contains("non-partial response when range requested")
}

/// A path as listings tell it; one that no listing has is written in its way.
fn parsed(path: &str) -> Path {
    Path::parse(path).unwrap_or_else(|_| Path::from(path))
}

#[cfg(feature = "http")]
fn hub_error(url: &str, hub::Failed { reason, for_now }: hub::Failed) -> DataError {
    let url = url.to_owned();
    if for_now { DataError::Store { file: url, reason } } else { DataError::Url { url, reason } }
}

/// A range that is being read.
#[derive(Debug)]
pub(crate) enum Reading {
    /// It was in the cache, or is empty.
    Here(Bytes),
    /// It comes from the store.
    Under(JoinHandle<Result<Bytes, DataError>>),
}

impl Reading {
    /// Waits for the bytes.
    pub(crate) fn wait(self) -> Result<Bytes, DataError> {
        match self {
            Self::Here(bytes) => Ok(bytes),
            Self::Under(task) => IO.block_on(task).unwrap_or(Err(DataError::Stopped)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use object_store::memory::InMemory;

    use super::*;

    /// An empty folder in memory.
    pub(crate) fn memory() -> Folder {
        Folder::of_run(Arc::new(InMemory::new()), Path::default())
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
        let stores = Stores::new(&DataConfig::default(), None).unwrap();
        let folder = stores.open(place.path().to_str().unwrap()).unwrap();
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
    fn a_full_disk_is_not_waited_for() {
        let of = |kind: io::ErrorKind| object_store::Error::Generic {
            store: "local",
            source: Box::new(io::Error::from(kind)),
        };
        let folder = memory();
        let full = folder.error("a", &of(io::ErrorKind::StorageFull));
        assert!(
            matches!(&full, DataError::Disk { .. }) && full.to_string().contains("free some space"),
            "{full}"
        );
        assert!(matches!(folder.error("a", &of(io::ErrorKind::TimedOut)), DataError::Store { .. }));
    }

    #[test]
    fn addresses_that_lead_nowhere_are_refused() {
        let stores = Stores::new(&DataConfig::default(), None).unwrap();
        for (url, word) in [
            ("/no/such/folder", "not a folder on this machine"),
            ("ftp://host/x", "ftp:// is not known"),
            ("run:shards", "no run folder"),
        ] {
            let message = stores.open(url).unwrap_err().to_string();
            assert!(message.contains(word) && message.contains(url), "{message}");
        }
    }

    #[test]
    fn a_run_folder_has_folders() {
        let run = memory();
        let stores = Stores::new(&DataConfig::default(), Some(&run)).unwrap();
        let shards = stores.open("run:shards").unwrap();
        shards.write("a.txt", b"x".to_vec()).unwrap();
        assert_eq!(run.list().unwrap()[0].path, "shards/a.txt");
        assert_eq!(shards.list().unwrap()[0], FileInfo { path: "a.txt".to_owned(), size: 1, version: None });
        assert_eq!(shards.place("a.txt"), "run:shards/a.txt");
    }
}
