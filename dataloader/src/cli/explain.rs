//! `explain`: the exact documents of any sequence of any step.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use ulmus_dataloader::{Corpus, Cursors, DataError, Explanation, Folder, Loader, Manifest, Sources};
use ulmus_plan::{Plan, TokenizerConfig};
use ulmus_process::{Failure, print};
use ulmus_run::{TrainState, paths, quarantine};
use ulmus_types::{BadUnit, LaneId};

use super::run::{Run, read};
use super::{unreadable, wrong};

/// Characters of a document that are shown at each of its ends.
const SHOWN: usize = 60;

#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// Plan of the run. If the run has begun, the files, tokenizer and checkpoints of the run are used.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Override a key of the plan, such as run.name=other.
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
        let run = Run::find(&plan)?;
        let (before, after) = states(run.folder(), step)?;
        let recorded = read(run.folder(), paths::QUARANTINE)?.map(|text| quarantine::from_json(&text));
        let recorded = recorded.transpose().map_err(|error| unreadable(&error))?;
        let now = recorded.unwrap_or_default().into_keys().collect();
        let then = before.as_ref().map(|state| state.quarantine.clone()).unwrap_or_default();
        if after.map_or(now, |state| state.quarantine) != then {
            return Err(wrong(format!(
                "between the checkpoints around step {step} units were left out (see {}), so what it read is not known for sure; ask for another step",
                paths::QUARANTINE
            )));
        }
        let corpus = Arc::new(self.corpus(&plan, &run, &then)?);
        let per_lane = plan.train.sequences / plan.data.lanes;
        let lane = LaneId::new((sequence / per_lane) as u32);
        let (done, cursors) = match before {
            Some(TrainState { step, cursors, .. }) => (step.get(), Cursors::from_numbers(cursors)),
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

    /// The data of the run, if it has begun, or of the plan as it would begin now.
    fn corpus(&self, plan: &Plan, run: &Run, left_out: &BTreeSet<BadUnit>) -> Result<Corpus, Failure> {
        let failure = |error: DataError| super::failure(&error);
        let (manifest, tokenizer) = if let Some(manifest) = run.data_manifest()? {
            (Manifest::from_json(&manifest).map_err(failure)?, run.tokenizer(&plan.tokenizer)?)
        } else if let Some(not_made) = run.not_made(&self.plan, &plan.data)? {
            return Err(wrong(not_made));
        } else {
            let TokenizerConfig { file, bos, eos, .. } = &plan.tokenizer;
            let file = file.as_ref().ok_or_else(|| {
                wrong(format!(
                    "{} has no run yet, and the plan no tokenizer.file; run it first, or name the tokenizer",
                    run.url()
                ))
            })?;
            let manifest = Manifest::freeze(&plan.data, None).map_err(failure)?;
            (manifest, super::tokens::open(Path::new(file), bos.as_deref(), eos.as_deref())?)
        };
        manifest.check_tokenizer(&tokenizer).map_err(failure)?;
        let sources = Sources::open(&plan.data, &manifest, run.folder()).map_err(failure)?;
        let corpus = Corpus::new(&plan.data, plan.run.seed, sources, tokenizer).map_err(failure)?;
        Ok(corpus.without(left_out))
    }
}

/// The newest checkpoint of the run from before a step, and the first one from after it.
fn states(run: Option<&Folder>, step: u64) -> Result<(Option<TrainState>, Option<TrainState>), Failure> {
    let checkpoints = run.map(|run| run.child(paths::CHECKPOINTS));
    let paths = checkpoints.as_ref().map(Folder::paths).transpose();
    let mut states = BTreeMap::new();
    for path in paths.map_err(|error| super::failure(&error))?.into_iter().flatten() {
        let is_state = path.rsplit_once('/').is_some_and(|(_, name)| name == paths::STATE);
        if let Some(text) = is_state.then(|| read(checkpoints.as_ref(), &path)).transpose()?.flatten() {
            let state = TrainState::from_json(&text);
            let state = state.map_err(|error| unreadable(&format!("{path}: {}", error.reason)))?;
            states.insert(state.step.get(), state);
        }
    }
    let mut after = states.split_off(&step);
    Ok((states.pop_last().map(|(_, state)| state), after.pop_first().map(|(_, state)| state)))
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
