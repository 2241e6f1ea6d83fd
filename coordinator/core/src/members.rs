//! The connected workers, what each of them is doing, and which of them sit out.

use std::collections::BTreeMap;
use std::time::Duration;

use ulmus_types::{Digest, Generation, Heartbeat, Hello, Job, StageName, WorkerId};

/// How long a worker sits out after its first fault; each further fault doubles the time.
const FIRST_PENALTY: Duration = Duration::from_secs(5);
/// The longest that a worker sits out.
const LONGEST_PENALTY: Duration = Duration::from_mins(5);
/// After this long without a fault, earlier ones are forgotten.
const FORGIVEN_AFTER: Duration = Duration::from_mins(10);
/// Notices that a worker may send at once; after these, one more per second.
const NOTICES: u32 = 20;
/// Processor time per second that distinguishes a process that works from one in which only the agent is alive.
const WORKS: f64 = 0.01;

/// The members of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roster {
    /// The stage that it trains.
    pub training: StageName,
    /// Its members, by rank.
    pub members: Vec<WorkerId>,
}

/// What a connected worker is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Activity {
    /// It was welcomed, and has to prove that it can read the run folder.
    Greeted,
    /// It computes its fingerprint.
    Warming,
    /// It can take work.
    Idle,
    /// It is in the group of this generation, or still leaving it.
    InGroup(Generation),
    /// It does a job.
    Working(Job),
}

impl Activity {
    /// Whether the worker has been admitted to the run.
    pub(crate) const fn is_admitted(&self) -> bool {
        !matches!(self, Self::Greeted | Self::Warming)
    }
}

/// A connected worker.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) hello: Hello,
    pub(crate) activity: Activity,
    /// When that activity began.
    pub(crate) since: Duration,
    pub(crate) fingerprint: Option<Digest>,
    /// When its last message arrived.
    pub(crate) last_seen: Duration,
    /// When its process was last known to use the processor.
    pub(crate) last_busy: Duration,
    /// Its last heartbeat, and when it arrived.
    pub(crate) heartbeat: (Heartbeat, Duration),
    /// How long its warm-up took, which computes one micro-batch; `None` if it was already warm when it connected.
    pub(crate) warmed_within: Option<Duration>,
    /// It was asked to leave, and is handing over its work.
    pub(crate) draining: bool,
    /// Number of notices that it may still send, and when that was last updated.
    notices: (u32, Duration),
}

impl Member {
    pub(crate) fn on_heartbeat(&mut self, heartbeat: Heartbeat, now: Duration) {
        let (earlier, at) = self.heartbeat;
        let used = heartbeat.busy.saturating_sub(earlier.busy);
        if used.as_secs_f64() >= WORKS * now.saturating_sub(at).as_secs_f64() {
            self.last_busy = now;
        }
        self.heartbeat = (heartbeat, now);
    }

    /// Whether it may send another notice now; counts it.
    pub(crate) fn may_notify(&mut self, now: Duration) -> bool {
        let (left, at) = self.notices;
        let more = now.saturating_sub(at).as_secs();
        let left = left.saturating_add(u32::try_from(more).unwrap_or(NOTICES)).min(NOTICES);
        self.notices = (left.saturating_sub(1), if more > 0 { now } else { at });
        left > 0
    }
}

/// Why a worker sits out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Its process ended during training. The first time is forgiven, and such a worker is still used if no other is
    /// available.
    Died,
    /// Others cannot work with it: it was unreachable or stuck, or sent an invalid message.
    Unworkable,
}

/// The faults of all lives of a worker, which share its name.
#[derive(Debug, Clone)]
struct Penalty {
    faults: u32,
    last: Duration,
    until: Duration,
    fault: Fault,
}

/// All connected workers, in the order of their names.
#[derive(Debug, Default)]
pub(crate) struct Members {
    connected: BTreeMap<WorkerId, Member>,
    penalties: BTreeMap<String, Penalty>,
}

impl Members {
    pub(crate) fn welcome(&mut self, hello: Hello, now: Duration) {
        let member = Member {
            activity: Activity::Greeted,
            since: now,
            fingerprint: None,
            last_seen: now,
            last_busy: now,
            heartbeat: (Heartbeat::default(), now),
            warmed_within: None,
            draining: false,
            notices: (NOTICES, now),
            hello: hello.clone(),
        };
        self.connected.insert(hello.worker, member);
    }

    pub(crate) fn get(&self, worker: &WorkerId) -> Option<&Member> {
        self.connected.get(worker)
    }

    pub(crate) fn get_mut(&mut self, worker: &WorkerId) -> Option<&mut Member> {
        self.connected.get_mut(worker)
    }

    pub(crate) fn remove(&mut self, worker: &WorkerId) -> Option<Member> {
        self.connected.remove(worker)
    }

    pub(crate) fn set(&mut self, worker: &WorkerId, activity: Activity, now: Duration) {
        if let Some(member) = self.connected.get_mut(worker) {
            member.activity = activity;
            member.since = now;
            member.last_busy = now;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&WorkerId, &Member)> {
        self.connected.iter()
    }

    pub(crate) fn ids(&self) -> Vec<WorkerId> {
        self.connected.keys().cloned().collect()
    }

    /// Workers that can take work now.
    pub(crate) fn available(&self, now: Duration) -> Vec<WorkerId> {
        self.idle(|name| self.penalty(name, now).is_none())
    }

    /// Workers that can take work now, including those that sit out only because their process ended. These are used if
    /// there are not enough others.
    pub(crate) fn available_if_needed(&self, now: Duration) -> Vec<WorkerId> {
        self.idle(|name| self.penalty(name, now) != Some(Fault::Unworkable))
    }

    fn idle(&self, may_work: impl Fn(&str) -> bool) -> Vec<WorkerId> {
        let can = |member: &Member| member.activity == Activity::Idle && !member.draining;
        self.connected
            .iter()
            .filter(|(id, member)| can(member) && may_work(id.name()))
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// How much longer a worker of this name gets no work.
    pub(crate) fn sits_out(&self, name: &str, now: Duration) -> Option<Duration> {
        self.penalties
            .get(name)
            .and_then(|penalty| penalty.until.checked_sub(now))
            .filter(|left| !left.is_zero())
    }

    fn penalty(&self, name: &str, now: Duration) -> Option<Fault> {
        self.penalties.get(name).filter(|penalty| now < penalty.until).map(|penalty| penalty.fault)
    }

    /// Records a fault of a worker. Returns how long it sits out.
    pub(crate) fn penalize(&mut self, worker: &WorkerId, fault: Fault, now: Duration) -> Duration {
        let penalty = self.penalties.entry(worker.name().to_owned()).or_insert(Penalty {
            faults: 0,
            last: now,
            until: now,
            fault,
        });
        if now.saturating_sub(penalty.last) > FORGIVEN_AFTER {
            penalty.faults = 0;
        }
        let doublings = match fault {
            Fault::Died => penalty.faults.checked_sub(1),
            Fault::Unworkable => Some(penalty.faults),
        };
        penalty.faults += 1;
        let pause = doublings
            .map_or(Duration::ZERO, |doublings| FIRST_PENALTY * 2_u32.pow(doublings.min(10)))
            .min(LONGEST_PENALTY);
        (penalty.last, penalty.until, penalty.fault) = (now, now + pause, fault);
        pause
    }

    /// Another life of the same worker, if one is still connected.
    pub(crate) fn namesake(&self, worker: &WorkerId) -> Option<WorkerId> {
        self.connected.keys().find(|other| other.name() == worker.name() && *other != worker).cloned()
    }

    /// Workers that have sent nothing for longer than `dead_after`.
    pub(crate) fn timed_out(&self, now: Duration, dead_after: Duration) -> Vec<WorkerId> {
        self.connected
            .iter()
            .filter(|(_, member)| now.saturating_sub(member.last_seen) > dead_after)
            .map(|(id, _)| id.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use ulmus_types::Incarnation;

    use super::*;

    #[test]
    fn faults_cost_more_and_more_until_they_are_forgiven() {
        let mut members = Members::default();
        let worker = |life| WorkerId::new("w", Incarnation::new(life)).unwrap();
        let at = Duration::from_secs;
        assert_eq!(members.penalize(&worker(1), Fault::Died, at(0)), at(0), "once is nobody's fault");
        assert_eq!(
            members.penalize(&worker(2), Fault::Died, at(1)),
            at(5),
            "its next life is the same worker"
        );
        assert_eq!(members.penalize(&worker(3), Fault::Unworkable, at(2)), at(20));
        for second in 3..20 {
            members.penalize(&worker(4), Fault::Died, at(second));
        }
        assert_eq!(members.penalize(&worker(4), Fault::Died, at(20)), LONGEST_PENALTY);
        let later = at(21) + FORGIVEN_AFTER;
        assert_eq!(members.penalize(&worker(5), Fault::Unworkable, later), FIRST_PENALTY);
    }
}
