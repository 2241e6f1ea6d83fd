//! What happens to one document before it is tokenized: normalised, measured, and set aside if it is held out.
//!
//! Pure. The text that the character filter counts is thrown away: what is tokenized is the normalised text.

use std::borrow::Cow;

use ulmus_plan::{DataConfig, Normalize};
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// The rules of a plan for single documents.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    normalize: Normalize,
    min_characters: u64,
    pub(crate) min_tokens: u64,
    /// Documents whose hash is below are held out.
    held_out_below: u64,
    seed: u64,
}

/// What becomes of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict<'a> {
    /// Too few characters.
    Short,
    /// Not for training, but for measuring.
    HeldOut(Cow<'a, str>),
    /// For training.
    Kept(Cow<'a, str>),
}

impl Rules {
    pub(crate) fn new(config: &DataConfig, seed: u64) -> Self {
        Self {
            normalize: config.normalize,
            min_characters: config.min_characters,
            min_tokens: config.min_tokens,
            held_out_below: (config.holdout * 2_f64.powi(64)) as u64,
            seed,
        }
    }

    /// Judges a document.
    pub(crate) fn judge<'a>(&self, text: &'a str) -> Verdict<'a> {
        let text = normalized(text, self.normalize);
        if !has_characters(&text, self.min_characters) {
            Verdict::Short
        } else if self.hash(&text) < self.held_out_below {
            Verdict::HeldOut(text)
        } else {
            Verdict::Kept(text)
        }
    }

    /// Decides by contents, so that equal texts are held out together, wherever they lie.
    fn hash(&self, text: &str) -> u64 {
        let mut hasher = blake3::Hasher::new_derive_key("ulmus held-out documents");
        hasher.update(&self.seed.to_le_bytes()).update(text.as_bytes());
        let hash = hasher.finalize();
        let first = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
        u64::from_le_bytes(*first)
    }
}

fn normalized(text: &str, normalize: Normalize) -> Cow<'_, str> {
    match normalize {
        Normalize::Nfc if is_nfc_quick(text.chars()) != IsNormalized::Yes => {
            text.nfc().collect::<String>().into()
        }
        Normalize::Nfc | Normalize::None => text.into(),
    }
}

/// Whether `text` has at least `least` characters as the reference counts them: code points that are left after
/// lower-casing, deleting ASCII punctuation, stripping, and making one blank of every run of blanks.
fn has_characters(text: &str, least: u64) -> bool {
    let mut count = 0;
    let mut blank_before = false;
    for c in text.chars().filter(|c| !c.is_ascii_punctuation()) {
        if is_blank(c) {
            // Counted when something follows; nothing is counted in front.
            blank_before = count > 0;
            continue;
        }
        count += u64::from(blank_before) + if c.is_ascii() { 1 } else { c.to_lowercase().count() as u64 };
        blank_before = false;
        if count >= least {
            return true;
        }
    }
    count >= least
}

/// What Python counts as white space: Unicode's, and the four separators of ASCII.
fn is_blank(c: char) -> bool {
    c.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(holdout: f64, min_characters: u64) -> Rules {
        Rules::new(&DataConfig { holdout, min_characters, ..DataConfig::default() }, 7)
    }

    #[test]
    fn characters_are_counted_as_the_reference_does() {
        // Counts from Python: len(re.sub(r"\s+", " ", text.lower().translate(no punctuation).strip())).
        for (text, count) in [
            ("", 0),
            ("Hello, world!", 11),
            ("  a -- b  ", 3),
            (" - a - ", 1),
            ("a\u{1c}b\u{a0}\u{85}c", 5),
            ("İ", 2),
            ("«a»", 3),
            ("!!! \t\n", 0),
        ] {
            assert!(has_characters(text, count), "{text:?} has {count}");
            assert!(!has_characters(text, count + 1), "{text:?} has only {count}");
        }
    }

    #[test]
    fn text_is_normalised_before_it_is_judged() {
        assert_eq!(rules(0.0, 0).judge("e\u{301}"), Verdict::Kept("é".into()));
        assert_eq!(rules(0.0, 2).judge("e\u{301}"), Verdict::Short);
    }

    #[test]
    fn the_share_of_held_out_documents_is_as_asked() {
        let rules = rules(0.1, 0);
        let held_out = |seed| {
            let rules = Rules { seed, ..rules.clone() };
            let texts = (0..5000).map(|n| format!("document {n}"));
            texts.filter(|text| matches!(rules.judge(text), Verdict::HeldOut(_))).collect::<Vec<_>>()
        };
        assert!((400..600).contains(&held_out(1).len()), "{}", held_out(1).len());
        assert_eq!(held_out(1), held_out(1));
        assert_ne!(held_out(1), held_out(2));
    }
}
