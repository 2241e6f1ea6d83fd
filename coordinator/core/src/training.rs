//! The training group: forming it, recording its steps, making requests of it, and ending it.

use std::collections::BTreeSet;
use std::time::Duration;

use ulmus_types::{
    BadUnit, CONNECT_WITHIN, ErrorKind, ExitStatus, Generation, GroupRequest, LeaveReason, Rank, Repair,
    Step, StepReport, ToWorker, WorkerId, WorkerStatus, for_people,
};

use crate::effect::{Effect, Notification};
use crate::group::{self, Group, Suspicion};
use crate::members::{Activity, Fault, Member, Roster};
use crate::state::{Coordinator, Life, TEXT_LIMIT};
use crate::trainings::Training;

/// After this many groups in a row without an update, the run stops.
const FUTILE_GROUPS: u32 = 10;
/// Number of updates from which the expected time of a step is derived.
const TIMED_UPDATES: usize = 32;

impl Coordinator {
    /// Ends the group. With `abort`, its members are told to leave at once; otherwise they leave by themselves.
    pub(crate) fn dissolve(&mut self, why: &str, abort: bool, now: Duration) {
        let waiting: BTreeSet<WorkerId> = self
            .group
            .members()
            .into_iter()
            .filter(|id| {
                self.members.get(id).is_some_and(|m| m.activity == Activity::InGroup(self.generation))
            })
            .collect();
        if abort {
            for worker in &waiting {
                self.send(worker, ToWorker::Abort(self.generation));
            }
        }
        self.emit(Notification::GroupEnded(self.generation, why.to_owned()));
        self.group = Group::Dissolving { waiting, since: now };
    }

    pub(crate) fn on_connected(&mut self, worker: &WorkerId, generation: Generation) {
        if generation == self.generation
            && let Group::Forming { members, connected, .. } = &mut self.group
            && members.contains(worker)
        {
            connected.insert(worker.clone());
        }
    }

    pub(crate) fn on_formed(&mut self, worker: &WorkerId, generation: Generation, step: Step, now: Duration) {
        if generation != self.generation {
            return;
        }
        let Group::Forming { members, formed, .. } = &mut self.group else { return };
        if members.contains(worker) {
            formed.insert(worker.clone());
        }
        if formed.len() == members.len() {
            let members = std::mem::take(members);
            self.train(members, step, now);
        }
    }

    /// A group trains from now on.
    pub(crate) fn train(&mut self, members: Vec<WorkerId>, step: Step, now: Duration) {
        let (generation, size) = (self.generation, members.len());
        self.group = Group::Training { members, since: now, pausing: false };
        if let Some(training) = self.training_of(generation) {
            let (training, last) = (training.name(), training.last_step());
            self.emit(Notification::GroupFormed { generation, size, training, step, last });
        }
    }

    /// Records reports, also those of groups that have ended: any worker that has them took part in the step.
    pub(crate) fn on_steps(&mut self, generation: Generation, reports: Vec<StepReport>) {
        let (Some(first), Some(last)) = (reports.first(), reports.last()) else { return };
        let Some(training) = self.training_of(generation) else { return };
        let (first, last, recorded) = (first.step, last.step, training.record.step);
        let (name, micro_batches) = (training.name(), training.settings.micro_batches);
        if first > recorded.next() {
            self.emit(Notification::Alarm(format!(
                "the record lacks steps {} to {}, which were lost when the coordinator's machine failed; training is not affected",
                recorded.next(),
                first.get() - 1
            )));
        }
        self.reported = Some(name);
        if last > recorded {
            self.futile_groups = 0;
            self.contradictions = 0;
            self.failures.clear();
        }
        if generation == self.generation
            && let Group::Training { members, .. } = &self.group
        {
            self.proven.clone_from(members);
            let share = micro_batches.div_ceil(members.len() as u64).max(1);
            for report in &reports {
                self.micro_batch_times
                    .push_back(report.elapsed.saturating_sub(report.data_wait) / share as u32);
            }
            while self.micro_batch_times.len() > TIMED_UPDATES {
                self.micro_batch_times.pop_front();
            }
        }
        if let Some(training) = self.training_mut(name) {
            training.record.step = recorded.max(last);
        }
        self.effect(Effect::SaveSteps(name, generation, reports));
        for member in self.members.ids() {
            self.send(&member, ToWorker::Acknowledge(name, last));
        }
    }

    pub(crate) fn on_left(
        &mut self,
        worker: &WorkerId,
        generation: Generation,
        step: Step,
        reason: LeaveReason,
        now: Duration,
    ) {
        match self.members.get(worker).map(|member| &member.activity) {
            Some(Activity::InGroup(of)) if *of == generation => {
                self.members.set(worker, Activity::Idle, now);
            }
            // It reconnected during training, and left the group before it was ready again.
            Some(Activity::Greeted | Activity::Warming) => {
                if let Some(member) = self.members.get_mut(worker) {
                    member.hello.status = WorkerStatus::Idle;
                }
                return;
            }
            _ => return,
        }
        if generation != self.generation {
            return;
        }
        match &reason {
            LeaveReason::Finished | LeaveReason::Exhausted(_) => self.on_trained(generation, step, &reason),
            LeaveReason::Failed { kind, message } => {
                if self.on_training_failed(worker, step, *kind, message, now) {
                    return;
                }
            }
            LeaveReason::BadUnit(unit, why) => {
                let why = for_people(why, TEXT_LIMIT);
                if !self.quarantine_unit(unit, &why) {
                    let message = self.too_many_bad_units(&why);
                    return self
                        .exit(ExitStatus::Corrupt, format!("training stopped after step {step}: {message}"));
                }
            }
            LeaveReason::Lost { suspect: Some((rank, blame)), .. } => {
                if let Some(of) = self.worker_with_rank(generation, *rank) {
                    self.suspicions.push(Suspicion { by: worker.clone(), of, blame: *blame });
                }
            }
            LeaveReason::Agreed | LeaveReason::Lost { suspect: None, .. } => {}
        }
        match &mut self.group {
            Group::Dissolving { waiting, .. } => {
                waiting.remove(worker);
            }
            Group::Absent { .. } => {}
            _ => {
                let (why, abort) = match reason {
                    LeaveReason::Lost { message, .. } => {
                        (format!("{}: {}", worker.name(), for_people(&message, TEXT_LIMIT)), true)
                    }
                    LeaveReason::BadUnit(unit, _) => (format!("{unit} is skipped from now on"), true),
                    LeaveReason::Failed { .. } => (format!("{} could not continue", worker.name()), true),
                    LeaveReason::Agreed => (format!("paused at step {step}"), false),
                    _ => (format!("finished at step {step}"), false),
                };
                self.dissolve(&why, abort, now);
            }
        }
    }

    /// The worker that had a rank in a generation.
    fn worker_with_rank(&self, generation: Generation, rank: Rank) -> Option<WorkerId> {
        self.rosters.get(&generation)?.members.get(rank.index()).cloned()
    }

    /// A group has finished: every update is done, or some were repeated.
    fn on_trained(&mut self, generation: Generation, step: Step, reason: &LeaveReason) {
        let Some(training) = self.training_of(generation) else { return };
        let (name, last) = (training.name(), training.last_step());
        if training.record.trained.is_some() {
            return;
        }
        if let LeaveReason::Exhausted(source) = reason {
            let source = for_people(source, TEXT_LIMIT);
            self.emit(Notification::Info(format!("{name} ends at step {step} of {last}: {source}")));
        }
        if let Some(training) = self.training_mut(name) {
            training.record.trained = Some(step);
        }
        self.effect(Effect::SaveTrained(name, step));
    }

    /// Training failed on a worker, not on the others. The worker alone may be at fault, so another group tries without
    /// it if there are enough other workers. Returns whether the run has ended instead.
    fn on_training_failed(
        &mut self,
        worker: &WorkerId,
        step: Step,
        kind: ErrorKind,
        message: &str,
        now: Duration,
    ) -> bool {
        let message = for_people(message, TEXT_LIMIT);
        let message = format!("training stopped after step {step} on {}: {message}", worker.name());
        self.failures.insert(worker.clone(), (kind, message.clone()));
        let others = self
            .members
            .iter()
            .filter(|(id, member)| {
                member.activity.is_admitted()
                    && !member.hello.only_jobs
                    && !member.draining
                    && !self.failures.contains_key(id)
            })
            .count();
        if self.failures.len() > 1 || others < self.settings.min_workers {
            self.exit(kind.into(), message);
            return true;
        }
        self.emit(Notification::Alarm(format!("{message}; other workers try the step again")));
        self.sit_out(worker, Fault::Unworkable, "training failed on it", now);
        false
    }

    fn too_many_bad_units(&self, why: &str) -> String {
        match self.settings.bad_units {
            0 => format!("{why}; or set data.on_bad_unit = \"quarantine\" to skip such units"),
            most => format!("{why}; data.max_bad_units = {most} allows no more units to be skipped"),
        }
    }

    /// Quarantines a unit: every worker skips it from now on. Returns `false` if the plan allows no more such units.
    pub(crate) fn quarantine_unit(&mut self, unit: &BadUnit, why: &str) -> bool {
        // Several members of a group may have reported it.
        if self.quarantine.contains_key(unit) {
            return true;
        }
        if self.quarantine.len() >= self.settings.bad_units {
            return false;
        }
        // The next group will get further, and the number of such units is limited.
        self.futile_groups = 0;
        self.quarantine.insert(unit.clone(), why.to_owned());
        self.effect(Effect::SaveQuarantine(self.quarantine.clone()));
        self.emit(Notification::Info(format!("{unit} is skipped from now on: {why}")));
        true
    }

    /// After a group has ended, excludes workers with which others could not work from the next one.
    pub(crate) fn judge_suspicions(&mut self, now: Duration) {
        let suspicions = std::mem::take(&mut self.suspicions);
        let connected = |id: &WorkerId| self.members.get(id).is_some();
        let between_living: Vec<Suspicion> =
            suspicions.into_iter().filter(|said| connected(&said.by) && connected(&said.of)).collect();
        for worker in group::culprits(&between_living, &self.proven) {
            let said: BTreeSet<String> = between_living
                .iter()
                .filter(|said| said.of == worker || said.by == worker)
                .map(|said| format!("{} says that {} is {:?}", said.by.name(), said.of.name(), said.blame))
                .collect();
            let why = said.into_iter().collect::<Vec<_>>().join(", ").to_lowercase();
            self.sit_out(&worker, Fault::Unworkable, &why, now);
        }
    }

    /// Workers that may be in the next group.
    pub(crate) fn candidates(&self, now: Duration) -> Vec<WorkerId> {
        let mut available = self.members.available(now);
        available.retain(|worker| self.may_train(worker));
        if available.len() >= self.settings.min_workers {
            return available;
        }
        let mut available = self.members.available_if_needed(now);
        available.retain(|worker| self.may_train(worker));
        available
    }

    /// Whether a worker trains at all, and nothing is measured on its machine now.
    fn may_train(&self, worker: &WorkerId) -> bool {
        let trains = |member: &Member| !member.hello.only_jobs && !self.is_measured(member);
        self.members.get(worker).is_some_and(trains)
    }

    /// Forms a group when training is due and there are enough idle workers.
    pub(crate) fn form_group(&mut self, now: Duration) {
        let Some(training) = self.due_training() else { return };
        let (name, recorded, micro_batches) =
            (training.name(), training.record.step, training.settings.micro_batches);
        let (repair, had_checkpoints) = (training.repair(), training.record.had_checkpoints);
        let mut idle = self.candidates(now);
        let Group::Absent { enough_since } = &mut self.group else { return };
        if idle.len() < self.settings.min_workers {
            *enough_since = None;
            return;
        }
        let since = *enough_since.get_or_insert(now);
        // Later groups use the workers that are there: the survivors of a loss do not wait for a replacement.
        let first = !self.had_a_group;
        if first && idle.len() < self.settings.expected_workers && now < since + self.settings.rejoin_window {
            return;
        }
        if self.futile_groups == FUTILE_GROUPS {
            let message = format!("{FUTILE_GROUPS} groups in a row made no progress; see the workers' logs");
            return self.exit(ExitStatus::Failed, message);
        }
        self.futile_groups += 1;
        self.had_a_group = true;
        if self.rosters.get(&self.generation).is_some_and(|roster| roster.training != name) {
            // What was learned of the steps of another stage says nothing about this one.
            self.micro_batch_times.clear();
            self.failures.clear();
        }
        // Proven workers get the first ranks; one of them has the state.
        idle.sort_by_key(|worker| !self.proven.contains(worker));
        idle.truncate(micro_batches as usize);
        self.generation = self.generation.next();
        let roster = Roster { training: name, members: idle.clone() };
        self.effect(Effect::SaveGeneration(self.generation, roster.clone()));
        self.remember_roster(self.generation, roster);
        if let Some(Repair { milestones }) = &repair {
            let steps: Vec<String> = milestones.iter().map(ToString::to_string).collect();
            let noun = if steps.len() == 1 { "milestone of step" } else { "milestones of steps" };
            let text = format!("training again for the {noun} {}", steps.join(", "));
            self.emit(Notification::Alarm(text));
        }
        let origin = self.graph().stage(&name).and_then(|stage| stage.begins_from(&self.milestones()));
        let task = group::Task {
            training: name,
            from: origin,
            generation: self.generation,
            key: self.settings.secret.group(self.generation),
            micro_batches,
            recorded,
            may_begin: self.settings.from_start || !had_checkpoints || repair.is_some(),
            repair,
        };
        for (worker, assignment) in task.assignments(&idle, &self.members) {
            self.members.set(&worker, Activity::InGroup(self.generation), now);
            self.send(&worker, ToWorker::Assign(assignment));
        }
        self.group = Group::Forming {
            members: idle,
            connected: BTreeSet::new(),
            formed: BTreeSet::new(),
            until: now + CONNECT_WITHIN,
        };
    }

    /// The stage for which a group may be formed.
    pub(crate) fn due_training(&self) -> Option<&Training> {
        let training = self.current()?;
        let stage = self.graph().stage(&training.name())?;
        let is_due = self.life == Life::Running
            && training.record.updates.is_some()
            && self.jobs.training_may_begin(stage, &self.progress())
            && (training.record.trained.is_none() || self.snapshots.is_empty());
        is_due.then_some(training)
    }

    /// Whether every stage that trains is over.
    pub(crate) fn is_trained_and_stored(&self) -> bool {
        self.current().is_none()
    }

    /// Requests what is due from a training group, which does it at the end of a step.
    pub(crate) fn request_from_group(&mut self, now: Duration) {
        let may_join = self.members.available(now).iter().any(|worker| self.may_train(worker));
        let is_storing = !self.snapshots.is_empty();
        let most = self.training_of(self.generation).map_or(0, |training| training.settings.micro_batches);
        let Group::Training { members, pausing, .. } = &mut self.group else { return };
        let is_draining = |id: &WorkerId| self.members.get(id).is_some_and(|member| member.draining);
        let has_room = (members.len() as u64) < most;
        let request = if *pausing {
            return;
        } else if self.life != Life::Running || members.iter().any(is_draining) {
            // Afterwards the leaving member's state is stored, or held by those that stay.
            GroupRequest::Stop
        } else if may_join && has_room {
            GroupRequest::Pause
        } else if now >= self.saved_at + self.settings.recovery && !is_storing {
            GroupRequest::Save
        } else {
            return;
        };
        *pausing = request != GroupRequest::Save;
        self.saved_at = now;
        for member in members.clone() {
            self.send(&member, ToWorker::Request(self.generation, request));
        }
    }
}
