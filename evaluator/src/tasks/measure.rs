//! Measures a model on one task: asks about its rows, and counts the answers.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use minijinja::value::Value;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::counted;

use super::definition::{Definition, Kind, Revision};
use super::examples::Examples;
use super::metric::{Estimate, Metric, argmax, mean, per_unit};
use super::question::{Asker, Question, columns_of, rewritten};
use super::rows::{DataSets, Split};
use super::run::TaskPlan;
use super::scorer::{Batching, Likelihood};
use super::tokens::{Encoding, Request};
use super::tree::Forest;
use crate::error::EvaluatorError;
use crate::python::random::Random;
use crate::python::string::words;

/// How many rows of a task are used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// The first so many.
    Rows(usize),
    /// The first part of them, rounded up.
    Share(f64),
}

/// How tasks are measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Examples before each question.
    pub shots: Option<usize>,
    /// The split of the examples.
    pub fewshot_split: Option<String>,
    /// Rows that are used; all by default.
    pub limit: Option<Limit>,
    /// The most tokens that the model reads.
    pub context: usize,
    /// Whether texts begin with BOS.
    pub add_bos: bool,
    /// Whose numbers are met.
    pub revision: Revision,
    /// Of the examples.
    pub seed: u64,
}

/// A task with all that the model is asked.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub task: Arc<Definition>,
    pub shots: usize,
    /// The most tokens that the model reads.
    pub context: usize,
    /// Rows of the split, of which the first ones are used.
    pub rows_of_split: usize,
    pub rows: Vec<Row>,
    pub requests: Vec<Request>,
    /// Rows in whose texts a control token was written out.
    pub written_out: usize,
    /// Requests whose beginning was cut off.
    pub truncated: usize,
}

/// A row with what the model is asked about it.
#[derive(Debug)]
pub(crate) struct Row {
    pub number: usize,
    pub content: Content,
    /// Its requests.
    pub requests: Range<usize>,
}

#[derive(Debug)]
pub(crate) enum Content {
    /// A question, and what stands before each of its contexts.
    Question {
        question: Question,
        before: String,
    },
    Text {
        row: Value,
        original: String,
        text: String,
    },
}

/// What a task found.
#[derive(Debug)]
pub(crate) struct Measured {
    /// Of each row, in the order of the task's metrics; none for rolling tasks.
    pub of_rows: Vec<Vec<f64>>,
    pub metrics: Vec<(Metric, Estimate)>,
}

impl Prepared {
    /// Reads the rows of a task and asks about them.
    ///
    /// # Errors
    /// When rows are missing or are not as the task expects them, or there are too few examples.
    pub(crate) fn new(
        task: &Arc<Definition>,
        data: &DataSets,
        tokenizer: &Tokenizer,
        settings: &Settings,
    ) -> Result<Self, EvaluatorError> {
        let in_file = |problem| EvaluatorError::Tasks { file: task.name.clone(), problem };
        let asker = Asker::new(Arc::clone(task)).map_err(in_file)?;
        let split = data.read(task, task.measured_split().unwrap_or_default())?;
        let mut order: Vec<usize> = (0..split.rows.len()).collect();
        if let Some(seed) = task.shuffle {
            Random::new(seed).shuffle(&mut order);
        }
        let rows_of_split = split.rows.len();
        let used = match settings.limit {
            None => rows_of_split,
            Some(Limit::Rows(rows)) => rows.min(rows_of_split),
            Some(Limit::Share(share)) => ((rows_of_split as f64 * share).ceil() as usize).min(rows_of_split),
        };
        let shots = shots_of(task, settings);
        let mut examples = Self::examples(task, data, settings)?;
        let mut encoding = Encoding::new(tokenizer, settings.add_bos, settings.context, settings.revision);
        let mut prepared = Self {
            task: Arc::clone(task),
            shots,
            context: settings.context,
            rows_of_split,
            rows: Vec::with_capacity(used),
            requests: Vec::new(),
            written_out: 0,
            truncated: 0,
        };
        // Examples as they stand before questions, by their numbers in the pool.
        let mut told: BTreeMap<usize, String> = BTreeMap::new();
        for (number, index) in order.into_iter().take(used).enumerate() {
            let row = &split.rows[index];
            let wrong = |problem: String| split.wrong(task, index, &problem);
            let first = prepared.requests.len();
            let content = if task.kind == Kind::Rolling {
                let content = text_of(task, row).map_err(wrong)?;
                if let Content::Text { text, .. } = &content {
                    prepared.requests.extend(encoding.rolling(text));
                }
                content
            } else {
                let question = asker.question(row).map_err(wrong)?;
                let mut before = asker.description().to_owned();
                if let Some(examples) = &mut examples {
                    let drawn = examples.draw(row);
                    for index in &drawn {
                        if !told.contains_key(index) {
                            let example = asker.question(examples.row(*index));
                            let example =
                                example.map_err(|problem| examples.pool().wrong(task, *index, &problem))?;
                            told.insert(*index, example.asked.example(example.gold, &task.delimiter));
                        }
                        before.push_str(&told[index]);
                    }
                    if drawn.is_empty() && settings.revision == Revision::Dc90fec {
                        // What joined the examples is there even where none is left.
                        before.push_str("\n\n");
                    }
                }
                for choice in 0..question.asked.count() {
                    let (context, continuation) = asked(task, &question, &before, choice);
                    let request = encoding.continuation(&context, &continuation).map_err(|tokens| {
                        wrong(format!(
                            "choice {choice} ({continuation:?}) has {tokens} tokens, and a choice has from 1 to {}",
                            settings.context
                        ))
                    })?;
                    prepared.requests.push(request);
                }
                Content::Question { question, before }
            };
            prepared.written_out += usize::from(std::mem::take(&mut encoding.written_out));
            prepared.rows.push(Row { number, content, requests: first..prepared.requests.len() });
        }
        prepared.truncated = encoding.truncated;
        if task.kind == Kind::Rolling && prepared.units(&str::len) == 0 {
            let rows = counted(prepared.rows.len(), "row");
            let problem = format!("the first {rows} of {} have no text; use a larger --limit", split.place());
            return Err(EvaluatorError::NoRows { task: task.name.clone(), split: split.name, problem });
        }
        Ok(prepared)
    }

    /// What examples are drawn from, if any are asked for.
    ///
    /// # Errors
    /// When there are too few rows.
    pub(crate) fn examples(
        task: &Definition,
        data: &DataSets,
        settings: &Settings,
    ) -> Result<Option<Examples>, EvaluatorError> {
        let shots = shots_of(task, settings);
        if shots == 0 {
            return Ok(None);
        }
        let named = settings.fewshot_split.as_deref();
        let split = named.or(task.examples_split()).unwrap_or_default();
        let pool: Split = data.read(task, split)?;
        Examples::new(task, pool, shots, named, settings.seed, settings.revision).map(Some)
    }

    /// What a model would be asked.
    pub(crate) fn plan(&self, batching: Batching) -> TaskPlan {
        let requests: Vec<&Request> = self.requests.iter().collect();
        let forest = Forest::new(&requests);
        let read = |request: &Request| request.ids.len() - 1;
        let prompts = match self.rows.first().map(|row| &row.content) {
            Some(Content::Question { question, before }) => (0..question.asked.count())
                .map(|choice| asked(&self.task, question, before, choice))
                .collect(),
            Some(Content::Text { text, .. }) => vec![(String::new(), text.clone())],
            None => Vec::new(),
        };
        let texts = batching.texts(&requests, &forest);
        let longest = self.requests.iter().map(read).max().unwrap_or(0);
        TaskPlan {
            task: self.task.name.clone(),
            rows: self.rows.len(),
            shots: self.shots,
            requests: self.requests.len(),
            tokens: self.requests.iter().map(read).sum(),
            read: forest.rows(),
            texts,
            longest,
            notes: self.notes(),
            prompts,
        }
    }

    /// What a person should know about the requests.
    pub(crate) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.truncated > 0 {
            notes.push(format!(
                "{} of {} requests are longer than {} tokens, and lost their beginning",
                self.truncated,
                self.requests.len(),
                self.context
            ));
        }
        if self.written_out > 0 {
            notes.push(format!(
                "in {} rows a control token such as <s> is written out, and read as that token, as Hugging Face's tokenizers do",
                self.written_out
            ));
        }
        notes
    }

    /// How many words, or bytes, the texts of a rolling task have.
    fn units(&self, of: &dyn Fn(&str) -> usize) -> usize {
        let originals = self.rows.iter().map(|row| match &row.content {
            Content::Text { original, .. } => of(original),
            Content::Question { .. } => 0,
        });
        originals.sum()
    }

    /// Counts the answers: the likelihood of each request.
    pub(crate) fn count(&self, likelihoods: &[Likelihood]) -> Measured {
        let log_likelihoods = |row: &Row| -> Vec<f64> {
            likelihoods[row.requests.clone()].iter().map(|likelihood| likelihood.log_likelihood).collect()
        };
        if self.task.kind == Kind::Rolling {
            let total: f64 = self.rows.iter().map(|row| log_likelihoods(row).iter().sum::<f64>()).sum();
            let estimate = |metric: &Metric| {
                let units = self.units(if *metric == Metric::WordPerplexity { &words } else { &str::len });
                (*metric, Estimate { value: per_unit(*metric, total, units as f64), stderr: None })
            };
            return Measured {
                of_rows: Vec::new(),
                metrics: self.task.metrics.iter().map(estimate).collect(),
            };
        }
        let of_row = |row: &Row| match &row.content {
            Content::Question { question, .. } => {
                let lls = log_likelihoods(row);
                self.task.metrics.iter().map(|metric| judge(*metric, question, &lls)).collect()
            }
            Content::Text { .. } => Vec::new(),
        };
        let of_rows: Vec<Vec<f64>> = self.rows.iter().map(of_row).collect();
        let column = |index: usize| of_rows.iter().map(|values| values[index]).collect::<Vec<f64>>();
        let metrics = self.task.metrics.iter().enumerate();
        let metrics = metrics.map(|(index, metric)| (*metric, mean(&column(index)))).collect();
        Measured { of_rows, metrics }
    }
}

/// How many examples stand before each question. A text has none.
fn shots_of(task: &Definition, settings: &Settings) -> usize {
    if task.kind == Kind::Rolling { 0 } else { task.shots.or(settings.shots).unwrap_or(0) }
}

/// The whole context of a choice, and what follows it.
pub(super) fn asked(task: &Definition, question: &Question, before: &str, choice: usize) -> (String, String) {
    let (context, continuation) = question.asked.pair(choice);
    (format!("{before}{context}"), format!("{}{continuation}", task.delimiter))
}

/// What a metric says of one question, given the log-likelihoods of its choices.
fn judge(metric: Metric, question: &Question, log_likelihoods: &[f64]) -> f64 {
    let is_gold = |choice: usize| f64::from(u8::from(choice == question.gold));
    match (metric, &question.mass) {
        (Metric::Acc, Some(mass)) => {
            // Beside the likeliest, so that choices of many tokens have a share that is not rounded to nothing.
            let most = log_likelihoods.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let shares: Vec<f64> = log_likelihoods.iter().map(|ll| (ll - most).exp()).collect();
            let total: f64 = shares.iter().sum();
            shares.iter().zip(mass).filter(|(_, is_true)| **is_true).map(|(share, _)| share / total).sum()
        }
        (Metric::AccNorm, _) => {
            let per_character = |(choice, ll): (usize, &f64)| ll / question.asked.characters(choice) as f64;
            is_gold(argmax(&log_likelihoods.iter().enumerate().map(per_character).collect::<Vec<_>>()))
        }
        (Metric::LikelihoodDiff, _) => (log_likelihoods[0] - log_likelihoods[1]).abs(),
        (Metric::PctStereotype, _) => f64::from(u8::from(log_likelihoods[0] > log_likelihoods[1])),
        _ => is_gold(argmax(log_likelihoods)),
    }
}

/// The text of a row of a rolling task.
fn text_of(task: &Definition, row: &Value) -> Result<Content, String> {
    let column = task.text.as_deref().unwrap_or_default();
    let value = row.get_attr(column).ok().filter(|value| !value.is_undefined());
    let original = value.as_ref().and_then(Value::as_str);
    let original = original
        .ok_or_else(|| format!("it has no text in column {column:?}; {}", columns_of(row)))?
        .to_owned();
    let text = rewritten(&original, &task.rewrite);
    Ok(Content::Text { row: row.clone(), original, text })
}
