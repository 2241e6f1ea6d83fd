//! Published numbers of other models, to print beside ours.

use std::collections::BTreeMap;

use comfy_table::{Table, presets};
use serde::Deserialize;

use super::definition::Entry;
use super::report::Outcome;
use super::select::Selection;

const PUBLISHED: &str = include_str!("published.toml");

#[derive(Debug, Deserialize)]
struct File {
    model: Vec<Published>,
}

/// A model's numbers in percent: for each suite, of each task, and their average.
#[derive(Debug, Deserialize)]
struct Published {
    name: String,
    source: String,
    #[serde(flatten)]
    suites: BTreeMap<String, BTreeMap<String, f64>>,
}

/// A table of published models and ours on a suite, in Markdown. Cells without a number were not published.
pub fn beside_published(suite: &str, model: &str, selection: &Selection, outcomes: &[Outcome]) -> String {
    let File { model: published } = toml::from_str(PUBLISHED).expect("a test reads it");
    let tasks: Vec<&Entry> = selection.average.iter().collect();
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
    let mut rows = vec![
        ["model".to_owned()]
            .into_iter()
            .chain(tasks.iter().map(|entry| entry.name.clone()))
            .chain(["average".to_owned(), "source".to_owned()])
            .collect::<Vec<_>>(),
    ];
    let own = |entry: &&Entry| {
        let outcome = outcomes.iter().find(|outcome| outcome.name == entry.name)?;
        let (_, estimate) = outcome.metrics.iter().find(|(metric, _)| Some(*metric) == entry.metric)?;
        Some(100.0 * estimate.value)
    };
    let average = super::run::average(selection, outcomes).map(|average| 100.0 * average);
    let cells = tasks.iter().map(own).chain([average]).map(number);
    rows.push([model.to_owned()].into_iter().chain(cells).chain(["this evaluation".to_owned()]).collect());
    for Published { name, source, suites } in published {
        let Some(numbers) = suites.get(suite) else { continue };
        let cells = tasks.iter().map(|entry| numbers.get(&entry.name)).chain([numbers.get("average")]);
        let cells = cells.map(|value| number(value.copied()));
        rows.push([name].into_iter().chain(cells).chain([source]).collect());
    }
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(&rows[0]).add_rows(&rows[1..]);
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::super::definition::{Catalogue, Revision};
    use super::*;

    /// The averages are the means of the numbers beside them, which some cards cut off and others round.
    #[test]
    fn published_averages_are_those_of_their_rows() {
        let File { model } = toml::from_str(PUBLISHED).unwrap();
        let catalogue = Catalogue::built_in(Revision::Current);
        let mut checked = 0;
        for Published { name, suites, .. } in model {
            for (suite, numbers) in suites {
                let entries = &catalogue.suites[&suite].entries;
                let values: Vec<f64> =
                    entries.iter().filter_map(|entry| numbers.get(&entry.name).copied()).collect();
                if let (Some(average), true) = (numbers.get("average"), values.len() == entries.len()) {
                    let mean = values.iter().sum::<f64>() / values.len() as f64;
                    assert!((mean - average).abs() < 0.0101, "{name} on {suite}: {mean} and {average}");
                    checked += 1;
                }
            }
        }
        assert_eq!(checked, 3 * 8);
    }
}
