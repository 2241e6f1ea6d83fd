//! `inspect`: what lies in a plan's sources, before anything is counted.

use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use ulmus_dataloader::{Inspection, SourceReport, inspect};
use ulmus_process::{Failure, print};

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Plan whose sources are looked at.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Another value for a key of the plan.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let mut data = super::load(&self.plan, &self.overrides)?.data;
        // What a run prepares for itself is not there before it.
        data.source.retain(|source| !source.url.starts_with("run:"));
        // How many lanes read a source depends on weights, which are not known yet.
        data.lanes = 1;
        let Inspection { reports, problems, kind } = inspect(&data, None);
        if !reports.is_empty() && self.json {
            print(&serde_json::to_string(&reports).expect("reports can be written as JSON"))?;
        } else if !reports.is_empty() {
            print(&table(&reports).to_string())?;
        }
        match kind {
            None => Ok(()),
            Some(kind) => Err(Failure::new(kind.into(), problems.to_string())),
        }
    }
}

fn table(reports: &[SourceReport]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header([
        "source",
        "files",
        "stored bytes",
        "rows of the first",
        "columns",
        "begins",
    ]);
    for SourceReport { name, files, bytes, rows, schema, sample } in reports {
        table.add_row([
            name.clone(),
            files.to_string(),
            bytes.to_string(),
            rows.map_or_else(|| "-".to_owned(), |rows| rows.to_string()),
            schema.clone(),
            format!("{sample:?}"),
        ]);
    }
    for column in table.column_iter_mut().skip(1).take(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
