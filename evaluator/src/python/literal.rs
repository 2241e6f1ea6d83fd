//! Values written as Python literals, as some data sets store them in a column of text.

use serde_json::{Map, Number, Value};

use super::string::is_space;

/// Reads what `ast.literal_eval` reads, as far as it consists of lists, tuples, dicts with text keys, texts, numbers,
/// booleans and `None`.
///
/// # Errors
/// What is wrong, and at which character.
pub(crate) fn parse(text: &str) -> Result<Value, String> {
    let mut parser = Parser { rest: text, depth: 0 };
    let value = parser.value();
    parser.skip_space();
    match value {
        Ok(value) if parser.rest.is_empty() => Ok(value),
        Ok(_) => Err("the literal has ended, and something follows".to_owned()),
        Err(problem) => Err(problem),
    }
    .map_err(|problem| {
        format!("{problem}, at character {}", text[..text.len() - parser.rest.len()].chars().count())
    })
}

struct Parser<'a> {
    rest: &'a str,
    /// Number of values that the next one is inside.
    depth: usize,
}

/// The most values inside each other, for which the stack has room.
const DEEPEST: usize = 100;

impl Parser<'_> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches(is_space);
    }

    /// Takes `token` if it comes next.
    fn take(&mut self, token: &str) -> bool {
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn next(&mut self) -> Result<char, String> {
        let mut characters = self.rest.chars();
        let next = characters.next().ok_or("the literal ends too early")?;
        self.rest = characters.as_str();
        Ok(next)
    }

    fn value(&mut self) -> Result<Value, String> {
        self.depth += 1;
        let value = if self.depth > DEEPEST {
            Err(format!("more than {DEEPEST} values are inside each other"))
        } else {
            self.whole_value()
        };
        self.depth -= 1;
        value
    }

    fn whole_value(&mut self) -> Result<Value, String> {
        self.skip_space();
        if self.take("[") {
            return self.list("]");
        }
        if self.take("(") {
            return self.list(")");
        }
        if self.take("{") {
            return self.dict();
        }
        for (word, value) in [("None", Value::Null), ("True", true.into()), ("False", false.into())] {
            if self.take(word) {
                return Ok(value);
            }
        }
        if self.rest.starts_with(['\'', '"']) {
            return self.texts().map(Value::String);
        }
        self.number()
    }

    /// The elements up to `end`, of which the last may have a comma after it.
    fn list(&mut self, end: &str) -> Result<Value, String> {
        let mut items = Vec::new();
        loop {
            self.skip_space();
            if self.take(end) {
                return Ok(Value::Array(items));
            }
            items.push(self.value()?);
            self.separator(end)?;
        }
    }

    fn dict(&mut self) -> Result<Value, String> {
        let mut entries = Map::new();
        loop {
            self.skip_space();
            if self.take("}") {
                return Ok(Value::Object(entries));
            }
            let Value::String(key) = self.value()? else { return Err("a key is not text".to_owned()) };
            self.skip_space();
            if !self.take(":") {
                return Err("a key has no `:` after it".to_owned());
            }
            entries.insert(key, self.value()?);
            self.separator("}")?;
        }
    }

    /// Takes a comma, unless `end` comes next.
    fn separator(&mut self, end: &str) -> Result<(), String> {
        self.skip_space();
        if self.take(",") || self.rest.starts_with(end) {
            Ok(())
        } else {
            Err(format!("neither `,` nor `{end}` follows"))
        }
    }

    /// One text, or several beside each other, which are one.
    fn texts(&mut self) -> Result<String, String> {
        let mut text = String::new();
        while let Some(quote) = ["'''", "\"\"\"", "'", "\""].into_iter().find(|quote| self.take(quote)) {
            while !self.take(quote) {
                match self.next()? {
                    '\\' => text.extend(self.escape()?),
                    '\n' if quote.len() == 1 => return Err("a line ends inside a text".to_owned()),
                    character => text.push(character),
                }
            }
            self.skip_space();
        }
        Ok(text)
    }

    /// What stands after a backslash: a character, or none if the line goes on.
    fn escape(&mut self) -> Result<Option<String>, String> {
        Ok(Some(match self.next()? {
            '\n' => return Ok(None),
            'a' => '\u{7}'.into(),
            'b' => '\u{8}'.into(),
            'f' => '\u{c}'.into(),
            'n' => '\n'.into(),
            'r' => '\r'.into(),
            't' => '\t'.into(),
            'v' => '\u{b}'.into(),
            'x' => self.code(2, 16)?.into(),
            'u' => self.code(4, 16)?.into(),
            'U' => self.code(8, 16)?.into(),
            'N' => return Err("characters by name are not supported".to_owned()),
            digit @ '0'..='7' => {
                let more = self.rest.chars().take(2).take_while(|next| next.is_digit(8)).count();
                let (digits, rest) = self.rest.split_at(more);
                self.rest = rest;
                let code = u32::from_str_radix(&format!("{digit}{digits}"), 8).expect("these are digits");
                char::from_u32(code).expect("512 characters exist").into()
            }
            quoted @ ('\\' | '\'' | '"') => quoted.into(),
            other => format!("\\{other}"),
        }))
    }

    /// The character of the code in the next `digits` digits.
    fn code(&mut self, digits: usize, radix: u32) -> Result<char, String> {
        let code = self.rest.get(..digits).ok_or("an escape ends too early")?;
        let character = u32::from_str_radix(code, radix).ok().and_then(char::from_u32);
        self.rest = &self.rest[digits..];
        character.ok_or_else(|| format!("there is no character {code}"))
    }

    fn number(&mut self) -> Result<Value, String> {
        let end = self.rest.find(|next: char| !next.is_ascii_alphanumeric() && !"+-._".contains(next));
        let (word, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        let digits = word.replace('_', "");
        let number = match digits.parse::<i64>() {
            Ok(integer) => Some(Number::from(integer)),
            Err(_) if digits.starts_with(|next: char| next.is_ascii_digit() || "+-.".contains(next)) => {
                digits.parse().ok().and_then(Number::from_f64)
            }
            Err(_) => None,
        };
        let number =
            number.ok_or_else(|| format!("`{}` is no literal", word.chars().take(20).collect::<String>()))?;
        self.rest = rest;
        Ok(Value::Number(number))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn literals_are_read_as_python_reads_them() {
        let cases = [
            (
                r#"[{'question': "It's _  .", 'options': ['a', "b",], 'answer': 'A'}]"#,
                json!([{"question": "It's _  .", "options": ["a", "b"], "answer": "A"}]),
            ),
            (r"'a\n\t\\\'\x41\u00e9\U0001F600\101\q'", json!("a\n\t\\'A\u{e9}\u{1f600}A\\q")),
            (
                r#"('one' "two", -1, 2.5, 1_000, None, True, False)"#,
                json!(["onetwo", -1, 2.5, 1000, null, true, false]),
            ),
            ("'''two\nlines'''", json!("two\nlines")),
            (" {} ", json!({})),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_literal_is_refused_with_its_place() {
        for (text, problem) in [
            ("[1, 2", "neither `,` nor `]` follows, at character 5"),
            ("[1 2]", "neither `,` nor `]` follows, at character 3"),
            ("'a\nb'", "a line ends inside a text, at character 3"),
            ("open()", "`open` is no literal, at character 0"),
            ("1 1", "the literal has ended, and something follows, at character 2"),
            (r"'\ud800'", "there is no character d800, at character 7"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error == problem, "{text}: {error}");
        }
        let deep = "[".repeat(1_000_000);
        assert!(parse(&deep).unwrap_err().starts_with("more than 100 values are inside each other"));
    }
}
