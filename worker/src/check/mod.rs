//! `--check sources`: opens all data that a plan reads, without starting a run.

mod tuning;

use ulmus_dataloader::{DataError, Inspection, SourceReport, cargo_home, check_prepared, inspect};
use ulmus_plan::{LEAST_UNIT, Plan, PrepareConfig, TokenizerConfig, TrainConfig};
use ulmus_process::with_causes;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{ErrorKind, Problems, counted};

use crate::WorkerError;
use crate::jobs::evaluation::{self, WrongKey};
use crate::jobs::prepare::{more_rows, rows_needed};

/// The number of pieces of a tokenizer file; `None` if it cannot be read on this machine.
pub fn tokenizer_pieces(file: &str) -> Option<usize> {
    ulmus_tokenizer::count_pieces(&std::fs::read(file).ok()?)
}

/// What a plan reads, as far as it is there before the run.
#[derive(Debug)]
pub struct SourceCheck {
    /// What was found, for a person.
    pub found: String,
    /// What the run would be refused for.
    pub problems: Problems,
    /// What can be done about the first problem.
    pub kind: Option<ErrorKind>,
}

/// Makes sure that there are the tasks that a plan measures models on.
pub fn check_tasks(plan: &Plan) -> Problems {
    let mut problems = Problems::new();
    for (index, stage) in plan.evaluation.iter().enumerate() {
        if let Err(wrong) = evaluation::check_names(stage) {
            add(&mut problems, index, wrong);
        }
    }
    problems
}

fn add(problems: &mut Problems, index: usize, (key, value, fix): WrongKey) {
    problems.add(format!("evaluation.{index}.{key}"), value, "what the evaluation reads must be there", fix);
}

/// What is found as a plan is checked.
#[derive(Default)]
struct Findings {
    lines: Vec<String>,
    problems: Problems,
    kind: Option<ErrorKind>,
}

impl Findings {
    fn say(&mut self, line: String) {
        self.lines.push(line);
    }

    /// Adds what the run would be refused for: a key, its value, the rule that it breaks, and why.
    fn refuse(&mut self, key: String, value: &str, rule: &str, error: impl Into<WorkerError>) {
        let error = error.into();
        self.problems.add(key, format!("{value:?}"), rule, with_causes(&error));
        self.kind = self.kind.or(Some(error.kind()));
    }
}

/// Opens everything that a plan reads: sources (files, schema and one row each), the text to prepare, the tokenizer, and what its
/// tuning stages learn from. Blocks.
pub fn check_sources(plan: &Plan) -> SourceCheck {
    let mut findings = Findings::default();
    if let Some(prepare) = &plan.prepare {
        findings.lines.extend(check_prepare(prepare, plan, &mut findings.problems));
    }
    findings.kind = (!findings.problems.is_empty()).then_some(ErrorKind::InvalidInput);
    let Inspection { reports, problems: of_sources, kind } = inspect(&plan.data, None);
    findings.kind = findings.kind.or(kind);
    findings.problems.extend(of_sources);
    findings.lines.extend(reports.into_iter().map(
        |SourceReport { name, files, bytes, schema, sample, .. }| {
            let (files, bytes) = (counted(files, "file"), counted(bytes, "byte"));
            format!("source {name}: {files}, {bytes}, {schema}; begins {sample:?}")
        },
    ));
    if let Some(path) = &plan.tokenizer.file {
        findings.lines.extend(check_tokenizer(path, plan, &mut findings.problems));
    }
    tuning::check(plan, &mut findings);
    for (index, stage) in plan.evaluation.iter().enumerate() {
        match evaluation::check(stage) {
            Ok(()) => findings.lines.push(format!("evaluation {}: every task has its rows", stage.name)),
            Err(wrong) => add(&mut findings.problems, index, wrong),
        }
    }
    let Findings { lines, problems, kind } = findings;
    let kind = kind.or_else(|| (!problems.is_empty()).then_some(ErrorKind::InvalidInput));
    SourceCheck { found: lines.join("\n"), problems, kind }
}

/// What can be done where text makes too few units for all lanes: settings that the plan may have.
fn fewer_lanes(most: usize, plan: &Plan, smaller_unit_helps: bool) -> String {
    let TrainConfig { sequences, micro_batch, .. } = plan.train;
    let most = (most as u64).max(1);
    let lanes = (1..=most).rev().find(|lanes| sequences.is_multiple_of(*lanes)).unwrap_or(1);
    let per_lane = sequences / lanes;
    // All sequences of an update are such a micro-batch.
    let fits = |size: &u64| *size >= micro_batch && sequences.is_multiple_of(*size);
    let whole = (1..=lanes).map(|lanes| lanes * per_lane).find(fits).unwrap_or(sequences);
    let mut settings = vec![format!("data.lanes to {lanes}")];
    if whole != micro_batch {
        settings.push(format!("train.micro_batch to {whole}"));
    }
    let workers = plan.cluster.min_workers.min(sequences / whole);
    if workers < plan.cluster.min_workers {
        settings.push(format!("cluster.min_workers to {workers}"));
    }
    let smaller = if smaller_unit_helps { format!(" or data.unit to {LEAST_UNIT},") } else { String::new() };
    format!("set {},{smaller} or name more text", settings.join(", "))
}

/// The run's own shards do not exist yet, but the files from which they are made do.
fn check_prepare(prepare: &PrepareConfig, plan: &Plan, problems: &mut Problems) -> Option<String> {
    let data = &plan.data;
    let home = cargo_home();
    let read = || {
        let files = ulmus_dataloader::matching_files(prepare, &home)?;
        let units = match files {
            0 => 0,
            _ => ulmus_dataloader::prepared_units(prepare, &home, data.unit.get())?,
        };
        Ok::<_, DataError>((files, units))
    };
    match read() {
        Ok((0, _)) => problems.add(
            "prepare.include",
            format!("{:?}", prepare.include),
            "a file of prepare.crates or prepare.paths must match",
            "name other files, or other patterns",
        ),
        Ok((files, units)) => {
            if let Err(error) = check_prepared(data, units) {
                let fix = match &error {
                    DataError::FewUnits { most, .. } => {
                        let least = ulmus_dataloader::prepared_units(prepare, &home, LEAST_UNIT.get());
                        let helps = least.is_ok_and(|units| check_prepared(data, units).is_ok());
                        fewer_lanes(*most, plan, helps)
                    }
                    error => error.to_string(),
                };
                let rule =
                    format!("the prepared text makes {}, and every lane needs one", counted(units, "unit"));
                problems.add("data.lanes", data.lanes, rule, fix);
            }
            let (files, units) = (counted(files, "file"), counted(units, "unit"));
            let verb = if files.starts_with("1 ") { "matches" } else { "match" };
            return Some(format!("prepare: {files} {verb}, whose text makes {units}"));
        }
        Err(error) => problems.add(
            "prepare.paths",
            format!("{:?}", prepare.paths),
            "it must exist and be readable",
            error.to_string(),
        ),
    }
    None
}

fn check_tokenizer(path: &str, plan: &Plan, problems: &mut Problems) -> Option<String> {
    let opened = std::fs::read(path).map_err(|error| error.to_string()).and_then(|bytes| {
        let TokenizerConfig { bos, eos, .. } = &plan.tokenizer;
        Tokenizer::read(&bytes, path, bos.as_deref(), eos.as_deref()).map_err(|error| error.to_string())
    });
    match opened {
        Ok(tokenizer) => {
            let pieces = tokenizer.pieces();
            let needed = rows_needed(plan, pieces);
            problems.check(
                needed <= plan.model.vocab_size,
                "model.vocab_size",
                plan.model.vocab_size,
                format!("the tokenizer has {pieces} pieces and needs {needed} rows"),
                more_rows(plan, pieces),
            );
            Some(format!("tokenizer {path}: {pieces} pieces, {}", tokenizer.digest()))
        }
        Err(error) => {
            problems.add(
                "tokenizer.file",
                format!("{path:?}"),
                "it must be a tokenizer.model or tokenizer.json",
                format!("name another file ({error})"),
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_on_lanes_is_what_a_plan_may_have() {
        let mut plan = Plan::default();
        for sequences in 1..=24_u64 {
            for (micro_batch, most, workers) in [(1, 1, 1), (2, 3, 4), (5, 7, 2), (12, 3, 1), (24, 30, 24)] {
                plan.train.sequences = sequences;
                plan.train.micro_batch = micro_batch.min(sequences);
                plan.cluster.min_workers = workers;
                let advice = fewer_lanes(most, &plan, false);
                let number = |key: &str, otherwise: u64| {
                    let found = advice.split_once(key).map(|(_, rest)| rest.trim_start());
                    found.map_or(otherwise, |rest| rest[..rest.find(',').unwrap()].parse().unwrap())
                };
                let lanes = number("data.lanes to", 0);
                let size = number("train.micro_batch to", plan.train.micro_batch);
                let least = number("cluster.min_workers to", workers);
                assert!(lanes >= 1 && lanes <= most as u64 && sequences.is_multiple_of(lanes), "{advice}");
                let whole = size.is_multiple_of(sequences / lanes) && sequences.is_multiple_of(size);
                assert!(whole && least <= sequences / size, "{sequences} {micro_batch}: {advice}");
            }
        }
    }
}
