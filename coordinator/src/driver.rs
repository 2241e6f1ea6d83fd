//! The shell around the pure core: takes events in, performs effects in order.
//!
//! One task owns everything that changes. It persists before it sends: an effect that must be durable is done
//! when the next one begins. A disk that takes nothing makes effects wait in their order, and nobody is told what is
//! not stored; workers train on meanwhile. Reading back and committing checkpoints is slow, and runs beside the loop.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::task::TaskTracker;
use ulmus_checkpoint::{CheckpointError, Manifest, Store};
use ulmus_coord_core::{Coordinator, Effect, Event, Outcome, PersistentState, Settings};
use ulmus_process::{Failure, Shutdown, Signal, with_causes};
use ulmus_run::paths;
use ulmus_types::{
    CheckpointId, Digest, ErrorKind, ExitStatus, Generation, RunId, SourceReading, Step, StepReport,
    ToCoordinator, ToWorker, WorkerId, for_people,
};

use crate::console::Console;
use crate::database::{Database, MetricsRow, ReadingRow, StoreError, StoredCheckpoint};
use crate::folder::Lock;
use crate::local::LocalWorkers;
use crate::metrics::{MetricsFile, SourcesFile};
use crate::quarantine;
use crate::server::{SessionEvent, SessionNumber};

/// How often time passes for the core.
const TICK: Duration = Duration::from_millis(100);
/// How often a disk that took nothing is tried again.
const DISK_RETRY: Duration = Duration::from_secs(1);
/// How long a stop waits for such a disk.
const STOP_WAIT: Duration = Duration::from_secs(10);

/// What the driver works with.
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    /// Of the run folder.
    pub(crate) lock: Lock,
    pub(crate) saved: PersistentState,
    pub(crate) plan_digest: Digest,
    pub(crate) database: Database,
    pub(crate) files: Store,
    pub(crate) metrics: MetricsFile,
    pub(crate) sources: SourcesFile,
    pub(crate) console: Console,
    pub(crate) locals: Option<LocalWorkers>,
    /// Leave on SIGTERM without a word, for the next coordinator to take over.
    pub(crate) detach_on_term: bool,
    /// Kill a local worker once this many updates are done.
    pub(crate) kill_after: Option<u64>,
    pub(crate) tasks: TaskTracker,
}

/// The loop's state.
struct Driver {
    core: Coordinator,
    parts: Parts,
    sessions: BTreeMap<WorkerId, (SessionNumber, mpsc::Sender<ToWorker>)>,
    /// What has been found out beside the loop.
    found: mpsc::Sender<Event>,
    /// Effects that are still to be performed, in order: those behind a disk that takes nothing wait.
    effects: VecDeque<Effect>,
    /// Since when it takes nothing, and when it is tried again.
    stalled: Option<(Instant, Instant)>,
    /// Whether it was told that the files for spreadsheets cannot be written.
    csv_failed: bool,
    /// Whether the core was told that local workers are hopeless.
    locals_failed: bool,
    started: Instant,
}

/// How a run ended, and what is left to use.
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) database: Database,
    pub(crate) console: Console,
    pub(crate) locals: Option<LocalWorkers>,
}

/// Runs until the core says that it is over.
pub(crate) async fn drive(
    mut parts: Parts,
    mut sessions: mpsc::Receiver<SessionEvent>,
    shutdown: &Shutdown,
) -> Result<Ended, Failure> {
    let (found, mut findings) = mpsc::channel(16);
    let saved = std::mem::take(&mut parts.saved);
    let core = Coordinator::new(parts.settings.clone(), saved, Duration::ZERO);
    let mut driver = Driver {
        core,
        parts,
        sessions: BTreeMap::new(),
        found,
        effects: VecDeque::new(),
        stalled: None,
        csv_failed: false,
        locals_failed: false,
        started: Instant::now(),
    };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asked_to_stop: Option<Instant> = None;
    let outcome = loop {
        let event = tokio::select! {
            biased;
            signal = shutdown.requested(), if asked_to_stop.is_none() => {
                asked_to_stop = Some(Instant::now());
                if signal == Signal::Terminate && driver.parts.detach_on_term {
                    break detached();
                }
                driver.parts.console.line("saving and stopping; press Ctrl-C again to stop at once");
                Some(Event::StopRequested)
            }
            Some(event) = findings.recv() => Some(event),
            Some(event) = sessions.recv() => driver.session(event),
            _ = tick.tick() => {
                if !driver.parts.lock.holds() {
                    let message = "the lock of the run folder was deleted or replaced, so that another coordinator may lead this run; \
                                   make sure that there is one alone, and start it again";
                    return Err(Failure::new(ExitStatus::Fenced, message));
                }
                if let Some(event) = driver.look_after_locals() {
                    driver.happened(event);
                }
                driver.parts.console.waiting(&driver.core.status());
                Some(Event::Ticked)
            }
        };
        if let Some(event) = event {
            driver.happened(event);
        }
        if let Some(outcome) = driver.settle(asked_to_stop).await? {
            break outcome;
        }
    };
    let Parts { database, console, locals, .. } = driver.parts;
    Ok(Ended { outcome, database, console, locals })
}

impl Driver {
    fn happened(&mut self, event: Event) {
        let event = self.compared(event);
        self.effects.extend(self.core.on(self.started.elapsed(), event));
    }

    /// Reports that contradict the record are not heard as reports, nor results that are none.
    fn compared(&self, event: Event) -> Event {
        let Event::Received { worker, message, .. } = &event else { return event };
        let reports = match message {
            ToCoordinator::Steps { reports, .. } => reports,
            ToCoordinator::Ready(ready) => &ready.reports,
            // A result that cannot be read would end the run when its last page is written.
            ToCoordinator::JobDone { job, result } => match ulmus_run::results::check(job.kind(), result) {
                Ok(()) => return event,
                Err(error) => {
                    return Event::ReceivedInvalid(worker.clone(), for_people(&error.to_string(), 500));
                }
            },
            _ => return event,
        };
        match self.parts.database.agrees(reports) {
            Err(error @ StoreError::Diverged { .. }) => {
                Event::Contradicted(worker.clone(), error.to_string())
            }
            // A record that cannot be read cannot be written either, and that is where it is told.
            Ok(()) | Err(_) => event,
        }
    }

    /// Performs what is to be done, as far as the disk takes it.
    async fn settle(&mut self, asked_to_stop: Option<Instant>) -> Result<Option<Outcome>, Failure> {
        if let Some((since, again)) = self.stalled {
            let stopped = asked_to_stop.is_some_and(|at| at.elapsed() > STOP_WAIT);
            if Instant::now() < again && !stopped {
                return Ok(None);
            }
            if since.elapsed() > self.parts.settings.max_age || stopped {
                let message = format!(
                    "run.sqlite could not be written for {} s; free space on its disk, then start the same command again",
                    since.elapsed().as_secs()
                );
                return Err(Failure::new(ExitStatus::Failed, message));
            }
        }
        while let Some(effect) = self.effects.pop_front() {
            match self.perform(&effect).await {
                Ok(None) => self.resumed(),
                Ok(Some(outcome)) => return Ok(Some(outcome)),
                Err(error) if error.is_of_disk() => {
                    self.effects.push_front(effect);
                    self.stall(&error);
                    break;
                }
                // Two reports of one step came while the disk took nothing.
                Err(error @ StoreError::Diverged { .. }) => self.parts.console.alarm(&error.to_string()),
                Err(error) => return Err(Failure::of(error.kind(), &error)),
            }
        }
        Ok(None)
    }

    fn stall(&mut self, error: &StoreError) {
        let now = Instant::now();
        let since = self.stalled.map_or(now, |(since, _)| since);
        if self.stalled.is_none() {
            let most = humantime::format_duration(self.parts.settings.max_age);
            let text = format!("{}; training goes on, for {most} at most", with_causes(error));
            self.parts.console.alarm(&text);
        }
        self.stalled = Some((since, now + DISK_RETRY));
    }

    fn resumed(&mut self) {
        if self.stalled.take().is_some() {
            self.parts.console.line("run.sqlite can be written again; nothing was lost");
        }
    }

    fn session(&mut self, event: SessionEvent) -> Option<Event> {
        match event {
            SessionEvent::Opened { session, hello, outbox } => {
                let worker = hello.worker.clone();
                // Somebody who is not let in takes nobody's place.
                if let Err((kind, reason)) = self.core.check_hello(&hello) {
                    self.parts.console.line(&format!("refused: {reason}"));
                    outbox.try_send(ToWorker::Refused { kind, reason }).ok();
                    return None;
                }
                self.sessions.insert(worker.clone(), (session, outbox));
                Some(Event::Received { worker, run: hello.run, message: ToCoordinator::Hello(hello) })
            }
            SessionEvent::Said { session, worker, run, message } => {
                self.is_current(&worker, session).then_some(Event::Received { worker, run, message })
            }
            SessionEvent::Closed { session, worker } => {
                let current = self.is_current(&worker, session);
                if current {
                    self.sessions.remove(&worker);
                }
                current.then_some(Event::Disconnected(worker))
            }
        }
    }

    /// A session that a newer one of the same worker has replaced is not heard any more.
    fn is_current(&self, worker: &WorkerId, session: SessionNumber) -> bool {
        self.sessions.get(worker).is_some_and(|(current, _)| *current == session)
    }

    async fn perform(&mut self, effect: &Effect) -> Result<Option<Outcome>, StoreError> {
        let database = &mut self.parts.database;
        match effect {
            Effect::SaveGeneration(generation, members) => database.save_generation(*generation, members)?,
            Effect::SaveGroupEnded(generation) => database.save_group_ended(*generation)?,
            Effect::SaveFingerprint(fingerprint) => database.save_fingerprint(*fingerprint)?,
            Effect::SaveSteps(generation, reports) => self.save_steps(*generation, reports)?,
            Effect::SaveQuarantine(units) => {
                database.save_quarantine(units)?;
                quarantine::write(&self.parts.files, units).await.map_err(StoreError::Files)?;
            }
            Effect::SaveReading(worker, step, sources) => self.save_reading(worker, *step, sources)?,
            Effect::SaveTrained(step) => database.save_trained(*step)?,
            Effect::SaveCommitted(checkpoint) => database.committed(*checkpoint)?,
            Effect::SaveDamaged(checkpoint) => database.forget(*checkpoint)?,
            Effect::SaveJobStarted(job, worker) => database.save_owner(job, worker)?,
            Effect::SaveJob(job, result) => {
                database.save_job(job, result)?;
                self.parts.console.job_done(job, result);
            }
            Effect::SaveJobUndone(kind) => database.forget_job(*kind)?,
            Effect::Send(worker, message) => self.send(worker, message.clone()),
            Effect::Disconnect(worker) => {
                self.sessions.remove(worker);
            }
            Effect::Commit { checkpoint, kind, state, files } => {
                let (id, kind, state, files) = (*checkpoint, *kind, *state, files.clone());
                let stored = StoredCheckpoint { id, kind, state, files };
                database.save_checkpoint(&stored)?;
                self.commit(stored);
            }
            Effect::Delete(checkpoint) => {
                database.forget(*checkpoint)?;
                self.delete(*checkpoint);
            }
            Effect::Verify(checkpoints) => self.verify(checkpoints.clone()),
            Effect::Notify(note) => self.parts.console.note(note),
            Effect::Exit(outcome) => return Ok(Some(outcome.clone())),
        }
        Ok(None)
    }

    fn delete(&self, checkpoint: CheckpointId) {
        let files = self.parts.files.clone();
        self.parts.tasks.spawn(async move {
            // What is left over is found when the run is done.
            if let Err(error) = ulmus_checkpoint::delete(&files, checkpoint).await {
                let error = with_causes(&error);
                tracing::info!(%checkpoint, error, "an old recovery checkpoint could not be deleted");
            }
        });
    }

    fn send(&mut self, worker: &WorkerId, message: ToWorker) {
        let Some((_, outbox)) = self.sessions.get(worker) else { return };
        // A worker that does not take its messages is as good as gone; its session ends with its outbox.
        if outbox.try_send(message).is_err() {
            tracing::info!(%worker, "outgoing queue full; closing its session");
            self.sessions.remove(worker);
        }
    }

    fn save_steps(&mut self, generation: Generation, reports: &[StepReport]) -> Result<(), StoreError> {
        self.parts.database.save_steps(generation, reports)?;
        for report in reports {
            self.parts.console.step(report);
            let appended = self.parts.metrics.append(MetricsRow { report: report.clone(), generation });
            self.tell_of_csv(paths::METRICS, appended);
        }
        if let Some(after) = self.parts.kill_after
            && self.core.step().get() >= after
            && let Some(locals) = &mut self.parts.locals
            && let Some(name) = locals.kill_one()
        {
            self.parts.kill_after = None;
            self.parts.console.line(&format!("--demo-failure: killed worker {name} with SIGKILL"));
        }
        Ok(())
    }

    fn save_reading(
        &mut self,
        worker: &WorkerId,
        step: Step,
        sources: &[SourceReading],
    ) -> Result<(), StoreError> {
        for reading in sources {
            let row = ReadingRow { step, worker: worker.name().to_owned(), reading: reading.clone() };
            self.parts.database.save_reading(&row)?;
            let appended = self.parts.sources.append(&row);
            self.tell_of_csv(paths::SOURCES, appended);
        }
        Ok(())
    }

    /// The files for spreadsheets are copies: what they miss is written at the next start.
    fn tell_of_csv(&mut self, file: &str, appended: std::io::Result<()>) {
        match appended {
            Ok(()) => {}
            Err(_) if self.csv_failed => {}
            Err(error) => {
                self.csv_failed = true;
                let text = format!("{file} cannot be written: {error}; run.sqlite has all of it");
                self.parts.console.alarm(&text);
            }
        }
    }

    /// Reads a checkpoint's parts back, and makes it exist if they are what was announced.
    fn commit(&self, checkpoint: StoredCheckpoint) {
        let id = checkpoint.id;
        let manifest = manifest(checkpoint, self.parts.settings.id, self.parts.plan_digest);
        let (files, found) = (self.parts.files.clone(), self.found.clone());
        self.parts.tasks.spawn(async move {
            let failed = |error: CheckpointError| Event::CommitFailed(id, error.kind(), with_causes(&error));
            let event = match ulmus_checkpoint::damaged_files(&files, &manifest).await {
                Err(error) => failed(error),
                Ok(damaged) if !damaged.is_empty() => {
                    let why = damaged.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
                    let names = damaged.into_iter().filter_map(CheckpointError::into_file).collect();
                    Event::PartsDamaged(id, names, why)
                }
                Ok(_) => match ulmus_checkpoint::commit(&files, &manifest).await {
                    Ok(()) => Event::CheckpointCommitted(id),
                    Err(error) => failed(error),
                },
            };
            // The loop may be over already; then the next start commits.
            found.send(event).await.ok();
        });
    }

    /// Reads committed checkpoints, and tells which are damaged.
    fn verify(&self, checkpoints: Vec<CheckpointId>) {
        let (files, found) = (self.parts.files.clone(), self.found.clone());
        let run = self.parts.settings.id;
        self.parts.tasks.spawn(async move {
            // The newest is needed first.
            for id in checkpoints.into_iter().rev() {
                match ulmus_checkpoint::verify(&files, id, run).await {
                    Err(error) if error.condemns() => {
                        let damaged = Event::CheckpointDamaged(id, with_causes(&error));
                        if found.send(damaged).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => tracing::info!(checkpoint = %id, error = with_causes(&error), "cannot be verified now"),
                    Ok(_) => tracing::info!(checkpoint = %id, "verified"),
                }
            }
        });
    }

    fn look_after_locals(&mut self) -> Option<Event> {
        let locals = self.parts.locals.as_mut()?;
        for failure in locals.maintain() {
            self.parts.console.alarm(&failure);
        }
        let hopeless = locals.hopeless();
        match hopeless {
            Some(why) if !std::mem::replace(&mut self.locals_failed, true) => {
                self.parts.console.alarm(&format!("{why}; it is started again later and later"));
                Some(Event::LocalWorkersFailed(why))
            }
            Some(why) => Some(Event::LocalWorkersFailed(why)),
            None => {
                self.locals_failed = false;
                None
            }
        }
    }
}

/// Everything is left as it is: workers train on, and look for the next coordinator.
fn detached() -> Outcome {
    let message =
        "stopped, and left the workers to the next coordinator; start the same command again within 5 min";
    Outcome { status: ExitStatus::Interrupted, message: message.to_owned(), detached: true }
}

/// The manifest of a stored checkpoint.
pub(crate) fn manifest(checkpoint: StoredCheckpoint, run: RunId, plan_digest: Digest) -> Manifest {
    Manifest {
        checkpoint: checkpoint.id,
        kind: checkpoint.kind,
        run: Some(run),
        plan_digest,
        state_digest: checkpoint.state,
        files: checkpoint.files,
    }
}

/// Writes manifests whose parts were all stored when an earlier coordinator died.
pub(crate) async fn finish_commits(
    database: &Database,
    files: &Store,
    run: RunId,
    plan_digest: Digest,
) -> Result<Vec<CheckpointId>, Failure> {
    let fail = |error: StoreError| Failure::of(error.kind(), &error);
    let mut finished = Vec::new();
    for checkpoint in database.checkpoints(false).map_err(fail)? {
        let id = checkpoint.id;
        let manifest = manifest(checkpoint, run, plan_digest);
        let is_whole = match ulmus_checkpoint::damaged_files(files, &manifest).await {
            Ok(damaged) => damaged.is_empty(),
            Err(error) => return Err(Failure::of(error.kind(), &error)),
        };
        let committed = if is_whole { ulmus_checkpoint::commit(files, &manifest).await } else { Ok(()) };
        match committed {
            Ok(()) if is_whole => {
                database.committed(id).map_err(fail)?;
                finished.push(id);
            }
            Err(error) if error.kind() == ErrorKind::Retry => return Err(Failure::of(error.kind(), &error)),
            Ok(()) | Err(_) => database.forget(id).map_err(fail)?,
        }
    }
    Ok(finished)
}
