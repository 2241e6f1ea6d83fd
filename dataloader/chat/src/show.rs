//! An example as a person reads it, with marks around what is learned. What is shown is what the token ids say, or the texts
//! before they become ids.

use std::collections::BTreeMap;
use std::ops::Range;

use ulmus_tokenizer::Tokenizer;
use ulmus_types::{IGNORE, counted};

use crate::example::Example;
use crate::preprocess::Item;
use crate::texts::Texts;

/// Stand before and after what is learned.
const MARKS: [char; 2] = ['\u{27e6}', '\u{27e7}'];

/// Shows examples, with the names of special pieces.
#[derive(Debug)]
pub struct Viewer<'a> {
    tokenizer: &'a Tokenizer,
    special: BTreeMap<u32, String>,
}

impl<'a> Viewer<'a> {
    /// A viewer for the ids of a tokenizer.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        let special = tokenizer.special_pieces().into_iter().map(|(name, id)| (id, name)).collect();
        Self { tokenizer, special }
    }

    /// An example, for a terminal without colours: how many tokens it has, and its text.
    pub fn show(&self, item: &Item) -> String {
        let [open, close] = MARKS;
        let learned = |example: &Example| {
            let learned = example.labels.iter().filter(|label| **label != IGNORE).count();
            format!("{learned} learned (between {open} and {close})")
        };
        match item {
            Item::Example(example) => {
                let tokens = counted(example.ids.len() as u64, "token");
                format!("{tokens}, {}:\n{}\n", learned(example), self.text(example))
            }
            Item::Prompt(ids) => self.prompt(ids),
            Item::Pair(pair) => {
                let answer = |name: &str, answer: &Example| {
                    let tokens = counted(answer.ids.len() as u64, "token");
                    format!("{name}, {tokens}, {}:\n{}\n", learned(answer), self.text(answer))
                };
                [
                    self.prompt(&pair.prompt),
                    answer("chosen", &pair.chosen),
                    answer("rejected", &pair.rejected),
                ]
                .concat()
            }
        }
    }

    fn prompt(&self, ids: &[u32]) -> String {
        let prompt = Example { ids: ids.to_vec(), labels: vec![IGNORE; ids.len()] };
        format!("prompt, {}:\n{}\n", counted(ids.len() as u64, "token"), self.text(&prompt))
    }

    /// The text of an example, with marks.
    fn text(&self, example: &Example) -> String {
        let mut text = String::new();
        let mut is_open = false;
        let mut mark = |text: &mut String, is_learned: bool| {
            if is_learned != is_open {
                text.push(MARKS[usize::from(is_open)]);
                is_open = is_learned;
            }
        };
        let is_learned = |at: usize| example.labels[at] != IGNORE;
        let mut at = 0;
        // What is between special pieces is decoded as a whole, since a character may take several tokens.
        for run in
            example.ids.chunk_by(|one, other| [one, other].iter().all(|id| !self.special.contains_key(id)))
        {
            if let Some(name) = self.special.get(&run[0]) {
                mark(&mut text, is_learned(at));
                text.push_str(name);
            } else {
                let whole = self.tokenizer.decode(run);
                let mut shown = 0;
                for piece in 0..run.len() {
                    let is_border = piece == 0 || is_learned(at + piece) != is_learned(at + piece - 1);
                    if is_border {
                        let until = shared(&self.tokenizer.decode(&run[..piece]), &whole).max(shown);
                        text.extend(whole[shown..until].chars().map(visible));
                        shown = until;
                        mark(&mut text, is_learned(at + piece));
                    }
                }
                text.extend(whole[shown..].chars().map(visible));
            }
            at += run.len();
        }
        mark(&mut text, false);
        text
    }
}

/// Texts, for a terminal without colours, where no tokenizer can say their ids. Without `mask_prompt` all of one text is learned.
pub fn show_texts(texts: &Texts, mask_prompt: bool) -> String {
    let [open, close] = MARKS;
    let learned = format!("learned between {open} and {close}");
    match texts {
        Texts::One { text, answers } if answers.is_empty() => format!("prompt:\n{}\n", marked(text, &[])),
        Texts::One { text, .. } if !mask_prompt => {
            format!("{learned}:\n{}\n", marked(text, std::slice::from_ref(&(0..text.len()))))
        }
        Texts::One { text, answers } => format!("{learned}:\n{}\n", marked(text, answers)),
        Texts::Two { .. } => {
            let [prompt, answers @ ..] = texts.parts();
            let [chosen, rejected] =
                answers.map(|answer| marked(answer, std::slice::from_ref(&(0..answer.len()))));
            format!(
                "prompt:\n{}\nchosen, {learned}:\n{chosen}\nrejected, {learned}:\n{rejected}\n",
                marked(prompt, &[])
            )
        }
    }
}

/// A text with marks around some parts of it, which are ranges of bytes, in order.
fn marked(text: &str, parts: &[Range<usize>]) -> String {
    let [open, close] = MARKS;
    let mut shown = String::new();
    let mut at = 0;
    for part in parts.iter().filter(|part| !part.is_empty()) {
        shown.extend(text[at..part.start].chars().map(visible));
        shown.push(open);
        shown.extend(text[part.clone()].chars().map(visible));
        shown.push(close);
        at = part.end;
    }
    shown.extend(text[at..].chars().map(visible));
    shown
}

/// A character, or a picture of one that would command a terminal.
fn visible(character: char) -> char {
    match character {
        '\n' | '\t' => character,
        '\u{7f}' => '\u{2421}',
        '\0'..='\u{1f}' => {
            char::from_u32(0x2400 + u32::from(character)).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
        _ if character.is_control() => char::REPLACEMENT_CHARACTER,
        _ => character,
    }
}

/// Number of bytes that two texts begin with and share, at the border of a character.
fn shared(one: &str, other: &str) -> usize {
    let equal = one.chars().zip(other.chars()).take_while(|(one, other)| one == other);
    equal.map(|(character, _)| character.len_utf8()).sum()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::example::Pair;

    fn tokenizer() -> Tokenizer {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/tokenizer.model");
        Tokenizer::read(&std::fs::read(file).unwrap(), "tokenizer.model", None, None).unwrap()
    }

    #[test]
    fn texts_are_shown_without_a_tokenizer() {
        let one = Texts::One { text: "ask\u{1b} say bye".to_owned(), answers: vec![5..8, 8..8, 9..12] };
        assert_eq!(
            show_texts(&one, true),
            "learned between \u{27e6} and \u{27e7}:\nask\u{241b} \u{27e6}say\u{27e7} \u{27e6}bye\u{27e7}\n"
        );
        assert!(show_texts(&one, false).ends_with(":\n\u{27e6}ask\u{241b} say bye\u{27e7}\n"));
        let prompt = Texts::One { text: "ask".to_owned(), answers: Vec::new() };
        assert_eq!([true, false].map(|masks| show_texts(&prompt, masks)), ["prompt:\nask\n"; 2]);
        let [prompt, chosen, rejected] = ["a", "a b", "a c"].map(str::to_owned);
        let shown = show_texts(&Texts::Two { prompt, chosen, rejected }, true);
        assert!(shown.starts_with("prompt:\na\nchosen, learned between"), "{shown}");
        assert!(
            shown.contains(":\n\u{27e6} b\u{27e7}\nrejected, ") && shown.ends_with("\u{27e6} c\u{27e7}\n"),
            "{shown}"
        );
    }

    #[test]
    fn a_person_sees_what_is_learned() {
        let tokenizer = tokenizer();
        let mut encoder = tokenizer.special_encoder();
        let mut ids = Vec::new();
        encoder.encode("<s>Ask \u{1f642}\u{1b}?</s>Say\u{1f642}</s>\n", &mut ids);
        let answer = ids.iter().position(|id| *id == 2).unwrap() + 1;
        let example = Example::learned_from(ids.clone(), answer);
        let shown = Viewer::new(&tokenizer).show(&Item::Example(example));
        let counts =
            format!("{} tokens, {} learned (between \u{27e6} and \u{27e7})", ids.len(), ids.len() - answer);
        assert_eq!(
            shown,
            format!("{counts}:\n<s>Ask \u{1f642}\u{241b}?</s>\u{27e6}Say\u{1f642}</s>\n\u{27e7}\n")
        );

        // A mark may stand within what is decoded as a whole.
        let word = tokenizer.encode("the heart");
        let border = Example::learned_from(word.clone(), 1);
        let text = Viewer::new(&tokenizer).text(&border);
        assert_eq!(text.replace(MARKS, ""), "the heart");
        assert!(!text.starts_with(MARKS[0]) && text.ends_with(MARKS[1]), "{text}");

        let pair = Pair { prompt: word.clone(), chosen: border.clone(), rejected: Example::default() };
        let shown = Viewer::new(&tokenizer).show(&Item::Pair(pair));
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[1], "the heart");
        assert!(
            lines[0].starts_with("prompt, ")
                && lines[2].starts_with("chosen, ")
                && lines[4].starts_with("rejected, 0 tokens")
        );
    }
}
