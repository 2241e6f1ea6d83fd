//! Runs `dataloader examples` as a person would, on every form and format of rows, and compares what it prints with what TRL makes
//! of them.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tempfile::TempDir;
use ulmus_dataloader::{Folder, read_rows};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");

/// A folder with rows and a plan.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.0.path().join(name), contents).unwrap();
    }

    /// Runs the program on `source`, in a stage with some settings of which the first is the method. An example has at most 96
    /// tokens if they do not say otherwise.
    fn run(&self, source: &str, settings: &str, arguments: &[&str]) -> Output {
        let length = if settings.contains("max_length") { "" } else { "max_length = 96\n" };
        self.write(
            "plan.toml",
            format!(
                "[run]\nname = \"none\"\n[base]\nmodel = \"{GOLDEN}/tiny\"\n[store]\nurl = {:?}\n\
                 [[tune]]\nname = \"it\"\nof = \"base\"\nbatch = 8\n{length}method = {settings}\n[[tune.data]]\n{source}\n",
                self.path("runs")
            ),
        );
        Command::new(env!("CARGO_BIN_EXE_dataloader"))
            .args(["examples", "--plan", &self.path("plan.toml"), "--stage", "it"])
            .args(arguments)
            .output()
            .unwrap()
    }

    /// All lines for a file.
    fn lines(&self, file: &str, settings: &str) -> Vec<Value> {
        lines(&self.run(&url(file), settings, &["--all"]))
    }

    /// All lines for these rows.
    fn lines_of(&self, rows: &[Value], settings: &str) -> Vec<Value> {
        self.write("rows.jsonl", rows.iter().map(|row| row.to_string() + "\n").collect::<String>());
        self.lines(&self.path("rows.jsonl"), settings)
    }
}

fn url(file: &str) -> String {
    format!("url = {file:?}")
}

fn golden(name: &str) -> String {
    format!("{GOLDEN}/tune/{name}")
}

fn read(name: &str) -> Value {
    serde_json::from_slice(&fs::read(golden(name)).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Value> = output
        .stdout
        .split_inclusive(|byte| *byte == b'\n')
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    for line in &lines {
        assert_eq!(line["kept"] == true, line["reason"].is_null(), "{line}");
    }
    lines
}

fn refused(output: &Output, words: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

/// A list of both parts, one behind the other.
fn joined(part: &Value, other: &Value) -> Value {
    [list(part), list(other)].concat().into()
}

/// The whole sequences of a pair, as the recipe's trainer has them.
fn assert_same_pair(line: &Value, expected: &Value) {
    for answer in ["chosen", "rejected"] {
        let own = |key: &str| joined(&line["prompt"][key], &line[answer][key]);
        assert_eq!(own("ids"), expected[format!("{answer}_input_ids")], "{answer} of {line}");
        assert_eq!(own("labels"), expected[format!("{answer}_labels")], "{answer} of {line}");
    }
}

#[test]
fn pairs_of_the_recipe_are_those_of_its_trainer() {
    let (place, dpo) = (Place::new(), read("dpo.json"));
    for truncation in ["keep_end", "keep_start"] {
        let settings =
            format!("\"dpo\"\ntokenization = \"recipe\"\nmax_prompt = 48\ntruncation = \"{truncation}\"");
        let own = place.lines_of(list(&dpo["rows"]), &settings);
        let expected = list(&dpo["tokens"][truncation]);
        assert_eq!((own.len(), expected.len()), (16, 16));
        for ((line, texts), expected) in own.iter().zip(list(&dpo["texts"])).zip(expected) {
            for part in ["prompt", "chosen", "rejected"] {
                assert_eq!(line[part]["text"], texts[part], "{part}");
            }
            assert_same_pair(line, expected);
        }
    }
    let recipe = "\"dpo\"\ntokenization = \"recipe\"\nmax_prompt = 48";
    let (good, bad): (Vec<Value>, Vec<Value>) =
        list(&dpo["border"]).iter().cloned().partition(|row| row.get("error").is_none());
    let texts =
        |row: &Value| json!({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]});
    let own = place.lines_of(&good.iter().map(texts).collect::<Vec<_>>(), recipe);
    assert_eq!((own.len(), bad.len()), (9, 1));
    own.iter().zip(&good).for_each(|(line, expected)| assert_same_pair(line, expected));
    place.write("bad.jsonl", texts(&bad[0]).to_string());
    refused(
        &place.run(&url(&place.path("bad.jsonl")), recipe, &[]),
        &["bad.jsonl, row 0", "become one token"],
    );
}

#[test]
fn answers_of_today_are_those_of_trl() {
    let (place, sft) = (Place::new(), read("sft.json"));
    for run in list(&sft["runs"]) {
        let settings = format!("\"sft\"\nmask_prompt = {}", run["prompt_masked"]);
        let own = place.lines_of(list(&sft["rows"]), &settings);
        assert_eq!(own.len(), list(&run["tokens"]).len());
        for ((line, expected), row) in own.iter().zip(list(&run["tokens"])).zip(list(&sft["rows"])) {
            assert_eq!((&line["ids"], &line["labels"]), (&expected["ids"], &expected["labels"]));
            assert_eq!(text(&line["text"]), text(&row["prompt"]).to_owned() + text(&row["completion"]));
        }
    }
}

#[test]
fn pairs_of_today_are_those_of_trl() {
    let (place, dpo, current) = (Place::new(), read("dpo.json"), read("dpo_current.json"));
    let standard = |row: &Value| {
        let last = |key: &str| format!(" {}", text(&list(&row[key]).last().unwrap()["content"]));
        let prompt = format!("Q: {}\nA:", text(&row["prompt"]));
        json!({"prompt": prompt, "chosen": last("chosen"), "rejected": last("rejected")})
    };
    for kind in ["conversational", "standard"] {
        let rows: Vec<Value> = list(&dpo["rows"])
            .iter()
            .map(|row| if kind == "standard" { standard(row) } else { row.clone() })
            .collect();
        let cut = place.lines_of(&rows, "\"dpo\"\ntruncation = \"keep_start\"");
        let kept: Vec<Value> = cut.iter().map(|line| line["kept"].clone()).collect();
        assert_eq!(json!(kept), current["kept"][kind]);
        assert!(
            cut.iter().all(|line| line["kept"] == true || line["reason"] == "the prompt fills max_length")
        );
        // The reference lists the rows that it keeps, before they are cut.
        let source = url(&place.path("rows.jsonl"));
        let whole = lines(&place.run(&source, "\"dpo\"", &["--all", "--set", "tune.it.max_length=2048"]));
        let of_kept = whole.iter().zip(&kept).filter(|(_, kept)| **kept == true).map(|(line, _)| line);
        let mut count = 0;
        for (line, expected) in of_kept.zip(list(&current["tokens"][kind])) {
            for part in ["prompt", "chosen", "rejected"] {
                assert_eq!(line[part]["ids"], expected[format!("{part}_ids")], "{part} of {line}");
            }
            let [chosen, rejected] = ["chosen", "rejected"].map(|part| &line[part]);
            assert_eq!((&chosen["labels"], &rejected["labels"]), (&chosen["ids"], &rejected["ids"]));
            assert!(list(&line["prompt"]["labels"]).iter().all(|label| *label == json!(-100)));
            count += 1;
        }
        assert_eq!(count, list(&current["tokens"][kind]).len());
    }
}

#[test]
fn conversations_go_through_templates_as_in_transformers() {
    let (place, chat) = (Place::new(), read("chat.json"));
    let mut compared = 0;
    for (name, template) in chat["templates"].as_object().unwrap() {
        place.write("chat.jinja", text(template));
        let of = |expected: &Value| {
            expected["template"] == *name
                && expected["add_generation_prompt"] == false
                && expected["empty_system_message_inserted"] != true
        };
        let cases: Vec<(&Value, &Value)> = list(&chat["cases"])
            .iter()
            .flat_map(|case| {
                list(&case["renders"])
                    .iter()
                    .filter(|expected| of(expected))
                    .map(move |expected| (case, expected))
            })
            .collect();
        let (good, bad): (Vec<_>, Vec<_>) =
            cases.into_iter().partition(|(_, expected)| expected.get("error").is_none());
        let rows: Vec<Value> = good.iter().map(|(case, _)| json!({"messages": case["messages"]})).collect();
        let settings = |mask: bool| {
            format!(
                "\"sft\"\non_useless = \"keep\"\nmax_length = 2048\nmask_prompt = {mask}\ntemplate = {:?}",
                place.path("chat.jinja")
            )
        };
        for (line, (case, expected)) in place.lines_of(&rows, &settings(false)).iter().zip(&good) {
            assert_eq!(
                (&line["text"], &line["ids"]),
                (&expected["text"], &expected["ids"]),
                "{name}: {}",
                case["note"]
            );
            assert_eq!(line["labels"], line["ids"]);
            compared += 1;
        }
        for (line, (case, expected)) in place.lines_of(&rows, &settings(true)).iter().zip(&good) {
            let Some(mask) = expected.get("assistant_mask") else { continue };
            let says_nothing = list(mask).iter().all(|bit| *bit == 0);
            assert_eq!(line["kept"], json!(!says_nothing), "{name}: {}", case["note"]);
            if !says_nothing {
                let bits = list(&line["labels"]).iter().map(|label| u8::from(*label != json!(-100)));
                assert_eq!(json!(bits.collect::<Vec<_>>()), *mask, "{name}: {}", case["note"]);
            }
        }
        for (case, expected) in bad {
            place.write("bad.jsonl", json!({"messages": case["messages"]}).to_string());
            let output = place.run(&url(&place.path("bad.jsonl")), &settings(false), &["--all"]);
            refused(&output, &["bad.jsonl, row 0", "chat.jinja", text(&expected["error"])]);
        }
    }
    assert!(compared > 40, "{compared}");
}

#[test]
fn instructions_are_those_of_the_adapter_recipe() {
    let place = Place::new();
    let all = "\"sft\"\nmask_prompt = false\nmax_length = 2048";
    let own = place.lines(&golden("data/commonsense_like.json"), all);
    let expected = read("data/expected.json");
    let expected = list(&expected["commonsense"]);
    assert_eq!((own.len(), expected.len()), (24, 8), "the reference has the first rows");
    for (line, expected) in own.iter().zip(expected) {
        assert_eq!((&line["text"], &line["ids"]), (&expected["text"], &expected["ids"]));
    }
    let peft = read("peft.json");
    let own = place.lines_of(list(&peft["rows"]), all);
    let ids: Vec<Value> = own.iter().map(|line| line["ids"].clone()).collect();
    assert_eq!(json!(ids), peft["tokens"]);
}

/// Messages in the template of the recipe. A generation prompt belongs to the prompt.
fn rendered(messages: &Value, is_prompt: bool) -> String {
    let message =
        |message: &Value| format!("<|{}|>\n{}</s>\n", text(&message["role"]), text(&message["content"]));
    let whole: String = list(messages).iter().map(message).collect();
    let answer = "<|assistant|>\n";
    if is_prompt { whole + answer } else { whole.strip_prefix(answer).unwrap_or(&whole).to_owned() }
}

#[test]
fn every_form_is_shown_and_the_same_in_every_form_and_format() {
    let place = Place::new();
    let count = |name: &str, method: &str| {
        let lines = place.lines(&golden(&format!("data/{name}")), method);
        assert!(lines.iter().all(|line| line["kept"] == true), "{name}");
        lines.len()
    };
    for name in [
        "alpaca.json",
        "messages.jsonl",
        "prompt_completion.jsonl",
        "prompt_completion_conversational.jsonl",
        "sharegpt.json",
        "sharegpt_system.jsonl",
        "text.jsonl",
    ] {
        assert!(count(&format!("sft_{name}"), "\"sft\"") > 0);
    }
    let without_place = |mut lines: Vec<Value>| {
        for line in &mut lines {
            line.as_object_mut().unwrap().remove("file");
        }
        lines
    };
    // A prompt is told, or what both answers begin with.
    let normalised = &read("data/expected.json")["normalised"];
    for kind in
        ["standard_explicit", "standard_implicit", "conversational_explicit", "conversational_implicit"]
    {
        let name = format!("pref_{kind}.jsonl");
        let own = place.lines(&golden(&format!("data/{name}")), "\"dpo\"");
        let expected = list(&normalised[&name]);
        assert_eq!(own.len(), expected.len());
        for (line, expected) in own.iter().zip(expected) {
            for part in ["prompt", "chosen", "rejected"] {
                match &expected[part] {
                    Value::String(text) => assert_eq!(line[part]["text"], *text, "{name}"),
                    messages => {
                        assert_eq!(text(&line[part]["text"]), rendered(messages, part == "prompt"), "{name}");
                    }
                }
            }
        }
    }
    // Both versions of UltraFeedback, binarised.
    let of_split = |split: &str| {
        let source = format!("{}\nsplit = {split:?}", url(&golden("data")));
        lines(&place.run(&source, "\"dpo\"\nmax_length = 2048", &["--all"]))
    };
    assert_eq!((of_split("train").len(), of_split("test").len()), (16, 5));
    let expected = without_place(of_split("train_prefs"));
    assert_eq!(expected.len(), 8);
    let rows = read_rows(&Folder::open(&golden("arrow")).unwrap(), "train_prefs.arrow").unwrap();
    let text: String = rows.iter().map(|row| serde_json::to_string(row).unwrap() + "\n").collect();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(text.as_bytes()).unwrap();
    place.write("a.jsonl", &text);
    place.write("b.json", format!("[{}]", text.trim_end().replace('\n', ",")));
    place.write("c.jsonl.gz", gzip.finish().unwrap());
    place.write("d.jsonl.zst", zstd::encode_all(text.as_bytes(), 1).unwrap());
    fs::copy(golden("arrow/train_prefs.arrow"), place.path("e.arrow")).unwrap();
    for name in ["a.jsonl", "b.json", "c.jsonl.gz", "d.jsonl.zst", "e.arrow"] {
        let own = place.lines(&place.path(name), "\"dpo\"\nmax_length = 2048");
        assert_eq!(without_place(own), expected, "{name}");
    }
}

/// The rows of `defects.jsonl` on which the recipe stops, and the program with it.
const STOPS: [(&str, &str); 3] =
    [("null content", "rejected"), ("rejected missing", "rejected"), ("empty list", "chosen")];

#[test]
fn rows_that_teach_nothing_are_left_out_and_those_that_are_wrong_are_named() {
    let (place, expected) = (Place::new(), read("data/expected.json"));
    let defects = fs::read_to_string(golden("data/defects.jsonl")).unwrap();
    let named: Vec<(&str, Value, &Value)> = defects
        .lines()
        .zip(list(&expected["defects"]))
        .map(|(row, defect)| (text(&defect["name"]), serde_json::from_str(row).unwrap(), defect))
        .collect();
    let (stops, others): (Vec<_>, Vec<_>) =
        named.into_iter().partition(|(name, ..)| STOPS.iter().any(|(stop, _)| stop == name));
    let rows: Vec<Value> = others.iter().map(|(_, row, _)| row.clone()).collect();

    let own = place.lines_of(&rows, "\"dpo\"");
    let dropped: Vec<(u64, &str)> = own
        .iter()
        .filter(|line| line["kept"] == false)
        .map(|line| (line["row"].as_u64().unwrap(), text(&line["reason"])))
        .collect();
    let (equal, empty) = ("chosen and rejected are equal", "an answer is empty");
    let no_prompt = (8, "nothing stands before the answer");
    assert_eq!(dropped, [(0, equal), (1, empty), (2, empty), (3, equal), (4, empty), (7, equal), no_prompt]);

    let own =
        place.lines_of(&rows, "\"dpo\"\ntokenization = \"recipe\"\nmax_prompt = 48\non_useless = \"keep\"");
    let mut trained_on = 0;
    for (line, (_, _, defect)) in own.iter().zip(&others) {
        if defect["outcome"] == "trained on" {
            assert_same_pair(line, &defect["tokens"]);
            trained_on += 1;
        }
    }
    assert_eq!(trained_on, 15);
    for ((name, row, _), (_, column)) in stops.iter().zip(STOPS) {
        place.write("bad.jsonl", format!("{}\n{row}\n", rows[5]));
        let output = place.run(&url(&place.path("bad.jsonl")), "\"dpo\"", &["--all"]);
        let column = format!("column {column:?}");
        refused(&output, &["bad.jsonl, row 1 (from 0)", &column]);
        assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1, "{name}: the row before it");
    }
}

#[test]
fn three_rows_are_shown_without_reading_all() {
    let place = Place::new();
    let row = |at: usize| {
        json!({"prompt": "a", "chosen": if at == 1 { " c" } else { " b" }, "rejected": " c"}).to_string()
    };
    let rows = (0..5000).map(row).collect::<Vec<_>>().join("\n");
    place.write("a.jsonl", rows.clone() + "\nbroken");
    let source = url(&place.path("a.jsonl"));
    let shown: Vec<Value> =
        lines(&place.run(&source, "\"dpo\"", &[])).iter().map(|line| line["row"].clone()).collect();
    assert_eq!(shown, [0, 2, 3]);
    let all = place.run(&source, "\"dpo\"", &["--all"]);
    refused(&all, &["a.jsonl is not JSON lines: line 5001"]);
    assert_eq!(String::from_utf8_lossy(&all.stdout).lines().count(), 5000);
    // A stream that is cut off behind its beginning is not read to there.
    let compressed = zstd::encode_all(rows.repeat(200).as_bytes(), 1).unwrap();
    place.write("b.jsonl.zst", &compressed[..compressed.len() - 5]);
    assert_eq!(lines(&place.run(&url(&place.path("b.jsonl.zst")), "\"dpo\"", &[])).len(), 3);
}

#[test]
fn the_tokenizer_is_that_of_the_run_or_of_the_plan_or_of_the_base() {
    let place = Place::new();
    place.write("a.jsonl", json!({"text": "a b c"}).to_string());
    let source = url(&place.path("a.jsonl"));
    let of_base = lines(&place.run(&source, "\"sft\"", &[]));
    fs::copy(format!("{GOLDEN}/tiny/tokenizer.json"), place.path("named.json")).unwrap();
    let named = format!("tokenizer.file={}", place.path("named.json"));
    assert_eq!(lines(&place.run(&source, "\"sft\"", &["--set", &named])), of_base);
    // Plain texts begin without BOS where the folder of the tokenizer says so.
    place.write("tokenizer_config.json", r#"{"add_bos_token": false}"#);
    let without = lines(&place.run(&source, "\"sft\"", &["--set", &named]));
    assert_eq!(list(&without[0]["ids"])[..], list(&of_base[0]["ids"])[1..]);
    fs::create_dir_all(place.path("runs/none")).unwrap();
    fs::copy(format!("{GOLDEN}/tiny/tokenizer.model"), place.path("runs/none/tokenizer.model")).unwrap();
    let of_run = lines(&place.run(&source, "\"sft\"", &["--set", "base.model=nowhere"]));
    assert_eq!(of_run, of_base);
    fs::remove_dir_all(place.path("runs")).unwrap();
    refused(&place.run(&source, "\"sft\"", &["--set", "base.model=nowhere"]), &["nowhere", "not a folder"]);
    refused(
        &place.run(&source, "\"sft\"", &["--set", &format!("base.model={}", place.path(""))]),
        &["has no tokenizer.model and no tokenizer.json", "tokenizer.file"],
    );
    let plan = place.path("plan.toml");
    let other = Command::new(env!("CARGO_BIN_EXE_dataloader"))
        .args(["examples", "--plan", &plan, "--stage", "other"])
        .output()
        .unwrap();
    refused(&other, &["no tuning stage \"other\"", "[\"it\"]"]);
}

#[test]
fn the_quickstart_s_stages_are_shown() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let tokenizer = format!("tokenizer.file={GOLDEN}/tiny/tokenizer.model");
    for (stage, rows) in [("instruct", 240), ("prefer", 240), ("adapt", 240)] {
        let output = Command::new(env!("CARGO_BIN_EXE_dataloader"))
            .current_dir(repository)
            .args(["examples", "--plan", "plans/quickstart-tune.toml", "--stage", stage, "--all"])
            .args([
                "--set",
                &tokenizer,
                "--set",
                "store.url=nowhere",
                "--set",
                &format!("tune.{stage}.max_length=1024"),
            ])
            .output()
            .unwrap();
        let lines = lines(&output);
        assert_eq!(lines.iter().filter(|line| line["kept"] == true).count(), rows, "{stage}");
    }
}
