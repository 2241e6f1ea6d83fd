//! The rules of reading a checkpoint: nothing is used that the manifest does not vouch for.
//!
//! [`newest_verified`] walks from the newest directory to the oldest until one is intact, byte for byte. An outage of
//! the store is never taken for damage: it ends the walk with an error and is no reason to go further back.

use std::collections::BTreeMap;

use bytes::Bytes;
use ulmus_run::paths;
use ulmus_storage::{Store, StoreError};
use ulmus_types::{CheckpointId, Digest, ErrorKind, FileEntry, RunId, StageName, Step};

use crate::{CheckpointError, FileFault, Manifest, manifest_path};

/// Reads the manifest of `id`, and none of its files.
///
/// # Errors
/// [`CheckpointError::NoManifest`], [`CheckpointError::Manifest`], [`CheckpointError::Version`], or the store's.
pub async fn read_manifest(store: &Store, id: CheckpointId) -> Result<Manifest, CheckpointError> {
    match store.get(&manifest_path(id)).await {
        Ok(text) => Manifest::from_text(id, &text),
        Err(StoreError::NotFound { .. }) => Err(CheckpointError::NoManifest(id)),
        Err(error) => Err(error.into()),
    }
}

/// Reads the manifest of `id`, which must belong to `run`, and every byte that it vouches for.
///
/// # Errors
/// Those of [`read_manifest`]; [`CheckpointError::OtherRun`]; [`CheckpointError::File`], which names the first file
/// that is not what was written.
pub async fn verify(store: &Store, id: CheckpointId, run: RunId) -> Result<Manifest, CheckpointError> {
    let manifest = read_manifest(store, id).await?;
    // Manifests of the earliest programs name no run.
    if let Some(other) = manifest.run.filter(|other| *other != run) {
        return Err(CheckpointError::OtherRun { id, run, other });
    }
    match damaged_files(store, &manifest).await?.into_iter().next() {
        Some(damaged) => Err(damaged),
        None => Ok(manifest),
    }
}

/// Reads every byte that a manifest vouches for, and returns a [`CheckpointError::File`] for each file that is not what
/// the manifest says.
///
/// # Errors
/// Only those of the store.
pub async fn damaged_files(
    store: &Store,
    manifest: &Manifest,
) -> Result<Vec<CheckpointError>, CheckpointError> {
    let id = manifest.checkpoint;
    // Lengths first: they cost one request, while hashing a large checkpoint only to find its last file cut costs
    // minutes.
    let lengths: BTreeMap<_, _> =
        store.list(&paths::checkpoint(id)).await?.into_iter().map(|file| (file.path, file.size)).collect();
    let mut damaged = Vec::new();
    let mut whole = Vec::new();
    for (file, entry) in &manifest.files {
        match check_length(lengths.get(&paths::checkpoint_file(id, file)).copied(), entry) {
            Ok(()) => whole.push((file, entry)),
            Err(fault) => damaged.push(CheckpointError::File { id, file: file.clone(), fault }),
        }
    }
    if !damaged.is_empty() {
        return Ok(damaged);
    }
    for (file, entry) in whole {
        let mut contents = Contents::hashed_only();
        let read = store.get_pieces(&paths::checkpoint_file(id, file), |piece| contents.add(piece)).await;
        match settle(id, file, entry, read.map(|()| contents)) {
            Ok(_) => {}
            Err(error) if error.condemns() => damaged.push(error),
            Err(error) => return Err(error),
        }
    }
    Ok(damaged)
}

/// Reads one file of a checkpoint and checks it.
///
/// # Errors
/// [`CheckpointError::File`] when the file is missing, not in the manifest, or not what was written.
pub async fn read_file(store: &Store, manifest: &Manifest, file: &str) -> Result<Bytes, CheckpointError> {
    let id = manifest.checkpoint;
    let Some(entry) = manifest.files.get(file) else {
        return Err(CheckpointError::File { id, file: file.to_owned(), fault: FileFault::Unlisted });
    };
    let mut contents = Contents::kept(entry.bytes);
    let read = store.get_pieces(&paths::checkpoint_file(id, file), |piece| contents.add(piece)).await;
    settle(id, file, entry, read.map(|()| contents))
}

/// Finds the newest checkpoint of a training stage of `run` that is intact byte for byte, among those of steps up to `last`.
/// Also returns the newer ones that are not, with the reasons.
///
/// # Errors
/// Only those of the store, as [`CheckpointError::Store`].
pub async fn newest_verified(
    store: &Store,
    run: RunId,
    training: StageName,
    last: Step,
) -> Result<(Option<Manifest>, Vec<(CheckpointId, CheckpointError)>), CheckpointError> {
    let mut refused = Vec::new();
    for id in checkpoints(store, training).await?.into_iter().rev().filter(|id| id.step() <= last) {
        match verify(store, id, run).await {
            Ok(manifest) => return Ok((Some(manifest), refused)),
            Err(error) if error.condemns() => refused.push((id, error)),
            Err(error) => return Err(error),
        }
    }
    Ok((None, refused))
}

/// Lists all directories of a training stage whose names are those of checkpoints, oldest first.
///
/// # Errors
/// Only those of the store.
pub async fn checkpoints(store: &Store, training: StageName) -> Result<Vec<CheckpointId>, CheckpointError> {
    let names = store.list_folders(&paths::checkpoints(training)).await?;
    let id = |name: &String| CheckpointId::in_directory(training, name).ok();
    let mut ids: Vec<CheckpointId> = names.iter().filter_map(id).collect();
    ids.sort();
    Ok(ids)
}

/// The part of a file that has been read.
struct Contents {
    hasher: blake3::Hasher,
    bytes: u64,
    kept: Option<Vec<u8>>,
}

impl Contents {
    fn hashed_only() -> Self {
        Self { hasher: blake3::Hasher::new(), bytes: 0, kept: None }
    }

    fn kept(bytes: u64) -> Self {
        Self { kept: Some(Vec::with_capacity(bytes as usize)), ..Self::hashed_only() }
    }

    fn add(&mut self, piece: &[u8]) {
        self.hasher.update(piece);
        self.bytes += piece.len() as u64;
        if let Some(kept) = &mut self.kept {
            kept.extend_from_slice(piece);
        }
    }
}

fn check_length(found: Option<u64>, entry: &FileEntry) -> Result<(), FileFault> {
    match found {
        None => Err(FileFault::Missing),
        Some(found) if found != entry.bytes => Err(FileFault::Size { expected: entry.bytes, found }),
        Some(_) => Ok(()),
    }
}

fn settle(
    id: CheckpointId,
    file: &str,
    entry: &FileEntry,
    read: Result<Contents, StoreError>,
) -> Result<Bytes, CheckpointError> {
    let condemn = |fault| CheckpointError::File { id, file: file.to_owned(), fault };
    let contents = match read {
        Ok(contents) => contents,
        Err(StoreError::NotFound { .. }) => return Err(condemn(FileFault::Missing)),
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            return Err(condemn(FileFault::Changed(error.to_string())));
        }
        Err(error) => return Err(error.into()),
    };
    check_length(Some(contents.bytes), entry).map_err(condemn)?;
    let found = Digest::from_bytes(*contents.hasher.finalize().as_bytes());
    if found != entry.digest {
        return Err(condemn(FileFault::Digest { expected: entry.digest, found }));
    }
    Ok(contents.kept.unwrap_or_default().into())
}
