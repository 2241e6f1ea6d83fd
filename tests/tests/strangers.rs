//! Programs without the join token are kept out and learn nothing; programs with it get in.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, prlimit};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use ulmus_tests::{Ended, Process, Sandbox, until};
use ulmus_transport::{Credentials, IDENTITY_FILE, JoinToken, TOKEN_FILE, TokenSource};

/// The program must exit with `code` and print all of `texts`.
#[track_caller]
fn assert_ends(ended: &Ended, code: i32, texts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.output);
    for text in texts {
        assert!(ended.output.contains(text), "{text:?} is not in:\n{}", ended.output);
    }
}

/// A coordinator that waits for workers, and its address.
fn coordinator(sandbox: &Sandbox, more: &[&str]) -> (Process, String) {
    let coordinator = sandbox.coordinator(&[&["--set", "local.workers=0"], more].concat());
    let address = coordinator.address();
    (coordinator, address)
}

fn token_file(sandbox: &Sandbox) -> String {
    sandbox.run("tiny").path().join(TOKEN_FILE).to_str().unwrap().to_owned()
}

/// A token of a run that has no coordinator.
fn other_token() -> String {
    let folder = tempfile::tempdir().unwrap();
    Credentials::of_run(folder.path(), &TokenSource::Unspecified).unwrap().token.reveal()
}

#[test]
fn a_worker_without_the_right_token_is_refused_and_told_why() {
    let (sandbox, mut elsewhere) = (Sandbox::new(), Sandbox::new());
    let (coordinator, address) = coordinator(&sandbox, &[]);
    let port = address.rsplit(':').next().unwrap();
    // Another user, with another runtime folder.
    let none = elsewhere.worker(&address, "none").ends();
    let looked = elsewhere.path("runtime/ulmus").join(format!("{port}.token"));
    assert_ends(
        &none,
        3,
        &["no join token", looked.to_str().unwrap(), "--token-file", "ULMUS_TOKEN_FILE", "ULMUS_TOKEN"],
    );
    let missing = elsewhere.worker_bare(&["--join", &address, "--token-file", "no.token"]).ends();
    assert_ends(&missing, 3, &["no.token does not exist"]);

    elsewhere.set_environment(&[("ULMUS_TOKEN", &other_token())]);
    assert_ends(
        &elsewhere.worker(&address, "key").ends(),
        3,
        &[&address, "is not the one in the token", "ULMUS_TOKEN"],
    );
    let right: JoinToken = fs::read_to_string(token_file(&sandbox)).unwrap().parse().unwrap();
    elsewhere.set_environment(&[("ULMUS_TOKEN", &JoinToken::new(right.key()).reveal())]);
    let wrong = elsewhere.worker(&address, "secret").ends();
    assert_ends(&wrong, 3, &[&address, "does not accept the secret", "ULMUS_TOKEN", "join.token"]);
    elsewhere.set_environment(&[("ULMUS_TOKEN", "letmein")]);
    let broken = elsewhere.worker(&address, "broken").ends();
    assert_ends(&broken, 3, &["ULMUS_TOKEN does not hold a join token", "7 characters"]);
    assert!(!broken.output.contains("letmein"), "{}", broken.output);

    // The right token, passed in both ways; a file takes precedence over the variable.
    let file = token_file(&sandbox);
    let _by_file = elsewhere.worker_bare(&["--join", &address, "--name", "by-file", "--token-file", &file]);
    coordinator.says("worker by-file joined");
    elsewhere.set_environment(&[("ULMUS_TOKEN", &right.reveal())]);
    let _by_text = elsewhere.worker(&address, "by-text");
    coordinator.says("worker by-text joined");
    coordinator.signal(Signal::INT);
    let said = coordinator.ends().output;
    for stranger in ["none", "key", "secret", "broken"] {
        assert!(!said.contains(&format!("worker {stranger}")), "{said}");
    }
    assert!(!said.contains(&right.reveal()), "the token is printed: {said}");
}

#[test]
fn the_same_user_joins_without_more_words() {
    let sandbox = Sandbox::new();
    let (coordinator, address) = coordinator(&sandbox, &[]);
    let port = address.rsplit(':').next().unwrap();
    coordinator.says(&format!("worker --join {address} --token-file {}", token_file(&sandbox)));
    let published = sandbox.path("runtime/ulmus").join(format!("{port}.token"));
    for (path, mode) in [
        (published.clone(), 0o600),
        (sandbox.path("runtime/ulmus"), 0o700),
        (sandbox.path("runs/tiny").join(TOKEN_FILE), 0o600),
        (sandbox.path("runs/tiny").join(IDENTITY_FILE), 0o600),
        (sandbox.path("runs/tiny/run.sqlite"), 0o600),
    ] {
        let found = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(found, mode, "{}: {found:o}", path.display());
    }
    let _worker = sandbox.worker(&address, "simple");
    coordinator.says("worker simple joined");
    coordinator.signal(Signal::INT);
    assert_eq!(coordinator.ends().code, Some(130));
    assert!(!published.exists(), "it is deleted with its coordinator");
    // The next coordinator of the run has the same key and token.
    let before = fs::read(token_file(&sandbox)).unwrap();
    let (_next, _) = self::coordinator(&sandbox, &[]);
    assert_eq!(fs::read(token_file(&sandbox)).unwrap(), before);
}

#[test]
fn a_token_file_is_written_and_later_obeyed() {
    let sandbox = Sandbox::new();
    let file = sandbox.path("shared.token");
    let given = ["--token-file", file.to_str().unwrap()];
    let (first, address) = coordinator(&sandbox, &given);
    first.says(&format!("worker --join {address} --token-file {}", file.display()));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    first.signal(Signal::INT);
    assert_eq!(first.ends().code, Some(130));
    let other = sandbox.coordinator(&[&given[..], &["--set", "run.name=other"]].concat()).ends();
    assert_ends(&other, 3, &["shared.token", "another run", "--token-file"]);
    let twice = sandbox.coordinator(&[&given[..], &["--demo-failure"]].concat()).ends();
    assert_ends(&twice, 2, &["--token-file", "ULMUS_TOKEN"]);
    fs::write(&file, "nothing").unwrap();
    assert_ends(&sandbox.coordinator(&given).ends(), 2, &["shared.token", "7 characters"]);
}

/// A server with its own key that accepts this many connections. Returns what was read from each.
fn rogue(listener: TcpListener, connections: usize) -> JoinHandle<Vec<Result<Vec<u8>, std::io::Error>>> {
    let folder = tempfile::tempdir().unwrap();
    Credentials::of_run(folder.path(), &TokenSource::Unspecified).unwrap();
    let config = Arc::new(server_config(folder.path()));
    thread::spawn(move || {
        let read = |stream: std::io::Result<TcpStream>| {
            let mut session = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut read = Vec::new();
            rustls::Stream::new(&mut session, &mut stream.unwrap()).read_to_end(&mut read)?;
            Ok(read)
        };
        listener.incoming().take(connections).map(read).collect()
    })
}

fn server_config(folder: &Path) -> rustls::ServerConfig {
    let pem = fs::read(folder.join(IDENTITY_FILE)).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(&pem).unwrap()],
            PrivateKeyDer::from_pem_slice(&pem).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

#[test]
fn a_worker_tells_a_rogue_coordinator_nothing() {
    let mut sandbox = Sandbox::new();
    sandbox.set_environment(&[("ULMUS_TOKEN", &other_token())]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let rogue = rogue(listener, 1);
    let worker = sandbox.worker(&address, "careful").ends();
    assert_ends(&worker, 3, &[&address, "is not the one in the token", "nothing"]);
    let read = rogue.join().unwrap();
    assert!(read[0].is_err(), "the worker ends the handshake: {read:?}");
}

#[test]
fn a_worker_that_was_welcome_waits_for_its_own_coordinator() {
    let sandbox = Sandbox::new();
    let (first, address) = coordinator(&sandbox, &[]);
    let worker = sandbox.worker(&address, "faithful");
    first.says("checkpoint step-00000010-g1 stored");
    first.kill();
    // Another server has the address for a while.
    let read = rogue(TcpListener::bind(&address).unwrap(), 3).join().unwrap();
    assert!(read.iter().all(Result::is_err), "nothing is said to it: {read:?}");
    sandbox
        .coordinator_bare(&["--plan", "plan.toml", "--set", "local.workers=0", "--listen", &address])
        .succeeds();
    worker.succeeds();
}

/// Everything that the other side answers until it closes the connection.
fn answer(address: &str, said: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(said).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
    let mut all = Vec::new();
    // The connection may be reset instead of closed.
    stream.read_to_end(&mut all).ok();
    all
}

#[test]
fn a_coordinator_tells_strangers_nothing_and_they_keep_nobody_out() {
    let sandbox = Sandbox::new();
    let (coordinator, address) = coordinator(&sandbox, &[]);
    for said in
        [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"[..], b"GET / HTTP/1.1\r\n\r\n", b"\0", b""]
    {
        let told = answer(&address, said);
        assert!(told.len() <= 7, "more than a TLS alert: {}", String::from_utf8_lossy(&told));
    }
    // Strangers that are dropped reconnect at once, until the worker has joined.
    let strangers = Strangers::at(&address, 500);
    let _worker = sandbox.worker(&address, "late");
    coordinator.says("worker late joined");
    drop(strangers);
}

#[test]
fn a_coordinator_that_runs_out_of_files_waits_for_some() {
    let sandbox = Sandbox::new();
    let (coordinator, address) = coordinator(&sandbox, &[]);
    let log = sandbox.path("runs/tiny/logs/coordinator.log");
    let log = || fs::read_to_string(&log).unwrap().matches("cannot accept connections").count();
    let none = Rlimit { current: Some(1), maximum: getrlimit(Resource::Nofile).maximum };
    let enough = prlimit(Some(coordinator.pid()), Resource::Nofile, none).unwrap();
    let _stranger = TcpStream::connect(&address).unwrap();
    until("a connection that is not accepted", || (log() > 0).then_some(()));
    prlimit(Some(coordinator.pid()), Resource::Nofile, enough).unwrap();
    let _worker = sandbox.worker(&address, "patient");
    coordinator.says("worker patient joined");
    assert_eq!(log(), 1, "it is logged once");
}

/// Silent connections, which are opened again when they are closed.
struct Strangers {
    stay: Arc<()>,
    thread: Option<JoinHandle<()>>,
}

impl Strangers {
    fn at(address: &str, count: usize) -> Self {
        let connect = |address: &str| {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_nonblocking(true).unwrap();
            stream
        };
        let mut streams: Vec<TcpStream> = (0..count).map(|_| connect(address)).collect();
        let stay = Arc::new(());
        let (gone, address) = (Arc::downgrade(&stay), address.to_owned());
        let thread = thread::spawn(move || {
            while gone.strong_count() > 0 {
                for stream in &mut streams {
                    let open =
                        matches!(stream.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock);
                    if !open {
                        *stream = connect(&address);
                    }
                }
                thread::park_timeout(Duration::from_millis(10));
            }
        });
        Self { stay, thread: Some(thread) }
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        self.stay = Arc::new(());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
