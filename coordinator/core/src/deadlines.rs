//! How long each activity may take, and who is to blame when one takes longer.
//!
//! A worker whose agent is silent is dead. A worker whose agent is alive but whose trainer is stuck is found by its
//! heartbeats. They say what the trainer is doing, when it last showed a sign of life (while it waits for text or for a
//! store it gives one all the time), and how many of the group's collective operations it has entered. The time that a
//! step may take is derived from earlier steps, so that a stuck trainer is noticed within a few step times.

use std::collections::BTreeSet;
use std::time::Duration;

use ulmus_types::{
    CONNECT_WITHIN, ErrorKind, ExitStatus, FORM_STILL_FOR, GREETED_WITHIN, Generation, Section, WorkerId,
};

use crate::effect::Effect;
use crate::group::Group;
use crate::members::{Activity, Fault, Member};
use crate::state::{Coordinator, Life};

/// How long the process of a worker that warms up may be stuck.
const WARM_STILL_FOR: Duration = Duration::from_mins(3);
/// How long the process of a worker that does a job may be stuck: it may retry several stores for a minute each.
const JOB_STILL_FOR: Duration = Duration::from_mins(5);
/// How long a section may take before anything was measured: a micro-batch of a large model takes minutes on a CPU.
const FIRST_SECTION_WITHIN: Duration = Duration::from_mins(10);
/// Lower limit of a section's deadline when only the warm-up was measured, which computes one micro-batch.
const WARMED_SECTION_AT_LEAST: Duration = Duration::from_secs(30);
/// How long an agent may take to hash the states that its trainer has left with it.
const HASHED_WITHIN: Duration = Duration::from_mins(30);
/// Lower limit of a section's deadline, which is also never shorter than `dead_after`: computers pause.
const SECTION_AT_LEAST: Duration = Duration::from_secs(4);
/// How much longer a group may be stuck while all its members wait for each other: at about that time the operating
/// system notices that a link is down, and the error names the link.
const LINK_MARGIN: Duration = Duration::from_millis(1500);
/// How long a member that waits in a collective operation may take to leave its group. An abort wakes it.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
/// How long a stop may take before the process exits without saving.
const STOP_WITHIN: Duration = Duration::from_mins(2);

impl Coordinator {
    pub(crate) fn on_tick(&mut self, now: Duration) {
        for worker in self.members.timed_out(now, self.settings.dead_after) {
            let why = format!("no heartbeat for {:.1} s", self.settings.dead_after.as_secs_f64());
            self.drop_worker(&worker, &why, Fault::Died, now);
        }
        if self.members.iter().any(|(_, member)| member.activity.is_admitted() && !member.hello.only_jobs) {
            self.admitted_at = Some(now);
        }
        for (worker, why) in self.stuck(now) {
            let job = match self.members.get(&worker).map(|member| &member.activity) {
                Some(Activity::Working(job)) => Some(job.clone()),
                _ => None,
            };
            self.drop_worker(&worker, &why, Fault::Unworkable, now);
            if let Some(job) = job
                && !self.jobs.on_failed(&job, &worker)
            {
                let message =
                    format!("{} finished on no worker; last, on {}: {why}", job.name(), worker.name());
                self.give_up_job(&job, ErrorKind::Internal, message);
            }
        }
        self.watch_group(now);
        self.watch_storing(now);
        if let Life::Stopping { since } = self.life
            && now > since + STOP_WITHIN
        {
            self.exit(
                ExitStatus::Failed,
                "stopped without saving: the group did not pause in time".to_owned(),
            );
        }
    }

    pub(crate) fn drop_worker(&mut self, worker: &WorkerId, why: &str, fault: Fault, now: Duration) {
        self.effect(Effect::Disconnect(worker.clone()));
        self.lose_worker(worker, why, fault, now);
    }

    /// Workers that do something other than steps and have exceeded its deadline.
    fn stuck(&self, now: Duration) -> Vec<(WorkerId, String)> {
        let late = |id: &WorkerId, member: &Member| {
            let still = now.saturating_sub(member.last_busy);
            let within = match &member.activity {
                Activity::Greeted => {
                    let since = now.saturating_sub(member.since);
                    return (since > GREETED_WITHIN)
                        .then(|| format!("it has not read the store for {since:.0?}"));
                }
                Activity::Warming => WARM_STILL_FOR,
                Activity::Working(job) => JOB_STILL_FOR * 2_u32.pow(self.jobs.failures(job)),
                // It is leaving a group that `watch_group` no longer watches.
                Activity::InGroup(_) if !self.group.contains(id) => {
                    return self.late_to_leave(member, member.since, now);
                }
                Activity::Idle | Activity::InGroup(_) => return None,
            };
            (still > within).then(|| format!("its process has been stuck for {still:.0?}"))
        };
        self.members.iter().filter_map(|(id, member)| Some((id.clone(), late(id, member)?))).collect()
    }

    fn watch_group(&mut self, now: Duration) {
        match &self.group {
            Group::Absent { .. } | Group::Adopting { .. } => {}
            Group::Forming { members, connected, until, .. } => {
                if *until <= now && connected.len() < members.len() {
                    let missing: Vec<&str> =
                        members.iter().filter(|id| !connected.contains(id)).map(WorkerId::name).collect();
                    let why = format!(
                        "the group did not connect within {} s (missing: {})",
                        CONNECT_WITHIN.as_secs(),
                        missing.join(", ")
                    );
                    self.dissolve(&why, true, now);
                    return;
                }
                let frozen = self.frozen(members.iter(), *until, now);
                self.drop_all(frozen, now);
            }
            Group::Training { members, since, .. } => {
                let (members, since) = (members.clone(), *since);
                let frozen = self.frozen(members.iter(), since, now);
                if !frozen.is_empty() {
                    self.drop_all(frozen, now);
                } else if let Some(still) = self.all_waiting(&members, since, now) {
                    self.dissolve(
                        &format!("all members have waited for each other for {still:.1?}"),
                        true,
                        now,
                    );
                }
            }
            Group::Dissolving { waiting, since } => {
                let since = *since;
                let late = |worker: &WorkerId| {
                    let why = self.late_to_leave(self.members.get(worker)?, since, now)?;
                    Some((worker.clone(), why))
                };
                let late: Vec<(WorkerId, String)> = waiting.iter().filter_map(late).collect();
                self.drop_all(late, now);
            }
        }
    }

    fn drop_all(&mut self, workers: Vec<(WorkerId, String)>, now: Duration) {
        for (worker, why) in workers {
            self.drop_worker(&worker, &why, Fault::Unworkable, now);
        }
    }

    /// The complaint about a member that takes too long to leave its group, which has been ending since `since`.
    fn late_to_leave(&self, member: &Member, since: Duration, now: Duration) -> Option<String> {
        let Activity::InGroup(generation) = member.activity else { return None };
        let (heartbeat, at) = member.heartbeat;
        let (section, passed) = in_section(member, generation, since, now);
        let within = match section {
            // The trainer has left the group or is idle, and the states that it left are being hashed.
            _ if heartbeat.generation != generation => HASHED_WITHIN,
            Section::Collective => LEAVE_WITHIN,
            section => self.section_within(section, member, now),
        };
        // Only a heartbeat sent after the group ended is evidence.
        let is_evidence = at > since + Duration::from_secs(1);
        (is_evidence && passed > within).then(|| format!("it did not leave its group within {passed:.1?}"))
    }

    /// How long a section may take.
    fn section_within(&self, section: Section, member: &Member, now: Duration) -> Duration {
        match section {
            Section::Computing
            | Section::Collective
            | Section::Reading
            | Section::Measuring
            | Section::Storing => match (self.step_time(), member.warmed_within) {
                (Some(step), _) => {
                    let measured = step * 2 + Duration::from_secs(3);
                    SECTION_AT_LEAST.max(self.settings.dead_after).max(measured) * self.leniency()
                }
                (None, Some(warm_up)) => WARMED_SECTION_AT_LEAST.max(warm_up * 4) * self.leniency(),
                (None, None) => FIRST_SECTION_WITHIN,
            },
            // As long as the process uses the processor, and a while longer.
            Section::Forming | Section::Idle => {
                let still = now.saturating_sub(member.last_busy);
                if still > FORM_STILL_FOR { FORM_STILL_FOR } else { Duration::MAX }
            }
        }
    }

    /// The factor by which deadlines are extended. The machines or their links may have become slower than they were,
    /// so every group that completes no update doubles the deadlines of the next.
    fn leniency(&self) -> u32 {
        2_u32.pow(self.futile_groups.saturating_sub(1).min(10))
    }

    /// The time that a step of the current group should take, judged by earlier steps.
    fn step_time(&self) -> Option<Duration> {
        let size = self.group.members().len().max(1) as u64;
        let mut times: Vec<Duration> = self.micro_batch_times.iter().copied().collect();
        times.sort();
        let median = times.get(times.len() / 2)?;
        let micro_batches = self.training_of(self.generation)?.settings.micro_batches;
        Some(*median * micro_batches.div_ceil(size).max(1) as u32)
    }

    /// Members whose trainer is stuck although it does not wait for another member.
    fn frozen<'a>(
        &self,
        members: impl Iterator<Item = &'a WorkerId>,
        begun: Duration,
        now: Duration,
    ) -> Vec<(WorkerId, String)> {
        let members: Vec<(&WorkerId, &Member)> =
            members.filter_map(|id| self.members.get(id).map(|member| (id, member))).collect();
        let entered = |member: &Member| {
            let (heartbeat, _) = member.heartbeat;
            if heartbeat.generation == self.generation { heartbeat.collective } else { 0 }
        };
        let least = members.iter().map(|(_, member)| entered(member)).min().unwrap_or(0);
        let most = members.iter().map(|(_, member)| entered(member)).max().unwrap_or(0);
        let frozen = |(id, member): &(&WorkerId, &Member)| {
            let (section, passed) = in_section(member, self.generation, begun, now);
            let waits = section == Section::Collective && (entered(member) > least || least == most);
            let late = passed > self.section_within(section, member, now);
            (late && !waits).then(|| {
                let name = format!("{section:?}").to_lowercase();
                let why = format!(
                    "its trainer has been stuck ({name}) for {passed:.1?}, at collective operation {}",
                    entered(member)
                );
                ((*id).clone(), why)
            })
        };
        members.iter().filter_map(frozen).collect()
    }

    /// How long all members have been waiting in the same collective operation, if that is too long.
    fn all_waiting(&self, members: &[WorkerId], begun: Duration, now: Duration) -> Option<Duration> {
        let mut operations = BTreeSet::new();
        let mut least = Duration::MAX;
        for member in members.iter().filter_map(|id| self.members.get(id)) {
            let (section, passed) = in_section(member, self.generation, begun, now);
            if section != Section::Collective {
                return None;
            }
            operations.insert(member.heartbeat.0.collective);
            least = least.min(passed);
            if passed <= self.section_within(section, member, now) + LINK_MARGIN {
                return None;
            }
        }
        (operations.len() == 1).then_some(least)
    }
}

/// What a member of a group is doing, and for how long. Time before the group began does not count.
fn in_section(
    member: &Member,
    generation: Generation,
    begun: Duration,
    now: Duration,
) -> (Section, Duration) {
    let (heartbeat, at) = member.heartbeat;
    if heartbeat.generation != generation {
        return (Section::Forming, now.saturating_sub(begun));
    }
    let since = at.saturating_sub(heartbeat.since).max(begun);
    (heartbeat.section, now.saturating_sub(since))
}
