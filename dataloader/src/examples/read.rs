//! Turns the rows of files into examples, on all cores, and counts what became of them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use rayon::prelude::*;
use serde::Serialize;
use ulmus_chat::{Example, Form, IGNORE, Item, Prepare, Prepared, Preprocessor, Reason, Row, Viewer};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::counted;

use super::files::{ExampleFile, ExampleFiles};
use crate::error::DataError;
use crate::rows::RowFile;

/// Rows that are prepared at once.
const AT_ONCE: usize = 1024;
/// Rows at the beginning of a file that are enough to see what it holds.
const GLANCED_AT: usize = AT_ONCE;
/// Examples that are shown to people.
const SHOWN: usize = 3;

/// What became of a row.
#[derive(Debug)]
pub struct RowOutcome<T = Prepared> {
    /// The file.
    pub file: String,
    /// Number of the row in its file, from 0.
    pub row: u64,
    /// The row as it is trained on, or why it is left out.
    pub outcome: Result<T, Reason>,
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

/// What the first rows of some files hold, which is all of them if the files are small.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Glance {
    /// The files, in their order.
    pub files: Vec<FileGlance>,
    /// Number of rows that were looked at.
    pub rows: u64,
    /// Number of those that are trained on.
    pub kept: u64,
    /// The others.
    pub dropped: Vec<Dropped>,
    /// The first examples, for people.
    pub shown: String,
}

/// What the first rows of a file hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileGlance {
    /// The file.
    pub file: String,
    /// Its format.
    pub format: &'static str,
    /// What its columns hold.
    pub form: &'static str,
    /// Number of rows that were looked at.
    pub rows: u64,
    /// Number of all of its rows, if that is known without reading them.
    pub count: Option<u64>,
}

/// Counts what becomes of rows, and shows the first that are kept.
#[derive(Default)]
struct Tally {
    rows: u64,
    kept: u64,
    dropped: BTreeMap<Reason, Dropped>,
    shown: Vec<String>,
}

impl Tally {
    fn add<T>(&mut self, row: &RowOutcome<T>, show: impl FnOnce(&T) -> String) {
        let RowOutcome { file, row, outcome } = row;
        self.rows += 1;
        match outcome {
            Ok(prepared) => {
                self.kept += 1;
                if self.shown.len() < SHOWN {
                    self.shown.push(format!("row {row} of {file}: {}", show(prepared)));
                }
            }
            Err(reason) => {
                let first = || Dropped { reason: reason.name(), rows: 0, file: file.clone(), row: *row };
                self.dropped.entry(*reason).or_insert_with(first).rows += 1;
            }
        }
    }

    fn dropped(&self) -> Vec<Dropped> {
        self.dropped.values().cloned().collect()
    }
}

impl ExampleFiles {
    /// Prepares rows, in order, and gives each to `visit` until that breaks; no more is read than they take. Blocks. What is given
    /// does not depend on the number of cores.
    ///
    /// # Errors
    /// When a file cannot be read, has no rows or not the columns that the stage's method learns from, or when a row is not
    /// like its columns say or is refused by the template.
    pub fn each_row<P: Prepare>(
        &self,
        preparation: &P,
        mut visit: impl FnMut(RowOutcome<P::Prepared>) -> ControlFlow<()>,
    ) -> Result<(), DataError> {
        for file in &self.0 {
            let mut rows = RowFile::begin(&file.folder, &file.file, file.format)?.rows;
            if file.each_row(&mut rows, preparation, &mut visit)?.is_broken {
                break;
            }
        }
        Ok(())
    }

    /// Prepares the first rows of every file. `show` shows a row to a person.
    ///
    /// # Errors
    /// As for [`Self::each_row`], and [`DataError::NoExamples`] if no row is left of small files.
    pub fn glance<P: Prepare>(
        &self,
        preparation: &P,
        show: impl Fn(&P::Prepared) -> String,
    ) -> Result<Glance, DataError> {
        let (mut tally, mut files) = (Tally::default(), Vec::new());
        for file in &self.0 {
            let RowFile { count, mut rows } = RowFile::begin(&file.folder, &file.file, file.format)?;
            let seen = file.each_row(&mut rows.by_ref().take(GLANCED_AT), preparation, &mut |row| {
                tally.add(&row, &show);
                ControlFlow::Continue(())
            })?;
            let is_all = (seen.rows as usize) < GLANCED_AT || rows.next().is_none();
            let count = count.or_else(|| is_all.then_some(seen.rows));
            let (format, form) = (file.format.name(), seen.form.name());
            files.push(FileGlance { file: file.place(), format, form, rows: seen.rows, count });
        }
        let dropped = tally.dropped();
        let Tally { rows, kept, shown, .. } = tally;
        let glance = Glance { files, rows, kept, dropped, shown: shown.join("\n") };
        if kept == 0 && glance.is_whole() {
            return Err(DataError::NoExamples { files: self.places(), dropped: glance.dropped_for_people() });
        }
        Ok(glance)
    }

    /// Prepares every row and keeps the examples.
    ///
    /// # Errors
    /// As for [`Self::each_row`], and [`DataError::NoExamples`] if no row is left.
    pub fn read(&self, preprocessor: &Preprocessor, tokenizer: &Tokenizer) -> Result<Examples, DataError> {
        let (mut items, mut tally) = (Vec::new(), Tally::default());
        let mut report = ExamplesReport::default();
        let viewer = Viewer::new(tokenizer);
        for file in &self.0 {
            let (RowFile { mut rows, .. }, digest) = RowFile::open(&file.folder, &file.file, file.format)?;
            let seen = file.each_row(&mut rows, preprocessor, &mut |row| {
                tally.add(&row, |prepared: &Prepared| viewer.show(&prepared.item));
                if let Ok(Prepared { item, has_special, .. }) = row.outcome {
                    report.count(&item);
                    report.with_special += u64::from(has_special);
                    items.push(item);
                }
                ControlFlow::Continue(())
            })?;
            let (form, hash) = (seen.form.name(), digest.to_string());
            report.files.push(FileReport { file: file.place(), hash, rows: seen.rows, form });
        }
        (report.rows, report.kept, report.dropped) = (tally.rows, tally.kept, tally.dropped());
        if items.is_empty() {
            return Err(DataError::NoExamples { files: self.places(), dropped: report.dropped_for_people() });
        }
        Ok(Examples { items, report, shown: tally.shown.join("\n") })
    }
}

/// What was seen of a file.
struct Seen {
    form: Form,
    rows: u64,
    /// Whether no more rows were wanted.
    is_broken: bool,
}

impl ExampleFile {
    fn place(&self) -> String {
        self.folder.place(&self.file.path)
    }

    /// Prepares some of the file's rows, the first of which has the number 0.
    fn each_row<P: Prepare>(
        &self,
        rows: &mut dyn Iterator<Item = Result<Row, DataError>>,
        preparation: &P,
        visit: &mut dyn FnMut(RowOutcome<P::Prepared>) -> ControlFlow<()>,
    ) -> Result<Seen, DataError> {
        let place = self.place();
        let mut known: Option<Form> = None;
        let mut number = 0;
        loop {
            // What comes before a damaged row is still looked at, so that the first mistake is the one that is told.
            let mut read: Vec<Row> = Vec::new();
            let mut failed = None;
            for row in (&mut *rows).take(AT_ONCE) {
                match row {
                    Ok(row) => read.push(row),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            let form = match (known, read.first()) {
                (Some(form), _) => form,
                (None, Some(first)) => {
                    let form = preparation.form(&first.columns().collect::<Vec<_>>());
                    form.map_err(|error| DataError::Rows { file: place.clone(), error })?
                }
                (None, None) => return Err(failed.unwrap_or(DataError::NoRows { file: place })),
            };
            known = Some(form);
            let is_end = read.len() < AT_ONCE;
            let prepare = |preparation: &mut P, row: Row| preparation.prepare(form, &row);
            let prepared: Vec<_> = read.into_par_iter().map_init(|| preparation.clone(), prepare).collect();
            for outcome in prepared {
                let outcome =
                    outcome.map_err(|error| DataError::Row { file: place.clone(), row: number, error })?;
                let row = RowOutcome { file: place.clone(), row: number, outcome };
                number += 1;
                if visit(row).is_break() {
                    return Ok(Seen { form, rows: number, is_broken: true });
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
            if is_end {
                return Ok(Seen { form, rows: number, is_broken: false });
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
        in_words(&self.dropped)
    }
}

impl Glance {
    /// What is left out and why, in words; empty if nothing is.
    pub fn dropped_for_people(&self) -> String {
        in_words(&self.dropped)
    }

    /// Whether all rows were looked at.
    pub fn is_whole(&self) -> bool {
        self.files.iter().all(|file| file.count == Some(file.rows))
    }
}

fn in_words(dropped: &[Dropped]) -> String {
    let each = dropped.iter().map(|Dropped { reason, rows, file, row }| {
        format!("{} because {reason}, the first of them row {row} of {file}", counted(*rows, "row"))
    });
    each.collect::<Vec<_>>().join("; ")
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
        files
            .each_row(&preprocessor(Method::Dpo), |row| {
                lines.push(RowLine::from(&row));
                ControlFlow::Continue(())
            })
            .unwrap();
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
                for row in RowFile::begin(&file.folder, &file.file, file.format).unwrap().rows {
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
