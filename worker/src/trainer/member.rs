//! A member of a group that has agreed on a state, and so has everything that it needs to train.

use std::sync::Arc;

use tokio::sync::Semaphore;
use ulmus_backend::{Quantum, TrainingBackend};
use ulmus_model::Replica;
use ulmus_run::TrainState;
use ulmus_types::{Assignment, Step};

use super::Reports;
use super::feed::Feed;
use super::recipe::Recipe;
use crate::WorkerError;
use crate::control::Control;
use crate::run::Run;

/// The parts of a worker's [`Training`](super::Training) that it trains with in every group.
pub(super) struct Parts<'a, B: TrainingBackend> {
    pub(super) run: &'a Run,
    pub(super) recipe: &'a Recipe,
    pub(super) replica: &'a mut Replica<B>,
    pub(super) quantum: &'a Quantum,
    pub(super) snapshot_slots: &'a Arc<Semaphore>,
}

/// A member of a group that trains.
pub(super) struct Member<'a, B: TrainingBackend> {
    pub(super) run: &'a Run,
    pub(super) recipe: &'a Recipe,
    pub(super) replica: &'a mut Replica<B>,
    pub(super) quantum: &'a Quantum,
    /// Limits the states that wait in memory to be stored.
    pub(super) snapshot_slots: &'a Arc<Semaphore>,
    /// The position in the stage of the replica's weights and moments.
    pub(super) position: &'a mut TrainState,
    pub(super) feed: &'a mut Feed,
    pub(super) assignment: &'a Assignment,
    pub(super) control: &'a Control,
    pub(super) reports: &'a Reports,
}

impl<'a, B: TrainingBackend> Member<'a, B> {
    /// Takes up this worker's micro-batches, at the cursors of the agreed state.
    pub(super) fn new(
        parts: Parts<'a, B>,
        position: &'a mut TrainState,
        feed: &'a mut Feed,
        assignment: &'a Assignment,
        control: &'a Control,
        reports: &'a Reports,
    ) -> Result<Self, WorkerError> {
        let Parts { run, recipe, replica, quantum, snapshot_slots } = parts;
        feed.host(run, assignment, &position.cursors)?;
        Ok(Self {
            run,
            recipe,
            replica,
            quantum,
            snapshot_slots,
            position,
            feed,
            assignment,
            control,
            reports,
        })
    }

    /// The number of updates that the state has seen.
    pub(super) fn step(&self) -> Step {
        self.position.step
    }
}
