//! What follows from an event, and from the state after it.
//!
//! The transitions are in files named after their subjects: `joining`, `training`, `checkpoints`, `work` (jobs) and
//! `deadlines`. Before any of them, `check` decides whether a worker may send a message at all.

use std::time::Duration;

use ulmus_types::{ErrorKind, ExitStatus, RunId, ToCoordinator, ToWorker, WorkerId, for_people};

use crate::check::Verdict;
use crate::effect::{Effect, Notification};
use crate::event::Event;
use crate::group::Group;
use crate::invariants;
use crate::members::{Activity, Fault};
use crate::state::{Coordinator, Life, TEXT_LIMIT};

/// After this many reports since the last update that contradict the record, the run stops.
const CONTRADICTIONS: u32 = 3;

impl Coordinator {
    /// Handles an event and returns what to do about it.
    pub fn on(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        let now = self.time_awake(now, &event);
        match event {
            Event::Ticked => self.on_tick(now),
            Event::Received { worker, message: ToCoordinator::Hello(hello), .. } => {
                debug_assert_eq!(worker, hello.worker);
                self.on_hello(hello, now);
            }
            Event::Received { worker, run, message } => self.on_message(&worker, run, message, now),
            Event::Contradicted(worker, why) => self.on_contradicted(&worker, &why, now),
            Event::ReceivedInvalid(worker, why) => self.expel(&worker, &why, now),
            Event::Disconnected(worker) => {
                self.lose_worker(&worker, "its connection ended", Fault::Died, now);
            }
            Event::CheckpointCommitted(checkpoint) => self.on_committed(checkpoint, now),
            Event::CommitFailed(checkpoint, kind, why) => self.on_commit_failed(checkpoint, kind, &why, now),
            Event::PartsDamaged(checkpoint, files, why) => {
                self.emit(Notification::Alarm(format!("{why}; it will be stored again")));
                self.snapshots.on_parts_damaged(checkpoint, &files, &why, now);
            }
            Event::CheckpointDamaged(checkpoint, why) => self.on_damaged(checkpoint, &why),
            Event::ExamplesMade(training, updates) => {
                if let Some(training) = self.training_mut(training) {
                    training.record.updates = training.settings.updates.or(Some(updates));
                }
            }
            Event::StopRequested if self.life == Life::Running => self.life = Life::Stopping { since: now },
            Event::StopRequested => {}
            Event::LocalWorkersFailed(why) => self.on_local_workers_failed(&why, now),
        }
        if self.life != Life::Ended {
            self.advance(now);
        }
        // A run that has ended may be left half-way through a transition.
        debug_assert_eq!(invariants::broken(self).filter(|_| self.life != Life::Ended), None);
        std::mem::take(&mut self.effects)
    }

    /// The time for which this process has been running: no worker is late because the coordinator's process or machine
    /// was paused.
    fn time_awake(&mut self, now: Duration, event: &Event) -> Duration {
        const LONGEST_TICK: Duration = Duration::from_secs(1);
        if *event == Event::Ticked {
            let passed = self.last_tick.map_or(Duration::ZERO, |last| now.saturating_sub(last));
            if passed > LONGEST_TICK {
                self.slept += passed;
            }
            self.last_tick = Some(now);
        }
        // The clock also stops if a tick is overdue, so that messages that waited for this process do not look late.
        let last = self.last_tick.unwrap_or(now);
        let passed = now.saturating_sub(last);
        let passed = if passed > LONGEST_TICK { Duration::ZERO } else { passed };
        (last + passed).saturating_sub(self.slept)
    }

    fn on_message(&mut self, worker: &WorkerId, run: Option<RunId>, message: ToCoordinator, now: Duration) {
        // Ignore workers that were not welcomed, and earlier lives of those that were.
        let Some(member) = self.members.get_mut(worker) else { return };
        member.last_seen = now;
        if run != Some(self.settings.id) {
            // A worker that has not read its welcome yet sends only heartbeats.
            if run.is_some() || !matches!(message, ToCoordinator::Heartbeat(_)) {
                let about = run.map_or("no run".to_owned(), |run| format!("run {}", run.short()));
                let why = format!(
                    "its {} message is about {about}, and this is run {}",
                    message.name(),
                    self.settings.id.short()
                );
                self.expel(worker, &why, now);
            }
            return;
        }
        match self.check(worker, &message) {
            Verdict::Accept => self.apply(worker, message, now),
            Verdict::Stale => {}
            Verdict::Impossible(why) => {
                let why = format!("its {} message is invalid: {why}", message.name());
                self.expel(worker, &why, now);
            }
            Verdict::Ahead(generation) => self.refuse_ahead(worker, generation),
        }
    }

    /// Acts on a message that has passed all checks.
    fn apply(&mut self, worker: &WorkerId, message: ToCoordinator, now: Duration) {
        match message {
            ToCoordinator::Hello(_) => {}
            ToCoordinator::Heartbeat(heartbeat) => {
                if let Some(member) = self.members.get_mut(worker) {
                    member.on_heartbeat(heartbeat, now);
                }
            }
            ToCoordinator::StoreRead(read) => self.on_store_read(worker, read, now),
            ToCoordinator::Ready(ready) => self.on_ready(worker, ready, now),
            ToCoordinator::Unfit { kind, message } => self.on_unfit(worker, kind, &message),
            ToCoordinator::Draining => self.on_draining(worker),
            ToCoordinator::Connected(generation) => self.on_connected(worker, generation),
            ToCoordinator::Formed { generation, step } => self.on_formed(worker, generation, step, now),
            ToCoordinator::Steps { generation, reports } => self.on_steps(generation, reports),
            ToCoordinator::Reading { step, sources } => {
                self.effects.push(Effect::SaveReading(worker.clone(), step, sources));
            }
            ToCoordinator::Left { generation, step, reason } => {
                self.on_left(worker, generation, step, reason, now);
            }
            ToCoordinator::Snapshot(snapshot) => self.on_snapshot(worker, &snapshot, now),
            ToCoordinator::Written { checkpoint, files } => {
                self.snapshots.on_written(checkpoint, worker, files, now);
            }
            ToCoordinator::WriteFailed { checkpoint, kind, message } => {
                self.on_write_failed(worker, checkpoint, kind, &message, now);
            }
            ToCoordinator::Notice(text) => self.on_notice(worker, &text, now),
            ToCoordinator::JobDone { job, result } => self.on_job_done(worker, job, result, now),
            ToCoordinator::JobFailed { job, kind, message, bad_unit, damaged } => {
                self.on_job_failed(worker, &job, kind, &message, bad_unit.as_ref(), damaged, now);
            }
        }
    }

    /// A worker's report of a step contradicts the record. That worker's machine may be at fault; after several such
    /// reports, no result could be trusted.
    fn on_contradicted(&mut self, worker: &WorkerId, why: &str, now: Duration) {
        self.contradictions += 1;
        let machines = "the machines of this run compute different results, or one of them is faulty";
        if self.contradictions == CONTRADICTIONS {
            let message = format!("{why}, according to {}; {machines}", worker.name());
            return self.exit(ExitStatus::Corrupt, message);
        }
        self.expel(worker, &format!("{why}; {machines}"), now);
    }

    fn on_notice(&mut self, worker: &WorkerId, text: &str, now: Duration) {
        let Some(member) = self.members.get_mut(worker) else { return };
        if member.may_notify(now) {
            let text = for_people(text, TEXT_LIMIT);
            self.emit(Notification::Info(format!("{}: {text}", worker.name())));
        }
    }

    /// Does what the state calls for, whatever the event was.
    fn advance(&mut self, now: Duration) {
        if matches!(&self.group, Group::Dissolving { waiting, .. } if waiting.is_empty()) {
            self.group = Group::ABSENT;
            self.effects.push(Effect::SaveGroupEnded(self.generation));
            self.judge_suspicions(now);
        }
        self.adopt_group(now);
        self.request_from_group(now);
        self.assign_parts(now);
        self.dismiss_drained();
        self.form_group(now);
        self.start_jobs(now);
        if self.is_trained_and_stored() && self.jobs.all_done(&self.milestones()) {
            self.exit(ExitStatus::Done, "every phase is done".to_owned());
        } else if let Some((kind, message)) = self.failed_for_good() {
            let message =
                format!("{message}; everything else is done: correct that, and run the same command again");
            self.exit(kind.into(), message);
        } else if matches!(self.life, Life::Stopping { .. })
            && matches!(self.group, Group::Absent { .. })
            && self.snapshots.is_empty()
        {
            let newest = self.trainings.iter().rev().find_map(|t| t.record.checkpoints.keys().next_back());
            let message = match newest {
                Some(last) => {
                    format!("interrupted; {last} is stored, and the same command resumes from there")
                }
                None => "interrupted; the same command continues where this one stopped".to_owned(),
            };
            self.exit(ExitStatus::Interrupted, message);
        }
    }

    fn failed_for_good(&self) -> Option<(ErrorKind, String)> {
        if !self.is_trained_and_stored() {
            return None;
        }
        self.jobs.failed_for_good(&self.milestones())
    }

    /// Ends the session of a worker that sent an invalid message. It takes no part in the run until it reconnects.
    pub(crate) fn expel(&mut self, worker: &WorkerId, why: &str, now: Duration) {
        let Some(member) = self.members.get(worker) else { return };
        if let Activity::Working(job) = member.activity.clone() {
            self.on_lost_with(worker, &job);
        }
        let reason = format!("the coordinator ended this session: {why}");
        self.send(worker, ToWorker::Refused { kind: ErrorKind::Retry, reason });
        self.drop_worker(worker, why, Fault::Unworkable, now);
    }

    /// Gives a worker no work for a while, if its fault deserves that.
    pub(crate) fn sit_out(&mut self, worker: &WorkerId, fault: Fault, why: &str, now: Duration) {
        let pause = self.members.penalize(worker, fault, now);
        if pause > Duration::ZERO {
            self.emit(Notification::SitsOut(worker.clone(), pause, why.to_owned()));
        }
    }
}
