//! The run of a plan, for commands that look into its folder.

use std::path::Path;

use ulmus_dataloader::Folder;
use ulmus_plan::{DataConfig, Plan, TokenizerConfig};
use ulmus_process::Failure;
use ulmus_run::paths;
use ulmus_tokenizer::Tokenizer;

use super::{is_own, unreadable};

/// The folder of a plan's run, if there is one.
pub(super) struct Run {
    url: String,
    folder: Option<Folder>,
}

impl Run {
    /// Looks for the run of a plan.
    pub(super) fn find(plan: &Plan) -> Result<Self, Failure> {
        let url = format!("{}/{}", plan.store.url.trim_end_matches('/'), plan.run.name);
        let folder = Folder::find_run(&url).map_err(|error| super::failure(&error))?;
        Ok(Self { url, folder })
    }

    /// Looks for the run of a plan if one of these sources lies in its folder. Otherwise its store need not be reachable.
    pub(super) fn find_for(plan: &Plan, data: &DataConfig) -> Result<Option<Self>, Failure> {
        if data.source.iter().any(is_own) { Self::find(plan).map(Some) } else { Ok(None) }
    }

    /// Its address.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Its folder, whatever is in it.
    pub(super) const fn folder(&self) -> Option<&Folder> {
        self.folder.as_ref()
    }

    /// The frozen list of what it reads, once its data is prepared.
    pub(super) fn data_manifest(&self) -> Result<Option<Vec<u8>>, Failure> {
        read(self.folder(), paths::DATA_MANIFEST)
    }

    /// Its tokenizer, once its data is prepared.
    pub(super) fn tokenizer(&self, config: &TokenizerConfig) -> Result<Tokenizer, Failure> {
        let (name, bytes) = match read(self.folder(), paths::TOKENIZER_MODEL)? {
            Some(model) => (paths::TOKENIZER_MODEL, model),
            None => (paths::TOKENIZER_JSON, read(self.folder(), paths::TOKENIZER_JSON)?.unwrap_or_default()),
        };
        Tokenizer::read(&bytes, name, config.bos.as_deref(), config.eos.as_deref())
            .map_err(|error| unreadable(&format!("{}/{name}: {error}", self.url)))
    }

    /// Tells of sources that the run makes for itself, as long as it has not made them.
    pub(super) fn not_made(&self, plan: &Path, data: &DataConfig) -> Result<Option<String>, Failure> {
        let Some(source) = data.source.iter().find(|source| is_own(source)) else { return Ok(None) };
        if self.data_manifest()?.is_some() {
            return Ok(None);
        }
        Ok(Some(format!(
            "source {:?} lies in the folder of the run, and {} has no data yet; start the run first (coordinator --plan \
             {}), or see what it will be made of (--check sources beside that)",
            source.name,
            self.url,
            plan.display()
        )))
    }
}

/// A file of a folder, if both are there.
pub(super) fn read(folder: Option<&Folder>, path: &str) -> Result<Option<Vec<u8>>, Failure> {
    let bytes = folder.map(|folder| folder.read(path)).transpose();
    bytes.map(Option::flatten).map_err(|error| super::failure(&error))
}
