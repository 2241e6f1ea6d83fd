//! A new group agrees on one state before its first step.
//!
//! No two survivors of a loss are more than one update apart, because the reduction is a barrier. So whoever has
//! the newest state gives it to all others: survivors that are a step behind, workers that have just joined, and,
//! when nobody has a state, everybody takes what rank 0 reads from the newest good checkpoint or makes from the
//! seed. It is one path for all of them.

use std::collections::BTreeSet;

use ulmus_backend::TrainingBackend;
use ulmus_checkpoint::newest_verified;
use ulmus_model::StatePart;
use ulmus_run::TrainState;
use ulmus_types::{Assignment, LeaveReason, Rank, Step, ToCoordinator};

use super::devices::Devices;
use super::{Reports, Training};
use crate::WorkerError;
use crate::collective::Collective;
use crate::control::Control;
use crate::snapshot::restore;

/// Elements of a state that are sent at once.
const CHUNK: usize = 1 << 22;

impl<B: TrainingBackend> Training<B> {
    /// Trains in a group until something ends it; tells why.
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
        self.agree(assignment, group, devices.as_mut(), reports)?;
        let step = self.step();
        reports.say(ToCoordinator::Formed { generation, step });
        self.train(assignment, devices, group, control, reports)
    }

    /// Gives every member the newest state in the group.
    fn agree(
        &mut self,
        assignment: &Assignment,
        group: &mut dyn Collective,
        devices: Option<&mut Devices<B>>,
        reports: &Reports,
    ) -> Result<(), WorkerError> {
        self.open_corpus()?;
        // A state after the first milestone to make again is of no use for that.
        if let Some(first) = first_repair(assignment)
            && self.step() >= first
        {
            self.position = None;
        }
        // 0 stands for no state at all.
        let mut steps = vec![0_i64; group.size()];
        steps[group.rank().index()] =
            self.position.as_ref().map_or(0, |position| position.step.get() as i64 + 1);
        group.all_reduce(&mut steps)?;
        let newest = steps.iter().copied().max().unwrap_or(0);
        if newest == 0 && group.rank() == Rank::new(0) {
            self.restore_or_begin(assignment, reports)?;
        }
        if newest > 0 && steps.iter().all(|step| *step == newest) {
            return Ok(());
        }
        let donor = steps.iter().position(|step| *step == newest).unwrap_or(0);
        let is_newest = newest > 0 && steps[group.rank().index()] == newest;
        self.broadcast(Rank::new(donor as u32), is_newest, group, devices)
    }

    /// Opens the corpus without what is left out by now.
    fn open_corpus(&mut self) -> Result<(), WorkerError> {
        let quarantine = self.run.quarantine()?;
        if self.corpus.is_none() || quarantine != self.quarantine {
            // Windows that were read with those units in them are of no use any more.
            (self.loader, self.held_out) = (None, None);
            (self.corpus, self.quarantine) = (Some(self.run.corpus()?.into()), quarantine);
        }
        Ok(())
    }

    /// Takes up the newest good checkpoint that may be used, or begins from the seed.
    fn restore_or_begin(&mut self, assignment: &Assignment, reports: &Reports) -> Result<(), WorkerError> {
        let store = &self.run.store;
        let before = first_repair(assignment).map(|step| Step::new(step.get().saturating_sub(1)));
        let last = before.map_or(assignment.recorded, |step| step.min(assignment.recorded));
        let (newest, refused) = self.run.wait(newest_verified(store, self.run.id, last))?;
        let begins = newest.is_none();
        if begins && !assignment.may_begin {
            let faults: Vec<String> = refused.iter().map(|(_, error)| error.to_string()).collect();
            let faults = if faults.is_empty() { "there is none".to_owned() } else { faults.join("; ") };
            return Err(WorkerError::NoCheckpoint { store: store.to_string(), faults });
        }
        for (checkpoint, error) in refused {
            let notice = match &newest {
                Some(older) => format!("{error}; going on from {} instead of {checkpoint}", older.checkpoint),
                None => format!("{error}; beginning anew instead of from {checkpoint}"),
            };
            reports.say(ToCoordinator::Notice(notice));
        }
        let Some(manifest) = newest else {
            self.replica.initialise(self.run.plan.run.seed);
            self.position = Some(self.beginning());
            return Ok(());
        };
        if manifest.plan_digest != self.run.plan.digest() {
            return Err(WorkerError::OtherPlan(store.to_string()));
        }
        let (state, train) = self.run.wait(restore(store, &manifest, self.replica.layout()))?;
        self.replica.load_state(&state)?;
        self.position = Some(train);
        Ok(())
    }

    fn beginning(&self) -> TrainState {
        let cursors = self.corpus.as_ref().map(|corpus| corpus.start().words().to_vec());
        TrainState {
            step: Step::default(),
            tokens: 0,
            quantum: self.quantum.value(),
            cursors: cursors.unwrap_or_default(),
            quarantine: BTreeSet::new(),
        }
    }

    /// Everybody gets the state of `donor`. Whoever has it keeps it, whatever becomes of the others meanwhile.
    fn broadcast(
        &mut self,
        donor: Rank,
        is_newest: bool,
        group: &mut dyn Collective,
        devices: Option<&mut Devices<B>>,
    ) -> Result<(), WorkerError> {
        // Devices receive in place.
        let keeps = group.rank() == donor || (is_newest && devices.is_none());
        // What is half overwritten is no state.
        let position = if keeps { self.position.clone() } else { None };
        self.position.clone_from(&position);
        let position = position.unwrap_or_else(|| self.beginning());
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
        self.position = Some(TrainState {
            step: Step::new(words[0] as u64),
            tokens: words[1] as u64,
            cursors: words[2..].to_vec(),
            ..position
        });
        Ok(())
    }

    fn broadcast_through_hosts(
        &mut self,
        donor: Rank,
        keeps: bool,
        group: &mut dyn Collective,
    ) -> Result<(), WorkerError> {
        let gives = group.rank() == donor;
        let parameters = self.replica.layout().parameters();
        let mut chunk = vec![0_f32; CHUNK.min(parameters)];
        for part in StatePart::ALL {
            for start in (0..parameters).step_by(CHUNK) {
                let chunk = &mut chunk[..CHUNK.min(parameters - start)];
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

/// The first milestone that the group makes again, if it is formed for that.
fn first_repair(assignment: &Assignment) -> Option<Step> {
    assignment.repair.as_ref()?.milestones.first().copied()
}
