//! What a tuning stage has learned from, and how it ended: `tune/NAME/results.json`, and a line of the summary.

use std::collections::BTreeMap;

use serde::Serialize;
use ulmus_checkpoint::{Store, StoreError};
use ulmus_plan::{Method, Plan};
use ulmus_run::paths;
use ulmus_run::results::{Examples, Results, to_json};
use ulmus_types::StageName;

use crate::database::MetricsRow;

/// A finished tuning stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Tuned {
    /// Name of the stage.
    pub(crate) stage: StageName,
    /// The model that it began from.
    pub(crate) of: String,
    /// What it learned from.
    pub(crate) method: Method,
    /// Number of updates.
    pub(crate) updates: u64,
    /// Examples, or pairs, that it has trained on; each counts as often as it was.
    pub(crate) examples: u64,
    /// Their tokens.
    pub(crate) tokens: u64,
    /// Loss before the first update.
    pub(crate) first_loss: f64,
    /// Loss before the last update.
    pub(crate) loss: f64,
    /// The last value of each of its other measures, by TRL's names.
    pub(crate) measures: BTreeMap<String, f64>,
    /// The rows.
    pub(crate) rows: Option<Examples>,
}

impl Tuned {
    /// The end of a stage with these updates; `None` if it had none, or is no tuning stage.
    pub(crate) fn of(
        plan: &Plan,
        stage: StageName,
        updates: &[MetricsRow],
        results: &Results,
    ) -> Option<Self> {
        let config = plan.tuning(stage)?;
        let (first, last) = (&updates.first()?.report, &updates.last()?.report);
        let measures = updates.iter().flat_map(|row| row.report.measures.clone()).collect();
        Some(Self {
            stage,
            of: config.of.to_string(),
            method: config.method,
            updates: last.step.get(),
            examples: last.examples,
            tokens: last.tokens,
            first_loss: first.loss,
            loss: last.loss,
            measures,
            rows: results.examples(stage),
        })
    }

    /// Writes the stage's `results.json`.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub(crate) async fn write(&self, store: &Store) -> Result<(), StoreError> {
        store.put(&paths::of_training(self.stage, paths::TUNED_RESULTS), to_json(self)).await
    }
}
