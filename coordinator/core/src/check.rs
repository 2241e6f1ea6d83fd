//! Which messages a worker may send, and when: every message is checked against its sender and the current state.
//!
//! Late messages are ignored, since networks produce them. A message that no correct worker can send ends its sender's
//! session and changes nothing else.

use std::time::Duration;

use ulmus_types::{
    CheckpointId, CheckpointKind, FileEntry, Generation, LeaveReason, Ready, Snapshot, SourceReading,
    StageName, Step, StepReport, ToCoordinator, WorkerId, WorkerStatus, for_people,
};

use crate::members::{Activity, Member};
use crate::state::Coordinator;
use crate::trainings::{Training, TrainingSettings};

/// States that a worker may announce before older ones are stored. A correct worker holds fewer.
const SNAPSHOTS: usize = 8;
/// The largest result of a job, in bytes.
const RESULT_LIMIT: usize = 4 << 20;
/// The longest duration that is believed.
const LONGEST: Duration = Duration::from_hours(24 * 366);

/// How to treat a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Act on it.
    Accept,
    /// Ignore it: it is out of date, or will be sent again.
    Stale,
    /// Expel its sender: it cannot be true, for this reason.
    Impossible(String),
    /// Refuse its sender: it was in a generation of this run that the record does not have.
    Ahead(Generation),
}

fn impossible(why: impl Into<String>) -> Verdict {
    Verdict::Impossible(why.into())
}

/// Returns from the caller if there is an objection.
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
            ToCoordinator::Hello(_) => impossible("it has already introduced itself"),
            ToCoordinator::Heartbeat(heartbeat) => {
                // A worker that is not admitted yet may come from elsewhere; that is checked when it is ready.
                let is_ahead = heartbeat.generation > self.generation && activity.is_admitted();
                if is_ahead || heartbeat.since > LONGEST {
                    return impossible("it names a group that does not exist yet");
                }
                Verdict::Accept
            }
            ToCoordinator::StoreRead(_) => {
                accept_if(*activity == Activity::Greeted, "it was not asked for this")
            }
            ToCoordinator::Unfit { .. } => {
                accept_if(!activity.is_admitted(), "it has already joined the run")
            }
            ToCoordinator::Ready(ready) => self.check_ready(worker, activity, ready),
            ToCoordinator::Notice(_) if *activity == Activity::Greeted => check_unready(member, message),
            ToCoordinator::Draining | ToCoordinator::Notice(_) => Verdict::Accept,
            _ if !activity.is_admitted() => check_unready(member, message),
            ToCoordinator::Connected(generation) => self.check_group(activity, *generation),
            ToCoordinator::Formed { generation, step } => {
                object!(self.objection_to_step(*generation, *step));
                self.check_group(activity, *generation)
            }
            ToCoordinator::Steps { generation, reports } => self.check_steps(worker, *generation, reports),
            ToCoordinator::Reading { step, sources } => self.check_reading(activity, *step, sources),
            ToCoordinator::Left { generation, step, reason } => {
                object!(self.objection_to_step(*generation, *step));
                object!(self.objection_to_end(*generation, *step, reason));
                self.check_group(activity, *generation)
            }
            ToCoordinator::Snapshot(snapshot) => self.check_snapshot(worker, snapshot),
            ToCoordinator::Written { checkpoint, files } => {
                object!(self.objection_to_files(*checkpoint, files.iter()));
                self.check_asked(worker, *checkpoint)
            }
            ToCoordinator::WriteFailed { checkpoint, .. } => self.check_asked(worker, *checkpoint),
            ToCoordinator::JobDone { job, result } => {
                if *activity != Activity::Working(job.clone()) {
                    return impossible(format!("it was not given job {}", job.name()));
                }
                if result.len() > RESULT_LIMIT {
                    return impossible(format!(
                        "its result has {} bytes, more than {RESULT_LIMIT}",
                        result.len()
                    ));
                }
                Verdict::Accept
            }
            ToCoordinator::JobFailed { job, .. } => accept_if(
                *activity == Activity::Working(job.clone()),
                &format!("it was not given job {}", job.name()),
            ),
        }
    }

    fn check_ready(&self, worker: &WorkerId, activity: &Activity, ready: &Ready) -> Verdict {
        if *activity != Activity::Warming {
            return impossible("it was not asked for this");
        }
        let only_jobs = self.members.get(worker).is_some_and(|member| member.hello.only_jobs);
        if ready.fingerprint.is_none() != only_jobs {
            return impossible("only workers that train have a fingerprint");
        }
        match ready.generation {
            Some(generation) if generation > self.generation => {
                // Only a worker that has proved that it belongs to the run can have been in one of its groups.
                let is_of_run = self.members.get(worker).is_some_and(|member| member.hello.run.is_some());
                if is_of_run {
                    Verdict::Ahead(generation)
                } else {
                    impossible("it was never in a group of this run")
                }
            }
            Some(generation) => {
                if !ready.reports.is_empty() {
                    match self.check_steps(worker, generation, &ready.reports) {
                        Verdict::Accept | Verdict::Stale => {}
                        verdict => return verdict,
                    }
                }
                let training = self.training_of(generation);
                let reported = ready.reports.last().map_or(Step::default(), |report| report.step);
                let latest = |snapshot: &Snapshot| {
                    let known = self.training(snapshot.checkpoint.training());
                    let known = known.map_or(Step::default(), |known| self.latest_possible_step(known));
                    let is_same = training.is_some_and(|t| t.name() == snapshot.checkpoint.training());
                    if is_same { known.max(reported) } else { known }
                };
                ready
                    .snapshots
                    .iter()
                    .find_map(|snapshot| self.objection_to_snapshot(worker, snapshot, latest(snapshot)))
                    .map_or(Verdict::Accept, Verdict::Impossible)
            }
            None => accept_if(
                ready.reports.is_empty() && ready.snapshots.is_empty(),
                "it reports steps, but was in no group",
            ),
        }
    }

    /// The last update that any worker can know of. Records may have been lost in a power failure before this process
    /// started, so until a step is reported, any step of the run is possible.
    fn latest_possible_step(&self, training: &Training) -> Step {
        let recorded = training.record.step;
        if self.reported == Some(training.name()) { recorded } else { training.last_step().max(recorded) }
    }

    /// What is wrong with a step that a member of a group claims to have reached.
    fn objection_to_step(&self, generation: Generation, step: Step) -> Option<String> {
        let Some(training) = self.training_of(generation) else {
            return Some(format!("there is no group of generation {generation}"));
        };
        let is_ahead = step > self.latest_possible_step(training);
        is_ahead.then(|| ahead(step, training))
    }

    /// Checks a message that only a current member of this generation's group may send.
    fn check_group(&self, activity: &Activity, generation: Generation) -> Verdict {
        match activity {
            Activity::InGroup(of) if *of == generation => Verdict::Accept,
            _ if generation > self.generation => impossible(format!("there is no generation {generation}")),
            _ => Verdict::Stale,
        }
    }

    fn check_steps(&self, worker: &WorkerId, generation: Generation, reports: &[StepReport]) -> Verdict {
        if !self.was_member(worker, generation) {
            return impossible(format!("it was not a member of generation {generation}"));
        }
        let (Some(first), Some(training)) = (reports.first(), self.training_of(generation)) else {
            return Verdict::Stale;
        };
        let (name, last) = (training.name(), training.last_step());
        if !reports.iter().all(|report| report.step > Step::default() && report.step <= last) {
            return impossible(format!("stage {name} has steps 1 to {last}"));
        }
        if first.step > self.latest_possible_step(training).next() {
            return impossible(format!(
                "step {} must be reported before step {}",
                training.record.step.next(),
                first.step
            ));
        }
        if reports
            .windows(2)
            .any(|pair| pair[1].step != pair[0].step.next() || pair[1].tokens <= pair[0].tokens)
        {
            return impossible("its steps are not consecutive");
        }
        reports
            .iter()
            .find_map(|report| objection_to_report(report, &training.settings))
            .map_or(Verdict::Accept, Verdict::Impossible)
    }

    fn check_reading(&self, activity: &Activity, step: Step, sources: &[SourceReading]) -> Verdict {
        if self.training(StageName::pretraining()).is_none_or(|training| step > training.last_step()) {
            return impossible(format!("there is no step {step} of pretraining"));
        }
        if sources.len() > self.settings.sources.len() {
            return impossible(format!(
                "it reports {} sources, and the plan has {}",
                sources.len(),
                self.settings.sources.len()
            ));
        }
        for reading in sources {
            if !self.settings.sources.contains(&reading.source) {
                return impossible("the plan has no such source");
            }
            let is_long = reading.waited > LONGEST || reading.elapsed > LONGEST * 10;
            if !reading.epochs.is_finite() || reading.epochs < 0.0 || is_long {
                return impossible("it has impossible numbers");
            }
        }
        match activity {
            Activity::InGroup(_) => Verdict::Accept,
            _ => Verdict::Stale,
        }
    }

    fn objection_to_end(&self, generation: Generation, step: Step, reason: &LeaveReason) -> Option<String> {
        let training = self.training_of(generation)?;
        let (name, reached) = (training.name(), training.record.step);
        match reason {
            LeaveReason::Finished => {
                let last = training.last_step();
                let is_repaired = training.record.trained.is_some_and(|trained| step <= trained);
                (step != last && !is_repaired).then(|| format!("{name} ends at step {last}, not {step}"))
            }
            LeaveReason::Exhausted(_) if !training.settings.may_exhaust => {
                Some("no source of the plan can run out".to_owned())
            }
            LeaveReason::Exhausted(_) if step < reached => {
                Some(format!("{name} has already reached step {reached}, and this is step {step}"))
            }
            LeaveReason::BadUnit(unit, _) if !self.settings.sources.contains(&unit.source) => {
                Some("the plan has no such source".to_owned())
            }
            _ => None,
        }
    }

    fn check_snapshot(&self, worker: &WorkerId, snapshot: &Snapshot) -> Verdict {
        let training = self.training(snapshot.checkpoint.training());
        let latest = training.map_or(Step::default(), |training| self.latest_possible_step(training));
        object!(self.objection_to_snapshot(worker, snapshot, latest));
        if self.snapshots.held_by(worker) >= SNAPSHOTS {
            return impossible(format!("it already holds {SNAPSHOTS} states"));
        }
        Verdict::Accept
    }

    /// What is wrong with a snapshot, if anything. `last` is the last step that can have been reported.
    fn objection_to_snapshot(&self, worker: &WorkerId, snapshot: &Snapshot, last: Step) -> Option<String> {
        let Snapshot { checkpoint, kind, files, .. } = snapshot;
        let step = checkpoint.step();
        if !self.was_member(worker, checkpoint.generation()) {
            return Some(format!("it was not a member of generation {}", checkpoint.generation()));
        }
        let training = self
            .training_of(checkpoint.generation())
            .filter(|training| training.name() == checkpoint.training());
        let Some(training) = training else {
            return Some(format!(
                "generation {} did not train {}",
                checkpoint.generation(),
                checkpoint.training()
            ));
        };
        if step > last {
            return Some(ahead(step, training));
        }
        let on_grid = training.is_milestone(step);
        // A source that runs out ends the run at a step that the plan does not name.
        let may_be = match kind {
            CheckpointKind::Milestone => on_grid || training.settings.may_exhaust,
            CheckpointKind::Recovery => !on_grid,
        };
        if !may_be {
            return Some(
                format!("the state after step {step} cannot be a {kind:?} checkpoint").to_lowercase(),
            );
        }
        let expected = &training.settings.checkpoint_files;
        (files != expected)
            .then(|| format!("its files are not the {} files of this plan's checkpoints", expected.len()))
    }

    /// Checks a message that only a worker that was asked for parts of a checkpoint may send.
    fn check_asked(&self, worker: &WorkerId, checkpoint: CheckpointId) -> Verdict {
        match self.snapshots.was_asked(checkpoint, worker) {
            Some(true) => Verdict::Accept,
            // The coordinator may have asked it before it restarted.
            _ if self.was_member(worker, checkpoint.generation()) => Verdict::Stale,
            _ => impossible(format!("it was not a member of generation {}", checkpoint.generation())),
        }
    }

    fn objection_to_files<'a>(
        &self,
        checkpoint: CheckpointId,
        mut files: impl Iterator<Item = (&'a String, &'a FileEntry)>,
    ) -> Option<String> {
        let expected =
            self.training(checkpoint.training()).map(|training| &training.settings.checkpoint_files);
        let is_expected = |name| expected.is_some_and(|expected| expected.contains(name));
        files
            .any(|(name, entry)| !is_expected(name) || entry.bytes > i64::MAX as u64)
            .then(|| "checkpoints of this plan have no such file".to_owned())
    }
}

fn ahead(step: Step, training: &Training) -> String {
    format!("it claims {step} updates, but only {} were reported", training.record.step)
}

fn objection_to_report(report: &StepReport, training: &TrainingSettings) -> Option<String> {
    let StepReport { step, tokens, loss, z_loss, grad_norm, lr, held_out_loss, measures, .. } = report;
    let numbers = [*loss, *z_loss, *grad_norm, *lr, held_out_loss.unwrap_or(0.0)];
    let numbers = numbers.iter().chain(measures.values());
    if let Some(number) = numbers.copied().find(|number| !number.is_finite()) {
        return Some(format!("step {step} reports the value {number}"));
    }
    if let Some(name) = measures.keys().find(|name| !training.measures.contains(*name)) {
        return Some(format!(
            "step {step} reports {:?}, which its stage does not measure",
            for_people(name, 100)
        ));
    }
    if *grad_norm < 0.0 || *lr < 0.0 {
        return Some(format!(
            "step {step} reports a gradient norm of {grad_norm} and a learning rate of {lr}"
        ));
    }
    let most = step.get().saturating_mul(training.tokens_per_step);
    if *tokens == 0 || *tokens > most || report.examples > most {
        return Some(format!("{step} steps cannot have {tokens} tokens of {} examples", report.examples));
    }
    let longest = report.elapsed.max(report.data_wait).max(report.communication);
    (longest > LONGEST).then(|| format!("step {step} claims to have taken {longest:?}"))
}

fn accept_if(is_possible: bool, otherwise: &str) -> Verdict {
    if is_possible { Verdict::Accept } else { impossible(otherwise) }
}

/// Checks a message from a worker that is not ready yet. One whose connection broke while it trained may report that it
/// left.
fn check_unready(member: &Member, message: &ToCoordinator) -> Verdict {
    match message {
        ToCoordinator::Left { generation, .. }
            if member.hello.status == WorkerStatus::Training(*generation) =>
        {
            Verdict::Accept
        }
        // It sends everything else again when it is ready.
        _ if member.hello.run.is_some() => Verdict::Stale,
        _ => impossible("it is not ready"),
    }
}
