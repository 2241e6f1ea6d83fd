//! Immutable, verified checkpoint directories in a run folder.
//!
//! The promise: no committed checkpoint is ever lost or half-read. It rests on one order of writing (in [`write_part`]
//! and [`commit`]: parts, then manifest, then pointer) and on one rule of reading: a directory without a valid
//! manifest, or with a single byte that the manifest does not vouch for, is not a checkpoint.
//!
//! [`Store`] is the handle on the run folder, through which all other files of a run are written and read as well. This
//! crate knows bytes, ranges of a flat vector, and their hashes; the meaning of the tensors is not its concern.

#![forbid(unsafe_code)]

mod gc;
mod manifest;
mod optimizer;
mod reader;
mod writer;

pub use gc::{collect_garbage, delete};
pub use manifest::Manifest;
pub use optimizer::{OptimizerShard, files_of, optimizer_shards};
pub use reader::{checkpoints, damaged_files, newest_verified, read_file, read_manifest, verify};
pub use ulmus_storage::{Access, OpenOptions, Store, StoreError};
pub use writer::{commit, write_part};

use ulmus_run::paths;
use ulmus_types::{CheckpointId, Digest, ErrorKind, RunId};

/// Why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The store is unavailable or refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Saving did not finish, or the manifest was deleted.
    #[error(
        "checkpoint {0} has no manifest.json: it was deleted, or saving it did not finish; use an older one"
    )]
    NoManifest(CheckpointId),
    /// The manifest is not what was written.
    #[error("checkpoint {id} has a damaged manifest.json ({reason}); use an older one")]
    Manifest {
        /// The checkpoint.
        id: CheckpointId,
        /// What is wrong with it.
        reason: String,
    },
    /// The manifest was written by a newer program.
    #[error("checkpoint {id} has format {found}, this program reads up to {supported}; use a newer ulmus")]
    Version {
        /// The checkpoint.
        id: CheckpointId,
        /// The format of the manifest.
        found: u32,
        /// The newest format that this program knows.
        supported: u32,
    },
    /// A file is not what was written.
    #[error("checkpoint {id}: file {file} {fault}; use an older checkpoint")]
    File {
        /// The checkpoint.
        id: CheckpointId,
        /// The file, relative to the checkpoint's directory.
        file: String,
        /// What is wrong with it.
        fault: FileFault,
    },
    /// The checkpoint in this run's folder belongs to another run.
    #[error("checkpoint {id} is of run {}, and this is run {}; move it out of this run's folder", other.short(), run.short())]
    OtherRun {
        /// The checkpoint.
        id: CheckpointId,
        /// The run whose folder it is in.
        run: RunId,
        /// The run that it belongs to.
        other: RunId,
    },
    /// Another checkpoint was committed under this name.
    #[error("checkpoint {0} is committed already, with other contents; leave and rejoin the run")]
    AlreadyCommitted(CheckpointId),
    /// A file has the bytes that were written, but not the right form.
    #[error("{file} cannot be read: {reason}")]
    Form {
        /// The file, relative to the checkpoint's directory.
        file: String,
        /// What was expected, and what was found.
        reason: String,
    },
}

/// How a file differs from its entry in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileFault {
    /// It does not exist.
    #[error("is missing")]
    Missing,
    /// It is not in the manifest.
    #[error("is not listed in manifest.json")]
    Unlisted,
    /// It is too short or too long.
    #[error("has {found} bytes instead of {expected}")]
    Size {
        /// Bytes according to the manifest.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// The file was replaced, or its store returned fewer bytes than announced.
    #[error("changed while it was read ({0})")]
    Changed(String),
    /// The length is right; the contents are not.
    #[error("has hash {} instead of {}", found.short(), expected.short())]
    Digest {
        /// The hash according to the manifest.
        expected: Digest,
        /// The hash of what was found.
        found: Digest,
    },
}

impl CheckpointError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Store(error) => error.kind(),
            Self::NoManifest(_) | Self::Manifest { .. } | Self::File { .. } | Self::Form { .. } => {
                ErrorKind::Corrupt
            }
            Self::Version { .. } => ErrorKind::InvalidInput,
            Self::OtherRun { .. } => ErrorKind::Refused,
            Self::AlreadyCommitted(_) => ErrorKind::Fenced,
        }
    }

    /// The file at fault, if the error is about one file.
    pub fn into_file(self) -> Option<String> {
        match self {
            Self::File { file, .. } => Some(file),
            _ => None,
        }
    }

    /// The checkpoint that is not what was written, if the error is about one.
    pub fn damaged(&self) -> Option<CheckpointId> {
        match self {
            Self::NoManifest(id)
            | Self::Manifest { id, .. }
            | Self::File { id, .. }
            | Self::OtherRun { id, .. } => Some(*id),
            _ => None,
        }
    }

    /// Whether the checkpoint itself is at fault, rather than the store, so that an older one may be used.
    pub fn condemns(&self) -> bool {
        !matches!(self, Self::Store(_))
    }
}

fn manifest_path(id: CheckpointId) -> String {
    paths::checkpoint_file(id, paths::MANIFEST)
}
