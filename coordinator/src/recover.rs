//! Recovers a run whose database was lost from its run folder.
//!
//! Checkpoints vouch for themselves, so every checkpoint that is intact byte for byte is used. The generation continues
//! above all that were ever seen, so that a worker from a lost generation cannot be taken for a member of a new group.
//! The metrics come from `metrics.csv`; jobs are done again.

use std::collections::BTreeSet;

use ulmus_checkpoint::{CheckpointError, Store};
use ulmus_plan::Plan;
use ulmus_process::{Failure, with_causes};
use ulmus_run::paths;
use ulmus_types::{BadUnit, CheckpointId, ExitStatus, Generation, RunId, counted};

use crate::database::{Recovered, StoredCheckpoint};
use crate::folder::RunFolder;
use crate::metrics::{Columns, MetricsFile};

/// Refuses to start with a new database if the run has already begun: a run never silently resumes or starts over
/// without its record.
///
/// # Errors
/// When there are checkpoints or rows of metrics; the message says what to do. Also when the store does not answer.
pub(crate) async fn refuse_to_forget(
    folder: &RunFolder,
    plan: &Plan,
    command: &str,
    from_start: bool,
) -> Result<(), Failure> {
    let found = checkpoints(folder.store(), plan).await?;
    let Some(newest) = found.last() else {
        let (rows, _) = MetricsFile::read(&folder.path().join(paths::METRICS), &Columns::Text);
        let Some(last) = rows.last().filter(|_| !from_start) else { return Ok(()) };
        let message = format!(
            "{} is lost or empty, there is no checkpoint in {}, and metrics.csv has {}; restore them, or start over with: \
             {command} --from-start",
            folder.database().display(),
            folder.shown(),
            counted(last.report.step.get() as usize, "step")
        );
        return Err(Failure::new(ExitStatus::Corrupt, message));
    };
    let message = format!(
        "{} is lost or empty, but {} has {}, the newest of them {newest}; restore the database, or rebuild it from the run \
         folder with: {command} --recover",
        folder.database().display(),
        folder.shown(),
        counted(found.len(), "checkpoint")
    );
    Err(Failure::new(ExitStatus::Corrupt, message))
}

/// What shows, if anything, that a database is an older copy, or belongs to a run other than that of the checkpoints.
///
/// # Errors
/// When the store does not answer.
pub(crate) async fn contradiction(
    folder: &RunFolder,
    plan: &Plan,
    id: RunId,
    known: Generation,
) -> Result<Option<String>, Failure> {
    let failed = |error: &CheckpointError| Failure::of(error.kind(), error);
    let store = folder.store();
    let found = checkpoints(store, plan).await?;
    // A generation is stored in the database before anybody works in it.
    if let Some(newer) = found.iter().rev().find(|checkpoint| checkpoint.generation() > known) {
        return Ok(Some(format!("ends at generation {known}, but {} has {newer}", folder.shown())));
    }
    let Some(newest) = found.last() else { return Ok(None) };
    let other = match ulmus_checkpoint::read_manifest(store, *newest).await {
        Ok(manifest) => manifest.run.filter(|other| *other != id),
        Err(error) if error.condemns() => None,
        Err(error) => return Err(failed(&error)),
    };
    Ok(other.map(|other| format!("belongs to run {}, but {newest} to run {}", id.short(), other.short())))
}

/// Gathers what can be recovered from the run folder, and descriptions of what is damaged.
///
/// # Errors
/// When the checkpoints belong to several runs or to another plan, or the store does not answer.
pub(crate) async fn gather(folder: &RunFolder, plan: &Plan) -> Result<(Recovered, Vec<String>), Failure> {
    let store = folder.store();
    let failed = |error: &CheckpointError| Failure::of(error.kind(), error);
    let mut recovered = Recovered::default();
    let mut damaged = Vec::new();
    let mut runs: BTreeSet<RunId> = BTreeSet::new();
    for id in checkpoints(store, plan).await? {
        recovered.generation = recovered.generation.max(id.generation());
        let manifest = match ulmus_checkpoint::read_manifest(store, id).await {
            Ok(manifest) => manifest,
            Err(error) if error.condemns() => {
                damaged.push(with_causes(&error));
                continue;
            }
            Err(error) => return Err(failed(&error)),
        };
        if !plan.has_digest_of(id.training(), manifest.plan_digest) {
            let message = format!(
                "checkpoint {id} in {} belongs to another plan; give this run another name with --set run.name=NAME",
                folder.shown()
            );
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        runs.extend(manifest.run);
        let faults =
            ulmus_checkpoint::damaged_files(store, &manifest).await.map_err(|error| failed(&error))?;
        if faults.is_empty() {
            recovered.checkpoints.push(StoredCheckpoint {
                id,
                kind: manifest.kind,
                state: manifest.state_digest,
                files: manifest.files,
            });
        } else {
            damaged.extend(faults.iter().map(|fault| with_causes(fault)));
        }
    }
    if runs.len() > 1 {
        let runs: Vec<String> = runs.into_iter().map(RunId::short).collect();
        let message = format!(
            "{} has checkpoints of several runs ({}); move away those of all runs but one",
            folder.shown(),
            runs.join(", ")
        );
        return Err(Failure::new(ExitStatus::Corrupt, message));
    }
    recovered.run = runs.into_iter().next();
    recovered.quarantine = quarantine(store).await?;
    for training in plan.graph().trainings().map(|stage| stage.name) {
        let file = paths::of_training(training, paths::METRICS);
        let (metrics, unreadable) =
            MetricsFile::read(&folder.path().join(&file), &Columns::of(plan, training));
        if unreadable > 0 {
            damaged.push(format!("skipping {} of {file} that cannot be read", counted(unreadable, "row")));
        }
        recovered.metrics.push((training, metrics));
    }
    let rows = recovered.metrics.iter().flat_map(|(_, rows)| rows);
    let of_metrics = rows.map(|row| row.generation).max().unwrap_or_default();
    recovered.generation = Generation::new(recovered.generation.max(of_metrics).get() + 1000);
    Ok((recovered, damaged))
}

/// The checkpoints of all training stages, each stage's oldest first, in the order of the stages.
async fn checkpoints(store: &Store, plan: &Plan) -> Result<Vec<CheckpointId>, Failure> {
    let mut found = Vec::new();
    for training in plan.graph().trainings().map(|stage| stage.name) {
        let of_training = ulmus_checkpoint::checkpoints(store, training).await;
        found.extend(of_training.map_err(|error| Failure::of(error.kind(), &error))?);
    }
    Ok(found)
}

async fn quarantine(store: &Store) -> Result<std::collections::BTreeMap<BadUnit, String>, Failure> {
    let contents = match store.get(paths::QUARANTINE).await {
        Err(ulmus_checkpoint::StoreError::NotFound { .. }) => return Ok(std::collections::BTreeMap::new()),
        contents => contents.map_err(|error| Failure::of(error.kind(), &error))?,
    };
    ulmus_run::quarantine::from_json(&contents)
        .map_err(|error| Failure::new(error.kind().into(), format!("{error}; restore it, or delete it")))
}
