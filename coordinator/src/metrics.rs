//! `metrics.csv`, with one row per step, and `sources.csv`, with one row per source and worker at each checkpoint; for
//! spreadsheets and notebooks.
//!
//! The first six columns of the metrics depend only on the plan and are bit-identical between runs; numbers are the
//! shortest decimals that read back as the same bits. The files are copies of data in `run.sqlite`: they are rewritten
//! at every start, and appended to during the run.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use ulmus_types::{Generation, Step, StepReport};

use crate::database::{MetricsRow, ReadingRow};

const HEADER: [&str; 12] = [
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
];

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
    csv: csv::Writer<File>,
    last: Option<MetricsRow>,
}

impl MetricsFile {
    /// Replaces the file by one with `rows`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn create(path: &Path, rows: &[MetricsRow]) -> io::Result<Self> {
        replace(path, |file| {
            let mut file = Self { csv: csv::Writer::from_writer(file), last: None };
            file.csv.write_record(HEADER)?;
            for row in rows {
                file.append(row.clone())?;
            }
            file.csv.flush()?;
            Ok(file)
        })
    }

    /// Reads a file of a run whose database was lost. Returns the readable rows, and the number of unreadable ones.
    pub(crate) fn read(path: &Path) -> (Vec<MetricsRow>, usize) {
        let mut reader = csv::ReaderBuilder::new();
        let Ok(mut file) = reader.flexible(true).from_path(path) else { return (Vec::new(), 0) };
        if !file.headers().is_ok_and(|header| header.iter().take(HEADER.len()).eq(HEADER)) {
            return (Vec::new(), file.records().count());
        }
        let rows: Vec<_> = file.records().map(|record| parse(&record.ok()?)).collect();
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
        let seconds = report.elapsed.as_secs_f64();
        self.csv.write_record([
            report.step.to_string(),
            report.tokens.to_string(),
            report.loss.to_string(),
            report.z_loss.to_string(),
            report.grad_norm.to_string(),
            report.lr.to_string(),
            format!("{:.1}", (report.tokens - last_tokens) as f64 / seconds.max(1e-9)),
            format!("{:.6}", report.data_wait.as_secs_f64()),
            format!("{:.6}", report.communication.as_secs_f64()),
            report.held_out_loss.map(|loss| loss.to_string()).unwrap_or_default(),
            format!("{seconds:.6}"),
            row.generation.to_string(),
        ])?;
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

fn parse(record: &csv::StringRecord) -> Option<MetricsRow> {
    let number = |column: usize| record.get(column)?.parse::<f64>().ok().filter(|number| number.is_finite());
    let count = |column: usize| record.get(column)?.parse::<u64>().ok();
    let seconds = |column: usize| Duration::try_from_secs_f64(number(column)?).ok();
    let held_out_loss = match record.get(9)? {
        "" => None,
        _ => Some(number(9)?),
    };
    Some(MetricsRow {
        report: StepReport {
            step: Step::new(count(0)?),
            tokens: count(1)?,
            loss: number(2)?,
            z_loss: number(3)?,
            grad_norm: number(4)?,
            lr: number(5)?,
            held_out_loss,
            elapsed: seconds(10)?,
            data_wait: seconds(7)?,
            communication: seconds(8)?,
        },
        generation: Generation::new(count(11)?),
    })
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
            communication: Duration::ZERO,
        };
        MetricsRow { report, generation: Generation::new(3) }
    }

    fn written(rows: &[MetricsRow]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.csv");
        drop(MetricsFile::create(&path, rows).unwrap());
        (folder, path)
    }

    #[test]
    fn rows_are_read_as_they_were_written() {
        let rows = [row(1), row(2), row(3)];
        let (_folder, path) = written(&rows);
        assert_eq!(MetricsFile::read(&path), (rows.to_vec(), 0));
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
            assert_eq!(MetricsFile::read(&path), (vec![row(1), row(3)], 1), "{bad:?}");
        }
        // A header of something else: nothing can be told of its rows.
        std::fs::write(&path, ["step,loss", lines[1], lines[2], ""].join("\n")).unwrap();
        assert_eq!(MetricsFile::read(&path), (Vec::new(), 2));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(MetricsFile::read(&path), (Vec::new(), 0));
    }
}
