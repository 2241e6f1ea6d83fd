//! An object store for the runs of a sandbox: versitygw, an S3 server that keeps each object in a file with the object's name.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use crate::process::Process;
use crate::run::RunFolder;
use crate::sandbox::Sandbox;
use crate::wait::until;

const KEY: &str = "writer";
/// What programs must know to use the store.
const SECRET: &str = "only-the-server-knows-this-key";
/// Where runs are kept.
const RUNS: &str = "runs/of/a team";

/// A sandbox whose runs are kept in an S3 server, which ends with it.
#[derive(Debug)]
pub struct Cloud {
    /// The sandbox.
    pub sandbox: Sandbox,
    server: Child,
    address: String,
}

impl Cloud {
    /// Starts a server with an empty bucket.
    ///
    /// # Panics
    /// When versitygw is not installed, or does not answer.
    pub fn beside(sandbox: Sandbox) -> Self {
        std::fs::create_dir_all(sandbox.path("s3/runs")).expect("a bucket is a folder");
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = free.expect("a port is free").to_string();
        let server = serve(&sandbox, &address);
        let mut cloud = Self { sandbox, server, address };
        cloud.admit(true);
        cloud
    }

    /// Kills the server.
    ///
    /// # Panics
    /// When it has ended by itself.
    pub fn stop_server(&mut self) {
        self.server.kill().expect("it runs");
        self.server.wait().expect("it is a child");
    }

    /// Starts the server again, at the same address.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn start_server(&mut self) {
        self.server = serve(&self.sandbox, &self.address);
    }

    /// Gives programs that are started from now on the right secret, or a wrong one.
    pub fn admit(&mut self, is_admitted: bool) {
        self.sandbox.set_environment(&[
            ("AWS_ACCESS_KEY_ID", KEY),
            ("AWS_SECRET_ACCESS_KEY", if is_admitted { SECRET } else { "a wrong one" }),
            ("AWS_ENDPOINT", &format!("http://{}", self.address)),
            ("AWS_REGION", "us-east-1"),
        ]);
    }

    /// Starts `coordinator --plan plan.toml` with more arguments, for a run in the store.
    pub fn coordinator(&self, arguments: &[&str]) -> Process {
        self.sandbox.coordinator(&[&["--set", &format!("store.url=s3://{RUNS}")], arguments].concat())
    }

    /// The folder of the run with this name.
    pub fn run(&self, name: &str) -> RunFolder {
        self.sandbox.run(name).shared_in(self.sandbox.path("s3").join(RUNS).join(name))
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.server.kill().ok();
        self.server.wait().ok();
    }
}

fn serve(sandbox: &Sandbox, address: &str) -> Child {
    let server = Command::new("versitygw")
        .args(["--access", KEY, "--secret", SECRET, "--port", address, "posix"])
        .arg(sandbox.path("s3"))
        .stdout(Stdio::null())
        .spawn()
        .expect("versitygw is installed");
    until("the S3 server", || TcpStream::connect(address).ok());
    server
}
