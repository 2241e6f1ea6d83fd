//! Compiles the gRPC contract without needing protoc.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "ulmus/v1/coordinator.proto";
    println!("cargo:rerun-if-changed={file}");
    let descriptors = protox::compile([Path::new(file)], [Path::new(".")])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
