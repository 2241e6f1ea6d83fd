//! A model to begin from, in place of the seed.

use serde::{Deserialize, Serialize};
use ulmus_types::Problems;

use crate::data::refuse_secret;

/// The model that a run begins from. Only its weights are taken, and its tokenizer if the plan names no other.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BaseConfig {
    /// Where it is: a folder in Hugging Face layout or a CoreNet checkpoint, `hf://ORG/NAME[@REVISION]`, or a model of another run
    /// under `store.url`: `run:NAME/average`, or `run:NAME/STEP` for a checkpoint.
    pub model: String,
}

impl BaseConfig {
    /// Reports every rule that is broken.
    pub(crate) fn check(&self, problems: &mut Problems) {
        let (key, model) = ("base.model", &self.model);
        if refuse_secret(problems, key.to_owned(), model) {
            return;
        }
        if let Some(of_run) = model.strip_prefix("run:") {
            let is_one = of_run.split_once('/').is_some_and(|(run, which)| {
                run.parse::<ulmus_types::RunName>().is_ok()
                    && (which == "average" || which.parse::<u64>().is_ok_and(|step| step > 0))
            });
            let rule = "a model of a run is its average or the state after a step";
            problems.check(
                is_one,
                key,
                format!("{model:?}"),
                rule,
                "write run:NAME/average or run:NAME/STEP",
            );
        } else {
            problems.check(
                !model.is_empty() && (!model.contains("://") || model.starts_with("hf://")),
                key,
                format!("{model:?}"),
                "models are read from folders, from hf://ORG/NAME and from run:NAME/average",
                "copy it to a folder that the workers reach",
            );
        }
    }
}
