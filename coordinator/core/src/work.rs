//! Jobs: which worker does which, and what becomes of the results.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use ulmus_types::{BadUnit, CheckpointId, ErrorKind, Job, Stage, StageKind, ToWorker, WorkerId, for_people};

use crate::checkpoints::whole_seconds;
use crate::effect::{Effect, Notification};
use crate::group::Group;
use crate::jobs::Progress;
use crate::members::{Activity, Member};
use crate::state::{Coordinator, Life, TEXT_LIMIT};
use crate::trainings::Training;

/// The most parts in which an evaluation is done.
const MOST_PARTS: usize = 64;

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
        let Some(stage) = self.jobs.stage_of(job).cloned() else { return };
        let prepares = matches!(stage.kind, StageKind::Prepare | StageKind::Examples);
        // Units have no numbers until the preparation is done.
        // What an evaluation cannot read on its machine, others may train on.
        let bad_unit = bad_unit.filter(|_| !prepares && stage.kind != StageKind::Evaluation);
        // The job may have started before the unit was quarantined.
        let was_known = bad_unit.is_some_and(|unit| self.quarantine.contains_key(unit));
        if !was_known && bad_unit.is_some_and(|unit| self.quarantine_unit(unit, &message)) {
            return;
        }
        // At the start of a run there is nothing to lose, and the person who started it can fix the disk.
        if kind == ErrorKind::Disk && !prepares {
            return self.wait_for_disk(worker, job, &message, now);
        }
        let may_try_again = match kind {
            // It may work at the next attempt, there too.
            ErrorKind::Retry => self.jobs.on_stumbled(job),
            _ => self.jobs.on_failed(job, worker),
        };
        // The average, which all these jobs read, can be recomputed.
        if kind == ErrorKind::Corrupt
            && may_try_again
            && stage.reads_average(job)
            && let Some(average) = self.jobs.on_average_damaged()
        {
            self.effect(Effect::SaveJobUndone(average));
            return self.emit(Notification::Alarm(format!("{message}; the average will be recomputed")));
        }
        // A problem of one worker may not affect the next one, but a problem of the input would.
        let others = self.others_may_do(job);
        let is_worth_it = was_known || others || matches!(kind, ErrorKind::Retry | ErrorKind::Internal);
        let name = job.name();
        if may_try_again && is_worth_it {
            let text = format!("{name} failed on {}, trying again: {message}", worker.name());
            self.emit(Notification::Info(text));
            return;
        }
        self.give_up_job(job, kind, format!("{name} failed on {}: {message}", worker.name()));
    }

    /// A job has failed for good. That ends the run, now or when everything else is done.
    pub(crate) fn give_up_job(&mut self, job: &Job, kind: ErrorKind, message: String) {
        if self.jobs.on_given_up(job, kind, &message) {
            self.emit(Notification::Alarm(format!("{message}; the run does everything else first")));
        } else {
            self.exit(kind.into(), message);
        }
    }

    /// A worker was lost with its job: it died, as when the model needs more memory than there is, or its result could not be
    /// a result. A job with which that happens again and again is tried elsewhere, and given up if its stage can be.
    pub(crate) fn on_lost_with(&mut self, worker: &WorkerId, job: &Job) {
        if self.jobs.on_lost_with(job, worker) && !self.others_may_do(job) {
            let message = format!("{} was lost again and again while it did {}", worker.name(), job.name());
            self.give_up_job(job, ErrorKind::Internal, message);
        }
    }

    /// The result of a job could not be written. Other workers try it, and then all of them again, for as long as
    /// training would continue without a stored state.
    fn wait_for_disk(&mut self, worker: &WorkerId, job: &Job, message: &str, now: Duration) {
        let others = self.others_may_do(job);
        let waited = self.jobs.on_write_failed(job, worker, now);
        let (name, most) = (job.name(), whole_seconds(self.settings.max_age));
        if waited > self.settings.max_age {
            let message = format!("{name} could not be written for {most}: {message}");
            return self.give_up_job(job, ErrorKind::Disk, message);
        }
        if waited == Duration::ZERO || others {
            let text = format!("{name} failed on {}: {message}; retrying for up to {most}", worker.name());
            self.emit(Notification::Alarm(text));
        }
    }

    /// Whether a job could be done by a connected worker on which it has not failed.
    fn others_may_do(&self, job: &Job) -> bool {
        let Some(stage) = self.jobs.stage_of(job) else { return false };
        let is_reserved = self.is_reserved(stage, job);
        self.members.iter().any(|(id, member)| {
            self.may_serve(member, stage)
                && (!is_reserved || member.hello.only_jobs)
                && !member.draining
                && !self.jobs.has_failed_on(job, id)
        })
    }

    /// Whether a worker could do the jobs of a stage now or later.
    fn may_serve(&self, member: &Member, stage: &Stage) -> bool {
        // The corpora that the machines that train read need not be on one that only serves jobs.
        // And what is compared with while training has to be computed as the training is.
        let is_of_trainers = matches!(
            stage.kind,
            StageKind::Prepare
                | StageKind::Examples
                | StageKind::Reward
                | StageKind::Candidates
                | StageKind::Selection
                | StageKind::Reference
                | StageKind::Perplexity
                | StageKind::Continuations
        );
        let has_memory = stage.needs.memory.is_none_or(|bytes| member.hello.memory >= bytes);
        member.activity.is_admitted()
            && !(is_of_trainers && member.hello.only_jobs)
            && has_memory
            && self.jobs.is_device_of(stage, &member.hello.device)
    }

    /// Whether a job is left to workers that only serve jobs: until training is over, the others are left to that; and where one
    /// of them can do an evaluation or a benchmark, what a stage measures comes from machines of one kind.
    fn is_reserved(&self, stage: &Stage, job: &Job) -> bool {
        let serves = |(id, member): (&WorkerId, &Member)| {
            member.hello.only_jobs
                && self.may_serve(member, stage)
                && !member.draining
                && !self.jobs.has_failed_on(job, id)
        };
        (!self.is_trained_and_stored() && !self.graph().leads_to_training(stage))
            || matches!(stage.kind, StageKind::Evaluation | StageKind::Benchmark)
                && self.members.iter().any(serves)
    }

    /// The number of workers that can do jobs of a stage now or when they have done the job that they do.
    fn helpers(&self, stage: &Stage, is_reserved: bool) -> usize {
        let helps = |member: &Member| {
            matches!(member.activity, Activity::Idle | Activity::Working(_))
                && self.may_serve(member, stage)
                && (!is_reserved || member.hello.only_jobs)
                && !member.draining
        };
        self.members.iter().filter(|(_, member)| helps(member)).count()
    }

    /// Whether a worker's machine is being measured, so that nothing else may run there.
    pub(crate) fn is_measured(&self, member: &Member) -> bool {
        self.jobs.running().iter().any(|(job, worker)| {
            let is_exclusive = self.jobs.stage_of(job).is_some_and(|stage| stage.kind.is_exclusive());
            let there = self.members.get(worker);
            is_exclusive && there.is_some_and(|there| there.hello.host == member.hello.host)
        })
    }

    /// Whether no worker on a machine computes anything.
    fn is_quiet(&self, host: &str) -> bool {
        let computes = |worker: &WorkerId, member: &Member| match member.activity {
            Activity::Working(_) | Activity::Warming => true,
            // One that has not left an earlier group is stuck.
            Activity::InGroup(_) => self.group.contains(worker),
            Activity::Greeted | Activity::Idle => false,
        };
        !self.members.iter().any(|(id, member)| member.hello.host == host && computes(id, member))
    }

    pub(crate) fn progress(&self) -> Progress {
        let over = self.trainings.iter().map(Training::name).filter(|name| self.is_over(*name)).collect();
        Progress { over, all_stored: self.snapshots.is_empty() }
    }

    pub(crate) fn start_jobs(&mut self, now: Duration) {
        if self.life != Life::Running {
            return;
        }
        let mut idle = self.members.available(now);
        if idle.is_empty() {
            idle = self.members.available_if_needed(now);
        }
        let progress = self.progress();
        let mut ready = VecDeque::from(self.jobs.ready(&progress, &self.milestones()));
        let can =
            |(stage, _): &(Stage, Job)| self.members.iter().any(|(_, member)| self.may_serve(member, stage));
        let waits = self.is_trained_and_stored() && self.jobs.running().is_empty() && !ready.iter().any(can);
        // Whatever else there is to do keeps the machines of those that could do it from being measured.
        let mut left: Vec<Stage> = Vec::new();
        let mut told = BTreeSet::new();
        while let Some((stage, job)) = ready.pop_front() {
            if told.insert(stage.name) {
                self.watch_pending(&stage, &progress, waits, now);
            }
            let is_reserved = self.is_reserved(&stage, &job);
            let may_do = |worker: &WorkerId| {
                self.members.get(worker).is_some_and(|member| {
                    let host = &member.hello.host;
                    // Members of a group that a returning coordinator waits for are not there yet.
                    let is_alone = || {
                        !matches!(self.group, Group::Adopting { .. })
                            && self.is_quiet(host)
                            && !left.iter().any(|other| self.may_serve(member, other))
                    };
                    self.may_serve(member, &stage)
                        && (!is_reserved || member.hello.only_jobs)
                        && !self.is_measured(member)
                        && (!stage.kind.is_exclusive() || is_alone())
                })
            };
            let failed = |worker: &WorkerId| self.jobs.has_failed_on(&job, worker);
            let able: Vec<usize> = (0..idle.len()).filter(|index| may_do(&idle[*index])).collect();
            // Workers that are left without an evaluation share one, those too that are about to be free.
            let among = || {
                let can =
                    |other: &Stage| self.members.iter().any(|(_, member)| self.may_serve(member, other));
                let others = ready.iter().filter(|(other, _)| other.kind == stage.kind && can(other)).count();
                self.helpers(&stage, is_reserved).saturating_sub(others).min(MOST_PARTS)
            };
            let may_share = !able.is_empty() && self.jobs.may_be_shared(&stage, &job);
            let among = if may_share { among() } else { 0 };
            if among > 1 {
                for part in self.jobs.share(&job, among as u32).into_iter().rev() {
                    ready.push_front((stage.clone(), part));
                }
                continue;
            }
            // Those that only serve jobs are kept for what is left to them.
            let only_jobs =
                |worker: &WorkerId| self.members.get(worker).is_some_and(|member| member.hello.only_jobs);
            let best = able.into_iter().min_by_key(|index| (failed(&idle[*index]), only_jobs(&idle[*index])));
            let best = best.filter(|index| {
                !failed(&idle[*index]) || !(self.others_may_do(&job) || self.jobs.is_waiting(&job, now))
            });
            let Some(index) = best else {
                if !stage.kind.is_exclusive() && !is_reserved {
                    left.push(stage);
                }
                continue;
            };
            let worker = idle.remove(index);
            self.members.set(&worker, Activity::Working(job.clone()), now);
            self.jobs.on_started(job.clone(), worker.clone());
            self.effect(Effect::SaveJobStarted(job.clone(), worker.clone()));
            self.send(&worker, ToWorker::Run(job.clone()));
            let purpose = stage.describe(&job);
            self.emit(Notification::JobStarted { job: job.name(), worker, purpose });
        }
    }

    /// Tells when no connected worker can serve a stage whose jobs could begin, and skips these when the run has waited long
    /// enough. It `waits` if it has nothing else to do.
    fn watch_pending(&mut self, stage: &Stage, progress: &Progress, waits: bool, now: Duration) {
        let asks = stage.needs.device.is_some() || stage.needs.memory.is_some();
        if !asks || !self.members.iter().any(|(_, member)| member.activity.is_admitted()) {
            return;
        }
        if self.members.iter().any(|(_, member)| self.may_serve(member, stage)) {
            return self.jobs.on_served(&stage.name);
        }
        let (is_news, is_over) = self.jobs.on_pending(stage, waits, now);
        let needs = format!("no worker {}", stage.needs);
        if is_news {
            let devices: BTreeSet<&str> =
                self.members.iter().map(|(_, member)| &member.hello.device[..]).collect();
            let devices: Vec<&str> = devices.into_iter().collect();
            let text = format!("{} is pending: {needs}; connected: {}", stage.name, devices.join(" | "));
            self.emit(Notification::Info(text));
        }
        if is_over {
            let within = whole_seconds(stage.needs.wait.unwrap_or_default());
            let skipped = format!("{needs} came within {within}");
            self.emit(Notification::Alarm(format!("{} is skipped: {skipped}", stage.name)));
            let jobs = self.jobs.ready(progress, &self.milestones());
            let of_stage = jobs.into_iter().filter(|(other, _)| other.name == stage.name);
            for job in of_stage.map(|(_, job)| job.whole()).collect::<BTreeSet<Job>>() {
                self.jobs.on_succeeded(&job);
                self.effect(Effect::SaveJobSkipped(job, skipped.clone()));
            }
        }
    }
}
