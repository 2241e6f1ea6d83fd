//! `state.json` of a checkpoint: the progress of training.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use ulmus_types::{BadUnit, Step};

use crate::{FormatError, paths};

const FORMAT_VERSION: u32 = 1;

/// The progress of training after `step` updates. It is the same on all workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Updates that the weights have seen.
    pub step: Step,
    /// Tokens that the weights have been trained on.
    pub tokens: u64,
    /// The quantum (quantization step) of the exact reduction, a power of two; 0 if the reduction is not exact.
    pub quantum: f64,
    /// The position of every data stream, as the data loader writes and reads it.
    pub cursors: Vec<i64>,
    /// Units that were skipped because they could not be read.
    #[serde(default)]
    pub quarantine: BTreeSet<BadUnit>,
}

#[derive(Serialize)]
struct Versioned<'a> {
    format_version: u32,
    #[serde(flatten)]
    state: &'a TrainState,
}

#[derive(Deserialize)]
struct Header {
    format_version: u32,
}

impl TrainState {
    /// The content of `state.json`. The same state always gives the same text.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&Versioned { format_version: FORMAT_VERSION, state: self })
            .expect("a state has only text keys")
    }

    /// Reads what [`TrainState::to_json`] wrote; ignores fields that this version does not know.
    ///
    /// # Errors
    /// [`FormatError`] when the text has a newer version, or is not a state at all.
    pub fn from_json(text: &[u8]) -> Result<Self, FormatError> {
        let wrong = |reason: String| FormatError::new(paths::STATE, &reason);
        let header: Header = serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))?;
        if header.format_version > FORMAT_VERSION {
            let found = header.format_version;
            return Err(wrong(format!(
                "it has format {found}, and this program reads formats up to {FORMAT_VERSION}; use a newer version of Ulmus"
            )));
        }
        serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_text_round_trips_every_bit() {
        let state = TrainState {
            step: Step::new(1_000_000_007),
            tokens: u64::MAX,
            quantum: (0.1_f64 + 0.2) * 2.0_f64.powi(-60),
            cursors: vec![i64::MIN, -1, 0, 1 << 53, i64::MAX],
            quarantine: [BadUnit { source: "web".to_owned(), unit: u64::MAX }].into(),
        };
        let text = state.to_json();
        assert_eq!(TrainState::from_json(&text).unwrap(), state);
        let later = String::from_utf8(text).unwrap().replacen("\"step\"", "\"new\":{},\"step\"", 1);
        assert_eq!(TrainState::from_json(later.as_bytes()).unwrap(), state);
        let newer = later.replacen("\"format_version\":1", "\"format_version\":2", 1);
        assert!(TrainState::from_json(newer.as_bytes()).unwrap_err().to_string().contains("newer"));
        assert!(TrainState::from_json(b"{}").is_err());
    }
}
