//! What may take how long, and who is to blame when it takes longer.
//!
//! A worker whose agent is silent is dead. One whose agent lives and whose trainer stands still is found by its
//! heartbeats: they tell what the trainer is doing, when it last showed that it is there (while it waits for text or for a
//! store it says so all the time), and how many collective operations of the group it has entered. A step is judged by the steps before it, so that a frozen trainer is noticed within a few of them.

use std::collections::BTreeSet;
use std::time::Duration;

use ulmus_types::{CONNECT_WITHIN, ExitStatus, Generation, Section, WorkerId};

use crate::coordinator::Coordinator;
use crate::effect::Effect;
use crate::group::Group;
use crate::members::{Activity, Fault, Member};

/// How long a worker may take to read the store's nonce. Stores are asked again for a minute.
const GREETED_WITHIN: Duration = Duration::from_secs(90);
/// How long a process may stand still that warms up.
const WARM_STILL_FOR: Duration = Duration::from_mins(3);
/// How long a process may stand still that forms a group: it reads a state, or waits for others that do.
const FORM_STILL_FOR: Duration = Duration::from_secs(30);
/// How long a process may stand still that does a job: stores are asked again for a minute, and there may be several.
const JOB_STILL_FOR: Duration = Duration::from_mins(5);
/// How long a section may take before anything was measured: a micro-batch of a large model takes minutes on a processor.
const FIRST_SECTION_WITHIN: Duration = Duration::from_mins(10);
/// The least that it may take when only the warm-up was measured, which computes one micro-batch.
const WARMED_SECTION_AT_LEAST: Duration = Duration::from_secs(30);
/// How long an agent may take to hash what its trainer has left.
const HASHED_WITHIN: Duration = Duration::from_mins(30);
/// The least time that a section may take, and never less than a worker may be silent: computers pause.
const SECTION_AT_LEAST: Duration = Duration::from_secs(4);
/// How much longer a group may stand still whose members all wait for each other: the system notices a link that is down
/// at about that time, and names it.
const LINK_MARGIN: Duration = Duration::from_millis(1500);
/// How long a member that waits for others may take to leave a group: it is woken.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
/// How long a stop may take before the process ends without having saved.
const STOP_WITHIN: Duration = Duration::from_mins(2);

impl Coordinator {
    pub(crate) fn on_tick(&mut self, now: Duration) {
        for worker in self.members.timed_out(now, self.settings.dead_after) {
            let why = format!("no heartbeat for {:.1} s", self.settings.dead_after.as_secs_f64());
            self.drop_worker(&worker, &why, Fault::Died, now);
        }
        if self.members.iter().any(|(_, member)| member.activity.is_admitted()) {
            self.admitted_at = Some(now);
        }
        for (worker, why) in self.standing_still(now) {
            let job = match self.members.get(&worker).map(|member| &member.activity) {
                Some(Activity::Working(job)) => Some(job.clone()),
                _ => None,
            };
            self.drop_worker(&worker, &why, Fault::Unworkable, now);
            if let Some(job) = job
                && !self.jobs.failed(&job, &worker)
            {
                let message =
                    format!("{} came to no end on any worker; {}: {why}", job.name(), worker.name());
                self.exit(ExitStatus::Failed, message);
            }
        }
        self.watch_group(now);
        self.watch_storing(now);
        if self.stopping_since.is_some_and(|since| now > since + STOP_WITHIN) {
            self.exit(
                ExitStatus::Failed,
                "stopped without saving: the group did not pause in time".to_owned(),
            );
        }
    }

    pub(crate) fn drop_worker(&mut self, worker: &WorkerId, why: &str, fault: Fault, now: Duration) {
        self.effect(Effect::Disconnect(worker.clone()));
        self.lose(worker, why, fault, now);
    }

    /// Workers outside of steps whose process does not compute any more.
    fn standing_still(&self, now: Duration) -> Vec<(WorkerId, String)> {
        let late = |id: &WorkerId, member: &Member| {
            let still = now.saturating_sub(member.last_busy);
            let within = match &member.activity {
                Activity::Greeted => {
                    let since = now.saturating_sub(member.since);
                    return (since > GREETED_WITHIN)
                        .then(|| format!("it did not read the store for {since:.0?}"));
                }
                Activity::Warming => WARM_STILL_FOR,
                Activity::Working(job) => JOB_STILL_FOR * 2_u32.pow(self.jobs.failures(job)),
                // The group that it is on its way out of is not looked at any more.
                Activity::InGroup(_) if !self.group.contains(id) => {
                    return self.late_to_leave(member, member.since, now);
                }
                Activity::Idle | Activity::InGroup(_) => return None,
            };
            (still > within).then(|| format!("its process has stood still for {still:.0?}"))
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
                self.freeze_out(frozen, now);
            }
            Group::Training { members, since, .. } => {
                let (members, since) = (members.clone(), *since);
                let frozen = self.frozen(members.iter(), since, now);
                if !frozen.is_empty() {
                    self.freeze_out(frozen, now);
                } else if let Some(still) = self.all_wait(&members, since, now) {
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
                self.freeze_out(late, now);
            }
        }
    }

    fn freeze_out(&mut self, frozen: Vec<(WorkerId, String)>, now: Duration) {
        for (worker, why) in frozen {
            self.drop_worker(&worker, &why, Fault::Unworkable, now);
        }
    }

    /// Whether a member takes too long to leave its group, which has been ending since then.
    fn late_to_leave(&self, member: &Member, since: Duration, now: Duration) -> Option<String> {
        let Activity::InGroup(generation) = member.activity else { return None };
        let (heartbeat, at) = member.heartbeat;
        let (section, passed) = in_section(member, generation, since, now);
        let within = match section {
            // The trainer has left, or sleeps; what it keeps is being hashed.
            _ if heartbeat.generation != generation => HASHED_WITHIN,
            Section::Collective => LEAVE_WITHIN,
            section => self.section_within(section, member, now),
        };
        // Only a heartbeat that was sent after the group ended tells anything.
        let told = at > since + Duration::from_secs(1);
        (told && passed > within).then(|| format!("it did not leave its group within {passed:.1?}"))
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
            // As long as the process computes, and a while more.
            Section::Forming | Section::Idle => {
                let still = now.saturating_sub(member.last_busy);
                if still > FORM_STILL_FOR { FORM_STILL_FOR } else { Duration::MAX }
            }
        }
    }

    /// The machines or their links may have become slower than they were: each group that did no update doubles what the
    /// next one is given.
    fn leniency(&self) -> u32 {
        2_u32.pow(self.futile_groups.saturating_sub(1).min(10))
    }

    /// The time that a step of the group at hand should take, by those before it.
    fn step_time(&self) -> Option<Duration> {
        let size = self.group.members().len().max(1) as u64;
        let mut pace: Vec<Duration> = self.pace.iter().copied().collect();
        pace.sort();
        let median = pace.get(pace.len() / 2)?;
        Some(*median * self.settings.micro_batches.div_ceil(size).max(1) as u32)
    }

    /// Members whose trainer stands still though it waits for nobody.
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
                    "its trainer has stood still ({name}) for {passed:.1?}, at collective operation {}",
                    entered(member)
                );
                ((*id).clone(), why)
            })
        };
        members.iter().filter_map(frozen).collect()
    }

    /// For how long all members have been in the same collective operation, if that is too long.
    fn all_wait(&self, members: &[WorkerId], begun: Duration, now: Duration) -> Option<Duration> {
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

/// What a member of a group does, and for how long; its section began no earlier than the group did.
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
