//! How a training stage trains, as its plan says.

use std::sync::Arc;

use ulmus_backend::Quantum;
use ulmus_model::{AdapterShape, BatchShape, ModelError, Objective, Optimizer, Preference};
use ulmus_plan::{Method, ModelConfig, Plan, Precision, TrainConfig, TuneConfig};
use ulmus_run::results::Examples;
use ulmus_types::{Digest, StageName, Step};

use crate::WorkerError;
use crate::examples::{made_by, result};
use crate::jobs::base::read_adapter;
use crate::run::Run;

/// The recipe of a training stage.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    training: StageName,
    plan: Arc<Plan>,
    optimizer: Optimizer,
    precision: Precision,
    recompute: bool,
    tuning: Option<Tuning>,
}

/// What only a tuning stage has.
#[derive(Debug, Clone)]
pub(super) struct Tuning {
    pub(super) config: TuneConfig,
    /// What its examples were found to be.
    pub(super) examples: Examples,
    pub(super) adapter: Option<AdapterShape>,
    /// The shape of the model that it trains.
    pub(super) model: ModelConfig,
}

impl Recipe {
    /// The recipe of a stage of the run's plan.
    pub(super) fn of(run: &Run, training: StageName) -> Result<Self, WorkerError> {
        let plan = Arc::clone(&run.plan);
        let Some(config) = plan.tuning(training).cloned() else {
            let TrainConfig { precision, recompute, .. } = plan.train;
            let optimizer = Optimizer::from(&plan.train);
            return Ok(Self { training, optimizer, precision, recompute, plan, tuning: None });
        };
        let examples = result(run, &made_by(run, training))?;
        let model = plan.shape_of(&config.of);
        let adapter = config.adapter.as_ref().map(|adapter| AdapterShape::new(&model, adapter));
        let optimizer = Optimizer::from(&config);
        let TuneConfig { precision, recompute, .. } = config;
        let tuning = Tuning { examples, adapter: adapter.transpose()?, model, config };
        Ok(Self { training, plan, optimizer, precision, recompute, tuning: Some(tuning) })
    }

    pub(super) const fn training(&self) -> StageName {
        self.training
    }

    /// Whether small matrices are trained in place of the weights.
    pub(super) fn has_adapter(&self) -> bool {
        self.tuning.as_ref().is_some_and(|tuning| tuning.adapter.is_some())
    }

    /// The weights of the adapter that the stage goes on from, if it goes on from one.
    pub(super) fn adapter_to_go_on_from(&self) -> Result<Option<Vec<f32>>, WorkerError> {
        let Some(Tuning { config, adapter: Some(shape), model, .. }) = &self.tuning else { return Ok(None) };
        let from = config.adapter.as_ref().and_then(|adapter| adapter.from.as_ref());
        let Some(from) = from else { return Ok(None) };
        let weights = read_adapter(from, shape, model)?;
        self.must_be_known(TuneConfig::ADAPTER_FROM, from, &weights)?;
        Ok(Some(weights))
    }

    /// Refuses weights from elsewhere that are not those for which the stage's examples were made.
    pub(super) fn must_be_known(&self, key: &str, address: &str, weights: &[f32]) -> Result<(), WorkerError> {
        // Runs from before they were kept have no hashes.
        let known = self.tuning.as_ref().and_then(|tuning| tuning.examples.elsewhere.get(key));
        if known.is_none_or(|known| *known == Digest::of(bytemuck::cast_slice(weights))) {
            return Ok(());
        }
        Err(WorkerError::Plan(format!(
            "tune {}: {key} names {address}, and what is there is not what was there when the run began; put that back, or start a run with another name",
            self.training
        )))
    }

    pub(super) const fn tuning(&self) -> Option<&Tuning> {
        self.tuning.as_ref()
    }

    /// The shape of the model.
    pub(super) fn model(&self) -> &ModelConfig {
        self.tuning.as_ref().map_or(&self.plan.model, |tuning| &tuning.model)
    }

    /// What is minimised.
    pub(super) fn objective(&self) -> Objective {
        match &self.tuning {
            None => Objective::next_token(self.plan.train.z_loss),
            Some(Tuning { config, .. }) => match config.method {
                Method::Sft => Objective::Answers { z_loss: config.z_loss },
                Method::Dpo => Objective::Preferences(Preference {
                    loss: config.loss,
                    beta: config.beta,
                    label_smoothing: config.label_smoothing,
                    length_normalised: config.length_normalised,
                }),
            },
        }
    }

    /// The largest micro-batch.
    pub(super) fn shape(&self) -> BatchShape {
        let recompute = self.recompute;
        match &self.tuning {
            None => BatchShape {
                sequences: self.plan.train.micro_batch as usize,
                length: self.plan.sequence_length(),
                recompute,
            },
            Some(Tuning { config, .. }) => BatchShape {
                sequences: (config.micro_batch * config.sequences_per_example()) as usize,
                length: config.positions(),
                recompute,
            },
        }
    }

    /// The quantum of the exact sums of an update.
    pub(super) fn quantum(&self) -> Quantum {
        match &self.tuning {
            None => Quantum::new(self.plan.tokens_per_step(), self.plan.train.micro_batches()),
            Some(Tuning { config, .. }) => Quantum::new(config.tokens_per_step(), config.micro_batches()),
        }
    }

    /// The optimizer's settings.
    pub(super) const fn optimizer(&self) -> Optimizer {
        self.optimizer
    }

    /// The precision of the operands of matrix products.
    pub(super) const fn precision(&self) -> Precision {
        self.precision
    }

    /// The learning rate of update number `step` (0 for the first).
    pub(super) fn learning_rate(&self, step: u64) -> f64 {
        match &self.tuning {
            None => self.plan.train.learning_rate(step),
            Some(tuning) => tuning.config.learning_rate(step, tuning.examples.updates),
        }
    }

    /// The last update.
    pub(super) fn last_step(&self) -> Step {
        Step::new(match &self.tuning {
            None => self.plan.train.iterations,
            Some(tuning) => tuning.examples.updates,
        })
    }

    /// Whether the state after a step is a milestone.
    pub(super) fn is_milestone(&self, step: Step) -> bool {
        match &self.tuning {
            None => self.plan.checkpoint.is_milestone(step.get(), self.plan.train.iterations),
            Some(Tuning { config, .. }) => {
                let every = config.checkpoint_every;
                let on_grid = every > 0 && step.get().is_multiple_of(every);
                step.get() > 0 && (on_grid || step == self.last_step())
            }
        }
    }

    /// Whether the stage is evaluated after a step: on held-out text, or on the examples for that.
    pub(super) fn is_evaluated(&self, step: Step) -> bool {
        let (every, is_wanted) = match &self.tuning {
            None => (self.plan.train.held_out_every, self.plan.train.held_out_every > 0),
            Some(tuning) => (tuning.config.eval_every, tuning.examples.held_out > 0),
        };
        is_wanted && (every > 0 && step.get().is_multiple_of(every) || step == self.last_step())
    }

    /// The seed of the initial weights, the order of the data and dropout.
    pub(super) fn seed(&self) -> u64 {
        let own = self.tuning.as_ref().and_then(|tuning| tuning.config.seed);
        own.unwrap_or(self.plan.run.seed)
    }
}

/// The replica that a recipe trains.
pub(super) fn replica<B: ulmus_backend::TrainingBackend>(
    backend: B,
    recipe: &Recipe,
) -> Result<ulmus_model::Replica<B>, ModelError> {
    let backend = backend.with_precision(recipe.precision);
    let (model, shape, objective) = (recipe.model(), recipe.shape(), recipe.objective());
    match recipe.tuning().and_then(|tuning| tuning.adapter.as_ref()) {
        Some(adapter) => {
            ulmus_model::Replica::with_adapter(backend, model, adapter, recipe.seed(), shape, objective)
        }
        None => ulmus_model::Replica::new(backend, model, shape, objective),
    }
}
