//! Writes files of a run folder as text, reads them back, and notices a changed byte.
//!
//!     cargo run -p ulmus-run --example sign_and_verify

#![expect(clippy::print_stdout, reason = "an example")]

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;

use ulmus_run::signed::{self, Style};
use ulmus_run::{TrainState, paths, quarantine};
use ulmus_types::{BadUnit, CheckpointId, Generation, StageName, Step};

fn main() -> Result<(), Box<dyn Error>> {
    let checkpoint = CheckpointId::new(StageName::pretraining(), Step::new(100), Generation::new(1));
    let bad = BadUnit { source: "web".to_owned(), unit: 7 };
    let state = TrainState {
        step: checkpoint.step(),
        tokens: 409_600,
        quantum: 2.0_f64.powi(-36),
        cursors: vec![0, 3, 17, 250],
        quarantine: BTreeSet::from([bad.clone()]),
    };
    let text = state.to_json();
    println!("{}/{}:\n  {}", paths::checkpoint(checkpoint), paths::STATE, String::from_utf8_lossy(&text));
    println!("  reads as it was written: {}", TrainState::from_json(&text)? == state);

    let units = BTreeMap::from([(bad, "it does not exist".to_owned())]);
    let text = quarantine::to_json(&units);
    println!("{}:\n  {}", paths::QUARANTINE, String::from_utf8_lossy(&text));
    if let Err(error) = quarantine::from_json(b"{}") {
        println!("  anything else is refused: {error}");
    }

    // A manifest vouches for its own text: its first field is the hash of the rest.
    let manifest = signed::to_json(&BTreeMap::from([("files", 3)]), Style::Compact);
    println!("{manifest}\n  holds: {}", signed::verify(manifest.as_bytes()).is_ok());
    let changed = manifest.replace('3', "4");
    println!("  with 4 files: {}", signed::verify(changed.as_bytes()).err().unwrap_or_default());
    Ok(())
}
