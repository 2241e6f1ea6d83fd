//! The order of writing a checkpoint, and why.
//!
//! 1. *Parts.* Workers write the files of the directory ([`write_part`]), in any order, each whole or not at all, and
//!    tell the coordinator their lengths and hashes. Readers ignore the directory until it has a manifest, so a save
//!    that dies at any point leaves nothing that could be taken for a checkpoint.
//! 2. *Manifest.* When every part has been reported and recorded, the coordinator, and nobody else, writes
//!    `manifest.json` ([`commit`]). With this single atomic write the checkpoint begins to exist. It never replaces a
//!    manifest: a group that was fenced while saving cannot change what its successor committed.
//! 3. *Pointer.* Then `latest`, beside the folder of checkpoints, names the checkpoint. It is for people and scripts; our own readers
//!    look at the directories, because a process may die between 2 and 3.
//!
//! Every step may be repeated: the same state has the same bytes, and so the same manifest.

use bytes::Bytes;
use ulmus_run::paths;
use ulmus_storage::Store;
use ulmus_types::{CheckpointId, FileEntry};

use crate::reader::read_manifest;
use crate::{CheckpointError, Manifest, manifest_path};

/// Writes the file `name` of the checkpoint `id` (step 1), and returns its entry for the manifest.
///
/// # Errors
/// When the store refuses or is unavailable.
///
/// # Cancel safety
/// The file is absent or complete; it may be written again.
pub async fn write_part(
    store: &Store,
    id: CheckpointId,
    name: &str,
    contents: impl Into<Bytes>,
) -> Result<FileEntry, CheckpointError> {
    let contents = contents.into();
    let hashed = contents.clone();
    // Hashing gigabytes takes a second, too long for a thread that serves other tasks.
    let entry =
        tokio::task::spawn_blocking(move || FileEntry::of(&hashed)).await.expect("hashing cannot panic");
    store.put(&paths::checkpoint_file(id, name), contents).await?;
    Ok(entry)
}

/// Makes the checkpoint exist (steps 2 and 3). Only the coordinator calls this, after all parts are recorded.
///
/// Committing the same manifest again is harmless.
///
/// # Errors
/// [`CheckpointError::AlreadyCommitted`] when the checkpoint has another manifest; [`CheckpointError::Store`] when the
/// store refuses or is unavailable.
///
/// # Cancel safety
/// The checkpoint exists or it does not; repeat the call to be sure that it does.
pub async fn commit(store: &Store, manifest: &Manifest) -> Result<(), CheckpointError> {
    let id = manifest.checkpoint;
    if !store.put_new(&manifest_path(id), manifest.to_text()).await? {
        // It is either somebody else's, or our own from an attempt whose answer was lost.
        if read_manifest(store, id).await? != *manifest {
            return Err(CheckpointError::AlreadyCommitted(id));
        }
    }
    let latest = paths::of_training(id.training(), paths::LATEST);
    store.put(&latest, format!("{}\n", id.directory())).await?;
    Ok(())
}
