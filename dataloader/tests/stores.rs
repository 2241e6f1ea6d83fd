//! Runs the program against stores with odd names or that refuse requests: S3, the hub, and web servers with limited
//! abilities.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LINE: &str = "{\"text\": \"some words\"}\n";

/// The parts of a request that these servers use.
struct Request {
    method: String,
    path: String,
    range: Option<(usize, usize)>,
}

/// An answer: status, headers, body.
type Answer = (u16, Vec<(&'static str, String)>, String);

/// Serves `answer`, and returns the server's address and the paths of all requests.
fn serve(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, asked) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<String>>>::default());
    let heard = Arc::clone(&asked);
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let request = heard_from(&connection);
            heard.lock().unwrap().push(format!("{} {}", request.method, request.path));
            let (status, headers, body) = answer(&request);
            let headers: Vec<String> =
                headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            let headers = headers.concat();
            let head = format!(
                "HTTP/1.1 {status} Said\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            let body = if request.method == "HEAD" { "" } else { &body };
            // The client may close the connection early.
            let _hung_up = connection.write_all(format!("{head}{body}").as_bytes());
        }
    });
    (format!("http://{address}"), asked)
}

fn heard_from(connection: &TcpStream) -> Request {
    let mut lines = BufReader::new(connection.try_clone().unwrap()).lines().map(Result::unwrap);
    let first = lines.next().unwrap();
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let range = lines.take_while(|line| !line.is_empty()).find_map(|line| {
        let line = line.to_lowercase();
        let (first, last) = line.strip_prefix("range: bytes=")?.split_once('-')?;
        Some((first.parse().unwrap(), last.parse().unwrap()))
    });
    Request { method, path, range }
}

/// The answer for a file of one line.
fn file(request: &Request) -> Answer {
    let mark =
        vec![("etag", "\"1\"".to_owned()), ("last-modified", "Mon, 01 Jan 2024 00:00:00 GMT".to_owned())];
    match request.range {
        Some((first, last)) => {
            let last = last.min(LINE.len() - 1);
            let range = ("content-range", format!("bytes {first}-{last}/{}", LINE.len()));
            (206, [mark, vec![range]].concat(), LINE[first..=last].to_owned())
        }
        None => (200, mark, LINE.to_owned()),
    }
}

fn nothing(status: u16, body: &str) -> Answer {
    (status, Vec::new(), body.to_owned())
}

/// The exit code and the output of `dataloader inspect` for a source. The program must not take long.
fn inspect(url: &str, files: &str, environment: &[(&str, &str)]) -> (i32, String) {
    let place = tempfile::tempdir().unwrap();
    let plan = place.path().join("plan.toml");
    let text = format!(
        "[model]\npreset = \"openelm-270m\"\n[tokenizer]\nfile = \"x\"\n[[data.source]]\nname = \"s\"\nurl = \"{url}\"\nfiles = [\"{files}\"]\ntext = \"text\"\n"
    );
    std::fs::write(&plan, text).unwrap();
    let begun = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_dataloader"))
        .args(["inspect", "--plan", plan.to_str().unwrap()])
        .envs(environment.iter().copied())
        .env("HF_HOME", place.path())
        .env_remove("HF_TOKEN")
        .output()
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(said).unwrap())
}

#[test]
fn a_web_server_without_ranges_is_refused_at_once() {
    let (address, _) =
        serve(|request| file(&Request { range: None, method: request.method.clone(), path: String::new() }));
    let (code, said) = inspect(&address, "a.jsonl", &[]);
    assert!(code == 2 && said.contains("does not support range requests"), "{code} {said}");
}

#[test]
fn a_web_server_may_not_support_head() {
    let (address, _) =
        serve(|request| if request.method == "HEAD" { nothing(405, "") } else { file(request) });
    let (code, said) = inspect(&address, "a.jsonl", &[]);
    assert!(code == 0 && said.contains("some words"), "{code} {said}");
}

#[test]
fn names_may_contain_reserved_characters_of_addresses() {
    let (address, asked) = serve(file);
    let (code, said) = inspect(&format!("{address}/my folder/a#1"), "b+c%20#2.jsonl", &[]);
    assert!(code == 0 && said.contains("some words"), "{code} {said}");
    let asked = asked.lock().unwrap();
    assert!(asked.iter().all(|asked| asked.ends_with(" /my%20folder/a%231/b+c%2520%232.jsonl")), "{asked:?}");
}

#[test]
fn folders_on_the_hub_may_have_any_name() {
    let commit = "0123456789012345678901234567890123456789";
    let (address, asked) = serve(move |request| {
        match request.path.as_str() {
        "/api/datasets/org/name/revision/main" => nothing(200, &format!("{{\"sha\": \"{commit}\"}}")),
        path if path.starts_with(&format!("/api/datasets/org/name/tree/{commit}/my%20folder%23%C3%A4?")) => nothing(
            200,
            &serde_json::json!([{ "type": "file", "path": "my folder#ä/a b.jsonl", "size": LINE.len(), "oid": "1" }])
                .to_string(),
        ),
        path if path == format!("/datasets/org/name/resolve/{commit}/my%20folder%23%C3%A4/a%20b.jsonl") => file(request),
        _ => nothing(404, ""),
    }
    });
    let endpoint = [("HF_ENDPOINT", address.as_str())];
    let (code, said) = inspect("hf://datasets/org/name/my folder#ä", "*.jsonl", &endpoint);
    assert!(code == 0 && said.contains("some words"), "{code} {said} {:?}", asked.lock().unwrap());
    let (code, said) = inspect("hf://datasets/org/name/another", "*.jsonl", &endpoint);
    assert!(code == 2 && said.contains("no such repository, revision or folder"), "{code} {said}");
}

/// The answer of S3 for a bucket with these keys.
fn bucket(request: &Request, keys: &[&str]) -> Answer {
    if !request.path.contains("list-type=2") {
        return if request.path == "/bucket/corp/b.jsonl" { file(request) } else { nothing(404, "") };
    }
    let entry = |key: &&str| {
        format!(
            "<Contents><Key>{key}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified><ETag>&quot;1&quot;</ETag>\
             <Size>{}</Size></Contents>",
            LINE.len()
        )
    };
    let entries: String = keys.iter().map(entry).collect();
    nothing(
        200,
        &format!("<?xml version=\"1.0\"?><ListBucketResult><Name>bucket</Name>{entries}</ListBucketResult>"),
    )
}

fn s3(address: &str) -> [(&str, &str); 4] {
    [
        ("AWS_ENDPOINT", address),
        ("AWS_ACCESS_KEY_ID", "nobody"),
        ("AWS_SECRET_ACCESS_KEY", "nothing"),
        ("AWS_REGION", "eu-central-1"),
    ]
}

#[test]
#[cfg(feature = "aws")]
fn an_odd_name_in_a_bucket_matters_only_if_a_pattern_matches_it() {
    let (address, _) = serve(|request| {
        bucket(
            request,
            &["corp/", "corp/b.jsonl", "corp/x//y.jsonl", "corp/./c.jsonl", "corp/d&#10;.jsonl.old"],
        )
    });
    let (code, said) = inspect("s3://bucket/corp", "*.jsonl", &s3(&address));
    assert!(code == 0 && said.contains("some words"), "{code} {said}");
    let (code, said) = inspect("s3://bucket/corp", "**/*.jsonl", &s3(&address));
    assert!(code == 2 && said.contains("corp/x//y.jsonl") && said.contains("rename it"), "{code} {said}");
}

#[test]
#[cfg(feature = "aws")]
fn refused_requests_are_not_retried() {
    for (status, name) in [(404, "NoSuchBucket"), (403, "AccessDenied"), (400, "InvalidBucketName")] {
        let (address, asked) = serve(move |_| {
            nothing(status, &format!("<Error><Code>{name}</Code><Message>no</Message></Error>"))
        });
        for files in ["*.jsonl", "b.jsonl"] {
            let (code, said) = inspect("s3://bucket/corp", files, &s3(&address));
            assert!(code == 2 && !said.contains("network"), "{files}: {code} {said}");
        }
        let (_, said) = inspect("s3://bucket/corp", "*.jsonl", &s3(&address));
        assert!(said.contains(name), "{said}");
        assert!(asked.lock().unwrap().len() < 10, "{asked:?}");
    }
}
