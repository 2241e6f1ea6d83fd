//! JSON that vouches for its own bytes: its first field, `digest`, holds the hash of the whole text, taken while the 64
//! digits of that field are zero. So any changed byte is detected, and fields that a later version adds are covered
//! without being known.

use serde::{Deserialize, Serialize};
use ulmus_types::Digest;

const UNSIGNED: Digest = Digest::from_bytes([0; 32]);

#[derive(Serialize)]
struct Signed<'a, T> {
    // This must be the first field, so that its zeros are the first ones to be replaced.
    digest: Digest,
    #[serde(flatten)]
    content: &'a T,
}

#[derive(Deserialize)]
struct Header {
    digest: Digest,
}

/// The layout of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// For people: one field per line, with a line feed at the end.
    Pretty,
    /// On one line.
    Compact,
}

/// The signed text of a structure with text keys. The same content always gives the same text.
pub fn to_json(content: &impl Serialize, style: Style) -> String {
    let unsigned = Signed { digest: UNSIGNED, content };
    let text = match style {
        Style::Pretty => serde_json::to_string_pretty(&unsigned).map(|text| text + "\n"),
        Style::Compact => serde_json::to_string(&unsigned),
    };
    let text = text.expect("a structure with text keys can be written as JSON");
    let digest = Digest::of(text.as_bytes());
    text.replacen(&UNSIGNED.to_string(), &digest.to_string(), 1)
}

/// Verifies that a text is as [`to_json`] wrote it. Then it can be read like any JSON.
///
/// # Errors
/// What is wrong with the text, in words.
pub fn verify(text: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
    let header: Header = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let unsigned = text.replacen(&header.digest.to_string(), &UNSIGNED.to_string(), 1);
    let found = Digest::of(unsigned.as_bytes());
    if found == header.digest {
        Ok(text)
    } else {
        Err(format!("its hash is {} instead of {}", found.short(), header.digest.short()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Content {
        name: String,
        numbers: Vec<u64>,
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        for style in [Style::Pretty, Style::Compact] {
            let content = Content { name: "a".into(), numbers: vec![1, 2] };
            let text = to_json(&content, style);
            assert!(text.trim_start_matches(['{', '\n', ' ']).starts_with("\"digest\""), "{text}");
            assert_eq!(serde_json::from_str::<Content>(verify(text.as_bytes()).unwrap()).unwrap(), content);
            for at in 0..text.len() {
                let mut changed = text.clone().into_bytes();
                changed[at] ^= 1;
                assert!(verify(&changed).is_err(), "byte {at}");
            }
        }
    }
}
