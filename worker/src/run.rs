//! The run that a worker has joined.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::runtime::Handle;
use ulmus_checkpoint::{Access, OpenOptions, Store, StoreError};
use ulmus_dataloader::{Corpus, DataError, Folder, Manifest, PlanTokenizer, Sources};
use ulmus_plan::Plan;
use ulmus_run::paths;
use ulmus_run::results::Prepared;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{BadUnit, Digest, JobName, RunId, RunName, StageName};

use crate::WorkerError;

/// A run: its plan and its folder.
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

    /// Another run that is kept beside this one, to read its models. It has the id of this run, for its own is not asked for.
    pub(crate) fn beside(&self, name: &str) -> Result<Self, WorkerError> {
        let place = self.store.location().trim_end_matches('/');
        let store = place.rfind('/').map_or("", |at| &place[..=at]);
        Self::in_store(self.id, store, name, self.runtime.clone())
    }

    /// The run of a name in a folder of runs, to read its models. Its id is the one that is given here.
    pub(crate) fn in_store(id: RunId, store: &str, name: &str, runtime: Handle) -> Result<Self, WorkerError> {
        let name: RunName =
            name.parse().map_err(|error| WorkerError::Plan(format!("run:{name}: {error}")))?;
        let is_joined = store.is_empty() || store.ends_with('/');
        let place = format!("{store}{}{name}", if is_joined { "" } else { "/" });
        let store = Store::open_with(&place, OpenOptions { access: Access::Read, ..OpenOptions::default() })?;
        let plan = runtime.block_on(store.get(paths::PLAN)).map_err(|error| match error {
            StoreError::NotFound { .. } => WorkerError::Plan(format!(
                "there is no run {name} in {place}, or its {} is lost; correct the name, or put back that file",
                paths::PLAN
            )),
            error => error.into(),
        })?;
        let problem = |problem: String| WorkerError::Plan(format!("{place}/{}: {problem}", paths::PLAN));
        let text = std::str::from_utf8(&plan).map_err(|error| problem(error.to_string()))?;
        let plan = ulmus_plan::read(text, &[]).map_err(|problems| problem(problems.to_string()))?;
        let [plan] = <[Plan; 1]>::try_from(plan).map_err(|_| problem("it has variants".to_owned()))?;
        Ok(Self::new(id, plan, store, runtime))
    }

    /// Distinguishes the groups of different runs and plans.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(format!("{} {}", self.id, self.plan.digest()).as_bytes())
    }

    /// Waits for a store operation. For threads outside the async runtime, such as the trainer's.
    pub(crate) fn wait<T>(&self, operation: impl Future<Output = T>) -> T {
        self.runtime.block_on(operation)
    }

    /// Reads a file that a job has written and without which the run cannot continue.
    pub(crate) fn read_own(&self, path: &str) -> Result<Vec<u8>, WorkerError> {
        self.read(path).map_err(|error| match error {
            StoreError::NotFound { .. } => lost(path),
            error => error.into(),
        })
    }

    /// Reads a file of the run folder.
    pub(crate) fn read(&self, path: &str) -> Result<Vec<u8>, StoreError> {
        self.wait(self.store.get(path)).map(Vec::from)
    }

    /// Writes a file of the run folder.
    pub(crate) fn write(&self, path: &str, contents: Vec<u8>) -> Result<(), StoreError> {
        self.wait(self.store.put(path, contents))
    }

    /// Writes a file of the run folder unless it exists. Returns whether it was written.
    pub(crate) fn write_new(&self, path: &str, contents: Vec<u8>) -> Result<bool, StoreError> {
        self.wait(self.store.put_new(path, contents))
    }

    /// The run folder as sources with `run:` URLs see it.
    pub(crate) fn folder(&self) -> Folder {
        Folder::of_run(self.store.clone())
    }

    /// The tokenizer of the run.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, WorkerError> {
        Ok(self.found_tokenizer()?.tokenizer)
    }

    /// The tokenizer of the run, and where it lies.
    pub(crate) fn found_tokenizer(&self) -> Result<PlanTokenizer, WorkerError> {
        let found = PlanTokenizer::of_run(&self.plan, &self.folder())?;
        let found = found.ok_or_else(|| lost(paths::TOKENIZER_JSON))?;
        let prepared = match self.read(&paths::result(&JobName::stored(StageName::PREPARE.to_owned()))) {
            Err(StoreError::NotFound { .. }) => return Ok(found),
            prepared => serde_json::from_slice::<Prepared>(&prepared?).ok(),
        };
        if prepared.is_some_and(|prepared| prepared.tokenizer != found.tokenizer.digest()) {
            return Err(WorkerError::Damaged {
                file: found.place,
                reason: "its hash is not the one in the result of prepare".to_owned(),
                act: "put back a copy of it, or start a run with another name",
            });
        }
        Ok(found)
    }

    /// The data of the run as the prepare job has frozen it, without quarantined units.
    pub(crate) fn corpus(&self) -> Result<Corpus, WorkerError> {
        let manifest = Manifest::from_json(&self.read_own(paths::DATA_MANIFEST)?)?;
        let tokenizer = self.tokenizer()?;
        manifest.check_tokenizer(&tokenizer)?;
        Ok(self.corpus_of(&manifest, tokenizer)?.without(&self.quarantine()?))
    }

    /// The quarantined units, as the coordinator has recorded them.
    pub(crate) fn quarantine(&self) -> Result<BTreeSet<BadUnit>, WorkerError> {
        let recorded = match self.read(paths::QUARANTINE) {
            Err(StoreError::NotFound { .. }) => return Ok(BTreeSet::new()),
            recorded => recorded?,
        };
        let units = ulmus_run::quarantine::from_json(&recorded)
            .map_err(|error| WorkerError::Plan(format!("{error}; delete it, and restart the coordinator")))?;
        Ok(units.into_keys().collect())
    }

    /// The data that a manifest lists.
    pub(crate) fn corpus_of(&self, manifest: &Manifest, tokenizer: Tokenizer) -> Result<Corpus, DataError> {
        let sources = Sources::open(&self.plan.data, manifest, Some(&self.folder()))?;
        let has_pad = (tokenizer.pad() as usize) < self.plan.model.vocab_size;
        let corpus = Corpus::new(&self.plan.data, self.plan.run.seed, sources, tokenizer)?;
        // A base may have no row for a pad id; any other fills as well.
        Ok(if has_pad { corpus } else { corpus.padded_with(0) })
    }
}

/// A file that a job has written is not there.
fn lost(path: &str) -> WorkerError {
    WorkerError::Damaged {
        file: path.to_owned(),
        reason: "it does not exist".to_owned(),
        act: "put back a copy of it, or start a run with another name",
    }
}
