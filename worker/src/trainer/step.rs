//! The training loop: read, compute, reduce, update.
//!
//! The order of a step makes the loss of a worker survivable. Until the gradients are reduced everywhere nobody has
//! changed anything, so the step can be redone from the same cursors; after that every member can finish the step
//! alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use ulmus_backend::{IGNORE, TrainingBackend};
use ulmus_dataloader::{DataError, Sequence};
use ulmus_model::{LossSum, MicroBatch, Objective, Sums};
use ulmus_plan::TuneConfig;
use ulmus_types::{CheckpointId, CheckpointKind, LeaveReason, Section, Step, StepReport, ToCoordinator};

use super::consensus::StepConsensus;
use super::devices::Devices;
use super::feed::{Feed, Reading};
use super::member::Member;
use super::recipe::Tuning;
use super::{Report, STALL_TIMEOUT, micro_batch};
use crate::WorkerError;
use crate::collective::{Collective, chunks};
use crate::examples::masked;
use crate::snapshot::PendingSnapshot;

/// How often a trainer that waits for a store, or for text, reports that it does.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Why this worker's share of a step cannot be used.
enum Obstacle {
    Exhausted(String),
    Failed(WorkerError),
}

/// This worker's share of a step.
struct Share {
    /// Its losses, and the cursors of its lanes.
    consensus: StepConsensus,
    /// The sequences for the held-out loss after the step, if it is due.
    held_out: Option<Arc<[Sequence]>>,
}

/// This worker's micro-batches of an update.
enum Batches {
    /// Those of its lanes.
    OfLanes,
    /// Those of these examples, which have so many before them.
    Of(Vec<usize>, u64),
}

/// Where the time of a step went.
#[derive(Default)]
struct Times {
    data: Duration,
    communication: Duration,
}

impl<B: TrainingBackend> Member<'_, B> {
    /// Trains until the plan is done, the group agrees to leave, or something breaks.
    pub(super) fn train(
        mut self,
        mut devices: Option<Devices<B>>,
        group: &mut dyn Collective,
    ) -> Result<LeaveReason, WorkerError> {
        // A single micro-batch is its own sum.
        let alone = group.size() == 1 && self.assignment.micro_batches.clone().count() == 1;
        let mut sums = if alone {
            None
        } else {
            Some(Sums::new(self.replica.backend(), self.replica.trainable()).map_err(WorkerError::from)?)
        };
        let generation = self.assignment.generation;
        let last = self.last_step();
        while self.step() < last {
            self.control.begin(Section::Computing);
            let begun = Instant::now();
            let mut times = Times::default();
            let share = self.share(sums.as_mut(), devices.as_mut(), group, &mut times);
            let agreed = self.reach_consensus(&share, group, &mut times)?;
            let share = match share {
                Ok(share) if agreed.failed == 0 && agreed.exhausted == 0 => share,
                share => {
                    // Abandon the sums that were begun.
                    drop(devices);
                    return Ok(self.stopped(&agreed, share.err()));
                }
            };
            let count = self.replica.objective().divisor(&agreed.loss_sum());
            let grad_norm = self.update(sums.as_mut(), devices.as_mut(), count, group, &mut times)?;
            let report = self.finish_step(&agreed, &share, grad_norm, begun, &times, group)?;
            let step = report.step;
            self.reports.say(ToCoordinator::Steps { generation, reports: vec![report] });

            let stop = agreed.stop > 0;
            if let Some(kind) = self.kept(step, agreed.save > 0 || stop) {
                self.keep(kind);
            }
            if stop || agreed.pause > 0 {
                return Ok(LeaveReason::Agreed);
            }
        }
        Ok(LeaveReason::Finished)
    }

    /// The last step of the group: the plan's, or that of the last milestone to be made again.
    fn last_step(&self) -> Step {
        let last = self.recipe.last_step();
        let repaired = self.assignment.repair.as_ref().and_then(|repair| repair.milestones.last().copied());
        repaired.map_or(last, |step| step.min(last))
    }

    /// As what the state after a step is kept, if it is. A repair only keeps the milestones that it was formed for; the
    /// others exist.
    fn kept(&self, step: Step, asked: bool) -> Option<CheckpointKind> {
        let on_grid = self.recipe.is_milestone(step);
        let is_milestone = match &self.assignment.repair {
            Some(repair) => repair.milestones.contains(&step),
            None => on_grid,
        };
        match (is_milestone, asked) {
            (true, _) => Some(CheckpointKind::Milestone),
            (false, true) if on_grid => Some(CheckpointKind::Milestone),
            (false, true) => Some(CheckpointKind::Recovery),
            (false, false) => None,
        }
    }

    /// Computes this worker's micro-batches: adds their gradients to `sums`, and their losses to the share. During the
    /// last one the devices begin to reduce the parts that are complete.
    fn share(
        &mut self,
        mut sums: Option<&mut Sums<B>>,
        mut devices: Option<&mut Devices<B>>,
        group: &dyn Collective,
        times: &mut Times,
    ) -> Result<Share, Obstacle> {
        if let Some(sums) = &mut sums {
            sums.clear();
        }
        let held_out = self.held_out_sequences()?;
        let mut consensus = StepConsensus::default();
        let step = self.step().get();
        let batches = match &mut *self.feed {
            Feed::Text(_) => Batches::OfLanes,
            Feed::Examples(lessons) => {
                let (examples, before) = lessons.update(step);
                Batches::Of(examples, before)
            }
        };
        let micro_batches = self.assignment.micro_batches.clone();
        let last = micro_batches.end - 1;
        for index in micro_batches.clone() {
            let waiting = Instant::now();
            let batch = self.batch(&batches, index)?;
            times.data += waiting.elapsed();
            let reducing = devices.as_deref_mut().filter(|_| index == last);
            let Some(batch) = batch else {
                // What has no example still takes part in the sums and in their reduction.
                if index == micro_batches.start || index == last {
                    let masked = self.nothing();
                    self.gradient(&masked, sums.as_deref_mut(), reducing, group).map_err(Obstacle::Failed)?;
                }
                continue;
            };
            let loss =
                self.gradient(&batch, sums.as_deref_mut(), reducing, group).map_err(Obstacle::Failed)?;
            consensus.add_loss(&loss, self.quantum).map_err(|sum| Obstacle::Failed(diverged(sum)))?;
        }
        consensus.cursors = self.feed.cursors();
        Ok(Share { consensus, held_out })
    }

    /// A micro-batch of an update, of which the last of an epoch may have fewer.
    fn batch(&mut self, batches: &Batches, index: u64) -> Result<Option<MicroBatch>, Obstacle> {
        let (plan, control) = (Arc::clone(&self.run.plan), self.control);
        match (&mut *self.feed, batches) {
            (Feed::Text(Reading { loader: Some(loader), lanes, .. }), Batches::OfLanes) => {
                let per_lane = (plan.train.sequences / plan.data.lanes) as usize;
                let lanes = &lanes[(index - self.assignment.micro_batches.start) as usize];
                let mut waits = || {
                    control.begin(Section::Reading);
                };
                let rows = loader.take_with_progress(lanes, per_lane, &mut waits);
                control.begin(Section::Computing);
                let rows = rows.map_err(|error| match error {
                    DataError::Exhausted { .. } => Obstacle::Exhausted(error.to_string()),
                    error => Obstacle::Failed(error.into()),
                })?;
                Ok(Some(micro_batch(&rows, plan.sequence_length())))
            }
            (Feed::Examples(lessons), Batches::Of(examples, before)) => {
                let Some(Tuning { config, .. }) = self.recipe.tuning() else { return Ok(None) };
                let first = index * config.micro_batch;
                let chosen = examples.iter().skip(first as usize).take(config.micro_batch as usize);
                let chosen: Vec<usize> = chosen.copied().collect();
                Ok(lessons.trained.batch(&chosen, before + first, config))
            }
            _ => Ok(None),
        }
    }

    /// A micro-batch that teaches nothing.
    fn nothing(&self) -> MicroBatch {
        let compares = matches!(self.replica.objective(), Objective::Preferences(_));
        masked(if compares { 2 } else { 1 }, compares)
    }

    /// Computes the gradient of a micro-batch and adds it to `sums`. Without sums, the gradient becomes the mean at
    /// once.
    fn gradient(
        &mut self,
        batch: &MicroBatch,
        sums: Option<&mut Sums<B>>,
        devices: Option<&mut Devices<B>>,
        group: &dyn Collective,
    ) -> Result<LossSum, WorkerError> {
        let Self { replica, quantum, .. } = self;
        let Some(sums) = sums else {
            let loss = replica.forward_backward(batch)?;
            replica.quantise_mean_gradient(quantum, replica.objective().divisor(&loss))?;
            return Ok(loss);
        };
        let Some(devices) = devices else {
            return Ok(replica.add_gradient(batch, sums, quantum, |_, _| {})?);
        };
        let watch = group.watch(STALL_TIMEOUT)?;
        let mut begun = Ok(());
        let loss = replica.add_gradient(batch, sums, quantum, |sums, part| {
            if begun.is_ok() {
                begun = devices.begin(sums, part, &watch);
            }
        })?;
        begun?;
        Ok(loss)
    }

    /// The sequences for the held-out loss after this step, if it is due. They are read before the update, because an
    /// error after it would cost the step. With a large corpus reading takes minutes, and the trainer keeps reporting
    /// that it waits.
    fn held_out_sequences(&mut self) -> Result<Option<Arc<[Sequence]>>, Obstacle> {
        let is_due = self.recipe.is_evaluated(self.step().next());
        let control = self.control;
        let Feed::Text(Reading { corpus, held_out: known, .. }) = &mut *self.feed else { return Ok(None) };
        if !is_due {
            return Ok(None);
        }
        if let Some(held_out) = known {
            return Ok(Some(Arc::clone(held_out)));
        }
        let corpus = &*corpus;
        let train = &self.run.plan.train;
        let (length, sequences) = (self.run.plan.sequence_length(), train.held_out_sequences as usize);
        let held_out = thread::scope(|scope| {
            let (tell, told) = crossbeam_channel::bounded(1);
            scope.spawn(move || tell.send(corpus.held_out(length, sequences)));
            let held_out = loop {
                match told.recv_timeout(TELL_EVERY) {
                    Err(RecvTimeoutError::Timeout) => control.begin(Section::Reading),
                    read => break read.expect("the reader sends its result, or panics"),
                };
            };
            control.begin(Section::Computing);
            held_out
        });
        let held_out: Arc<[Sequence]> =
            held_out.map_err(|error| Obstacle::Failed(error.into()))?.sequences.into();
        *known = Some(Arc::clone(&held_out));
        Ok(Some(held_out))
    }

    /// Sums the members' shares of the consensus over the group.
    fn reach_consensus(
        &self,
        share: &Result<Share, Obstacle>,
        group: &mut dyn Collective,
        times: &mut Times,
    ) -> Result<StepConsensus, WorkerError> {
        let requests = self.control.take_requests();
        let mut consensus = match share {
            Ok(share) => share.consensus.clone(),
            Err(_) => {
                StepConsensus { cursors: vec![0; self.position.cursors.len()], ..StepConsensus::default() }
            }
        };
        consensus.failed = i64::from(matches!(share, Err(Obstacle::Failed(_))));
        consensus.exhausted = i64::from(matches!(share, Err(Obstacle::Exhausted(_))));
        consensus.save = i64::from(requests.save);
        consensus.pause = i64::from(requests.pause);
        consensus.stop = i64::from(requests.stop);
        let mut sum = consensus.to_vec();
        let waiting = Instant::now();
        group.all_reduce(&mut sum)?;
        times.communication += waiting.elapsed();
        Ok(StepConsensus::from_slice(&sum))
    }

    /// This worker's reason to leave when the group stops before an update.
    fn stopped(&mut self, agreed: &StepConsensus, obstacle: Option<Obstacle>) -> LeaveReason {
        match obstacle {
            Some(Obstacle::Failed(error)) => error.into(),
            // The member whose share failed reports why.
            _ if agreed.failed > 0 => LeaveReason::Agreed,
            obstacle => {
                self.keep(CheckpointKind::Milestone);
                match obstacle {
                    Some(Obstacle::Exhausted(source)) => LeaveReason::Exhausted(source),
                    _ => LeaveReason::Agreed,
                }
            }
        }
    }

    /// Reduces the gradients over the group and updates the weights; returns the gradient's norm.
    fn update(
        &mut self,
        sums: Option<&mut Sums<B>>,
        devices: Option<&mut Devices<B>>,
        count: u64,
        group: &mut dyn Collective,
        times: &mut Times,
    ) -> Result<f64, WorkerError> {
        let Self { replica, quantum, control, .. } = self;
        let parameters = replica.trainable().parameters();
        let waiting = Instant::now();
        // The sum of integers does not depend on the order; what is gathered are finished floats.
        match (sums, devices) {
            // The gradient is the mean already.
            (None, _) => {}
            (Some(sums), _) if group.size() == 1 => {
                replica.set_mean_gradient(sums, 0..parameters, quantum, count);
            }
            (Some(sums), Some(devices)) => {
                control.begin(Section::Collective);
                let parts = devices.finish(group)?;
                for own in parts.iter().flat_map(|part| devices.owned(part.clone())) {
                    replica.set_mean_gradient(sums, own, quantum, count);
                }
                devices.all_gather(replica.gradient(), &parts, group)?;
                control.begin(Section::Computing);
                times.communication += waiting.elapsed();
            }
            (Some(sums), None) => {
                let own = chunks(parameters, group.size()).part(group.rank().index());
                replica.backend().clone().on_host(sums.values(), |sums| {
                    group.reduce_scatter(sums)?;
                    replica.gradient_on_host(|mean| {
                        quantum.mean_into(&sums[own.clone()], count, &mut mean[own]);
                        group.all_gather(mean)
                    })
                })?;
                times.communication += waiting.elapsed();
            }
        }
        let step = self.step().get();
        Ok(self.replica.update(self.recipe.optimizer(), self.recipe.learning_rate(step), step)?)
    }

    /// Advances the position, measures the held-out loss if it is due, and makes the report.
    fn finish_step(
        &mut self,
        agreed: &StepConsensus,
        share: &Share,
        grad_norm: f64,
        begun: Instant,
        times: &Times,
        group: &mut dyn Collective,
    ) -> Result<StepReport, WorkerError> {
        let lr = self.recipe.learning_rate(self.step().get());
        let loss = agreed.loss_sum();
        let position = &mut *self.position;
        position.step = position.step.next();
        position.tokens += loss.valid;
        position.cursors.clone_from(&agreed.cursors);
        position.quarantine = self.feed.quarantine();
        let (step, tokens) = (position.step, position.tokens);
        let elapsed = begun.elapsed();
        let held_out = share.held_out.as_deref();
        let held_out_loss = held_out.map(|sequences| self.held_out_loss(sequences, group)).transpose()?;
        let measures = self.measures(&loss, step, group)?;
        let objective = self.replica.objective();
        Ok(StepReport {
            step,
            tokens,
            loss: objective.mean_loss(&loss),
            z_loss: objective.mean_z_loss(&loss),
            grad_norm,
            lr,
            held_out_loss: held_out_loss.flatten(),
            examples: self.feed.examples_before(step.get()),
            measures,
            elapsed,
            data_wait: times.data,
            communication: times.communication,
        })
    }

    /// What a tuning stage measures beside its loss.
    fn measures(
        &mut self,
        loss: &LossSum,
        step: Step,
        group: &mut dyn Collective,
    ) -> Result<BTreeMap<String, f64>, WorkerError> {
        let Some(tuning) = self.recipe.tuning() else { return Ok(BTreeMap::new()) };
        let objective = *self.replica.objective();
        let of = |loss: &LossSum, prefix: &str| -> Vec<(String, f64)> {
            let names = objective.metric_names().iter().map(|name| format!("{prefix}{name}"));
            names.zip(objective.metrics(loss)).collect()
        };
        let mut measures = of(loss, "");
        if tuning.config.z_loss > 0.0 {
            measures.push(("z_loss".to_owned(), objective.mean_z_loss(loss)));
        }
        if self.recipe.is_evaluated(step) {
            let loss = self.evaluate(&tuning.config, group)?;
            measures.push(("eval_loss".to_owned(), objective.mean_loss(&loss)));
            measures.extend(of(&loss, "eval_"));
        }
        Ok(measures.into_iter().collect())
    }

    /// The losses of the examples that the stage is evaluated on; the members share the work.
    fn evaluate(&mut self, config: &TuneConfig, group: &mut dyn Collective) -> Result<LossSum, WorkerError> {
        let mut consensus = StepConsensus::default();
        if let Feed::Examples(lessons) = &*self.feed {
            let all: Vec<usize> = (0..lessons.evaluated.examples.len()).collect();
            let batches = all.chunks(config.micro_batch as usize);
            for chosen in batches.skip(group.rank().index()).step_by(group.size()) {
                self.control.begin(Section::Measuring);
                let Some(batch) = lessons.evaluated.batch(chosen, 0, config) else { continue };
                consensus.add_loss(&self.replica.loss(&batch)?, self.quantum).map_err(diverged)?;
            }
        }
        group.all_reduce(&mut consensus.losses)?;
        Ok(consensus.loss_sum())
    }

    /// The mean cross-entropy of the held-out sequences, in nats; the members share the work. `None` if no token is
    /// valid.
    fn held_out_loss(
        &mut self,
        sequences: &[Sequence],
        group: &mut dyn Collective,
    ) -> Result<Option<f64>, WorkerError> {
        let plan = Arc::clone(&self.run.plan);
        let length = plan.sequence_length();
        let rows = plan.train.micro_batch as usize;
        let masked =
            Sequence { inputs: vec![0; length], targets: vec![IGNORE; length], doc_starts: vec![0; length] };
        let mut consensus = StepConsensus::default();
        for batch in sequences.chunks(rows).skip(group.rank().index()).step_by(group.size()) {
            self.control.begin(Section::Measuring);
            let mut batch = batch.to_vec();
            batch.resize(rows, masked.clone());
            let loss = self.replica.loss(&micro_batch(&batch, length))?;
            consensus.add_loss(&loss, self.quantum).map_err(diverged)?;
        }
        group.all_reduce(&mut consensus.losses)?;
        let loss = consensus.loss_sum();
        Ok((loss.valid > 0).then(|| loss.mean_ce()))
    }

    /// Begins to copy the state to host memory, from where it is stored. Also reports how far the data have been read.
    fn keep(&mut self, kind: CheckpointKind) {
        if let Feed::Text(Reading { loader: Some(loader), .. }) = &*self.feed {
            self.reports.say(ToCoordinator::Reading { step: self.step(), sources: loader.readings() });
        }
        // This waits while two older states are still being stored.
        let slot = self.run.wait(snapshot_slot(self.snapshot_slots, || {
            self.control.begin(Section::Storing);
        }));
        self.control.begin(Section::Computing);
        let held = PendingSnapshot {
            checkpoint: CheckpointId::new(self.assignment.training, self.step(), self.assignment.generation),
            kind,
            layout: Arc::new(self.replica.layout().clone()),
            trainable: self.replica.trainable().parameters(),
            tensors: self.replica.copy_state(),
            train: self.position.clone(),
            store: self.run.store.clone(),
            _slot: slot,
        };
        self.reports.report(Report::Hold(held.checkpoint, Arc::new(held)));
    }
}

/// Waits for memory for another state, and calls `waits` several times a second meanwhile.
async fn snapshot_slot(slots: &Arc<Semaphore>, mut waits: impl FnMut()) -> OwnedSemaphorePermit {
    loop {
        let slot = Arc::clone(slots).acquire_owned();
        if let Ok(slot) = tokio::time::timeout(TELL_EVERY, slot).await {
            return slot.expect("the semaphore is never closed");
        }
        waits();
    }
}

/// The error for a micro-batch whose loss cannot be summed.
fn diverged(sum: f64) -> WorkerError {
    WorkerError::Diverged(format!(
        "the loss of a micro-batch is {sum}; lower max_lr or look at the data of this step"
    ))
}
