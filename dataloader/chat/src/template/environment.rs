//! The language of chat templates: minijinja's, set up as transformers sets up Jinja.

use std::time::{SystemTime, UNIX_EPOCH};

use chrono::DateTime;
use chrono::format::StrftimeItems;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use minijinja_contrib::pycompat;

use super::python;

/// Stand before and after what the assistant says, while a template is rendered. Unicode keeps these two for such uses, so no
/// text has them.
pub(super) const BEGIN: char = '\u{fdd0}';
pub(super) const END: char = '\u{fdd1}';

/// What the message of an exception that a template raises begins with.
const RAISED: &str = "exception of the template: ";
/// Instructions that a template may take for a conversation: one that does not end must not stop a run.
const MOST_INSTRUCTIONS: u64 = 10_000_000;
/// Tags around what the assistant says.
const GENERATION: [&str; 2] = ["generation", "endgeneration"];

/// The environment of a template, at a time if it may know one.
pub(super) fn environment(now: Option<SystemTime>) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(MOST_INSTRUCTIONS));
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the syntax is the usual one"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(pycompat::unknown_method_callback);
    environment.set_formatter(python::write);
    environment.add_filter("tojson", |value: &Value, options: Kwargs| python::to_json(value, &options));
    environment.add_filter(GENERATION[0], |text: &str| format!("{BEGIN}{text}{END}"));
    environment.add_function("raise_exception", |message: &str| -> Result<(), Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    if let Some(now) = now {
        environment.add_function("strftime_now", move |format: &str| time(now, format));
    }
    environment
}

/// The message of an exception that a template has raised itself.
pub(super) fn raised(error: &Error) -> Option<&str> {
    error.detail()?.strip_prefix(RAISED)
}

/// A time in UTC.
fn time(now: SystemTime, format: &str) -> Result<String, Error> {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = i64::try_from(seconds).ok().and_then(|seconds| DateTime::from_timestamp(seconds, 0));
    let wrong = || {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {format:?} is no format of a time"))
    };
    let items = StrftimeItems::new(format).parse().map_err(|_| wrong())?;
    Ok(now.ok_or_else(wrong)?.format_with_items(items.iter()).to_string())
}

/// A source in which the tags around what the assistant says are those of a filter: tags too, so that blanks around them count
/// alike.
pub(super) fn marked(source: &str) -> String {
    let mut marked = String::new();
    let mut rest = source;
    while let Some((begin, end, is_begin)) = next_tag(rest) {
        let name = if is_begin { GENERATION[0] } else { GENERATION[1] };
        let tag = &rest[begin..end];
        let written = if is_begin { "filter generation" } else { "endfilter" };
        marked.push_str(&rest[..begin]);
        marked.push_str(&tag.replacen(name, written, 1));
        rest = &rest[end..];
    }
    marked + rest
}

/// Whether a source has such tags.
pub(super) fn has_marks(source: &str) -> bool {
    next_tag(source).is_some()
}

/// Where the next tag is, and whether it begins what the assistant says.
fn next_tag(source: &str) -> Option<(usize, usize, bool)> {
    source.match_indices("{%").find_map(|(begin, _)| {
        let inner = &source[begin + 2..];
        let length = inner.find("%}")?;
        let name = inner[..length].trim_matches(['-', '+']).trim();
        let which = GENERATION.iter().position(|tag| *tag == name)?;
        Some((begin, begin + 2 + length + 2, which == 0))
    })
}
