//! Measures a model on a selection of tasks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;
use ulmus_backend::Backend;
use ulmus_model::Model;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::Part;

use super::definition::{Definition, Entry, Revision};
use super::journal::Journal;
use super::measure::{Measured, Prepared, Settings};
use super::metric::{Estimate, Metric, pooled};
use super::report::{Outcome, samples};
use super::rows::DataSets;
use super::scorer::{Batching, Likelihood, score};
use super::select::{Item, Selection};
use super::tokens::Request;
use crate::error::EvaluatorError;

/// What happens while tasks are measured.
#[derive(Debug)]
pub enum Progress<'a> {
    /// The rows of all tasks are as they should be, and so many requests are not in the journal.
    Planned(usize),
    /// A task begins.
    Begun {
        /// Its name.
        task: &'a str,
        /// Things that a person should know about it.
        notes: Vec<String>,
    },
    /// So many more requests are answered.
    Answered(usize),
    /// A task is done.
    Done {
        /// Its name.
        task: &'a str,
        /// The lines of its samples file.
        samples: String,
    },
}

/// What a task would ask the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TaskPlan {
    /// Its name.
    pub task: String,
    /// Rows that are used.
    pub rows: usize,
    /// Examples before each question.
    pub shots: usize,
    /// Likelihoods that are asked for.
    pub requests: usize,
    /// Tokens of all requests.
    pub tokens: usize,
    /// Tokens that go through the model, where what requests have in common goes through it once.
    pub read: usize,
    /// The most tokens of a request.
    pub longest: usize,
    /// Texts that are remembered at once.
    pub texts: usize,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Contexts and continuations of the first row.
    pub prompts: Vec<(String, String)>,
}

/// A model, and how it is measured.
#[derive(Debug)]
pub struct Evaluation<'a, B: Backend> {
    /// The model.
    pub model: &'a Arc<Model<B>>,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Where rows are.
    pub data: &'a DataSets,
    /// What counts for all tasks.
    pub settings: &'a Settings,
    /// How much is computed at once.
    pub batching: Batching,
}

impl<B: Backend> Evaluation<'_, B> {
    /// Measures the model on all tasks of a selection, and sums up groups.
    ///
    /// # Errors
    /// When rows are missing or wrong, those of the device and of the journal, and those of `on_progress`.
    pub fn run(
        &self,
        selection: &Selection,
        journal: &mut Journal,
        on_progress: &mut dyn FnMut(Progress<'_>) -> Result<(), EvaluatorError>,
    ) -> Result<Vec<Outcome>, EvaluatorError> {
        let mut outcomes: Vec<Outcome> = Vec::new();
        let mut by_name: BTreeMap<String, Outcome> = BTreeMap::new();
        selection.look_for_rows(self.data, self.settings)?;
        // Wrong rows of the last task must not be found only after all others are measured. Rows are read and turned into tokens
        // twice for it, which takes seconds.
        let mut missing = 0;
        for item in &selection.items {
            let Item::Task { task, entry, .. } = item else { continue };
            let prepared = self.prepare(task, entry.as_ref())?;
            missing += prepared.requests.iter().filter(|request| journal.get(request).is_none()).count();
        }
        on_progress(Progress::Planned(missing))?;
        for item in &selection.items {
            let Item::Task { task, depth, entry } = item else { continue };
            let prepared = self.prepare(task, entry.as_ref())?;
            let (measured, likelihoods) = self.answer(&prepared, journal, on_progress)?;
            let (samples, hash) = samples(&prepared, &measured, &likelihoods);
            let outcome = Outcome { depth: *depth, ..Outcome::of_task(&prepared, &measured, hash) };
            on_progress(Progress::Done { task: &task.name, samples })?;
            by_name.insert(task.name.clone(), outcome);
        }
        for item in &selection.items {
            outcomes.push(match item {
                Item::Task { task, .. } => by_name[&task.name].clone(),
                Item::Group { group, depth, members, leaves } => {
                    let leaves: Vec<&Outcome> = leaves.iter().map(|name| &by_name[name]).collect();
                    let metrics = group.aggregate.map(|metric| (metric, pool(&leaves, metric)));
                    let of_members = members.iter().filter_map(|name| by_name.get(name)?.shots);
                    let shots: BTreeSet<usize> = of_members.collect();
                    Outcome {
                        name: group.name.clone(),
                        alias: group.alias.clone().unwrap_or_else(|| group.name.clone()),
                        version: group.version.to_string(),
                        // As in the harness, where the tasks that it has itself agree.
                        shots: shots.first().copied().filter(|_| shots.len() == 1),
                        rows: [0, 1].map(|index| leaves.iter().map(|task| task.rows[index]).sum()),
                        metrics: metrics.into_iter().collect(),
                        members: members.clone(),
                        config: serde_json::Value::Null,
                        hash: String::new(),
                        depth: *depth,
                    }
                }
            });
        }
        if self.settings.revision == Revision::Dc90fec {
            pool_by_groups(selection, &mut outcomes);
        }
        Ok(outcomes)
    }

    /// Asks a part of what [`Self::run`] would ask, which goes to the journal. Returns the number of answers.
    ///
    /// # Errors
    /// Those of [`Self::run`].
    pub fn answer_part(
        &self,
        selection: &Selection,
        part: Part,
        journal: &mut Journal,
        on_progress: &mut dyn FnMut(Progress<'_>) -> Result<(), EvaluatorError>,
    ) -> Result<u64, EvaluatorError> {
        let mut answers = 0;
        selection.look_for_rows(self.data, self.settings)?;
        for item in &selection.items {
            let Item::Task { task, entry, .. } = item else { continue };
            let prepared = self.prepare(task, entry.as_ref())?;
            // Requests about one row, and rows with the same examples, are next to each other.
            let asked: Vec<usize> = part.share(prepared.requests.len()).collect();
            answers += asked.len() as u64;
            self.ask(&prepared, &asked, journal, on_progress, &mut |_, _| {})?;
        }
        Ok(answers)
    }

    /// Reads the rows of a task, and asks about them in the way of its group.
    fn prepare(&self, task: &Arc<Definition>, entry: Option<&Entry>) -> Result<Prepared, EvaluatorError> {
        Prepared::new(task, self.data, self.tokenizer, &settings_of(self.settings, entry))
    }

    /// What each task of a selection would ask. The model is not asked.
    ///
    /// # Errors
    /// When rows are missing or wrong.
    pub fn plan(&self, selection: &Selection) -> Result<Vec<TaskPlan>, EvaluatorError> {
        let tasks = selection.items.iter().filter_map(|item| match item {
            Item::Task { task, entry, .. } => Some((task, entry.as_ref())),
            Item::Group { .. } => None,
        });
        tasks.map(|(task, entry)| Ok(self.prepare(task, entry)?.plan(self.batching))).collect()
    }

    /// The bytes that a task takes beside the weights: what is remembered of texts, activations and logits.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn memory(&self, task: &TaskPlan) -> Result<u64, EvaluatorError> {
        Ok(self.batching.generator(self.model, task.longest, task.texts)?.memory())
    }

    /// Asks the model what is not in the journal.
    fn answer(
        &self,
        prepared: &Prepared,
        journal: &mut Journal,
        on_progress: &mut dyn FnMut(Progress<'_>) -> Result<(), EvaluatorError>,
    ) -> Result<(Measured, Vec<Likelihood>), EvaluatorError> {
        let mut likelihoods: Vec<Option<Likelihood>> =
            prepared.requests.iter().map(|request| journal.get(request)).collect();
        let missing: Vec<usize> =
            (0..likelihoods.len()).filter(|index| likelihoods[*index].is_none()).collect();
        self.ask(prepared, &missing, journal, on_progress, &mut |index, likelihood| {
            likelihoods[index] = Some(likelihood);
        })?;
        let likelihoods: Vec<Likelihood> =
            likelihoods.into_iter().map(|one| one.expect("all are scored")).collect();
        Ok((prepared.count(&likelihoods), likelihoods))
    }

    /// Asks the model the requests with these numbers.
    fn ask(
        &self,
        prepared: &Prepared,
        asked: &[usize],
        journal: &mut Journal,
        on_progress: &mut dyn FnMut(Progress<'_>) -> Result<(), EvaluatorError>,
        on_answer: &mut dyn FnMut(usize, Likelihood),
    ) -> Result<(), EvaluatorError> {
        let requests: Vec<&Request> = asked.iter().map(|index| &prepared.requests[*index]).collect();
        let notes = prepared.notes();
        on_progress(Progress::Begun { task: &prepared.task.name, notes })?;
        score(self.model, self.batching, &requests, &mut |scored| {
            for (index, likelihood) in scored {
                if !likelihood.log_likelihood.is_finite() {
                    return Err(EvaluatorError::NotFinite { task: prepared.task.name.clone() });
                }
                on_answer(asked[*index], *likelihood);
            }
            journal.add(scored.iter().map(|(index, likelihood)| (requests[*index], *likelihood)))?;
            on_progress(Progress::Answered(scored.len()))
        })
    }
}

impl Selection {
    /// Looks for the files of all tasks, so that what is missing is told before anything is measured.
    ///
    /// # Errors
    /// [`EvaluatorError::NoRows`] for the first task without them.
    pub fn look_for_rows(&self, data: &DataSets, settings: &Settings) -> Result<(), EvaluatorError> {
        for item in &self.items {
            let Item::Task { task, entry, .. } = item else { continue };
            let settings = settings_of(settings, entry.as_ref());
            let shots = task.shots.or(settings.shots).unwrap_or(0);
            let examples = settings.fewshot_split.as_deref().or(task.examples_split());
            for split in [task.measured_split(), examples.filter(|_| shots > 0)].into_iter().flatten() {
                data.look_for(task, split)?;
            }
        }
        Ok(())
    }
}

impl Selection {
    /// Reads the rows of all tasks, and looks whether there are enough to draw examples from. The columns are looked at when the
    /// model's tokenizer is there.
    ///
    /// # Errors
    /// [`EvaluatorError::NoRows`] and [`EvaluatorError::Shots`] for the first task that has too few.
    pub fn read_rows(&self, data: &DataSets, settings: &Settings) -> Result<(), EvaluatorError> {
        for item in &self.items {
            let Item::Task { task, entry, .. } = item else { continue };
            let settings = settings_of(settings, entry.as_ref());
            data.read(task, task.measured_split().unwrap_or_default())?;
            Prepared::examples(task, data, &settings)?;
        }
        Ok(())
    }
}

/// What counts for a task of a group.
fn settings_of(settings: &Settings, entry: Option<&Entry>) -> Settings {
    let Some(entry) = entry else { return settings.clone() };
    Settings {
        // As in the harness, a group's examples can be changed, but not where it asks for none.
        shots: if entry.shots == 0 { Some(0) } else { settings.shots.or(Some(entry.shots)) },
        fewshot_split: settings.fewshot_split.clone().or_else(|| entry.fewshot_split.clone()),
        ..settings.clone()
    }
}

fn pool(members: &[&Outcome], metric: Metric) -> Estimate {
    let of = |outcome: &&Outcome| {
        let estimate = outcome.metrics.iter().find(|(other, _)| *other == metric);
        estimate.map(|(_, estimate)| (*estimate, outcome.rows[1]))
    };
    pooled(&members.iter().filter_map(of).collect::<Vec<_>>())
}

/// Earlier, a group of groups summed up these and not their tasks, which gives another standard error.
fn pool_by_groups(selection: &Selection, outcomes: &mut [Outcome]) {
    for item in &selection.items {
        let Item::Group { group, .. } = item else { continue };
        if group.groups.is_empty() {
            continue;
        }
        let members: Vec<Outcome> =
            outcomes.iter().filter(|outcome| group.groups.contains(&outcome.name)).cloned().collect();
        let estimate = pool(&members.iter().collect::<Vec<_>>(), group.aggregate.unwrap_or(Metric::Acc));
        if let Some(outcome) = outcomes.iter_mut().find(|outcome| outcome.name == group.name) {
            outcome.metrics[0].1 = estimate;
        }
    }
}

/// The average of a suite, if all of its numbers are there.
pub fn average(selection: &Selection, outcomes: &[Outcome]) -> Option<f64> {
    let values = selection.average.iter().map(|entry| {
        let outcome = outcomes.iter().find(|outcome| outcome.name == entry.name)?;
        let (_, estimate) = outcome.metrics.iter().find(|(metric, _)| Some(*metric) == entry.metric)?;
        Some(estimate.value)
    });
    let values: Vec<f64> = values.collect::<Option<_>>()?;
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
