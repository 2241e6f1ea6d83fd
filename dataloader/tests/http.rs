//! Corpora on a web server: named files, ranges of bytes, and files that change.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use ulmus_dataloader::{DataError, Manifest, Sources};
use ulmus_plan::{Bytes, DataConfig, SourceConfig};
use ulmus_types::Digest;

type Files = Arc<Mutex<BTreeMap<String, String>>>;

/// Serves files from memory, one request per connection, and returns the server's address.
fn serve(files: Files) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            answer(connection.unwrap(), &files);
        }
    });
    format!("http://{address}/corpus")
}

fn answer(mut connection: TcpStream, files: &Files) {
    let mut lines = BufReader::new(connection.try_clone().unwrap()).lines().map(Result::unwrap);
    let request = lines.next().unwrap();
    let headers: Vec<String> =
        lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let Some(file) = files.lock().unwrap().get(path.trim_start_matches("/corpus/")).cloned() else {
        connection
            .write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            .unwrap();
        return;
    };
    let range = headers.iter().find_map(|line| line.strip_prefix("range: bytes="));
    let (status, content_range, body) = match range {
        Some(range) => {
            let (first, last) = range.split_once('-').unwrap();
            let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
            let header = format!("content-range: bytes {first}-{last}/{}\r\n", file.len());
            ("206 Partial Content", header, file[first..=last].to_owned())
        }
        None => ("200 OK", String::new(), file.clone()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\n{content_range}content-length: {length}\r\netag: \"{}\"\r\n\
         last-modified: Mon, 01 Jan 2024 00:00:00 GMT\r\nconnection: close\r\n\r\n",
        Digest::of(file.as_bytes()).short()
    );
    let body = if method == "HEAD" { "" } else { &body };
    connection.write_all(format!("{head}{body}").as_bytes()).unwrap();
}

fn config(url: &str, file: &str) -> DataConfig {
    let source = SourceConfig {
        name: "web".to_owned(),
        url: url.to_owned(),
        files: vec![file.to_owned()],
        range: file.contains('{').then_some([0, 2]),
        text: "text".to_owned(),
        ..SourceConfig::default()
    };
    DataConfig { source: vec![source], unit: Bytes::new(100), ..DataConfig::default() }
}

fn corpus() -> (Files, Vec<String>) {
    let texts: Vec<String> = (0..40).map(|n| format!("text number {n}")).collect();
    let line = |text: &String| serde_json::json!({"text": text}).to_string() + "\n";
    let lines = |texts: &[String]| texts.iter().map(line).collect::<String>();
    let files = [("part-00000.jsonl", lines(&texts[..15])), ("part-00001.jsonl", lines(&texts[15..]))];
    (Arc::new(Mutex::new(files.map(|(name, text)| (name.to_owned(), text)).into())), texts)
}

#[test]
fn counted_files_are_read_by_ranges() {
    let (files, texts) = corpus();
    let config = config(&serve(files), "part-{:05}.jsonl");
    let manifest = Manifest::freeze(&config, None).unwrap();
    let sources = Sources::open(&config, &manifest, None).unwrap();
    let read: Vec<String> = sources.all_documents().flat_map(Result::unwrap).collect();
    assert_eq!(read, texts);
}

#[test]
fn a_list_names_files_by_their_addresses() {
    let place = tempfile::tempdir().unwrap();
    let (files, texts) = corpus();
    let second = files.lock().unwrap().remove("part-00001.jsonl").unwrap();
    // In a request and in an address, the space is percent-encoded.
    files.lock().unwrap().insert("part%20two.jsonl".to_owned(), second);
    let url = serve(files);
    let list = place.path().join("urls.txt");
    std::fs::write(&list, format!("part-00000.jsonl\n{url}/part%20two.jsonl\n")).unwrap();
    let mut config = config(&url, "*.jsonl");
    config.source[0].list = Some(list.to_str().unwrap().to_owned());
    let manifest = Manifest::freeze(&config, None).unwrap();
    assert!(String::from_utf8_lossy(&manifest.to_json()).contains("\"part two.jsonl\""));
    let sources = Sources::open(&config, &manifest, None).unwrap();
    let read: Vec<String> = sources.all_documents().flat_map(Result::unwrap).collect();
    assert_eq!(read, texts);

    std::fs::write(&list, "part-00000.jsonl\npart-9.jsonl\n").unwrap();
    let message = Manifest::freeze(&config, None).unwrap_err().to_string();
    let words = [list.to_str().unwrap(), "it names", "/corpus/part-9.jsonl, which does not exist"];
    assert!(words.iter().all(|words| message.contains(words)), "{message}");
    std::fs::remove_file(&list).unwrap();
    let message = Manifest::freeze(&config, None).unwrap_err().to_string();
    assert!(message.contains("urls.txt does not exist; check url, files and list"), "{message}");
}

#[test]
fn a_file_that_changes_is_refused() {
    let (files, _) = corpus();
    let config = config(&serve(Arc::clone(&files)), "part-00000.jsonl");
    let manifest = Manifest::freeze(&config, None).unwrap();
    let sources = Sources::open(&config, &manifest, None).unwrap();
    files.lock().unwrap().values_mut().for_each(|file| *file = file.replace("number 3", "number X"));
    let error = sources.all_documents().find_map(Result::err).unwrap();
    assert!(matches!(&error, DataError::Changed { what: "version", .. }), "{error}");
    assert!(error.to_string().contains("part-00000.jsonl has changed since the run began"), "{error}");
}

#[test]
fn a_server_lists_nothing_and_says_what_is_missing() {
    let (files, _) = corpus();
    let url = serve(files);
    let message = Manifest::freeze(&config(&url, "*.jsonl"), None).unwrap_err().to_string();
    assert!(message.contains("a web server does not list its files"), "{message}");
    let message = Manifest::freeze(&config(&url, "part-9.jsonl"), None).unwrap_err().to_string();
    assert!(message.contains("/corpus/part-9.jsonl does not exist"), "{message}");
}
