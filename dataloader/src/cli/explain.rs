//! `explain`: the exact documents of any sequence of any step.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use object_store::local::LocalFileSystem;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use ulmus_dataloader::{
    Corpus, Cursors, DataError, Explanation, Folder, Loader, Manifest, Sources, Tokenizer,
};
use ulmus_plan::{Plan, TokenizerConfig};
use ulmus_rt::{Failure, print};
use ulmus_types::{BadUnit, ErrorKind, ExitStatus, LaneId};

/// Characters of a document that are shown at each of its ends.
const SHOWN: usize = 60;

/// Where a run keeps its manifest.
const MANIFEST: &str = "data/manifest.json";

#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// Plan of the run. If its run folder is there, the files, tokenizer and checkpoints of the run are used.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Another value for a key of the plan, such as run.name=other.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// The update, as metrics.csv numbers them from 1.
    #[arg(long, value_name = "N")]
    step: u64,
    /// The sequence of that update, from 0 to train.sequences - 1.
    #[arg(long, value_name = "K")]
    sequence: u64,
    /// Print JSON, with whole texts.
    #[arg(long)]
    json: bool,
}

/// What is read of a checkpoint.
#[derive(Debug, Deserialize)]
struct State {
    step: u64,
    cursors: Vec<i64>,
    #[serde(default)]
    quarantine: BTreeSet<BadUnit>,
}

impl Explain {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let plan = super::load_weighted(&self.plan, &self.overrides)?;
        let (step, sequence) = (self.step, self.sequence);
        if !(1..=plan.train.iterations).contains(&step) || sequence >= plan.train.sequences {
            return Err(wrong(format!(
                "the plan has steps 1 to {} of sequences 0 to {}; correct --step {step} or --sequence {sequence}",
                plan.train.iterations,
                plan.train.sequences - 1
            )));
        }
        let run = Path::new(plan.store.url.trim_start_matches("file://")).join(plan.run.name.to_string());
        let (before, after) = states(&run, step)?;
        let recorded: Option<Vec<(BadUnit, String)>> = read_json(&run.join("quarantine.json"))?;
        let now = recorded.unwrap_or_default().into_iter().map(|(unit, _)| unit).collect();
        let then = before.as_ref().map(|state| state.quarantine.clone()).unwrap_or_default();
        if after.map_or(now, |state| state.quarantine) != then {
            return Err(wrong(format!(
                "between the checkpoints around step {step} units were left out (see quarantine.json), so what it read is not known for sure; ask for another step"
            )));
        }
        let corpus = Arc::new(corpus(&plan, &run, &then)?);
        let per_lane = plan.train.sequences / plan.data.lanes;
        let lane = LaneId::new((sequence / per_lane) as u32);
        let (done, cursors) = match before {
            Some(State { step, cursors, .. }) => (step, Cursors::from_words(cursors)),
            None => (0, corpus.start()),
        };
        let failure = |error: DataError| super::failure(&error);
        let mut loader =
            Loader::open(Arc::clone(&corpus), plan.sequence_length(), &[lane], &cursors).map_err(failure)?;
        let before = (step - 1 - done) * per_lane + sequence % per_lane;
        let style = "passing sequences of the lane {wide_bar} {pos}/{len}, {eta} left";
        let style = ProgressStyle::with_template(style).expect("the template is right");
        let bar = ProgressBar::new(before).with_style(style);
        for _ in 0..before {
            loader.pass(lane).map_err(failure)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let origin = loader.pass(lane).map_err(failure)?;
        let explanation = corpus.explain(origin, plan.sequence_length()).map_err(failure)?;
        if self.json {
            return print(&serde_json::to_string(&explanation).expect("it can be written as JSON"));
        }
        print(&page(step, sequence, lane, &explanation))
    }
}

/// The data of the run, if its folder is there, or of the plan as it would begin now.
fn corpus(plan: &Plan, run: &Path, left_out: &BTreeSet<BadUnit>) -> Result<Corpus, Failure> {
    let failure = |error: DataError| super::failure(&error);
    let TokenizerConfig { file, bos, eos, .. } = &plan.tokenizer;
    let open = |path: &Path| super::tokens::open(path, bos.as_deref(), eos.as_deref());
    let (manifest, tokenizer, folder): (_, Tokenizer, _) = if run.join(MANIFEST).is_file() {
        let manifest = std::fs::read(run.join(MANIFEST)).map_err(|error| unreadable(run, &error))?;
        let [model, json] = ["tokenizer.model", "tokenizer.json"].map(|name| run.join(name));
        let store = LocalFileSystem::new_with_prefix(run).map_err(|error| unreadable(run, &error))?;
        (
            Manifest::from_json(&manifest).map_err(failure)?,
            open(if model.is_file() { &model } else { &json })?,
            Some(Folder::of_run(Arc::new(store), "")),
        )
    } else {
        let file = file.as_ref().ok_or_else(|| {
            wrong(format!(
                "{} has no run yet, and the plan no tokenizer.file; run it first, or name the tokenizer",
                run.display()
            ))
        })?;
        let manifest = Manifest::freeze(&plan.data, None).map_err(failure)?;
        (manifest, open(Path::new(file))?, None)
    };
    manifest.check_tokenizer(&tokenizer).map_err(failure)?;
    let sources = Sources::open(&plan.data, &manifest, folder.as_ref()).map_err(failure)?;
    let corpus = Corpus::new(&plan.data, plan.run.seed, sources, tokenizer).map_err(failure)?;
    Ok(corpus.without(left_out))
}

/// The newest checkpoint of the run from before a step, and the first one from after it.
fn states(run: &Path, step: u64) -> Result<(Option<State>, Option<State>), Failure> {
    let Ok(checkpoints) = std::fs::read_dir(run.join("checkpoints")) else { return Ok((None, None)) };
    let mut states = BTreeMap::new();
    for checkpoint in checkpoints.flatten() {
        let state: Option<State> = read_json(&checkpoint.path().join("state.json"))?;
        states.extend(state.map(|state| (state.step, state)));
    }
    let mut after = states.split_off(&step);
    Ok((states.pop_last().map(|(_, state)| state), after.pop_first().map(|(_, state)| state)))
}

/// What a file holds; none if it is not there.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Failure> {
    let Ok(bytes) = std::fs::read(path) else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| unreadable(path, &error))
}

fn page(step: u64, sequence: u64, lane: LaneId, explanation: &Explanation) -> String {
    let Explanation { source, epoch, unit, segment, sequence: number, documents } = explanation;
    let mut lines = vec![format!(
        "step {step}, sequence {sequence}: lane {lane}, source {source:?}, epoch {epoch}, unit {unit}, segment {segment}, its sequence {number}"
    )];
    for document in documents {
        let (part, tokens) = (&document.part, document.tokens);
        lines.push(format!(
            "{}, at {}: tokens {} to {} of {tokens}",
            document.file, document.at, part.start, part.end
        ));
        lines.push(format!("    {}", shortened(&document.text)));
    }
    lines.join("\n")
}

/// The two ends of a text, on one line.
fn shortened(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    if characters.len() <= 2 * SHOWN {
        return format!("{text:?}");
    }
    let side = |characters: &[char]| characters.iter().collect::<String>();
    format!("{:?} … {:?}", side(&characters[..SHOWN]), side(&characters[characters.len() - SHOWN..]))
}

fn wrong(message: String) -> Failure {
    Failure::new(ExitStatus::InvalidInput, message)
}

fn unreadable(path: &Path, error: &impl std::fmt::Display) -> Failure {
    Failure::new(ErrorKind::Corrupt.into(), format!("{}: {error}; restore it", path.display()))
}
