//! From TOML text to plans, with *all* mistakes reported at once.
//!
//! serde stops at its first error. So a key that cannot be read is recorded and taken out, and the rest is read
//! again, until nothing is left to complain about; only then are the rules checked. A mistake is reported once: a key that
//! is almost spelt like a known one is read as that, and no rule is checked that relates keys of which one is wrong.

use toml::{Table, Value};
use ulmus_types::{Problem, Problems};

use crate::keys::{self, Unknown, is_text, lookup, segments};
use crate::mistakes;
use crate::model::{ModelConfig, Preset};
use crate::plan::{Plan, StoreConfig};
use crate::prepare::TRAINED_PIECES;
use crate::rules::sound;

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
        let (rule, advice) = mistakes::not_toml(error.message());
        problems.add(format!("line {line}"), "", rule, advice);
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
            let rule = "it must hold a table for each variant";
            problems.add("variants", shown(&other), rule, "write [variants.NAME.model] and its keys");
            return Err(problems);
        }
    };
    let mut plans = Vec::new();
    for (name, changes) in &variants {
        let mut variant = table.clone();
        match changes {
            Value::Table(changes) => overlay(&mut variant, changes),
            other => {
                let key = format!("variants.{name}");
                problems.add(&key, other, "it must be a table", format!("write [{key}.model] and its keys"));
            }
        }
        let run = variant.entry("run").or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(run) = run {
            let base = run.entry("name").or_insert_with(|| Value::String("run".to_owned()));
            if let Value::String(base) = base {
                *base = format!("{base}-{name}");
            }
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

/// One plan, unless something is wrong with it; what is wrong is added to `all` unless another variant has it too.
fn read_one(table: Table, all: &mut Problems) -> Option<Plan> {
    let mut problems = Problems::new();
    let (mut plan, stand_ins) = deserialize(table, &mut problems);
    plan.complete();
    plan.check(&mut problems);
    let problems = settle(&problems, stand_ins);
    for problem in &problems {
        if all.iter().all(|told| told != problem) {
            let Problem { key, value, rule, fix } = problem.clone();
            all.add(key, value, rule, fix);
        }
    }
    all.is_empty().then_some(plan)
}

/// Replaces `model.preset` by the keys that it stands for; keys beside it win.
fn expand_preset(table: &mut Table, problems: &mut Problems) {
    let Some(Value::Table(model)) = table.get_mut("model") else { return };
    let Some(preset) = model.remove("preset") else { return };
    let Some(known) = preset.as_str().and_then(Preset::from_name) else {
        let (rule, advice) =
            mistakes::choice(&Preset::ALL.map(Preset::name), preset.as_str().unwrap_or_default());
        problems.add("model.preset", preset, rule, advice);
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

/// A value that a key cannot have, and another one that is read in its place, so that the rules can say what fits.
struct StandIn {
    segments: Vec<String>,
    written: Value,
    read: Value,
}

impl StandIn {
    /// 0 for a negative number; and its text for a value that is no text where the key's is, as not every text may do there.
    fn of(segments: &[String], written: &Value, usual: Option<&Value>, tried: Option<&Self>) -> Option<Self> {
        let stand_in = |read| Some(Self { segments: segments.to_owned(), written: written.clone(), read });
        match written {
            Value::Integer(number) if *number < 0 && tried.is_none() => stand_in(Value::Integer(0)),
            Value::String(_) | Value::Array(_) | Value::Table(_) => None,
            _ if tried.is_some_and(|tried| tried.read.is_str()) => None,
            _ => usual?.as_str().and_then(|_| stand_in(Value::String(written.to_string()))),
        }
    }
}

/// Reads what can be read, and reports the rest.
fn deserialize(mut table: Table, problems: &mut Problems) -> (Plan, Vec<StandIn>) {
    let known = keys::every_key();
    let mut stand_ins: Vec<StandIn> = Vec::new();
    let mut guessed = Vec::new();
    loop {
        follow_tokenizer(&mut table);
        expand_preset(&mut table, problems);
        let mut unknown = Vec::new();
        let mut track = serde_path_to_error::Track::new();
        let value = Value::Table(table.clone());
        let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
        let read: Result<Plan, toml::de::Error> =
            serde_ignored::deserialize(deserializer, |path| unknown.push(ignored(&path)));
        match read {
            Ok(plan) if unknown.is_empty() => return (plan, stand_ins),
            Ok(_) => {
                for segments in unknown {
                    guessed.extend(respell(&mut table, &segments, problems));
                }
            }
            Err(error) => {
                let segments = failed(&track.path());
                let tried = stand_ins.iter().position(|tried| tried.segments == segments);
                let tried = tried.map(|at| stand_ins.swap_remove(at));
                let Some(value) = keys::find(&table, &segments).cloned() else {
                    problems.add(segments.join("."), "", error.message(), "correct it");
                    return (Plan::default(), stand_ins);
                };
                let written = tried.as_ref().map_or(&value, |tried| &tried.written);
                let usual = keys::alike(&known, &segments);
                if let Some(stand_in) = StandIn::of(&segments, written, usual, tried.as_ref()) {
                    keys::put(&mut table, &segments, stand_in.read.clone());
                    stand_ins.push(stand_in);
                    continue;
                }
                if !guessed.contains(&segments) {
                    let key = segments.join(".");
                    let (rule, advice) = mistakes::in_words(error.message(), &key, written, usual);
                    problems.add(key, shown(written), rule, advice);
                }
                keys::take(&mut table, &segments);
            }
        }
    }
}

/// The path of a key that was not read.
fn ignored(path: &serde_ignored::Path<'_>) -> Vec<String> {
    use serde_ignored::Path;
    let (parent, segment) = match path {
        Path::Root => return Vec::new(),
        Path::Seq { parent, index } => (parent, index.to_string()),
        Path::Map { parent, key } => (parent, key.clone()),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            return ignored(parent);
        }
    };
    [ignored(parent), vec![segment]].concat()
}

/// The path of a value that could not be read.
fn failed(path: &serde_path_to_error::Path) -> Vec<String> {
    use serde_path_to_error::Segment;
    let segment = |segment: &Segment| match segment {
        Segment::Seq { index } => Some(index.to_string()),
        Segment::Map { key } => Some(key.clone()),
        Segment::Enum { .. } | Segment::Unknown => None,
    };
    path.iter().filter_map(segment).collect()
}

/// Reports a key that no plan has and takes it out. If it is clear what was meant, that is read instead and given back, so
/// that nothing is reported that only follows from its absence.
fn respell(table: &mut Table, segments: &[String], problems: &mut Problems) -> Option<Vec<String>> {
    let value = keys::take(table, segments)?;
    let Unknown { advice, meant } = keys::unknown(segments);
    let rule = if value.is_table() { "unknown table" } else { "unknown key" };
    problems.add(segments.join("."), shown(&value), rule, advice);
    let meant = meant?;
    match (keys::find(table, &meant), value) {
        (None, value) => {
            keys::put(table, &meant, value);
        }
        (Some(Value::Table(there)), Value::Table(mut value)) => {
            overlay(&mut value, &there.clone());
            keys::put(table, &meant, Value::Table(value));
        }
        _ => {}
    }
    Some(meant)
}

/// A value as a problem shows it: none of a table, whose keys are many.
fn shown(value: &Value) -> String {
    match value {
        Value::Table(_) => String::new(),
        Value::Array(entries) if entries.iter().any(Value::is_table) => String::new(),
        value => value.to_string(),
    }
}

/// The problems to report: of each key the first alone, as the others follow from it; and values that others stood in for.
fn settle(problems: &Problems, stand_ins: Vec<StandIn>) -> Problems {
    let mut settled = Problems::new();
    for Problem { key, value, rule, fix } in problems {
        if sound(&settled, &[key]) {
            let written = stand_ins.iter().find(|stand_in| stand_in.segments.join(".") == *key);
            let value = written.map_or_else(|| value.clone(), |stand_in| stand_in.written.to_string());
            settled.add(key, value, rule, fix);
        }
    }
    for StandIn { segments, written, read } in stand_ins {
        let key = segments.join(".");
        let (rule, advice) = match read {
            Value::String(_) => ("it must be text", format!("write it in quotes: \"{written}\"")),
            _ => ("it must not be negative", "set it to 0".to_owned()),
        };
        if sound(&settled, &[&key]) {
            settled.add(key, written, rule, advice);
        }
    }
    settled
}

/// Applies one `key.path=value`.
pub(crate) fn set(table: &mut Table, assignment: &str, problems: &mut Problems) {
    let Some((path, text)) = assignment.split_once('=') else {
        let advice = "write for instance train.iterations=100";
        problems.add(format!("--set {assignment}"), "", "an override must be key.path=value", advice);
        return;
    };
    let text = text.trim();
    let Some(segments) = keys::of_named(table, segments(path.trim())) else {
        let advice = "name one that it has, as in evaluation.NAME.limit";
        problems.add(path.trim(), text, "the plan has no stage of this name", advice);
        return;
    };
    if !is_text(&segments) && text.parse::<i128>().is_ok_and(|number| i64::try_from(number).is_err()) {
        problems.add(path.trim(), text, mistakes::out_of_bounds(), "set it to one in that range");
        return;
    }
    let value = format!("value = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .filter(|value| value.is_str() || !is_text(&segments))
        .unwrap_or_else(|| Value::String(text.to_owned()));
    if segments.is_empty() {
        let advice = "write for instance train.iterations=100";
        problems.add(format!("--set {assignment}"), "", "it names no key", advice);
    } else if !keys::put(table, &segments, value) {
        let advice = "name a key of the plan, such as train.iterations";
        problems.add(path.trim(), text, "the plan has no such key", advice);
    }
}

/// The base model of whose shape a plan says nothing, so that it has to be read from the model itself; and the plan's store.
pub fn base_to_read(text: &str, overrides: &[String]) -> Option<(String, String)> {
    let mut table = text.parse::<Table>().ok()?;
    for assignment in overrides {
        set(&mut table, assignment, &mut Problems::new());
    }
    let base = lookup(&table, "base.model")?.as_str()?;
    let store = lookup(&table, "store.url").and_then(|url| url.as_str().map(str::to_owned));
    let store = store.unwrap_or_else(|| StoreConfig::default().url);
    lookup(&table, "model").is_none().then(|| (base.to_owned(), store))
}

/// The overrides that give a plan the shape of its base model.
pub fn shape_overrides(shape: &ModelConfig) -> Vec<String> {
    let table = Table::try_from(shape).expect("a shape has no value that TOML lacks");
    table.into_iter().map(|(key, value)| format!("model.{key}={value}")).collect()
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
        assert!(problem.rule.contains("to 9223372036854775807"), "{problem:?}");
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
            ("model.norm=1", "it must be \"rms\", \"naive_rms\" or \"layer\""),
            ("model.preset=270", "it must be \"openelm-270m\", "),
            ("local.device=0", "no device is called `0`"),
            ("run.seed=x", "it must be a whole number"),
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

    /// Every key of a plan that holds no others, by its path.
    fn leaves(at: &str, value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Table(table) => {
                for (key, value) in table {
                    leaves(&format!("{at}.{key}"), value, found);
                }
            }
            Value::Array(entries) if entries.iter().any(Value::is_table) => {
                leaves(&format!("{at}.0"), &entries[0], found);
            }
            _ => found.push(at.trim_start_matches('.').to_owned()),
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_in_words_of_the_plan() {
        let mut keys = Vec::new();
        leaves("", &Value::Table(keys::every_key()), &mut keys);
        assert!(keys.len() > 70);
        let text = SMALL.to_owned()
            + "[[data.source]]\nname = \"a\"\nurl = \"b\"\nfiles = [\"c\"]\ntext = \"d\"\n"
            + "[[evaluation]]\nname = \"tasks\"\nof = \"last\"\ntasks = [\"boolq\"]\ndata = [\"e\"]\n"
            + "[[export]]\nname = \"release\"\nof = \"last\"\n"
            + "[[bench]]\nname = \"speed\"\nof = [\"average\", \"last\"]\n"
            + "[[tune]]\nname = \"dpo\"\nof = \"average\"\nmethod = \"dpo\"\nmax_length = 64\nmax_prompt = 32\n"
            + "[tune.adapter]\nrank_pattern.qkv_proj = 8\nalpha_pattern.qkv_proj = 8\n"
            + "[tune.rso]\nscores = \"i\"\n"
            + "[[tune.data]]\nurl = \"g\"\n[[tune.eval]]\nurl = \"h\"\n";
        let plan: Table = text.parse().unwrap();
        for wrong in ["\"x y\"", "-3", "1.5", "true", "2026-11-30", "[[]]", "[true]", "{ x = 1 }"] {
            let wrong = format!("value = {wrong}").parse::<Table>().unwrap().remove("value").unwrap();
            for key in &keys {
                let mut plan = plan.clone();
                assert!(keys::put(&mut plan, &segments(key), wrong.clone()), "{key}");
                let Err(problems) = read(&toml::to_string(&plan).unwrap(), &[]) else { continue };
                let problem = problems.iter().next().unwrap();
                assert!(problems.len() == 1 && problem.key.starts_with(key), "{key} = {wrong}: {problems}");
                for word in [
                    "expected",
                    "invalid type",
                    "variant",
                    "enum",
                    "u64",
                    "f64",
                    "struct",
                    "a sequence",
                    "a map",
                ] {
                    assert!(!problem.rule.contains(word), "{problem}");
                }
            }
        }
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_told_what_to_write() {
        for (set, told) in [
            (
                "train.micro_batch=\"4\"",
                "train.micro_batch = \"4\": it must be a whole number; write 4 without quotes",
            ),
            (
                "train.micro_batch=four",
                "train.micro_batch = \"four\": it must be a whole number; write for instance 16",
            ),
            ("train.iterations=1e3", "train.iterations = 1000.0: it must be a whole number; write 1000"),
            ("train.clip=\"1.0\"", "train.clip = \"1.0\": it must be a number; write 1.0 without quotes"),
            (
                "train.recompute=1",
                "train.recompute = 1: it must be true or false; write true or false, without quotes",
            ),
            (
                "train.precision=bf61",
                "train.precision = \"bf61\": it must be \"f32\" or \"bf16\"; did you mean \"bf16\"?",
            ),
            (
                "model.norm=none",
                "model.norm = \"none\": it must be \"rms\", \"naive_rms\" or \"layer\"; write one of these",
            ),
            (
                "model.qkv_multipliers=x",
                "it must be a number or a list of numbers; write for instance [0.5, 1.0]",
            ),
            ("model.preset=openelm-27m", "did you mean \"openelm-270m\"?"),
            (
                "cluster.dead_after=9",
                "cluster.dead_after = \"9\": it must be a time; write \"9s\" for seconds",
            ),
            ("checkpoint.max_age=soon", "it must be a time; write for instance \"30m\""),
            ("data.unit=true", "data.unit = true: invalid size \"true\"; write for instance \"64MiB\""),
            ("data.unit=[1]", "data.unit = [1]: it must be a size; write for instance \"8MiB\""),
            // Numbers below 0 have the range of others.
            ("data.threads=-3", "data.threads = -3: it must be from 1 to 256; set it to 1"),
            ("data.unit=-3", "data.unit = -3: it must be from 64KiB to 1GiB; set it to \"64KiB\""),
            ("run.seed=-1", "run.seed = -1: it must not be negative; set it to 0"),
            ("prepare.paths=docs", "prepare.paths = \"docs\": it must be a list; write [\"docs\"]"),
            ("prepare.paths=[7]", "prepare.paths.0 = 7: it must be text; write it in quotes: \"7\""),
            (
                "data.source={ name = \"a\" }",
                "data.source: it must be a list; write [[data.source]], in two brackets",
            ),
            ("train=5", "train = 5: it must be a table; write [train], and its keys on the lines below"),
            ("prepare=5", "prepare = 5: it must be a table; write [prepare]"),
        ] {
            let problems = one(SMALL, &[set]).expect_err(set);
            assert_eq!(problems.len(), 1, "{problems}");
            assert!(problems.to_string().contains(told), "{problems}");
        }
        let number = SMALL.replace("\"small\"", "270");
        let problems = one(&number, &[]).unwrap_err().to_string();
        assert_eq!(problems.trim(), "run.name = 270: it must be text; write it in quotes: \"270\"");
        let norm = SMALL.replace("[prepare]", "norm = 1\n[prepare]");
        assert!(one(&norm, &[]).unwrap_err().to_string().contains("model.norm = 1: it must be \"rms\""));
    }

    #[test]
    fn a_misspelt_key_is_one_problem_and_is_read_as_what_was_meant() {
        let told = |text: &str| one(text, &[]).unwrap_err().to_string().trim().to_owned();
        for (right, wrong, problem) in [
            ("[train]", "[trian]", "trian: unknown table; did you mean [train]?"),
            ("[model]", "[modle]", "modle: unknown table; did you mean [model]?"),
            ("[prepare]", "[prepair]", "prepair: unknown table; did you mean [prepare]?"),
            ("paths =", "path =", "prepare.path = [\"docs\"]: unknown key; did you mean paths?"),
            ("sequences =", "sequnces =", "train.sequnces = 16: unknown key; did you mean sequences?"),
            ("preset =", "presett =", "model.presett = \"openelm-270m\": unknown key; did you mean preset?"),
        ] {
            assert!(SMALL.contains(right));
            let told =
                told(&SMALL.replacen(right, wrong, 1).replace("[data]", "[data]\nlanes = 8\n").replacen(
                    "lanes = 8\n\n        lanes = 8",
                    "lanes = 8\n",
                    1,
                ));
            assert!(told.starts_with(problem), "{told}");
            assert_eq!(told.lines().count(), 1, "{told}");
        }
        // What is wrong below a misspelt table is told all the same, and a key in the wrong table.
        let text = SMALL
            .replace("[train]", "[trian]\nclip = -1.0\nlanes = 8")
            .replace("lanes = 8\n        [train]", "");
        assert!(told(&text).contains("train.clip = -1.0"), "{}", told(&text));
        let text = SMALL.replace("[run]", "\"a.b\" = 1\n[run]");
        assert!(
            told(&text).starts_with("a.b = 1: unknown key; the keys here are [base], [[bench]], "),
            "{}",
            told(&text)
        );
        let text = SMALL.replace("[run]", "iterations = 100\n[run]");
        assert_eq!(told(&text), "iterations = 100: unknown key; did you mean train.iterations?");
        let text = SMALL.replace(
            "[data]",
            "[[data.sources]]\nname = \"a\"\nurl = \"b\"\nfiles = [\"c\"]\ntext = \"d\"\n[data]",
        );
        assert_eq!(told(&text), "data.sources: unknown key; did you mean [[data.source]]?");
    }

    #[test]
    fn a_mistake_that_all_variants_have_is_told_once() {
        let text = format!("{SMALL}\n[variants.one.train]\nclip = 1.0\n[variants.two.train]\nclip = 2.0\n");
        let problems = read(&text, &["data.threads=0".to_owned()]).unwrap_err();
        assert_eq!(problems.len(), 1, "{problems}");
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
        for (text, told) in [
            ("[run]\nname = \n", "line 2: this is not TOML: a value is neither a number nor text in quotes"),
            ("[run]\n[data", "line 2: this is not TOML: unclosed table, expected `]`; correct the line"),
            (
                "[train]\nsequences = 99999999999999999999",
                "line 2: a whole number must be from -9223372036854775808",
            ),
            ("[train]\nsequences = -0x10", "line 2: this is not TOML: "),
            ("[run]\ngröße = 1", "line 2: this is not TOML: "),
        ] {
            let problems = one(text, &[]).unwrap_err().to_string();
            assert!(problems.trim().starts_with(told), "{problems}");
            // Nothing is told that is not the case.
            assert!(
                told.contains("neither") || !problems.contains("neither a number nor text"),
                "{problems}"
            );
        }
    }

    #[test]
    fn variants_differ_in_what_they_say_and_in_name() {
        let text = format!("{SMALL}\n[variants.uniform.model]\nffn_multipliers = 2.0\n[variants.scaled]\n");
        let plans = read(&text, &[]).unwrap();
        let names: Vec<&str> = plans.iter().map(|plan| plan.run.name.as_str()).collect();
        assert_eq!(names, ["small-scaled", "small-uniform"]);
        assert_ne!(plans[0].model, plans[1].model);
        assert_eq!(plans[0].train, plans[1].train);
        let text = format!("{SMALL}\n[variants]\nuniform = 2.0\n").replace("\"small\"", "7");
        let problems = read(&text, &[]).unwrap_err();
        let keys: Vec<&str> = problems.iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(keys, ["variants.uniform", "run.name"]);
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
    fn a_norm_is_one_of_three() {
        let plan = one(SMALL, &["model.norm=layer"]).unwrap();
        assert_eq!(plan.model.norm, NormKind::Layer);
        assert_eq!(one(&plan.to_toml(), &[]).unwrap(), plan);
        assert!(one(SMALL, &["model.norm=naive_rms"]).is_ok());
        let text = one(SMALL, &["model.norm=batch"]).unwrap_err().to_string();
        assert!(text.contains("it must be \"rms\", \"naive_rms\" or \"layer\""), "{text}");
    }
}
