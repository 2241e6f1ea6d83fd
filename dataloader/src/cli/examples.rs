//! `examples`: what a tuning stage learns from each row.

use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Args;
use ulmus_chat::Rules;
use ulmus_dataloader::{ExampleFiles, PlanTokenizer, RowLine, preprocessor};
use ulmus_process::{Failure, finish_output};

use super::run::Run;
use super::{failure, wrong};

/// Number of rows that are shown if not all are.
const SHOWN: usize = 3;

#[derive(Debug, Args)]
pub(crate) struct Examples {
    /// Plan with the stage.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Name of the tuning stage.
    #[arg(long, value_name = "NAME")]
    stage: String,
    /// Override a key of the plan.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Show all rows, also those that are left out, instead of the first three that are kept.
    #[arg(long)]
    all: bool,
}

impl Examples {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let plan = super::load_of_any_shape(&self.plan, &self.overrides)?;
        let config = plan.tune.iter().find(|config| config.name == self.stage).ok_or_else(|| {
            let names: Vec<&str> = plan.tune.iter().map(|config| config.name.as_str()).collect();
            wrong(format!("the plan has no tuning stage {:?}; use one of {names:?}", self.stage))
        })?;
        let run = Run::find(&plan)?;
        let found = PlanTokenizer::find(&plan, run.folder()).map_err(|error| failure(&error))?;
        let tokenizer = found.ok_or_else(|| {
            wrong(format!(
                "{} has no tokenizer yet; start the run first, or name a tokenizer with --set tokenizer.file=FILE",
                run.url()
            ))
        })?;
        let preprocessor =
            preprocessor(config, Rules::of_data(config), &tokenizer).map_err(|error| failure(&error))?;
        let files = ExampleFiles::find(&config.data, &plan.data, run.folder());
        let mut out = BufWriter::new(io::stdout().lock());
        let (mut kept, mut written) = (0, Ok(()));
        let read = files.and_then(|files| {
            files.each_row(&preprocessor, |outcome| {
                let line = RowLine::from(&outcome);
                kept += usize::from(line.kept);
                if self.all || line.kept {
                    let line = serde_json::to_writer(&mut out, &line).map_err(io::Error::from);
                    written = line.and_then(|()| out.write_all(b"\n"));
                }
                if written.is_err() || !self.all && kept == SHOWN {
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })
        });
        finish_output(written.and_then(|()| out.flush()))?;
        read.map_err(|error| failure(&error))
    }
}
