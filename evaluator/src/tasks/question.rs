//! From a row to what the model is asked: contexts, continuations, and which of them is right.

use std::sync::Arc;

use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use regex::{NoExpand, Regex};
use serde::Deserialize;

use super::definition::{Definition, Rewrite};
use super::template::{environment, kind};
use crate::python::string::strip;

/// A row of a multiple-choice task.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Question {
    /// The row with the columns that the task computes.
    pub row: Value,
    pub asked: Asked,
    /// Index of the right choice.
    pub gold: usize,
    /// Which choices are true, if the task has several true ones.
    pub mass: Option<Vec<bool>>,
}

/// What differs between the choices of a question.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Asked {
    /// One context, several continuations.
    Continuations { context: String, choices: Vec<String> },
    /// Several contexts, one continuation.
    Contexts { contexts: Vec<String>, continuation: String },
}

/// The templates and expressions of a task.
#[derive(Debug)]
pub(crate) struct Asker {
    task: Arc<Definition>,
    environment: Environment<'static>,
    description: String,
}

impl Asker {
    /// # Errors
    /// What is wrong with a template or an expression, and its key.
    pub(crate) fn new(task: Arc<Definition>) -> Result<Self, String> {
        let mut environment = environment();
        environment.add_global("config", task.config.clone());
        let templates = [
            ("description", Some(&task.description)),
            ("context", task.context.as_ref()),
            ("continuation", task.continuation.as_ref()),
            ("choice", task.choice.as_ref()),
        ];
        for (key, template) in templates {
            if let Some(template) = template {
                environment.add_template_owned(key, template.clone()).map_err(|error| in_key(key, &error))?;
            }
        }
        let columns = task.columns.iter().map(|(name, expression)| (name.as_str(), Some(expression)));
        let expressions = [
            ("contexts", task.contexts.as_ref()),
            ("choices", task.choices.as_ref()),
            ("gold", task.gold.as_ref()),
            ("mass", task.mass.as_ref()),
        ];
        for (key, expression) in columns.chain(expressions) {
            if let Some(expression) = expression {
                environment
                    .compile_expression_owned(expression.to_owned())
                    .map_err(|error| in_key(key, &error))?;
            }
        }
        let description = render(&environment, "description", &Value::from(()))
            .map_err(|error| in_key("description", &error))?;
        Ok(Self { task, environment, description })
    }

    /// What stands before the examples.
    pub(crate) fn description(&self) -> &str {
        &self.description
    }

    /// Asks about a row.
    ///
    /// # Errors
    /// The key of the definition that does not fit the row, and what was found.
    pub(crate) fn question(&self, row: &Value) -> Result<Question, String> {
        let task = &self.task;
        let row = self.with_columns(row)?;
        let asked = match (&task.context, &task.contexts) {
            (Some(_), _) => {
                Asked::Continuations { context: self.render("context", &row)?, choices: self.choices(&row)? }
            }
            (None, contexts) => Asked::Contexts {
                contexts: self.texts("contexts", contexts.as_deref().unwrap_or_default(), &row)?,
                continuation: self.render("continuation", &row)?,
            },
        };
        let found = self.value("gold", task.gold.as_deref().unwrap_or_default(), &row)?;
        let count = asked.count();
        if count != 2 && task.metrics.iter().any(|metric| metric.is_of_pairs()) {
            return Err(format!("there are {count} choices, and its metrics compare 2"));
        }
        let gold = usize::try_from(found.clone()).ok().filter(|gold| *gold < count);
        let gold = gold.ok_or_else(|| format!("`gold` is {found:?}, and there are {count} choices"))?;
        let mass = match &task.mass {
            None => None,
            Some(expression) => {
                let value = self.value("mass", expression, &row)?;
                let flags = Vec::<bool>::deserialize(value.clone()).ok().filter(|flags| flags.len() == count);
                Some(flags.ok_or_else(|| format!("`mass` is {value}, and there are {count} choices"))?)
            }
        };
        Ok(Question { row, asked, gold, mass })
    }

    fn choices(&self, row: &Value) -> Result<Vec<String>, String> {
        let choices = self.texts("choices", self.task.choices.as_deref().unwrap_or_default(), row)?;
        if choices.is_empty() {
            return Err("`choices` is empty".to_owned());
        }
        if self.task.choice.is_none() {
            return Ok(choices);
        }
        let as_asked = |choice: String| {
            let row = minijinja::context! { choice };
            render(&self.environment, "choice", &row).map_err(|error| in_key("choice", &error))
        };
        choices.into_iter().map(as_asked).collect()
    }

    /// The row with the columns that the task computes.
    fn with_columns(&self, row: &Value) -> Result<Value, String> {
        let mut row = row.clone();
        for (name, expression) in &self.task.columns {
            let value = self.value(name, expression, &row)?;
            let columns = row.try_iter().map_err(|error| in_key(name, &error))?;
            let mut columns: Vec<(Value, Value)> = columns
                .map(|name| row.get_item(&name).map(|value| (name, value)))
                .collect::<Result<_, _>>()
                .map_err(|error| in_key(name, &error))?;
            columns.retain(|(other, _)| other.as_str() != Some(name));
            columns.push((Value::from(name.as_str()), value));
            row = Value::from_pairs(columns);
        }
        Ok(row)
    }

    fn render(&self, key: &str, row: &Value) -> Result<String, String> {
        render(&self.environment, key, row).map_err(|error| in_row(key, &error, row))
    }

    fn value(&self, key: &str, expression: &str, row: &Value) -> Result<Value, String> {
        let compiled = self.environment.compile_expression_owned(expression.to_owned());
        let value = compiled.and_then(|compiled| compiled.eval(row));
        let value = value.map_err(|error| in_row(key, &error, row))?;
        if value.is_undefined() {
            return Err(format!("`{key}` ({expression}) has no value; {}", columns_of(row)));
        }
        Ok(value)
    }

    /// The value of an expression for a list of texts.
    fn texts(&self, key: &str, expression: &str, row: &Value) -> Result<Vec<String>, String> {
        let value = self.value(key, expression, row)?;
        // A text and a struct can be iterated over, too.
        let items = match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => value.try_iter().ok(),
            _ => None,
        };
        let items = items.ok_or_else(|| format!("`{key}` is {}, not a list of texts", kind(&value)))?;
        let text = |item: Value| {
            item.as_str()
                .map(str::to_owned)
                .ok_or_else(|| format!("`{key}` has {} among its texts", kind(&item)))
        };
        items.map(text).collect()
    }
}

impl Question {
    /// What the harness's samples call the target: the index of the right choice, or the continuation that all share.
    pub(crate) fn target(&self) -> String {
        match &self.asked {
            Asked::Continuations { .. } => self.gold.to_string(),
            Asked::Contexts { continuation, .. } => continuation.clone(),
        }
    }
}

impl Asked {
    /// Number of choices.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Continuations { choices, .. } => choices.len(),
            Self::Contexts { contexts, .. } => contexts.len(),
        }
    }

    /// The question with its right answer, as an example for others.
    pub(crate) fn example(&self, gold: usize, delimiter: &str) -> String {
        let (context, answer) = self.pair(gold);
        format!("{context}{delimiter}{answer}\n\n")
    }

    /// Context and continuation of a choice.
    pub(crate) fn pair(&self, choice: usize) -> (&str, &str) {
        match self {
            Self::Continuations { context, choices } => (context, &choices[choice]),
            Self::Contexts { contexts, continuation } => (&contexts[choice], continuation),
        }
    }

    /// What a per-character score of a choice is divided by: its length in Unicode code points.
    pub(crate) fn characters(&self, choice: usize) -> usize {
        self.pair(choice).1.chars().count()
    }
}

fn render(environment: &Environment<'_>, key: &str, row: &Value) -> Result<String, Error> {
    environment.get_template(key)?.render(row)
}

/// An error of the template language, for a person.
fn in_key(key: &str, error: &Error) -> String {
    let reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    format!("`{key}`: {reason}")
}

/// An error of the template language about a row. Where something is missing, it says what there is.
fn in_row(key: &str, error: &Error, row: &Value) -> String {
    match error.kind() {
        ErrorKind::UndefinedError => format!("{}; {}", in_key(key, error), columns_of(row)),
        _ => in_key(key, error),
    }
}

/// The columns of a row, for messages.
pub(super) fn columns_of(row: &Value) -> String {
    let names: Vec<String> = row.try_iter().into_iter().flatten().map(|name| name.to_string()).collect();
    format!("the row has the columns {}", names.join(", "))
}

/// The text of a rolling task, after its steps.
pub(crate) fn rewritten(text: &str, steps: &[Rewrite]) -> String {
    let mut text = text.to_owned();
    for step in steps {
        text = match step {
            Rewrite::Replace(from, to) => text.replace(from, to),
            Rewrite::Pattern { pattern, with } => {
                let pattern = Regex::new(pattern).expect("the definition was checked");
                pattern.replace_all(&text, NoExpand(with)).into_owned()
            }
            Rewrite::Within { within } => {
                let mut pair = within.chars();
                match (pair.next(), pair.next()) {
                    (Some(open), Some(close)) => closed_up(&text, open, close),
                    _ => text,
                }
            }
        };
    }
    text
}

/// The text without blanks just inside a pair of characters.
fn closed_up(text: &str, open: char, close: char) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, inside)) = rest.split_once(open) {
        let Some((inside, after)) = inside.split_once(close) else { break };
        out.push_str(before);
        out.push(open);
        out.push_str(strip(inside));
        out.push(close);
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_inside_pairs_are_removed() {
        assert_eq!(closed_up("a ( b ) (c( d ) e", '(', ')'), "a (b) (c( d) e");
        assert_eq!(closed_up("say \" so \" and \" on", '"', '"'), "say \"so\" and \" on");
    }
}
