//! Parses what comes from outside into types that cannot be confused, and shows what they are for.
//!
//!     cargo run -p ulmus-types --example identities

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;

use ulmus_types::{
    CheckpointId, Digest, ErrorKind, ExitStatus, Generation, Incarnation, RunName, StageName, Step, WorkerId,
};

fn main() -> Result<(), Box<dyn Error>> {
    // A name becomes the name of a folder, so it is checked once, where it comes in.
    let run: RunName = "openelm-270m".parse()?;
    println!(
        "run {run}; {}",
        "../elsewhere".parse::<RunName>().err().map_or_else(String::new, |e| e.to_string())
    );

    // A process that was restarted has the same name and another incarnation, so it is another worker.
    let before = WorkerId::new("node-7", Incarnation::new(1))?;
    let after = WorkerId::new("node-7", Incarnation::new(2))?;
    println!("{before} and {after} are the same worker: {}", before == after);

    // Checkpoints are ordered by step; two groups that reach a step make two of them.
    let checkpoint: CheckpointId = "step-00000020-g1".parse()?;
    let again = CheckpointId::new(StageName::pretraining(), Step::new(20), Generation::new(1).next());
    println!("{checkpoint} comes before {again}: {}", checkpoint < again);

    // An error tells what its caller can do, and a process tells its own caller by an exit code.
    let code = ExitStatus::from(ErrorKind::Fenced).code();
    println!("a fenced process ends with code {code}; the hash of nothing is {}", Digest::of(b"").short());
    Ok(())
}
