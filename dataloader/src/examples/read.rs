//! Turns the rows of files into examples, on all cores, and counts what became of them.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;
use ulmus_chat::{Example, Form, IGNORE, Item, Prepared, Preprocessor, Reason, Row, Viewer};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::counted;

use super::files::{ExampleFile, ExampleFiles};
use crate::error::DataError;
use crate::rows::RowFile;

/// Rows that are prepared at once.
const AT_ONCE: usize = 1024;
/// Examples that are shown to people.
const SHOWN: usize = 3;

/// What became of a row.
#[derive(Debug)]
pub struct RowOutcome {
    /// The file.
    pub file: String,
    /// Number of the row in its file, from 0.
    pub row: u64,
    /// The row as it is trained on, or why it is left out.
    pub outcome: Result<Prepared, Reason>,
}

/// What a tuning stage learns from.
#[derive(Debug, Clone, PartialEq)]
pub struct Examples {
    /// One for each row that is kept, in the order of the files.
    pub items: Vec<Item>,
    /// What was read.
    pub report: ExamplesReport,
    /// The first examples, for people: their texts, with marks around what is learned.
    pub shown: String,
}

/// What was read for a tuning stage.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ExamplesReport {
    /// The files, in their order.
    pub files: Vec<FileReport>,
    /// Number of rows in all files.
    pub rows: u64,
    /// Number of rows that are trained on.
    pub kept: u64,
    /// The others.
    pub dropped: Vec<Dropped>,
    /// Tokens of the rows that are trained on. A prompt counts with each of its answers.
    pub tokens: u64,
    /// Those of them that are learned.
    pub learned_tokens: u64,
    /// Rows that write out the name of a special piece, which the model reads as that piece.
    pub with_special: u64,
}

/// What was read of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// The file.
    pub file: String,
    /// BLAKE3 of its bytes.
    pub hash: String,
    /// Number of its rows.
    pub rows: u64,
    /// What its columns hold.
    pub form: &'static str,
}

/// Rows that are left out for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// The reason.
    pub reason: &'static str,
    /// Number of the rows.
    pub rows: u64,
    /// The file of the first one.
    pub file: String,
    /// Number of the first one in its file, from 0.
    pub row: u64,
}

impl ExampleFiles {
    /// Prepares every row, in order, and gives it to `visit`. Blocks. What is given does not depend on the number of cores.
    ///
    /// # Errors
    /// When a file cannot be read, has no rows or not the columns that the stage's method learns from, or when a row is not
    /// like its columns say or is refused by the template.
    pub fn each_row(
        &self,
        preprocessor: &Preprocessor,
        mut visit: impl FnMut(RowOutcome),
    ) -> Result<Vec<FileReport>, DataError> {
        self.0.iter().map(|file| file.each_row(preprocessor, &mut visit)).collect()
    }

    /// Prepares every row and keeps the examples.
    ///
    /// # Errors
    /// As for [`Self::each_row`], and [`DataError::NoExamples`] if no row is left.
    pub fn read(&self, preprocessor: &Preprocessor, tokenizer: &Tokenizer) -> Result<Examples, DataError> {
        let mut items = Vec::new();
        let mut shown = Vec::new();
        let mut report = ExamplesReport::default();
        let mut dropped: BTreeMap<Reason, Dropped> = BTreeMap::new();
        let viewer = Viewer::new(tokenizer);
        report.files = self.each_row(preprocessor, |RowOutcome { file, row, outcome }| {
            report.rows += 1;
            match outcome {
                Ok(Prepared { item, has_special, .. }) => {
                    if items.len() < SHOWN {
                        shown.push(format!("row {row} of {file}: {}", viewer.show(&item)));
                    }
                    report.count(&item);
                    report.with_special += u64::from(has_special);
                    items.push(item);
                }
                Err(reason) => {
                    let first = Dropped { reason: reason.name(), rows: 0, file, row };
                    dropped.entry(reason).or_insert(first).rows += 1;
                }
            }
        })?;
        report.kept = items.len() as u64;
        report.dropped = dropped.into_values().collect();
        if items.is_empty() {
            return Err(DataError::NoExamples { files: self.places(), dropped: report.dropped_for_people() });
        }
        Ok(Examples { items, report, shown: shown.join("\n") })
    }
}

impl ExampleFile {
    fn each_row(
        &self,
        preprocessor: &Preprocessor,
        visit: &mut impl FnMut(RowOutcome),
    ) -> Result<FileReport, DataError> {
        let place = self.folder.place(&self.file.path);
        let RowFile { digest, mut rows } = RowFile::open(&self.folder, &self.file, self.format)?;
        let mut known: Option<Form> = None;
        let mut number = 0;
        loop {
            // What comes before a damaged row is still looked at, so that the first mistake is the one that is told.
            let mut read: Vec<Row> = Vec::new();
            let mut failed = None;
            for row in rows.by_ref().take(AT_ONCE) {
                match row {
                    Ok(row) => read.push(row),
                    Err(error) => failed = Some(error),
                }
            }
            let form = match (known, read.first()) {
                (Some(form), _) => form,
                (None, Some(first)) => {
                    let form = preprocessor.form(&first.columns().collect::<Vec<_>>());
                    form.map_err(|error| DataError::Rows { file: place.clone(), error })?
                }
                (None, None) => return Err(failed.unwrap_or(DataError::NoRows { file: place })),
            };
            known = Some(form);
            let is_end = read.len() < AT_ONCE;
            let prepare = |preprocessor: &mut Preprocessor, row: Row| preprocessor.prepare(form, &row);
            let prepared: Vec<_> = read.into_par_iter().map_init(|| preprocessor.clone(), prepare).collect();
            for outcome in prepared {
                let outcome =
                    outcome.map_err(|error| DataError::Row { file: place.clone(), row: number, error })?;
                visit(RowOutcome { file: place.clone(), row: number, outcome });
                number += 1;
            }
            if let Some(error) = failed {
                return Err(error);
            }
            if is_end {
                return Ok(FileReport {
                    file: place,
                    hash: digest.to_string(),
                    rows: number,
                    form: form.name(),
                });
            }
        }
    }
}

impl ExamplesReport {
    fn count(&mut self, item: &Item) {
        let sequences = match item {
            Item::Example(example) => vec![example.clone()],
            Item::Pair(pair) => pair.sequences().to_vec(),
            Item::Prompt(ids) => vec![Example { ids: ids.clone(), labels: vec![IGNORE; ids.len()] }],
        };
        for sequence in &sequences {
            self.tokens += sequence.ids.len() as u64;
            self.learned_tokens += sequence.labels.iter().filter(|label| **label != IGNORE).count() as u64;
        }
    }

    /// What was left out and why, in words; empty if nothing was.
    pub fn dropped_for_people(&self) -> String {
        let each = self.dropped.iter().map(|Dropped { reason, rows, file, row }| {
            format!("{} because {reason}, the first of them row {row} of {file}", counted(*rows, "row"))
        });
        each.collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use ulmus_chat::{Rules, SpecialNames, Template};
    use ulmus_plan::{DataConfig, ExamplesConfig, Method, TuneConfig};

    use super::*;
    use crate::examples::line::RowLine;
    use crate::store::Folder;
    use crate::store::tests::memory;

    fn tokenizer() -> Tokenizer {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny/tokenizer.json");
        Tokenizer::read(&std::fs::read(file).unwrap(), "tokenizer.json", None, None).unwrap()
    }

    fn preprocessor(method: Method) -> Preprocessor {
        let names = SpecialNames::from([("eos_token".to_owned(), "</s>".to_owned())]);
        let rules = Rules::from(&TuneConfig { method, ..TuneConfig::default() });
        Preprocessor::new(rules, Template::recipe(&names), &tokenizer(), true, None)
    }

    fn read(folder: &Folder, url: &str, method: Method) -> Result<Examples, DataError> {
        let config = ExamplesConfig { url: url.to_owned(), ..ExamplesConfig::default() };
        ExampleFiles::find(&[config], &DataConfig::default(), Some(folder))?
            .read(&preprocessor(method), &tokenizer())
    }

    #[test]
    fn rows_are_counted_by_what_became_of_them() {
        let folder = memory();
        let row = |chosen: &str| format!(r#"{{"prompt": "a", "chosen": "{chosen}", "rejected": " c"}}"#);
        let lines: Vec<String> =
            (0..2500).map(|at| row(if at % 500 == 7 { " c" } else { " b</s>" })).collect();
        folder.write("a.jsonl", lines.join("\n").into()).unwrap();
        let Examples { items, report, shown } = read(&folder, "run:a.jsonl", Method::Dpo).unwrap();
        assert_eq!((items.len(), report.rows, report.kept, report.with_special), (2495, 2500, 2495, 2495));
        let dropped =
            Dropped { reason: Reason::Identical.name(), rows: 5, file: "run:a.jsonl".to_owned(), row: 7 };
        assert_eq!(report.dropped, [dropped]);
        assert_eq!(
            report.dropped_for_people(),
            "5 rows because chosen and rejected are equal, the first of them row 7 of run:a.jsonl"
        );
        assert_eq!((report.files[0].rows, report.files[0].form), (2500, "preferences with prompts"));
        let Item::Pair(pair) = &items[0] else { panic!("preferences are pairs") };
        let learned = pair.chosen.ids.len() + pair.rejected.ids.len();
        assert_eq!(report.learned_tokens, 2495 * learned as u64);
        assert_eq!(report.tokens, 2495 * (learned + 2 * pair.prompt.len()) as u64);
        assert_eq!(shown.matches("row ").count(), 3);
        // What programs see of a row that is kept, and of one that is not.
        let config = ExamplesConfig { url: "run:a.jsonl".to_owned(), ..ExamplesConfig::default() };
        let mut lines = Vec::new();
        let files = ExampleFiles::find(&[config], &DataConfig::default(), Some(&folder)).unwrap();
        files.each_row(&preprocessor(Method::Dpo), |row| lines.push(RowLine::from(&row))).unwrap();
        let line = |row: usize| serde_json::to_value(&lines[row]).unwrap();
        let dropped = json!({"file": "run:a.jsonl", "row": 7, "kept": false, "reason": "chosen and rejected are equal"});
        assert_eq!(line(7), dropped);
        let (first, ids) = (line(0), |answer: &Example| json!(answer.ids));
        assert_eq!(
            (&first["kept"], &first["prompt"]["text"], &first["chosen"]["text"]),
            (&json!(true), &json!("a"), &json!(" b</s>"))
        );
        assert_eq!(first["prompt"]["labels"], json!([-100, -100]));
        assert_eq!(
            (&first["chosen"]["ids"], &first["chosen"]["labels"]),
            (&ids(&pair.chosen), &ids(&pair.chosen))
        );
        assert_eq!(first["rejected"]["ids"], ids(&pair.rejected));
        assert!(shown.contains("row 1 of run:a.jsonl: prompt, 2 tokens:\n<s>a\nchosen, "), "{shown}");
    }

    #[test]
    fn a_mistake_names_the_row_and_the_column_and_an_empty_file_is_one() {
        let folder = memory();
        for (name, text) in [
            (
                "wrong.jsonl",
                "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n\n{\"messages\": 1}\n",
            ),
            ("other.json", "[{\"question\": \"a\"}]"),
            ("empty.jsonl", "\n"),
            ("none.json", "[]"),
            ("useless.jsonl", "{\"text\": \" \"}\n{\"text\": \"\"}"),
            ("broken.jsonl", "{\"text\": \"a\"}\n{"),
            ("single.json", "{\n \"text\": \"a\"\n}"),
        ] {
            folder.write(name, text.into()).unwrap();
            let message = read(&folder, &format!("run:{name}"), Method::Sft).unwrap_err().to_string();
            let words = match name {
                "wrong.jsonl" => "run:wrong.jsonl, row 1 (from 0): column \"messages\": it is a number",
                "other.json" => "run:other.json: the columns [\"question\"] are of no known form",
                "useless.jsonl" => {
                    "2 rows because an answer is empty, the first of them row 0 of run:useless.jsonl"
                }
                "broken.jsonl" => "line 2",
                "single.json" => "a single JSON object",
                _ => "has no rows",
            };
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn a_data_set_gives_the_same_examples_in_any_format() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tune/data");
        let config = |split: &str| ExamplesConfig {
            url: golden.to_owned(),
            split: Some(split.to_owned()),
            ..ExamplesConfig::default()
        };
        for (split, rows, form) in [
            ("train", vec![9, 7], "preferences (UltraFeedback, cleaned)"),
            ("train_prefs", vec![8], "preferences (UltraFeedback, binarised)"),
        ] {
            let files = ExampleFiles::find(&[config(split)], &DataConfig::default(), None).unwrap();
            let read = files.read(&preprocessor(Method::Dpo), &tokenizer()).unwrap();
            assert_eq!(read.report.files.iter().map(|file| file.rows).collect::<Vec<_>>(), rows);
            assert!(read.report.files.iter().all(|file| file.form == form), "{:?}", read.report);

            // The same rows in other formats.
            let mut lines = String::new();
            for file in &files.0 {
                for row in RowFile::open(&file.folder, &file.file, file.format).unwrap().rows {
                    lines += &(serde_json::to_string(&row.unwrap()).unwrap() + "\n");
                }
            }
            let list = format!("[{}]", lines.trim_end().replace('\n', ",\n"));
            let folder = memory();
            folder.write("a.jsonl", lines.clone().into()).unwrap();
            folder.write("b.json", list.into()).unwrap();
            folder.write("c.jsonl.zst", zstd::encode_all(lines.as_bytes(), 1).unwrap()).unwrap();
            for name in ["a.jsonl", "b.json", "c.jsonl.zst"] {
                let other = super::tests::read(&folder, &format!("run:{name}"), Method::Dpo).unwrap();
                assert_eq!(other.items, read.items, "{name}");
            }
        }
    }
}
