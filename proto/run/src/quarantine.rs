//! `quarantine.json`: the units that every worker skips, and why. The coordinator writes it, workers and
//! `dataloader explain` read it.

use std::collections::BTreeMap;

use ulmus_types::BadUnit;

use crate::{FormatError, paths};

/// The content of the file.
pub fn to_json(units: &BTreeMap<BadUnit, String>) -> Vec<u8> {
    let units: Vec<_> = units.iter().collect();
    serde_json::to_vec(&units).expect("names and numbers can be written as JSON")
}

/// Reads what [`to_json`] wrote.
///
/// # Errors
/// When the text has another format.
pub fn from_json(text: &[u8]) -> Result<BTreeMap<BadUnit, String>, FormatError> {
    let units: Vec<(BadUnit, String)> =
        serde_json::from_slice(text).map_err(|error| FormatError::new(paths::QUARANTINE, &error))?;
    Ok(units.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format of earlier versions.
    #[test]
    fn the_format_is_stable() {
        let units = [(BadUnit { source: "web".into(), unit: 7 }, "it is gone".to_owned())].into();
        let text = r#"[[{"source":"web","unit":7},"it is gone"]]"#;
        assert_eq!(String::from_utf8(to_json(&units)).unwrap(), text);
        assert_eq!(from_json(text.as_bytes()).unwrap(), units);
        let error = from_json(b"{}").unwrap_err();
        assert!(error.to_string().starts_with("quarantine.json cannot be read"), "{error}");
    }
}
