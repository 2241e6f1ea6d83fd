//! A message on its way: from the domain's type to bytes and back. One that lacks a field is refused by its name.
//!
//!     cargo run -p ulmus-proto --example wire

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;

use prost::Message;
use ulmus_proto::{WireError, from_worker, kind_of, status_of, v1};
use ulmus_types::{ErrorKind, Hello, Incarnation, RunId, ToCoordinator, WorkerId, WorkerStatus};

fn main() -> Result<(), Box<dyn Error>> {
    let hello = ToCoordinator::Hello(Hello {
        worker: WorkerId::new("node-7", Incarnation::new(42))?,
        version: "0.1.0".to_owned(),
        address: "10.0.0.7:41234".to_owned(),
        device: "cpu, 8 threads".to_owned(),
        threads: 8,
        pid: 1234,
        run: None,
        secret: None,
        status: WorkerStatus::Idle,
        host: "node-7".to_owned(),
        memory: 64 << 30,
        only_jobs: false,
    });
    // Every message says which run it speaks of; a hello may not know one yet.
    let run = Some(RunId::from_bytes([7; 16]));
    let bytes = v1::FromWorker::from((run, hello.clone())).encode_to_vec();
    let (of, read) = from_worker(v1::FromWorker::decode(&bytes[..])?)?;
    println!("{} bytes; the same after the wire: {}", bytes.len(), (of, &read) == (run, &hello));

    // protobuf lets fields be absent; the domain does not.
    let empty: Result<_, WireError> = from_worker(v1::FromWorker::default());
    println!("an empty message: {}", empty.err().map_or_else(String::new, |error| error.to_string()));

    // What a caller can do about an error survives as a gRPC code.
    let status = status_of(ErrorKind::Fenced, "a newer worker of this name has joined");
    println!("{:?} tells the other side: {:?}", status.code(), kind_of(&status));
    Ok(())
}
