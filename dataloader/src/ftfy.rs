//! Repairs text as Python's ftfy does with its defaults: mojibake, entities, curly quotes, ligatures, line ends and
//! control characters; then it normalises to NFC. The published models were trained on such text.
//!
//! The crate `plsfix` does the work. This module corrects it where it differs from ftfy: entities must be left alone
//! once a `<` was seen, terminal escapes removed completely, and long lines cut between characters.
//! `tests/against_ftfy.py` measures the agreement.

use std::borrow::Cow;

use plsfix::TextFixerConfig;

/// Number of code points after which ftfy cuts a line.
const LONGEST: usize = 1_000_000;
/// Replaces `&` where entities must be left alone: an ASCII character that no fix touches.
const FORM_FEED: &str = "\u{c}";

/// Repairs a text.
pub(crate) fn fix(text: &str) -> Cow<'_, str> {
    if text.bytes().all(is_plain) {
        return text.into();
    }
    // The crate must never cut a line, because it might cut within a character.
    let config = TextFixerConfig { max_decode_length: i32::MAX, ..TextFixerConfig::default() };
    let mut fixed = String::with_capacity(text.len());
    let mut markup = false;
    for segment in segments(text) {
        markup |= segment.contains('<');
        if segment.bytes().all(is_plain) {
            fixed.push_str(segment);
        } else if markup && segment.contains('&') && !segment.contains(FORM_FEED) {
            let hidden = without_escapes(segment).replace('&', FORM_FEED);
            fixed.push_str(&plsfix::fix_text(&hidden, Some(&config)).replace(FORM_FEED, "&"));
        } else {
            fixed.push_str(&plsfix::fix_text(&without_escapes(segment), Some(&config)));
        }
    }
    fixed.into()
}

/// Whether text that consists of such bytes only is never changed.
const fn is_plain(byte: u8) -> bool {
    matches!(byte, b'\t' | b'\n' | b' '..=b'~') && byte != b'&'
}

/// The lines of a text with their line ends, where long lines are cut.
fn segments(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('\n').flat_map(|line| {
        let mut rest = line;
        std::iter::from_fn(move || {
            let end = match rest.char_indices().nth(LONGEST) {
                Some((end, _)) if rest.len() > LONGEST => end,
                _ => rest.len(),
            };
            let segment;
            (segment, rest) = rest.split_at(end);
            (!segment.is_empty()).then_some(segment)
        })
    })
}

/// The text without `ESC [ digits letter`.
fn without_escapes(text: &str) -> Cow<'_, str> {
    const ESCAPE: &str = "\u{1b}[";
    if !text.contains(ESCAPE) {
        return text.into();
    }
    let mut parts = text.split(ESCAPE);
    let mut left = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_numeric() || c == ';');
        if rest.starts_with(|c: char| c.is_ascii_alphabetic()) {
            left.push_str(&rest[1..]);
        } else {
            left.push_str(ESCAPE);
            left.push_str(part);
        }
    }
    left.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected texts come from ftfy 6.3.1.
    #[test]
    fn known_texts_are_repaired_as_by_ftfy() {
        for (text, fixed) in [
            ("plain & simple", "plain & simple"),
            ("schÃ¶n â€œquotedâ€\u{9d} âœ”", "schön \"quoted\" ✔"),
            ("AT&amp;T &copy; P&eacute;rez", "AT&T © Pérez"),
            ("a < b\n&amp; &copy;", "a < b\n&amp; &copy;"),
            ("&amp;\na < b\n&amp; schÃ¶n", "&\na < b\n&amp; schön"),
            ("\u{1b}[31;1mred\u{1b}[0m \u{1b}[?", "red [?"),
            ("ﬁne ＡＢＣ ‘x’ e\u{301}", "fine ABC 'x' é"),
            ("one\r\ntwo\rthree\u{7}\u{feff}", "one\ntwo\nthree"),
        ] {
            assert_eq!(fix(text), fixed, "{text:?}");
        }
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let long = "é".repeat(LONGEST + 3) + "\nend";
        let lengths: Vec<usize> = segments(&long).map(|segment| segment.chars().count()).collect();
        assert_eq!(lengths, [LONGEST, 4, 3]);
        assert_eq!(fix(&long), long);
    }
}
