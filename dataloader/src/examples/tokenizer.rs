//! Finds the tokenizer of a plan, in its run or where the run will take it from.

use std::path::Path;

use ulmus_plan::{Plan, TokenizerConfig};
use ulmus_run::paths;
use ulmus_tokenizer::Tokenizer;

use super::template::special_names;
use crate::address::RUN;
use crate::error::DataError;
use crate::store::Folder;

/// The tokenizer of a plan.
#[derive(Debug, Clone)]
pub struct PlanTokenizer {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The folder in which it lies with what belongs to it, its chat template above all.
    pub folder: Folder,
    /// Where it lies, for people.
    pub place: String,
}

impl PlanTokenizer {
    /// The tokenizer that a run has, once its data is prepared.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of_run(plan: &Plan, run: &Folder) -> Result<Option<Self>, DataError> {
        // A base model says how the tokens are called that begin and end a text, unless the plan names another tokenizer.
        let is_of_base = plan.base.is_some() && plan.tokenizer.file.is_none();
        Self::in_folder(run, if is_of_base { None } else { Some(plan) })
    }

    /// The tokenizer that a run has or, before that, will take: from the file that the plan names, or else from the base. `None` if
    /// it will train one.
    ///
    /// # Errors
    /// When it cannot be read, or a base has none.
    pub fn find(plan: &Plan, run: Option<&Folder>) -> Result<Option<Self>, DataError> {
        if let Some(found) = run.map(|run| Self::of_run(plan, run)).transpose()?.flatten() {
            return Ok(Some(found));
        }
        let Some(folder) = tokenizer_folder(plan)? else { return Ok(None) };
        if let Some(file) = &plan.tokenizer.file {
            let name = Path::new(file).file_name().unwrap_or_default().to_string_lossy();
            let bytes = folder.read(&name)?.ok_or_else(|| DataError::NoFile { file: file.clone() })?;
            let TokenizerConfig { bos, eos, .. } = &plan.tokenizer;
            let tokenizer = Tokenizer::read(&bytes, file, bos.as_deref(), eos.as_deref())?;
            return Ok(Some(Self { tokenizer, folder, place: file.clone() }));
        }
        match Self::in_folder(&folder, None)? {
            Some(found) => Ok(Some(found)),
            None => Err(DataError::NoTokenizer { folder: folder.url().to_owned() }),
        }
    }

    /// The tokenizer in a folder. How the tokens are called that begin and end a text says the plan, or else the folder.
    fn in_folder(folder: &Folder, plan: Option<&Plan>) -> Result<Option<Self>, DataError> {
        // Where a folder has both files, the JSON was made of the model.
        for name in [paths::TOKENIZER_MODEL, paths::TOKENIZER_JSON] {
            let Some(bytes) = folder.read(name)? else { continue };
            let [bos, eos] = if let Some(plan) = plan {
                [plan.tokenizer.bos.clone(), plan.tokenizer.eos.clone()]
            } else {
                let mut names = special_names(folder)?;
                ["bos_token", "eos_token"].map(|token| names.remove(token))
            };
            let place = folder.place(name);
            let tokenizer = Tokenizer::read(&bytes, &place, bos.as_deref(), eos.as_deref())?;
            return Ok(Some(Self { tokenizer, folder: folder.clone(), place }));
        }
        Ok(None)
    }
}

/// The folder from which a run takes its tokenizer and what belongs to it: that of the file that the plan names, or else that of the
/// base. `None` if the run trains one.
///
/// # Errors
/// When the folder is not there.
pub fn tokenizer_folder(plan: &Plan) -> Result<Option<Folder>, DataError> {
    let base = plan.base.as_ref().map(|base| base.model.as_str());
    match (&plan.tokenizer.file, base) {
        (Some(file), _) => Folder::open(&parent(file)).map(Some),
        (None, Some(base)) => base_folder(base, plan).map(Some),
        (None, None) => Ok(None),
    }
}

fn base_folder(base: &str, plan: &Plan) -> Result<Folder, DataError> {
    if let Some(of_run) = base.strip_prefix(RUN) {
        let name = of_run.split_once('/').map_or(of_run, |(name, _)| name);
        let place = format!("{}/{name}", plan.store.url.trim_end_matches('/'));
        let folder = Folder::find_run(&place)?;
        return folder.ok_or(DataError::NoTokenizer { folder: place });
    }
    if base.starts_with("hf://") {
        return Folder::open_model(base);
    }
    // A checkpoint is a file in the folder of its tokenizer.
    if Path::new(base).is_file() { Folder::open(&parent(base)) } else { Folder::open(base) }
}

/// The folder of a file of this machine.
fn parent(file: &str) -> String {
    let parent = Path::new(file).parent().filter(|parent| *parent != "").unwrap_or(Path::new("."));
    parent.display().to_string()
}
