//! A new group agrees on one state before its first step.
//!
//! No two survivors of a loss are more than one update apart, because the reduction is a barrier. So a member with the
//! newest state gives it to all others: survivors that are a step behind, and workers that have just joined. If nobody
//! has a state, rank 0 reads one from the newest good checkpoint or makes one from the seed, and gives it to the others
//! by the same path.

use std::collections::BTreeSet;

use ulmus_backend::TrainingBackend;
use ulmus_checkpoint::newest_verified;
use ulmus_model::StatePart;
use ulmus_plan::TuneConfig;
use ulmus_run::TrainState;
use ulmus_types::{Assignment, Digest, LeaveReason, Rank, Step, Subject, ToCoordinator};

use super::devices::Devices;
use super::feed::Feed;
use super::member::{Member, Parts};
use super::{Reports, Training, reference};
use crate::WorkerError;
use crate::collective::Collective;
use crate::control::Control;
use crate::jobs;
use crate::snapshot::restore;

/// Elements of a state that are sent at a time.
const CHUNK: usize = 1 << 22;

impl<B: TrainingBackend> Training<B> {
    /// Trains in a group until something ends it; returns the reason.
    pub(super) fn take_part(
        &mut self,
        assignment: &Assignment,
        group: &mut dyn Collective,
        control: &Control,
        reports: &Reports,
    ) -> LeaveReason {
        self.train_in(assignment, group, control, reports).unwrap_or_else(LeaveReason::from)
    }

    fn train_in(
        &mut self,
        assignment: &Assignment,
        group: &mut dyn Collective,
        control: &Control,
        reports: &Reports,
    ) -> Result<LeaveReason, WorkerError> {
        let generation = assignment.generation;
        reports.say(ToCoordinator::Connected(generation));
        let mut devices = Devices::join(self.replica.backend().clone(), group, |notice| {
            reports.say(ToCoordinator::Notice(notice));
        })?;
        let mut feed = Feed::open(&self.run, &self.recipe, self.feed.take())?;
        let ended = self.agree(&feed, assignment, group, devices.as_mut(), reports).and_then(|state| {
            reports.say(ToCoordinator::Formed { generation, step: state.step });
            let position = self.position.insert(state);
            let parts = Parts {
                run: &self.run,
                recipe: &self.recipe,
                replica: &mut self.replica,
                quantum: &self.quantum,
                snapshot_slots: &self.snapshot_slots,
            };
            Member::new(parts, position, &mut feed, assignment, control, reports)?.train(devices, group)
        });
        self.feed = Some(feed);
        ended
    }

    /// Gives every member the newest state in the group.
    fn agree(
        &mut self,
        feed: &Feed,
        assignment: &Assignment,
        group: &mut dyn Collective,
        devices: Option<&mut Devices<B>>,
        reports: &Reports,
    ) -> Result<TrainState, WorkerError> {
        // The first milestone to be made again cannot be made from a state after it.
        if let Some(first) = first_repair(assignment) {
            self.position.take_if(|position| position.step >= first);
        }
        if let Some(from) = assignment.from.as_ref().filter(|_| self.recipe.has_adapter()) {
            // Every member has the frozen weights, which no other can give it.
            self.load_base(from)?;
        }
        // 0 means no state at all.
        let mut steps = vec![0_i64; group.size()];
        steps[group.rank().index()] =
            self.position.as_ref().map_or(0, |position| position.step.get() as i64 + 1);
        group.all_reduce(&mut steps)?;
        let newest = steps.iter().copied().max().unwrap_or(0);
        if newest == 0 && group.rank() == Rank::new(0) {
            self.position = Some(self.restore_or_begin(feed, assignment, reports)?);
        }
        if let Some(position) = &self.position
            && newest > 0
            && steps.iter().all(|step| *step == newest)
        {
            return Ok(position.clone());
        }
        let donor = steps.iter().position(|step| *step == newest).unwrap_or(0);
        let is_newest = newest > 0 && steps[group.rank().index()] == newest;
        self.broadcast(feed, Rank::new(donor as u32), is_newest, group, devices)
    }

    /// Restores the newest good checkpoint that may be used, or begins from the seed.
    fn restore_or_begin(
        &mut self,
        feed: &Feed,
        assignment: &Assignment,
        reports: &Reports,
    ) -> Result<TrainState, WorkerError> {
        let store = &self.run.store;
        let before = first_repair(assignment).map(|step| Step::new(step.get().saturating_sub(1)));
        let last = before.map_or(assignment.recorded, |step| step.min(assignment.recorded));
        let (newest, refused) =
            self.run.wait(newest_verified(store, self.run.id, assignment.training, last))?;
        let begins = newest.is_none();
        if begins && !assignment.may_begin {
            let faults: Vec<String> = refused.iter().map(|(_, error)| error.to_string()).collect();
            let faults = if faults.is_empty() { "there is none".to_owned() } else { faults.join("; ") };
            return Err(WorkerError::NoCheckpoint { store: store.to_string(), faults });
        }
        for (checkpoint, error) in refused {
            let notice = match &newest {
                Some(older) => format!("{error}; resuming from {} instead of {checkpoint}", older.checkpoint),
                None => format!("{error}; starting over instead of resuming from {checkpoint}"),
            };
            reports.say(ToCoordinator::Notice(notice));
        }
        let Some(manifest) = newest else {
            match &assignment.from {
                Some(from) => {
                    let origin = self.begin(from)?;
                    reference::must_be_of(&self.run, &self.recipe, origin)?;
                }
                None => self.replica.initialise(self.recipe.seed()),
            }
            return Ok(self.beginning(feed));
        };
        if !self.run.plan.has_digest_of(assignment.training, manifest.plan_digest) {
            return Err(WorkerError::OtherPlan(store.to_string()));
        }
        let (state, train) =
            self.run.wait(restore(store, &manifest, self.replica.layout(), self.replica.trainable()))?;
        self.replica.load_state(&state)?;
        Ok(train)
    }

    /// Puts the replica into the state in which the stage begins from a model. Returns a hash of all weights in it that make a
    /// difference.
    pub(super) fn begin(&mut self, from: &Subject) -> Result<Digest, WorkerError> {
        if !self.recipe.has_adapter() {
            let weights = self.weights_of(from)?;
            let digest = Digest::of(bytemuck::cast_slice(&weights));
            self.replica.begin(&weights)?;
            return Ok(digest);
        }
        let base = self.load_base(from)?;
        self.replica.initialise(self.recipe.seed());
        // A new adapter changes nothing.
        let Some(weights) = self.recipe.adapter_to_go_on_from()? else { return Ok(base) };
        self.replica.write_state(StatePart::Weights, 0, &weights);
        Ok(Digest::of(format!("{base} {}", Digest::of(bytemuck::cast_slice(&weights))).as_bytes()))
    }

    /// Loads the weights that a stage with an adapter leaves as they are. Returns their hash.
    fn load_base(&mut self, from: &Subject) -> Result<Digest, WorkerError> {
        if let Some(digest) = self.base {
            return Ok(digest);
        }
        let weights = self.weights_of(from)?;
        self.replica.load_base([&weights])?;
        Ok(*self.base.insert(Digest::of(bytemuck::cast_slice(&weights))))
    }

    /// The weights of a model, which have not changed since the run began if it is from elsewhere.
    fn weights_of(&self, model: &Subject) -> Result<Vec<f32>, WorkerError> {
        let weights = jobs::weights_of(&self.run, model)?;
        if let Subject::Model(place) = model {
            self.recipe.must_be_known(TuneConfig::OF, place, &weights)?;
        }
        Ok(weights)
    }

    fn beginning(&self, feed: &Feed) -> TrainState {
        TrainState {
            step: Step::default(),
            tokens: 0,
            quantum: self.quantum.value(),
            cursors: feed.start(),
            quarantine: BTreeSet::new(),
        }
    }

    /// Gives all members the state of `donor`. Members that have it already keep it, even if the others fail meanwhile.
    fn broadcast(
        &mut self,
        feed: &Feed,
        donor: Rank,
        is_newest: bool,
        group: &mut dyn Collective,
        devices: Option<&mut Devices<B>>,
    ) -> Result<TrainState, WorkerError> {
        // Devices receive in place, so they overwrite even an equal state.
        let keeps = group.rank() == donor || (is_newest && devices.is_none());
        // A state that is only half overwritten is none.
        self.position.take_if(|_| !keeps);
        let position = self.position.clone().unwrap_or_else(|| self.beginning(feed));
        let mut words: Vec<i64> = [position.step.get() as i64, position.tokens as i64]
            .into_iter()
            .chain(position.cursors.iter().copied())
            .collect();
        group.broadcast(donor, (&mut words[..]).into())?;
        match devices {
            Some(devices) => {
                for part in StatePart::ALL {
                    self.replica.write_part(part, |values| devices.broadcast(donor, values, group))?;
                }
            }
            None => self.broadcast_through_hosts(donor, keeps, group)?,
        }
        Ok(TrainState {
            step: Step::new(words[0] as u64),
            tokens: words[1] as u64,
            cursors: words[2..].to_vec(),
            ..position
        })
    }

    fn broadcast_through_hosts(
        &mut self,
        donor: Rank,
        keeps: bool,
        group: &mut dyn Collective,
    ) -> Result<(), WorkerError> {
        let gives = group.rank() == donor;
        let mut chunk = vec![0_f32; CHUNK.min(self.replica.layout().parameters())];
        for part in StatePart::ALL {
            let len = self.replica.part_len(part);
            for start in (0..len).step_by(CHUNK) {
                let chunk = &mut chunk[..CHUNK.min(len - start)];
                if gives {
                    self.replica.read_state(part, start, chunk);
                }
                group.broadcast(donor, (&mut *chunk).into())?;
                if !keeps {
                    self.replica.write_state(part, start, chunk);
                }
            }
        }
        Ok(())
    }
}

/// The first milestone to be made again, if the group was formed for that.
fn first_repair(assignment: &Assignment) -> Option<Step> {
    assignment.repair.as_ref()?.milestones.first().copied()
}
