//! From TOML text to plans, with *all* mistakes reported at once.
//!
//! serde stops at its first error. So a key that cannot be read is recorded and taken out, and the rest is read
//! again, until nothing is left to complain about; only then are the rules checked.

use toml::{Table, Value};
use ulmus_types::Problems;

use crate::bytes::Bytes;
use crate::model::Preset;
use crate::plan::Plan;
use crate::prepare::TRAINED_PIECES;

/// Reads a plan file: one plan, or one for each of its `[variants]`.
///
/// `overrides` are `key.path=value` pairs that replace what the file says. A value that is not TOML is text, and so is any
/// but a quoted one where the key's is: a name may look like a number.
///
/// # Errors
/// Every problem of the plan, in no case only the first.
pub fn read(text: &str, overrides: &[String]) -> Result<Vec<Plan>, Problems> {
    let mut problems = Problems::new();
    let mut table = text.parse::<Table>().unwrap_or_else(|error| {
        let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        problems.add(format!("line {line}"), "not TOML", error.message(), "correct the line");
        Table::new()
    });
    if !problems.is_empty() {
        return Err(problems);
    }
    for assignment in overrides {
        set(&mut table, assignment, &mut problems);
    }
    let variants = match table.remove("variants") {
        Some(Value::Table(variants)) if !variants.is_empty() => variants,
        None => return read_one(table, &mut problems).ok_or(problems).map(|plan| vec![plan]),
        Some(other) => {
            problems.add("variants", other, "must be tables", "write [variants.NAME.model] and its keys");
            return Err(problems);
        }
    };
    let base_name =
        table.get("run").and_then(|run| run.get("name")).and_then(Value::as_str).unwrap_or("run").to_owned();
    let mut plans = Vec::new();
    for (name, changes) in &variants {
        let mut variant = table.clone();
        if let Value::Table(changes) = changes {
            overlay(&mut variant, changes);
        }
        let run = variant.entry("run").or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(run) = run {
            run.insert("name".to_owned(), Value::String(format!("{base_name}-{name}")));
        }
        plans.extend(read_one(variant, &mut problems));
    }
    problems.into_result(plans)
}

/// The tokenizer file whose number of pieces a plan wants to know: given as `tokenizer.pieces`, it decides
/// `model.vocab_size`. None if the plan says either itself, or has no such file.
pub fn tokenizer_to_count(text: &str, overrides: &[String]) -> Option<String> {
    let mut table = text.parse::<Table>().ok()?;
    for assignment in overrides {
        set(&mut table, assignment, &mut Problems::new());
    }
    let known = lookup(&table, "model.vocab_size").or_else(|| lookup(&table, "tokenizer.pieces"));
    let file = lookup(&table, "tokenizer.file")?.as_str()?;
    known.is_none().then(|| file.to_owned())
}

/// Overrides that give the sources of a plan which have no weight the same one, for what reads them without mixing them.
pub fn even_weights(text: &str, overrides: &[String]) -> Vec<String> {
    let Ok(mut table) = text.parse::<Table>() else { return Vec::new() };
    for assignment in overrides {
        set(&mut table, assignment, &mut Problems::new());
    }
    let sources = lookup(&table, "data.source").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let without = (0..).zip(sources).filter(|(_, source)| source.get("tokens").is_none());
    without.map(|(index, _): (usize, _)| format!("data.source.{index}.tokens=1")).collect()
}

/// Rows for the pieces of a tokenizer and the pad id, where the plan does not say how many. Multiples of 128 suit the
/// matrix units of all devices.
fn follow_tokenizer(table: &mut Table) {
    let pieces = lookup(table, "tokenizer.pieces").and_then(Value::as_integer);
    let pieces = pieces.and_then(|pieces| u64::try_from(pieces).ok());
    let most = if lookup(table, "tokenizer.file").is_some() { 1 << 24 } else { *TRAINED_PIECES.end() };
    if let Some(pieces) = pieces.filter(|pieces| *pieces <= most)
        && let Value::Table(model) = table.entry("model").or_insert_with(|| Value::Table(Table::new()))
    {
        let rows = (pieces + 1).next_multiple_of(128);
        model.entry("vocab_size").or_insert(Value::Integer(rows.cast_signed()));
    }
}

fn read_one(mut table: Table, problems: &mut Problems) -> Option<Plan> {
    follow_tokenizer(&mut table);
    expand_preset(&mut table, problems);
    let mut plan = deserialize(table, problems);
    plan.complete();
    plan.check(problems);
    problems.is_empty().then_some(plan)
}

/// Replaces `model.preset` by the keys that it stands for; keys beside it win.
fn expand_preset(table: &mut Table, problems: &mut Problems) {
    let Some(Value::Table(model)) = table.get_mut("model") else { return };
    let Some(preset) = model.remove("preset") else { return };
    let Some(known) = preset.as_str().and_then(Preset::from_name) else {
        let names = Preset::ALL.map(Preset::name).join(", ");
        problems.add("model.preset", preset, "no such preset", format!("write one of {names}"));
        return;
    };
    let mut expanded = Table::try_from(known.config()).expect("a preset has no value that TOML lacks");
    overlay(&mut expanded, model);
    *model = expanded;
}

/// Lays `changes` over `table`, table by table.
fn overlay(table: &mut Table, changes: &Table) {
    for (key, change) in changes {
        match (table.get_mut(key), change) {
            (Some(Value::Table(below)), Value::Table(change)) => overlay(below, change),
            _ => {
                table.insert(key.clone(), change.clone());
            }
        }
    }
}

fn deserialize(mut table: Table, problems: &mut Problems) -> Plan {
    loop {
        let mut unknown = Vec::new();
        let mut track = serde_path_to_error::Track::new();
        let value = Value::Table(table.clone());
        let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
        let read: Result<Plan, _> =
            serde_ignored::deserialize(deserializer, |path| unknown.push(path.to_string()));
        match read {
            Ok(plan) => {
                for key in unknown {
                    let value = lookup(&table, &key).map_or_else(String::new, ToString::to_string);
                    problems.add(&key, value, "unknown key", suggestion(&key));
                }
                return plan;
            }
            Err(error) => {
                let path = track.path().to_string();
                let value = lookup(&table, &path).map_or_else(String::new, ToString::to_string);
                let rule = error.to_string();
                problems.add(
                    &path,
                    value,
                    rule.trim_end(),
                    "write a value of that kind, or leave the key out",
                );
                if !remove(&mut table, &path) {
                    return Plan::default();
                }
            }
        }
    }
}

/// Path segments; `a.b[0].c` and `a.b.0.c` are the same.
fn segments(path: &str) -> Vec<String> {
    path.replace('[', ".").replace(']', "").split('.').filter(|s| !s.is_empty()).map(str::to_owned).collect()
}

fn child<'a>(value: &'a Value, segment: &str) -> Option<&'a Value> {
    match value {
        Value::Table(table) => table.get(segment),
        Value::Array(array) => array.get(segment.parse::<usize>().ok()?),
        _ => None,
    }
}

fn lookup<'a>(table: &'a Table, path: &str) -> Option<&'a Value> {
    let segments = segments(path);
    let (first, rest) = segments.split_first()?;
    rest.iter().try_fold(table.get(first)?, |value, segment| child(value, segment))
}

/// Takes the value at `path` out of `table`, or what can be taken nearest above it.
fn remove(table: &mut Table, path: &str) -> bool {
    fn remove_below(value: &mut Value, segments: &[String]) -> bool {
        let [first, rest @ ..] = segments else { return false };
        match value {
            Value::Table(table) => match table.get_mut(first) {
                Some(below) => remove_below(below, rest) || table.remove(first).is_some(),
                None => false,
            },
            Value::Array(array) => {
                let Ok(index) = first.parse::<usize>() else { return false };
                let Some(below) = array.get_mut(index) else { return false };
                if !remove_below(below, rest) {
                    array.remove(index);
                }
                true
            }
            _ => false,
        }
    }
    let segments = segments(path);
    let mut root = Value::Table(std::mem::take(table));
    let removed = remove_below(&mut root, &segments);
    if let Value::Table(root) = root {
        *table = root;
    }
    removed
}

/// A plan that says every key, those too that most plans leave out; of lists it has one entry.
fn every_key() -> Table {
    let text = || Some(String::new());
    let one = || vec![String::new()];
    let mut full = Plan {
        prepare: Some(crate::PrepareConfig {
            crates: one(),
            paths: one(),
            ..crate::PrepareConfig::default()
        }),
        ..Plan::default()
    };
    full.data.source.push(crate::SourceConfig {
        files: one(),
        list: text(),
        range: Some([0, 1]),
        format: Some(crate::Format::Parquet),
        tokens: Some(1),
        tokens_from: text(),
        max_epochs: Some(1),
        ..crate::SourceConfig::default()
    });
    full.data.cache = text();
    full.tokenizer.file = text();
    full.tokenizer.bos = text();
    full.tokenizer.eos = text();
    let mut table = Table::try_from(&full).expect("a plan has no value that TOML lacks");
    if let Some(Value::Table(model)) = table.get_mut("model") {
        model.insert("preset".to_owned(), Value::String(String::new()));
    }
    table
}

/// What [`every_key`] has at a place of a plan. Only the first entry of a list is known: all are alike.
fn alike<'a>(known: &'a Table, segments: &[String]) -> Option<&'a Value> {
    let first =
        |segment: &String| if segment.parse::<usize>().is_ok() { "0".to_owned() } else { segment.clone() };
    lookup(known, &segments.iter().map(first).collect::<Vec<_>>().join("."))
}

/// Whether the value of a key, be it one of a variant, is text.
fn is_text(segments: &[String]) -> bool {
    let segments = match segments {
        [first, _, rest @ ..] if first == "variants" => rest,
        all => all,
    };
    let known = every_key();
    let text = alike(&known, segments).and_then(Value::as_str);
    // Sizes may be numbers as well.
    text.is_some_and(|text| text.parse::<Bytes>().is_err())
}

/// The known key of the same table that is spelt most alike.
fn suggestion(path: &str) -> String {
    let known = every_key();
    let mut segments = segments(path);
    let last = segments.pop().unwrap_or_default();
    let siblings =
        if segments.is_empty() { Some(&known) } else { alike(&known, &segments).and_then(Value::as_table) };
    let names: Vec<&String> = siblings.into_iter().flat_map(Table::keys).collect();
    let nearest = names
        .iter()
        .map(|name| (strsim::jaro_winkler(name, &last), name))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((_, name)) => format!("did you mean {name}?"),
        None if names.is_empty() => "remove it".to_owned(),
        None => {
            let all: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
            format!("the keys here are {}", all.join(", "))
        }
    }
}

/// Applies one `key.path=value`.
fn set(table: &mut Table, assignment: &str, problems: &mut Problems) {
    let Some((path, text)) = assignment.split_once('=') else {
        problems.add(
            "--set",
            assignment,
            "an override must be key.path=value",
            "write for instance train.iterations=100",
        );
        return;
    };
    let text = text.trim();
    let segments = segments(path.trim());
    if !is_text(&segments) && text.parse::<i128>().is_ok_and(|number| i64::try_from(number).is_err()) {
        let rule = format!("a whole number is at least {} and at most {}", i64::MIN, i64::MAX);
        problems.add(path.trim(), text, rule, "set a smaller one");
        return;
    }
    let value = format!("value = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .filter(|value| value.is_str() || !is_text(&segments))
        .unwrap_or_else(|| Value::String(text.to_owned()));
    let Some((last, parents)) = segments.split_last() else {
        problems.add("--set", assignment, "names no key", "write for instance train.iterations=100");
        return;
    };
    let mut root = Value::Table(std::mem::take(table));
    let mut here = Some(&mut root);
    for segment in parents {
        here = here.and_then(|value| match value {
            Value::Table(table) => {
                Some(table.entry(segment.clone()).or_insert_with(|| Value::Table(Table::new())))
            }
            Value::Array(array) => array.get_mut(segment.parse::<usize>().ok()?),
            _ => None,
        });
    }
    match here {
        Some(Value::Table(parent)) => {
            parent.insert(last.clone(), value);
        }
        Some(Value::Array(parent)) if last.parse::<usize>().is_ok_and(|index| index < parent.len()) => {
            let index: usize = last.parse().expect("parsed in the guard");
            parent[index] = value;
        }
        _ => problems.add(path.trim(), text, "the plan has no such key", "name a key of the plan"),
    }
    if let Value::Table(root) = root {
        *table = root;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ulmus_types::Digest;

    use crate::norm::NormKind;

    const SMALL: &str = r#"
        [run]
        name = "small"
        [model]
        preset = "openelm-270m"
        vocab_size = 4096
        [prepare]
        paths = ["docs"]
        [data]
        lanes = 8
        [train]
        iterations = 100
        warmup = 10
        sequences = 16
        micro_batch = 4
        [checkpoint]
        every = 20
    "#;

    fn one(text: &str, overrides: &[&str]) -> Result<Plan, Problems> {
        let overrides: Vec<String> = overrides.iter().map(|&o| o.to_owned()).collect();
        read(text, &overrides).map(|mut plans| plans.remove(0))
    }

    #[test]
    fn the_vocabulary_follows_the_tokenizer() {
        let plan = |more: &str| format!("[tokenizer]\nfile = \"t.model\"\n{more}");
        let sourced = "[[data.source]]\nname = \"a\"\nurl = \"b\"\nfiles = [\"c\"]\ntext = \"d\"\n";
        let rows = |more: &str, overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
            read(&(plan(more) + sourced), &overrides).unwrap()[0].model.vocab_size
        };
        assert_eq!(rows("pieces = 32000\n", &[]), 32_128);
        assert_eq!(rows("[model]\npreset = \"openelm-270m\"\n", &["tokenizer.pieces=50257"]), 50_304);
        assert_eq!(rows("pieces = 127\n", &["model.vocab_size=4096"]), 4096);
        assert_eq!(rows("", &[]), 32_128);
        let wanted = |more: &str, overrides: &[String]| tokenizer_to_count(&plan(more), overrides);
        assert_eq!(wanted("", &[]).as_deref(), Some("t.model"));
        assert_eq!(wanted("", &["tokenizer.file=u.json".to_owned()]).as_deref(), Some("u.json"));
        assert_eq!(wanted("", &["model.vocab_size=512".to_owned()]), None);
        assert_eq!(wanted("pieces = 5\n", &[]), None);
        assert_eq!(tokenizer_to_count("[run]\n", &[]), None);
    }

    #[test]
    fn sources_can_be_read_before_they_have_weights() {
        let source = |name: &str| {
            format!("[[data.source]]\nname = {name:?}\nurl = \"x\"\nfiles = [\"*\"]\ntext = \"text\"\n")
        };
        let text = format!("[tokenizer]\nfile = \"t.model\"\n{}{}tokens = 7\n", source("one"), source("two"));
        assert!(one(&text, &[]).unwrap_err().to_string().contains("data.source.0.tokens"));
        let weights = even_weights(&text, &[]);
        assert_eq!(weights, ["data.source.0.tokens=1"]);
        let plan = read(&text, &weights).unwrap().remove(0);
        let tokens: Vec<_> = plan.data.source.iter().map(|source| source.tokens).collect();
        assert_eq!(tokens, [Some(1), Some(7)]);
    }

    #[test]
    fn a_number_that_no_plan_can_hold_is_refused_as_one() {
        let problems = one(SMALL, &["run.seed=9223372036854775808"]).unwrap_err();
        let problem = problems.iter().next().unwrap();
        assert_eq!(problem.key, "run.seed");
        assert!(problem.rule.contains("at most 9223372036854775807"), "{problem:?}");
    }

    #[test]
    fn what_is_set_is_text_where_the_key_is() {
        for name in ["1234567", "1e3", "inf", "nan", "true", "0x10", "2026-11-29", "\"1234567\""] {
            let plan = one(SMALL, &[&format!("run.name={name}")]).unwrap();
            assert_eq!(plan.run.name.to_string(), name.trim_matches('"'));
        }
        let source = |key: &str| {
            let text = format!(
                "{}\n[[data.source]]\nname = \"a\"\nurl = \"b\"\nfiles = [\"c\"]\ntext = \"d\"\n[variants.1.model]\n",
                SMALL.replace("[prepare]", "[tokenizer]\nfile = \"t\"\n[prepare]")
            );
            let plan = one(&text, &[&format!("{key}=1e3")]).unwrap_or_else(|problems| panic!("{problems}"));
            lookup(&Table::try_from(&plan).unwrap(), key.strip_prefix("variants.1.").unwrap_or(key)).cloned()
        };
        for key in [
            "store.url",
            "store.local",
            "tokenizer.file",
            "tokenizer.bos",
            "tokenizer.eos",
            "prepare.paths.0",
            "data.cache",
            "data.source.0.name",
            "data.source.0.url",
            "data.source.0.files.0",
            "data.source.0.list",
            "data.source.0.text",
            "data.source.0.tokens_from",
            "variants.1.store.url",
        ] {
            assert_eq!(source(key), Some(Value::String("1e3".to_owned())), "{key}");
        }
        // Other keys, and lists of texts, are what TOML says; a size may be a number.
        let plan =
            one(SMALL, &["data.unit=65_536", "train.z_loss=1e-3", "prepare.paths=[\"a\", \"b\"]"]).unwrap();
        assert_eq!((plan.data.unit.get(), plan.train.z_loss), (65_536, 1e-3));
        assert_eq!(plan.prepare.unwrap().paths, ["a", "b"]);
        for (set, words) in [
            ("model.norm=1", "unknown variant `1`"),
            ("model.preset=270", "write one of openelm-270m"),
            ("local.device=0", "no device is called `0`"),
            ("run.seed=x", "expected u64"),
        ] {
            let text = one(SMALL, &[set]).unwrap_err().to_string();
            assert!(text.contains(words), "{set}: {text}");
        }
    }

    #[test]
    fn numbers_that_no_run_could_keep_are_refused_with_what_fits() {
        for (set, key, fix) in [
            ("benchmark.generate=1", "benchmark.generate", "set it to 2"),
            ("benchmark.generate=0", "benchmark.generate", "set it to 2"),
            ("benchmark.generate=2048", "benchmark.generate", "at most 2013"),
            ("benchmark.prompt=0", "benchmark.prompt", "set it to 1"),
            ("benchmark.prompt=2047", "benchmark.prompt", "set it to 1024"),
            ("benchmark.prompt=9223372036854775807", "benchmark.prompt", "set it to 1024"),
            ("benchmark.runs=0", "benchmark.runs", "set it to 1"),
            ("benchmark.runs=1000000", "benchmark.runs", "set it to 1000"),
            ("evaluate.prompt=2048", "evaluate.continuation", "evaluate.prompt"),
            ("evaluate.text=2TiB", "evaluate.text", "set it to \"1TiB\""),
            ("tokenizer.sample=0B", "tokenizer.sample", "set it to \"8MiB\""),
            ("cluster.rejoin_window=100years", "cluster.rejoin_window", "set it to \"1d\""),
            ("checkpoint.recovery=100years", "checkpoint.recovery", "set it to \"365d\""),
            ("train.iterations=9223372036854775807", "train.iterations", "set it to 1099511627776"),
            ("train.sequences=1073741824", "train.sequences", "set train.sequences to "),
            ("train.sequences=9223372036854775807", "train.sequences", "set train.sequences to "),
            ("train.max_lr=5", "train.max_lr", "set it to 0.0053, as in the published recipe"),
            ("train.z_loss=-1", "train.z_loss", "set it to 0.0"),
            ("train.min_lr=0.1", "train.min_lr", "set it to 0.0053"),
            ("checkpoint.every=0", "checkpoint.every", "set it to 20"),
            ("checkpoint.average=6", "checkpoint.average", "at most 5, or checkpoint.every to at most 16"),
            ("data.unit=1KiB", "data.unit", "set it to \"64KiB\""),
            ("data.holdout=0.9", "data.holdout", "set it to 0.5"),
            ("data.holdout=-0.1", "data.holdout", "set it to 0.0005"),
            ("tokenizer.pieces=300000", "tokenizer.pieces", "set it to 4095"),
            ("tokenizer.pieces=8000", "tokenizer.pieces", "set model.vocab_size to 8064"),
            ("cluster.min_workers=5", "cluster.min_workers", "set it to 4"),
            ("cluster.dead_after=1s", "cluster.dead_after", "set it to \"3s\""),
            ("local.threads=0", "local.threads", "set it to 1"),
            ("model.head_dim=1000", "model.head_dim", "set it to 512"),
            ("model.qkv_multipliers=65.0", "model.qkv_multipliers", "[0.5, 1.0]"),
            (
                "train.held_out_sequences=9223372036854775807",
                "train.held_out_sequences",
                "set it to 16777216",
            ),
        ] {
            let problems = one(SMALL, &[set]).expect_err(set);
            let problem = problems.iter().next().unwrap();
            assert!(problem.key == key && problem.fix.contains(fix), "{set}: {problems}");
            assert_eq!(problems.len(), 1, "nothing that only follows from it is reported: {problems}");
            // What is advised is taken.
            if let Some(advised) =
                problem.fix.strip_prefix("set it to ").filter(|advised| !advised.contains(' '))
            {
                let advised = format!("{key}={}", advised.trim_matches('"'));
                assert!(one(SMALL, &[&advised]).is_ok(), "{advised}");
            }
        }
        for set in ["benchmark.generate=2", "evaluate.prompt=0", "evaluate.continuation=0", "evaluate.text=0"]
        {
            assert!(one(SMALL, &[set]).is_ok(), "{set}");
        }
        // What is advised for too large an update is taken.
        let problems = one(SMALL, &["train.sequences=1073741824", "model.vocab_size=65536"]).unwrap_err();
        let fix = problems.iter().find(|problem| problem.key == "train.sequences").unwrap().fix.clone();
        let most = fix.rsplit(' ').next().unwrap();
        let set =
            [&format!("train.sequences={most}"), &format!("data.lanes={most}"), "model.vocab_size=65536"];
        assert!(one(SMALL, &set).is_ok(), "{fix}");
    }

    #[test]
    fn the_largest_plan_can_be_added_up() {
        let large = [
            "model.vocab_size=1048576",
            "model.max_context_length=1048576",
            "model.model_dim=65536",
            "model.num_transformer_layers=512",
            "model.qkv_multipliers=64.0",
            "model.ffn_multipliers=64.0",
            "train.iterations=1099511627776",
            "checkpoint.every=1",
            "data.window=1048576",
            "data.unit=1GiB",
            "train.held_out_every=0",
            "train.sequences=4",
            "data.lanes=4",
        ];
        let plan = one(SMALL, &large).unwrap();
        assert!(crate::worker_memory(&plan.model, &plan.train, plan.sequence_length()).total > 1 << 50);
        assert!(crate::data_memory(&plan.data, 8, plan.sequence_length()) > 1 << 40);
    }

    #[test]
    fn a_resolved_plan_reads_as_itself() {
        let plan = one(SMALL, &[]).unwrap();
        assert_eq!(plan.model.num_transformer_layers, 16);
        assert_eq!(plan.data.source[0].url, "run:shards");
        assert_eq!(one(&plan.to_toml(), &[]).unwrap(), plan);
    }

    #[test]
    fn overrides_win_and_reach_into_lists() {
        let plan = one(SMALL, &["train.max_lr=0.001", "run.name=other", "checkpoint.recovery=30s"]).unwrap();
        assert_eq!((plan.train.max_lr, plan.run.name.as_str()), (0.001, "other"));
        assert_eq!(plan.checkpoint.recovery.as_secs(), 30);
        let plan = one(SMALL, &["prepare.paths.0=src"]).unwrap();
        assert_eq!(plan.prepare.unwrap().paths, ["src"]);
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let wrong = SMALL.replace("micro_batch = 4", "micro_batch = \"four\"\nmax_lrr = 1.0\nclip = -1.0")
            + "\n[cluster]\ndead_after = 3\n[nonsense]\nx = 1\n";
        let problems = one(&wrong, &["data.lanes=5"]).unwrap_err();
        let keys: Vec<&str> = problems.iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(
            keys,
            [
                "cluster.dead_after",
                "train.micro_batch",
                "nonsense",
                "train.max_lrr",
                "train.clip",
                "data.lanes"
            ]
        );
        let text = problems.to_string();
        assert!(text.contains("did you mean max_lr?"), "{text}");
    }

    #[test]
    fn a_run_is_kept_where_runs_can_be() {
        for url in ["runs", "/runs", "file:///runs", "s3://bucket/runs", "gs://b/r", "abfss://c@account/r"] {
            assert_eq!(one(SMALL, &[&format!("store.url={url}")]).unwrap().store.url, url);
        }
        for url in ["", "https://host/runs", "s3://key:word@bucket/runs", "az://container/runs?sig=word"] {
            let problems = one(SMALL, &[&format!("store.url={url}")]).unwrap_err();
            assert_eq!(problems.iter().next().unwrap().key, "store.url");
            assert!(!problems.to_string().contains("word"), "{problems}");
        }
    }

    #[test]
    fn text_that_is_not_toml_names_its_line() {
        let problems = one("[run]\nname = \n", &[]).unwrap_err();
        assert_eq!(problems.iter().next().unwrap().key, "line 2");
    }

    #[test]
    fn variants_differ_in_what_they_say_and_in_name() {
        let text = format!("{SMALL}\n[variants.uniform.model]\nffn_multipliers = 2.0\n[variants.scaled]\n");
        let plans = read(&text, &[]).unwrap();
        let names: Vec<&str> = plans.iter().map(|plan| plan.run.name.as_str()).collect();
        assert_eq!(names, ["small-scaled", "small-uniform"]);
        assert_ne!(plans[0].model, plans[1].model);
        assert_eq!(plans[0].train, plans[1].train);
    }

    #[test]
    fn what_no_bit_depends_on_may_change() {
        let plan = one(SMALL, &[]).unwrap();
        let moved = one(SMALL, &["local.workers=2", "cluster.dead_after=9s", "data.threads=7"]).unwrap();
        assert!(moved.changed_keys(&plan).is_empty());
        assert_eq!(moved.digest(), plan.digest());
        let changed = one(SMALL, &["train.max_lr=0.001"]).unwrap();
        let keys: Vec<_> = changed.changed_keys(&plan);
        assert_eq!(keys, [("train.max_lr".to_owned(), "0.0053".to_owned(), "0.001".to_owned())]);
        assert_ne!(changed.digest(), plan.digest());
    }

    #[test]
    fn no_number_of_layers_is_too_large_to_be_refused() {
        let problems = one(SMALL, &["model.num_transformer_layers=9223372036854775807"]).unwrap_err();
        assert!(problems.to_string().contains("model.num_transformer_layers"), "{problems}");
    }

    /// Checkpoints and databases hold it.
    #[test]
    fn digests_are_what_they_were() {
        let plan = one(SMALL, &[]).unwrap();
        let form_2: Digest =
            "29b750d6ce754b37eba0203f1d98859dd45525a08bdfb8034f1512bb7796bd80".parse().unwrap();
        // Of this plan before it could say these keys.
        let first = "41acecf09e2d28516afda9abcce1484af96f32e6659e66949131bc9b42a6c577".parse().unwrap();
        assert_eq!(plan.digest(), form_2);
        assert!(plan.has_digest(form_2) && plan.has_digest(first));
        for change in [
            "model.norm=naive_rms",
            "checkpoint.export=false",
            "data.piece_words=16",
            "train.algorithms=measured",
            "train.max_lr=0.001",
        ] {
            let changed = one(SMALL, &[change]).unwrap();
            assert!(!changed.has_digest(form_2) && !changed.has_digest(first), "{change}");
        }
    }

    #[test]
    fn a_model_that_cannot_be_exported_is_refused_until_the_plan_does_not_export() {
        let problems = one(SMALL, &["model.norm=layer"]).unwrap_err();
        let keys: Vec<&str> = problems.iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(keys, ["checkpoint.export"]);
        let text = problems.to_string();
        assert!(text.contains("set it to false, or model.norm to \"rms\""), "{text}");
        let plan = one(SMALL, &["model.norm=layer", "checkpoint.export=false"]).unwrap();
        assert_eq!(plan.model.norm, NormKind::Layer);
        assert_eq!(one(&plan.to_toml(), &[]).unwrap(), plan);
        assert!(one(SMALL, &["model.norm=naive_rms"]).is_ok());
        let text = one(SMALL, &["model.norm=batch"]).unwrap_err().to_string();
        assert!(text.contains("`rms`, `naive_rms`, `layer`"), "{text}");
    }
}
