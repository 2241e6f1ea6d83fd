//! The files of sampled answers and of their scores: JSON lines, one for each prompt.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The answers that were sampled to a prompt; no two are equal. What scores them reads `number`, `prompt` and `answers`.
#[expect(clippy::struct_field_names, reason = "it is the name that what scores them reads")]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answers {
    /// Number of the prompt among those that are kept, from 1.
    pub(crate) number: u64,
    /// The prompt, as the model reads it.
    pub(crate) prompt: String,
    /// The answers.
    pub(crate) answers: Vec<String>,
    /// Their tokens, with the EOS of those that have ended.
    pub(crate) ids: Vec<Vec<u32>>,
    /// Their scores, if a reward head has given them some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scores: Option<Vec<f64>>,
}

/// The scores of the answers to a prompt, one for each.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Scores {
    number: u64,
    scores: Vec<f64>,
}

pub(crate) fn to_lines(all: &[Answers]) -> Vec<u8> {
    let mut lines = Vec::new();
    for answers in all {
        serde_json::to_writer(&mut lines, answers).expect("answers have text keys");
        lines.push(b'\n');
    }
    lines
}

/// Reads what [`to_lines`] wrote.
///
/// # Errors
/// What is wrong with the content.
pub(crate) fn from_lines(lines: &[u8]) -> Result<Vec<Answers>, String> {
    let all: Vec<Answers> = parsed(lines)?;
    let is_whole = |answers: &Answers| {
        let count = answers.answers.len();
        answers.ids.len() == count && answers.scores.as_ref().is_none_or(|scores| scores.len() == count)
    };
    match all.iter().find(|answers| !is_whole(answers)) {
        Some(wrong) => Err(format!("prompt {} has other numbers of answers, ids and scores", wrong.number)),
        None => Ok(all),
    }
}

/// The scores of each prompt's answers in a file that somebody has made for them.
///
/// # Errors
/// What is wrong with the content, with the numbers of prompts and of scores.
pub(crate) fn scores_from_lines(lines: &[u8], all: &[Answers]) -> Result<Vec<Vec<f64>>, String> {
    let mut found = BTreeMap::new();
    for Scores { number, scores } in parsed(lines)? {
        if found.insert(number, scores).is_some() {
            return Err(format!("number {number} is there twice"));
        }
    }
    let in_order = all.iter().map(|answers| {
        let (number, count) = (answers.number, answers.answers.len());
        let scores = found.remove(&number).ok_or_else(|| format!("it has no scores of number {number}"))?;
        if scores.len() == count {
            Ok(scores)
        } else {
            Err(format!("number {number} has {count} answers and {} scores", scores.len()))
        }
    });
    let in_order: Vec<_> = in_order.collect::<Result<_, String>>()?;
    match found.keys().next() {
        Some(unknown) => Err(format!("there is no number {unknown} among the answers")),
        None => Ok(in_order),
    }
}

fn parsed<T: serde::de::DeserializeOwned>(lines: &[u8]) -> Result<Vec<T>, String> {
    let lines = (1..).zip(lines.split(|byte| *byte == b'\n'));
    let written = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
    written
        .map(|(at, line)| serde_json::from_slice(line).map_err(|error| format!("line {at}: {error}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(number: u64) -> Answers {
        Answers {
            number,
            prompt: "a".to_owned(),
            answers: vec!["b\n".to_owned(), "c".to_owned()],
            ids: vec![vec![5, 2], vec![6]],
            scores: None,
        }
    }

    #[test]
    fn answers_are_read_as_they_were_written() {
        let all = [answers(1), Answers { scores: Some(vec![0.1, -3.0]), ..answers(4) }];
        assert_eq!(from_lines(&to_lines(&all)).unwrap(), all);
        let wrong = [Answers { ids: Vec::new(), ..answers(7) }];
        assert!(from_lines(&to_lines(&wrong)).unwrap_err().contains("prompt 7 has other numbers"));
    }

    #[test]
    fn scores_are_those_of_the_answers() {
        let all = [answers(1), answers(4)];
        let good =
            b"{\"number\": 4, \"scores\": [1, 2.5]}\n\n{\"number\": 1, \"scores\": [0, -1], \"more\": 1}\n";
        assert_eq!(scores_from_lines(good, &all).unwrap(), [[0.0, -1.0], [1.0, 2.5]]);
        for (wrong, told) in [
            ("{\"number\": 1, \"scores\": [0]}", "number 1 has 2 answers and 1 scores"),
            ("{\"number\": 1, \"scores\": [0, 1]}", "no scores of number 4"),
            ("{\"number\": 1, \"scores\": [0, NaN]}", "line 1: "),
            (
                "{\"number\": 1, \"scores\": [0, 1]}\n{\"number\": 1, \"scores\": [0, 1]}",
                "number 1 is there twice",
            ),
            (
                "{\"number\": 1, \"scores\": [0, 1]}\n{\"number\": 4, \"scores\": [0, 1]}\n{\"number\": 5, \"scores\": []}",
                "no number 5",
            ),
            ("\n{\"number\": 1}", "line 2: missing field `scores`"),
        ] {
            let error = scores_from_lines(wrong.as_bytes(), &all).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
    }
}
