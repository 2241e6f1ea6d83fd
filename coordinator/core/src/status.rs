//! The status of a run, for people and programs that watch it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use ulmus_types::{CheckpointId, Generation, JobName, StageName, Step, WorkerId};

use crate::group::Group;
use crate::jobs::JobStatus;
use crate::members::{Activity, Member};
use crate::state::{Coordinator, Life};
use crate::trainings::Training;

/// A snapshot of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// What the run is doing.
    pub phase: Phase,
    /// The stage that trains now or is the next to do so, if any is left.
    pub training: Option<StageName>,
    /// Number of its recorded updates, or of those of the last stage that trained.
    pub step: Step,
    /// The last assigned generation.
    pub generation: Generation,
    /// The connected workers, ordered by name.
    pub members: Vec<MemberStatus>,
    /// The jobs that the plan asks for, and the progress of each.
    pub jobs: BTreeMap<JobName, JobStatus>,
    /// States that workers hold in memory until they are stored as checkpoints.
    pub pending_checkpoints: Vec<CheckpointId>,
}

/// What a run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting: there are not enough workers for what comes next.
    Waiting {
        /// Number of workers that can take work.
        ready: usize,
        /// Number of workers that are needed.
        needed: usize,
    },
    /// Forming or dissolving a group.
    Forming,
    /// Training.
    Training,
    /// Doing jobs, before or after training.
    Jobs,
    /// Storing the remaining states.
    Storing,
    /// Stopping, because a person asked for it.
    Stopping,
    /// The run is over.
    Ended,
}

/// A connected worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// The worker.
    pub worker: WorkerId,
    /// What the worker computes on, as it describes that itself.
    pub device: String,
    /// Whether it serves jobs and does not train.
    pub only_jobs: bool,
    /// What the worker is doing.
    pub doing: Doing,
    /// How long it has been doing that.
    pub since: Duration,
    /// How long ago its last message arrived.
    pub last_seen: Duration,
    /// Whether it was asked to leave, and is handing over its work.
    pub draining: bool,
    /// How much longer it sits out because of its faults, if it does.
    pub sits_out: Option<Duration>,
}

/// What a worker is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doing {
    /// It has to prove that it can read the run folder.
    Joining,
    /// It computes its fingerprint.
    WarmingUp,
    /// It can take work.
    Idle,
    /// It is in the group of this generation.
    Training(Generation),
    /// It does this job.
    Working(JobName),
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joining => f.write_str("joining"),
            Self::WarmingUp => f.write_str("warming up"),
            Self::Idle => f.write_str("idle"),
            Self::Training(generation) => write!(f, "in generation {generation}"),
            Self::Working(job) => write!(f, "working on {job}"),
        }
    }
}

impl Coordinator {
    /// The status of the run after the last event.
    pub fn status(&self) -> Status {
        let now = self.last_tick.unwrap_or_default().saturating_sub(self.slept);
        let candidates = self.candidates(now);
        Status {
            phase: self.phase(now),
            training: self.current().map(Training::name),
            step: self.step(),
            generation: self.generation,
            members: self
                .members
                .iter()
                .map(|(id, member)| self.member_status(id, member, &candidates, now))
                .collect(),
            jobs: self.jobs.status(&self.milestones()),
            pending_checkpoints: self.snapshots.ids().collect(),
        }
    }

    fn phase(&self, now: Duration) -> Phase {
        match self.life {
            Life::Running => {}
            Life::Stopping { .. } => return Phase::Stopping,
            Life::Ended => return Phase::Ended,
        }
        match &self.group {
            Group::Training { .. } => return Phase::Training,
            Group::Adopting { .. } | Group::Forming { .. } | Group::Dissolving { .. } => {
                return Phase::Forming;
            }
            Group::Absent { .. } => {}
        }
        if !self.jobs.running().is_empty() {
            return Phase::Jobs;
        }
        let is_due = self.due_training().is_some();
        if !is_due && !self.snapshots.is_empty() {
            return Phase::Storing;
        }
        let ready = self.candidates(now).len();
        let needed = match &self.group {
            _ if !is_due => 1,
            // The first group waits for the expected workers for a while.
            Group::Absent { enough_since: Some(since) }
                if !self.had_a_group && now < *since + self.settings.rejoin_window =>
            {
                self.settings.expected_workers
            }
            _ => self.settings.min_workers,
        };
        match (ready < needed, is_due) {
            (true, _) => Phase::Waiting { ready, needed },
            (false, true) => Phase::Forming,
            // A job waits to be tried again.
            (false, false) => Phase::Jobs,
        }
    }

    fn member_status(
        &self,
        worker: &WorkerId,
        member: &Member,
        candidates: &[WorkerId],
        now: Duration,
    ) -> MemberStatus {
        MemberStatus {
            worker: worker.clone(),
            device: member.hello.device.clone(),
            only_jobs: member.hello.only_jobs,
            doing: match &member.activity {
                Activity::Greeted => Doing::Joining,
                Activity::Warming => Doing::WarmingUp,
                Activity::Idle => Doing::Idle,
                Activity::InGroup(generation) => Doing::Training(*generation),
                Activity::Working(job) => Doing::Working(job.name()),
            },
            since: now.saturating_sub(member.since),
            last_seen: now.saturating_sub(member.last_seen),
            draining: member.draining,
            // One that is taken if need be, though it should sit out, does not.
            sits_out: self.members.sits_out(worker.name(), now).filter(|_| !candidates.contains(worker)),
        }
    }
}
