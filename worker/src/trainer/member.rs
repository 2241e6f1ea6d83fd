//! A member of a group that has agreed on a state, and so has everything that it needs to train.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::Semaphore;
use ulmus_backend::{Quantum, TrainingBackend};
use ulmus_dataloader::{Corpus, Cursors, Loader, Sequence};
use ulmus_model::Replica;
use ulmus_run::TrainState;
use ulmus_types::{Assignment, BadUnit, LaneId, Step};

use super::{Reading, Reports};
use crate::WorkerError;
use crate::control::Control;
use crate::run::Run;

/// The parts of a worker's [`Training`](super::Training) that it trains with in every group.
pub(super) struct Parts<'a, B: TrainingBackend> {
    pub(super) run: &'a Run,
    pub(super) replica: &'a mut Replica<B>,
    pub(super) quantum: &'a Quantum,
    pub(super) snapshot_slots: &'a Arc<Semaphore>,
}

/// A member of a group that trains.
pub(super) struct Member<'a, B: TrainingBackend> {
    pub(super) run: &'a Run,
    pub(super) replica: &'a mut Replica<B>,
    pub(super) quantum: &'a Quantum,
    /// Limits the states that wait in memory to be stored.
    pub(super) snapshot_slots: &'a Arc<Semaphore>,
    /// The position in the run of the replica's weights and moments.
    pub(super) position: &'a mut TrainState,
    pub(super) corpus: &'a Arc<Corpus>,
    /// The units that the corpus leaves out.
    pub(super) quarantine: &'a BTreeSet<BadUnit>,
    pub(super) loader: &'a mut Loader,
    /// The lanes of each of this worker's micro-batches; the loader hosts them.
    pub(super) lanes: Vec<Vec<LaneId>>,
    /// The sequences for the held-out loss, once they have been read.
    pub(super) held_out: &'a mut Option<Arc<[Sequence]>>,
    pub(super) assignment: &'a Assignment,
    pub(super) control: &'a Control,
    pub(super) reports: &'a Reports,
}

impl<'a, B: TrainingBackend> Member<'a, B> {
    /// Lets the loader host the lanes of this worker's micro-batches, at the cursors of the agreed state.
    pub(super) fn new(
        parts: Parts<'a, B>,
        position: &'a mut TrainState,
        reading: &'a mut Reading,
        assignment: &'a Assignment,
        control: &'a Control,
        reports: &'a Reports,
    ) -> Result<Self, WorkerError> {
        let Parts { run, replica, quantum, snapshot_slots } = parts;
        let Reading { corpus, quarantine, loader, held_out } = reading;
        let plan = &run.plan;
        let per_micro_batch = (plan.data.lanes / plan.train.micro_batches()).max(1);
        let lanes: Vec<Vec<LaneId>> = assignment
            .micro_batches
            .clone()
            .map(|micro_batch| {
                let first = micro_batch * per_micro_batch;
                (first..first + per_micro_batch).map(|lane| LaneId::new(lane as u32)).collect()
            })
            .collect();
        let hosted: Vec<LaneId> = lanes.iter().flatten().copied().collect();
        let cursors = Cursors::from_numbers(position.cursors.clone());
        let loader = match loader {
            Some(loader) => {
                loader.host(&hosted, &cursors)?;
                loader
            }
            None => loader.insert(Loader::open(corpus.clone(), plan.sequence_length(), &hosted, &cursors)?),
        };
        Ok(Self {
            run,
            replica,
            quantum,
            snapshot_slots,
            position,
            corpus,
            quarantine,
            loader,
            lanes,
            held_out,
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
