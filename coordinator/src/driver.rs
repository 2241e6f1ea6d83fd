//! The shell around the pure core: takes events in, and performs effects in order.
//!
//! One task owns everything that changes. It persists before it sends: an effect that must be durable is complete
//! before the next one begins. While the disk cannot be written, effects wait in order, so nobody is told anything that
//! is not stored; workers continue to train. Reading back and committing checkpoints is slow, and is done outside the
//! loop.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::task::TaskTracker;
use ulmus_checkpoint::{CheckpointError, Manifest, Store};
use ulmus_coord_core::{Coordinator, Effect, Event, Outcome, PersistentState, Settings};
use ulmus_plan::{Plan, TuneConfig};
use ulmus_process::{Failure, Shutdown, Signal, with_causes};
use ulmus_run::paths;
use ulmus_run::results::{Examples, Results};
use ulmus_types::{
    COORDINATOR_TIMEOUT, CheckpointId, Digest, ErrorKind, ExitStatus, Generation, Job, RunId, SourceReading,
    Stage, StageName, Step, StepReport, Subject, ToCoordinator, ToWorker, WorkerId, for_people,
};

use crate::console::Console;
use crate::database::{Database, DatabaseError, MetricsRow, ReadingRow, StoredCheckpoint};
use crate::figure::Figure;
use crate::folder::Lock;
use crate::local::LocalWorkers;
use crate::metrics::{MetricsFile, SourcesFile};
use crate::quarantine;
use crate::server::{SessionEvent, SessionNumber};

/// How often the core is told the time.
const TICK: Duration = Duration::from_millis(100);
/// How often a disk that could not be written is tried again.
const DISK_RETRY: Duration = Duration::from_secs(1);
/// How long a stop waits for a disk that cannot be written.
const STOP_WAIT: Duration = Duration::from_secs(10);

/// What the driver is given when it starts.
pub(crate) struct Setup {
    pub(crate) settings: Settings,
    /// The lock of the run folder.
    pub(crate) lock: Lock,
    pub(crate) saved: PersistentState,
    pub(crate) plan: Plan,
    pub(crate) database: Database,
    pub(crate) files: Store,
    /// Of each training stage.
    pub(crate) metrics: BTreeMap<StageName, MetricsFile>,
    pub(crate) sources: SourcesFile,
    pub(crate) console: Console,
    pub(crate) locals: Option<LocalWorkers>,
    /// Whether to exit on SIGTERM and leave the workers to the next coordinator.
    pub(crate) detach_on_term: bool,
    /// Kill a local worker once half of the updates of a training stage are done.
    pub(crate) kills_one: bool,
    pub(crate) tasks: TaskTracker,
}

/// The state of the driver's loop.
struct Driver {
    core: Coordinator,
    setup: Setup,
    sessions: BTreeMap<WorkerId, (SessionNumber, mpsc::Sender<ToWorker>)>,
    /// Sends the loop events from work outside of it.
    found: mpsc::Sender<Event>,
    /// Effects that are still to be performed, in order. They wait while the disk cannot be written.
    effects: VecDeque<Effect>,
    /// Since when the disk cannot be written, and when it is tried again.
    stalled: Option<(Instant, Instant)>,
    /// Whether a person was told that a CSV file cannot be written.
    csv_failed: bool,
    /// Whether a person was told that local workers keep failing.
    locals_failed: bool,
    /// Whether a local worker was killed as wanted.
    killed_one: bool,
    started: Instant,
}

/// How a run ended, and what is needed to close it.
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) database: Database,
    pub(crate) console: Console,
    pub(crate) locals: Option<LocalWorkers>,
    /// Whether a local worker was killed as wanted.
    pub(crate) killed_one: bool,
}

/// Runs until the core ends the run.
pub(crate) async fn drive(
    mut setup: Setup,
    mut sessions: mpsc::Receiver<SessionEvent>,
    shutdown: &Shutdown,
) -> Result<Ended, Failure> {
    let (found, mut findings) = mpsc::channel(16);
    let saved = std::mem::take(&mut setup.saved);
    let core = Coordinator::new(setup.settings.clone(), saved, Duration::ZERO);
    let mut driver = Driver {
        core,
        setup,
        sessions: BTreeMap::new(),
        found,
        effects: VecDeque::new(),
        stalled: None,
        csv_failed: false,
        locals_failed: false,
        killed_one: false,
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
                if signal == Signal::Terminate && driver.setup.detach_on_term {
                    break detached();
                }
                driver.setup.console.line("saving and stopping; press Ctrl-C again to stop at once");
                Some(Event::StopRequested)
            }
            Some(event) = findings.recv() => Some(event),
            Some(event) = sessions.recv() => driver.on_session(event),
            _ = tick.tick() => {
                if !driver.setup.lock.holds() {
                    let message = "the lock of the run folder was deleted or replaced, so another coordinator may lead this run; \
                                   make sure that there is only one, and start it again";
                    return Err(Failure::new(ExitStatus::Fenced, message));
                }
                if let Some(event) = driver.maintain_locals() {
                    driver.on_event(event);
                }
                // What cannot be stored is not said either, and workers wait for the coordinator then.
                if driver.stalled.is_none() {
                    driver.setup.console.waiting(&driver.core.status());
                }
                Some(Event::Ticked)
            }
        };
        if let Some(event) = event {
            driver.on_event(event);
        }
        if let Some(outcome) = driver.perform_effects(asked_to_stop).await? {
            break outcome;
        }
    };
    let Driver { setup: Setup { database, console, locals, .. }, killed_one, .. } = driver;
    Ok(Ended { outcome, database, console, locals, killed_one })
}

impl Driver {
    fn on_event(&mut self, event: Event) {
        let event = self.checked(event);
        self.effects.extend(self.core.on(self.started.elapsed(), event));
    }

    /// Checks that a result has the form of its stage's results, and that examples give the updates that the plan says.
    fn check_result(&self, job: &Job, result: &str) -> Result<(), String> {
        // The core ignores a job of no stage.
        let Some(stage) = self.core.graph().stage(job.stage()) else { return Ok(()) };
        ulmus_run::results::check(&job.name(), stage.kind, result).map_err(|error| error.to_string())?;
        match self.examples_made(job, result) {
            Some((tuning, made)) => {
                self.setup.plan.tuning(tuning).map_or(Ok(()), |config| check_examples(config, &made))
            }
            None => Ok(()),
        }
    }

    /// The examples that a job has made, and the tuning stage that they are for, if the job is one that makes any.
    fn examples_made(&self, job: &Job, result: &str) -> Option<(StageName, Examples)> {
        let graph = self.core.graph();
        let made = |stage: &&Stage| graph.examples_of(stage.name) == *job.stage();
        let tuning = graph.trainings().find(made)?.name;
        Some((tuning, serde_json::from_str(result).ok()?))
    }

    /// Replaces events whose reports contradict the record, or whose results are invalid, by events that say so.
    fn checked(&self, event: Event) -> Event {
        let Event::Received { worker, message, .. } = &event else { return event };
        let (generation, reports) = match message {
            ToCoordinator::Steps { generation, reports } => (Some(*generation), reports),
            ToCoordinator::Ready(ready) => (ready.generation, &ready.reports),
            // An unreadable result would make the final summary fail.
            ToCoordinator::JobDone { job, result } => match self.check_result(job, result) {
                Ok(()) => return event,
                Err(error) => {
                    return Event::ReceivedInvalid(worker.clone(), for_people(&error, 500));
                }
            },
            _ => return event,
        };
        // The core refuses reports of a generation that it does not know.
        let Some(training) = generation.and_then(|generation| self.core.training_name(generation)) else {
            return event;
        };
        match self.setup.database.check_steps(training, reports) {
            Err(error @ DatabaseError::Diverged { .. }) => {
                Event::Contradicted(worker.clone(), error.to_string())
            }
            // If the database cannot be read, writing to it will fail and be reported.
            Ok(()) | Err(_) => event,
        }
    }

    /// Performs waiting effects until one cannot be written to disk.
    async fn perform_effects(&mut self, asked_to_stop: Option<Instant>) -> Result<Option<Outcome>, Failure> {
        if let Some((since, again)) = self.stalled {
            let stopped = asked_to_stop.is_some_and(|at| at.elapsed() > STOP_WAIT);
            if Instant::now() < again && !stopped {
                return Ok(None);
            }
            if since.elapsed() > self.setup.settings.max_age || stopped {
                let message = format!(
                    "run.sqlite could not be written for {} s; free space on its disk, then run the same command again",
                    since.elapsed().as_secs()
                );
                return Err(Failure::new(ExitStatus::Failed, message));
            }
        }
        while let Some(effect) = self.effects.pop_front() {
            match self.perform(&effect).await {
                Ok(None) => self.on_disk_writable(),
                Ok(Some(outcome)) => return Ok(Some(outcome)),
                Err(error) if error.is_disk_error() => {
                    self.effects.push_front(effect);
                    self.stall(&error);
                    break;
                }
                // Two reports of one step arrived while the disk could not be written.
                Err(error @ DatabaseError::Diverged { .. }) => self.setup.console.alarm(&error.to_string()),
                Err(error) => return Err(Failure::of(error.kind(), &error)),
            }
        }
        Ok(None)
    }

    fn stall(&mut self, error: &DatabaseError) {
        let now = Instant::now();
        let since = self.stalled.map_or(now, |(since, _)| since);
        if self.stalled.is_none() {
            let most = humantime::format_duration(self.setup.settings.max_age);
            let text = format!("{}; training continues for up to {most}", with_causes(error));
            self.setup.console.alarm(&text);
        }
        self.stalled = Some((since, now + DISK_RETRY));
    }

    fn on_disk_writable(&mut self) {
        if self.stalled.take().is_some() {
            self.setup.console.line("run.sqlite can be written again; nothing was lost");
        }
    }

    fn on_session(&mut self, event: SessionEvent) -> Option<Event> {
        match event {
            SessionEvent::Opened { session, hello, outbox } => {
                let worker = hello.worker.clone();
                // A worker that is refused must not displace the session of another.
                if let Err((kind, reason)) = self.core.check_hello(&hello) {
                    self.setup.console.line(&format!("refused: {reason}"));
                    outbox.try_send(ToWorker::Refused { kind, reason }).ok();
                    return None;
                }
                self.sessions.insert(worker.clone(), (session, outbox));
                Some(Event::Received { worker, run: hello.run, message: ToCoordinator::Hello(hello) })
            }
            SessionEvent::Received { session, worker, run, message } => {
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

    /// Whether a session is the current one of its worker. Events of sessions that were replaced are ignored.
    fn is_current(&self, worker: &WorkerId, session: SessionNumber) -> bool {
        self.sessions.get(worker).is_some_and(|(current, _)| *current == session)
    }

    async fn perform(&mut self, effect: &Effect) -> Result<Option<Outcome>, DatabaseError> {
        let database = &mut self.setup.database;
        match effect {
            Effect::SaveGeneration(generation, roster) => database.save_generation(*generation, roster)?,
            Effect::SaveGroupEnded(generation) => database.save_group_ended(*generation)?,
            Effect::SaveFingerprint(fingerprint) => database.save_fingerprint(*fingerprint)?,
            Effect::SaveSteps(training, generation, reports) => {
                self.save_steps(*training, *generation, reports)?;
            }
            Effect::SaveQuarantine(units) => {
                database.save_quarantine(units)?;
                quarantine::write(&self.setup.files, units).await.map_err(DatabaseError::Files)?;
            }
            Effect::SaveReading(worker, step, sources) => self.save_reading(worker, *step, sources)?,
            Effect::SaveTrained(training, step) => database.save_trained(*training, *step)?,
            Effect::SaveCommitted(checkpoint) => database.save_committed(*checkpoint)?,
            Effect::SaveDamaged(checkpoint) => database.save_damaged(*checkpoint)?,
            Effect::SaveJobStarted(job, worker) => database.save_owner(job, worker)?,
            Effect::SaveJob(job, result) => {
                database.save_job(job, result)?;
                self.setup.console.job_done(job, result);
                if matches!(job.subject(), Subject::Milestone(_)) {
                    let results = database.results()?;
                    self.write_figure(job.stage(), &results);
                }
                self.on_examples_made(job, result);
            }
            Effect::SaveJobSkipped(job, why) => {
                database.save_job(job, &ulmus_run::results::skipped(why))?;
            }
            Effect::SaveJobUndone(name) => database.forget_job(name)?,
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
            Effect::Notify(notification) => self.setup.console.notify(notification),
            Effect::Exit(outcome) => return Ok(Some(outcome.clone())),
        }
        Ok(None)
    }

    /// Tells the core how many updates the examples of a tuning stage give, if a job has made them.
    fn on_examples_made(&mut self, job: &Job, result: &str) {
        if let Some((tuning, examples)) = self.examples_made(job, result) {
            self.on_event(Event::ExamplesMade(tuning, examples.updates));
        }
    }

    /// Writes what an evaluation has found of the milestones so far.
    fn write_figure(&self, stage: &StageName, results: &Results) {
        let Some(figure) = Figure::of(stage, results) else { return };
        let store = self.setup.files.clone();
        self.setup.tasks.spawn(async move {
            // The next milestone writes it again, and so does the end of the run.
            if let Err(error) = figure.write(&store).await {
                tracing::warn!(error = with_causes(&error), "cannot write a figure");
            }
        });
    }

    fn delete(&self, checkpoint: CheckpointId) {
        let files = self.setup.files.clone();
        self.setup.tasks.spawn(async move {
            // Whatever is left is deleted when the run is done.
            if let Err(error) = ulmus_checkpoint::delete(&files, checkpoint).await {
                let error = with_causes(&error);
                tracing::info!(%checkpoint, error, "cannot delete an old recovery checkpoint");
            }
        });
    }

    fn send(&mut self, worker: &WorkerId, message: ToWorker) {
        let Some((_, outbox)) = self.sessions.get(worker) else { return };
        // A worker that does not read its messages is as good as gone. Dropping the outbox ends its session, whose end is then
        // no news: the core hears of it now.
        if let Err(error) = outbox.try_send(message) {
            tracing::info!(%worker, %error, "cannot be told anything; closing the session");
            self.sessions.remove(worker);
            self.on_event(Event::Disconnected(worker.clone()));
        }
    }

    fn save_steps(
        &mut self,
        training: StageName,
        generation: Generation,
        reports: &[StepReport],
    ) -> Result<(), DatabaseError> {
        self.setup.database.save_steps(training, generation, reports)?;
        for report in reports {
            self.setup.console.step(training, report, self.core.last_step(training));
            let row = MetricsRow { report: report.clone(), generation };
            let file = self.setup.metrics.get_mut(&training);
            let appended = file.map_or(Ok(()), |file| file.append(row));
            self.check_appended(&paths::of_training(training, paths::METRICS), appended);
        }
        if self.setup.kills_one
            && reports.last().is_some_and(|last| 2 * last.step.get() >= self.core.last_step(training).get())
            && let Some(locals) = &mut self.setup.locals
            && let Some(name) = locals.kill_one()
        {
            self.setup.kills_one = false;
            self.killed_one = true;
            self.setup.console.line(&format!("--demo-failure: killed worker {name} with SIGKILL"));
        }
        Ok(())
    }

    fn save_reading(
        &mut self,
        worker: &WorkerId,
        step: Step,
        sources: &[SourceReading],
    ) -> Result<(), DatabaseError> {
        for reading in sources {
            let row = ReadingRow { step, worker: worker.name().to_owned(), reading: reading.clone() };
            self.setup.database.save_reading(&row)?;
            let appended = self.setup.sources.append(&row);
            self.check_appended(paths::SOURCES, appended);
        }
        Ok(())
    }

    /// Alarms once if a CSV file cannot be written. CSV files are copies, and are rewritten at the next start.
    fn check_appended(&mut self, file: &str, appended: std::io::Result<()>) {
        match appended {
            Ok(()) => {}
            Err(_) if self.csv_failed => {}
            Err(error) => {
                self.csv_failed = true;
                let text = format!("cannot write {file}: {error}; run.sqlite has the complete data");
                self.setup.console.alarm(&text);
            }
        }
    }

    /// Reads back the files of a checkpoint, and writes its manifest if they are what was announced.
    fn commit(&self, checkpoint: StoredCheckpoint) {
        let id = checkpoint.id;
        let plan_digest = self.setup.plan.digest_of(id.training());
        let manifest = manifest(checkpoint, self.setup.settings.id, plan_digest);
        let (files, found) = (self.setup.files.clone(), self.found.clone());
        self.setup.tasks.spawn(async move {
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
            // If the loop has already ended, the next start records the commit.
            found.send(event).await.ok();
        });
    }

    /// Reads committed checkpoints in the background, and reports damaged ones to the core.
    fn verify(&self, checkpoints: Vec<CheckpointId>) {
        let (files, found) = (self.setup.files.clone(), self.found.clone());
        let run = self.setup.settings.id;
        self.setup.tasks.spawn(async move {
            // The newest checkpoint is needed first.
            for id in checkpoints.into_iter().rev() {
                match ulmus_checkpoint::verify(&files, id, run).await {
                    Err(error) if error.condemns() => {
                        let damaged = Event::CheckpointDamaged(id, with_causes(&error));
                        if found.send(damaged).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => tracing::info!(checkpoint = %id, error = with_causes(&error), "cannot verify a checkpoint now"),
                    Ok(_) => tracing::info!(checkpoint = %id, "verified a checkpoint"),
                }
            }
        });
    }

    fn maintain_locals(&mut self) -> Option<Event> {
        let locals = self.setup.locals.as_mut()?;
        for failure in locals.maintain() {
            self.setup.console.alarm(&failure);
        }
        match locals.failing() {
            Some(why) if !std::mem::replace(&mut self.locals_failed, true) => {
                self.setup.console.alarm(&format!("{why}; it is restarted with growing pauses"));
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

/// The outcome of exiting without stopping the run: workers continue to train, and look for the next coordinator.
fn detached() -> Outcome {
    let message = format!(
        "stopped, and left the workers to the next coordinator; run the same command again within {} minutes",
        COORDINATOR_TIMEOUT.as_secs() / 60
    );
    Outcome { status: ExitStatus::Interrupted, message, detached: true }
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

/// Finishes commits that an earlier coordinator did not: writes the manifests of checkpoints whose files are all
/// stored.
pub(crate) async fn finish_commits(
    database: &Database,
    files: &Store,
    run: RunId,
    plan: &Plan,
) -> Result<Vec<CheckpointId>, Failure> {
    let fail = |error: DatabaseError| Failure::of(error.kind(), &error);
    let mut finished = Vec::new();
    for checkpoint in database.checkpoints(false).map_err(fail)? {
        let id = checkpoint.id;
        let manifest = manifest(checkpoint, run, plan.digest_of(id.training()));
        let is_whole = match ulmus_checkpoint::damaged_files(files, &manifest).await {
            Ok(damaged) => damaged.is_empty(),
            Err(error) => return Err(Failure::of(error.kind(), &error)),
        };
        let committed = if is_whole { ulmus_checkpoint::commit(files, &manifest).await } else { Ok(()) };
        match committed {
            Ok(()) if is_whole => {
                database.save_committed(id).map_err(fail)?;
                finished.push(id);
            }
            Err(error) if error.kind() == ErrorKind::Retry => return Err(Failure::of(error.kind(), &error)),
            Ok(()) | Err(_) => database.forget(id).map_err(fail)?,
        }
    }
    Ok(finished)
}

/// Checks that the numbers of a stage's examples fit together and to its plan: how long the stage trains follows from them.
fn check_examples(config: &TuneConfig, made: &Examples) -> Result<(), String> {
    let Examples { rows, kept, dropped, updates, held_out, elsewhere, .. } = made;
    let left_out = dropped.iter().fold(0_u64, |sum, dropped| sum.saturating_add(dropped.rows));
    if *kept == 0 || kept.checked_add(left_out) != Some(*rows) {
        return Err(format!("{rows} rows cannot be {kept} that are kept and {left_out} that are left out"));
    }
    let expected = config.updates(*kept);
    if *updates != expected {
        return Err(format!("{kept} rows give {expected} updates, not {updates}"));
    }
    if (*held_out > 0) == config.eval.is_empty() {
        return Err(format!(
            "{held_out} rows to evaluate on do not fit {} sources of them",
            config.eval.len()
        ));
    }
    let named = config.elsewhere();
    if !elsewhere.keys().eq(named.iter()) {
        return Err(format!("hashes of {elsewhere:?} are not those of {named:?}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ulmus_plan::ExamplesConfig;
    use ulmus_run::results::Dropped;
    use ulmus_types::Of;

    use super::*;

    #[test]
    fn examples_that_do_not_fit_their_plan_are_not_believed() {
        let config = TuneConfig { of: Of::Base, batch: 8, epochs: Some(3), ..TuneConfig::default() };
        let left_out = |rows| Dropped { reason: "empty".to_owned(), rows, file: "a".to_owned(), row: 0 };
        let made = Examples {
            rows: 61,
            kept: 60,
            dropped: vec![left_out(1)],
            updates: 24,
            held_out: 0,
            files: Vec::new(),
            digest: Digest::of(b""),
            elsewhere: BTreeMap::new(),
        };
        assert_eq!(check_examples(&config, &made), Ok(()));
        for (wrong, told) in [
            (Examples { updates: 25, ..made.clone() }, "24 updates, not 25"),
            (Examples { updates: 0, ..made.clone() }, "24 updates, not 0"),
            (Examples { kept: 0, rows: 1, updates: 0, ..made.clone() }, "cannot be 0"),
            (Examples { rows: 62, ..made.clone() }, "62 rows cannot be"),
            (
                Examples { dropped: vec![left_out(u64::MAX), left_out(1)], ..made.clone() },
                "61 rows cannot be",
            ),
            (Examples { held_out: 1, ..made.clone() }, "do not fit 0 sources"),
        ] {
            let error = check_examples(&config, &wrong).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
        let from_elsewhere = TuneConfig { of: Of::Model("./model".to_owned()), ..config.clone() };
        assert!(check_examples(&from_elsewhere, &made).is_err());
        let hashes = [(TuneConfig::OF.to_owned(), Digest::of(b""))].into();
        let pinned = Examples { elsewhere: hashes, ..made.clone() };
        assert_eq!(check_examples(&from_elsewhere, &pinned), Ok(()));
        assert!(check_examples(&config, &pinned).is_err());
        let evaluated = TuneConfig { eval: vec![ExamplesConfig::default()], ..config };
        assert!(check_examples(&evaluated, &made).is_err());
    }
}
