//! Jobs: which worker does which, and what becomes of the results.

use std::time::Duration;

use ulmus_types::{
    BadUnit, CheckpointId, ErrorKind, ExitStatus, Job, JobKind, JobPhase, ToWorker, WorkerId, for_people,
};

use crate::checkpoints::whole_seconds;
use crate::effect::{Effect, Notification};
use crate::jobs::Stage;
use crate::members::{Activity, Member};
use crate::state::{Coordinator, TEXT_LIMIT};

impl Coordinator {
    /// A worker has ended a job and can take other work. Returns whether its result counts, which it does not if
    /// another worker has been given the job since.
    fn job_ended(&mut self, worker: &WorkerId, job: &Job, now: Duration) -> bool {
        if self.members.get(worker).is_some_and(|m| m.activity == Activity::Working(job.clone())) {
            self.members.set(worker, Activity::Idle, now);
        }
        self.jobs.on_ended(job, worker)
    }

    pub(crate) fn on_job_done(&mut self, worker: &WorkerId, job: Job, result: String, now: Duration) {
        if !self.job_ended(worker, &job, now) {
            return;
        }
        self.jobs.on_succeeded(&job);
        self.effect(Effect::SaveJob(job, result));
    }

    pub(crate) fn on_job_failed(
        &mut self,
        worker: &WorkerId,
        job: &Job,
        kind: ErrorKind,
        message: &str,
        bad_unit: Option<&BadUnit>,
        damaged: Option<CheckpointId>,
        now: Duration,
    ) {
        if !self.job_ended(worker, job, now) {
            return;
        }
        let message = for_people(message, TEXT_LIMIT);
        // The damage may be known already; then the job is a different one by now.
        if let Some(checkpoint) = damaged.filter(|id| job.checkpoints().contains(id)) {
            return self.on_damaged(checkpoint, &message);
        }
        // Units have no numbers until the preparation is done.
        let spec = job.kind().spec();
        let bad_unit = bad_unit.filter(|_| spec.phase == JobPhase::AfterTraining);
        // The job may have started before the unit was quarantined.
        let was_known = bad_unit.is_some_and(|unit| self.quarantine.contains_key(unit));
        if !was_known && bad_unit.is_some_and(|unit| self.quarantine_unit(unit, &message)) {
            return;
        }
        // At the start of a run there is nothing to lose, and the person who started it can fix the disk.
        if kind == ErrorKind::Disk && spec.phase == JobPhase::AfterTraining {
            return self.wait_for_disk(worker, job, &message, now);
        }
        let may_try_again = self.jobs.on_failed(job, worker);
        // The average, which all these jobs read, can be recomputed.
        if kind == ErrorKind::Corrupt && may_try_again && spec.reads.contains(&JobKind::Average) {
            self.jobs.on_undone(JobKind::Average);
            self.effect(Effect::SaveJobUndone(JobKind::Average));
            return self.emit(Notification::Alarm(format!("{message}; the average will be recomputed")));
        }
        // A problem of one worker may not affect the next one, but a problem of the input would.
        let others = self.others_may_do(job);
        let is_worth_it = was_known || others || matches!(kind, ErrorKind::Retry | ErrorKind::Internal);
        if may_try_again && is_worth_it {
            self.emit(Notification::Info(format!(
                "{} failed on {}, trying again: {message}",
                job.name(),
                worker.name()
            )));
        } else {
            self.exit(kind.into(), format!("{} failed on {}: {message}", job.name(), worker.name()));
        }
    }

    /// The result of a job could not be written. Other workers try it, and then all of them again, for as long as
    /// training would continue without a stored state.
    fn wait_for_disk(&mut self, worker: &WorkerId, job: &Job, message: &str, now: Duration) {
        let others = self.others_may_do(job);
        let waited = self.jobs.on_write_failed(job, worker, now);
        let (name, most) = (job.name(), whole_seconds(self.settings.max_age));
        if waited > self.settings.max_age {
            let message = format!(
                "{name} could not be written for {}: {message}",
                whole_seconds(self.settings.max_age)
            );
            return self.exit(ExitStatus::Failed, message);
        }
        if waited == Duration::ZERO || others {
            let text = format!("{name} failed on {}: {message}; retrying for up to {most}", worker.name());
            self.emit(Notification::Alarm(text));
        }
    }

    /// Whether a job could be done by a connected worker on which it has not failed.
    fn others_may_do(&self, job: &Job) -> bool {
        self.members.iter().any(|(id, member)| {
            member.activity.is_admitted() && !member.draining && !self.jobs.has_failed_on(job, id)
        })
    }

    /// How far the run is, as far as it decides which jobs can begin.
    fn stage(&self) -> Stage {
        let works = |member: &Member| matches!(member.activity, Activity::Working(_));
        Stage {
            trained: self.is_trained_and_stored(),
            all_stored: self.snapshots.is_empty(),
            somebody_works: self.members.iter().any(|(_, member)| works(member)),
        }
    }

    pub(crate) fn start_jobs(&mut self, now: Duration) {
        if self.stopping_since.is_some() {
            return;
        }
        let mut idle = self.members.available(now);
        if idle.is_empty() {
            idle = self.members.available_if_needed(now);
        }
        for job in self.jobs.ready(self.stage(), &self.checkpoints) {
            let failed = |worker: &WorkerId| self.jobs.has_failed_on(&job, worker);
            let Some(index) = (0..idle.len()).min_by_key(|index| failed(&idle[*index])) else { break };
            if failed(&idle[index]) && (self.others_may_do(&job) || self.jobs.is_waiting(&job, now)) {
                continue;
            }
            let worker = idle.remove(index);
            self.members.set(&worker, Activity::Working(job.clone()), now);
            self.jobs.on_started(job.clone(), worker.clone());
            self.effect(Effect::SaveJobStarted(job.clone(), worker.clone()));
            self.send(&worker, ToWorker::Run(job.clone()));
            self.emit(Notification::JobStarted(job, worker));
        }
    }
}
