//! Makes the examples of a tuning stage, and keeps them.

use std::time::SystemTime;

use ulmus_chat::{Preprocessor, Rules};
use ulmus_dataloader::{ChatTemplate, ExampleFiles, ExamplesReport, read_forbidden, read_template};
use ulmus_plan::{ExamplesConfig, TuneConfig};
use ulmus_run::paths;
use ulmus_run::results::{Dropped, Examples, RowsOf};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{Digest, Job, JobName, StageName};

use crate::WorkerError;
use crate::examples::{Kept, to_bytes};
use crate::run::Run;

/// Makes the examples of the tuning stage that a job is for.
pub(super) fn make(run: &Run, job: &Job, say: &dyn Fn(String)) -> Result<Examples, WorkerError> {
    let tuning = run.plan.tune.iter().find_map(|config| {
        let name: StageName = config.name.parse().ok()?;
        (name.examples() == *job.stage()).then_some((name, config))
    });
    let (name, config) = tuning.ok_or_else(|| super::no_stage(job))?;
    let tokenizer = run.tokenizer()?;
    let ChatTemplate { template, adds_bos } = template(run, config, &tokenizer)?;
    let forbidden = config.decontaminate.as_deref().map(read_forbidden).transpose()?;
    let preprocessor = Preprocessor::new(Rules::from(config), template, &tokenizer, adds_bos, forbidden);
    let read = |sources: &[ExamplesConfig]| -> Result<_, WorkerError> {
        let files = ExampleFiles::find(sources, &run.plan.data, Some(&run.folder()))?;
        Ok(files.read(&preprocessor, &tokenizer)?)
    };
    let trained = read(&config.data)?;
    let evaluated = if config.eval.is_empty() { None } else { Some(read(&config.eval)?) };
    let kept = |items: Vec<ulmus_chat::Item>| -> Vec<u8> {
        let numbered = (1..).zip(items).map(|(row, item)| Kept { row, item });
        to_bytes(&numbered.collect::<Vec<_>>())
    };
    let bytes = kept(trained.items);
    let digest = Digest::of(&bytes);
    run.write(&paths::examples(name, false), bytes)?;
    let (mut of_evaluated, mut held_out) = (Digest::of(b""), 0);
    if let Some(evaluated) = evaluated {
        held_out = evaluated.report.kept;
        let bytes = kept(evaluated.items);
        of_evaluated = Digest::of(&bytes);
        run.write(&paths::examples(name, true), bytes)?;
        tell(name, "eval", &evaluated.report, say);
    }
    run.write(&paths::shown_examples(name), trained.shown.into_bytes())?;
    tell(name, "data", &trained.report, say);
    let ExamplesReport { files, rows, kept, dropped, .. } = trained.report;
    let updates = config.updates(kept);
    if !config.lrs.is_empty() && config.lrs.len() as u64 != updates {
        return Err(WorkerError::Plan(format!(
            "tune {name}: {kept} rows give {updates} updates, and lrs has {}; write as many, or leave it out for a schedule",
            config.lrs.len()
        )));
    }
    Ok(Examples {
        rows,
        kept,
        dropped: dropped
            .into_iter()
            .map(|each| Dropped {
                reason: each.reason.to_owned(),
                rows: each.rows,
                file: each.file,
                row: each.row,
            })
            .collect(),
        updates,
        held_out,
        files: files
            .into_iter()
            .map(|file| RowsOf {
                file: file.file,
                hash: file.hash,
                rows: file.rows,
                form: file.form.to_owned(),
            })
            .collect(),
        digest: Digest::of(format!("{digest} {of_evaluated}").as_bytes()),
    })
}

/// Tells what was read, and what of it is left out.
fn tell(name: StageName, which: &str, report: &ExamplesReport, say: &dyn Fn(String)) {
    for file in &report.files {
        say(format!("{name} {which}: {} has {} rows: {}", file.file, file.rows, file.form));
    }
    say(format!(
        "{name} {which}: {} of {} rows are kept, with {} tokens",
        report.kept, report.rows, report.tokens
    ));
    let dropped = report.dropped_for_people();
    if !dropped.is_empty() {
        say(format!("{name} {which}: left out: {dropped}"));
    }
}

/// The chat template of a tuning stage. One of the tokenizer's own is beside the tokenizer in the run folder.
fn template(run: &Run, config: &TuneConfig, tokenizer: &Tokenizer) -> Result<ChatTemplate, WorkerError> {
    let now = Some(SystemTime::UNIX_EPOCH);
    Ok(read_template(&config.template, &run.folder(), tokenizer, now)?)
}

/// The source of the chat template of a tuning stage.
pub(super) fn chat_template(
    run: &Run,
    config: &TuneConfig,
    tokenizer: &Tokenizer,
) -> Result<String, WorkerError> {
    Ok(template(run, config, tokenizer)?.template.source().to_owned())
}

/// What the examples of a tuning stage were found to be.
pub(super) fn made(run: &Run, tuning: StageName) -> Result<Examples, WorkerError> {
    let path = paths::result(&JobName::stored(tuning.examples().to_string()));
    serde_json::from_slice(&run.read_own(&path)?).map_err(|error| WorkerError::Damaged {
        file: path,
        reason: error.to_string(),
        act: "put back a copy of it, or give the stage another name",
    })
}
