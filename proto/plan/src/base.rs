//! A model to begin from, in place of the seed.

use serde::{Deserialize, Serialize};
use toml::Table;
use ulmus_types::Problems;

use crate::data::refuse_secret;
use crate::keys::lookup;
use crate::model::ModelConfig;
use crate::parse::set;
use crate::plan::StoreConfig;

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

/// The base model of whose shape a plan says nothing, so that it has to be read from the model itself; and the plan's store.
pub fn base_to_read(text: &str, overrides: &[String]) -> Option<(String, String)> {
    let mut table = text.parse::<Table>().ok()?;
    for assignment in overrides {
        set(&mut table, assignment, &mut Problems::new());
    }
    let base = lookup(&table, "base.model")?.as_str()?;
    let store = lookup(&table, "store.url").and_then(|url| url.as_str().map(str::to_owned));
    let store = store.unwrap_or_else(|| StoreConfig::default().url);
    lookup(&table, "model").is_none().then(|| (base.to_owned(), store))
}

/// The overrides that give a plan the shape of its base model.
pub fn shape_overrides(shape: &ModelConfig) -> Vec<String> {
    let table = Table::try_from(shape).expect("a shape has no value that TOML lacks");
    table.into_iter().map(|(key, value)| format!("model.{key}={value}")).collect()
}
