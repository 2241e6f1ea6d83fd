//! What a task is: where its rows are, what the model is asked about each, and how that is counted. All of it is data.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use regex::Regex;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::metric::Metric;
use crate::error::EvaluatorError;

/// The task that measures the texts of a user, and has no definition.
pub const PERPLEXITY: &str = "perplexity";

/// The tasks that the program knows by itself.
const BUILT_IN: &str = include_str!("built_in.toml");

/// Revision of the harness whose numbers are met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Revision {
    /// 0.4.13.
    #[default]
    Current,
    /// The commit of March 2024 that the cards of the OpenELM models name.
    Dc90fec,
}

/// How examples are chosen from their pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Choice {
    /// At random, anew for every row.
    #[default]
    Random,
    /// The first ones, for every row.
    FirstN,
}

/// What the model is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// Which of several continuations is the likeliest.
    #[default]
    MultipleChoice,
    /// How likely a whole text is.
    Rolling,
}

/// A step that a text goes through before it is scored.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(crate) enum Rewrite {
    /// Every first text becomes the second.
    Replace(String, String),
    /// What a regular expression matches becomes a text.
    Pattern {
        /// The expression.
        pattern: String,
        /// The text, taken literally.
        with: String,
    },
    /// Blanks just inside a pair of characters are removed.
    Within {
        /// The two characters.
        within: String,
    },
}

/// A task as its file defines it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Definition {
    pub name: String,
    /// Name in tables, if it is another.
    pub alias: Option<String>,
    pub version: f64,
    #[serde(default)]
    pub kind: Kind,
    /// Names of the data set on the hub: today's, then earlier ones.
    pub sources: Vec<String>,
    /// The part of the data set.
    pub config: Option<String>,
    pub train: Option<String>,
    pub validation: Option<String>,
    pub test: Option<String>,
    /// The split that examples are drawn from, if it is not the first there is of train, validation and test.
    pub fewshot_split: Option<String>,
    #[serde(default)]
    pub sampler: Choice,
    /// The number of examples, whatever the user asks for.
    pub shots: Option<usize>,
    /// Rows are shuffled first, with this seed of Python's generator.
    pub shuffle: Option<u64>,
    #[serde(default)]
    pub description: String,
    /// Columns that are computed from the others, in this order: names and expressions.
    #[serde(default)]
    pub columns: Vec<(String, String)>,
    pub context: Option<String>,
    /// Expression for several contexts with the same continuation.
    pub contexts: Option<String>,
    pub continuation: Option<String>,
    /// Expression for the continuations.
    pub choices: Option<String>,
    /// What a choice is scored as, if not as itself.
    pub choice: Option<String>,
    /// Expression for the index of the right choice.
    pub gold: Option<String>,
    /// Expression for the choices that are true, of which there may be several.
    pub mass: Option<String>,
    /// What stands between a context and its continuation.
    #[serde(default = "blank")]
    pub delimiter: String,
    /// The column of a rolling task.
    pub text: Option<String>,
    #[serde(default)]
    pub rewrite: Vec<Rewrite>,
    pub metrics: Vec<Metric>,
    /// What a person should know about its data.
    pub note: Option<String>,
}

fn blank() -> String {
    " ".to_owned()
}

impl Definition {
    /// The split that is measured, and its role.
    pub(crate) fn measured_split(&self) -> Option<&str> {
        self.test.as_deref().or(self.validation.as_deref())
    }

    /// The split that examples come from, without a request of the user.
    pub(crate) fn examples_split(&self) -> Option<&str> {
        let splits = [&self.fewshot_split, &self.train, &self.validation, &self.test];
        splits.into_iter().find_map(Option::as_deref)
    }
}

/// Tasks that are asked for together.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Group {
    pub name: String,
    pub alias: Option<String>,
    #[serde(default)]
    pub version: u32,
    /// The name of a task, with `{config}` in it.
    pub task: Option<String>,
    /// The parts of the data set, each of which is a task of its own.
    #[serde(default)]
    pub configs: Vec<String>,
    #[serde(default)]
    pub groups: Vec<String>,
    #[serde(default)]
    pub tasks: Vec<String>,
    /// The metric that the group has, too: the mean over all rows of its tasks.
    pub aggregate: Option<Metric>,
    /// What a person should know about the group.
    pub note: Option<String>,
    /// Tasks and groups that are asked about in ways of their own.
    #[serde(default)]
    pub entries: Vec<Entry>,
}

/// A published set of commands, for `--suite`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Suite {
    pub name: String,
    pub note: Option<String>,
    pub entries: Vec<Entry>,
}

/// A task or group within a group or suite.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    /// The name of the task or group.
    pub name: String,
    pub shots: usize,
    pub fewshot_split: Option<String>,
    /// The metric that enters the suite's average.
    pub metric: Option<Metric>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    task: Vec<Table>,
    #[serde(default)]
    group: Vec<Table>,
    #[serde(default)]
    suite: Vec<Suite>,
}

/// All tasks and groups of one revision, by name.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    pub(crate) tasks: BTreeMap<String, Arc<Definition>>,
    pub(crate) groups: BTreeMap<String, Arc<Group>>,
    pub(crate) suites: BTreeMap<String, Arc<Suite>>,
    /// Names in the order of their files.
    pub(crate) order: Vec<String>,
}

impl Catalogue {
    /// The built-in tasks.
    pub fn built_in(revision: Revision) -> Self {
        static CURRENT: LazyLock<Catalogue> = LazyLock::new(|| read_built_in(Revision::Current));
        static DC90FEC: LazyLock<Catalogue> = LazyLock::new(|| read_built_in(Revision::Dc90fec));
        match revision {
            Revision::Current => CURRENT.clone(),
            Revision::Dc90fec => DC90FEC.clone(),
        }
    }

    /// The built-in tasks, and those of the files `include`.
    ///
    /// # Errors
    /// [`EvaluatorError::Tasks`] if a file cannot be read or is no valid definition, or a name is taken.
    pub fn including(include: &[PathBuf], revision: Revision) -> Result<Self, EvaluatorError> {
        let mut catalogue = Self::built_in(revision);
        for path in include {
            let file = path.display().to_string();
            let text = std::fs::read_to_string(path).map_err(|error| EvaluatorError::Tasks {
                file: file.clone(),
                problem: format!("cannot be read: {error}"),
            })?;
            catalogue.add(&file, &text, revision)?;
        }
        Ok(catalogue)
    }

    /// Adds the tasks and groups of a file.
    ///
    /// # Errors
    /// [`EvaluatorError::Tasks`] if the file is no valid definition, or a name is taken.
    pub fn add(&mut self, file: &str, text: &str, revision: Revision) -> Result<(), EvaluatorError> {
        let wrong = |problem: String| EvaluatorError::Tasks { file: file.to_owned(), problem };
        let File { task, group, suite } = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
        let mut templates: BTreeMap<String, Table> = BTreeMap::new();
        for table in task {
            let name = table.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
            let table = match table.get("like") {
                None => table,
                Some(other) => {
                    let other = other.as_str().unwrap_or_default();
                    let base = templates.get(other);
                    let base =
                        base.ok_or_else(|| wrong(format!("{name} is like {other}, which is not above it")))?;
                    overlaid(base.clone(), table)
                }
            };
            templates.insert(name.clone(), table.clone());
            if !name.contains("{config}") {
                self.define(&name, table, revision).map_err(wrong)?;
            }
        }
        for table in group {
            let group: Group = of_revision(table, revision)
                .and_then(|table| Value::Table(table).try_into())
                .map_err(|error| wrong(error.to_string()))?;
            if let Some(problem) = group_problem(&group) {
                return Err(wrong(format!("{}: {problem}", group.name)));
            }
            if let Some(template) = &group.task {
                let table = templates.get(template);
                let table = table
                    .ok_or_else(|| wrong(format!("{} is of {template}, which is no task", group.name)))?;
                for config in &group.configs {
                    let name = template.replace("{config}", config);
                    let mut table = table.clone();
                    table.insert("name".to_owned(), name.clone().into());
                    table.insert("config".to_owned(), config.clone().into());
                    if group.aggregate.is_some() {
                        table.insert("alias".to_owned(), config.clone().into());
                    }
                    self.define(&name, table, revision).map_err(wrong)?;
                }
            }
            let unknown =
                |name: &&String| !self.tasks.contains_key(*name) && !self.groups.contains_key(*name);
            let mut members =
                group.tasks.iter().chain(&group.groups).chain(group.entries.iter().map(|entry| &entry.name));
            if let Some(missing) = members.find(unknown) {
                return Err(wrong(format!("{} has {missing}, which is not above it", group.name)));
            }
            if let Some(problem) = self.members_problem(&group) {
                return Err(wrong(format!("{}: {problem}", group.name)));
            }
            self.claim(&group.name).map_err(wrong)?;
            self.groups.insert(group.name.clone(), Arc::new(group));
        }
        for suite in suite {
            let known =
                |entry: &Entry| self.tasks.contains_key(&entry.name) || self.groups.contains_key(&entry.name);
            if let Some(entry) = suite.entries.iter().find(|entry| !known(entry)) {
                return Err(wrong(format!("{} has {}, which is not above it", suite.name, entry.name)));
            }
            if suite.entries.is_empty() {
                return Err(wrong(format!("suite {} has no `entries`", suite.name)));
            }
            let lacks =
                |entry: &&Entry| entry.metric.is_some_and(|metric| !self.has_metric(&entry.name, metric));
            if let Some(Entry { name, metric: Some(metric), .. }) = suite.entries.iter().find(lacks) {
                return Err(wrong(format!(
                    "{} wants {} of {name}, which does not have it",
                    suite.name,
                    metric.name()
                )));
            }
            if self.suites.contains_key(&suite.name) {
                return Err(wrong(format!("there are two suites of the name {}", suite.name)));
            }
            self.suites.insert(suite.name.clone(), Arc::new(suite));
        }
        Ok(())
    }

    fn define(&mut self, name: &str, mut table: Table, revision: Revision) -> Result<(), String> {
        table.remove("like");
        let definition: Result<Definition, _> =
            of_revision(table, revision).and_then(|table| Value::Table(table).try_into());
        let definition = definition.map_err(|error| format!("{name}: {error}"))?;
        if let Some(problem) = problem(&definition) {
            return Err(format!("{name}: {problem}"));
        }
        self.claim(name)?;
        self.tasks.insert(name.to_owned(), Arc::new(definition));
        Ok(())
    }

    fn claim(&mut self, name: &str) -> Result<(), String> {
        // Names are listed with commas, matched by patterns, and part of the names of files.
        let is_plain = |c: char| c.is_alphanumeric() || "_-.:".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(is_plain) {
            return Err(format!("{name:?} is no name: use letters, digits, `_`, `-`, `.` and `:`"));
        }
        if name == PERPLEXITY {
            return Err(format!("{PERPLEXITY} measures your own texts; give the task another name"));
        }
        if self.tasks.contains_key(name) || self.groups.contains_key(name) {
            return Err(format!("there are two of the name {name}"));
        }
        self.order.push(name.to_owned());
        Ok(())
    }

    /// What is wrong with the members of a group, all of which there are.
    fn members_problem(&self, group: &Group) -> Option<String> {
        if let Some(task) = group.groups.iter().find(|name| self.tasks.contains_key(*name)) {
            return Some(format!("{task} is a task; name it in `tasks`"));
        }
        if let Some(inner) = group.tasks.iter().find(|name| self.groups.contains_key(*name)) {
            return Some(format!("{inner} is a group; name it in `groups`"));
        }
        let leaves = self.leaves(group);
        if leaves.is_empty() && group.entries.is_empty() {
            return Some("it has no tasks".to_owned());
        }
        let metric = group.aggregate?;
        let task = leaves.iter().find(|name| !self.tasks[*name].metrics.contains(&metric))?;
        Some(format!("`aggregate` is {}, which {task} does not have", metric.name()))
    }

    /// Whether a task or a group has a number of a kind.
    fn has_metric(&self, name: &str, metric: Metric) -> bool {
        match self.tasks.get(name) {
            Some(task) => task.metrics.contains(&metric),
            None => self.groups.get(name).is_some_and(|group| group.aggregate == Some(metric)),
        }
    }

    /// The names of all tasks of a group and the groups in it, in order.
    pub(crate) fn leaves(&self, group: &Group) -> Vec<String> {
        let of_groups = group.groups.iter().flat_map(|name| self.leaves(&self.groups[name]));
        of_groups.chain(Self::own_tasks(group)).collect()
    }

    /// The names of the tasks that a group has itself.
    pub(crate) fn own_tasks(group: &Group) -> Vec<String> {
        let of_configs = group
            .configs
            .iter()
            .map(|config| group.task.as_deref().unwrap_or_default().replace("{config}", config));
        of_configs.chain(group.tasks.iter().cloned()).collect()
    }
}

fn read_built_in(revision: Revision) -> Catalogue {
    let mut catalogue = Catalogue::default();
    catalogue.add("the built-in tasks", BUILT_IN, revision).expect("a test reads them");
    catalogue
}

/// `base` with the entries of `over` in place of its own.
fn overlaid(mut base: Table, over: Table) -> Table {
    // What another revision does differently is not inherited by halves.
    base.remove("dc90fec");
    base.extend(over);
    base
}

/// A table as a revision has it.
fn of_revision(mut table: Table, revision: Revision) -> Result<Table, toml::de::Error> {
    let earlier = table.remove("dc90fec");
    match (revision, earlier) {
        (Revision::Dc90fec, Some(earlier)) => Ok(overlaid(table, earlier.try_into()?)),
        _ => Ok(table),
    }
}

/// What is wrong with a group.
fn group_problem(group: &Group) -> Option<&'static str> {
    if !group.entries.is_empty() && group.aggregate.is_some() {
        return Some("`entries` are not summed up, so it has no `aggregate`");
    }
    (group.task.is_some() == group.configs.is_empty()).then_some("`task` and `configs` belong together")
}

/// What keys a definition lacks, or has in vain.
fn problem(task: &Definition) -> Option<&'static str> {
    let rolling = task.kind == Kind::Rolling;
    if task.sources.is_empty() || task.sources.iter().any(String::is_empty) {
        return Some("`sources` names no data set");
    }
    if [&task.test, &task.validation, &task.train, &task.fewshot_split]
        .iter()
        .any(|split| split.as_deref() == Some(""))
    {
        return Some("a split has no name");
    }
    if !task.version.is_finite() {
        return Some("`version` is no number");
    }
    if (1..task.metrics.len()).any(|index| task.metrics[..index].contains(&task.metrics[index])) {
        return Some("`metrics` has one of them twice");
    }
    if task.measured_split().is_none() {
        return Some("neither `test` nor `validation` names a split");
    }
    if rolling != task.text.is_some() || (!rolling && !task.rewrite.is_empty()) {
        return Some("`text` and `rewrite` belong to kind = \"rolling\", and it needs `text`");
    }
    if task.metrics.is_empty() || task.metrics.iter().any(|metric| metric.is_of_text() != rolling) {
        return Some("`metrics` are not those of this kind of task");
    }
    let is_wrong =
        |step: &Rewrite| matches!(step, Rewrite::Pattern { pattern, .. } if Regex::new(pattern).is_err());
    if task.rewrite.iter().any(is_wrong) {
        return Some("a pattern of `rewrite` is no regular expression");
    }
    if rolling {
        return None;
    }
    match (&task.context, &task.contexts, &task.continuation, &task.choices) {
        (Some(_), None, None, Some(_)) | (None, Some(_), Some(_), None) => {}
        _ => return Some("it needs `context` and `choices`, or `contexts` and `continuation`"),
    }
    task.gold.is_none().then_some("it needs `gold`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_tasks_are_valid() {
        for revision in [Revision::Current, Revision::Dc90fec] {
            let mut catalogue = Catalogue::default();
            catalogue.add("built_in.toml", BUILT_IN, revision).unwrap();
            assert_eq!(catalogue.leaves(&catalogue.groups["mmlu"]).len(), 57);
            assert_eq!(catalogue.tasks.len(), 15 + 57 + 8);
        }
        let current = Catalogue::built_in(Revision::Current);
        let earlier = Catalogue::built_in(Revision::Dc90fec);
        assert_ne!(current.tasks["race"].context, earlier.tasks["race"].context);
        assert_eq!(current.tasks["truthfulqa_mc2"].context, current.tasks["truthfulqa_mc1"].context);
    }

    #[test]
    fn a_definition_with_a_mistake_is_refused_with_its_name() {
        let whole = "[[task]]\nname = \"t\"\nversion = 1.0\nsources = [\"a/b\"]\ntest = \"test\"\nmetrics = [\"acc\"]\n";
        let asks = "context = \"{{ q }}\"\nchoices = \"c\"\ngold = \"g\"\n";
        let add = |text: &str| Catalogue::default().add("mine.toml", text, Revision::Current);
        add(&[whole, asks].concat()).unwrap();
        for (text, words) in [
            (whole.to_owned(), "`context` and `choices`"),
            ([whole, asks, "chioces = \"c\"\n"].concat(), "chioces"),
            ([whole, asks, whole, asks].concat(), "two of the name t"),
            ([&whole.replace("\"t\"", "\"../t\""), asks].concat(), "is no name"),
            ([&whole.replace("test = \"test\"\n", ""), asks].concat(), "names a split"),
            ([whole, asks, "text = \"page\"\n"].concat(), "rolling"),
            ("[[group]]\nname = \"g\"\ntasks = [\"t\"]\n".to_owned(), "g has t"),
        ] {
            let error = add(&text).unwrap_err().to_string();
            assert!(error.contains("mine.toml") && error.contains(words), "{error}");
        }
    }
}
