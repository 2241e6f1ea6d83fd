//! Runs the program as a person would.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");

fn dataloader(arguments: &[&str], input: &str) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_dataloader"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    program.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    program.wait_with_output().unwrap()
}

fn tokenizer() -> String {
    format!("{GOLDEN}/tiny/tokenizer.model")
}

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
        .stdout
        .split_inclusive(|byte| *byte == b'\n')
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect()
}

fn refused(output: &Output, words: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

#[test]
fn texts_become_ids_and_ids_texts() {
    let texts = [json!("Hello, world"), json!(""), json!("two\nlines  and \u{1F600} <s>")];
    let input = texts.iter().map(|text| text.to_string() + "\n").collect::<Vec<_>>().concat();
    let tokenizer = tokenizer();
    let whole = dataloader(&["encode", "--tokenizer", &tokenizer], &input);
    let bare = dataloader(&["encode", "--no-bos", "--no-eos", "--tokenizer", &tokenizer], &input);
    for (whole, bare) in lines(&whole).into_iter().zip(lines(&bare)) {
        let with_ends = [vec![json!(1)], bare.as_array().unwrap().clone(), vec![json!(2)]].concat();
        assert_eq!(whole, Value::from(with_ends));
    }
    let back = dataloader(&["decode", "--tokenizer", &tokenizer], &String::from_utf8(whole.stdout).unwrap());
    assert_eq!(lines(&back), texts);
}

#[test]
fn errors_name_the_place() {
    let tokenizer = tokenizer();
    let encode = ["encode", "--tokenizer", &tokenizer];
    refused(&dataloader(&encode, "\"fine\"\nnot JSON\n"), &["line 2 of the input is not a JSON string"]);
    refused(
        &dataloader(&["decode", "--tokenizer", &tokenizer], "[1, -1]\n"),
        &["line 1", "a JSON list of token ids"],
    );
    refused(
        &dataloader(&["encode", "--tokenizer", "/no/such"], ""),
        &["/no/such cannot be read", "tokenizer.model"],
    );
    refused(
        &dataloader(&["decode", "--tokenizer", &tokenizer], "[1, 2]\n[3, 512]\n"),
        &["line 2", "token 512 does not exist", "512 pieces"],
    );
}

#[test]
fn a_byte_order_mark_is_dropped() {
    let place = tempfile::tempdir().unwrap();
    let marked = |name: &str| {
        let path = place.path().join(name);
        let json = std::fs::read(format!("{GOLDEN}/tiny/tokenizer.json")).unwrap();
        std::fs::write(&path, [b"\xef\xbb\xbf".as_slice(), &json].concat()).unwrap();
        path.display().to_string()
    };
    let plain = dataloader(&["encode", "--tokenizer", &format!("{GOLDEN}/tiny/tokenizer.json")], "\"a\"\n");
    let both = dataloader(&["encode", "--tokenizer", &marked("tokenizer.json")], "\u{feff}\"a\"\n");
    assert_eq!(lines(&plain), lines(&both));
}

#[test]
fn lone_surrogates_are_replaced() {
    let encode = |input| dataloader(&["encode", "--tokenizer", &tokenizer()], input);
    let (lone, replaced) = (encode("\"a \\ud800 b\"\n"), encode("\"a \u{fffd} b\"\n"));
    assert_eq!(lines(&lone), lines(&replaced));
    refused(&encode("\"a \\ud800 b\n"), &["line 1"]);
}

#[test]
fn a_plan_s_sources_are_counted() {
    let place = tempfile::tempdir().unwrap();
    let plan = place.path().join("plan.toml");
    let source = |name: &str, files: &str, text: &str| {
        format!(
            "[[data.source]]\nname = {name:?}\nurl = \"{GOLDEN}/a/data\"\nfiles = [{files:?}]\ntext = {text:?}\ntokens = 1\n"
        )
    };
    let sources = [
        source("lines", "*.jsonl", "text"),
        source("chain", "*.json.gz", "text"),
        source("rows", "*.parquet", "content"),
    ];
    let settings = "[run]\nname = \"count\"\n[model]\npreset = \"openelm-270m\"\n[data]\nmin_characters = 40\nmin_tokens = 60\n";
    std::fs::write(&plan, settings.to_owned() + &sources.concat()).unwrap();
    let plan = plan.to_str().unwrap();
    let tokenizer = tokenizer();
    let count = ["count", "--plan", plan, "--set", "tokenizer.file=x", "--tokenizer", &tokenizer];

    let counted = lines(&dataloader(&[&count[..], &["--json"]].concat(), "")).remove(0);
    let counted = counted.as_array().unwrap();
    assert_eq!(counted.len(), 3);
    for (found, files) in counted.iter().zip([3, 1, 1]) {
        let number = |key: &str| found[key].as_u64().unwrap();
        assert_eq!(number("files"), files);
        assert!(number("tokens") >= 60 && number("characters") <= number("bytes"), "{found}");
        assert!(number("short_characters") + number("short_tokens") < number("documents"), "{found}");
    }
    // Each line is a document, unless its text is null.
    let texts = (0..3).flat_map(|file| {
        let text = std::fs::read_to_string(format!("{GOLDEN}/a/data/corpus-{file:05}-00003.jsonl")).unwrap();
        let texts = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].clone());
        texts.filter_map(|text| text.as_str().map(str::to_owned)).collect::<Vec<_>>()
    });
    let texts: Vec<String> = texts.collect();
    assert_eq!(counted[0]["documents"], texts.len());
    assert_eq!(counted[0]["characters"], texts.iter().map(|text| text.chars().count()).sum::<usize>());

    let one = dataloader(&[&count[..], &["--source", "chain", "--json"]].concat(), "");
    assert_eq!(lines(&one)[0][0]["documents"], counted[1]["documents"]);
    let table = dataloader(&count, "");
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    let weight = format!("chain: tokens = {}, tokens_from = \"dataloader count\"", counted[1]["tokens"]);
    assert!(table.contains(&weight), "{table}");
    refused(&dataloader(&[&count[..], &["--source", "x"]].concat(), ""), &["no source \"x\"", "chain"]);
    refused(&dataloader(&["count", "--plan", "/no/such"], ""), &["/no/such: No such file"]);
}

#[test]
fn damage_has_an_exit_code_of_its_own() {
    let place = tempfile::tempdir().unwrap();
    let plan = place.path().join("plan.toml");
    let folder = place.path().display();
    let text = format!(
        "[model]\npreset = \"openelm-270m\"\n[tokenizer]\nfile = \"x\"\n[[data.source]]\nname = \"cut\"\nurl = \"{folder}\"\nfiles = [\"a.json.gz\"]\ntext = \"text\"\n"
    );
    std::fs::write(&plan, text).unwrap();
    let whole = std::fs::read(format!("{GOLDEN}/a/data/books-0000.json.gz")).unwrap();
    std::fs::write(place.path().join("a.json.gz"), &whole[..whole.len() - 9]).unwrap();
    let tokenizer = tokenizer();
    let plan = plan.to_str().unwrap();
    for more in [&["inspect"][..], &["count", "--tokenizer", &tokenizer]] {
        let output = dataloader(&[more, &["--plan", plan]].concat(), "");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(5), "{message}");
        assert!(message.contains("a.json.gz is damaged"), "{message}");
    }
}

#[test]
fn sources_that_the_run_makes_are_told_of_before_it_has_made_them() {
    let place = tempfile::tempdir().unwrap();
    let (plan, runs) = (place.path().join("plan.toml"), place.path().join("runs"));
    let prepared = format!(
        "[run]\nname = \"own\"\n[store]\nurl = {runs:?}\n[model]\npreset = \"openelm-270m\"\n[prepare]\npaths = [\"texts\"]\n"
    );
    std::fs::write(&plan, &prepared).unwrap();
    let plan = plan.to_str().unwrap();
    let tokenizer = tokenizer();
    let words = [
        "source \"prepared\" lies in the folder of the run",
        "runs/own has no data yet",
        "start the run first",
    ];
    refused(&dataloader(&["inspect", "--plan", plan], ""), &words);
    refused(&dataloader(&["inspect", "--json", "--plan", plan], ""), &words);
    refused(&dataloader(&["count", "--plan", plan, "--tokenizer", &tokenizer], ""), &words);
    refused(&dataloader(&["explain", "--plan", plan, "--step", "1", "--sequence", "0"], ""), &words);

    // Others are shown all the same.
    let source = |name: &str, url: &str, files: &str| {
        format!("[[data.source]]\nname = {name:?}\nurl = {url:?}\nfiles = [{files:?}]\ntext = \"text\"\n")
    };
    let lines = source("lines", &format!("{GOLDEN}/a/data"), "*.jsonl");
    std::fs::write(plan, prepared + &source("own", "run:shards", "*.parquet") + &lines).unwrap();
    let shown = dataloader(&["inspect", "--plan", plan], "");
    let said = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(
        shown.status.success() && said.contains("lines") && said.contains("runs/own has no data yet"),
        "{said}"
    );
    let shown = lines_of_inspection(&dataloader(&["inspect", "--json", "--plan", plan], ""));
    assert_eq!(shown, ["lines"]);
}

fn lines_of_inspection(output: &Output) -> Vec<String> {
    let reports = lines(output).remove(0);
    reports.as_array().unwrap().iter().map(|report| report["name"].as_str().unwrap().to_owned()).collect()
}
