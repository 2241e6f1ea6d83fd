//! What a worker knows about the run that it joined.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::runtime::Handle;
use ulmus_checkpoint::{Store, StoreError};
use ulmus_dataloader::{Corpus, DataError, Folder, Manifest, Sources};
use ulmus_plan::{Plan, TokenizerConfig};
use ulmus_run::paths;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{BadUnit, Digest, RunId};

use crate::WorkerError;

/// A run: its plan, and its folder.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) id: RunId,
    pub(crate) plan: Arc<Plan>,
    pub(crate) store: Store,
    runtime: Handle,
}

impl Run {
    pub(crate) fn new(id: RunId, plan: Plan, store: Store, runtime: Handle) -> Self {
        Self { id, plan: Arc::new(plan), store, runtime }
    }

    /// Tells groups of different runs apart.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(format!("{} {}", self.id, self.plan.digest()).as_bytes())
    }

    /// Waits for a store operation; for the trainer's thread, which is not one of the runtime's.
    pub(crate) fn wait<T>(&self, operation: impl Future<Output = T>) -> T {
        self.runtime.block_on(operation)
    }

    /// A file that the run has made before it began, and cannot go on without.
    fn read_own(&self, path: &str) -> Result<Vec<u8>, WorkerError> {
        self.read(path).map_err(|error| match error {
            StoreError::NotFound { .. } => WorkerError::Damaged {
                file: path.to_owned(),
                reason: "it does not exist".to_owned(),
                act: "put back a copy of it, or start a run of another name",
            },
            error => error.into(),
        })
    }

    /// A file of the run's folder.
    pub(crate) fn read(&self, path: &str) -> Result<Vec<u8>, StoreError> {
        self.wait(self.store.get(path)).map(Vec::from)
    }

    /// Writes a file of the run's folder.
    pub(crate) fn write(&self, path: &str, contents: Vec<u8>) -> Result<(), StoreError> {
        self.wait(self.store.put(path, contents))
    }

    /// Writes a file of the run's folder unless there is one of this name; answers whether it wrote it.
    pub(crate) fn write_new(&self, path: &str, contents: Vec<u8>) -> Result<bool, StoreError> {
        self.wait(self.store.put_new(path, contents))
    }

    /// The run's folder as sources with `run:` URLs see it.
    pub(crate) fn folder(&self) -> Folder {
        let (objects, prefix) = self.store.objects();
        Folder::of_run(objects, prefix)
    }

    /// The run's tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, WorkerError> {
        let TokenizerConfig { bos, eos, .. } = &self.plan.tokenizer;
        let (name, bytes) = match self.read(paths::TOKENIZER_MODEL) {
            Err(StoreError::NotFound { .. }) => {
                (paths::TOKENIZER_JSON, self.read_own(paths::TOKENIZER_JSON)?)
            }
            model => (paths::TOKENIZER_MODEL, model?),
        };
        Ok(Tokenizer::read(&bytes, name, bos.as_deref(), eos.as_deref())?)
    }

    /// The run's data as the prepare job has frozen it, without units that cannot be read.
    pub(crate) fn corpus(&self) -> Result<Corpus, WorkerError> {
        let manifest = Manifest::from_json(&self.read_own(paths::DATA_MANIFEST)?)?;
        let tokenizer = self.tokenizer()?;
        manifest.check_tokenizer(&tokenizer)?;
        Ok(self.corpus_of(&manifest, tokenizer)?.without(&self.quarantine()?))
    }

    /// Units that cannot be read, as the coordinator has recorded them.
    pub(crate) fn quarantine(&self) -> Result<BTreeSet<BadUnit>, WorkerError> {
        let recorded = match self.read(paths::QUARANTINE) {
            Err(StoreError::NotFound { .. }) => return Ok(BTreeSet::new()),
            recorded => recorded?,
        };
        let units = ulmus_run::quarantine::from_json(&recorded)
            .map_err(|error| WorkerError::Plan(format!("{error}; delete it, and restart the coordinator")))?;
        Ok(units.into_keys().collect())
    }

    /// The data of a manifest.
    pub(crate) fn corpus_of(&self, manifest: &Manifest, tokenizer: Tokenizer) -> Result<Corpus, DataError> {
        let sources = Sources::open(&self.plan.data, manifest, Some(&self.folder()))?;
        Corpus::new(&self.plan.data, self.plan.run.seed, sources, tokenizer)
    }
}
