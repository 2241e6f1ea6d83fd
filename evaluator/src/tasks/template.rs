//! The language of templates and expressions in task definitions: minijinja's, with Python's rules for strings.

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};

use crate::python::{literal, string};

/// The filters of all tasks.
static BASE: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut environment = Environment::empty();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
    environment.set_syntax(syntax.expect("the syntax is the usual one"));
    environment.add_filter("map", minijinja::filters::map);
    environment.add_filter("list", minijinja::filters::list);
    environment.add_filter("int", minijinja::filters::int);
    environment.add_filter("last", minijinja::filters::last);
    environment.add_filter("length", minijinja::filters::length);
    environment.add_filter("replace", minijinja::filters::replace);
    environment.add_filter("strip", |text: &str| string::strip(text).to_owned());
    environment.add_filter("lstrip", |text: &str| string::lstrip(text).to_owned());
    environment.add_filter("capitalize", |text: &str| string::capitalize(text));
    environment.add_filter("without_wikihow_marks", |text: &str| without_wikihow_marks(text));
    environment.add_filter("before", |text: &str, mark: &str| {
        around(text, mark).map(|(before, _)| before.to_owned())
    });
    environment
        .add_filter("after", |text: &str, mark: &str| around(text, mark).map(|(_, after)| after.to_owned()));
    environment.add_filter("index", index);
    environment.add_filter("first_four", |list: Vec<Value>| match &list[..] {
        [a, b, c, d, ..] => Ok(vec![a.clone(), b.clone(), c.clone(), d.clone()]),
        _ => Err(invalid(format!("there are {} options, not 4", list.len()))),
    });
    environment.add_filter("equals", |a: Value, b: Value| a == b);
    environment.add_filter("before_first_false", before_first_false);
    environment.add_filter("python_literal", |text: &str| {
        literal::parse(text)
            .map(|value| Value::from(Serde(value)))
            .map_err(|problem| invalid(format!("no Python literal: {problem}")))
    });
    environment.add_filter("adapter_answers", |text: &str| adapter_answers(text));
    environment
});

/// An environment with the filters of all tasks.
pub(super) fn environment() -> Environment<'static> {
    BASE.clone()
}

fn invalid(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.into())
}

/// What is before and after the first mark of a text.
fn around<'a>(text: &'a str, mark: &str) -> Result<(&'a str, &'a str), Error> {
    text.split_once(mark).ok_or_else(|| invalid(format!("there is no {mark:?} in {text:?}")))
}

/// The index of an element of a list. That there is none is an error, as in Python.
fn index(among: &Value, what: &Value) -> Result<usize, Error> {
    let found = among.try_iter()?.position(|element| element == *what);
    found.ok_or_else(|| invalid(format!("{what:?} is not among {among:?}")))
}

/// Booleans of which all before the first false one stay true.
fn before_first_false(flags: &Value) -> Result<Vec<bool>, Error> {
    let mut so_far = true;
    let flags = flags.try_iter()?.map(|flag| {
        so_far &= flag.is_true();
        so_far
    });
    Ok(flags.collect())
}

/// A text of HellaSwag without what WikiHow's pages leave in it.
fn without_wikihow_marks(text: &str) -> String {
    let text = string::strip(text).replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(begin) = rest.find('[') {
        // A mark ends in its line; without an end it is text.
        let line = &rest[begin..][..rest[begin..].find('\n').unwrap_or(rest.len() - begin)];
        let end = line.find(']').map_or(begin + 1, |end| begin + end + 1);
        kept.push_str(if end == begin + 1 { &rest[..end] } else { &rest[..begin] });
        rest = &rest[end..];
    }
    kept.push_str(rest);
    kept.replace("  ", " ")
}

/// The possible answers to an instruction of LLM-Adapters, which its last line names: `true/false`, or numbered ones up to
/// the line's last digit.
fn adapter_answers(instruction: &str) -> Result<Vec<String>, Error> {
    let line = instruction.lines().next_back().unwrap_or_default();
    if line.contains("true/false") {
        return Ok(vec!["true".to_owned(), "false".to_owned()]);
    }
    let word = ["answer", "ending", "option", "solution"]
        .into_iter()
        .find(|word| line.contains(&format!("{word}1")));
    let most = line.chars().rev().find_map(|character| character.to_digit(10));
    match (word, most) {
        (Some(word), Some(most)) => Ok((1..=most).map(|number| format!("{word}{number}")).collect()),
        _ => Err(invalid(format!("the last line names no answers: {line:?}"))),
    }
}

/// What a value is, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "nothing",
        ValueKind::None => "null",
        ValueKind::Bool => "a boolean",
        ValueKind::Number => "a number",
        ValueKind::String => "text",
        ValueKind::Seq | ValueKind::Iterable => "a list",
        ValueKind::Map => "a struct",
        _ => "something else",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_removed_in_their_order() {
        for (text, clean) in [
            (" [header] How to [title] Begin here [step]  Then ", " How to. Begin here  Then"),
            ("three   blanks", "three  blanks"),
            ("a [b\nc] d [e] f", "a [b\nc] d f"),
            ("[ no end", "[ no end"),
            ("[a] [b", " [b"),
        ] {
            assert_eq!(without_wikihow_marks(text), clean, "{text:?}");
        }
    }

    #[test]
    fn answers_of_adapters_are_those_of_the_last_line() {
        let answers = |text| adapter_answers(text).unwrap();
        assert_eq!(answers("Is it?\n\nAnswer format: true/false"), ["true", "false"]);
        assert_eq!(answers("x\nAnswer format: solution1/solution2"), ["solution1", "solution2"]);
        assert_eq!(answers("Answer format: ending1/ending2/ending3/ending4").len(), 4);
        assert!(adapter_answers("nothing").is_err());
    }
}
