//! Writes shards of texts and of token ids with a program that is killed and restarted.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;

const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny/tokenizer.model");

fn dataloader() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dataloader"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// 6 MB of lines with very different lengths.
fn lines() -> Vec<u8> {
    let mut lines = String::new();
    for number in 0..3000_usize {
        let words = "some words of a text ".repeat(number * 37 % 190);
        writeln!(lines, "{{\"text\": \"{number} {words}\"}}").unwrap();
    }
    lines.into_bytes()
}

/// A plan with one source.
fn plan(place: &Path, name: &str, url: &Path, files: &str) -> String {
    let path = place.join(format!("{name}.toml"));
    let text = format!(
        "[model]\npreset = \"openelm-270m\"\n[tokenizer]\nfile = {TOKENIZER:?}\n[data]\nunit = \"256KiB\"\nthreads = 2\n\
         [[data.source]]\nname = \"books\"\nurl = \"{}\"\nfiles = [{files:?}]\ntext = \"text\"\n",
        url.display()
    );
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Names of files that were half written when a program was killed.
fn left_over(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder.join("books")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains('#')).collect()
}

/// Names and contents of the shards in a folder, without files that were half written when a program was killed.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let Ok(entries) = std::fs::read_dir(folder.join("books")) else { return BTreeMap::new() };
    let read =
        |path: &Path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(path).unwrap());
    let paths = entries.map(|entry| entry.unwrap().path());
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    let is_shard = |path: &PathBuf| name(path).starts_with("part-") && !name(path).contains('#');
    paths.filter(is_shard).map(|path| read(&path)).collect()
}

/// Kills the program whenever it has written another shard, and restarts it until it is done.
fn killed_often(arguments: &[&str], folder: &Path) -> u32 {
    let mut kills = 0;
    loop {
        let before = files(folder).len();
        let mut program = dataloader().args(arguments).spawn().unwrap();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = program.try_wait().unwrap() {
                break Some(status);
            }
            if files(folder).len() > before {
                program.kill().unwrap();
                program.wait().unwrap();
                break None;
            }
            assert!(begun.elapsed() < Duration::from_mins(2), "nothing more was written");
            std::thread::park_timeout(Duration::from_millis(1));
        };
        match status {
            Some(status) => {
                assert!(status.success());
                return kills;
            }
            None => kills += 1,
        }
    }
}

#[test]
fn a_killed_and_restarted_program_writes_the_same_shards() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let lines = lines();
    let corpus = place.join("corpus");
    std::fs::create_dir(&corpus).unwrap();
    std::fs::write(corpus.join("a.jsonl"), &lines).unwrap();
    let mut chain = GzEncoder::new(Vec::new(), Compression::default());
    chain.write_all(&lines).unwrap();
    std::fs::write(corpus.join("a.json.gz"), chain.finish().unwrap()).unwrap();
    // One row group of 6 MB, which is read in segments.
    let large = plan(place, "large", &corpus, "a.jsonl");
    let large = ["pack", "--plan", &large, "--set", "data.unit=64MiB", "--to", place.to_str().unwrap()];
    succeeds(dataloader().args(large));
    std::fs::rename(place.join("books/part-00000-000.parquet"), corpus.join("a.parquet")).unwrap();

    let mut counts = Vec::new();
    for file in ["a.jsonl", "a.json.gz", "a.parquet"] {
        let plan_of_file = plan(place, "texts", &corpus, file);
        for (command, suffix) in [("pack", "parquet"), ("tokenize", "npy")] {
            let [at_once, often] =
                ["at-once", "often"].map(|name| place.join(format!("{file}-{command}-{name}")));
            let arguments = |to: &Path| {
                let to = to.to_str().unwrap();
                ["--plan", &plan_of_file, "--shard", "500KB", "--to", to].map(str::to_owned)
            };
            succeeds(dataloader().arg(command).args(arguments(&at_once)));
            let written = files(&at_once);
            assert!(
                written.len() > 6 && written.keys().all(|name| name.ends_with(suffix)),
                "{:?}",
                written.keys()
            );
            let arguments = arguments(&often);
            let arguments: Vec<&str> =
                [command].into_iter().chain(arguments.iter().map(String::as_str)).collect();
            assert!(killed_often(&arguments, &often) > 2, "{file}");
            assert!(files(&often) == written, "{file}: kills have changed the shards");
            assert_eq!(left_over(&often), [""; 0]);
            let again = succeeds(dataloader().args(&arguments));
            assert!(again.contains(&format!("{} existed already", written.len())), "{again}");
            // Shards of other settings are refused, and a lost shard is written again.
            for other in ["data.unit=1MiB", "data.source.0.text=title"] {
                let other = dataloader().args(&arguments).args(["--set", other]).output().unwrap();
                let message = String::from_utf8_lossy(&other.stderr);
                assert_eq!(other.status.code(), Some(2), "{message}");
                let words = ["shards of other files, or made with another", "no column \"title\""];
                assert!(words.iter().any(|words| message.contains(words)), "{message}");
            }
            std::fs::remove_file(often.join("books").join(written.keys().next().unwrap())).unwrap();
            succeeds(dataloader().args(&arguments));
            assert!(files(&often) == written, "{file}: the loss of a shard has changed the shards");

            // The shards have the same content as the texts.
            for source in [&corpus, &at_once.join("books")] {
                let files = if *source == corpus { file.to_owned() } else { format!("*.{suffix}") };
                let counted = plan(place, "counted", source, &files);
                let set = ["--set", "data.holdout=0.000001"];
                let counted = succeeds(dataloader().args(["count", "--json", "--plan", &counted]).args(set));
                let counted: Value = serde_json::from_str(&counted).unwrap();
                counts.push(counted[0]["tokens"].as_u64().unwrap());
            }
        }
    }
    assert!(counts[0] > 1_000_000 && counts.iter().all(|tokens| *tokens == counts[0]), "{counts:?}");
}

#[test]
fn an_interrupted_or_changed_copy_is_made_again() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let [corpus, copies] = ["corpus", "copies"].map(|name| place.join(name));
    std::fs::create_dir(&corpus).unwrap();
    // The file is so large that it is copied in several parts.
    std::fs::write(corpus.join("a.jsonl"), lines().repeat(4)).unwrap();
    std::fs::write(corpus.join("b.jsonl"), lines()).unwrap();
    let plan = plan(place, "texts", &corpus, "*.jsonl");
    let arguments = ["mirror", "--plan", &plan, "--to", copies.to_str().unwrap()];
    for _ in 0..2 {
        let mut slow = dataloader().args(arguments).args(["--rate", "1MB"]).spawn().unwrap();
        let begun = Instant::now();
        while !copies.join("books").exists() || left_over(&copies).is_empty() {
            assert!(begun.elapsed() < Duration::from_mins(1), "nothing was begun");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        slow.kill().unwrap();
        slow.wait().unwrap();
    }
    let copied = |expected: &str| {
        let said = succeeds(dataloader().args(arguments));
        assert!(said.contains(expected), "{said}");
        assert_eq!(left_over(&copies), [""; 0]);
        for name in ["a.jsonl", "b.jsonl"] {
            assert!(
                std::fs::read(corpus.join(name)).unwrap()
                    == std::fs::read(copies.join("books").join(name)).unwrap()
            );
        }
    };
    copied("2 files");
    copied("0 files");
    // The size stays the same.
    let mut bytes = lines();
    bytes[1000] ^= 1;
    std::fs::write(copies.join("books/b.jsonl"), bytes).unwrap();
    copied("1 file");
}

#[test]
fn other_files_are_never_overwritten() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    std::fs::create_dir(place.join("books")).unwrap();
    let name = "part-00000-000.parquet";
    let corpus = place.join("corpus");
    std::fs::create_dir(&corpus).unwrap();
    std::fs::write(corpus.join("a.jsonl"), lines()).unwrap();
    std::fs::write(place.join("books").join(name), "a corpus of somebody's own").unwrap();
    let plan = plan(place, "texts", &corpus, "a.jsonl");
    let output =
        dataloader().args(["pack", "--plan", &plan, "--to", place.to_str().unwrap()]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && message.contains("it has other files"), "{message}");
    assert_eq!(std::fs::read(place.join("books").join(name)).unwrap(), b"a corpus of somebody's own");

    // Shards must not be written to a folder that is read from, now or next time.
    let own = place.join("own");
    std::fs::create_dir_all(own.join("books")).unwrap();
    std::fs::copy(corpus.join("a.jsonl"), own.join("books/a.jsonl")).unwrap();
    for (read, files) in [(own.join("books"), "*.jsonl"), (own.clone(), "**/*.jsonl")] {
        let plan = crate::plan(place, "circle", &read, files);
        for command in ["pack", "tokenize", "mirror"] {
            let arguments = [command, "--plan", &plan, "--to", own.to_str().unwrap()];
            let output = dataloader().args(arguments).output().unwrap();
            let message = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.code() == Some(2) && message.contains("is read from there"), "{message}");
        }
    }
    // Another source gets a folder beside it.
    let named = std::fs::read_to_string(&plan).unwrap().replace("\"books\"", "\"web\"");
    std::fs::write(&plan, named).unwrap();
    succeeds(dataloader().args(["pack", "--plan", &plan, "--to", place.to_str().unwrap()]));
    assert!(place.join("web").join(name).exists());
}

#[test]
fn all_files_of_ids_are_checked_before_any_is_read() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let numpy = |dtype: &str| {
        let text = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': (4,), }}\n");
        [&b"\x93NUMPY\x01\x00"[..], &(text.len() as u16).to_le_bytes(), text.as_bytes(), &[2; 16]].concat()
    };
    let two = numpy("<u2");
    std::fs::write(place.join("a.npy"), &two[..two.len() - 8]).unwrap();
    for (name, bytes, words) in [
        ("b.npy", numpy("<u4"), "its numbers are u32, not u16"),
        ("b.npy", numpy("<i8"), "its numbers are \"<i8\""),
        ("b.npy", two, "states 4 tokens, but there are 8"),
        ("b.jsonl", Vec::new(), "all files of a source must have the same format"),
    ] {
        std::fs::write(place.join(name), bytes).unwrap();
        let plan = plan(place, "ids", place, "[ab].*");
        let output = dataloader().args(["count", "--plan", &plan]).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && message.contains(words), "{message}");
        std::fs::remove_file(place.join(name)).unwrap();
    }
}

#[test]
fn token_ids_are_refused_where_text_is_needed() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    // Each document has 400 ids, followed by EOS.
    let ids: Vec<u8> =
        (0..4010_u16).flat_map(|n| if n % 401 == 400 { 2_u16 } else { 300 }.to_le_bytes()).collect();
    std::fs::write(place.join("a.bin"), ids).unwrap();
    let plan = plan(place, "ids", place, "a.bin");
    let refused = |arguments: &[&str], words: &str| {
        let output = dataloader().args(arguments).args(["--plan", &plan]).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && message.contains(words), "{message}");
    };
    refused(&["count"], "write format = \"u16\" or \"u32\"");
    let u16 = ["--set", "data.source.0.format=u16"];
    let [texts, ids] = ["texts", "ids"].map(|name| place.join(name).to_str().unwrap().to_owned());
    refused(&[&["pack", "--to", &texts][..], &u16].concat(), "holds token ids, but text is needed here");
    refused(&[&["tokenize", "--to", &ids][..], &u16].concat(), "holds token ids, but text is needed here");
    refused(&[&["count", "--set", "data.pack=corenet"][..], &u16].concat(), "set data.pack = \"concat\"");
    refused(&["count", "--set", "data.source.0.format=u32"], "name the tokenizer that made it");
    let counted = succeeds(dataloader().args(["count", "--json", "--plan", &plan]).args(u16));
    let counted: Value = serde_json::from_str(&counted).unwrap();
    assert_eq!((&counted[0]["documents"], &counted[0]["tokens"]), (&10.into(), &4020.into()));
    assert!(succeeds(dataloader().args(["inspect", "--plan", &plan]).args(u16)).contains("[300, 300"));
}
