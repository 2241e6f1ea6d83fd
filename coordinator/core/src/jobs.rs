//! The phases of a run around its training, as a graph of jobs.
//!
//! ```text
//! prepare ─► (training) ─► average ─┬─► evaluate-average ─┬─► benchmark
//!                                   ├─► evaluate-last ────┤
//!                                   ├─► continuations ────┤
//!                                   └─► export ───────────┘
//! ```
//! A plan may leave the export out. The benchmark comes last and alone, because what else runs on the machine would be
//! measured with it.

use std::collections::{BTreeMap, BTreeSet};

use ulmus_types::{CheckpointId, CheckpointKind, Job, WorkerId};

/// How often a job may fail before the run gives up.
const ATTEMPTS: u32 = 3;

/// What is done, and what is being done.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    /// Milestones that are averaged.
    average: u64,
    export: bool,
    done: BTreeSet<String>,
    running: BTreeMap<Job, WorkerId>,
    failures: BTreeMap<String, u32>,
}

impl Jobs {
    pub(crate) fn new(done: BTreeSet<String>, average: u64, export: bool) -> Self {
        Self { average, export, done, ..Self::default() }
    }

    pub(crate) fn is_done(&self, name: &str) -> bool {
        self.done.contains(name)
    }

    pub(crate) fn running(&self) -> &BTreeMap<Job, WorkerId> {
        &self.running
    }

    pub(crate) fn started(&mut self, job: Job, worker: WorkerId) {
        self.running.insert(job, worker);
    }

    /// A worker does a job that an earlier coordinator gave it, or this one before the connection broke.
    pub(crate) fn resumed(&mut self, job: Job, worker: WorkerId) {
        if !self.is_done(job.name()) {
            self.running.entry(job).or_insert(worker);
        }
    }

    /// Whether `worker` was really the one that does it.
    pub(crate) fn ended(&mut self, job: &Job, worker: &WorkerId) -> bool {
        if self.running.get(job) == Some(worker) {
            self.running.remove(job);
            return true;
        }
        false
    }

    pub(crate) fn succeeded(&mut self, job: &Job) {
        self.done.insert(job.name().to_owned());
    }

    /// Whether it may be tried again.
    pub(crate) fn failed(&mut self, job: &Job) -> bool {
        let failures = self.failures.entry(job.name().to_owned()).or_insert(0);
        *failures += 1;
        *failures < ATTEMPTS
    }

    pub(crate) fn lost(&mut self, worker: &WorkerId) {
        self.running.retain(|_, at| at != worker);
    }

    /// Jobs that can begin now. `trained` tells that training is done and its last checkpoint stored.
    pub(crate) fn ready(
        &self,
        trained: bool,
        checkpoints: &BTreeMap<CheckpointId, CheckpointKind>,
    ) -> Vec<Job> {
        self.stage(trained, checkpoints)
            .into_iter()
            .filter(|job| !self.is_done(job.name()) && !self.running.contains_key(job))
            .collect()
    }

    /// Whether nothing is left to do.
    pub(crate) fn all_done(
        &self,
        trained: bool,
        checkpoints: &BTreeMap<CheckpointId, CheckpointKind>,
    ) -> bool {
        trained && self.is_done("benchmark") && self.ready(trained, checkpoints).is_empty()
    }

    /// The first stage of the graph that is not done yet.
    fn stage(&self, trained: bool, checkpoints: &BTreeMap<CheckpointId, CheckpointKind>) -> Vec<Job> {
        if !self.is_done("prepare") {
            return vec![Job::Prepare];
        }
        let milestones = milestones(checkpoints);
        let (true, Some(first), Some(last)) = (trained, milestones.first(), milestones.last()) else {
            return Vec::new();
        };
        let averaged = milestones[milestones.len().saturating_sub(self.average as usize)..].to_vec();
        let mut shown = vec![*first, milestones[milestones.len() / 2], *last];
        shown.dedup();
        let mut results = vec![Job::EvaluateAverage, Job::Evaluate(*last), Job::Continue(shown)];
        results.extend(self.export.then_some(Job::Export));
        let stages = [vec![Job::Average(averaged)], results, vec![Job::Benchmark]];
        stages.into_iter().find(|stage| stage.iter().any(|job| !self.is_done(job.name()))).unwrap_or_default()
    }
}

/// Milestones, oldest first; of one step that was passed twice, the newer.
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
    use ulmus_types::{Generation, Step};

    use super::*;

    /// Names of the jobs of a trained run, in the order in which they begin.
    fn names(export: bool) -> Vec<&'static str> {
        let last = CheckpointId::new(Step::new(8), Generation::new(1));
        let checkpoints = BTreeMap::from([(last, CheckpointKind::Milestone)]);
        let mut jobs = Jobs::new(BTreeSet::new(), 5, export);
        let mut names = Vec::new();
        while !jobs.all_done(true, &checkpoints) {
            for job in jobs.ready(true, &checkpoints) {
                jobs.succeeded(&job);
                names.push(job.name());
            }
        }
        names
    }

    #[test]
    fn a_run_is_done_without_the_export_that_it_does_not_want() {
        let with = names(true);
        assert_eq!(with[4..], ["continuations", "export", "benchmark"]);
        let without: Vec<_> = with.into_iter().filter(|name| *name != "export").collect();
        assert_eq!(names(false), without);
    }
}
