//! The manifest: the list of a checkpoint's files, which vouches for every byte of them.
//!
//! It also vouches for its own bytes, by the digest that [`ulmus_run::signed`] puts into it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use ulmus_run::signed::{self, Style};
use ulmus_types::{CheckpointId, CheckpointKind, Digest, FileEntry, RunId};

use crate::CheckpointError;

/// The format that this program writes, and the newest that it reads.
const FORMAT_VERSION: u32 = 1;

/// What a checkpoint is, and which files it consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The checkpoint; its directory has the same name.
    pub checkpoint: CheckpointId,
    /// Why it was made.
    pub kind: CheckpointKind,
    /// The run it belongs to; the earliest programs did not write this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunId>,
    /// The hash of the resolved plan that the run follows.
    pub plan_digest: Digest,
    /// The hash of the training state, equal on all workers.
    pub state_digest: Digest,
    /// All other files of the directory, by name.
    pub files: BTreeMap<String, FileEntry>,
}

/// The text form, without its digest.
#[derive(Serialize)]
struct Versioned<'a> {
    format_version: u32,
    #[serde(flatten)]
    manifest: &'a Manifest,
}

/// The fields that every version has.
#[derive(Deserialize)]
struct Header {
    format_version: u32,
}

impl Manifest {
    /// The text of `manifest.json`; equal manifests have equal texts.
    pub(crate) fn to_text(&self) -> String {
        signed::to_json(&Versioned { format_version: FORMAT_VERSION, manifest: self }, Style::Pretty)
    }

    /// Reads what [`Manifest::to_text`] of this version or an older one wrote for `id`.
    ///
    /// # Errors
    /// [`CheckpointError::Version`] for a newer version, [`CheckpointError::Manifest`] for anything else.
    pub(crate) fn from_text(id: CheckpointId, text: &[u8]) -> Result<Self, CheckpointError> {
        let damaged = |reason: String| CheckpointError::Manifest { id, reason };
        let text = signed::verify(text).map_err(damaged)?;
        let header: Header = serde_json::from_str(text).map_err(|error| damaged(error.to_string()))?;
        if header.format_version > FORMAT_VERSION {
            return Err(CheckpointError::Version {
                id,
                found: header.format_version,
                supported: FORMAT_VERSION,
            });
        }
        let manifest: Self = serde_json::from_str(text).map_err(|error| damaged(error.to_string()))?;
        if manifest.checkpoint != id {
            return Err(damaged(format!("it belongs to {}", manifest.checkpoint)));
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use ulmus_types::{ErrorKind, Generation, StageName, Step};

    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            checkpoint: CheckpointId::new(StageName::pretraining(), Step::new(50), Generation::new(2)),
            kind: CheckpointKind::Milestone,
            run: Some(RunId::from_bytes([7; 16])),
            plan_digest: Digest::of(b"plan"),
            state_digest: Digest::of(b"state"),
            files: [("model.safetensors".to_owned(), FileEntry::of(b"weights"))].into(),
        }
    }

    #[test]
    fn text_form_round_trips_and_does_not_change() {
        let manifest = manifest();
        let text = manifest.to_text();
        assert_eq!(Manifest::from_text(manifest.checkpoint, text.as_bytes()).unwrap(), manifest);
        assert_eq!(text, manifest.to_text());
    }

    #[test]
    fn a_change_of_any_byte_is_noticed() {
        let manifest = manifest();
        let text = manifest.to_text().into_bytes();
        for index in 0..text.len() {
            for bit in [0x01, 0x02, 0x10] {
                let mut changed = text.clone();
                changed[index] ^= bit;
                assert!(Manifest::from_text(manifest.checkpoint, &changed).is_err(), "byte {index}");
            }
            assert!(Manifest::from_text(manifest.checkpoint, &text[..index]).is_err(), "cut at {index}");
        }
    }

    /// Signs `text` as a later program would.
    fn sign(text: &str) -> String {
        let zeros = "0".repeat(64);
        let unsigned = text.replacen(&text[text.find(": \"").unwrap() + 3..][..64], &zeros, 1);
        let digest = Digest::of(unsigned.as_bytes());
        unsigned.replacen(&zeros, &digest.to_string(), 1)
    }

    #[test]
    fn additions_are_tolerated_and_newer_formats_are_not() {
        let manifest = manifest();
        let id = manifest.checkpoint;
        let added = sign(&manifest.to_text().replacen("\"kind\"", "\"colour\": [1, 2],\n  \"kind\"", 1));
        assert_eq!(Manifest::from_text(id, added.as_bytes()).unwrap(), manifest);

        let newer = sign(&manifest.to_text().replacen("\"format_version\": 1", "\"format_version\": 2", 1));
        let error = Manifest::from_text(id, newer.as_bytes()).unwrap_err();
        assert!(matches!(error, CheckpointError::Version { found: 2, supported: 1, .. }), "{error}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_manifest_in_another_directory_is_refused() {
        let other = CheckpointId::new(StageName::pretraining(), Step::new(50), Generation::new(3));
        let error = Manifest::from_text(other, manifest().to_text().as_bytes()).unwrap_err();
        assert!(error.to_string().contains("belongs to step-00000050-g2"), "{error}");
    }
}
