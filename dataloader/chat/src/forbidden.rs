//! Texts that no row may contain, such as the problems of a benchmark.

use std::fmt;

use aho_corasick::AhoCorasick;
use ulmus_types::without_mark;

use crate::error::ChatError;

/// Texts that are looked for without regard to case and to how words are spaced.
#[derive(Clone)]
pub struct Forbidden {
    texts: AhoCorasick,
}

impl fmt::Debug for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Forbidden({} texts)", self.count())
    }
}

impl Forbidden {
    /// Reads a file of texts: a JSON list, or a text per line.
    ///
    /// # Errors
    /// When the list is one of something else, or there is no text.
    pub fn read(file: &[u8]) -> Result<Self, ChatError> {
        let file = String::from_utf8_lossy(without_mark(file));
        let texts: Vec<String> = if file.trim_start().starts_with('[') {
            serde_json::from_str(&file).map_err(|error| ChatError::NotTexts { reason: error.to_string() })?
        } else {
            file.lines().map(str::to_owned).collect()
        };
        let texts: Vec<String> =
            texts.iter().map(|text| normalized(text)).filter(|text| !text.is_empty()).collect();
        if texts.is_empty() {
            return Err(ChatError::NoTexts);
        }
        let texts =
            AhoCorasick::new(texts).map_err(|error| ChatError::NotTexts { reason: error.to_string() })?;
        Ok(Self { texts })
    }

    /// Number of the texts.
    pub fn count(&self) -> usize {
        self.texts.patterns_len()
    }

    /// Whether one of the texts is in one of `among`.
    pub fn is_in(&self, among: &[&str]) -> bool {
        among.iter().any(|text| self.texts.is_match(&normalized(text)))
    }
}

/// A text in lower case, with one space between words.
fn normalized(text: &str) -> String {
    let lower = text.to_lowercase();
    lower.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_spaces_do_not_hide_a_text() {
        for file in ["[\"def  F(x):\\n  return\", \"  \"]", "\u{feff}def F(x): return\n\n"] {
            let forbidden = Forbidden::read(file.as_bytes()).unwrap();
            assert!(forbidden.is_in(&["", "Sure:\n\nDEF f(x):\n\treturn 1"]));
            assert!(!forbidden.is_in(&["def f(x):", "return"]));
        }
    }

    #[test]
    fn a_file_without_texts_is_refused() {
        for (file, words) in [
            ("", "no texts"),
            ("[]", "no texts"),
            ("[1]", "not a JSON list of texts"),
            ("[", "not a JSON list"),
        ] {
            let message = Forbidden::read(file.as_bytes()).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
