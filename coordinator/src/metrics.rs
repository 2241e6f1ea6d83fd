//! `metrics.csv`, with one row per step, and `sources.csv`, with one row per source and worker at each checkpoint; for
//! spreadsheets and notebooks.
//!
//! The first columns of the metrics depend only on the plan and are bit-identical between runs: of pretraining six, and of a
//! tuning stage all before the times. Numbers are the shortest decimals that read back as the same bits. The files are copies of data in `run.sqlite`: they are rewritten
//! at every start, and appended to during the run.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use ulmus_plan::Plan;
use ulmus_types::{Generation, StageName, Step, StepReport};

use crate::database::{MetricsRow, ReadingRow};

/// The columns of a `metrics.csv`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Columns {
    /// Of training on text.
    Text,
    /// Of training on examples, which measures these quantities.
    Examples(Vec<String>),
}

impl Columns {
    /// Those of a training stage.
    pub(crate) fn of(plan: &Plan, training: StageName) -> Self {
        plan.tuning(training).map_or(Self::Text, |tuning| Self::Examples(tuning.measures()))
    }

    fn header(&self) -> Vec<&str> {
        match self {
            Self::Text => [
                "step",
                "tokens",
                "loss",
                "z_loss",
                "grad_norm",
                "lr",
                "tokens_per_second",
                "data_wait_s",
                "comm_s",
                "held_out_loss",
                "seconds",
                "attempt",
            ]
            .to_vec(),
            Self::Examples(measures) => {
                let first = ["step", "examples", "tokens", "loss", "grad_norm", "lr"];
                let last = ["tokens_per_second", "data_wait_s", "comm_s", "seconds", "attempt"];
                first.into_iter().chain(measures.iter().map(String::as_str)).chain(last).collect()
            }
        }
    }

    /// The row of a step that trained on so many `tokens`, in the order of the header.
    fn record(&self, row: &MetricsRow, tokens: u64) -> Vec<String> {
        let MetricsRow { report, generation } = row;
        let seconds = report.elapsed.as_secs_f64();
        let value = |column: &str| match column {
            "step" => report.step.to_string(),
            "examples" => report.examples.to_string(),
            "tokens" => report.tokens.to_string(),
            "loss" => report.loss.to_string(),
            "z_loss" => report.z_loss.to_string(),
            "grad_norm" => report.grad_norm.to_string(),
            "lr" => report.lr.to_string(),
            "tokens_per_second" => format!("{:.1}", tokens as f64 / seconds.max(1e-9)),
            "data_wait_s" => format!("{:.6}", report.data_wait.as_secs_f64()),
            "comm_s" => format!("{:.6}", report.communication.as_secs_f64()),
            "held_out_loss" => report.held_out_loss.map(|loss| loss.to_string()).unwrap_or_default(),
            "seconds" => format!("{seconds:.6}"),
            "attempt" => generation.to_string(),
            measure => report.measures.get(measure).map(ToString::to_string).unwrap_or_default(),
        };
        self.header().into_iter().map(value).collect()
    }

    /// Reads what [`Self::record`] has written; `None` if it cannot be read.
    fn parse(&self, record: &csv::StringRecord) -> Option<MetricsRow> {
        let mut row = MetricsRow { report: StepReport::default(), generation: Generation::default() };
        let report = &mut row.report;
        for (column, text) in self.header().into_iter().enumerate().map(|(at, name)| (name, record.get(at))) {
            let text = text?;
            let number = || text.parse::<f64>().ok().filter(|number| number.is_finite());
            let count = || text.parse::<u64>().ok();
            let duration = || Duration::try_from_secs_f64(number()?).ok();
            match column {
                "step" => report.step = Step::new(count()?),
                "examples" => report.examples = count()?,
                "tokens" => report.tokens = count()?,
                "loss" => report.loss = number()?,
                "z_loss" => report.z_loss = number()?,
                "grad_norm" => report.grad_norm = number()?,
                "lr" => report.lr = number()?,
                "data_wait_s" => report.data_wait = duration()?,
                "comm_s" => report.communication = duration()?,
                "seconds" => report.elapsed = duration()?,
                "attempt" => row.generation = Generation::new(count()?),
                // It follows from others.
                "tokens_per_second" => {}
                _ if text.is_empty() => {}
                "held_out_loss" => report.held_out_loss = Some(number()?),
                measure => {
                    report.measures.insert(measure.to_owned(), number()?);
                }
            }
        }
        Some(row)
    }
}

/// Replaces a file by a new one. The old one stays until the new one is complete, since it may be the only copy.
fn replace<T>(path: &Path, write: impl FnOnce(File) -> io::Result<T>) -> io::Result<T> {
    let temporary = path.with_extension("csv.new");
    let written = write(File::create(&temporary)?)?;
    std::fs::rename(&temporary, path)?;
    Ok(written)
}

/// An open `metrics.csv`, and its last row.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    columns: Columns,
    csv: csv::Writer<File>,
    last: Option<MetricsRow>,
}

impl MetricsFile {
    /// Replaces the file by one with `rows`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn create(path: &Path, columns: Columns, rows: &[MetricsRow]) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        replace(path, |file| {
            let mut file = Self { columns, csv: csv::Writer::from_writer(file), last: None };
            file.csv.write_record(file.columns.header())?;
            for row in rows {
                file.append(row.clone())?;
            }
            file.csv.flush()?;
            Ok(file)
        })
    }

    /// Reads a file of a run whose database was lost. Returns the readable rows, and the number of unreadable ones.
    pub(crate) fn read(path: &Path, columns: &Columns) -> (Vec<MetricsRow>, usize) {
        let mut reader = csv::ReaderBuilder::new();
        let Ok(mut file) = reader.flexible(true).from_path(path) else { return (Vec::new(), 0) };
        let expected = columns.header();
        if !file.headers().is_ok_and(|header| header.iter().take(expected.len()).eq(expected)) {
            return (Vec::new(), file.records().count());
        }
        let rows: Vec<_> = file.records().map(|record| columns.parse(&record.ok()?)).collect();
        let unreadable = rows.iter().filter(|row| row.is_none()).count();
        (rows.into_iter().flatten().collect(), unreadable)
    }

    /// Appends a row, unless the file already has one for the step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn append(&mut self, row: MetricsRow) -> io::Result<()> {
        let report = &row.report;
        let (last_step, last_tokens) =
            self.last.as_ref().map_or((Step::default(), 0), |last| (last.report.step, last.report.tokens));
        if report.step <= last_step {
            return Ok(());
        }
        let tokens = report.tokens.saturating_sub(last_tokens);
        self.csv.write_record(self.columns.record(&row, tokens))?;
        self.csv.flush()?;
        self.last = Some(row);
        Ok(())
    }
}

/// An open `sources.csv`.
#[derive(Debug)]
pub(crate) struct SourcesFile(csv::Writer<File>);

impl SourcesFile {
    /// Replaces the file by one with `rows`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn create(path: &Path, rows: &[ReadingRow]) -> io::Result<Self> {
        replace(path, |file| {
            let mut file = Self(csv::Writer::from_writer(file));
            let header = columns(&ReadingRow::default()).map(|(name, _)| name);
            file.0.write_record(header)?;
            for row in rows {
                file.append(row)?;
            }
            file.0.flush()?;
            Ok(file)
        })
    }

    /// Appends a row.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn append(&mut self, row: &ReadingRow) -> io::Result<()> {
        self.0.write_record(columns(row).map(|(_, value)| value))?;
        self.0.flush()
    }
}

/// Names and values of a row's columns. Rates are averages since the worker opened its data.
fn columns(row: &ReadingRow) -> [(&'static str, String); 19] {
    let ReadingRow { step, worker, reading } = row;
    let seconds = reading.elapsed.as_secs_f64();
    let rate = |count: u64| count as f64 / seconds.max(1e-9);
    [
        ("step", step.to_string()),
        ("worker", worker.clone()),
        ("source", reading.source.clone()),
        ("epochs", format!("{:.4}", reading.epochs)),
        ("tokens", reading.tokens.to_string()),
        ("tokens_per_second", format!("{:.1}", rate(reading.tokens))),
        ("text_mb_per_second", format!("{:.3}", rate(reading.text_bytes) / 1e6)),
        ("wait_s", format!("{:.6}", reading.waited.as_secs_f64())),
        ("streams", reading.streams.to_string()),
        ("streams_ready", reading.ready.to_string()),
        ("documents", reading.documents.to_string()),
        ("short_characters", reading.short_characters.to_string()),
        ("short_tokens", reading.short_tokens.to_string()),
        ("held_out", reading.held_out.to_string()),
        ("bad_units", reading.bad_units.to_string()),
        ("fetched_bytes", reading.fetched_bytes.to_string()),
        ("cached_bytes", reading.cached_bytes.to_string()),
        ("failed_requests", reading.failed_requests.to_string()),
        ("seconds", format!("{seconds:.3}")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64) -> MetricsRow {
        let report = StepReport {
            step: Step::new(step),
            tokens: 100 * step,
            loss: 8.5 / step as f64,
            z_loss: 0.1,
            grad_norm: 1.25,
            lr: 3e-4,
            held_out_loss: step.is_multiple_of(2).then_some(2.5),
            elapsed: Duration::from_millis(1500 * step),
            data_wait: Duration::from_micros(7),
            ..StepReport::default()
        };
        MetricsRow { report, generation: Generation::new(3) }
    }

    fn written(rows: &[MetricsRow]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.csv");
        drop(MetricsFile::create(&path, Columns::Text, rows).unwrap());
        (folder, path)
    }

    #[test]
    fn rows_are_read_as_they_were_written() {
        let rows = [row(1), row(2), row(3)];
        let (_folder, path) = written(&rows);
        assert_eq!(MetricsFile::read(&path, &Columns::Text), (rows.to_vec(), 0));
    }

    #[test]
    fn rows_of_examples_have_the_measures_of_their_stage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tune/dpo/metrics.csv");
        let columns = Columns::Examples(["rewards/margins", "eval_loss"].map(str::to_owned).to_vec());
        let report = |step, measures: &[(&str, f64)]| StepReport {
            step: Step::new(step),
            examples: 4 * step,
            tokens: 70 * step,
            loss: 0.5,
            grad_norm: 2.0,
            lr: 1e-5,
            measures: measures.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
            elapsed: Duration::from_secs(2),
            ..StepReport::default()
        };
        let rows = [
            report(1, &[("rewards/margins", 0.25)]),
            report(2, &[("rewards/margins", 0.1 + 0.2), ("eval_loss", 0.4)]),
        ]
        .map(|report| MetricsRow { report, generation: Generation::new(7) });
        drop(MetricsFile::create(&path, columns.clone(), &rows).unwrap());
        assert_eq!(MetricsFile::read(&path, &columns), (rows.to_vec(), 0));
        let text = std::fs::read_to_string(&path).unwrap();
        let expected = "step,examples,tokens,loss,grad_norm,lr,rewards/margins,eval_loss,tokens_per_second,data_wait_s,comm_s,seconds,attempt\n\
                        1,4,70,0.5,2,0.00001,0.25,,35.0,0.000000,0.000000,2.000000,7\n";
        assert!(text.starts_with(expected), "{text}");
    }

    #[test]
    fn rows_that_cannot_be_read_are_counted_and_cost_no_other_row() {
        let (_folder, path) = written(&[row(1), row(2), row(3)]);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let second = lines[2];
        for bad in [
            second.replacen("2.5", "NaN", 1),
            second.replacen("200", "-200", 1),
            second.rsplit_once(',').unwrap().0.to_owned(),
            "\u{0}".to_owned(),
        ] {
            std::fs::write(&path, [lines[0], lines[1], &bad, lines[3], ""].join("\n")).unwrap();
            assert_eq!(MetricsFile::read(&path, &Columns::Text), (vec![row(1), row(3)], 1), "{bad:?}");
        }
        // A header of something else: nothing can be told of its rows.
        std::fs::write(&path, ["step,loss", lines[1], lines[2], ""].join("\n")).unwrap();
        assert_eq!(MetricsFile::read(&path, &Columns::Text), (Vec::new(), 2));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(MetricsFile::read(&path, &Columns::Text), (Vec::new(), 0));
    }
}
