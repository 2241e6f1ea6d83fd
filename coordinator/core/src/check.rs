//! What a worker may say, and when: every message is held against who says it and what is possible now.
//!
//! A message that is late is passed by in silence, since a network makes such messages. One that no worker that works
//! as it should can say ends the session of whoever said it, and changes nothing.

use std::time::Duration;

use ulmus_types::{
    CheckpointId, CheckpointKind, FileEntry, Generation, LeaveReason, Ready, Snapshot, SourceReading, Step,
    StepReport, ToCoordinator, WorkerId, WorkerStatus,
};

use crate::coordinator::Coordinator;
use crate::members::{Activity, Member};

/// States that a worker may announce before older ones are stored: it keeps fewer.
const SNAPSHOTS: usize = 8;
/// The largest result of a job, in bytes.
const RESULT_LIMIT: usize = 4 << 20;
/// The longest that anything is believed to have taken.
const LONGEST: Duration = Duration::from_hours(24 * 366);

/// What is to be done with a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may be said now.
    Heard,
    /// It was true once, or will be told again.
    Stale,
    /// It cannot be true; why.
    Impossible(String),
    /// It comes from a group of this run that the record does not have.
    Ahead(Generation),
}

fn impossible(why: impl Into<String>) -> Verdict {
    Verdict::Impossible(why.into())
}

/// Goes on if there is no objection.
macro_rules! object {
    ($objection:expr) => {
        if let Some(why) = $objection {
            return impossible(why);
        }
    };
}

impl Coordinator {
    pub(crate) fn check(&self, worker: &WorkerId, message: &ToCoordinator) -> Verdict {
        let Some(member) = self.members.get(worker) else { return Verdict::Stale };
        let activity = &member.activity;
        match message {
            ToCoordinator::Hello(_) => impossible("it has introduced itself already"),
            ToCoordinator::Heartbeat(heartbeat) => {
                // Whoever comes from elsewhere says so when it is ready.
                let is_ahead = heartbeat.generation > self.generation && activity.is_admitted();
                if is_ahead || heartbeat.since > LONGEST {
                    return impossible("it names a group that does not exist yet");
                }
                Verdict::Heard
            }
            ToCoordinator::StoreRead(_) => when(*activity == Activity::Greeted, "it was not asked"),
            ToCoordinator::Unfit { .. } => when(!activity.is_admitted(), "it has taken up the run already"),
            ToCoordinator::Ready(ready) => self.check_ready(worker, activity, ready),
            ToCoordinator::Notice(_) if *activity == Activity::Greeted => check_unready(member, message),
            ToCoordinator::Draining | ToCoordinator::Notice(_) => Verdict::Heard,
            _ if !activity.is_admitted() => check_unready(member, message),
            ToCoordinator::Connected(generation) => self.check_group(activity, *generation),
            ToCoordinator::Formed { generation, step } => {
                object!(self.objection_to_step(*step, self.latest()));
                self.check_group(activity, *generation)
            }
            ToCoordinator::Steps { generation, reports } => self.check_steps(worker, *generation, reports),
            ToCoordinator::Reading { step, sources } => self.check_reading(activity, *step, sources),
            ToCoordinator::Left { generation, step, reason } => {
                object!(self.objection_to_step(*step, self.latest()));
                object!(self.objection_to_end(*step, reason));
                self.check_group(activity, *generation)
            }
            ToCoordinator::Snapshot(snapshot) => self.check_snapshot(worker, snapshot),
            ToCoordinator::Written { checkpoint, files } => {
                object!(self.objection_to_files(files.iter()));
                self.check_asked(worker, *checkpoint)
            }
            ToCoordinator::WriteFailed { checkpoint, .. } => self.check_asked(worker, *checkpoint),
            ToCoordinator::JobDone { job, result } => {
                if *activity != Activity::Working(job.clone()) {
                    return impossible(format!("{} was not asked of it", job.name()));
                }
                if result.len() > RESULT_LIMIT {
                    return impossible(format!("it has {} bytes", result.len()));
                }
                Verdict::Heard
            }
            ToCoordinator::JobFailed { job, .. } => when(
                *activity == Activity::Working(job.clone()),
                &format!("{} was not asked of it", job.name()),
            ),
        }
    }

    fn check_ready(&self, worker: &WorkerId, activity: &Activity, ready: &Ready) -> Verdict {
        if *activity != Activity::Warming {
            return impossible("it was not asked");
        }
        match ready.generation {
            Some(generation) if generation > self.generation => {
                // Only who has proved that it belongs to the run is believed to have been in a group of it.
                let is_of_run = self.members.get(worker).is_some_and(|member| member.hello.run.is_some());
                if is_of_run {
                    Verdict::Ahead(generation)
                } else {
                    impossible("it was in no group of this run")
                }
            }
            Some(generation) => {
                if !ready.reports.is_empty() {
                    match self.check_steps(worker, generation, &ready.reports) {
                        Verdict::Heard | Verdict::Stale => {}
                        verdict => return verdict,
                    }
                }
                let last = ready.reports.last().map_or(self.step, |report| report.step).max(self.latest());
                ready
                    .snapshots
                    .iter()
                    .find_map(|snapshot| self.objection_to_snapshot(worker, snapshot, last))
                    .map_or(Verdict::Heard, Verdict::Impossible)
            }
            None => when(
                ready.reports.is_empty() && ready.snapshots.is_empty(),
                "it was in no group and reports steps",
            ),
        }
    }

    /// The last update that anybody can know of. What was recorded may have been lost with the machine's power, before this
    /// process began.
    fn latest(&self) -> Step {
        if self.has_heard_steps { self.step } else { Step::new(self.settings.iterations).max(self.step) }
    }

    fn objection_to_step(&self, step: Step, latest: Step) -> Option<String> {
        (step > latest).then(|| format!("{step} updates were not reported; {} were", self.step))
    }

    /// What only a member of the group of this generation says, while it is one.
    fn check_group(&self, activity: &Activity, generation: Generation) -> Verdict {
        match activity {
            Activity::InGroup(of) if *of == generation => Verdict::Heard,
            _ if generation > self.generation => impossible(format!("there is no generation {generation}")),
            _ => Verdict::Stale,
        }
    }

    fn check_steps(&self, worker: &WorkerId, generation: Generation, reports: &[StepReport]) -> Verdict {
        if !self.was_member(worker, generation) {
            return impossible(format!("it was no member of generation {generation}"));
        }
        let Some(first) = reports.first() else { return Verdict::Stale };
        let steps = 1..=self.settings.iterations;
        if !reports.iter().all(|report| steps.contains(&report.step.get())) {
            return impossible(format!("the run has steps 1 to {}", self.settings.iterations));
        }
        if first.step > self.latest().next() {
            return impossible(format!(
                "step {} was not reported before step {}",
                self.step.next(),
                first.step
            ));
        }
        if reports
            .windows(2)
            .any(|pair| pair[1].step != pair[0].step.next() || pair[1].tokens <= pair[0].tokens)
        {
            return impossible("its steps do not follow each other");
        }
        reports
            .iter()
            .find_map(|report| self.objection_to_report(report))
            .map_or(Verdict::Heard, Verdict::Impossible)
    }

    fn objection_to_report(&self, report: &StepReport) -> Option<String> {
        let StepReport { step, tokens, loss, z_loss, grad_norm, lr, held_out_loss, .. } = report;
        let numbers = [*loss, *z_loss, *grad_norm, *lr, held_out_loss.unwrap_or(0.0)];
        if let Some(number) = numbers.into_iter().find(|number| !number.is_finite()) {
            return Some(format!("step {step} has a number that is {number}"));
        }
        if *grad_norm < 0.0 || *lr < 0.0 {
            return Some(format!("step {step} has a norm of {grad_norm} and a learning rate of {lr}"));
        }
        if *tokens == 0 || *tokens > step.get().saturating_mul(self.settings.tokens_per_step) {
            return Some(format!("{tokens} tokens cannot be read in {step} steps"));
        }
        let longest = report.elapsed.max(report.data_wait).max(report.communication);
        (longest > LONGEST).then(|| format!("step {step} took {longest:?}"))
    }

    fn check_reading(&self, activity: &Activity, step: Step, sources: &[SourceReading]) -> Verdict {
        if step.get() > self.settings.iterations {
            return impossible(format!("there is no step {step}"));
        }
        if sources.len() > self.settings.sources.len() {
            return impossible(format!("the plan has {} sources", self.settings.sources.len()));
        }
        for reading in sources {
            if !self.settings.sources.contains(&reading.source) {
                return impossible("the plan has no such source");
            }
            let is_long = reading.waited > LONGEST || reading.elapsed > LONGEST * 10;
            if !reading.epochs.is_finite() || reading.epochs < 0.0 || is_long {
                return impossible("it has numbers that cannot be");
            }
        }
        match activity {
            Activity::InGroup(_) => Verdict::Heard,
            _ => Verdict::Stale,
        }
    }

    fn objection_to_end(&self, step: Step, reason: &LeaveReason) -> Option<String> {
        match reason {
            LeaveReason::Finished => {
                let last = Step::new(self.settings.iterations);
                let is_repaired = self.trained.is_some_and(|trained| step <= trained);
                (step != last && !is_repaired)
                    .then(|| format!("the run ends at step {last}, and this is {step}"))
            }
            LeaveReason::Exhausted(_) if !self.settings.may_exhaust => {
                Some("no source of the plan can be used up".to_owned())
            }
            LeaveReason::Exhausted(_) if step < self.step => {
                Some(format!("the run has come to step {}, and this is {step}", self.step))
            }
            LeaveReason::BadUnit(unit, _) if !self.settings.sources.contains(&unit.source) => {
                Some("the plan has no such source".to_owned())
            }
            _ => None,
        }
    }

    fn check_snapshot(&self, worker: &WorkerId, snapshot: &Snapshot) -> Verdict {
        object!(self.objection_to_snapshot(worker, snapshot, self.latest()));
        if self.snapshots.held_by(worker) >= SNAPSHOTS {
            return impossible(format!("it holds {SNAPSHOTS} states already"));
        }
        Verdict::Heard
    }

    /// `last` is the last step that was reported.
    fn objection_to_snapshot(&self, worker: &WorkerId, snapshot: &Snapshot, last: Step) -> Option<String> {
        let Snapshot { checkpoint, kind, files, .. } = snapshot;
        let step = checkpoint.step();
        if !self.was_member(worker, checkpoint.generation()) {
            return Some(format!("it was no member of generation {}", checkpoint.generation()));
        }
        if let Some(why) = self.objection_to_step(step, last) {
            return Some(why);
        }
        let every = self.settings.milestone_every.max(1);
        let on_grid =
            step.get() > 0 && (step.get().is_multiple_of(every) || step.get() == self.settings.iterations);
        // A source that is used up ends the run at a step that no plan knows.
        let may_be = match kind {
            CheckpointKind::Milestone => on_grid || self.settings.may_exhaust,
            CheckpointKind::Recovery => !on_grid,
        };
        if !may_be {
            return Some(format!("the state after step {step} is no {kind:?}").to_lowercase());
        }
        (*files != self.settings.checkpoint_files).then(|| {
            format!("a checkpoint of this plan has {} other files", self.settings.checkpoint_files.len())
        })
    }

    /// What only a worker says that was asked for parts of a checkpoint.
    fn check_asked(&self, worker: &WorkerId, checkpoint: CheckpointId) -> Verdict {
        match self.snapshots.was_asked(checkpoint, worker) {
            Some(true) => Verdict::Heard,
            // An earlier coordinator may have asked it.
            _ if self.was_member(worker, checkpoint.generation()) => Verdict::Stale,
            _ => impossible(format!("it was no member of generation {}", checkpoint.generation())),
        }
    }

    fn objection_to_files<'a>(
        &self,
        mut files: impl Iterator<Item = (&'a String, &'a FileEntry)>,
    ) -> Option<String> {
        files
            .any(|(name, entry)| {
                !self.settings.checkpoint_files.contains(name) || entry.bytes > i64::MAX as u64
            })
            .then(|| "a checkpoint has no such file".to_owned())
    }
}

fn when(is_possible: bool, otherwise: &str) -> Verdict {
    if is_possible { Verdict::Heard } else { impossible(otherwise) }
}

/// A worker that was training when its connection broke may be heard before it is ready again.
fn check_unready(member: &Member, message: &ToCoordinator) -> Verdict {
    match message {
        ToCoordinator::Left { generation, .. }
            if member.hello.status == WorkerStatus::Training(*generation) =>
        {
            Verdict::Heard
        }
        // It tells them again when it is ready.
        _ if member.hello.run.is_some() => Verdict::Stale,
        _ => impossible("it is not ready"),
    }
}
