//! The results in model cards. Models are exported before they are measured, so the cards get them when the run ends.

use ulmus_checkpoint::{Store, StoreError};
use ulmus_run::paths;
use ulmus_run::results::{Exported, Measured, Results, Tasks};

use crate::summary::rows_of_tasks;
use crate::tuned::Tuned;

const HEADING: &str = "## Results\n";
/// The section before which results stand.
const NEXT: &str = "## Licence\n";

/// Writes what the run has measured into the cards of its exported models.
///
/// # Errors
/// When the store cannot be read or written.
pub(crate) async fn complete(tuned: &[Tuned], results: &Results, store: &Store) -> Result<(), StoreError> {
    for (model, folder) in exports(tuned, results) {
        let measured = measured(&model, tuned, results);
        let path = format!("{folder}/{}", paths::CARD);
        let card = match store.get(&path).await {
            Ok(card) => card,
            // Whoever has taken it away does not want it.
            Err(StoreError::NotFound { .. }) => continue,
            Err(error) => return Err(error),
        };
        let Ok(card) = String::from_utf8(card.to_vec()) else {
            tracing::warn!("{path} is not UTF-8, and is left without results");
            continue;
        };
        let completed = with_results(&card, &measured);
        if completed != card {
            store.put(&path, completed.into_bytes()).await?;
        }
    }
    Ok(())
}

/// The names of exported models, and their folders.
fn exports(tuned: &[Tuned], results: &Results) -> Vec<(String, String)> {
    let average = results.exported().map(|exported| ("average".to_owned(), exported.folder));
    let of_tunings = tuned.iter().map(|stage| (stage.stage.to_string(), paths::tuned(stage.stage)));
    let named = results.stages().into_iter().flat_map(|stage| {
        let exported = results.of_models::<Exported>(&stage);
        exported.into_iter().map(|(model, exported)| (model.to_owned(), exported.folder))
    });
    average.into_iter().chain(of_tunings).chain(named).collect()
}

/// What was measured of a model: names and values.
fn measured(model: &str, tuned: &[Tuned], results: &Results) -> Vec<[String; 2]> {
    let mut rows = Vec::new();
    let held_out = match model {
        "average" => results.average(),
        "last" => results.last(),
        _ => None,
    };
    if let Some(found) = held_out.as_ref().and_then(Measured::result) {
        rows.push(["loss on held-out text, nats per token".to_owned(), format!("{:.4}", found.loss)]);
        rows.push(["perplexity of held-out text".to_owned(), format!("{:.4}", found.perplexity)]);
        rows.push(["bits per byte of held-out text".to_owned(), format!("{:.4}", found.bits_per_byte)]);
    }
    if let Some(stage) = tuned.iter().find(|stage| stage.stage.as_str() == model) {
        rows.push(["loss of the last update".to_owned(), format!("{:.4}", stage.loss)]);
        rows.extend(stage.measures.iter().map(|(name, value)| [name.clone(), format!("{value:.4}")]));
    }
    for stage in results.stages() {
        let of_stage = results.of_models::<Tasks>(&stage);
        let own: Vec<(&str, Tasks)> = of_stage.into_iter().filter(|(name, _)| *name == model).collect();
        // The first row is the name of the model.
        for row in rows_of_tasks(&own).into_iter().skip(1) {
            let [name, value] = <[String; 2]>::try_from(row).expect("one model has one column");
            rows.push([format!("{stage}: {name}"), value]);
        }
    }
    rows
}

/// A card with these results instead of those that it has.
fn with_results(card: &str, rows: &[[String; 2]]) -> String {
    let (before, rest) = match card.find(HEADING) {
        Some(at) => {
            let section = at + HEADING.len();
            let end = card[section..].find("\n## ").map_or(card.len(), |end| section + end + 1);
            (&card[..at], &card[end..])
        }
        None => card.split_at(card.find(NEXT).unwrap_or(card.len())),
    };
    if rows.is_empty() {
        return [before, rest].concat();
    }
    let lines: Vec<String> = rows
        .iter()
        .map(|[name, value]| format!("| {} | {} |\n", name.replace('|', "\\|"), value.replace('|', "\\|")))
        .collect();
    let lines = lines.concat();
    format!("{before}{HEADING}\n| measure | value |\n|---|---|\n{lines}\n{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_stand_in_a_card_once() {
        let card = "# a\n\n## Training\n\n- b\n\n## Licence\n\nc\n";
        let rows = |value: &str| vec![["x | y".to_owned(), value.to_owned()]];
        let once = with_results(card, &rows("1"));
        assert_eq!(
            once,
            "# a\n\n## Training\n\n- b\n\n## Results\n\n| measure | value |\n|---|---|\n| x \\| y | 1 |\n\n## Licence\n\nc\n"
        );
        assert_eq!(with_results(&once, &rows("2")), once.replace("| 1 |", "| 2 |"));
        assert_eq!(with_results(&once, &[]), card);
        assert_eq!(with_results("# a\n", &rows("1")).matches(HEADING).count(), 1);
    }
}
