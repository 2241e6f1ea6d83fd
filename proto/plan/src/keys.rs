//! The keys of a plan: paths to them in a TOML table, and which ones there are.

use std::time::Duration;

use toml::{Table, Value};

use crate::adapter::AdapterConfig;
use crate::base::BaseConfig;
use crate::bytes::Bytes;
use crate::plan::Plan;
use crate::prepare::PrepareConfig;
use crate::rso::RsoConfig;
use crate::stages::{BenchConfig, EvaluationConfig, ExportConfig};
use crate::tune::{ExamplesConfig, TuneConfig};
use crate::{Format, SourceConfig};

/// Likeness from which a key that no plan has is taken for a known one. Below it, the known one is only suggested.
const SURE: f64 = 0.9;
/// Likeness from which a known key is suggested.
const SIMILAR: f64 = 0.75;

/// Path segments; `a.b[0].c` and `a.b.0.c` are the same.
pub(crate) fn segments(path: &str) -> Vec<String> {
    path.replace('[', ".").replace(']', "").split('.').filter(|s| !s.is_empty()).map(str::to_owned).collect()
}

fn child<'a>(value: &'a Value, segment: &str) -> Option<&'a Value> {
    match value {
        Value::Table(table) => table.get(segment),
        Value::Array(array) => array.get(segment.parse::<usize>().ok()?),
        _ => None,
    }
}

/// The value at a path of a table.
pub(crate) fn find<'a>(table: &'a Table, segments: &[String]) -> Option<&'a Value> {
    let (first, rest) = segments.split_first()?;
    rest.iter().try_fold(table.get(first)?, |value, segment| child(value, segment))
}

/// The value at a path of a table, with the path as one text.
pub(crate) fn lookup<'a>(table: &'a Table, path: &str) -> Option<&'a Value> {
    find(table, &segments(path))
}

fn child_mut<'a>(value: &'a mut Value, segment: &str) -> Option<&'a mut Value> {
    match value {
        Value::Table(table) => table.get_mut(segment),
        Value::Array(array) => array.get_mut(segment.parse::<usize>().ok()?),
        _ => None,
    }
}

/// Does something with the table or list that holds the last segment of a path. Tables that are missing on the way are
/// made if `create` says so.
fn within<T>(
    table: &mut Table,
    parents: &[String],
    create: bool,
    work: impl FnOnce(&mut Value) -> Option<T>,
) -> Option<T> {
    let mut root = Value::Table(std::mem::take(table));
    let mut here = Some(&mut root);
    for segment in parents {
        if let Some(Value::Table(table)) = &mut here
            && create
        {
            table.entry(segment.clone()).or_insert_with(|| Value::Table(Table::new()));
        }
        here = here.and_then(|value| child_mut(value, segment));
    }
    let result = here.and_then(work);
    if let Value::Table(root) = root {
        *table = root;
    }
    result
}

/// Takes the value at a path out of a table.
pub(crate) fn take(table: &mut Table, segments: &[String]) -> Option<Value> {
    let (last, parents) = segments.split_last()?;
    within(table, parents, false, |parent| match parent {
        Value::Table(parent) => parent.remove(last),
        Value::Array(parent) => {
            let index = last.parse().ok().filter(|index| *index < parent.len())?;
            Some(parent.remove(index))
        }
        _ => None,
    })
}

/// Puts a value at a path of a table; answers whether there can be one.
pub(crate) fn put(table: &mut Table, segments: &[String], value: Value) -> bool {
    let Some((last, parents)) = segments.split_last() else { return false };
    let done = within(table, parents, true, |parent| match parent {
        Value::Table(parent) => {
            parent.insert(last.clone(), value);
            Some(())
        }
        parent => child_mut(parent, last).map(|place| *place = value),
    });
    done.is_some()
}

/// A plan that says every key, those too that most plans leave out; of lists it has one entry.
pub(crate) fn every_key() -> Table {
    let text = || Some(String::new());
    let one = || vec![String::new()];
    let mut full = Plan {
        prepare: Some(PrepareConfig { crates: one(), paths: one(), ..PrepareConfig::default() }),
        ..Plan::default()
    };
    full.data.source.push(SourceConfig {
        files: one(),
        list: text(),
        range: Some([0, 100]),
        format: Some(Format::Parquet),
        tokens: Some(1_000_000_000),
        tokens_from: text(),
        max_epochs: Some(1),
        ..SourceConfig::default()
    });
    full.evaluation.push(EvaluationConfig {
        suite: text(),
        tasks: one(),
        include: one(),
        data: one(),
        tokenizer: text(),
        shots: Some(5),
        limit: Some(100.0),
        device: text(),
        memory: Some(Bytes::mib(1024)),
        wait: Some(Duration::from_hours(1)),
        ..EvaluationConfig::default()
    });
    full.export.push(ExportConfig::default());
    full.bench.push(BenchConfig {
        device: text(),
        memory: Some(Bytes::mib(1024)),
        wait: Some(Duration::from_hours(1)),
        ..BenchConfig::default()
    });
    full.base = Some(BaseConfig::default());
    let examples = || ExamplesConfig {
        files: one(),
        split: text(),
        format: Some(Format::Parquet),
        ..ExamplesConfig::default()
    };
    full.tune.push(TuneConfig {
        decontaminate: text(),
        epochs: Some(1),
        steps: Some(100),
        warmup: Some(10),
        lrs: vec![5e-5],
        seed: Some(0),
        data: vec![examples()],
        eval: vec![examples()],
        adapter: Some(AdapterConfig {
            rank_pattern: [("NAME".to_owned(), 8)].into(),
            alpha_pattern: [("NAME".to_owned(), 16.0)].into(),
            from: text(),
            ..AdapterConfig::default()
        }),
        rso: Some(RsoConfig { scores: text(), reward_head: text(), seed: Some(0), ..RsoConfig::default() }),
        ..TuneConfig::default()
    });
    full.model.share_input_output_layers = false;
    full.data.cache = text();
    full.tokenizer.file = text();
    full.tokenizer.bos = text();
    full.tokenizer.eos = text();
    full.checkpoint.max_age = Some(Duration::from_mins(30));
    let mut table = Table::try_from(&full).expect("a plan has no value that TOML lacks");
    if let Some(Value::Table(model)) = table.get_mut("model") {
        model.insert("preset".to_owned(), Value::String(String::new()));
    }
    table
}

/// What [`every_key`] has at a place of a plan. Only the first entry of a list is known: all are alike.
pub(crate) fn alike<'a>(known: &'a Table, segments: &[String]) -> Option<&'a Value> {
    let first =
        |segment: &String| if segment.parse::<usize>().is_ok() { "0".to_owned() } else { segment.clone() };
    find(known, &segments.iter().map(first).collect::<Vec<_>>())
}

/// The path with the index of a stage in place of its name, as in `evaluation.zeroshot.limit`; `None` if the plan has no stage
/// of that name.
pub(crate) fn of_named(table: &Table, mut segments: Vec<String>) -> Option<Vec<String>> {
    if let [kind, name, _, ..] = &segments[..]
        && ["tune", "evaluation", "export", "bench"].contains(&&kind[..])
        && name.parse::<usize>().is_err()
    {
        let stages = table.get(kind)?.as_array()?;
        let index =
            stages.iter().position(|stage| stage.get("name").and_then(Value::as_str) == Some(name))?;
        segments[1] = index.to_string();
    }
    Some(segments)
}

/// Whether the value of a key, be it one of a variant, is text.
pub(crate) fn is_text(segments: &[String]) -> bool {
    let segments = match segments {
        [first, _, rest @ ..] if first == "variants" => rest,
        all => all,
    };
    let known = every_key();
    let text = alike(&known, segments).and_then(Value::as_str);
    // Sizes may be numbers as well.
    text.is_some_and(|text| text.parse::<Bytes>().is_err())
}

/// What can be told about a key that no plan has.
pub(crate) struct Unknown {
    /// The next thing to do.
    pub(crate) advice: String,
    /// The known key that it is without much doubt.
    pub(crate) meant: Option<Vec<String>>,
}

/// Compares a key that no plan has with those that plans have.
pub(crate) fn unknown(segments: &[String]) -> Unknown {
    let known = every_key();
    let Some((last, above)) = segments.split_last() else {
        return Unknown { advice: "remove it".to_owned(), meant: None };
    };
    let siblings = match above {
        [] => Some(&known),
        above => alike(&known, above).and_then(Value::as_table),
    };
    let path = |name: &str| [above, &[name.to_owned()]].concat();
    let Some(siblings) = siblings else {
        return Unknown { advice: "remove it".to_owned(), meant: None };
    };
    // A key may stand in the wrong table.
    let tables = || known.iter().filter_map(|(name, value)| Some((name, value.as_table()?)));
    let mut elsewhere = tables().filter(|(_, table)| table.contains_key(last));
    if let (Some((table, _)), None) = (elsewhere.next(), elsewhere.next()) {
        let meant = vec![table.clone(), last.clone()];
        return Unknown { advice: format!("did you mean {table}.{last}?"), meant: Some(meant) };
    }
    let likeness = |name: &String| strsim::jaro_winkler(name, last);
    let nearest = siblings
        .iter()
        .map(|(name, value)| (likeness(name), name, value))
        .max_by(|one, other| one.0.total_cmp(&other.0));
    match nearest {
        Some((likeness, name, value)) if likeness > SIMILAR => Unknown {
            advice: format!("did you mean {}?", as_written(&path(name), value)),
            meant: (likeness > SURE).then(|| path(name)),
        },
        _ => {
            let names = siblings.iter().map(|(name, value)| as_written(&path(name), value));
            let advice = format!("the keys here are {}", names.collect::<Vec<_>>().join(", "));
            Unknown { advice, meant: None }
        }
    }
}

/// A key as a plan writes it: a table by its whole path in brackets, any other by its name.
fn as_written(path: &[String], value: &Value) -> String {
    let whole = path.join(".");
    match value {
        Value::Table(_) => format!("[{whole}]"),
        Value::Array(entries) if entries.iter().any(Value::is_table) => format!("[[{whole}]]"),
        _ => path.last().cloned().unwrap_or_default(),
    }
}
