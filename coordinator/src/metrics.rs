//! `metrics.csv`: one row per step, for spreadsheets and notebooks.
//!
//! The first six columns depend on nothing but the plan and are equal bit for bit between runs; numbers are the
//! shortest decimals that read back as the same bits. The file is a copy of what `run.sqlite` holds: it is
//! written anew at every start, and appended to while the run goes on.

use std::fs::File;
use std::io;
use std::path::Path;

use ulmus_types::Step;

use crate::store::MetricsRow;

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

/// The file, and the last row that it has.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    csv: csv::Writer<File>,
    last: Option<MetricsRow>,
}

impl MetricsFile {
    /// Writes the file anew with `rows`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn create(path: &Path, rows: &[MetricsRow]) -> io::Result<Self> {
        let mut file = Self { csv: csv::Writer::from_path(path)?, last: None };
        file.csv.write_record(HEADER)?;
        for row in rows {
            file.append(row.clone())?;
        }
        file.csv.flush()?;
        Ok(file)
    }

    /// Adds a row, unless the step has one already.
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
