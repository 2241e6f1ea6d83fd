//! Makes the examples of a tuning stage, and keeps them.

use std::collections::BTreeMap;

use ulmus_chat::{Item, Rules};
use ulmus_dataloader::{ExampleFiles, ExamplesReport, preprocessor, stage_template};
use ulmus_evaluator::EvaluatorError;
use ulmus_model::AdapterShape;
use ulmus_plan::{ExamplesConfig, TuneConfig};
use ulmus_process::with_causes;
use ulmus_run::paths::{self, ExampleSet};
use ulmus_run::results::{Dropped, Examples, RowsOf};
use ulmus_types::{Digest, ErrorKind, Job, Of, StageName, counted};

use super::base::{Base, read_adapter};
use super::subject::must_be;
use crate::WorkerError;
use crate::examples::{Kept, digest_of, to_bytes};
use crate::run::Run;

/// Makes the examples of the tuning stage that a job is for.
pub(super) fn make(run: &Run, job: &Job, say: &dyn Fn(String)) -> Result<Examples, WorkerError> {
    let (tuning, config) = tuning_of(run, job, StageName::examples)?;
    let elsewhere = elsewhere(run, config).map_err(|error| of_stage(tuning, error))?;
    let found = run.found_tokenizer()?;
    let read = |sources: &[ExamplesConfig], rules: Rules| -> Result<_, WorkerError> {
        let preprocessor = preprocessor(config, rules, &found)?;
        let files = ExampleFiles::find(sources, &run.plan.data, Some(&run.folder()))?;
        Ok(files.read(&preprocessor, &found.tokenizer)?)
    };
    let learned = ExamplesConfig::at(config.rso.as_ref().and_then(|rso| rso.reward_head.as_deref()));
    let trained = read(&config.data, Rules::of_data(config))?;
    let mut files = vec![(ExampleSet::Data, numbered(trained.items))];
    let (mut held_out, mut read_too) = (0, Vec::new());
    for (set, name, sources) in
        [(ExampleSet::Eval, "eval", &config.eval), (ExampleSet::Reward, "reward_head", &learned)]
    {
        if sources.is_empty() {
            continue;
        }
        let others = read(sources, Rules::from(config))?;
        tell(tuning, name, &others.report, say);
        if set == ExampleSet::Eval {
            held_out = others.report.kept;
        } else {
            read_too.extend(others.report.files);
        }
        files.push((set, numbered(others.items)));
    }
    let digest = digest_of(&files);
    for (set, bytes) in files {
        run.write(&paths::examples(tuning, set), bytes)?;
    }
    run.write(&paths::shown_examples(tuning), trained.shown.into_bytes())?;
    tell(tuning, "data", &trained.report, say);
    let ExamplesReport { files, rows, kept, dropped, .. } = trained.report;
    let updates = if config.rso.is_some() { 0 } else { updates(tuning, config, kept)? };
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
            .chain(read_too)
            .map(|file| RowsOf {
                file: file.file,
                hash: file.hash,
                rows: file.rows,
                form: file.form.to_owned(),
            })
            .collect(),
        digest,
        elsewhere,
    })
}

/// Hashes of the weights from elsewhere with which a stage begins, by key. They are read before anything trains, so that a mistake
/// is told early.
fn elsewhere(run: &Run, config: &TuneConfig) -> Result<BTreeMap<String, Digest>, WorkerError> {
    let mut found = BTreeMap::new();
    let mut keep = |key: &str, weights: Vec<f32>| {
        found.insert(key.to_owned(), Digest::of(bytemuck::cast_slice(&weights)));
    };
    if let Of::Model(place) = &config.of {
        let base = Base::read(run, place)?;
        must_be(&run.plan.model, &base.model.config, place)?;
        must_have_tokenizer(run, &base, place)?;
        keep(TuneConfig::OF, base.model.weights);
    }
    if let Some(adapter) = &config.adapter
        && let Some(from) = &adapter.from
    {
        let shape = run.plan.shape_of(&config.of);
        keep(TuneConfig::ADAPTER_FROM, read_adapter(from, &AdapterShape::new(&shape, adapter)?, &shape)?);
    }
    Ok(found)
}

/// Refuses a model that comes with another tokenizer than the run's. The files may differ: what counts is what texts become.
fn must_have_tokenizer(run: &Run, base: &Base, place: &str) -> Result<(), WorkerError> {
    let own = match base.tokenizer(None) {
        Ok((own, _)) => own,
        // One without a tokenizer is taken at its word.
        Err(WorkerError::Evaluation(EvaluatorError::NoTokenizer { .. })) => return Ok(()),
        Err(error) => return Err(error),
    };
    let tokenizer = run.tokenizer()?;
    let every_piece: String =
        (0..tokenizer.pieces() as u32).map(|id| tokenizer.decode(&[id]) + "\n").collect();
    let is_same = own.pieces() == tokenizer.pieces()
        && (own.bos(), own.eos()) == (tokenizer.bos(), tokenizer.eos())
        && own.encode(&every_piece) == tokenizer.encode(&every_piece);
    if is_same {
        return Ok(());
    }
    Err(WorkerError::Plan(format!(
        "the model at {place} has another tokenizer than the run; name it as [base] model of a plan of its own"
    )))
}

fn of_stage(tuning: StageName, error: WorkerError) -> WorkerError {
    match error.kind() {
        ErrorKind::InvalidInput => WorkerError::Plan(format!("tune {tuning}: {}", with_causes(&error))),
        _ => error,
    }
}

/// The tuning stage of which a job does this part.
pub(super) fn tuning_of<'a>(
    run: &'a Run,
    job: &Job,
    part: impl Fn(&StageName) -> StageName,
) -> Result<(StageName, &'a TuneConfig), WorkerError> {
    let found = run.plan.tune.iter().find_map(|config| {
        let name: StageName = config.name.parse().ok()?;
        (part(&name) == *job.stage()).then_some((name, config))
    });
    found.ok_or_else(|| super::no_stage(job))
}

/// The content of a file of examples.
pub(super) fn numbered(items: Vec<Item>) -> Vec<u8> {
    let kept: Vec<Kept> = (1..).zip(items).map(|(row, item)| Kept { row, item }).collect();
    to_bytes(&kept)
}

/// The number of updates that so many examples give.
pub(super) fn updates(tuning: StageName, config: &TuneConfig, kept: u64) -> Result<u64, WorkerError> {
    match wrong_rates(config, kept) {
        Some((_, problem)) => Err(WorkerError::Plan(format!("tune {tuning}: {problem}"))),
        None => Ok(config.updates(kept)),
    }
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

/// What is wrong with the learning rates for as many updates as so many rows give, after the key that it is about.
pub(crate) fn wrong_rates(config: &TuneConfig, kept: u64) -> Option<(&'static str, String)> {
    let (updates, rates) = (config.updates(kept), config.lrs.len());
    let given = format!("{} give {}", counted(kept, "row"), counted(updates, "update"));
    if rates > 0 {
        let is_wrong = rates as u64 != updates;
        let advice = "write as many, or leave it out for a schedule";
        return is_wrong.then(|| ("lrs", format!("{given}, and lrs has {rates}; {advice}")));
    }
    if let Some(warmup) = config.warmup.filter(|warmup| *warmup > updates) {
        return Some((
            "warmup",
            format!("{given}, and the warm-up is {warmup} long; set it to 0, or lower batch"),
        ));
    }
    let is_still = config.max_lr > 0.0 && (0..updates).all(|step| config.learning_rate(step, updates) == 0.0);
    is_still.then(|| {
        (
            "warmup_ratio",
            format!("{given}, whose learning rate is 0: all is warm-up; set warmup = 0, or lower batch"),
        )
    })
}

/// The source of the chat template of a tuning stage. One of the tokenizer's own is beside the tokenizer in the run folder.
pub(super) fn chat_template(run: &Run, config: &TuneConfig) -> Result<String, WorkerError> {
    Ok(stage_template(config, Some(&run.found_tokenizer()?))?.template.source().to_owned())
}
