//! Normalises and filters a document before it is tokenized, and decides whether it is held out.
//!
//! These functions are pure. The character filter counts a simplified text, but the normalised text is tokenized.
//!
//! The published recipe (`pack = "corenet"`) first cuts a document into pieces of a fixed number of words. Both filters
//! then apply to each piece, the first one before the piece is normalised. Holding out is decided for the whole
//! document.

use std::borrow::Cow;

use crate::ftfy;
use ulmus_plan::{DataConfig, Normalize, Pack};
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// The rules of a plan for single documents.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) pack: Pack,
    piece_words: usize,
    normalize: Normalize,
    min_characters: u64,
    pub(crate) min_tokens: u64,
    /// A document is held out if its hash is below this value.
    held_out_below: u64,
    seed: u64,
}

/// The verdict on a document, with its normalised text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict<'a> {
    /// The document has too few characters.
    Short,
    /// The document is used for evaluation only.
    HeldOut(Cow<'a, str>),
    /// The document is used for training.
    Kept(Cow<'a, str>),
}

impl Rules {
    pub(crate) fn new(config: &DataConfig, seed: u64) -> Self {
        Self {
            pack: config.pack,
            piece_words: config.piece_words.max(1) as usize,
            normalize: config.normalize,
            min_characters: config.min_characters,
            min_tokens: config.min_tokens,
            held_out_below: (config.holdout * 2_f64.powi(64)) as u64,
            seed,
        }
    }

    /// Whether no document is ever held out.
    pub(crate) const fn holds_out_none(&self) -> bool {
        self.held_out_below == 0
    }

    /// Judges a document, or each of its pieces.
    pub(crate) fn judge<'a>(&self, text: &'a str) -> Vec<Verdict<'a>> {
        match self.pack {
            Pack::Concat => vec![self.judge_document(text)],
            Pack::Corenet => {
                let held_out = self.hash(text) < self.held_out_below;
                pieces(text, self.piece_words).map(|piece| self.judge_piece(piece, held_out)).collect()
            }
        }
    }

    fn judge_piece<'a>(&self, piece: &'a str, held_out: bool) -> Verdict<'a> {
        if !has_characters(piece, self.min_characters) {
            return Verdict::Short;
        }
        let text = normalized(piece, self.normalize);
        if held_out { Verdict::HeldOut(text) } else { Verdict::Kept(text) }
    }

    fn judge_document<'a>(&self, text: &'a str) -> Verdict<'a> {
        let text = normalized(text, self.normalize);
        if !has_characters(&text, self.min_characters) {
            Verdict::Short
        } else if self.hash(&text) < self.held_out_below {
            Verdict::HeldOut(text)
        } else {
            Verdict::Kept(text)
        }
    }

    /// Whether a document is held out, given only its tokens.
    pub(crate) fn holds_out(&self, tokens: &[u32]) -> bool {
        let mut hasher = blake3::Hasher::new_derive_key("ulmus held-out tokens");
        hasher.update(&self.seed.to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        first_word(&hasher) < self.held_out_below
    }

    /// Hash of the contents, so that equal texts are held out together, wherever they are.
    fn hash(&self, text: &str) -> u64 {
        let mut hasher = blake3::Hasher::new_derive_key("ulmus held-out documents");
        hasher.update(&self.seed.to_le_bytes()).update(text.as_bytes());
        first_word(&hasher)
    }
}

fn first_word(hasher: &blake3::Hasher) -> u64 {
    let hash = hasher.finalize();
    u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
}

/// Cuts a text into pieces of `words` words. Two spaces in a row have an empty word between them.
fn pieces(text: &str, words: usize) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let (piece, after) = match text.match_indices(' ').nth(words - 1) {
            Some((at, space)) => (&text[..at], Some(&text[at + space.len()..])),
            None => (text, None),
        };
        rest = after;
        Some(piece)
    })
}

/// Normalises a text in the way that a plan asks for before it is tokenized.
pub fn normalized(text: &str, normalize: Normalize) -> Cow<'_, str> {
    match normalize {
        Normalize::Ftfy => ftfy::fix(text),
        Normalize::Nfc if is_nfc_quick(text.chars()) != IsNormalized::Yes => {
            text.nfc().collect::<String>().into()
        }
        Normalize::Nfc | Normalize::None => text.into(),
    }
}

/// Whether `text` has at least `least` characters as the reference counts them: the code points that remain after
/// lower-casing, deleting ASCII punctuation, stripping, and collapsing runs of whitespace.
fn has_characters(text: &str, least: u64) -> bool {
    let mut count = 0;
    let mut space_before = false;
    for c in text.chars().filter(|c| !c.is_ascii_punctuation()) {
        if is_whitespace(c) {
            // Whitespace counts only between other characters.
            space_before = count > 0;
            continue;
        }
        count += u64::from(space_before) + if c.is_ascii() { 1 } else { c.to_lowercase().count() as u64 };
        space_before = false;
        if count >= least {
            return true;
        }
    }
    count >= least
}

/// What Python counts as whitespace: Unicode's, and the four separators in ASCII.
fn is_whitespace(c: char) -> bool {
    c.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(holdout: f64, min_characters: u64) -> Rules {
        Rules::new(&DataConfig { holdout, min_characters, ..DataConfig::default() }, 7)
    }

    #[test]
    fn characters_are_counted_as_in_the_reference() {
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
        assert_eq!(rules(0.0, 0).judge("e\u{301}"), [Verdict::Kept("é".into())]);
        assert_eq!(rules(0.0, 2).judge("e\u{301}"), [Verdict::Short]);
    }

    #[test]
    fn the_published_recipe_judges_pieces_before_they_are_normalised() {
        let rules = Rules { pack: Pack::Corenet, piece_words: 2, ..rules(0.0, 2) };
        let kept = |text: &'static str| Verdict::Kept(text.into());
        let verdicts = rules.judge("e\u{301} b  c d");
        assert_eq!(verdicts, [kept("é b"), Verdict::Short, Verdict::Short]);
        let rules = Rules { min_characters: 0, ..rules };
        assert_eq!(rules.judge("e\u{301} b  c d"), [kept("é b"), kept(" c"), kept("d")]);
        assert_eq!(rules.judge(""), [kept("")]);
        assert_eq!(rules.judge("a b "), [kept("a b"), kept("")]);
    }

    #[test]
    fn the_share_of_held_out_documents_is_as_configured() {
        let rules = rules(0.1, 0);
        let held_out = |seed| {
            let rules = Rules { seed, ..rules.clone() };
            let texts = (0..5000).map(|n| format!("document {n}"));
            texts.filter(|text| matches!(rules.judge(text)[..], [Verdict::HeldOut(_)])).collect::<Vec<_>>()
        };
        assert!((400..600).contains(&held_out(1).len()), "{}", held_out(1).len());
        assert_eq!(held_out(1), held_out(1));
        assert_ne!(held_out(1), held_out(2));
    }
}
