//! `--check sources`: opens all data that a plan reads, without starting a run.

use std::fmt::Write;

use ulmus_dataloader::{cargo_home, inspect};
use ulmus_plan::{Plan, TokenizerConfig};
use ulmus_process::Failure;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{ExitStatus, Problems};

/// The number of pieces of a tokenizer file; `None` if it cannot be read on this machine.
pub fn tokenizer_pieces(file: &str) -> Option<usize> {
    ulmus_tokenizer::count_pieces(&std::fs::read(file).ok()?)
}

/// Opens every source (files, schema and one row each) and the tokenizer.
///
/// # Errors
/// A list of everything that cannot be opened.
pub fn check_sources(plan: &Plan) -> Result<String, Failure> {
    let mut text = String::new();
    let mut problems = Problems::new();
    if let Some(prepare) = &plan.prepare {
        // The run's own shards do not exist yet, but the files from which they are made do.
        let home = cargo_home();
        match ulmus_dataloader::matching_files(prepare, &home) {
            Ok(0) => problems.add(
                "prepare.include",
                format!("{:?}", prepare.include),
                "a file of prepare.crates or prepare.paths must match",
                "name other files, or other patterns",
            ),
            Ok(files) => {
                writeln!(text, "prepare: {files} files match").expect("writing to a string cannot fail");
            }
            Err(error) => problems.add(
                "prepare.paths",
                format!("{:?}", prepare.paths),
                "it must exist and be readable",
                error.to_string(),
            ),
        }
    }
    let mut data = plan.data.clone();
    data.source.retain(|source| !source.url.starts_with("run:"));
    if data.source.len() < plan.data.source.len() {
        // The number of lanes of each source depends on all sources, some of which cannot be opened here.
        data.lanes = 1;
    }
    let inspection = inspect(&data, None);
    problems.extend(inspection.problems);
    for report in inspection.reports {
        writeln!(
            text,
            "source {}: {} files, {} bytes, {}; begins {:?}",
            report.name, report.files, report.bytes, report.schema, report.sample
        )
        .expect("writing to a string cannot fail");
    }
    if let Some(path) = &plan.tokenizer.file {
        let opened = std::fs::read(path).map_err(|error| error.to_string()).and_then(|bytes| {
            let TokenizerConfig { bos, eos, .. } = &plan.tokenizer;
            Tokenizer::read(&bytes, path, bos.as_deref(), eos.as_deref()).map_err(|error| error.to_string())
        });
        match opened {
            Ok(tokenizer) => {
                let pieces = tokenizer.pieces();
                writeln!(text, "tokenizer {path}: {pieces} pieces, {}", tokenizer.digest())
                    .expect("writing to a string cannot fail");
                problems.check(
                    pieces < plan.model.vocab_size,
                    "model.vocab_size",
                    plan.model.vocab_size,
                    format!("the tokenizer's {pieces} pieces and the pad id need {} rows", pieces + 1),
                    format!("set it to {}", (pieces + 1).next_multiple_of(128)),
                );
            }
            Err(error) => problems.add(
                "tokenizer.file",
                format!("{path:?}"),
                "it must be a tokenizer.model or tokenizer.json",
                format!("name another file ({error})"),
            ),
        }
    }
    if problems.is_empty() {
        Ok(text)
    } else {
        Err(Failure::new(ExitStatus::InvalidInput, format!("{}\n{problems}", plan.run.name)))
    }
}
