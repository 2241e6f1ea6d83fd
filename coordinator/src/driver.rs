//! The shell around the pure core: takes events in, performs effects in order.
//!
//! One task owns everything that changes. It persists before it sends: an effect that must be durable is done
//! when the next one begins. Writing manifests is the only slow effect, and runs beside the loop.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::task::TaskTracker;
use ulmus_checkpoint::{Manifest, Store};
use ulmus_coord_core::{Coordinator, Effect, Event, Note, Outcome, Saved, Settings};
use ulmus_rt::{Failure, Shutdown, with_causes};
use ulmus_types::{
    CheckpointId, Digest, ErrorKind, ExitStatus, Generation, SourceReading, Step, StepReport, ToWorker,
    WorkerId,
};

use crate::console::Console;
use crate::local::LocalWorkers;
use crate::metrics::{MetricsFile, SourcesFile};
use crate::quarantine;
use crate::server::{SessionEvent, SessionNumber};
use crate::store::{MetricsRow, ReadingRow, RunStore, StoreError, StoredCheckpoint};

/// How often time passes for the core.
const TICK: Duration = Duration::from_millis(100);

/// What the driver works with.
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    pub(crate) saved: Saved,
    pub(crate) plan_digest: Digest,
    pub(crate) memory: RunStore,
    pub(crate) files: Store,
    pub(crate) metrics: MetricsFile,
    pub(crate) sources: SourcesFile,
    pub(crate) console: Console,
    pub(crate) locals: Option<LocalWorkers>,
    /// Kill a local worker once this many updates are done.
    pub(crate) kill_after: Option<u64>,
    pub(crate) tasks: TaskTracker,
}

/// The loop's state.
struct Driver {
    core: Coordinator,
    parts: Parts,
    sessions: BTreeMap<WorkerId, (SessionNumber, mpsc::Sender<ToWorker>)>,
    commits: mpsc::Sender<Event>,
    started: Instant,
}

/// How a run ended, and what is left to use.
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) memory: RunStore,
    pub(crate) console: Console,
    pub(crate) locals: Option<LocalWorkers>,
}

/// Runs until the core says that it is over.
pub(crate) async fn drive(
    mut parts: Parts,
    mut sessions: mpsc::Receiver<SessionEvent>,
    shutdown: &Shutdown,
) -> Result<Ended, Failure> {
    let (commits, mut committed) = mpsc::channel(16);
    let saved = std::mem::take(&mut parts.saved);
    let core = Coordinator::new(parts.settings.clone(), saved, Duration::ZERO);
    let mut driver = Driver { core, parts, sessions: BTreeMap::new(), commits, started: Instant::now() };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asked_to_stop = false;
    let outcome = loop {
        let event = tokio::select! {
            biased;
            () = shutdown.requested(), if !asked_to_stop => {
                asked_to_stop = true;
                driver.parts.console.line("saving and stopping; press Ctrl-C again to stop at once");
                Some(Event::StopRequested)
            }
            Some(event) = committed.recv() => Some(event),
            Some(event) = sessions.recv() => driver.session(event),
            _ = tick.tick() => {
                driver.look_after_locals()?;
                Some(Event::Ticked)
            }
        };
        if let Some(event) = event
            && let Some(outcome) = driver.happened(event).await?
        {
            break outcome;
        }
    };
    let Parts { memory, console, locals, .. } = driver.parts;
    Ok(Ended { outcome, memory, console, locals })
}

impl Driver {
    async fn happened(&mut self, event: Event) -> Result<Option<Outcome>, Failure> {
        let effects = self.core.on(self.started.elapsed(), event);
        let mut outcome = None;
        for effect in effects {
            let performed = self.perform(effect).await.map_err(|error| Failure::of(error.kind(), &error))?;
            outcome = outcome.or(performed);
        }
        Ok(outcome)
    }

    fn session(&mut self, event: SessionEvent) -> Option<Event> {
        match event {
            SessionEvent::Opened { session, hello, outbox } => {
                let worker = hello.worker.clone();
                self.sessions.insert(worker.clone(), (session, outbox));
                Some(Event::Said(worker, ulmus_types::ToCoordinator::Hello(hello)))
            }
            SessionEvent::Said { session, worker, message } => {
                self.is_current(&worker, session).then_some(Event::Said(worker, message))
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

    async fn perform(&mut self, effect: Effect) -> Result<Option<Outcome>, StoreError> {
        match effect {
            Effect::SaveGeneration(generation, members) => {
                self.parts.memory.save_generation(generation, &members)?;
            }
            Effect::SaveGroupEnded(generation) => self.parts.memory.save_group_ended(generation)?,
            Effect::SaveFingerprint(fingerprint) => self.parts.memory.save_fingerprint(fingerprint)?,
            Effect::SaveSteps(generation, reports) => self.save_steps(generation, reports)?,
            Effect::SaveQuarantine(units) => {
                self.parts.memory.save_quarantine(&units)?;
                quarantine::write(&self.parts.files, &units).await.map_err(StoreError::Files)?;
            }
            Effect::SaveReading(worker, step, sources) => self.save_reading(&worker, step, sources)?,
            Effect::SaveTrained(step) => self.parts.memory.save_trained(step)?,
            Effect::SaveJob(job, result) => self.parts.memory.save_job(&job, &result)?,
            Effect::Send(worker, message) => self.send(&worker, message),
            Effect::Disconnect(worker) => {
                self.sessions.remove(&worker);
            }
            Effect::Commit { checkpoint, kind, state, files } => {
                let stored = StoredCheckpoint { id: checkpoint, kind, state, files };
                self.parts.memory.save_checkpoint(&stored)?;
                self.commit(stored);
            }
            Effect::Delete(checkpoint) => {
                self.parts.memory.forget(checkpoint)?;
                let files = self.parts.files.clone();
                self.parts.tasks.spawn(async move {
                    // What is left over is found when the run is done.
                    if let Err(error) = ulmus_checkpoint::delete(&files, checkpoint).await {
                        let error = with_causes(&error);
                        tracing::info!(%checkpoint, error, "an old recovery checkpoint could not be deleted");
                    }
                });
            }
            Effect::Tell(note) => {
                if let Note::Checkpoint(checkpoint, _) = &note {
                    self.parts.memory.committed(*checkpoint)?;
                }
                self.parts.console.note(&note);
            }
            Effect::Exit(outcome) => return Ok(Some(outcome)),
        }
        Ok(None)
    }

    fn send(&mut self, worker: &WorkerId, message: ToWorker) {
        let Some((_, outbox)) = self.sessions.get(worker) else { return };
        // A worker that does not take its messages is as good as gone; its session ends with its outbox.
        if outbox.try_send(message).is_err() {
            tracing::info!(%worker, "its messages pile up; closing its session");
            self.sessions.remove(worker);
        }
    }

    fn save_steps(&mut self, generation: Generation, reports: Vec<StepReport>) -> Result<(), StoreError> {
        self.parts.memory.save_steps(generation, &reports)?;
        for report in reports {
            self.parts.console.step(&report);
            if let Err(error) = self.parts.metrics.append(MetricsRow { report, generation }) {
                self.parts
                    .console
                    .line(&format!("metrics.csv cannot be written: {error}; run.sqlite has all of it"));
            }
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
        sources: Vec<SourceReading>,
    ) -> Result<(), StoreError> {
        for reading in sources {
            let row = ReadingRow { step, worker: worker.name().to_owned(), reading };
            self.parts.memory.save_reading(&row)?;
            if let Err(error) = self.parts.sources.append(&row) {
                let line = format!("sources.csv cannot be written: {error}; run.sqlite has all of it");
                self.parts.console.line(&line);
            }
        }
        Ok(())
    }

    fn commit(&self, checkpoint: StoredCheckpoint) {
        let id = checkpoint.id;
        let manifest = manifest(checkpoint, self.parts.plan_digest);
        let (files, commits) = (self.parts.files.clone(), self.commits.clone());
        self.parts.tasks.spawn(async move {
            let event = match ulmus_checkpoint::commit(&files, &manifest).await {
                Ok(()) => Event::CheckpointCommitted(id),
                Err(error) => Event::CommitFailed(id, with_causes(&error)),
            };
            // The loop may be over already; then the next start commits.
            commits.send(event).await.ok();
        });
    }

    fn look_after_locals(&mut self) -> Result<(), Failure> {
        match &mut self.parts.locals {
            Some(locals) => {
                locals.maintain().map_err(|error| Failure::new(ExitStatus::Failed, error.to_string()))
            }
            None => Ok(()),
        }
    }
}

/// The manifest of a stored checkpoint.
pub(crate) fn manifest(checkpoint: StoredCheckpoint, plan_digest: Digest) -> Manifest {
    Manifest {
        checkpoint: checkpoint.id,
        kind: checkpoint.kind,
        plan_digest,
        state_digest: checkpoint.state,
        files: checkpoint.files,
    }
}

/// Writes manifests whose parts were all stored when an earlier coordinator died.
pub(crate) async fn finish_commits(
    memory: &RunStore,
    files: &Store,
    plan_digest: Digest,
) -> Result<Vec<CheckpointId>, Failure> {
    let fail = |error: StoreError| Failure::of(error.kind(), &error);
    let mut finished = Vec::new();
    for checkpoint in memory.checkpoints(false).map_err(fail)? {
        let id = checkpoint.id;
        match ulmus_checkpoint::commit(files, &manifest(checkpoint, plan_digest)).await {
            Ok(()) => {
                memory.committed(id).map_err(fail)?;
                finished.push(id);
            }
            Err(error) if error.kind() == ErrorKind::Retry => return Err(Failure::of(error.kind(), &error)),
            Err(_) => memory.forget(id).map_err(fail)?,
        }
    }
    Ok(finished)
}
