//! The real program: where it listens, what it prints, and a whole run of a plan without held-out text.

#![cfg(feature = "local-workers")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const PLAN: &str = r#"
[run]
name = "small"
[local]
workers = 1
device = "cpu"
[cluster]
dead_after = "10s" # test machines are busy
[tokenizer]
file = "TOKENIZER"
[model]
vocab_size = 640
max_context_length = 64
num_transformer_layers = 1
model_dim = 32
head_dim = 16
num_gqa_groups = 1
ffn_dim_divisor = 16
[data]
lanes = 1
min_characters = 1
min_tokens = 1
[[data.source]]
name = "texts"
url = "texts"
files = ["*.txt"]
text = "text"
[train]
iterations = 6
warmup = 1
sequences = 2
micro_batch = 2
held_out_every = 2
[checkpoint]
every = 3
average = 2
[evaluate]
prompt = 4
continuation = 4
[benchmark]
prompt = 2
generate = 2
runs = 1
"#;

/// A folder with the plan and 40 texts.
fn fixture() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny/tokenizer.model");
    std::fs::write(home.path().join("plan.toml"), PLAN.replace("TOKENIZER", golden.to_str().unwrap()))
        .unwrap();
    std::fs::create_dir(home.path().join("texts")).unwrap();
    for number in 0..40 {
        let text = format!("Text number {number} has some words. ").repeat(12);
        std::fs::write(home.path().join(format!("texts/{number:02}.txt")), text).unwrap();
    }
    home
}

fn coordinator(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
    command.current_dir(home).args(arguments).stdin(Stdio::null());
    for variable in ["ULMUS_PLAN", "ULMUS_LISTEN"] {
        command.env_remove(variable);
    }
    command
}

fn output(home: &Path, arguments: &[&str]) -> Output {
    coordinator(home, arguments).output().expect("the program can be started")
}

#[track_caller]
fn assert_refused(output: &Output, texts: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    for text in texts {
        assert!(message.contains(text), "{text:?} is not in: {message}");
    }
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let home = fixture();
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["init"],
        &["init", "--from", "openelm-270m"],
        &["--plan", "plan.toml", "--check"],
        &["--plan", "plan.toml", "--check", "sources"],
    ] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = coordinator(home.path(), arguments).stdout(full).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
        assert!(message.contains("No space left"), "{message}");
        assert!(output_is_whole(home.path(), arguments), "{arguments:?}");
    }
    assert!(!home.path().join("runs").exists(), "nothing was started");
}

fn output_is_whole(home: &Path, arguments: &[&str]) -> bool {
    let output = output(home, arguments);
    output.status.success() && !output.stdout.is_empty()
}

#[test]
fn a_check_ends_with_a_verdict() {
    let home = fixture();
    let check = |more: &[&str]| {
        let output = output(home.path(), &[&["--plan", "plan.toml", "--check"], more].concat());
        let said = if output.status.success() { output.stdout } else { output.stderr };
        let said = String::from_utf8(said).unwrap();
        (output.status.code(), said.lines().last().unwrap_or_default().to_owned(), said)
    };
    let (code, verdict, _) = check(&[]);
    assert_eq!(
        (code, &*verdict),
        (Some(0), "the plan can run, if what it reads is there; --check sources looks")
    );
    let (code, verdict, said) = check(&["sources"]);
    assert_eq!((code, &*verdict), (Some(0), "the plan can run"));
    assert!(said.contains("source texts: 40 files"), "{said}");
    for more in [
        &["--set", "data.threads=0", "--set", "train.clips=1"][..],
        &["sources", "--set", "tokenizer.file=none", "--set", "data.source.0.url=nowhere"],
    ] {
        let (code, verdict, said) = check(more);
        assert_eq!((code, &*verdict), (Some(2), "the plan cannot run: 2 problems"), "{said}");
    }
    let (_, verdict, _) = check(&["--set", "data.threads=0"]);
    assert_eq!(verdict, "the plan cannot run: 1 problem");
    assert!(!home.path().join("runs").exists(), "nothing was started");
}

#[test]
fn too_little_text_for_the_lanes_is_found_before_the_start() {
    let home = fixture();
    let prepared = [
        "--plan",
        "plan.toml",
        "--set",
        "prepare.paths=[\"texts\"]",
        "--set",
        "data.source.0.url=run:shards",
        "--set",
        "data.source.0.files=[\"*.parquet\"]",
    ];
    let lanes = [&prepared[..], &["--set", "data.lanes=2"]].concat();
    let texts = ["the prepared text makes 1 unit", "set data.lanes to 1, or name more text"];
    assert_refused(&output(home.path(), &[&lanes[..], &["--check", "sources"]].concat()), &texts);
    // So the start says, too.
    assert_refused(&output(home.path(), &lanes), &["1 unit for the 2 lanes", "use data.lanes of at most 1"]);
    let fits = output(home.path(), &[&prepared[..], &["--check", "sources"]].concat());
    let said = String::from_utf8_lossy(&fits.stdout).into_owned();
    assert!(
        fits.status.success() && said.contains("prepare: 40 files match, whose text makes 1 unit"),
        "{said}"
    );
}

/// A running program, which is killed when the value is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn it_listens_at_names_as_well() {
    let home = fixture();
    for (listen, at) in [("localhost:0", ":"), ("127.0.0.1:0", "127.0.0.1:"), ("[::1]:0", "[::1]:")] {
        if listen.starts_with('[') && std::net::TcpListener::bind(listen).is_err() {
            continue;
        }
        let arguments = ["--plan", "plan.toml", "--listen", listen, "--set", "local.workers=0"];
        // A run name may be a number.
        let arguments = [&arguments[..], &["--set", "run.name=1234567"]].concat();
        let mut running =
            Running(coordinator(home.path(), &arguments).stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(running.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(
            line.starts_with("run 1234567 in ") && line.contains(&format!("join at {at}")) || at == ":",
            "{line}"
        );
        let port: u16 = line.trim().rsplit(':').next().unwrap().parse().unwrap();
        assert!(port > 0, "{line}");
    }
    for (listen, texts) in [
        ("localhost", &["port is missing", "localhost:7070"][..]),
        ("::1", &["port is missing", "[::1]:7070"]),
        (":7070", &["host is missing", "0.0.0.0"]),
        ("localhost:x", &["invalid port \"x\""]),
        ("no.such.host.invalid:7070", &["cannot listen on no.such.host.invalid:7070", "--listen HOST:PORT"]),
    ] {
        let arguments = ["--plan", "plan.toml", "--set", "local.workers=0", "--listen", listen];
        assert_refused(&output(home.path(), &arguments), texts);
    }
}

#[test]
fn a_run_without_held_out_text_says_so_before_it_trains_and_is_finished() {
    let home = fixture();
    let arguments = ["--plan", "plan.toml", "--set", "data.holdout=1e-9"];
    let finished = output(home.path(), &arguments);
    let said = String::from_utf8_lossy(&finished.stdout).into_owned();
    assert!(finished.status.success(), "{said}{}", String::from_utf8_lossy(&finished.stderr));
    let notice = said.find("no document is held out").expect(&said);
    let trains = said.find("trains from step 0").expect(&said);
    assert!(notice < trains && said.contains("train.held_out_every is 2"), "{said}");
    assert!(said.contains("\nnot evaluated: no document is held out"), "{said}");
    // This plan makes no shards, and nothing says that it does.
    assert!(said.contains("prepare on local-0: the text to read, its tokenizer and its manifest"), "{said}");
    assert!(said.contains("\nnot continued: no document is held out"), "{said}");
    let result = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(home.path().join("runs/small").join(name)).unwrap()).unwrap()
    };
    for name in ["evaluate-average", "evaluate-last", "continuations"] {
        assert!(result(&format!("results/{name}.json"))["skipped"].is_string());
    }
    assert!(result("results/benchmark.json")["generate_tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(home.path().join("runs/small/export/model.safetensors").is_file());
    let again = output(home.path(), &arguments);
    assert!(again.status.success() && String::from_utf8_lossy(&again.stdout).contains("not evaluated"));
    // The summary of a run that was already finished must also be printed.
    let full = File::options().write(true).open("/dev/full").unwrap();
    let lost = coordinator(home.path(), &arguments).stdout(full).output().unwrap();
    assert_eq!(lost.status.code(), Some(1), "{lost:?}");
}
