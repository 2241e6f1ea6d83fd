//! The programs under test.
//!
//! Cargo tells a test only where the programs of its own package are. So the programs are built here, once per test
//! program, by the cargo that runs the test, in the same profile and target folder. All targets of the workspace are
//! requested, because the features of dependencies, and so what can be reused, depend on what is built together: under
//! `cargo test --workspace` only the programs themselves are left to link. Cargo's own lock separates test programs
//! that run in parallel.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use cargo_metadata::Message;

/// Paths of the programs.
#[derive(Debug)]
pub struct Programs {
    /// The coordinator.
    pub coordinator: PathBuf,
    /// The worker.
    pub worker: PathBuf,
    /// The evaluator.
    pub evaluator: PathBuf,
    /// The data loader.
    pub dataloader: PathBuf,
}

/// The root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is a folder of the repository")
}

/// The programs, built from the current sources.
///
/// # Panics
/// When the programs cannot be built.
pub fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(build)
}

fn build() -> Programs {
    // …/<target>/<profile>/deps/<this test>
    let test = std::env::current_exe().expect("a test knows its own path");
    let profile = test.ancestors().nth(2).expect("a test lies in <target>/<profile>/deps");
    let target = profile.parent().expect("a profile's folder lies in the target folder");
    let name = profile.file_name().and_then(|name| name.to_str()).expect("profiles are named in ASCII");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The variables in which cargo describes this test's package would make build scripts run again.
    for (name, _) in std::env::vars_os() {
        let about_us = ["CARGO_PKG_", "CARGO_MANIFEST_"];
        if about_us.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            cargo.env_remove(name);
        }
    }
    let mut cargo = cargo
        .current_dir(repository())
        .args(["build", "--workspace", "--bins", "--tests", "--message-format=json-render-diagnostics"])
        .args(["--profile", if name == "debug" { "dev" } else { name }])
        .arg("--target-dir")
        .arg(target)
        .stdout(Stdio::piped())
        .spawn()
        .expect("cargo can be started");
    let messages = BufReader::new(cargo.stdout.take().expect("standard output is piped"));
    let mut built: BTreeMap<String, PathBuf> = Message::parse_stream(messages)
        .filter_map(|message| match message.expect("cargo's messages can be read") {
            Message::CompilerArtifact(artifact) if !artifact.profile.test => {
                Some((artifact.target.name, artifact.executable?.into()))
            }
            _ => None,
        })
        .collect();
    let status = cargo.wait().expect("cargo can be waited for");
    assert!(status.success(), "the programs cannot be built: {status}");
    let mut take = |name: &str| built.remove(name).expect("the workspace has this program");
    Programs {
        coordinator: take("coordinator"),
        worker: take("worker"),
        evaluator: take("evaluator"),
        dataloader: take("dataloader"),
    }
}
