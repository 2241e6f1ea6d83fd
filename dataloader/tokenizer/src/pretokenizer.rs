//! Cuts a text into words, before byte-level models join the bytes of each.
//!
//! Tokenizer files define words by a regular expression. Two are common: that of GPT-2, and that of cl100k (Llama 3,
//! Qwen, OLMo 2), whose variants differ in how many digits form a word. This implementation matches them in one pass,
//! in the order of the expression's alternatives.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// GPT-2's expression, which `ByteLevel` implies.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Two equivalent beginnings of cl100k's expression.
const CONTRACTIONS: [&str; 2] = ["(?i:'s|'t|'re|'ve|'m|'ll|'d)|", "'(?i:[sdmt]|ll|ve|re)|"];

/// The rules of a known expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PreTokenizer {
    /// Maximum number of digits in a word. `None` stands for GPT-2's rules: no limit, and a space may precede a number.
    digits: Option<usize>,
}

impl PreTokenizer {
    /// GPT-2's rules.
    pub(super) const GPT2: Self = Self { digits: None };

    /// The rules of an expression, if it is a known one.
    pub(super) fn of_expression(expression: &str) -> Option<Self> {
        if expression == GPT2 {
            return Some(Self::GPT2);
        }
        let rest = CONTRACTIONS.iter().find_map(|start| expression.strip_prefix(start))?;
        // Possessive quantifiers matter here only; elsewhere, giving characters back could never lead to a match.
        if rest.contains(r"\s++(?!") {
            return None;
        }
        [(1, r"\p{N}"), (3, r"\p{N}{1,3}")].into_iter().find_map(|(digits, number)| {
            let all = format!(
                r"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            );
            (rest.replace("?+", "?").replace("++", "+") == all).then_some(Self { digits: Some(digits) })
        })
    }

    /// Calls `emit` with each word of `text`, in order.
    pub(super) fn cut<'t>(self, text: &'t str, mut emit: impl FnMut(&'t str)) {
        let mut at = 0;
        while at < text.len() {
            let end = self.end(text, at);
            emit(&text[at..end]);
            at = end;
        }
    }

    /// The end of the word that begins at `at`.
    fn end(self, text: &str, at: usize) -> usize {
        let (first, class, width) = next(text, at);
        if first == '\''
            && let Some(length) = self.contraction(&text[at + 1..])
        {
            return at + 1 + length;
        }
        let after_space = if first == ' ' { at + 1 } else { at };
        // One character may precede letters: a space in GPT-2, any but a line break, letter or number in cl100k.
        let letters = match self.digits {
            None => after_space,
            Some(_) if class == LETTER || class == NUMBER || is_newline(first) => at,
            Some(_) => at + width,
        };
        let end = run(text, letters, |_, class| class == LETTER);
        if end > letters {
            return end;
        }
        let end = match self.digits {
            None => run(text, after_space, |_, class| class == NUMBER),
            Some(most) => {
                let mut left = most;
                run(text, at, |_, class| {
                    let more = class == NUMBER && left > 0;
                    left -= usize::from(more);
                    more
                })
            }
        };
        if end > if self.digits.is_none() { after_space } else { at } {
            return end;
        }
        let end = run(text, after_space, |_, class| class == OTHER);
        if end > after_space {
            return if self.digits.is_none() { end } else { run(text, end, |c, _| is_newline(c)) };
        }
        self.whitespace(text, at)
    }

    /// The end of the run of whitespace that begins at `at`: after its last line break (cl100k), or else before its
    /// last character, which belongs to the next word.
    fn whitespace(self, text: &str, at: usize) -> usize {
        let (mut newline, mut last) = (None, at);
        let mut here = at;
        let end = run(text, at, |c, class| {
            if class == WHITESPACE {
                last = here;
                here += c.len_utf8();
                if is_newline(c) {
                    newline = Some(here);
                }
            }
            class == WHITESPACE
        });
        match newline {
            Some(newline) if self.digits.is_some() => newline,
            _ if end < text.len() && last > at => last,
            _ => end,
        }
    }

    /// The length in bytes of the rest of a contraction, after its apostrophe.
    fn contraction(self, rest: &str) -> Option<usize> {
        const ENDS: [&str; 7] = ["s", "t", "re", "ve", "m", "ll", "d"];
        if self.digits.is_none() {
            return ENDS.iter().find(|end| rest.starts_with(**end)).map(|end| end.len());
        }
        // The long s is the only letter beyond ASCII that equals one of these without regard to case.
        if rest.starts_with('ſ') {
            return Some('ſ'.len_utf8());
        }
        let is = |end: &&&str| rest.get(..end.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(end));
        ENDS.iter().find(is).map(|end| end.len())
    }
}

/// The end of the run of characters from `at` on that satisfy `holds`.
fn run(text: &str, mut at: usize, mut holds: impl FnMut(char, u8) -> bool) -> usize {
    while at < text.len() {
        let (c, class, width) = next(text, at);
        if !holds(c, class) {
            break;
        }
        at += width;
    }
    at
}

/// The character at `at`, its class, and its length in bytes.
#[inline]
fn next(text: &str, at: usize) -> (char, u8, usize) {
    let byte = text.as_bytes()[at];
    if byte < 128 {
        return (char::from(byte), CLASSES[usize::from(byte)], 1);
    }
    let c = text[at..].chars().next().expect("`at` is before the end of the text");
    (c, CLASSES[c as usize], c.len_utf8())
}

const fn is_newline(c: char) -> bool {
    matches!(c, '\r' | '\n')
}

const OTHER: u8 = 0;
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const WHITESPACE: u8 = 3;

/// The class of every code point, according to the tables of the crate `regex_syntax`.
static CLASSES: LazyLock<Box<[u8]>> = LazyLock::new(|| {
    let mut classes = vec![OTHER; char::MAX as usize + 1];
    for (class, expression) in [(LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (WHITESPACE, r"\s")] {
        let parsed = regex_syntax::parse(expression).expect("the expression is right");
        let HirKind::Class(Class::Unicode(ranges)) = parsed.kind() else { continue };
        for range in ranges.iter() {
            classes[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    classes.into()
});

#[cfg(test)]
mod tests {
    use fancy_regex::Regex;
    use proptest::prelude::*;

    use super::*;

    const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn words_are_what_the_expression_matches(
            text in "([a-zA-Z]{1,3}|[0-9²٣]{1,4}|'(s|S|ſ|re|LL|x|d)?|[ \t\n\r\u{a0}\u{2003}\u{85}]{1,3}|[.,!<|>_é中\u{301}😀]{1,3}){0,12}"
        ) {
            for expression in [GPT2, CL100K, QWEN] {
                let words = PreTokenizer::of_expression(expression).unwrap();
                let mut cut = Vec::new();
                words.cut(&text, |word| cut.push(word));
                let expression = Regex::new(expression).unwrap();
                let expected: Vec<&str> = expression.find_iter(&text).map(|found| found.unwrap().as_str()).collect();
                prop_assert_eq!(cut, expected);
            }
        }
    }

    #[test]
    fn other_expressions_are_not_taken_for_known_ones() {
        assert_eq!(PreTokenizer::of_expression(&CL100K.replace("{1,3}", "{1,4}")), None);
        assert_eq!(PreTokenizer::of_expression(&GPT2.replace("'s|", "")), None);
        assert_eq!(PreTokenizer::of_expression(&CL100K.replace(r"\s+(?!", r"\s++(?!")), None);
        let possessive = CL100K
            .replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
            .replace("]?\\p", "]?+\\p");
        assert_eq!(PreTokenizer::of_expression(&possessive), Some(PreTokenizer { digits: Some(3) }));
    }
}
