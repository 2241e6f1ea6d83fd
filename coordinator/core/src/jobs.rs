//! The jobs of a run around its training: which are done, which are running, and which can begin.
//!
//! ```text
//!                          ┌─► average ─┬─► evaluate-average ─┐
//! prepare ─► (training) ─► │            └─► export ───────────┼─► benchmark
//!                          ├─► evaluate-last ─────────────────┤
//!                          └─► continuations ─────────────────┘
//! ```
//! The graph is defined by [`JobKind::spec`]. A plan may omit the export.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ulmus_types::{CheckpointId, CheckpointKind, Job, JobKind, JobPhase, Milestones, WorkerId};

/// How often a job may fail before the run gives up.
const ATTEMPTS: u32 = 3;
/// How long a job waits after its result could not be written.
const DISK_RETRY: Duration = Duration::from_secs(2);

/// The progress of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobStatus {
    /// The job has not begun.
    Waiting,
    /// This worker is doing the job.
    Running(WorkerId),
    /// The result of the job is recorded.
    Done,
}

/// Which jobs are done and which are running.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    /// The jobs that the plan asks for.
    wanted: BTreeSet<JobKind>,
    /// Number of milestones that are averaged.
    average: u64,
    done: BTreeSet<JobKind>,
    running: BTreeMap<Job, WorkerId>,
    /// The worker to which each job was last given: no other worker's result counts.
    owners: BTreeMap<Job, WorkerId>,
    failures: BTreeMap<JobKind, u32>,
    /// Names of workers on which a job has failed.
    failed_on: BTreeMap<JobKind, BTreeSet<String>>,
    /// Jobs whose results could not be written: since when, and when they are tried again.
    waiting: BTreeMap<JobKind, (Duration, Duration)>,
}

/// The state of training and storing, on which it depends which jobs may begin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stage {
    /// Training is done, and the milestones that are averaged are stored.
    pub(crate) trained: bool,
    /// No milestone is still to be stored.
    pub(crate) all_stored: bool,
    /// A worker does a job, whether or not its result counts.
    pub(crate) somebody_works: bool,
}

impl Jobs {
    pub(crate) fn new(
        done: BTreeSet<JobKind>,
        owners: BTreeMap<Job, WorkerId>,
        average: u64,
        export: bool,
    ) -> Self {
        Self { wanted: JobKind::of_run(export), average, done, owners, ..Self::default() }
    }

    pub(crate) fn is_done(&self, kind: JobKind) -> bool {
        self.done.contains(&kind)
    }

    /// Whether every job that training depends on is done.
    pub(crate) fn training_may_begin(&self) -> bool {
        self.unfinished().all(|kind| kind.spec().phase != JobPhase::BeforeTraining)
    }

    /// Whether a job that reads milestones is not done yet.
    pub(crate) fn need_milestones(&self) -> bool {
        self.unfinished().any(|kind| kind.spec().checkpoints != Milestones::None)
    }

    /// Whether every job that the plan asks for is done.
    pub(crate) fn all_done(&self) -> bool {
        self.unfinished().next().is_none()
    }

    /// The jobs that are not done yet.
    fn unfinished(&self) -> impl Iterator<Item = JobKind> {
        self.wanted.iter().copied().filter(|kind| !self.is_done(*kind))
    }

    /// The progress of every job that the plan asks for.
    pub(crate) fn status(&self) -> BTreeMap<JobKind, JobStatus> {
        let mut status: BTreeMap<_, _> = self
            .wanted
            .iter()
            .map(|kind| (*kind, if self.is_done(*kind) { JobStatus::Done } else { JobStatus::Waiting }))
            .collect();
        for (job, worker) in self.running.iter().filter(|(job, _)| !self.is_done(job.kind())) {
            status.insert(job.kind(), JobStatus::Running(worker.clone()));
        }
        status
    }

    pub(crate) fn running(&self) -> &BTreeMap<Job, WorkerId> {
        &self.running
    }

    pub(crate) fn on_started(&mut self, job: Job, worker: WorkerId) {
        self.owners.insert(job.clone(), worker.clone());
        self.running.insert(job, worker);
    }

    /// A worker still does a job that it was given before its connection broke or the coordinator restarted. The claim
    /// does not count if the job was never given to it, or has since been given to another worker.
    pub(crate) fn on_resumed(&mut self, job: Job, worker: WorkerId) {
        if !self.is_done(job.kind()) && self.owners.get(&job) == Some(&worker) {
            self.running.entry(job).or_insert(worker);
        }
    }

    /// Whether a worker was ever given a job.
    pub(crate) fn was_given(&self, worker: &WorkerId) -> bool {
        self.owners.values().any(|owner| owner == worker)
    }

    /// A worker has ended a job. Returns whether the job was that worker's.
    pub(crate) fn on_ended(&mut self, job: &Job, worker: &WorkerId) -> bool {
        if self.running.get(job) == Some(worker) {
            self.running.remove(job);
            return true;
        }
        false
    }

    pub(crate) fn on_succeeded(&mut self, job: &Job) {
        self.waiting.remove(&job.kind());
        self.done.insert(job.kind());
    }

    /// The result of a finished job has become useless.
    pub(crate) fn on_undone(&mut self, kind: JobKind) {
        self.done.remove(&kind);
    }

    /// A job has failed on a worker. Returns whether it may be tried again, on any worker.
    pub(crate) fn on_failed(&mut self, job: &Job, worker: &WorkerId) -> bool {
        self.failed_on.entry(job.kind()).or_default().insert(worker.name().to_owned());
        let failures = self.failures.entry(job.kind()).or_insert(0);
        *failures += 1;
        *failures < ATTEMPTS
    }

    /// The result of a job could not be written. Returns how long that has been so.
    pub(crate) fn on_write_failed(&mut self, job: &Job, worker: &WorkerId, now: Duration) -> Duration {
        self.failed_on.entry(job.kind()).or_default().insert(worker.name().to_owned());
        let (since, again) = self.waiting.entry(job.kind()).or_insert((now, now));
        *again = now + DISK_RETRY;
        now.saturating_sub(*since)
    }

    /// Whether a job waits until its result may be written again.
    pub(crate) fn is_waiting(&self, job: &Job, now: Duration) -> bool {
        self.waiting.get(&job.kind()).is_some_and(|(_, again)| now < *again)
    }

    /// How often a job has failed.
    pub(crate) fn failures(&self, job: &Job) -> u32 {
        self.failures.get(&job.kind()).copied().unwrap_or(0)
    }

    /// Whether a job has failed on a worker of this name.
    pub(crate) fn has_failed_on(&self, job: &Job, worker: &WorkerId) -> bool {
        self.failed_on.get(&job.kind()).is_some_and(|names| names.contains(worker.name()))
    }

    pub(crate) fn on_worker_lost(&mut self, worker: &WorkerId) {
        self.running.retain(|_, at| at != worker);
    }

    /// Jobs that can begin now.
    pub(crate) fn ready(
        &self,
        stage: Stage,
        checkpoints: &BTreeMap<CheckpointId, CheckpointKind>,
    ) -> Vec<Job> {
        let milestones = milestones(checkpoints);
        self.unfinished()
            .filter(|kind| self.may_begin(*kind, stage))
            .filter_map(|kind| Job::new(kind, self.checkpoints_of(kind, &milestones)).ok())
            .collect()
    }

    /// Whether everything that a job reads exists, and nothing runs that must not run at the same time.
    fn may_begin(&self, kind: JobKind, stage: Stage) -> bool {
        let spec = kind.spec();
        let is_its_turn = match spec.phase {
            JobPhase::BeforeTraining => true,
            JobPhase::AfterTraining => stage.trained && self.training_may_begin(),
        };
        // The job of a kind that reads other checkpoints, as those of an earlier one were damaged, waits for that one to end.
        let runs = self.running.keys().any(|job| job.kind() == kind);
        let alone = || {
            !stage.somebody_works && self.running.is_empty() && self.unfinished().all(|other| other == kind)
        };
        is_its_turn
            && !runs
            && spec.reads.iter().all(|read| self.is_done(*read))
            && (spec.checkpoints != Milestones::Spread || stage.all_stored)
            && (!spec.exclusive || alone())
    }

    /// The checkpoints that a job of this kind reads: those of `milestones` that its specification names.
    fn checkpoints_of(&self, kind: JobKind, milestones: &[CheckpointId]) -> Vec<CheckpointId> {
        let (Some(first), Some(last)) = (milestones.first(), milestones.last()) else { return Vec::new() };
        match kind.spec().checkpoints {
            Milestones::None => Vec::new(),
            Milestones::Last => vec![*last],
            Milestones::Averaged => {
                milestones[milestones.len().saturating_sub(self.average as usize)..].to_vec()
            }
            Milestones::Spread => {
                let mut spread = vec![*first, milestones[milestones.len() / 2], *last];
                spread.dedup();
                spread
            }
        }
    }
}

/// Milestones, oldest first. Of a step that was trained twice, only the newer milestone.
pub(crate) fn milestones(checkpoints: &BTreeMap<CheckpointId, CheckpointKind>) -> Vec<CheckpointId> {
    let by_step: BTreeMap<_, _> = checkpoints
        .iter()
        .filter(|(_, kind)| **kind == CheckpointKind::Milestone)
        .map(|(id, _)| (id.step(), *id))
        .collect();
    by_step.into_values().collect()
}

#[cfg(test)]
mod tests {
    use ulmus_types::{Generation, Incarnation, Step};

    use super::*;

    const TRAINED: Stage = Stage { trained: true, all_stored: true, somebody_works: false };

    fn checkpoints() -> BTreeMap<CheckpointId, CheckpointKind> {
        let id = |step| CheckpointId::new(Step::new(step), Generation::new(1));
        [4, 6, 8].map(|step| (id(step), CheckpointKind::Milestone)).into()
    }

    fn names(jobs: &[Job]) -> Vec<&'static str> {
        jobs.iter().map(Job::name).collect()
    }

    /// The jobs of a run that begin together, one wave after the other, where all of a wave end before the next begins.
    fn waves(export: bool) -> Vec<Vec<&'static str>> {
        let mut jobs = Jobs::new([JobKind::Prepare].into(), BTreeMap::new(), 2, export);
        let mut waves = Vec::new();
        while !jobs.all_done() {
            let ready = jobs.ready(TRAINED, &checkpoints());
            assert!(!ready.is_empty(), "{waves:?} and nothing after it");
            waves.push(names(&ready));
            for job in &ready {
                jobs.on_succeeded(job);
            }
        }
        waves
    }

    #[test]
    fn jobs_begin_when_what_they_read_is_there() {
        let first = vec!["average", "evaluate-last", "continuations"];
        let last = vec!["benchmark"];
        assert_eq!(waves(true), [first.clone(), vec!["evaluate-average", "export"], last.clone()]);
        assert_eq!(waves(false), [first, vec!["evaluate-average"], last]);
    }

    #[test]
    fn before_training_only_its_preparation_is_done() {
        let mut jobs = Jobs::new(BTreeSet::new(), BTreeMap::new(), 2, true);
        let untrained = Stage { trained: false, ..TRAINED };
        for stage in [untrained, TRAINED] {
            assert_eq!(names(&jobs.ready(stage, &checkpoints())), ["prepare"]);
        }
        let prepare = jobs.ready(untrained, &BTreeMap::new()).remove(0);
        assert!(!jobs.training_may_begin());
        jobs.on_succeeded(&prepare);
        assert!(jobs.training_may_begin());
        assert!(jobs.ready(untrained, &checkpoints()).is_empty());
    }

    #[test]
    fn the_benchmark_is_alone() {
        let all = JobKind::of_run(true);
        let others: BTreeSet<JobKind> = all.iter().copied().filter(|kind| !kind.spec().exclusive).collect();
        let mut jobs = Jobs::new(others, BTreeMap::new(), 2, true);
        assert_eq!(names(&jobs.ready(TRAINED, &checkpoints())), ["benchmark"]);
        let busy = Stage { somebody_works: true, ..TRAINED };
        assert!(jobs.ready(busy, &checkpoints()).is_empty(), "a worker does what another was given since");
        jobs.on_undone(JobKind::Average);
        assert_eq!(names(&jobs.ready(TRAINED, &checkpoints())), ["average"]);
    }

    #[test]
    fn no_two_jobs_of_a_kind_run_at_once() {
        let mut jobs = Jobs::new([JobKind::Prepare].into(), BTreeMap::new(), 2, true);
        let average = jobs.ready(TRAINED, &checkpoints()).remove(0);
        jobs.on_started(average.clone(), WorkerId::new("w", Incarnation::new(1)).unwrap());
        // A milestone was damaged and trained again meanwhile.
        let again = CheckpointId::new(Step::new(8), Generation::new(2));
        let repaired = checkpoints().into_iter().chain([(again, CheckpointKind::Milestone)]).collect();
        assert!(!names(&jobs.ready(TRAINED, &repaired)).contains(&"average"));
        let unstored = Stage { all_stored: false, ..TRAINED };
        assert_eq!(names(&jobs.ready(unstored, &checkpoints())), ["evaluate-last"]);
    }
}
