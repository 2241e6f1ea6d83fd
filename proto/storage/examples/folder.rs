//! Writes files into a folder of this machine, lists them, and reads them back. With an address such as `s3://bucket/path`
//! instead of the folder's path the same calls work on an object store.
//!
//!     cargo run -p ulmus-storage --example folder

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;

use ulmus_storage::{Store, StoreError};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let place = tempfile::tempdir()?;
    let store = Store::create(&place.path().display().to_string())?;

    // A file is there whole or not at all, and an outage of less than a minute is waited for.
    store.put("notes/a.txt", "first").await?;
    // Only one writer makes a file that did not exist.
    let made = store.put_new("notes/a.txt", "second").await?;
    println!("made: {made}");

    let notes = store.folder("notes");
    for file in notes.list("").await? {
        let begin = notes.get_range(&file, 0..file.size.min(3)).await?;
        println!("{} has {} bytes: {}...", file.path, file.size, String::from_utf8_lossy(&begin));
    }

    // Errors say what happened, and what to do about it.
    match notes.get("b.txt").await {
        Err(error @ StoreError::NotFound { .. }) => println!("{error}"),
        other => drop(other?),
    }
    Ok(())
}
