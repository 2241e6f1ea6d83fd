//! Which tasks a list of names means.

use std::collections::BTreeSet;
use std::sync::Arc;

use globset::Glob;

use super::definition::{Catalogue, Definition, Entry, Group, Suite};
use crate::error::EvaluatorError;

/// Tasks to measure, in order.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    pub(crate) items: Vec<Item>,
    /// What the average of a suite is over: tasks or groups, and metrics.
    pub(crate) average: Vec<Entry>,
}

impl Selection {
    /// Whether a task of this name is measured.
    pub fn has(&self, name: &str) -> bool {
        self.tasks().any(|task| task == name)
    }

    /// The names of the tasks that are measured.
    pub fn tasks(&self) -> impl Iterator<Item = &str> {
        self.items.iter().filter_map(|item| match item {
            Item::Task { task, .. } => Some(task.name.as_str()),
            Item::Group { .. } => None,
        })
    }

    /// Whether there is nothing to measure.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

/// A task, a group or a suite, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskRow {
    /// Its name.
    pub name: String,
    /// Examples before each question.
    pub shots: String,
    /// The split that is measured.
    pub split: String,
    /// The numbers that it has.
    pub metrics: String,
    /// Where its rows come from, or which tasks it has.
    pub source: String,
}

fn with_note(text: &str, note: Option<&str>) -> String {
    note.map_or_else(|| text.to_owned(), |note| format!("{text} ({note})"))
}

/// A task or a group to report on.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Task {
        task: Arc<Definition>,
        /// Number of groups it is in, each inside the other.
        depth: usize,
        /// What its group says of its examples.
        entry: Option<Entry>,
    },
    Group {
        group: Arc<Group>,
        depth: usize,
        /// The groups and tasks that it has itself.
        members: Vec<String>,
        /// The tasks whose rows it sums up.
        leaves: Vec<String>,
    },
}

impl Catalogue {
    /// The tasks of names, groups and patterns.
    ///
    /// # Errors
    /// [`EvaluatorError::UnknownTask`].
    pub fn select(&self, names: &[String]) -> Result<Selection, EvaluatorError> {
        let mut selection = Selection::default();
        for name in names {
            let found = self.matching(name);
            if found.is_empty() {
                return Err(EvaluatorError::UnknownTask { name: name.clone(), nearest: self.nearest(name) });
            }
            for name in found {
                self.add_to(&mut selection, &name, None, 0)?;
            }
        }
        Ok(selection)
    }

    /// The tasks of a published set of commands.
    ///
    /// # Errors
    /// [`EvaluatorError::UnknownTask`].
    pub fn select_suite(&self, name: &str) -> Result<Selection, EvaluatorError> {
        let suite = self.suites.get(name).ok_or_else(|| EvaluatorError::UnknownTask {
            name: name.to_owned(),
            nearest: self.suites.keys().cloned().collect::<Vec<_>>().join(", "),
        })?;
        let mut selection = Selection { average: suite.entries.clone(), ..Selection::default() };
        for entry in &suite.entries {
            self.add_to(&mut selection, &entry.name, Some(entry), 0)?;
        }
        Ok(selection)
    }

    /// All tasks, groups and suites, in the order of their definitions.
    pub fn rows(&self) -> Vec<TaskRow> {
        let entries = |entries: &[Entry]| {
            entries
                .iter()
                .map(|entry| format!("{} ({})", entry.name, entry.shots))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let of_name = |name: &String| match (self.tasks.get(name), self.groups.get(name)) {
            (Some(task), _) => TaskRow {
                name: name.clone(),
                shots: task.shots.map_or_else(|| "any".to_owned(), |shots| shots.to_string()),
                split: task.measured_split().unwrap_or_default().to_owned(),
                metrics: task.metrics.iter().map(|metric| metric.name()).collect::<Vec<_>>().join(", "),
                source: with_note(
                    &[&task.sources[..1], &task.config.clone().into_iter().collect::<Vec<_>>()]
                        .concat()
                        .join(" "),
                    task.note.as_deref(),
                ),
            },
            (None, group) => TaskRow {
                name: name.clone(),
                shots: String::new(),
                split: "group".to_owned(),
                metrics: group
                    .and_then(|group| group.aggregate)
                    .map(|metric| metric.name().to_owned())
                    .unwrap_or_default(),
                source: group
                    .map(|group| {
                        let own = [group.groups.clone(), Self::own_tasks(group)].concat().join(", ");
                        let own = if own.is_empty() { entries(&group.entries) } else { own };
                        with_note(&own, group.note.as_deref())
                    })
                    .unwrap_or_default(),
            },
        };
        let of_suite = |suite: &Arc<Suite>| TaskRow {
            name: suite.name.clone(),
            shots: String::new(),
            split: "suite".to_owned(),
            metrics: "average".to_owned(),
            source: with_note(&entries(&suite.entries), suite.note.as_deref()),
        };
        self.order.iter().map(of_name).chain(self.suites.values().map(of_suite)).collect()
    }

    /// The names that a name or a pattern means, in the order of the definitions.
    fn matching(&self, name: &str) -> Vec<String> {
        if self.order.iter().any(|known| known == name) {
            return vec![name.to_owned()];
        }
        let Ok(glob) = Glob::new(name) else { return Vec::new() };
        let glob = glob.compile_matcher();
        let found: Vec<&String> = self.order.iter().filter(|known| glob.is_match(known)).collect();
        // What a matching group has is not named twice.
        let groups = found.iter().filter_map(|name| self.groups.get(*name));
        let inside: BTreeSet<String> = groups.flat_map(|group| self.members(group)).collect();
        found.into_iter().filter(|name| !inside.contains(*name)).cloned().collect()
    }

    /// Everything that is in a group, at any depth.
    fn members(&self, group: &Group) -> Vec<String> {
        let entries = group.entries.iter().map(|entry| &entry.name);
        let direct = group.groups.iter().chain(&group.tasks).chain(entries);
        let inner =
            direct.clone().filter_map(|name| self.groups.get(name)).flat_map(|group| self.members(group));
        direct.cloned().chain(inner).chain(self.leaves(group)).collect()
    }

    fn add_to(
        &self,
        selection: &mut Selection,
        name: &str,
        entry: Option<&Entry>,
        depth: usize,
    ) -> Result<(), EvaluatorError> {
        if let Some(task) = self.tasks.get(name) {
            let before = selection.items.iter().find_map(|item| match item {
                Item::Task { task: other, entry, .. } if other.name == name => Some(entry),
                _ => None,
            });
            match before {
                None => {
                    selection.items.push(Item::Task { task: Arc::clone(task), depth, entry: entry.cloned() });
                }
                Some(before) if before.as_ref() == entry => {}
                Some(_) => return Err(EvaluatorError::TwoWays { task: name.to_owned() }),
            }
            return Ok(());
        }
        let group = &self.groups[name];
        let is_there = selection
            .items
            .iter()
            .any(|item| matches!(item, Item::Group { group: other, .. } if other.name == name));
        if !is_there {
            let leaves = if group.aggregate.is_some() { self.leaves(group) } else { Vec::new() };
            let members = [group.groups.clone(), Self::own_tasks(group)].concat();
            let of_entries = group.entries.iter().map(|entry| entry.name.clone());
            let members = members.into_iter().chain(of_entries).collect();
            if group.aggregate.is_some() || group.alias.is_some() {
                selection.items.push(Item::Group { group: Arc::clone(group), depth, members, leaves });
            }
        }
        let depth = depth + usize::from(group.aggregate.is_some() || group.alias.is_some());
        for inner in &group.groups {
            self.add_to(selection, inner, entry, depth)?;
        }
        for leaf in Self::own_tasks(group) {
            self.add_to(selection, &leaf, entry, depth)?;
        }
        for own in &group.entries {
            self.add_to(selection, &own.name, Some(own), depth)?;
        }
        Ok(())
    }

    /// The closest known name.
    fn nearest(&self, name: &str) -> String {
        let closest = self
            .order
            .iter()
            .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
        closest.cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::definition::Revision;
    use super::*;

    fn names(selection: &Selection) -> Vec<String> {
        let name = |item: &Item| match item {
            Item::Task { task, .. } => task.name.clone(),
            Item::Group { group, .. } => format!("[{}]", group.name),
        };
        selection.items.iter().map(name).collect()
    }

    #[test]
    fn names_groups_and_patterns_are_tasks() {
        let catalogue = Catalogue::built_in(Revision::Current);
        let select =
            |list: &[&str]| catalogue.select(&list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(
            names(&select(&["arc_*", "piqa", "arc_easy"]).unwrap()),
            ["arc_easy", "arc_challenge", "piqa"]
        );
        let mmlu = select(&["mmlu"]).unwrap();
        assert_eq!(
            (names(&mmlu).len(), names(&mmlu)[..3].to_vec()),
            (
                1 + 4 + 57,
                vec!["[mmlu]".to_owned(), "[mmlu_stem]".to_owned(), "mmlu_abstract_algebra".to_owned()]
            )
        );
        assert_eq!(names(&select(&["mmlu*"]).unwrap()), names(&mmlu));
        let openllm = select(&["openllm"]).unwrap();
        assert_eq!(names(&openllm).len(), 1 + 5 + 62);
        let error = select(&["hellaswag", "openllm"]).unwrap_err().to_string();
        assert!(error.contains("hellaswag"), "{error}");
        let entry = |name: &str| {
            openllm.items.iter().find_map(|item| match item {
                Item::Task { task, entry, .. } if task.name == name => entry.clone(),
                _ => None,
            })
        };
        assert_eq!(entry("hellaswag").unwrap().fewshot_split.as_deref(), Some("train"));
        assert_eq!(entry("mmlu_anatomy").unwrap().shots, 5);
        let error = select(&["helaswag"]).unwrap_err().to_string();
        assert!(error.contains("hellaswag"), "{error}");
        assert_eq!(names(&catalogue.select_suite("llm360").unwrap()).len(), 7 + 62);
    }
}
