//! Measures a model on tasks.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;
use ulmus_backend::{Backend, WeightFormat};
use ulmus_evaluator::EvaluatorError;
use ulmus_evaluator::tasks::{
    Batching, Catalogue, DataSets, Evaluation, Journal, Limit, Progress, Revision, Selection, Settings,
    average, description, kind_of_device, results_file,
};
use ulmus_plan::{EvaluationConfig, NEXT_TEXT};
use ulmus_run::paths;
use ulmus_run::results::{Answers, Measured, Tasks};
use ulmus_types::{Job, Of};

use super::evaluate::{HeldOut, held_out};
use super::{base, keep, next_text, subject};
use crate::WorkerError;
use crate::run::Run;

/// The seed of the examples, as in the harness.
const SEED: u64 = 1234;

/// The tasks that there are for a stage.
fn catalogue(config: &EvaluationConfig) -> Result<Catalogue, EvaluatorError> {
    let include: Vec<PathBuf> = config.include.iter().map(PathBuf::from).collect();
    Catalogue::including(&include, Revision::Current)
}

/// The tasks that a stage asks for.
fn selection(config: &EvaluationConfig, catalogue: &Catalogue) -> Result<Selection, EvaluatorError> {
    match &config.suite {
        Some(suite) => catalogue.select_suite(suite),
        None => catalogue.select(&config.tasks),
    }
}

fn settings(config: &EvaluationConfig, context: usize, add_bos: bool) -> Settings {
    let limit = |limit: f64| if limit < 1.0 { Limit::Share(limit) } else { Limit::Rows(limit as usize) };
    Settings {
        shots: config.shots.map(|shots| shots as usize),
        fewshot_split: None,
        limit: config.limit.map(limit),
        context,
        add_bos,
        revision: Revision::Current,
        seed: SEED,
    }
}

/// A key of a stage that is wrong, its value, and why.
pub(crate) type WrongKey = (&'static str, String, String);

/// Makes sure that there are the tasks of a stage.
pub(crate) fn check_names(config: &EvaluationConfig) -> Result<Selection, WrongKey> {
    let catalogue =
        catalogue(config).map_err(|error| ("include", format!("{:?}", config.include), error.to_string()))?;
    let (key, value) = match &config.suite {
        Some(suite) => ("suite", format!("{suite:?}")),
        None => ("tasks", format!("{:?}", config.tasks)),
    };
    selection(config, &catalogue).map_err(|error| (key, value, error.to_string()))
}

/// Looks for the tasks of a stage, their rows, and the files that it names.
pub(crate) fn check(config: &EvaluationConfig) -> Result<(), WrongKey> {
    let selection = check_names(config)?;
    for of in &config.of {
        if let Of::Model(place) = of
            && !base::may_be_there(place)
        {
            let fix =
                "there is no config.json; name a folder with a model, such as a run's export, or a .pt file of CoreNet"
                    .to_owned();
            return Err(("of", format!("{place:?}"), fix));
        }
    }
    if let Some(place) = config.tokenizer.as_deref().filter(|place| !Path::new(place).exists()) {
        return Err((
            "tokenizer",
            format!("{place:?}"),
            "it is not there; name a tokenizer file or its folder".to_owned(),
        ));
    }
    let look = || -> Result<(), WorkerError> {
        let mut data = DataSets::open(&config.data)?;
        // The run makes these rows when it is trained.
        data.add_rows(next_text::SOURCE, Vec::new());
        Ok(selection.read_rows(&data, &settings(config, 0, true))?)
    };
    look().map_err(|error| ("data", format!("{:?}", config.data), error.to_string()))
}

/// The held-out text of the run, or why there is not enough of it.
fn next_text(run: &Run, say: &dyn Fn(String)) -> Result<Result<HeldOut, String>, WorkerError> {
    Ok(held_out(run, say, false)?.and_then(|held_out| {
        if next_text::rows(&held_out.texts).is_empty() {
            Err(format!("{NEXT_TEXT} needs four held-out texts of at least {} bytes", next_text::LEAST))
        } else {
            Ok(held_out)
        }
    }))
}

fn cannot_write(path: &Path, error: std::io::Error) -> WorkerError {
    EvaluatorError::Write { path: path.to_owned(), error }.into()
}

/// Measures a model, or answers a part of what is asked of it. Returns the result as JSON.
pub(super) fn evaluate<B: Backend>(
    run: &Run,
    say: &dyn Fn(String),
    job: &Job,
    backend: &B,
) -> Result<String, WorkerError> {
    let config = run.plan.evaluation.iter().find(|config| config.name == job.stage().as_str());
    let config = config.ok_or_else(|| super::no_stage(job))?;
    let selection = selection(config, &catalogue(config)?)?;
    let mut data = DataSets::open(&config.data)?;
    let mut left_out = Vec::new();
    if selection.has(NEXT_TEXT) {
        match next_text(run, say)? {
            Ok(held_out) => {
                data.add_rows(next_text::SOURCE, next_text::rows(&held_out.texts));
                left_out = held_out.left_out;
            }
            Err(why) if config.tasks != [NEXT_TEXT] => {
                return Err(WorkerError::Plan(format!(
                    "{why}; leave out {NEXT_TEXT}, or hold out more text"
                )));
            }
            // The job that puts the parts together says so.
            Err(_) if job.part().is_some() => return keep(run, job, &Answers { answers: 0 }),
            Err(skipped) => return keep(run, job, &Measured::<Tasks>::Skipped { skipped }),
        }
    }
    let tokenizer = config.tokenizer.as_deref().map(Path::new);
    let ready = subject::ready(run, job, backend, WeightFormat::F32, tokenizer)?;
    let settings = settings(config, ready.loaded.model.config().max_context_length, ready.adds_bos);
    let evaluation = Evaluation {
        model: &ready.loaded.model,
        tokenizer: &ready.tokenizer,
        data: &data,
        settings: &settings,
        batching: Batching::default(),
    };
    let mut on_progress = |progress: Progress<'_>| {
        if let Progress::Begun { task, notes, .. } = progress {
            for note in notes {
                say(format!("{}: {task}: {note}", job.name()));
            }
        }
        Ok(())
    };
    let (device, format) = (kind_of_device(&ready.loaded.model), ready.loaded.model.format().to_string());
    if let Some(part) = job.part() {
        let folder =
            tempfile::tempdir().map_err(|error| cannot_write(Path::new("a temporary folder"), error))?;
        let path = folder.path().join("journal");
        let mut journal = Journal::open(&path, ready.loaded.digest, &device, &format, false)?;
        let answers = evaluation.answer_part(&selection, part, &mut journal, &mut on_progress)?;
        let lines = std::fs::read(&path).map_err(|error| cannot_write(&path, error))?;
        run.write(&paths::answers(&job.name()), lines)?;
        return keep(run, job, &Answers { answers });
    }
    let mut journal = Journal::default();
    for file in run.wait(run.store.list(&format!("{}/{}", paths::RESULTS, job.name())))? {
        let is_part = Path::new(&file.path).extension().is_some_and(|ending| ending == "jsonl");
        let lines = if is_part { run.read(&file.path)? } else { continue };
        // What a part has not answered, or another kind of device, is asked now.
        if let Err(problem) =
            journal.read(&String::from_utf8_lossy(&lines), ready.loaded.digest, &device, &format)
        {
            say(format!("{}: {} is not used: {problem}", job.name(), file.path));
        }
    }
    let outcomes = evaluation.run(&selection, &mut journal, &mut on_progress)?;
    let described = description(&ready.place, &ready.loaded, &ready.tokenizer, &config.data, &settings);
    let mut file = results_file(&outcomes, described);
    if let Some(mean) = average(&selection, &outcomes) {
        file["average"] = json!(mean);
    }
    let result = Tasks::deserialize(file).expect("the file has the form of its results");
    keep(run, job, &Measured::Done { result, left_out })
}
