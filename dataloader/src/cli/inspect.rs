//! `inspect`: what lies in a plan's sources, before anything is counted.

use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use ulmus_dataloader::{Inspection, SourceReport, inspect};
use ulmus_plan::DataConfig;
use ulmus_process::{Failure, print};

use super::run::Run;

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Plan whose sources are looked at.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Override a key of the plan.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let plan = super::load(&self.plan, &self.overrides)?;
        let run = Run::find_for(&plan, &plan.data)?;
        let not_made = run.as_ref().map(|run| run.not_made(&self.plan, &plan.data)).transpose()?.flatten();
        let folder = if not_made.is_none() { run.as_ref().and_then(Run::folder) } else { None };
        // How many lanes read a source depends on weights, which are not known yet.
        let data = DataConfig { lanes: 1, ..plan.data };
        let Inspection { reports, problems, kind } = inspect(&data, folder);
        if !reports.is_empty() && self.json {
            print(&serde_json::to_string(&reports).expect("reports can be written as JSON"))?;
        } else if !reports.is_empty() {
            print(&table(&reports).to_string())?;
        }
        match (kind, not_made) {
            (Some(kind), _) => Err(Failure::new(kind.into(), problems.to_string())),
            (None, Some(not_made)) if reports.is_empty() => Err(super::wrong(not_made)),
            (None, Some(not_made)) if !self.json => print(&not_made),
            _ => Ok(()),
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
