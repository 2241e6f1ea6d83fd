//! A multiple-choice task that a run makes from its held-out text: which of four texts comes next?

use serde_json::{Value, json};

/// The name of the data set.
pub(super) const SOURCE: &str = "ulmus/next_text";
/// Bytes before the place where a text is continued, at least.
const CONTEXT: usize = 200;
/// Bytes of a continuation, at least.
const CONTINUATION: usize = 60;
/// Bytes of a text that is used.
pub(super) const LEAST: usize = CONTEXT + CONTINUATION;
/// Texts to choose from.
const CHOICES: usize = 4;

/// A row for each text that is long enough: its beginning, and what comes next, among what comes next in the three texts that
/// follow. No rows if there are not enough texts.
pub(super) fn rows(texts: &[String]) -> Vec<Value> {
    let pieces: Vec<(&str, &str)> = texts.iter().filter_map(|text| pieces(text)).collect();
    if pieces.len() < CHOICES {
        return Vec::new();
    }
    let row = |index: usize| {
        let label = index % CHOICES;
        // The right one is at `label`, and the others follow it in turn.
        let choices = (0..CHOICES).map(|place| {
            let other = (place + CHOICES - label) % CHOICES;
            pieces[(index + other) % pieces.len()].1
        });
        json!({ "context": pieces[index].0, "choices": choices.collect::<Vec<_>>(), "label": label })
    };
    (0..pieces.len()).map(row).collect()
}

/// The beginning of a text and what comes next, both up to the end of a word; `None` if it is too short.
fn pieces(text: &str) -> Option<(&str, &str)> {
    let end_of_word = |from: usize| {
        let from = text.ceil_char_boundary(from);
        Some(from + text.get(from..)?.find(char::is_whitespace)?)
    };
    let middle = end_of_word(CONTEXT)?;
    let end = end_of_word(middle + CONTINUATION)?;
    Some((&text[..middle], &text[middle..end]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_text_is_continued_by_itself_at_its_label() {
        let texts: Vec<String> = (0..6)
            .map(|n| format!("{} ", ["é", "word"][n % 2]).repeat(40) + &format!("text{n} ").repeat(40))
            .collect();
        let rows = rows(&texts);
        assert_eq!(rows.len(), texts.len());
        for (index, (row, text)) in rows.iter().zip(&texts).enumerate() {
            let (context, label) =
                (row["context"].as_str().unwrap(), row["label"].as_u64().unwrap() as usize);
            assert_eq!(label, index % CHOICES);
            let choices: Vec<&str> =
                row["choices"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
            assert!(text.starts_with(&[context, choices[label]].concat()), "{row}");
            assert!(context.len() >= CONTEXT && choices.iter().all(|choice| choice.len() >= CONTINUATION));
            let others = choices.iter().filter(|choice| text.contains(*choice));
            assert_eq!((choices.len(), others.count()), (CHOICES, 1), "{row}");
        }
    }

    #[test]
    fn short_texts_are_left_out() {
        let long = "some words ".repeat(40);
        assert!(rows(&[long.clone(), long.clone(), long.clone(), "short".to_owned()]).is_empty());
        assert_eq!(rows(&[long.clone(), long.clone(), long.clone(), "x".repeat(500), long]).len(), 4);
    }
}
