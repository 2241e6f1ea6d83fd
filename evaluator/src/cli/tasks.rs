//! `evaluator tasks` and `evaluator fetch`, and how tasks are named.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use comfy_table::ContentArrangement;
use ulmus_evaluator::tasks::{Catalogue, Fetched, Revision, TaskRow, fetch};
use ulmus_process::{Failure, print};

use super::{failure, table};

/// The most columns of the list of tasks.
const WIDTH: u16 = 140;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum HarnessRev {
    /// lm-evaluation-harness 0.4.13.
    Current,
    /// Its commit of March 2024.
    Dc90fec,
}

impl HarnessRev {
    pub(super) fn revision(self) -> Revision {
        match self {
            Self::Current => Revision::Current,
            Self::Dc90fec => Revision::Dc90fec,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct Tasks {
    /// File with more tasks.
    #[arg(long, value_name = "FILE.toml")]
    include: Vec<PathBuf>,
    /// The revision of lm-evaluation-harness.
    #[arg(long, value_enum, default_value = "current")]
    harness_rev: HarnessRev,
}

impl Tasks {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let catalogue = Catalogue::including(&self.include, self.harness_rev.revision()).map_err(failure)?;
        let mut rows = table(&["task", "examples", "split", "metrics", "data set"]);
        rows.set_content_arrangement(ContentArrangement::Dynamic).set_width(WIDTH);
        for TaskRow { name, shots, split, metrics, source } in catalogue.rows() {
            rows.add_row([name, shots, split, metrics, source]);
        }
        print(&rows.to_string())
    }
}

#[derive(Debug, Args)]
pub(super) struct Fetch {
    /// Tasks, groups and patterns.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        required_unless_present = "suite",
        conflicts_with = "suite"
    )]
    tasks: Vec<String>,
    /// A published set of tasks.
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,
    /// File with more tasks.
    #[arg(long, value_name = "FILE.toml")]
    include: Vec<PathBuf>,
    /// Folder for the data sets.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
}

impl Fetch {
    #[expect(clippy::print_stderr, reason = "progress stands beside the results on standard output")]
    pub(super) fn run(&self) -> Result<(), Failure> {
        let catalogue = Catalogue::including(&self.include, Revision::Current).map_err(failure)?;
        let selection = match &self.suite {
            Some(suite) => catalogue.select_suite(suite),
            None => catalogue.select(&self.tasks),
        };
        let (mut files, mut bytes) = (0, 0);
        let mut on_file = |file: Fetched| {
            files += 1;
            bytes += file.bytes;
            let note = if file.was_there { " (was there)" } else { "" };
            eprintln!("{} {:.1} MB{note}", file.path, file.bytes as f64 / 1e6);
        };
        fetch(&selection.map_err(failure)?, &self.to, &mut on_file).map_err(failure)?;
        print(&format!(
            "{files} files of {:.1} MB in {}; name it with --data",
            bytes as f64 / 1e6,
            self.to.display()
        ))
    }
}
