//! The coordinator's memory across restarts: `run.sqlite` in the run folder.
//!
//! It ensures that a generation is never assigned twice and that no committed checkpoint is forgotten: every change is
//! one transaction, and generations are synced to disk before they are used. Training itself does not depend on this
//! file: workers continue to train while nobody writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};
use ulmus_coord_core::{PersistentState, Roster, TrainingRecord};
use ulmus_run::results::Results;
use ulmus_types::{
    BadUnit, CheckpointId, CheckpointKind, Digest, ErrorKind, FileEntry, Generation, Job, JobName, RunId,
    RunSecret, SourceReading, StageName, Step, StepReport, WorkerId,
};

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS generations (
        generation INTEGER PRIMARY KEY, members TEXT NOT NULL, training TEXT NOT NULL DEFAULT 'train') STRICT;
    CREATE TABLE IF NOT EXISTS ended (generation INTEGER PRIMARY KEY) STRICT;
    CREATE TABLE IF NOT EXISTS owners (job TEXT PRIMARY KEY, worker TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS checkpoints (
        id TEXT PRIMARY KEY, kind TEXT NOT NULL, state TEXT NOT NULL, files TEXT NOT NULL,
        committed INTEGER NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS jobs (name TEXT PRIMARY KEY, job TEXT NOT NULL, result TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS updates (
        training TEXT NOT NULL, step INTEGER NOT NULL, tokens INTEGER NOT NULL, loss REAL NOT NULL,
        z_loss REAL NOT NULL, grad_norm REAL NOT NULL, lr REAL NOT NULL, held_out_loss REAL,
        elapsed_ns INTEGER NOT NULL, data_wait_ns INTEGER NOT NULL, communication_ns INTEGER NOT NULL,
        generation INTEGER NOT NULL, examples INTEGER NOT NULL, measures TEXT NOT NULL,
        PRIMARY KEY (training, step)) STRICT, WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS readings (
        step INTEGER, worker TEXT, source TEXT, reading TEXT NOT NULL, PRIMARY KEY (step, worker, source)) STRICT;
";

/// The form of the database; see [`migrate`].
const VERSION: u32 = 2;

/// Brings a database of an earlier version to the present form, and then makes what is missing.
///
/// 1. Until chains there was one training stage: the table `steps` had its updates, and groups had no stage.
fn migrate(connection: &Connection) -> Result<(), DatabaseError> {
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if found > VERSION {
        return Err(DatabaseError::Newer { found });
    }
    if found == VERSION {
        return Ok(());
    }
    let has = |sql: &str| connection.query_row(sql, [], |_| Ok(())).optional().map(|row| row.is_some());
    let has_steps = has("SELECT 1 FROM sqlite_schema WHERE name = 'steps'")?;
    let names_no_stage = has("SELECT 1 FROM sqlite_schema WHERE name = 'generations'")?
        && !has("SELECT 1 FROM pragma_table_info('generations') WHERE name = 'training'")?;
    let mut script = "BEGIN IMMEDIATE;".to_owned();
    if names_no_stage {
        script += "ALTER TABLE generations ADD COLUMN training TEXT NOT NULL DEFAULT 'train';";
    }
    script += SCHEMA;
    if has_steps {
        script += "
            INSERT OR IGNORE INTO updates SELECT 'train', step, tokens, loss, z_loss, grad_norm, lr, held_out_loss,
                elapsed_ns, data_wait_ns, communication_ns, generation, 0, '{}' FROM steps;
            DROP TABLE steps;";
    }
    let stamp = format!("PRAGMA user_version = {VERSION}; COMMIT;");
    Ok(connection.execute_batch(&(script + &stamp))?)
}

/// Why the run's database cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DatabaseError {
    /// The disk cannot be written: it is full, or has become read-only.
    #[error("cannot write run.sqlite: {0}; free space on its disk, or make it writable again")]
    Disk(rusqlite::Error),
    /// The file is not a database, or is damaged.
    #[error("run.sqlite is damaged: {0}; restore it, or move it away and start with --recover")]
    NoDatabase(rusqlite::Error),
    /// SQLite reports another error.
    #[error("run.sqlite: {0}")]
    Sqlite(rusqlite::Error),
    /// A stored value cannot be read back.
    #[error("run.sqlite has a damaged {what}: {reason}; restore it, or start the run with another name")]
    Damaged {
        /// What the value should be.
        what: &'static str,
        /// What is wrong with the value.
        reason: String,
    },
    /// The database was written by a later program.
    #[error(
        "run.sqlite has form {found}, and this program knows forms up to {VERSION}; use a newer version of Ulmus"
    )]
    Newer {
        /// Its form.
        found: u32,
    },
    /// A file that workers read cannot be written.
    #[error(transparent)]
    Files(ulmus_checkpoint::StoreError),
    /// A step that was trained twice gave different numbers.
    #[error("step {step} was trained twice with different values of {column}: first {first}, then {second}")]
    Diverged {
        /// The step.
        step: Step,
        /// The first column that differs.
        column: String,
        /// The value from the first time.
        first: f64,
        /// The value from the second time.
        second: f64,
    },
}

impl DatabaseError {
    /// What can be done about it.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Disk(_) => ErrorKind::Disk,
            Self::Sqlite(_) => ErrorKind::Internal,
            Self::Files(error) => error.kind(),
            Self::Newer { .. } => ErrorKind::InvalidInput,
            Self::NoDatabase(_) | Self::Damaged { .. } | Self::Diverged { .. } => ErrorKind::Corrupt,
        }
    }
}

impl DatabaseError {
    /// Whether only the disk or store is at fault, so that trying again later may work.
    pub(crate) fn is_disk_error(&self) -> bool {
        match self {
            Self::Disk(_) => true,
            Self::Files(error) => matches!(error.kind(), ErrorKind::Retry | ErrorKind::Disk),
            _ => false,
        }
    }
}

impl From<rusqlite::Error> for DatabaseError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        match error.sqlite_error_code() {
            Some(
                ErrorCode::DiskFull
                | ErrorCode::ReadOnly
                | ErrorCode::SystemIoFailure
                | ErrorCode::CannotOpen
                | ErrorCode::PermissionDenied
                | ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked,
            ) => Self::Disk(error),
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => Self::NoDatabase(error),
            _ => Self::Sqlite(error),
        }
    }
}

/// A checkpoint whose parts are all stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredCheckpoint {
    /// The checkpoint.
    pub(crate) id: CheckpointId,
    /// Whether it is kept for good.
    pub(crate) kind: CheckpointKind,
    /// Hash of the state.
    pub(crate) state: Digest,
    /// Its files.
    pub(crate) files: BTreeMap<String, FileEntry>,
}

/// Metrics of one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct MetricsRow {
    /// The report of the step.
    pub(crate) report: StepReport,
    /// The last generation that trained the step.
    pub(crate) generation: Generation,
}

/// Reading statistics of a source on a worker.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct ReadingRow {
    /// The last update before the statistics were taken.
    pub(crate) step: Step,
    /// Name of the worker.
    pub(crate) worker: String,
    /// The statistics.
    pub(crate) reading: SourceReading,
}

/// The run's database.
#[derive(Debug)]
pub(crate) struct Database {
    connection: Connection,
}

/// Values of the column `committed`: the parts are stored, the manifest is written too, or it was found to be damaged.
const STORED: u8 = 0;
const COMMITTED: u8 = 1;
const DAMAGED: u8 = 2;

impl Database {
    /// Opens the database of a run, or creates it.
    ///
    /// # Errors
    /// When the file cannot be opened, or is not a database.
    pub(crate) fn open(path: &Path) -> Result<Self, DatabaseError> {
        let connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        migrate(&connection)?;
        let database = Self { connection };
        // Earlier versions forgot damaged milestones, so those look as if they had never been stored.
        if database.fact::<Step>("damage_is_kept_from")?.is_none() {
            let last = database.last_step(StageName::pretraining())?;
            database.save_fact("damage_is_kept_from", &last)?;
        }
        Ok(database)
    }

    /// The id of the run, and the secret by which its workers are recognized. They are made at the first start of the
    /// run, or now for a run from an earlier version that had none.
    ///
    /// # Errors
    /// When the database cannot be read or written.
    pub(crate) fn identity(&self) -> Result<(RunId, RunSecret), DatabaseError> {
        let id = match self.fact("run_id")? {
            Some(id) => id,
            None => self.set_identity(RunId::from_bytes(rand::random()))?,
        };
        let kept: Option<Digest> = self.fact("secret")?;
        let secret = kept.unwrap_or_else(|| Digest::from_bytes(rand::random()));
        if kept.is_none() {
            self.durably(|| self.save_fact("secret", &secret))?;
        }
        Ok((id, RunSecret::from_bytes(*secret.as_bytes())))
    }

    /// Sets the id of the run.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn set_identity(&self, id: RunId) -> Result<RunId, DatabaseError> {
        self.durably(|| self.save_fact("run_id", &id))?;
        Ok(id)
    }

    /// The hash of the plan that the run follows, if one is stored.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn plan_digest(&self) -> Result<Option<Digest>, DatabaseError> {
        self.fact("plan_digest")
    }

    /// Stores the hash of the plan that the run follows.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn keep_plan_digest(&self, digest: Digest) -> Result<(), DatabaseError> {
        self.save_fact("plan_digest", &digest)
    }

    /// Whether nothing is recorded: the file is new, or rebuilding it is not finished.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn is_new(&self) -> Result<bool, DatabaseError> {
        let count: u64 = self.connection.query_row(
            "SELECT (SELECT count(*) FROM generations) + (SELECT count(*) FROM jobs) + (SELECT count(*) FROM updates)",
            [],
            |row| row.get(0),
        )?;
        Ok(count == 0 || self.fact("recovering")? == Some(true))
    }

    /// Performs a write that survives a power failure.
    fn durably<T>(&self, write: impl FnOnce() -> Result<T, DatabaseError>) -> Result<T, DatabaseError> {
        // In WAL mode, NORMAL does not sync each transaction.
        self.connection.pragma_update(None, "synchronous", "FULL")?;
        let written = write();
        self.connection.pragma_update(None, "synchronous", "NORMAL")?;
        written
    }

    /// The state from which [`ulmus_coord_core::Coordinator`] resumes.
    ///
    /// # Errors
    /// When the database cannot be read or holds damaged values.
    pub(crate) fn saved(&self) -> Result<PersistentState, DatabaseError> {
        let rosters = self.rosters()?;
        let ended: Option<u64> =
            self.connection.query_row("SELECT max(generation) FROM ended", [], |row| row.get(0))?;
        let (generation, group) = match rosters.last_key_value() {
            Some((generation, roster)) if ended != Some(generation.get()) => {
                (*generation, roster.members.clone())
            }
            Some((generation, _)) => (*generation, Vec::new()),
            None => (Generation::default(), Vec::new()),
        };
        let mut jobs = self.connection.prepare("SELECT name FROM jobs")?;
        let jobs: Vec<String> = jobs.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        let jobs = jobs.into_iter().map(JobName::stored).collect();
        Ok(PersistentState {
            generation,
            group,
            rosters,
            fingerprint: self.fact("fingerprint")?,
            trainings: self.trainings()?,
            quarantine: self.fact::<Vec<_>>("quarantine")?.unwrap_or_default().into_iter().collect(),
            jobs,
            owners: self.owners()?,
        })
    }

    /// How far each training stage has got that the record knows of, and in any case pretraining.
    fn trainings(&self) -> Result<BTreeMap<StageName, TrainingRecord>, DatabaseError> {
        let mut query =
            self.connection.prepare("SELECT training FROM generations UNION SELECT training FROM updates")?;
        let begun: Vec<String> = query.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        let begun: Vec<StageName> = begun.iter().map(|name| stage_name(name)).collect::<Result<_, _>>()?;
        let mut records = BTreeMap::new();
        for name in begun.into_iter().chain([StageName::pretraining()]) {
            let recovered: Option<Step> = self.fact(&fact_of(name, "recovered"))?;
            let mut record = TrainingRecord {
                // A run that has lost its database may not know the steps before a checkpoint.
                step: self.last_step(name)?.max(recovered.unwrap_or_default()),
                trained: self.fact(&fact_of(name, "trained"))?,
                had_checkpoints: self.fact(&fact_of(name, "had_checkpoints"))?.unwrap_or_default(),
                recovered: recovered.unwrap_or_default(),
                ..TrainingRecord::default()
            };
            if name == StageName::pretraining() {
                record.recovered =
                    record.recovered.max(self.fact("damage_is_kept_from")?.unwrap_or_default());
            }
            records.insert(name, record);
        }
        for StoredCheckpoint { id, kind, .. } in self.checkpoints(true)? {
            let record: &mut TrainingRecord = records.entry(id.training()).or_default();
            record.checkpoints.insert(id, kind);
        }
        for id in self.damaged_checkpoints()? {
            records.entry(id.training()).or_default().damaged.insert(id.step());
        }
        for (tuning, updates) in self.results()?.updates() {
            records.entry(tuning).or_default().updates = Some(updates);
        }
        Ok(records)
    }

    /// The last update of a training stage on record.
    fn last_step(&self, training: StageName) -> Result<Step, DatabaseError> {
        let last = "SELECT max(step) FROM updates WHERE training = ?1";
        let step: Option<u64> = self.connection.query_row(last, [training.as_str()], |row| row.get(0))?;
        Ok(Step::new(step.unwrap_or(0)))
    }

    /// The members of recent generations.
    fn rosters(&self) -> Result<BTreeMap<Generation, Roster>, DatabaseError> {
        let mut query = self.connection.prepare(
            "SELECT generation, members, training FROM generations ORDER BY generation DESC LIMIT 256",
        )?;
        let rows: Vec<(u64, String, String)> = query
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
            .collect::<Result<_, _>>()?;
        rows.into_iter()
            .map(|(generation, members, training)| {
                let (training, members) = (stage_name(&training)?, decode("generation", &members)?);
                Ok((Generation::new(generation), Roster { training, members }))
            })
            .collect()
    }

    fn owners(&self) -> Result<BTreeMap<Job, WorkerId>, DatabaseError> {
        let mut query = self.connection.prepare("SELECT job, worker FROM owners")?;
        let rows: Vec<(String, String)> =
            query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
        // What an earlier version gave to a worker has another form. No worker of this version does it.
        let known =
            rows.into_iter().filter_map(|(job, worker)| Some((serde_json::from_str(&job).ok()?, worker)));
        known.map(|(job, worker)| Ok((job, decode("worker", &worker)?))).collect()
    }

    /// Fills the new database of a run whose old one was lost: with its id, its checkpoints, its metrics, and a
    /// generation above all that were ever seen.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn recover(&mut self, recovered: &Recovered) -> Result<(), DatabaseError> {
        // A recovery that is interrupted is done again from the beginning.
        self.durably(|| self.save_fact("recovering", &true))?;
        if let Some(id) = recovered.run {
            self.set_identity(id)?;
        }
        for checkpoint in &recovered.checkpoints {
            self.save_checkpoint(checkpoint)?;
            self.save_committed(checkpoint.id)?;
        }
        if !recovered.quarantine.is_empty() {
            self.save_quarantine(&recovered.quarantine)?;
        }
        for (training, rows) in &recovered.metrics {
            for row in rows {
                self.save_steps(*training, row.generation, std::slice::from_ref(&row.report))?;
            }
            let of_training = recovered.checkpoints.iter().filter(|stored| stored.id.training() == *training);
            let step = of_training.map(|checkpoint| checkpoint.id.step()).max();
            self.save_fact(&fact_of(*training, "recovered"), &step.unwrap_or_default())?;
        }
        // The stage that was the last to begin.
        let begun = recovered.metrics.iter().rev().find(|(_, rows)| !rows.is_empty());
        let training = begun.map_or(StageName::pretraining(), |(training, _)| *training);
        self.save_generation(recovered.generation, &Roster { training, members: Vec::new() })?;
        self.save_group_ended(recovered.generation)?;
        self.durably(|| self.save_fact("recovering", &false))
    }

    /// Stores a generation, synced to disk.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_generation(
        &self,
        generation: Generation,
        roster: &Roster,
    ) -> Result<(), DatabaseError> {
        self.durably(|| {
            self.connection.execute(
                "INSERT OR REPLACE INTO generations (generation, members, training) VALUES (?1, ?2, ?3)",
                params![generation.get(), encode(&roster.members), roster.training.as_str()],
            )?;
            Ok(())
        })
    }

    /// Stores that the group of a generation has ended.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_group_ended(&self, generation: Generation) -> Result<(), DatabaseError> {
        self.connection
            .execute("INSERT OR REPLACE INTO ended (generation) VALUES (?1)", params![generation.get()])?;
        Ok(())
    }

    /// Stores the run's fingerprint.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_fingerprint(&self, fingerprint: Digest) -> Result<(), DatabaseError> {
        self.save_fact("fingerprint", &fingerprint)
    }

    /// Stores which units are quarantined.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_quarantine(
        &self,
        quarantine: &BTreeMap<BadUnit, String>,
    ) -> Result<(), DatabaseError> {
        self.save_fact("quarantine", &quarantine.iter().collect::<Vec<_>>())
    }

    /// Stores that every update of a training stage is done, and which was the last.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_trained(&self, training: StageName, step: Step) -> Result<(), DatabaseError> {
        self.save_fact(&fact_of(training, "trained"), &step)
    }

    /// Stores a checkpoint whose manifest is about to be written.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_checkpoint(&self, checkpoint: &StoredCheckpoint) -> Result<(), DatabaseError> {
        self.connection.execute(
            "INSERT OR REPLACE INTO checkpoints (id, kind, state, files, committed) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                checkpoint.id.to_string(),
                encode(&checkpoint.kind),
                checkpoint.state.to_string(),
                encode(&checkpoint.files),
                STORED
            ],
        )?;
        Ok(())
    }

    /// Stores that the manifest of a checkpoint is written.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_committed(&self, id: CheckpointId) -> Result<(), DatabaseError> {
        self.connection.execute(
            "UPDATE checkpoints SET committed = ?2 WHERE id = ?1",
            params![id.to_string(), COMMITTED],
        )?;
        self.save_fact(&fact_of(id.training(), "had_checkpoints"), &true)
    }

    /// Stores that a committed checkpoint was found to be damaged.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_damaged(&self, id: CheckpointId) -> Result<(), DatabaseError> {
        self.connection.execute(
            "UPDATE checkpoints SET committed = ?2 WHERE id = ?1",
            params![id.to_string(), DAMAGED],
        )?;
        Ok(())
    }

    fn damaged_checkpoints(&self) -> Result<BTreeSet<CheckpointId>, DatabaseError> {
        let mut query = self.connection.prepare("SELECT id FROM checkpoints WHERE committed = ?1")?;
        let ids: Vec<String> = query.query_map([DAMAGED], |row| row.get(0))?.collect::<Result<_, _>>()?;
        ids.iter().map(|id| checkpoint_id(id)).collect()
    }

    /// Forgets a checkpoint.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn forget(&self, id: CheckpointId) -> Result<(), DatabaseError> {
        self.connection.execute("DELETE FROM checkpoints WHERE id = ?1", params![id.to_string()])?;
        Ok(())
    }

    /// Checkpoints whose manifest is written, or else those whose manifest is still to be written.
    ///
    /// # Errors
    /// When the database cannot be read or holds damaged values.
    pub(crate) fn checkpoints(&self, committed: bool) -> Result<Vec<StoredCheckpoint>, DatabaseError> {
        let mut query = self
            .connection
            .prepare("SELECT id, kind, state, files FROM checkpoints WHERE committed = ?1 ORDER BY id")?;
        let rows: Vec<(String, String, String, String)> = query
            .query_map([if committed { COMMITTED } else { STORED }], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
            })?
            .collect::<Result<_, _>>()?;
        rows.into_iter()
            .map(|(id, kind, state, files)| {
                Ok(StoredCheckpoint {
                    id: checkpoint_id(&id)?,
                    kind: decode("checkpoint", &kind)?,
                    state: state.parse().map_err(|error: ulmus_types::DigestError| {
                        DatabaseError::Damaged { what: "checkpoint", reason: error.to_string() }
                    })?,
                    files: decode("checkpoint", &files)?,
                })
            })
            .collect()
    }

    /// Checks that reports agree with the recorded ones of the same steps, in all deterministic columns.
    ///
    /// # Errors
    /// [`DatabaseError::Diverged`] when they do not; or when the database cannot be read.
    pub(crate) fn check_steps(
        &self,
        training: StageName,
        reports: &[StepReport],
    ) -> Result<(), DatabaseError> {
        let mut query = self.connection.prepare("SELECT * FROM updates WHERE training = ?1 AND step = ?2")?;
        for report in reports {
            let of = params![training.as_str(), report.step.get()];
            let earlier = query.query_row(of, metrics_row).optional()?;
            if let Some(earlier) = earlier {
                compare(&earlier.report, report)?;
            }
        }
        Ok(())
    }

    /// Stores reports of updates. A report of the same step that is already stored must agree in all deterministic
    /// columns; it is replaced unless it is from a later generation.
    ///
    /// # Errors
    /// [`DatabaseError::Diverged`] when it does not agree; or when the database cannot be written.
    pub(crate) fn save_steps(
        &mut self,
        training: StageName,
        generation: Generation,
        reports: &[StepReport],
    ) -> Result<(), DatabaseError> {
        let transaction = self.connection.transaction()?;
        for report in reports {
            let same = "SELECT * FROM updates WHERE training = ?1 AND step = ?2";
            let earlier = transaction
                .query_row(same, params![training.as_str(), report.step.get()], metrics_row)
                .optional()?;
            if let Some(earlier) = earlier {
                compare(&earlier.report, report)?;
                if earlier.generation > generation {
                    continue;
                }
            }
            transaction.execute(
                "INSERT OR REPLACE INTO updates
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
                params![
                    training.as_str(),
                    report.step.get(),
                    report.tokens,
                    report.loss,
                    report.z_loss,
                    report.grad_norm,
                    report.lr,
                    report.held_out_loss,
                    nanos(report.elapsed),
                    nanos(report.data_wait),
                    nanos(report.communication),
                    generation.get(),
                    report.examples,
                    encode(&report.measures),
                ],
            )?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// All metrics of a training stage, oldest first.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn metrics(&self, training: StageName) -> Result<Vec<MetricsRow>, DatabaseError> {
        let mut query = self.connection.prepare("SELECT * FROM updates WHERE training = ?1 ORDER BY step")?;
        Ok(query.query_map([training.as_str()], metrics_row)?.collect::<Result<_, _>>()?)
    }

    /// Stores reading statistics.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_reading(&self, row: &ReadingRow) -> Result<(), DatabaseError> {
        let ReadingRow { step, worker, reading } = row;
        self.connection.execute(
            "INSERT OR REPLACE INTO readings VALUES (?1, ?2, ?3, ?4)",
            params![step.get(), worker, reading.source, encode(reading)],
        )?;
        Ok(())
    }

    /// All reading statistics, oldest first.
    ///
    /// # Errors
    /// When the database cannot be read or holds damaged values.
    pub(crate) fn readings(&self) -> Result<Vec<ReadingRow>, DatabaseError> {
        let mut query = self
            .connection
            .prepare("SELECT step, worker, reading FROM readings ORDER BY step, worker, source")?;
        let rows: Vec<(u64, String, String)> = query
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
            .collect::<Result<_, _>>()?;
        rows.into_iter()
            .map(|(step, worker, reading)| {
                Ok(ReadingRow { step: Step::new(step), worker, reading: decode("reading", &reading)? })
            })
            .collect()
    }

    /// Stores the worker to which a job was given.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_owner(&self, job: &Job, worker: &WorkerId) -> Result<(), DatabaseError> {
        self.connection.execute(
            "INSERT OR REPLACE INTO owners (job, worker) VALUES (?1, ?2)",
            params![encode(job), encode(worker)],
        )?;
        Ok(())
    }

    /// Forgets that a job is done.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn forget_job(&self, job: &JobName) -> Result<(), DatabaseError> {
        self.connection.execute("DELETE FROM jobs WHERE name = ?1", params![job.as_str()])?;
        Ok(())
    }

    /// Forgets everything that was made for a tuning stage.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn forget_jobs_of(&self, tuning: StageName) -> Result<(), DatabaseError> {
        for stage in tuning.of_tuning() {
            self.connection.execute(
                "DELETE FROM jobs WHERE name = ?1 OR substr(name, 1, length(?1) + 1) = ?1 || '/'",
                [stage.as_str()],
            )?;
        }
        Ok(())
    }

    /// Stores the result of a job.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub(crate) fn save_job(&self, job: &Job, result: &str) -> Result<(), DatabaseError> {
        self.connection.execute(
            "INSERT OR REPLACE INTO jobs (name, job, result) VALUES (?1, ?2, ?3)",
            params![job.name().as_str(), encode(job), result],
        )?;
        Ok(())
    }

    /// Results of finished jobs.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn results(&self) -> Result<Results, DatabaseError> {
        let mut query = self.connection.prepare("SELECT name, result FROM jobs")?;
        let rows: Vec<(String, String)> =
            query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
        let rows = rows
            .into_iter()
            .map(|(name, result)| Ok((JobName::stored(name), decode("job result", &result)?)));
        rows.collect::<Result<_, DatabaseError>>().map(Results::new)
    }

    fn fact<T: for<'de> Deserialize<'de>>(&self, key: &str) -> Result<Option<T>, DatabaseError> {
        let text: Option<String> = self
            .connection
            .query_row("SELECT value FROM facts WHERE key = ?1", params![key], |row| row.get(0))
            .optional()?;
        text.map(|text| decode("fact", &text)).transpose()
    }

    fn save_fact(&self, key: &str, value: &impl Serialize) -> Result<(), DatabaseError> {
        self.connection.execute(
            "INSERT OR REPLACE INTO facts (key, value) VALUES (?1, ?2)",
            params![key, encode(value)],
        )?;
        Ok(())
    }
}

/// What can be recovered from the folder of a run whose database was lost.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    /// The run id in the manifests.
    pub(crate) run: Option<RunId>,
    /// Checkpoints that are intact.
    pub(crate) checkpoints: Vec<StoredCheckpoint>,
    /// Quarantined units.
    pub(crate) quarantine: BTreeMap<BadUnit, String>,
    /// Metrics of the updates of each training stage, in the order of the stages.
    pub(crate) metrics: Vec<(StageName, Vec<MetricsRow>)>,
    /// A generation above all that were ever seen.
    pub(crate) generation: Generation,
}

fn encode(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain data has a JSON form")
}

fn decode<T: for<'de> Deserialize<'de>>(what: &'static str, text: &str) -> Result<T, DatabaseError> {
    serde_json::from_str(text).map_err(|error| DatabaseError::Damaged { what, reason: error.to_string() })
}

/// The key of a fact about a training stage.
fn fact_of(training: StageName, fact: &str) -> String {
    if training == StageName::pretraining() { fact.to_owned() } else { format!("{fact}/{training}") }
}

/// The name of a stage from the database.
fn stage_name(name: &str) -> Result<StageName, DatabaseError> {
    name.parse().map_err(|error: ulmus_types::IdError| DatabaseError::Damaged {
        what: "stage",
        reason: error.to_string(),
    })
}

/// A checkpoint id from the database.
fn checkpoint_id(id: &str) -> Result<CheckpointId, DatabaseError> {
    id.parse().map_err(|error: ulmus_types::IdError| DatabaseError::Damaged {
        what: "checkpoint",
        reason: error.to_string(),
    })
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

fn metrics_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<MetricsRow> {
    let duration = |column: &str| row.get::<_, u64>(column).map(Duration::from_nanos);
    Ok(MetricsRow {
        report: StepReport {
            step: Step::new(row.get("step")?),
            tokens: row.get("tokens")?,
            loss: row.get("loss")?,
            z_loss: row.get("z_loss")?,
            grad_norm: row.get("grad_norm")?,
            lr: row.get("lr")?,
            held_out_loss: row.get("held_out_loss")?,
            elapsed: duration("elapsed_ns")?,
            data_wait: duration("data_wait_ns")?,
            communication: duration("communication_ns")?,
            examples: row.get("examples")?,
            measures: serde_json::from_str(&row.get::<_, String>("measures")?).unwrap_or_default(),
        },
        generation: Generation::new(row.get("generation")?),
    })
}

/// Compares two reports of a step. A step depends only on the plan, so they must be bit-identical.
fn compare(earlier: &StepReport, now: &StepReport) -> Result<(), DatabaseError> {
    let columns = [
        ("tokens", earlier.tokens as f64, now.tokens as f64),
        ("loss", earlier.loss, now.loss),
        ("z_loss", earlier.z_loss, now.z_loss),
        ("grad_norm", earlier.grad_norm, now.grad_norm),
        ("lr", earlier.lr, now.lr),
        ("examples", earlier.examples as f64, now.examples as f64),
    ];
    let columns = columns.map(|(column, first, second)| (column.to_owned(), first, second));
    let absent = f64::NAN;
    let names: BTreeSet<&String> = earlier.measures.keys().chain(now.measures.keys()).collect();
    let measures = names.into_iter().map(|name| {
        let of = |report: &StepReport| report.measures.get(name).copied().unwrap_or(absent);
        (name.clone(), of(earlier), of(now))
    });
    match columns.into_iter().chain(measures).find(|(_, first, second)| first.to_bits() != second.to_bits()) {
        Some((column, first, second)) => {
            Err(DatabaseError::Diverged { step: now.step, column, first, second })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ulmus_types::{Incarnation, Subject};

    fn report(step: u64, loss: f64) -> StepReport {
        StepReport {
            step: Step::new(step),
            tokens: step * 100,
            loss,
            z_loss: 0.1,
            grad_norm: 1.0,
            lr: 1e-3,
            held_out_loss: step.is_multiple_of(2).then_some(3.5),
            elapsed: Duration::from_millis(20),
            data_wait: Duration::ZERO,
            communication: Duration::from_micros(7),
            examples: 0,
            measures: BTreeMap::new(),
        }
    }

    fn roster(training: StageName, worker: &WorkerId) -> Roster {
        Roster { training, members: vec![worker.clone()] }
    }

    #[test]
    fn what_is_saved_is_there_after_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(ulmus_run::paths::DATABASE);
        let worker = WorkerId::new("w", Incarnation::new(u64::MAX)).unwrap();
        let id = CheckpointId::new(StageName::pretraining(), Step::new(2), Generation::new(1));
        let entry = FileEntry { bytes: 3, digest: Digest::of(b"abc") };
        let checkpoint = StoredCheckpoint {
            id,
            kind: CheckpointKind::Milestone,
            state: Digest::of(b"state"),
            files: [("a".to_owned(), entry)].into(),
        };
        let prepare = Job::new("prepare".parse().unwrap(), Subject::Stage(Vec::new()));
        let reading = SourceReading { source: "web".into(), epochs: 0.5, ..SourceReading::default() };
        let row = ReadingRow { step: Step::new(2), worker: "w".into(), reading };
        {
            let mut store = Database::open(&path).unwrap();
            store.save_generation(Generation::new(1), &roster(StageName::pretraining(), &worker)).unwrap();
            store.save_fingerprint(Digest::of(b"f")).unwrap();
            store
                .save_steps(StageName::pretraining(), Generation::new(1), &[report(1, 8.0), report(2, 7.0)])
                .unwrap();
            store.save_checkpoint(&checkpoint).unwrap();
            store.save_job(&prepare, "{\"shards\":3}").unwrap();
            store.save_reading(&row).unwrap();
        }
        let store = Database::open(&path).unwrap();
        let saved = store.saved().unwrap();
        let record = &saved.trainings[&StageName::pretraining()];
        assert_eq!(
            (saved.generation, saved.group, record.step),
            (Generation::new(1), vec![worker], Step::new(2))
        );
        assert_eq!(saved.fingerprint, Some(Digest::of(b"f")));
        assert!(record.checkpoints.is_empty(), "its manifest is not written yet");
        assert_eq!(store.checkpoints(false).unwrap(), [checkpoint]);
        store.save_committed(id).unwrap();
        let record = store.saved().unwrap().trainings.remove(&StageName::pretraining()).unwrap();
        assert_eq!(record.checkpoints, [(id, CheckpointKind::Milestone)].into());
        assert!(record.had_checkpoints);
        assert_eq!(store.metrics(StageName::pretraining()).unwrap()[1].report, report(2, 7.0));
        assert_eq!(
            store.results().unwrap(),
            Results::new([(prepare.name(), serde_json::json!({"shards": 3}))].into())
        );
        assert_eq!(store.readings().unwrap(), [row]);
    }

    #[test]
    fn a_step_that_is_trained_twice_must_agree() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Database::open(&folder.path().join(ulmus_run::paths::DATABASE)).unwrap();
        store.save_steps(StageName::pretraining(), Generation::new(1), &[report(1, 8.0)]).unwrap();
        store.save_steps(StageName::pretraining(), Generation::new(2), &[report(1, 8.0)]).unwrap();
        store.save_steps(StageName::pretraining(), Generation::new(1), &[report(1, 8.0)]).unwrap();
        let error = store
            .save_steps(StageName::pretraining(), Generation::new(3), &[report(1, 8.000_001)])
            .unwrap_err();
        assert!(matches!(&error, DatabaseError::Diverged { column, .. } if column == "loss"), "{error}");
        assert_eq!(store.metrics(StageName::pretraining()).unwrap()[0].generation, Generation::new(2));
    }

    #[test]
    fn training_stages_are_kept_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(ulmus_run::paths::DATABASE);
        let worker = WorkerId::new("w", Incarnation::new(1)).unwrap();
        let dpo: StageName = "dpo".parse().unwrap();
        let tuned = StepReport {
            examples: 4,
            measures: [("rewards/margins".to_owned(), 0.1)].into(),
            ..report(1, 0.7)
        };
        {
            let mut database = Database::open(&path).unwrap();
            database.save_generation(Generation::new(1), &roster(StageName::pretraining(), &worker)).unwrap();
            database.save_steps(StageName::pretraining(), Generation::new(1), &[report(1, 8.0)]).unwrap();
            database.save_trained(StageName::pretraining(), Step::new(1)).unwrap();
            database.save_generation(Generation::new(2), &roster(dpo, &worker)).unwrap();
            database.save_steps(dpo, Generation::new(2), std::slice::from_ref(&tuned)).unwrap();
        }
        let mut database = Database::open(&path).unwrap();
        let saved = database.saved().unwrap();
        let steps: Vec<_> =
            saved.trainings.iter().map(|(name, record)| (name.as_str(), record.step.get())).collect();
        assert_eq!(steps, [("dpo", 1), ("train", 1)]);
        assert_eq!(saved.trainings[&StageName::pretraining()].trained, Some(Step::new(1)));
        assert_eq!(saved.trainings[&dpo].trained, None);
        assert_eq!(saved.rosters[&Generation::new(2)], roster(dpo, &worker));
        assert_eq!(database.metrics(dpo).unwrap()[0].report, tuned);
        let other = StepReport { measures: [("rewards/margins".to_owned(), 0.2)].into(), ..tuned };
        let error = database.save_steps(dpo, Generation::new(3), &[other]).unwrap_err();
        assert!(
            matches!(&error, DatabaseError::Diverged { column, .. } if column == "rewards/margins"),
            "{error}"
        );
    }

    #[test]
    fn a_database_of_the_first_form_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(ulmus_run::paths::DATABASE);
        let first = "
            CREATE TABLE generations (generation INTEGER PRIMARY KEY, members TEXT NOT NULL) STRICT;
            CREATE TABLE steps (
                step INTEGER PRIMARY KEY, tokens INTEGER NOT NULL, loss REAL NOT NULL, z_loss REAL NOT NULL,
                grad_norm REAL NOT NULL, lr REAL NOT NULL, held_out_loss REAL, elapsed_ns INTEGER NOT NULL,
                data_wait_ns INTEGER NOT NULL, communication_ns INTEGER NOT NULL, generation INTEGER NOT NULL) STRICT;
            INSERT INTO generations VALUES (3, '[]');
            INSERT INTO steps VALUES (1, 100, 8.0, 0.1, 1.0, 0.001, NULL, 20000000, 0, 7000, 3);";
        Connection::open(&path).unwrap().execute_batch(first).unwrap();
        for _ in 0..2 {
            let database = Database::open(&path).unwrap();
            assert_eq!(database.metrics(StageName::pretraining()).unwrap()[0].report, report(1, 8.0));
            let saved = database.saved().unwrap();
            assert_eq!(saved.rosters[&Generation::new(3)].training, StageName::pretraining());
            assert_eq!(saved.trainings[&StageName::pretraining()].step, Step::new(1));
        }
        let later = "PRAGMA user_version = 99;";
        Connection::open(&path).unwrap().execute_batch(later).unwrap();
        assert!(matches!(Database::open(&path), Err(DatabaseError::Newer { found: 99 })));
    }
}
