//! Methods of Python's `str`, where they differ from those of Rust.

/// Whether Python's `str.isspace` holds, and so what `strip` removes and `\s` matches: Unicode's white space and the four
/// separators of ASCII.
pub(crate) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// `text.strip()`.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `text.lstrip()`.
pub(crate) fn lstrip(text: &str) -> &str {
    text.trim_start_matches(is_space)
}

/// `text.rstrip()`.
pub(crate) fn rstrip(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// `text.capitalize()`: the first character in title case, all others in lower case.
pub(crate) fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    let title = unicode_case_mapping::to_titlecase(first);
    let title = title.into_iter().filter(|point| *point != 0).filter_map(char::from_u32);
    // Lower-cased as a whole, because a final sigma depends on what is before it.
    let lower = text.to_lowercase();
    let rest = lower.chars().skip(first.to_lowercase().count());
    let unchanged = Some(first).filter(|_| unicode_case_mapping::to_titlecase(first) == [0; 3]);
    unchanged.into_iter().chain(title).chain(rest).collect()
}

/// The number of pieces of `re.split(r"\s+", text)`.
pub(crate) fn words(text: &str) -> usize {
    let mut in_space = false;
    let runs = text.chars().filter(|character| {
        let begins = is_space(*character) && !in_space;
        in_space = is_space(*character);
        begins
    });
    1 + runs.count()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn strings_are_those_of_python() {
        let vectors = include_str!("../../../tests/golden/evaluation/python_string_vectors.json");
        let vectors: Vec<Value> = serde_json::from_str(vectors).unwrap();
        for case in &vectors {
            let text = |key: &str| case[key].as_str().unwrap();
            let output = match text("op") {
                "capitalize" => capitalize(text("input")),
                "strip" => strip(text("input")).to_owned(),
                other => panic!("no method {other}"),
            };
            assert_eq!(output, text("output"), "{case}");
        }
    }

    #[test]
    fn a_capitalized_text_keeps_its_final_sigma() {
        // From Python 3.11.
        assert_eq!(capitalize("ΟΔΟΣ ΣΑΣ"), "Οδος σας");
        assert_eq!(capitalize("ΑΣ"), "Ας");
        assert_eq!(capitalize("ΣΑ"), "Σα");
        assert_eq!(capitalize("ﬁX"), "Fix");
    }

    #[test]
    fn empty_ends_are_words() {
        assert_eq!([words(""), words("a"), words(" a b\n\n c "), words("a\u{1c}b")], [1, 1, 5, 2]);
    }
}
