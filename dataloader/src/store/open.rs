//! How addresses of a plan become folders.

use std::sync::Arc;
use std::time::Duration;

use ulmus_plan::{DataConfig, SourceConfig};
use ulmus_storage::{Access, OpenOptions, Retries, Store};

use super::cache::Cache;
use super::folder::Folder;
use crate::address::{RUN, on_disk};
use crate::error::DataError;

/// What repositories of the hub hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HubKind {
    /// Rows.
    Dataset,
    /// Weights, a config and a tokenizer.
    Model,
}

/// What folders are opened with.
#[derive(Debug, Clone)]
pub(crate) struct Stores {
    run: Option<Folder>,
    cache: Option<Arc<Cache>>,
    timeout: Duration,
}

impl Stores {
    /// Opens the cache that a plan names; `run` is the run's own folder.
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
        if let Some(path) = url.strip_prefix(RUN) {
            return match &self.run {
                Some(run) => Ok(run.child(path)),
                None => Err(DataError::Url {
                    url: url.to_owned(),
                    reason: "there is no run folder here; use a path".to_owned(),
                }),
            };
        }
        if url.starts_with("hf://") {
            return self.open_hub(HubKind::Dataset, url);
        }
        self.open_store(url, Access::Read)
    }

    /// As for every corpus, with the plan's own limit of a request.
    fn retries(&self) -> Retries {
        Retries { request_timeout: self.timeout, ..Retries::CORPUS }
    }

    fn open_store(&self, url: &str, access: Access) -> Result<Folder, DataError> {
        let folder = Folder::new(Store::open_with(url, OpenOptions { access, retries: self.retries() })?);
        let is_on_disk = folder.store.directory().is_some();
        // What is on a disk needs no copy on another.
        let cache = self.cache.clone().filter(|_| !is_on_disk);
        Ok(Folder { is_on_disk, cache, ..folder })
    }

    #[cfg(feature = "http")]
    fn open_hub(&self, kind: HubKind, url: &str) -> Result<Folder, DataError> {
        use object_store::path::Path;

        use super::hub::Hub;

        let counters = Arc::default();
        let opened = super::runtime::wait_for(Hub::open(kind, url, self.retries(), &counters));
        let (hub, objects) = opened.map_err(|failed| failed.of(url))?;
        let store = Store::from_objects(objects, Path::default(), &hub.pinned()).with_counters(counters);
        let hub = Some(Arc::new(hub));
        Ok(Folder { hub, has_versions: false, cache: self.cache.clone(), ..Folder::new(store) })
    }

    #[cfg(not(feature = "http"))]
    #[expect(clippy::unused_self, reason = "it is used where there are networks")]
    fn open_hub(&self, _: HubKind, url: &str) -> Result<Folder, DataError> {
        let reason = "this program was built without the feature `http`; build with it, or use a path";
        Err(DataError::Url { url: url.to_owned(), reason: reason.to_owned() })
    }

    /// Opens a folder to write to; one on this machine is made if it is not there.
    ///
    /// # Errors
    /// When the address has an unknown form, or the folder cannot be made.
    pub(crate) fn make(&self, url: &str) -> Result<Folder, DataError> {
        if url.starts_with(RUN) {
            return self.open(url);
        }
        if url.starts_with("hf://") {
            let reason = "nothing can be written there; use a path, s3://, gs:// or az://";
            return Err(DataError::Url { url: url.to_owned(), reason: reason.to_owned() });
        }
        self.open_store(url, Access::Create)
    }

    /// As [`Self::make`], but refuses a folder from which what is written there would be read: a source's own, or one
    /// that a pattern of it reaches.
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
}

impl Folder {
    /// A folder at any address that a source may have: on a disk, in an object store, on the hub.
    ///
    /// # Errors
    /// When the address has an unknown form, or the folder is not there.
    pub fn open(url: &str) -> Result<Self, DataError> {
        Stores::new(&DataConfig::default(), None)?.open(url)
    }

    /// A model on the hub: `hf://<organisation>/<name>[@<revision>][/<folder>]`.
    ///
    /// # Errors
    /// When the address has another form, or the hub does not have the model.
    pub fn open_model(url: &str) -> Result<Self, DataError> {
        Stores::new(&DataConfig::default(), None)?.open_hub(HubKind::Model, url)
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
        Ok(Some(Self { store: folder.store.clone().named(RUN), has_versions: false, ..folder }))
    }
}
