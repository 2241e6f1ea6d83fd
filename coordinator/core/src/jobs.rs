//! The jobs of a run: which are done, which are running, and which can begin. What there is to do follows from the [`Graph`] of the
//! run's stages.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use globset::{Glob, GlobMatcher};
use ulmus_types::{
    ErrorKind, Graph, Job, JobName, Milestones, Of, Part, Reads, Stage, StageKind, StageName, Subject,
    WorkerId,
};

/// How often a job may fail before the run gives up.
const ATTEMPTS: u32 = 3;
/// How long a job waits after its result could not be written.
const DISK_RETRY: Duration = Duration::from_secs(2);

/// The progress of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobStatus {
    /// The job has not begun.
    Waiting,
    /// The job could begin, but no connected worker has what it needs: this.
    Pending(String),
    /// This worker is doing the job.
    Running(WorkerId),
    /// The job has failed, and is done again only when the run is started again.
    Failed,
    /// The result of the job is recorded.
    Done,
}

/// Which jobs are done and which are running.
#[derive(Debug)]
pub(crate) struct Jobs {
    graph: Graph,
    done: BTreeSet<JobName>,
    running: BTreeMap<Job, WorkerId>,
    /// The worker to which each job was last given: no other worker's result counts.
    owners: BTreeMap<Job, WorkerId>,
    failures: BTreeMap<JobName, u32>,
    /// Names of workers on which a job has failed.
    failed_on: BTreeMap<JobName, BTreeSet<String>>,
    /// Jobs whose results could not be written: since when, and when they are tried again.
    waiting: BTreeMap<JobName, (Duration, Duration)>,
    /// Stages that no connected worker can serve, and since when nothing else is to be done.
    pending: BTreeMap<StageName, Option<Duration>>,
    /// Patterns of the devices that stages ask for.
    devices: BTreeMap<StageName, GlobMatcher>,
    /// How often a worker of a name was lost with a job.
    losses: BTreeMap<(JobName, String), u32>,
    /// The number of parts in which evaluations are done that several workers share.
    parts: BTreeMap<JobName, u32>,
    /// Jobs of stages that the plan adds and that failed for good. The run does everything else before it ends with that.
    given_up: BTreeMap<JobName, (ErrorKind, String)>,
}

/// The state of training and storing, on which it depends which stages may begin.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    /// The training stages that are over: trained, and their milestones stored.
    pub(crate) over: BTreeSet<StageName>,
    /// No state is still to be stored.
    pub(crate) all_stored: bool,
}

impl Jobs {
    pub(crate) fn new(graph: Graph, done: BTreeSet<JobName>, owners: BTreeMap<Job, WorkerId>) -> Self {
        // What was shared stays so: some parts may be done.
        let parts = owners.keys().filter_map(|job| Some((job.whole().name(), job.part()?.of())));
        let device = |stage: &Stage| {
            let pattern = Glob::new(stage.needs.device.as_ref()?).ok()?;
            Some((stage.name, pattern.compile_matcher()))
        };
        Self {
            devices: graph.stages().iter().filter_map(device).collect(),
            losses: BTreeMap::new(),
            parts: parts.collect(),
            graph,
            done,
            running: BTreeMap::new(),
            owners,
            failures: BTreeMap::new(),
            failed_on: BTreeMap::new(),
            waiting: BTreeMap::new(),
            pending: BTreeMap::new(),
            given_up: BTreeMap::new(),
        }
    }

    pub(crate) fn is_done(&self, name: &JobName) -> bool {
        self.done.contains(name)
    }

    /// The stage that a job belongs to; `None` for what a stranger invents.
    pub(crate) fn stage_of(&self, job: &Job) -> Option<&Stage> {
        self.graph.stage(job.stage())
    }

    /// Whether every job of a kind is done.
    fn all_of_kind(&self, kind: StageKind) -> bool {
        let mut stages = self.graph.stages().iter().filter(|stage| stage.kind == kind);
        stages.all(|stage| self.stage_is_done(stage, &Milestones::default()))
    }

    /// Whether everything is prepared that any training reads. What is wrong with it is found before the first one begins.
    fn is_prepared(&self) -> bool {
        self.all_of_kind(StageKind::Prepare) && self.all_of_kind(StageKind::Examples)
    }

    /// Whether a stage that trains may begin.
    pub(crate) fn training_may_begin(&self, stage: &Stage, progress: &Progress) -> bool {
        let is_there = |of: &Of| match of {
            Of::Base | Of::Model(_) => true,
            Of::Average => self.has_average(),
            Of::Last | Of::Milestones => progress.over.contains(&StageName::pretraining()),
            Of::Tuned(name) => self.is_exported(*name),
        };
        let has_model = match &stage.reads {
            Reads::Models(models) => models.iter().all(is_there),
            _ => true,
        };
        has_model && self.is_prepared() && self.has_what_it_follows(stage)
    }

    /// Whether the stage is done whose result another one needs, if there is one.
    fn has_what_it_follows(&self, stage: &Stage) -> bool {
        let before = stage.after.and_then(|name| self.graph.stage(&name));
        before.is_none_or(|before| self.stage_is_done(before, &Milestones::default()))
    }

    fn has_average(&self) -> bool {
        self.done.iter().any(|name| name.as_str() == StageName::AVERAGE)
    }

    /// Whether the model that a tuning stage has made is written.
    fn is_exported(&self, tuned: StageName) -> bool {
        self.done.iter().any(|name| name.as_str() == tuned.export().as_str())
    }

    /// Whether a job that reads milestones of a training stage is not done yet.
    pub(crate) fn need_milestones(&self, training: StageName, milestones: &Milestones) -> bool {
        let reads = |stage: &&Stage| stage.reads_milestones_of() == Some(training);
        !self.graph.stages().iter().filter(reads).all(|stage| self.stage_is_done(stage, milestones))
    }

    /// Whether every job that the plan asks for is done, given the milestones of a run that is trained.
    pub(crate) fn all_done(&self, milestones: &Milestones) -> bool {
        self.graph.is_done(milestones, |name| self.is_done(name))
    }

    /// Why the run cannot finish, if there is nothing left to do but what has failed for good.
    pub(crate) fn failed_for_good(&self, milestones: &Milestones) -> Option<(ErrorKind, String)> {
        let (kind, _) = self.given_up.values().next()?;
        let is_over =
            self.graph.is_done(milestones, |name| self.is_done(name) || self.given_up.contains_key(name));
        let messages: Vec<&str> = self.given_up.values().map(|(_, message)| &message[..]).collect();
        is_over.then(|| (*kind, messages.join("; ")))
    }

    /// A job has failed for good. Returns whether the run can do the rest without it.
    pub(crate) fn on_given_up(&mut self, job: &Job, kind: ErrorKind, message: &str) -> bool {
        let leads_to_training = self.stage_of(job).is_some_and(|stage| self.graph.leads_to_training(stage));
        let may_be_missing = self.is_added(job) && !leads_to_training;
        if may_be_missing {
            self.given_up.insert(job.whole().name(), (kind, message.to_owned()));
        }
        may_be_missing
    }

    /// Whether a job belongs to a stage that the plan adds.
    fn is_added(&self, job: &Job) -> bool {
        self.stage_of(job).is_some_and(|stage| matches!(stage.reads, Reads::Models(_)))
    }

    fn stage_is_done(&self, stage: &Stage, milestones: &Milestones) -> bool {
        self.graph.stage_is_done(stage, milestones, |name| self.is_done(name))
    }

    /// The jobs that are not done yet and for which there is everything but the average, each with its stage.
    fn unfinished<'a>(&'a self, milestones: &'a Milestones) -> impl Iterator<Item = (&'a Stage, Job)> {
        let jobs = self.graph.stages().iter().flat_map(move |stage| {
            self.graph.jobs(stage, milestones).into_iter().map(move |job| (stage, job))
        });
        jobs.filter(|(_, job)| !self.is_done(&job.name()) && !self.given_up.contains_key(&job.name()))
    }

    /// The progress of every job for which there are checkpoints, and of every stage for which there are none.
    pub(crate) fn status(&self, milestones: &Milestones) -> BTreeMap<JobName, JobStatus> {
        let mut status = BTreeMap::new();
        for stage in self.graph.stages().iter().filter(|stage| !stage.kind.trains()) {
            let jobs = self.graph.jobs(stage, milestones);
            let names = jobs.iter().map(Job::name);
            let without = jobs.is_empty().then(|| Job::new(stage.name, Subject::Stage(Vec::new())).name());
            for name in names.chain(without) {
                let is_pending = self.pending.contains_key(&stage.name);
                let progress = match (self.is_done(&name), is_pending) {
                    (true, _) => JobStatus::Done,
                    _ if self.given_up.contains_key(&name) => JobStatus::Failed,
                    (false, true) => JobStatus::Pending(stage.needs.to_string()),
                    (false, false) => JobStatus::Waiting,
                };
                status.insert(name, progress);
            }
        }
        for (job, worker) in self.running.iter().filter(|(job, _)| !self.is_done(&job.name())) {
            status.insert(job.name(), JobStatus::Running(worker.clone()));
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
        let is_known = self.stage_of(&job).is_some() && !self.is_done(&job.name());
        if is_known && self.owners.get(&job) == Some(&worker) {
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
        self.waiting.remove(&job.name());
        self.done.insert(job.name());
    }

    /// The average has become useless. Returns the name of the job that makes it again.
    pub(crate) fn on_average_damaged(&mut self) -> Option<JobName> {
        let name = self.done.iter().find(|name| name.as_str() == StageName::AVERAGE)?.clone();
        self.done.remove(&name);
        Some(name)
    }

    /// Whether a device is one that a stage asks for.
    pub(crate) fn is_device_of(&self, stage: &Stage, device: &str) -> bool {
        match self.devices.get(&stage.name) {
            Some(pattern) => pattern.is_match(device),
            // What is no pattern matches nothing.
            None => stage.needs.device.is_none(),
        }
    }

    /// A worker was lost with a job of a stage that the plan adds. Returns whether that has happened so often to workers of
    /// its name that they are not given it any more.
    pub(crate) fn on_lost_with(&mut self, job: &Job, worker: &WorkerId) -> bool {
        if !self.is_added(job) {
            return false;
        }
        let losses = self.losses.entry((job.name(), worker.name().to_owned())).or_insert(0);
        *losses += 1;
        let is_often = *losses >= ATTEMPTS;
        if is_often {
            self.failed_on.entry(job.name()).or_default().insert(worker.name().to_owned());
        }
        is_often
    }

    /// A job has failed for a reason that may be gone at the next attempt. Returns whether it may be tried again.
    pub(crate) fn on_stumbled(&mut self, job: &Job) -> bool {
        let failures = self.failures.entry(job.name()).or_insert(0);
        *failures += 1;
        *failures < ATTEMPTS
    }

    /// A job has failed on a worker. Returns whether it may be tried again, on any worker.
    pub(crate) fn on_failed(&mut self, job: &Job, worker: &WorkerId) -> bool {
        self.failed_on.entry(job.name()).or_default().insert(worker.name().to_owned());
        self.on_stumbled(job)
    }

    /// The result of a job could not be written. Returns how long that has been so.
    pub(crate) fn on_write_failed(&mut self, job: &Job, worker: &WorkerId, now: Duration) -> Duration {
        self.failed_on.entry(job.name()).or_default().insert(worker.name().to_owned());
        let (since, again) = self.waiting.entry(job.name()).or_insert((now, now));
        *again = now + DISK_RETRY;
        now.saturating_sub(*since)
    }

    /// Whether a job waits until its result may be written again.
    pub(crate) fn is_waiting(&self, job: &Job, now: Duration) -> bool {
        self.waiting.get(&job.name()).is_some_and(|(_, again)| now < *again)
    }

    /// How often a job has failed.
    pub(crate) fn failures(&self, job: &Job) -> u32 {
        self.failures.get(&job.name()).copied().unwrap_or(0)
    }

    /// Whether a job has failed on a worker of this name.
    pub(crate) fn has_failed_on(&self, job: &Job, worker: &WorkerId) -> bool {
        self.failed_on.get(&job.name()).is_some_and(|names| names.contains(worker.name()))
    }

    pub(crate) fn on_worker_lost(&mut self, worker: &WorkerId) {
        self.running.retain(|_, at| at != worker);
    }

    /// Jobs that can begin now if there is a worker for them; those that measure their machine come last.
    pub(crate) fn ready(&self, progress: &Progress, milestones: &Milestones) -> Vec<(Stage, Job)> {
        let mut ready: Vec<(Stage, Job)> = self
            .unfinished(milestones)
            .filter(|(stage, job)| self.may_begin(stage, job, progress))
            .flat_map(|(stage, job)| self.parts_or_whole(job).into_iter().map(|job| (stage.clone(), job)))
            .collect();
        ready.sort_by_key(|(stage, _)| stage.kind.is_exclusive());
        ready
    }

    /// The parts of a job that are still to be begun; or the job itself, if it has no parts or all of them are done.
    fn parts_or_whole(&self, job: Job) -> Vec<Job> {
        let of = self.parts.get(&job.name()).copied().unwrap_or(0);
        let parts = (0..of).filter_map(|index| Some(job.clone().part_of(Part::new(index, of)?)));
        let left: Vec<Job> = parts.filter(|part| !self.is_done(&part.name())).collect();
        if left.is_empty() {
            return vec![job];
        }
        left.into_iter()
            .filter(|part| !self.running.keys().any(|other| other.name() == part.name()))
            .collect()
    }

    /// Shares a job that nobody has begun among several workers, and returns the parts.
    pub(crate) fn share(&mut self, job: &Job, among: u32) -> Vec<Job> {
        self.parts.insert(job.name(), among);
        self.parts_or_whole(job.clone())
    }

    /// Whether a job may be shared: it is no part of one, and not what puts parts together.
    pub(crate) fn may_be_shared(&self, stage: &Stage, job: &Job) -> bool {
        stage.kind.is_shared() && job.part().is_none() && !self.parts.contains_key(&job.name())
    }

    /// Whether everything that a job reads exists, and it does not run already.
    fn may_begin(&self, stage: &Stage, job: &Job, progress: &Progress) -> bool {
        // A job that reads other checkpoints, as those of an earlier one were damaged, waits for that one to end.
        let runs = self.running.keys().any(|other| other.name() == job.name());
        let is_over = |training| progress.over.contains(&training);
        let is_its_turn = match (job.subject(), &stage.reads) {
            (Subject::Stage(_), _) if stage.kind == StageKind::Prepare => true,
            (Subject::Stage(_), _) if stage.kind == StageKind::Examples => {
                self.all_of_kind(StageKind::Prepare)
            }
            (Subject::Stage(_), Reads::Tuned(training)) => is_over(*training) && self.is_prepared(),
            (Subject::Stage(_), reads) => {
                is_over(StageName::pretraining())
                    && self.is_prepared()
                    && (*reads != Reads::Spread || progress.all_stored)
            }
            (Subject::Average | Subject::Last(_), _) => is_over(StageName::pretraining()),
            (Subject::Tuned(name), _) => self.is_exported(*name),
            // The run may have to make the rows of tasks first.
            (Subject::Base | Subject::Milestone(_) | Subject::Model(_), _) => self.is_prepared(),
        };
        is_its_turn
            && !runs
            && self.has_what_it_follows(stage)
            && (!stage.reads_average(job) || self.has_average())
    }

    /// No connected worker can serve a stage. The run `waits` for one if there is nothing else to do. Returns whether that is
    /// news, and whether it has waited for as long as the stage says.
    pub(crate) fn on_pending(&mut self, stage: &Stage, waits: bool, now: Duration) -> (bool, bool) {
        let is_news = !self.pending.contains_key(&stage.name);
        let since = self.pending.entry(stage.name).or_default();
        *since = waits.then(|| since.unwrap_or(now));
        let is_over = since.is_some_and(|since| stage.needs.wait.is_some_and(|wait| now >= since + wait));
        (is_news, is_over)
    }

    /// A worker can serve a stage.
    pub(crate) fn on_served(&mut self, stage: &StageName) {
        self.pending.remove(stage);
    }
}

#[cfg(test)]
mod tests {
    use ulmus_types::{CheckpointId, CheckpointKind, Generation, Incarnation, Requirements, Step};

    use super::*;

    fn trained() -> Progress {
        Progress { over: [StageName::pretraining()].into(), all_stored: true }
    }

    fn untrained() -> Progress {
        Progress { over: BTreeSet::new(), all_stored: true }
    }

    fn id(step: u64) -> CheckpointId {
        CheckpointId::new(StageName::pretraining(), Step::new(step), Generation::new(1))
    }

    fn milestones() -> Milestones {
        stored(&[4, 6, 8].map(id))
    }

    fn stored(checkpoints: &[CheckpointId]) -> Milestones {
        checkpoints.iter().map(|id| (id, &CheckpointKind::Milestone)).collect()
    }

    fn jobs(export: bool, added: Vec<Stage>) -> Jobs {
        let prepared = JobName::stored(StageName::PREPARE.to_owned());
        Jobs::new(Graph::new(2, export, false, &[], added), [prepared].into(), BTreeMap::new())
    }

    fn added(kind: StageKind, of: &[&str]) -> Stage {
        let of = of.iter().map(|of| Of::from((*of).to_owned())).collect();
        let name = format!("{kind:?}").to_lowercase();
        let (name, reads, needs) = (name.parse().unwrap(), Reads::Models(of), Requirements::default());
        Stage { name, kind, reads, after: None, needs }
    }

    fn names(ready: &[(Stage, Job)]) -> Vec<String> {
        ready.iter().map(|(_, job)| job.name().to_string()).collect()
    }

    /// The jobs that begin together, one wave after the other, where all of a wave end before the next begins.
    fn waves(mut jobs: Jobs) -> Vec<Vec<String>> {
        let mut waves = Vec::new();
        while !jobs.all_done(&milestones()) {
            let ready = jobs.ready(&trained(), &milestones());
            assert!(!ready.is_empty(), "{waves:?} and nothing after it");
            waves.push(names(&ready));
            for (_, job) in &ready {
                jobs.on_succeeded(job);
            }
        }
        waves
    }

    #[test]
    fn jobs_begin_when_what_they_read_is_there() {
        let first = ["average", "evaluate-last", "continuations"];
        assert_eq!(waves(jobs(true, Vec::new())), [&first[..], &["evaluate-average", "export", "benchmark"]]);
        assert_eq!(waves(jobs(false, Vec::new())), [&first[..], &["evaluate-average", "benchmark"]]);
        let evaluation = added(StageKind::Evaluation, &["average", "last"]);
        let with = waves(jobs(false, vec![evaluation]));
        assert_eq!(with[0][3..], ["evaluation/last"]);
        assert_eq!(with[1], ["evaluate-average", "evaluation/average", "benchmark"]);
    }

    #[test]
    fn before_training_only_its_preparation_is_done() {
        let mut jobs =
            Jobs::new(Graph::new(2, true, false, &[], Vec::new()), BTreeSet::new(), BTreeMap::new());
        for progress in [untrained(), trained()] {
            assert_eq!(names(&jobs.ready(&progress, &milestones())), ["prepare"]);
        }
        let (_, prepare) = jobs.ready(&untrained(), &Milestones::default()).remove(0);
        assert!(!jobs.is_prepared());
        jobs.on_succeeded(&prepare);
        assert!(jobs.is_prepared());
        assert!(jobs.ready(&untrained(), &milestones()).is_empty());
    }

    #[test]
    fn milestones_and_other_models_are_measured_while_the_run_trains() {
        let mut jobs = jobs(true, vec![added(StageKind::Evaluation, &["milestones", "hf://a/b", "last"])]);
        let ready = jobs.ready(&untrained(), &stored(&[id(4)]));
        assert_eq!(names(&ready)[0], "evaluation/step-00000004");
        assert!(names(&ready)[1].starts_with("evaluation/a-b-") && ready.len() == 2, "{:?}", names(&ready));
        jobs.on_succeeded(&ready[0].1);
        // The state of a step is the same in every generation.
        let again = CheckpointId::new(StageName::pretraining(), Step::new(4), Generation::new(2));
        assert_eq!(jobs.ready(&untrained(), &stored(&[again])).len(), 1);
        assert_eq!(jobs.ready(&untrained(), &stored(&[again, id(6)])).len(), 2);
    }

    #[test]
    fn what_measures_its_machine_comes_last() {
        let added =
            vec![added(StageKind::Benchmark, &["average"]), added(StageKind::Evaluation, &["average"])];
        let wave = waves(jobs(true, added)).remove(1);
        assert_eq!(wave[2..], ["evaluation/average", "benchmark/average", "benchmark"]);
    }

    #[test]
    fn no_job_runs_twice_at_once() {
        let mut jobs = jobs(true, Vec::new());
        let (_, average) = jobs.ready(&trained(), &milestones()).remove(0);
        jobs.on_started(average.clone(), WorkerId::new("w", Incarnation::new(1)).unwrap());
        // A milestone was damaged and trained again meanwhile.
        let again = CheckpointId::new(StageName::pretraining(), Step::new(8), Generation::new(2));
        let repaired = stored(&[id(4), id(6), again]);
        assert!(!names(&jobs.ready(&trained(), &repaired)).contains(&"average".to_owned()));
        let unstored = Progress { all_stored: false, ..trained() };
        assert_eq!(names(&jobs.ready(&unstored, &repaired)), ["evaluate-last"]);
    }

    #[test]
    fn a_run_without_its_average_makes_it_again() {
        let mut jobs = jobs(true, Vec::new());
        assert_eq!(jobs.on_average_damaged(), None);
        let (_, average) = jobs.ready(&trained(), &milestones()).remove(0);
        jobs.on_succeeded(&average);
        assert_eq!(jobs.on_average_damaged(), Some(average.name()));
        assert_eq!(names(&jobs.ready(&trained(), &milestones()))[0], "average");
    }

    #[test]
    fn a_stage_that_failed_keeps_nothing_else_from_being_done() {
        let mut jobs = jobs(false, vec![added(StageKind::Evaluation, &["last"])]);
        let ready = jobs.ready(&trained(), &milestones());
        let (_, evaluation) = ready.iter().find(|(stage, _)| stage.kind == StageKind::Evaluation).unwrap();
        assert!(jobs.on_given_up(evaluation, ErrorKind::InvalidInput, "no rows"));
        assert!(
            !jobs.on_given_up(&ready[0].1, ErrorKind::Internal, "no memory"),
            "every run needs its average"
        );
        while let [(_, job), ..] = &jobs.ready(&trained(), &milestones())[..] {
            assert_eq!(jobs.failed_for_good(&milestones()), None);
            jobs.on_succeeded(&job.clone());
        }
        assert!(!jobs.all_done(&milestones()));
        let failure = jobs.failed_for_good(&milestones());
        assert_eq!(failure, Some((ErrorKind::InvalidInput, "no rows".to_owned())));
    }

    #[test]
    fn waiting_for_a_worker_counts_only_when_there_is_nothing_else_to_do() {
        let mut jobs = jobs(true, Vec::new());
        let wait = Some(Duration::from_secs(10));
        let stage = Stage {
            needs: Requirements { device: Some("*4090*".to_owned()), memory: None, wait },
            ..added(StageKind::Evaluation, &["last"])
        };
        let at = Duration::from_secs;
        assert_eq!(jobs.on_pending(&stage, false, at(0)), (true, false));
        assert_eq!(jobs.on_pending(&stage, false, at(100)), (false, false));
        assert_eq!(jobs.on_pending(&stage, true, at(100)), (false, false));
        assert_eq!(jobs.on_pending(&stage, true, at(109)), (false, false));
        assert_eq!(jobs.on_pending(&stage, true, at(110)), (false, true));
        jobs.on_served(&stage.name);
        assert_eq!(jobs.on_pending(&stage, true, at(200)), (true, false));
    }
}
