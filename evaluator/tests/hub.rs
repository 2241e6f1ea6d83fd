//! Models and data sets from a server that plays the hub's API.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use ulmus_types::Digest;

const COMMIT: &str = "0123456789012345678901234567890123456789";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

/// Repositories by the path of their API, and files of each by their paths.
type Repositories = BTreeMap<&'static str, BTreeMap<String, Vec<u8>>>;

struct Hub {
    address: String,
    /// Requests for the contents of files.
    resolved: Arc<AtomicUsize>,
}

impl Hub {
    fn new(repositories: Repositories) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let resolved: Arc<AtomicUsize> = Arc::default();
        let count = Arc::clone(&resolved);
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                answer(connection.unwrap(), &repositories, &count);
            }
        });
        Self { address, resolved }
    }
}

fn answer(mut connection: TcpStream, repositories: &Repositories, resolved: &AtomicUsize) {
    let mut lines = BufReader::new(connection.try_clone().unwrap()).lines().map(Result::unwrap);
    let request = lines.next().unwrap();
    let headers: Vec<String> =
        lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    let path = request.split(' ').nth(1).unwrap();
    let path = path.split('?').next().unwrap();
    let mut found: Option<Vec<u8>> = None;
    for (api, files) in repositories {
        let place = api.trim_start_matches("models/");
        if path == format!("/api/{api}/revision/main") {
            found = Some(json!({ "sha": COMMIT }).to_string().into_bytes());
        } else if path == format!("/api/{api}/tree/{COMMIT}") {
            // As the hub names large files.
            let sha256 = |bytes: &[u8]| Digest::from_bytes(Sha256::digest(bytes).into()).to_string();
            let entry = |(path, bytes): (&String, &Vec<u8>)| {
                let lfs = json!({ "oid": sha256(bytes) });
                json!({ "type": "file", "path": path, "size": bytes.len(), "oid": "1", "lfs": lfs })
            };
            found = Some(Value::from(files.iter().map(entry).collect::<Vec<_>>()).to_string().into_bytes());
        } else if let Some(file) = path.strip_prefix(&format!("/{place}/resolve/{COMMIT}/")) {
            resolved.fetch_add(1, Ordering::Relaxed);
            found = files.get(file).cloned();
        }
    }
    let (status, body, more) = match found {
        None => ("404 Not Found", Vec::new(), String::new()),
        Some(body) => match headers.iter().find_map(|line| line.strip_prefix("range: bytes=")) {
            None => ("200 OK", body, String::new()),
            Some(range) => {
                let (first, last) = range.split_once('-').unwrap();
                let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
                let more = format!("content-range: bytes {first}-{last}/{}\r\n", body.len());
                ("206 Partial Content", body[first..=last].to_vec(), more)
            }
        },
    };
    let head = format!(
        "HTTP/1.1 {status}\r\n{more}content-length: {}\r\netag: \"1\"\r\n\
         last-modified: Mon, 01 Jan 2024 00:00:00 GMT\r\nconnection: close\r\n\r\n",
        body.len()
    );
    connection.write_all(head.as_bytes()).unwrap();
    if !request.starts_with("HEAD") {
        connection.write_all(&body).unwrap();
    }
}

/// The files of a folder, by their names.
fn files(folder: &Path, below: &str) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let read = |path: PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        (format!("{below}{name}"), std::fs::read(&path).unwrap())
    };
    entries.filter(|path| path.is_file()).map(read).collect()
}

#[test]
fn models_and_data_sets_come_from_the_hub() {
    let home = tempfile::tempdir().unwrap();
    let arc = golden("evaluation/data/allenai/ai2_arc");
    let mut rows = files(&arc.join("ARC-Easy"), "ARC-Easy/");
    rows.append(&mut files(&arc.join("ARC-Challenge"), "ARC-Challenge/"));
    let hub = Hub::new(
        [("datasets/allenai/ai2_arc", rows), ("models/lab/tiny", files(&golden("tiny"), ""))].into(),
    );
    let evaluator = |arguments: &[&str]| -> Output {
        Command::new(env!("CARGO_BIN_EXE_evaluator"))
            .args(arguments)
            .env("HF_ENDPOINT", &hub.address)
            .env("XDG_CACHE_HOME", home.path().join("cache"))
            .env_remove("HF_TOKEN")
            .output()
            .unwrap()
    };
    let stdout = |output: Output| {
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let data = home.path().join("data");
    let data = data.to_str().unwrap();
    let fetch = || stdout(evaluator(&["fetch", "--tasks", "arc_*", "--to", data]));
    // Of each part the split that is measured, and that of the examples.
    assert!(fetch().starts_with("4 files of "), "train and test of both parts");
    let resolved = hub.resolved.load(Ordering::Relaxed);
    assert!(fetch().starts_with("4 files of "));
    assert_eq!(hub.resolved.load(Ordering::Relaxed), resolved, "nothing is copied twice");
    // What is cut off or damaged is copied again.
    let file = Path::new(data).join("allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet");
    let whole = std::fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for damaged in [&whole[..10], &flipped] {
        std::fs::write(&file, damaged).unwrap();
        assert!(fetch().starts_with("4 files of "));
        assert_eq!(std::fs::read(&file).unwrap(), whole);
    }
    assert_eq!(hub.resolved.load(Ordering::Relaxed), resolved + 2);

    let results = |model: &str, data: &str| {
        let arguments =
            ["run", "--model", model, "--tasks", "arc_easy", "--num-fewshot", "1", "--data", data, "--json"];
        let file: Value = serde_json::from_str(&stdout(evaluator(&arguments))).unwrap();
        file["results"].clone()
    };
    let local = results(golden("tiny").to_str().unwrap(), golden("evaluation/data").to_str().unwrap());
    assert_eq!(results("hf://lab/tiny", data), local);

    for (arguments, words) in [
        (&["fetch", "--tasks", "piqa", "--to", data][..], "datasets/piqa"),
        (&["run", "--model", "hf://lab/none", "--data", data], "no such repository"),
    ] {
        let output = evaluator(arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains(words), "{message}");
    }
}
