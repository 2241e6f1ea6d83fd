//! How workers join, return and leave.

use std::time::Duration;

use ulmus_types::{
    Digest, ErrorKind, ExitStatus, Generation, Hello, Ready, Step, ToWorker, WorkerId, WorkerStatus,
    for_people,
};

use crate::effect::{Effect, Notification};
use crate::group::Group;
use crate::members::{Activity, Fault, Member};
use crate::state::{Coordinator, TEXT_LIMIT};

/// The longest address that is passed on to other workers, in bytes: a host name has at most 253 characters.
const ADDRESS_LIMIT: usize = 300;

impl Coordinator {
    /// Checks whether the sender of a hello may have a session. This changes nothing, so a stranger that uses a
    /// worker's name cannot end that worker's session.
    ///
    /// # Errors
    /// The kind and the message with which the sender is refused.
    pub fn check_hello(&self, hello: &Hello) -> Result<(), (ErrorKind, String)> {
        let Hello { worker, version, run, secret, status, .. } = hello;
        let name = worker.name();
        if hello.address.len() > ADDRESS_LIMIT || hello.address.chars().any(char::is_control) {
            let reason = format!("worker {name} has an invalid address; check its --advertise");
            return Err((ErrorKind::Refused, reason));
        }
        if *version != self.settings.version {
            let reason = format!(
                "worker {name} has version {} and the coordinator has version {}; install the same version on both",
                for_people(version, 40),
                self.settings.version
            );
            return Err((ErrorKind::Refused, reason));
        }
        let is_known = self.members.get(worker).is_some()
            || self.jobs.was_given(worker)
            || self.rosters.values().any(|roster| roster.members.contains(worker));
        let is_itself = *secret == Some(self.settings.secret.session(worker));
        if (is_known || *run == Some(self.settings.id)) && !is_itself {
            let reason = format!(
                "worker {name} does not have the secret that this run gave to the worker with that name and incarnation; restart it"
            );
            return Err((ErrorKind::Refused, reason));
        }
        if let Some(other) = self.members.namesake(worker) {
            let reason =
                format!("a worker named {} is already connected; give this one another --name", other.name());
            return Err((ErrorKind::Retry, reason));
        }
        if run.is_none() && *status != WorkerStatus::Idle {
            let reason = format!("worker {name} is busy but names no run; restart it");
            return Err((ErrorKind::Refused, reason));
        }
        Ok(())
    }

    /// Welcomes a worker whose hello has passed [`Self::check_hello`].
    pub(crate) fn on_hello(&mut self, mut hello: Hello, now: Duration) {
        let worker = hello.worker.clone();
        if self.members.get(&worker).is_some() {
            self.lose_worker(&worker, "it reconnected", Fault::Died, now);
        }
        if let Some(other) = hello.run.filter(|run| *run != self.settings.id) {
            self.emit(Notification::Info(format!(
                "{} comes from run {}; this is run {}, so it starts afresh here",
                worker.name(),
                other.short(),
                self.settings.id.short()
            )));
            (hello.run, hello.status) = (None, WorkerStatus::Idle);
        }
        hello.device = for_people(&hello.device, 200);
        hello.host = for_people(&hello.host, 200);
        self.end_earlier_lives(&worker);
        self.members.welcome(hello, now);
        let welcome = ToWorker::Welcome {
            run: self.settings.run.clone(),
            id: self.settings.id,
            secret: self.settings.secret.session(&worker),
            plan: self.settings.plan.clone(),
            store: self.settings.store.clone(),
        };
        self.send(&worker, welcome);
    }

    /// A new life of a worker proves that its earlier lives are over, so nobody waits for them to come back.
    fn end_earlier_lives(&mut self, worker: &WorkerId) {
        if let Group::Adopting { members, gone, .. } = &mut self.group {
            let earlier = |id: &&WorkerId| id.name() == worker.name() && *id != worker;
            gone.extend(members.iter().filter(earlier).cloned());
        }
    }

    pub(crate) fn on_store_read(&mut self, worker: &WorkerId, read: Result<Digest, String>, now: Duration) {
        let store = &self.settings.store;
        let why = match read {
            Ok(nonce) if nonce == self.settings.nonce => {
                self.members.set(worker, Activity::Warming, now);
                return;
            }
            Ok(_) => format!("on its machine, {store} is another folder"),
            Err(error) => format!("it cannot read {store}: {}", for_people(&error, TEXT_LIMIT)),
        };
        let reason = format!(
            "worker {} does not share the run's store: {why}; set store.url in the plan to a folder or URL that every worker can reach",
            worker.name()
        );
        self.refuse(worker, ErrorKind::Refused, reason);
    }

    /// A worker can take work, and has repeated everything that was not confirmed.
    pub(crate) fn on_ready(&mut self, worker: &WorkerId, ready: Ready, now: Duration) {
        let Ready { fingerprint, generation, reports, snapshots } = ready;
        if !self.accept_fingerprint(worker, fingerprint) {
            return;
        }
        let Some(member) = self.members.get_mut(worker) else { return };
        member.fingerprint = fingerprint;
        if member.hello.run.is_none() {
            member.warmed_within = Some(now.saturating_sub(member.since));
        }
        let status = member.hello.status.clone();
        // Record the reports before the states, and before the worker counts as idle: the next group must not begin
        // with a state that is ahead of the record.
        if let Some(generation) = generation {
            self.on_steps(generation, reports);
        }
        for snapshot in &snapshots {
            self.on_snapshot(worker, snapshot, now);
        }
        if fingerprint.is_some() {
            self.admitted_at = Some(now);
        }
        self.emit(Notification::Joined(worker.clone()));
        match status {
            WorkerStatus::Idle => self.members.set(worker, Activity::Idle, now),
            WorkerStatus::Training(generation) => {
                self.members.set(worker, Activity::InGroup(generation), now);
                self.on_rejoined(worker, generation);
            }
            WorkerStatus::Working(job) => {
                self.members.set(worker, Activity::Working(job.clone()), now);
                self.jobs.on_resumed(job, worker.clone());
            }
        }
    }

    /// A worker that has proved that it belongs to the run knows of a generation that the record does not have. So the
    /// record is an older copy, and the worker's state has no place in it.
    pub(crate) fn refuse_ahead(&mut self, worker: &WorkerId, generation: Generation) {
        let reason = format!(
            "worker {} was in generation {generation} of this run, but run.sqlite ends at generation {}: it is an older copy; either \
             stop the coordinator and put back the newest copy, or continue from the older one and restart this worker",
            worker.name(),
            self.generation
        );
        self.emit(Notification::Alarm(reason.clone()));
        self.refuse(worker, ErrorKind::Refused, reason);
    }

    fn accept_fingerprint(&mut self, worker: &WorkerId, fingerprint: Option<Digest>) -> bool {
        // What only serves jobs may compute other bits.
        let Some(fingerprint) = fingerprint else { return true };
        match self.fingerprint {
            None => {
                self.fingerprint = Some(fingerprint);
                self.effect(Effect::SaveFingerprint(fingerprint));
            }
            Some(expected) if expected != fingerprint => {
                let reason = format!(
                    "worker {} computes other bits than this run: its fingerprint is {}, the run's is {}; use machines of one kind, with the same version of Ulmus, or let it serve jobs alone with --only jobs",
                    worker.name(),
                    fingerprint.short(),
                    expected.short()
                );
                self.refuse(worker, ErrorKind::Refused, reason);
                return false;
            }
            Some(_) => {}
        }
        true
    }

    /// A worker is back that went on training while the coordinator or the connection was gone.
    fn on_rejoined(&mut self, worker: &WorkerId, generation: Generation) {
        if generation == self.generation
            && let Group::Adopting { members, back, .. } = &mut self.group
            && members.contains(worker)
        {
            back.insert(worker.clone());
            return;
        }
        self.send(worker, ToWorker::Abort(generation));
    }

    /// Continues with a group all of whose members have come back, or ends it once it is clear that they will not.
    pub(crate) fn adopt_group(&mut self, now: Duration) {
        let Group::Adopting { members, back, gone, until } = &self.group else { return };
        if back.len() == members.len() {
            let members = members.clone();
            self.had_a_group = true;
            let step = self.training_of(self.generation).map_or(Step::default(), |t| t.record.step);
            self.train(members, step, now);
        } else if *until <= now {
            let missing: Vec<&str> =
                members.iter().filter(|id| !back.contains(id)).map(WorkerId::name).collect();
            let why = format!("{} did not come back", missing.join(", "));
            self.dissolve(&why, true, now);
        } else {
            // A member that is connected but not in the group has left it for good.
            let has_left = |id: &WorkerId| {
                self.members.get(id).is_some_and(|member| {
                    member.activity.is_admitted() && member.activity != Activity::InGroup(self.generation)
                })
            };
            let is_over = |id: &&WorkerId| gone.contains(*id) || has_left(id);
            if members.iter().all(|id| back.contains(id) || is_over(&id)) {
                let over: Vec<&str> = members.iter().filter(is_over).map(WorkerId::name).collect();
                self.dissolve(
                    &format!("it ended while the coordinator was away ({})", over.join(", ")),
                    true,
                    now,
                );
            }
        }
    }

    /// A worker cannot join the run, and leaves by itself.
    pub(crate) fn on_unfit(&mut self, worker: &WorkerId, kind: ErrorKind, message: &str) {
        let message = for_people(message, TEXT_LIMIT);
        self.unfit = Some((kind, message.clone()));
        self.emit(Notification::Lost(worker.clone(), format!("it cannot join the run: {message}")));
        self.members.remove(worker);
        self.effect(Effect::Disconnect(worker.clone()));
    }

    pub(crate) fn on_local_workers_failed(&mut self, why: &str, now: Duration) {
        // Other workers carry the run, or are about to, or did a moment ago.
        let is_recent = |at: Duration| now < at + self.settings.rejoin_window;
        let trains = |(_, member): (&WorkerId, &Member)| !member.hello.only_jobs;
        if self.members.iter().any(trains) || self.admitted_at.is_some_and(is_recent) {
            return;
        }
        let (status, message) = match &self.unfit {
            Some((kind, message)) => ((*kind).into(), format!("{why}: {message}")),
            None => (ExitStatus::Failed, why.to_owned()),
        };
        self.exit(status, message);
    }

    /// A worker was asked to leave. It first finishes its work, or hands it over.
    pub(crate) fn on_draining(&mut self, worker: &WorkerId) {
        let Some(member) = self.members.get_mut(worker) else { return };
        if member.draining {
            return;
        }
        member.draining = true;
        let text = format!("{} was asked to leave, and is handing over its work", worker.name());
        self.emit(Notification::Info(text));
    }

    /// Dismisses workers that were asked to leave and are no longer needed.
    pub(crate) fn dismiss_drained(&mut self) {
        let free: Vec<WorkerId> = self
            .members
            .iter()
            .filter(|(id, member)| {
                let is_busy = match &member.activity {
                    Activity::InGroup(_) => true,
                    // Another worker starts the job over, which gives the same files.
                    Activity::Working(_) => false,
                    // A worker that was here before has not repeated what was not confirmed yet.
                    Activity::Greeted | Activity::Warming => member.hello.run.is_some(),
                    Activity::Idle => self.snapshots.needs(id),
                };
                member.draining && !is_busy
            })
            .map(|(id, _)| id.clone())
            .collect();
        for worker in free {
            self.send(&worker, ToWorker::Finish(ExitStatus::Interrupted));
            self.effect(Effect::Disconnect(worker.clone()));
            self.members.remove(&worker);
            self.jobs.on_worker_lost(&worker);
            self.snapshots.on_worker_lost(&worker);
            self.emit(Notification::Drained(worker));
        }
    }

    pub(crate) fn refuse(&mut self, worker: &WorkerId, kind: ErrorKind, reason: String) {
        self.emit(Notification::Info(format!("refused: {reason}")));
        self.send(worker, ToWorker::Refused { kind, reason });
        self.effect(Effect::Disconnect(worker.clone()));
        // A worker that is refused after its welcome takes no part in anything yet, so there is nothing else to end.
        self.members.remove(worker);
    }

    /// Removes a worker that is gone, or is treated as if it were.
    pub(crate) fn lose_worker(&mut self, worker: &WorkerId, why: &str, fault: Fault, now: Duration) {
        let Some(member) = self.members.remove(worker) else { return };
        self.emit(Notification::Lost(worker.clone(), why.to_owned()));
        self.jobs.on_worker_lost(worker);
        self.snapshots.on_worker_lost(worker);
        if let (Fault::Died, Activity::Working(job)) = (fault, &member.activity)
            && !member.draining
        {
            self.on_lost_with(worker, job);
        }
        let mut trained = false;
        match &mut self.group {
            group if !group.contains(worker) => {}
            Group::Dissolving { waiting, .. } => {
                waiting.remove(worker);
            }
            // It may come back with its state as long as the window is open.
            Group::Adopting { back, .. } => {
                back.remove(worker);
            }
            _ => {
                self.dissolve(&format!("{} is lost", worker.name()), true, now);
                trained = true;
            }
        }
        match fault {
            Fault::Unworkable => self.sit_out(worker, fault, why, now),
            Fault::Died if trained && !member.draining => {
                self.sit_out(worker, fault, "it was lost again during training", now);
            }
            Fault::Died => {}
        }
    }
}
