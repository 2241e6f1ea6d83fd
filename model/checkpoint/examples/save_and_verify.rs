//! Stores a checkpoint of one file, and verifies every byte of it.
//!
//!     cargo run -p ulmus-checkpoint --example save_and_verify

#![expect(clippy::print_stdout, reason = "an example")]

use std::collections::BTreeMap;
use std::error::Error;

use ulmus_checkpoint::{Manifest, Store, commit, newest_verified, write_part};
use ulmus_types::{CheckpointId, CheckpointKind, Digest, Generation, RunId, StageName, Step};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let store = Store::create(&folder.path().display().to_string())?;
        let (run, checkpoint) = (
            RunId::from_bytes([1; 16]),
            CheckpointId::new(StageName::pretraining(), Step::new(100), Generation::new(1)),
        );
        let entry = write_part(&store, checkpoint, "weights.bin", vec![1, 2, 3]).await?;
        // The parts are there; with its manifest the checkpoint exists.
        let manifest = Manifest {
            checkpoint,
            kind: CheckpointKind::Milestone,
            run: Some(run),
            plan_digest: Digest::of(b"plan"),
            state_digest: Digest::of(b"state"),
            files: BTreeMap::from([("weights.bin".to_owned(), entry)]),
        };
        commit(&store, &manifest).await?;
        let (newest, refused) =
            newest_verified(&store, run, StageName::pretraining(), Step::new(100)).await?;
        println!("{:?}, {} refused", newest.map(|manifest| manifest.checkpoint), refused.len());
        Ok(())
    })
}
