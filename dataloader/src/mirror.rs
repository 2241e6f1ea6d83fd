//! Copies the sources of a plan to another store, for one run or several.
//!
//! A file appears under its name only when it is complete. It is then read back and compared with what was read from
//! its origin, and a note in `.mirror/` records the result, so that an interrupted copy continues where it was, and a
//! file that has changed on either side is copied again. Two mirrors must not write to one folder at the same time.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use ulmus_plan::DataConfig;
use ulmus_storage::{FileInfo, RateLimiter};

use crate::error::DataError;
use crate::manifest::Manifest;
use crate::store::{Stores, wait_for};

/// Files that are copied at once.
const MAX_CONCURRENT: usize = 4;
/// Folder of the notes.
const NOTES: &str = ".mirror";

/// Counts of what was copied, and of what was there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Mirrored {
    /// Files that were copied.
    pub files: u64,
    /// Bytes that were copied.
    pub bytes: u64,
    /// Files that had been copied before.
    pub skipped: u64,
}

/// The record of a verified copy.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// The file at its origin.
    origin: FileInfo,
    /// The copy in its own store.
    copy: FileInfo,
    /// BLAKE3 hash of the contents.
    blake3: String,
}

/// Copies every source to a folder of its name below `to`, at most `rate` bytes per second, and writes the manifest of
/// the copies to `manifest.json` there. `done` is called with the number of bytes that have just been copied or found.
/// Blocks.
///
/// # Errors
/// When a source cannot be listed or read, the target cannot be written, or a copy differs from what was read.
pub fn mirror(
    config: &DataConfig,
    to: &str,
    rate: Option<u64>,
    done: impl Fn(u64) + Sync,
) -> Result<Mirrored, DataError> {
    let stores = Stores::new(config, None)?;
    let target = stores.make_apart(to, &config.source)?;
    let origin = Manifest::freeze(config, None)?;
    let limiter = RateLimiter::new(rate);
    let mut mirrored = Mirrored::default();
    // This is checked before anything is copied: a foreign file would be read along with the copies.
    for (source, listed) in config.source.iter().zip(&origin.sources) {
        let known: BTreeSet<&str> = listed.files.iter().map(|file| file.path.as_str()).collect();
        let there = target.child(&source.name).list()?;
        if let Some(other) = there.into_iter().find(|file| !known.contains(file.path.as_str())) {
            let reason = format!("it has {:?}, which does not belong to the source", other.path);
            return Err(DataError::Target { folder: target.place(&source.name), reason });
        }
    }
    for (source, listed) in config.source.iter().zip(&origin.sources) {
        let from = stores.open(listed.url.as_deref().unwrap_or(&source.url))?;
        let (copies, notes) = (target.child(&source.name), target.child(&format!("{NOTES}/{}", source.name)));
        let noted: BTreeMap<String, FileInfo> =
            notes.list()?.into_iter().map(|note| (note.path.clone(), note)).collect();
        let copy = async |file: &FileInfo| {
            let note = format!("{}.json", file.path);
            if let Some(known) = noted.get(&note)
                && let Ok(Note { origin, copy, .. }) =
                    serde_json::from_slice(&notes.fetch(known, 0..known.size).await?)
                && origin == *file
                && copies.is_still(&copy).await?
            {
                done(file.size);
                return Ok::<bool, DataError>(true);
            }
            let blake3 = from.copy(file, &copies, &limiter, &done).await?.to_string();
            let copy = copies.look_up(&file.path).await?;
            let note_of = Note { origin: file.clone(), copy, blake3 };
            let text = serde_json::to_vec(&note_of).expect("a note can be written as JSON");
            notes.put(&note, text).await?;
            Ok(false)
        };
        let results: Vec<(u64, bool)> = wait_for(
            futures::stream::iter(&listed.files)
                .map(|file| async move { (file.size, copy(file).await) })
                .buffer_unordered(MAX_CONCURRENT)
                .map(|(size, result)| result.map(|skipped| (size, skipped)))
                .try_collect(),
        )?;
        for (size, skipped) in results {
            if skipped {
                mirrored.skipped += 1;
            } else {
                mirrored.files += 1;
                mirrored.bytes += size;
            }
        }
    }
    for (source, listed) in
        config.source.iter().zip(&origin.sources).filter(|(source, _)| source.list.is_some())
    {
        let names: String = listed.files.iter().map(|file| file.path.clone() + "\n").collect();
        target.write(&list_of(&source.name), names.into())?;
    }
    // With the same names, sizes and units, the copies give the same stream.
    let frozen = Manifest::freeze(&of_copies(config, to), None)?;
    if frozen.digest() != origin.digest() {
        let reason =
            "its files or their order differ from the origin; delete all other files there".to_owned();
        return Err(DataError::Url { url: to.to_owned(), reason });
    }
    target.write("manifest.json", frozen.to_json())?;
    Ok(mirrored)
}

/// Name of the file that lists the files of a source in order.
fn list_of(source: &str) -> String {
    format!("{source}.list")
}

/// The plan's data section with the copies as sources.
fn of_copies(config: &DataConfig, to: &str) -> DataConfig {
    let mut config = config.clone();
    for source in &mut config.source {
        let to = to.trim_end_matches('/');
        source.url = format!("{to}/{}", source.name);
        source.list = source.list.as_ref().map(|_| format!("{to}/{}", list_of(&source.name)));
    }
    config
}
