//! From a folder of texts to training sequences: freeze what is read, open it, take from a lane, and go on elsewhere.
//!
//!     cargo run -p ulmus-dataloader --example read_sequences

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;
use std::sync::Arc;

use ulmus_dataloader::{Corpus, Loader, Manifest, Sources};
use ulmus_plan::{Bytes, DataConfig, SourceConfig};
use ulmus_tokenizer::train;

const LENGTH: usize = 32;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    for number in 0..40 {
        let text = format!("Elm number {number} stands beside the road to the mill. ").repeat(5);
        std::fs::write(folder.path().join(format!("{number:02}.txt")), text)?;
    }
    let config = DataConfig {
        lanes: 2,
        // Each lane needs a unit of its own, and there are only 10 KB.
        unit: Bytes::new(4 << 10),
        window: 4,
        holdout: 0.0,
        min_characters: 1,
        min_tokens: 1,
        source: vec![SourceConfig {
            name: "elms".to_owned(),
            url: folder.path().display().to_string(),
            files: vec!["*.txt".to_owned()],
            ..SourceConfig::default()
        }],
        ..DataConfig::default()
    };
    // From here on, a file that changes is an error, and not other data.
    let manifest = Manifest::freeze(&config, None)?;
    let sources = Sources::open(&config, &manifest, None)?;
    let tokenizer = train(&sources.sample(1 << 20)?, 300)?;
    println!("{} files, {} bytes of text, {} pieces", manifest.files(), manifest.bytes(), tokenizer.pieces());

    // The stream of a lane depends on the seed and the manifest, and not on who reads it.
    let corpus = Arc::new(Corpus::new(&config, 0, sources, tokenizer)?);
    let lanes: Vec<_> = corpus.lanes().collect();
    let mut loader = Loader::open(Arc::clone(&corpus), LENGTH, &lanes, &corpus.start())?;
    let first = loader.take(&lanes[..1], 1)?.remove(0);
    println!("lane {}: {:?}", lanes[0], corpus.tokenizer().decode(&first.inputs));

    // Another process goes on from the cursors, which checkpoints store.
    let cursors = loader.cursors();
    let mut resumed = Loader::open(Arc::clone(&corpus), LENGTH, &lanes, &cursors)?;
    let same = loader.take(&lanes, 1)? == resumed.take(&lanes, 1)?;
    println!(
        "{} numbers say where to go on; the next sequences are the same: {same}",
        cursors.numbers().len()
    );
    Ok(())
}
