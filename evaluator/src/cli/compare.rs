//! `evaluator compare`.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use clap::Args;
use ulmus_evaluator::tasks::{Estimate, Results, compare};
use ulmus_process::{Failure, print};
use ulmus_types::ExitStatus;

use super::table;

#[derive(Debug, Args)]
pub(super) struct Compare {
    /// Results files of `run`, or of lm-evaluation-harness; the first one is what the others are compared with.
    #[arg(value_name = "FILE.json", num_args = 2.., required = true)]
    files: Vec<PathBuf>,
}

impl Compare {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let invalid = |message: String| Failure::new(ExitStatus::InvalidInput, message);
        let read = |path: &PathBuf| {
            let file = fs::read(path)
                .map_err(|error| invalid(format!("cannot read {}: {error}", path.display())))?;
            Results::read(&path.display().to_string(), &file).map_err(invalid)
        };
        let files = self.files.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let names: Vec<&str> = files.iter().map(Results::name).collect();
        let mut header = vec!["task", "metric"];
        header.extend(&names);
        header.extend(names[1..].iter().map(|_| "difference"));
        let mut rows = table(&header);
        let (mut exceeding, mut missing) = (0, 0);
        let mut unlike = BTreeSet::new();
        for row in compare(&files) {
            missing += row.estimates.iter().filter(|estimate| estimate.is_none()).count();
            let mut cells = vec![row.task.clone(), row.metric.clone()];
            cells.extend(row.estimates.iter().map(|estimate| estimate.map_or_else(|| "-".to_owned(), cell)));
            for index in 1..files.len() {
                let difference = row.difference(index);
                let exceeds = row.unlike[index].is_none()
                    && difference.is_some_and(|Estimate { value, stderr }| {
                        stderr.is_some_and(|stderr| value.abs() > stderr)
                    });
                exceeding += usize::from(exceeds);
                let mark = match &row.unlike[index] {
                    Some(why) if difference.is_some() => {
                        unlike.insert(why.clone());
                        " ≠"
                    }
                    _ if exceeds => " *",
                    _ => "",
                };
                let text = difference
                    .map_or_else(|| "-".to_owned(), |difference| format!("{:+.4}", difference.value));
                cells.push(format!("{text}{mark}"));
            }
            rows.add_row(cells);
        }
        print(&rows.to_string())?;
        print(&format!("* exceeds the standard error of the difference: {exceeding}"))?;
        if missing > 0 {
            print(&format!("- is not in the file: {missing}"))?;
        }
        if !unlike.is_empty() {
            let unlike: Vec<String> = unlike.into_iter().collect();
            print(&format!(
                "≠ the files were asked different questions, so the difference says nothing about the models:\n{}",
                unlike.join("\n")
            ))?;
        }
        Ok(())
    }
}

fn cell(Estimate { value, stderr }: Estimate) -> String {
    stderr.map_or_else(|| format!("{value:.4}"), |stderr| format!("{value:.4} ± {stderr:.4}"))
}
