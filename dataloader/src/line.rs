//! Reads the text from a line of JSON.
//!
//! A single value is read, and all others are skipped: they may be anything that Python's `json` writes, including
//! `NaN`, numbers of any size, and objects nested to any depth. If a key occurs twice, the last one counts.

use std::ops::Range;

use serde_json::error::Category;

use crate::error::DataError;
use ulmus_types::without_mark;

/// Whether a line is empty or consists of whitespace.
pub(crate) fn is_blank(line: &[u8]) -> bool {
    without_mark(line).trim_ascii().is_empty()
}

/// The text under a key of the JSON object on a line, or under `meta.text` of an object within it. `None` if it is
/// null.
pub(crate) fn text_of_line(
    line: &[u8],
    key: &str,
    place: impl Fn() -> String,
) -> Result<Option<String>, DataError> {
    let wrong = |(at, reason): Wrong| {
        let reason = format!("{reason} at character {}", at + 1);
        DataError::Format { file: place(), format: "jsonl", reason }
    };
    // Some editors write a byte order mark at the beginning of a file.
    let line = without_mark(line);
    let mut scanner = Scanner { line, at: 0, keys: None };
    let found = scanner.document(key).map_err(wrong)?;
    match found {
        Found::Text(value) => {
            let begin = value.start;
            string(&line[value]).map(Some).map_err(|(at, reason)| wrong((begin + at, reason)))
        }
        Found::Null => Ok(None),
        Found::Other(found) => {
            Err(DataError::ColumnType { file: place(), column: key.to_owned(), found: found.to_owned() })
        }
        Found::Nothing => {
            let mut scanner = Scanner { line, at: 0, keys: Some(Vec::new()) };
            scanner.document(key).map_err(wrong)?;
            let mut columns = scanner.keys.unwrap_or_default();
            columns.sort();
            columns.dedup();
            Err(DataError::Column { file: place(), column: key.to_owned(), columns })
        }
        Found::NoObject => Err(DataError::Format {
            file: place(),
            format: "jsonl",
            reason: "the line is not a JSON object".to_owned(),
        }),
    }
}

/// The offset at which a line is not JSON, and the reason.
type Wrong = (usize, String);

/// What was found under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Found {
    /// A string, including its quotation marks.
    Text(Range<usize>),
    Null,
    /// A value of any other type, as a phrase for a message.
    Other(&'static str),
    /// The object has no such key.
    Nothing,
    /// The line is not an object.
    NoObject,
}

struct Scanner<'a> {
    line: &'a [u8],
    at: usize,
    /// The keys of the outermost object, if they are needed for a message.
    keys: Option<Vec<String>>,
}

impl Scanner<'_> {
    /// Reads the line to its end.
    fn document(&mut self, key: &str) -> Result<Found, Wrong> {
        self.skip_whitespace();
        let found = if self.peek() == Some(b'{') {
            self.object(key, true)?
        } else {
            self.value()?;
            Found::NoObject
        };
        self.skip_whitespace();
        match self.peek() {
            None => Ok(found),
            Some(_) => Err(self.wrong("trailing characters")),
        }
    }

    /// Reads an object, and finds the value of a key. The key may be a path into an object within this one.
    fn object(&mut self, key: &str, is_outermost: bool) -> Result<Found, Wrong> {
        let parts = key.split_once('.');
        let (mut whole, mut within) = (Found::Nothing, Found::Nothing);
        self.at += 1;
        self.skip_whitespace();
        if self.take(b'}') {
            return Ok(Found::Nothing);
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(self.wrong("expected a key"));
            }
            let name = self.passed_string()?;
            let name = &self.line[name];
            let is = |key: &str| is_name(name, key);
            if is_outermost && let Some(keys) = &mut self.keys {
                keys.extend(string(name));
            }
            self.skip_whitespace();
            if !self.take(b':') {
                return Err(self.wrong("expected `:`"));
            }
            self.skip_whitespace();
            if is(key) {
                whole = self.found()?;
            } else if let Some((outer, inner)) = parts
                && is(outer)
            {
                within = match self.peek() {
                    Some(b'{') => self.object(inner, false)?,
                    _ => match self.found()? {
                        Found::Null => Found::Null,
                        _ => Found::Nothing,
                    },
                };
            } else {
                self.value()?;
            }
            self.skip_whitespace();
            if self.take(b'}') {
                // A key that equals the whole path takes precedence over an object within the object.
                return Ok(if whole == Found::Nothing { within } else { whole });
            }
            if !self.take(b',') {
                return Err(self.wrong("expected `,` or `}`"));
            }
            self.skip_whitespace();
        }
    }

    /// Skips the value of the key, and returns what it is.
    fn found(&mut self) -> Result<Found, Wrong> {
        let begin = self.at;
        self.value()?;
        Ok(match self.line[begin] {
            b'"' => Found::Text(begin..self.at),
            b'n' => Found::Null,
            b't' | b'f' => Found::Other("a boolean"),
            b'[' => Found::Other("a list"),
            b'{' => Found::Other("an object"),
            _ => Found::Other("a number"),
        })
    }

    /// Skips any value, however deeply nested.
    fn value(&mut self) -> Result<(), Wrong> {
        // The closing brackets of the lists and objects that are open.
        let mut open = Vec::new();
        loop {
            self.skip_whitespace();
            match self.peek() {
                Some(bracket @ (b'{' | b'[')) => {
                    // In ASCII, `]` and `}` come two places after `[` and `{`.
                    let close = bracket + 2;
                    self.at += 1;
                    self.skip_whitespace();
                    if !self.take(close) {
                        open.push(close);
                        self.name(close)?;
                        continue;
                    }
                }
                Some(b'"') => {
                    self.passed_string()?;
                }
                _ => self.word()?,
            }
            // After a value comes the next one, or the end of the list or object that it is in.
            loop {
                let Some(close) = open.last().copied() else { return Ok(()) };
                self.skip_whitespace();
                if self.take(b',') {
                    self.name(close)?;
                    break;
                }
                if !self.take(close) {
                    return Err(self.wrong(if close == b'}' {
                        "expected `,` or `}`"
                    } else {
                        "expected `,` or `]`"
                    }));
                }
                open.pop();
            }
        }
    }

    /// Within an object, skips a key and its colon.
    fn name(&mut self, close: u8) -> Result<(), Wrong> {
        if close == b'}' {
            self.skip_whitespace();
            if self.peek() != Some(b'"') {
                return Err(self.wrong("expected a key"));
            }
            self.passed_string()?;
            self.skip_whitespace();
            if !self.take(b':') {
                return Err(self.wrong("expected `:`"));
            }
        }
        Ok(())
    }

    /// Skips a number, or one of the literal names for a value.
    fn word(&mut self) -> Result<(), Wrong> {
        let rest = &self.line[self.at..];
        let length =
            rest.iter().take_while(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte)).count();
        let is_value = match &rest[..length] {
            // Some C programs write the last five, which cannot be mistaken for anything else.
            b"null" | b"true" | b"false" | b"NaN" | b"Infinity" | b"-Infinity" | b"nan" | b"-nan"
            | b"-NaN" | b"inf" | b"-inf" => true,
            number => {
                number.iter().any(u8::is_ascii_digit)
                    && number.iter().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(byte))
            }
        };
        if is_value {
            self.at += length;
            Ok(())
        } else {
            Err(self.wrong("expected value"))
        }
    }

    /// Skips a string, and returns its range, including the quotation marks.
    fn passed_string(&mut self) -> Result<Range<usize>, Wrong> {
        let begin = self.at;
        let mut at = begin + 1;
        while let Some(length) = self.line[at..].iter().position(|byte| matches!(byte, b'"' | b'\\')) {
            at += length;
            if self.line[at] == b'"' {
                self.at = at + 1;
                return Ok(begin..self.at);
            }
            at = (at + 2).min(self.line.len());
        }
        self.at = self.line.len();
        Err(self.wrong("EOF while parsing a string"))
    }

    fn skip_whitespace(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.line.get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let is_there = self.peek() == Some(byte);
        self.at += usize::from(is_there);
        is_there
    }

    fn wrong(&self, expected: &str) -> Wrong {
        let reason =
            if self.at < self.line.trim_ascii_end().len() { expected } else { "the line ends in the middle" };
        (self.at, reason.to_owned())
    }
}

/// Whether a quoted JSON string equals `name`.
fn is_name(quoted: &[u8], name: &str) -> bool {
    let inside = &quoted[1..quoted.len() - 1];
    if inside.contains(&b'\\') {
        string(quoted).is_ok_and(|string| string == name)
    } else {
        inside == name.as_bytes()
    }
}

/// The value of a quoted JSON string, or the offset of a mistake in it.
fn string(quoted: &[u8]) -> Result<String, Wrong> {
    let told = |error: serde_json::Error| {
        let reason = error.to_string();
        let reason = reason.split(" at line").next().unwrap_or(&reason).to_owned();
        let at = if error.classify() == Category::Eof { quoted.len() } else { error.column() };
        (at.saturating_sub(1), reason)
    };
    match serde_json::from_slice(quoted) {
        Ok(string) => Ok(string),
        // Crawled texts contain lone surrogates. As in Python, which accepts them, they do not cost the document.
        Err(error) => match without_lone_surrogates(quoted) {
            Some(mended) => serde_json::from_slice(&mended).map_err(told),
            None => Err(told(error)),
        },
    }
}

/// A line of JSON in which each escape of a lone surrogate has been replaced by U+FFFD, or `None` if there are no such
/// escapes.
pub fn without_lone_surrogates(line: &[u8]) -> Option<Vec<u8>> {
    let half = |at: usize| {
        let digits = std::str::from_utf8(line.get(at..at + 6)?.strip_prefix(b"\\u")?).ok()?;
        u16::from_str_radix(digits, 16).ok().filter(|half| (0xd800..0xe000).contains(half))
    };
    let (mut mended, mut at) = (Vec::with_capacity(line.len()), 0);
    while at < line.len() {
        let (length, lone) = match (half(at), half(at + 6)) {
            (Some(..0xdc00), Some(0xdc00..)) => (12, false),
            (Some(_), _) => (6, true),
            // Any other escape takes two bytes.
            _ if line[at] == b'\\' => (2.min(line.len() - at), false),
            _ => (1, false),
        };
        if lone {
            mended.extend_from_slice(br"\ufffd");
        } else {
            mended.extend_from_slice(&line[at..at + length]);
        }
        at += length;
    }
    (mended != line).then_some(mended)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(line: &str) -> Result<Option<String>, String> {
        text_of_line(line.as_bytes(), "text", || "a.jsonl".to_owned()).map_err(|error| error.to_string())
    }

    #[test]
    fn other_values_may_be_anything_that_python_writes() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let long = "9".repeat(10_000);
        for value in [
            "NaN",
            "-Infinity",
            "Infinity",
            "[NaN, {\"a\": Infinity}]",
            "1e999",
            "-0.0E-5",
            &long,
            "\"\\ud83d\"",
            "\"\\\\\"",
            "\"\\\"text\\\": 1\"",
            "{\"text\": \"inner\"}",
            "{}",
            "[ ]",
            "null",
            &deep,
            &format!("{}1{}", "{\"a\":".repeat(5000), "}".repeat(5000)),
        ] {
            for line in [
                format!("{{\"text\": \"fine\", \"score\": {value}}}"),
                format!(" {{ \"score\" : {value} , \"text\" : \"fine\" }} \r\n"),
                format!("{{\"a\": 1, \"a\": {value}, \"te\\u0078t\": \"fine\"}}"),
            ] {
                assert_eq!(text(&line), Ok(Some("fine".to_owned())), "{}", &line[..line.len().min(80)]);
            }
        }
        let not_utf8 = text_of_line(b"{\"text\": \"fine\", \"by\": \"\xe9\"}", "text", String::new);
        assert_eq!(not_utf8.unwrap().as_deref(), Some("fine"));
    }

    #[test]
    fn the_last_of_duplicate_keys_counts() {
        for (line, expected) in
            [(r#"{"text": 1, "text": "b"}"#, Some("b")), (r#"{"text": "a", "text": null}"#, None)]
        {
            assert_eq!(text(line), Ok(expected.map(str::to_owned)), "{line}");
        }
        let nested = r#"{"meta": {"text": "a"}, "meta": {}}"#;
        let error = text_of_line(nested.as_bytes(), "meta.text", String::new).unwrap_err().to_string();
        assert!(error.contains("no column \"meta.text\""), "{error}");
    }

    #[test]
    fn errors_name_the_place_and_the_reason() {
        for (line, words) in [
            (r#"{"text": "a", "b": nope}"#, "expected value at character 20"),
            (r#"{"text": "a", "b": --}"#, "expected value at character 20"),
            (r#"{"text": "a"} {"text": "b"}"#, "trailing characters at character 15"),
            (r#"{"text": "a", "b": [1, }"#, "expected value at character 24"),
            (r#"{"text": "a", "b": [1}"#, "expected `,` or `]` at character 22"),
            (r#"{"text": "a" "b": 1}"#, "expected `,` or `}` at character 14"),
            (r#"{"text": "a", b: 1}"#, "expected a key at character 15"),
            (r#"{"text" "a"}"#, "expected `:` at character 9"),
            (r#"{"text": "a"#, "the line ends in the middle"),
            (r#"{"text": "a", "b": {"c"#, "the line ends in the middle"),
            ("{\"text\": \"a\tb\"}", "control character"),
            ("[1]", "not a JSON object"),
            (r#"{"text": NaN}"#, "holds a number"),
            (r#"{"text": [NaN]}"#, "holds a list"),
        ] {
            let told = text(line).unwrap_err();
            assert!(told.contains(words), "{line}: {told}");
        }
    }

    proptest! {
        /// Every line that serde_json accepts is accepted, with the same text.
        #[test]
        fn lines_are_read_as_by_serde_json(
            entries in prop::collection::vec((".{0,6}", prop::sample::select(vec![
                "1", "-2.5e3", "\"x\\n\\u00e9\"", "[1, [], {\"text\": 2}]", "{\"a\": \"}\"}", "null", "true", "\"\"",
            ])), 0..5),
            name in prop::sample::select(vec!["text", "other"]),
            at in 0_usize..200,
        ) {
            let pairs: Vec<String> = entries
                .iter()
                .map(|(key, value)| format!("{}:{value}", serde_json::to_string(key).unwrap()))
                .chain([format!("\"{name}\": \"found ä\"")])
                .collect();
            let line = format!("{{{}}}", pairs.join(" , "));
            let value: serde_json::Value = serde_json::from_str(&line).unwrap();
            let found = text(&line).ok().flatten();
            prop_assert_eq!(found.as_deref(), value["text"].as_str());
            // A truncated line is never accepted.
            let cut: String = line.chars().take(at).collect();
            if cut != line && !cut.trim().is_empty() {
                prop_assert!(text(&cut).is_err(), "{cut}");
            }
        }
    }

    #[test]
    fn a_text_may_be_in_a_nested_object() {
        for (line, expected) in [
            (r#"{"meta": {"text": "inner", "more": {}}}"#, Ok(vec!["inner"])),
            (
                r#"{"meta": {"text": "inner"}, "meta.text": "of this very name"}"#,
                Ok(vec!["of this very name"]),
            ),
            (r#"{"meta": {"text": null}}"#, Ok(vec![])),
            (r#"{"meta": null}"#, Ok(vec![])),
            (r#"{"meta": {"other": "x"}}"#, Err("no column \"meta.text\"")),
            (r#"{"meta": "x"}"#, Err("no column \"meta.text\"")),
            (r#"{"meta": {"text": {}}}"#, Err("holds an object")),
        ] {
            let text = text_of_line(line.as_bytes(), "meta.text", || "a.jsonl".to_owned());
            match (text, expected) {
                (Ok(text), Ok(expected)) => assert_eq!(Vec::from_iter(text), expected, "{line}"),
                (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{line}: {error}"),
                (text, _) => panic!("{line}: {text:?}"),
            }
        }
    }
}
