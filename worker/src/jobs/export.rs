//! Exports the average in Hugging Face layout.

use std::collections::BTreeMap;

use serde_json::json;
use ulmus_model::hf::{SpecialTokens, config_json, generation_config_json};
use ulmus_run::paths;
use ulmus_run::results::{self, Exported};
use ulmus_types::FileEntry;

use super::average::average_file;
use super::prepare::tokenizer_files;
use crate::WorkerError;
use crate::run::Run;

/// Writes the average in Hugging Face layout.
pub(super) fn export(run: &Run) -> Result<Exported, WorkerError> {
    let tokenizer = run.tokenizer()?;
    let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.eos() };
    let mut files = BTreeMap::new();
    let (bos, eos) = tokenizer.special_names();
    let names = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos });
    let contents = [
        ("config.json", config_json(&run.plan.model, tokens)?.into_bytes()),
        ("generation_config.json", generation_config_json(tokens).into_bytes()),
        (paths::WEIGHTS, average_file(run)?),
        ("tokenizer_config.json", results::to_json(&names)),
    ];
    for (name, contents) in contents.into_iter().chain(tokenizer_files(&tokenizer)) {
        files.insert(name.to_owned(), FileEntry::of(&contents));
        run.write(&paths::export_file(name), contents)?;
    }
    Ok(Exported { folder: paths::EXPORT.to_owned(), files })
}
