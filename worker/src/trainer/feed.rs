//! What a stage trains on: the text of the plan's sources, or examples.

use std::collections::BTreeSet;
use std::sync::Arc;

use ulmus_chat::Item;
use ulmus_dataloader::{Corpus, Cursors, Epochs, Loader, Sequence, Update};
use ulmus_model::MicroBatch;
use ulmus_plan::{Method, TuneConfig};
use ulmus_run::paths::ExampleSet;
use ulmus_types::{Assignment, BadUnit, LaneId};

use super::recipe::{Recipe, Tuning};
use super::reference;
use crate::WorkerError;
use crate::examples::{Kept, Reference, made_by, micro_batch, stored};
use crate::run::Run;

/// The data of a stage, and how far this worker has read them.
pub(super) enum Feed {
    Text(Reading),
    Examples(Box<Lessons>),
}

/// The run's text.
pub(super) struct Reading {
    pub(super) corpus: Arc<Corpus>,
    /// The units that the corpus leaves out.
    pub(super) quarantine: BTreeSet<BadUnit>,
    /// The loader of the last group's lanes.
    pub(super) loader: Option<Loader>,
    /// The lanes of each of this worker's micro-batches; the loader hosts them.
    pub(super) lanes: Vec<Vec<LaneId>>,
    /// The sequences for the held-out loss, once they have been read.
    pub(super) held_out: Option<Arc<[Sequence]>>,
}

/// The examples of a tuning stage.
pub(super) struct Lessons {
    pub(super) trained: Set,
    /// What the stage is evaluated on.
    pub(super) evaluated: Set,
    /// The order in which updates take them.
    pub(super) epochs: Epochs,
}

/// Examples, with their log-probabilities before tuning if they are compared with those.
#[derive(Default)]
pub(super) struct Set {
    pub(super) examples: Vec<Kept>,
    pub(super) references: Option<Vec<Reference>>,
}

impl Set {
    /// The micro-batch of some of the examples, if there are any. `before` is the number of those that the stage trains on before
    /// them.
    pub(super) fn batch(&self, chosen: &[usize], before: u64, config: &TuneConfig) -> Option<MicroBatch> {
        if chosen.is_empty() {
            return None;
        }
        let items: Vec<&Item> = chosen.iter().map(|index| &self.examples[*index].item).collect();
        let references = self.references.as_ref();
        let references =
            references.map(|all| chosen.iter().map(|index| all[*index]).collect::<Vec<Reference>>());
        let pack = config.pack.then_some(config.max_length as usize);
        Some(micro_batch(&items, references.as_deref(), before, pack))
    }
}

impl Lessons {
    /// The number of examples that are trained on before update `step` (0 for the first).
    fn before(&self, step: u64) -> u64 {
        let Update { epoch, index } = self.epochs.after(step);
        epoch * self.trained.examples.len() as u64 + index * self.epochs.batch() as u64
    }

    /// The examples of update `step`, and the number of those before them.
    pub(super) fn update(&mut self, step: u64) -> (Vec<usize>, u64) {
        let examples = self.epochs.examples(self.epochs.after(step));
        let examples = examples.iter().map(|example| *example as usize).collect();
        (examples, self.before(step))
    }
}

impl Feed {
    /// The data of a stage. If it is text whose quarantined units are not the same as before, everything read before is dropped.
    pub(super) fn open(run: &Run, recipe: &Recipe, before: Option<Self>) -> Result<Self, WorkerError> {
        let Some(tuning) = recipe.tuning() else {
            let quarantine = run.quarantine()?;
            return match before {
                Some(Self::Text(reading)) if reading.quarantine == quarantine => Ok(Self::Text(reading)),
                _ => Ok(Self::Text(Reading {
                    corpus: run.corpus()?.into(),
                    quarantine,
                    loader: None,
                    lanes: Vec::new(),
                    held_out: None,
                })),
            };
        };
        if let Some(Self::Examples(lessons)) = before {
            return Ok(Self::Examples(lessons));
        }
        let [trained, evaluated] = examples(run, recipe.training(), tuning)?;
        let compares = tuning.config.method == Method::Dpo;
        let [trained, evaluated] = if compares {
            let [of_trained, of_evaluated] =
                reference::read(run, recipe, &tuning.config.of, trained.len(), evaluated.len())?.map(Some);
            [
                Set { examples: trained, references: of_trained },
                Set { examples: evaluated, references: of_evaluated },
            ]
        } else {
            [trained, evaluated].map(|examples| Set { examples, references: None })
        };
        let TuneConfig { batch, shuffle, .. } = tuning.config;
        let epochs = Epochs::new(trained.examples.len(), batch as usize, shuffle, recipe.seed());
        Ok(Self::Examples(Box::new(Lessons { trained, evaluated, epochs })))
    }

    /// Takes up this worker's part of a group's work, at the cursors of the agreed state.
    pub(super) fn host(
        &mut self,
        run: &Run,
        assignment: &Assignment,
        cursors: &[i64],
    ) -> Result<(), WorkerError> {
        let Self::Text(reading) = self else { return Ok(()) };
        let plan = &run.plan;
        let per_micro_batch = (plan.data.lanes / plan.train.micro_batches()).max(1);
        let lanes_of = |micro_batch: u64| {
            let first = micro_batch * per_micro_batch;
            (first..first + per_micro_batch).map(|lane| LaneId::new(lane as u32)).collect()
        };
        reading.lanes = assignment.micro_batches.clone().map(lanes_of).collect();
        let hosted: Vec<LaneId> = reading.lanes.iter().flatten().copied().collect();
        let cursors = Cursors::from_numbers(cursors.to_vec());
        if let Some(loader) = &mut reading.loader {
            loader.host(&hosted, &cursors)?;
        } else {
            let corpus = reading.corpus.clone();
            reading.loader = Some(Loader::open(corpus, plan.sequence_length(), &hosted, &cursors)?);
        }
        Ok(())
    }

    /// The cursors of a stage that begins.
    pub(super) fn start(&self) -> Vec<i64> {
        match self {
            Self::Text(reading) => reading.corpus.start().numbers().to_vec(),
            Self::Examples(_) => Vec::new(),
        }
    }

    /// Where this worker's lanes are, 0 for all others.
    pub(super) fn cursors(&self) -> Vec<i64> {
        match self {
            Self::Text(Reading { loader: Some(loader), .. }) => loader.cursors().numbers().to_vec(),
            Self::Text(_) | Self::Examples(_) => Vec::new(),
        }
    }

    /// The units that are left out.
    pub(super) fn quarantine(&self) -> BTreeSet<BadUnit> {
        match self {
            Self::Text(reading) => reading.quarantine.clone(),
            Self::Examples(_) => BTreeSet::new(),
        }
    }

    /// The number of examples that are trained on before update `step`.
    pub(super) fn examples_before(&self, step: u64) -> u64 {
        match self {
            Self::Text(_) => 0,
            Self::Examples(lessons) => lessons.before(step),
        }
    }
}

/// What a stage trains on, and what it is evaluated on.
pub(super) fn examples(
    run: &Run,
    training: ulmus_types::StageName,
    tuning: &Tuning,
) -> Result<[Vec<Kept>; 2], WorkerError> {
    let trained = if tuning.config.rso.is_some() { ExampleSet::Pairs } else { ExampleSet::Data };
    stored(run, training, [trained, ExampleSet::Eval], &tuning.examples, &made_by(run, training))
}
