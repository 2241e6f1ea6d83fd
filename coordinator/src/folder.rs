//! The folder of a run: who may write it, and for which plan.
//!
//! It ensures that a run has one coordinator and one plan. The lock belongs to the operating system, so a killed
//! coordinator leaves none behind. If the run is kept in an object store, the coordinator's own files are on its disk,
//! and a mark in both places shows that they belong together.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ulmus_checkpoint::{Store, StoreError};
use ulmus_plan::Plan;
use ulmus_run::paths;
use ulmus_types::{Digest, ErrorKind, StageName};

/// Why a run folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    /// Another coordinator has locked the folder.
    #[error(
        "another coordinator is running the run in {0}; stop it, or give this run another name with --set run.name=NAME"
    )]
    Locked(PathBuf),
    /// The folder has a run with another plan.
    #[error(
        "{folder} holds a run with another plan:\n{changes}\ngive this run another name with --set run.name=NAME, or delete the folder, and the run's files in its object store"
    )]
    PlanChanged {
        /// The folder.
        folder: PathBuf,
        /// The keys that differ, one per line.
        changes: String,
    },
    /// The store has a run that another coordinator has begun.
    #[error(
        "{store} holds a run whose coordinator has its own files elsewhere than in {folder}; start it there, give this \
         run another name with --set run.name=NAME, or delete the run in the store"
    )]
    Elsewhere {
        /// The store.
        store: String,
        /// Where the coordinator's own files would be.
        folder: PathBuf,
    },
    /// The coordinator's own files belong to a run in another store.
    #[error(
        "{folder} has a run that is not kept in {store}; correct store.url, or give this run another name with \
         --set run.name=NAME"
    )]
    OtherStore {
        /// Folder of the coordinator's own files.
        folder: PathBuf,
        /// The store.
        store: String,
    },
    /// The stored plan cannot be read.
    #[error("{0} is damaged: {1}; restore it, or delete the folder")]
    DamagedPlan(PathBuf, String),
    /// A file in the folder cannot be read or written.
    #[error("{path}: {error}; check that the disk is not full and the folder is not read-only")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The error of the operating system.
        error: io::Error,
    },
    /// The run's store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl FolderError {
    /// What can be done about it.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Locked(_) | Self::Elsewhere { .. } | Self::OtherStore { .. } => ErrorKind::Refused,
            Self::PlanChanged { .. } => ErrorKind::InvalidInput,
            Self::DamagedPlan(..) => ErrorKind::Corrupt,
            Self::Io { .. } => ErrorKind::Disk,
            Self::Store(error) => error.kind(),
        }
    }

    /// Whether only the disk is at fault, so that trying again later may work.
    fn is_disk_error(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        matches!(self, Self::Io { error, .. } if matches!(error.kind(), QuotaExceeded | ReadOnlyFilesystem | StorageFull))
    }
}

/// A file that is written to test the disk. It is as large as what a start writes.
const PROBE: &str = "disk.probe";
const PROBE_BYTES: usize = 64 << 10;

/// How often a disk that could not be written is tried again.
const DISK_RETRY: Duration = Duration::from_secs(1);

/// A random text that nobody can guess.
pub(crate) fn unguessable() -> String {
    format!("{:016x}{:016x}", rand::random::<u64>(), rand::random::<u64>())
}

/// A run folder that this process has locked.
#[derive(Debug)]
pub(crate) struct RunFolder {
    path: PathBuf,
    store: Store,
    // The lock is held for as long as this value lives.
    lock: Arc<File>,
}

/// The lock of a run folder.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    file: Arc<File>,
}

impl Lock {
    /// Whether the locked file is still the one that another coordinator would lock.
    pub(crate) fn holds(&self) -> bool {
        let of = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let mine = self.file.metadata().map(of);
        match (fs::metadata(&self.path).map(of), mine) {
            (Ok(there), Ok(mine)) => there == mine,
            (Err(error), _) => error.kind() != io::ErrorKind::NotFound,
            (_, Err(_)) => true,
        }
    }
}

impl RunFolder {
    /// Opens or creates the folder of the plan's run, and locks it. With `recover`, the coordinator's own files may be
    /// lost although the store has a mark.
    ///
    /// # Errors
    /// When another coordinator has locked it, when its store belongs to another coordinator, or when it cannot be
    /// written.
    pub(crate) async fn open(plan: &Plan, recover: bool) -> Result<Self, FolderError> {
        let location = format!("{}/{}", plan.store.url.trim_end_matches('/'), plan.run.name);
        let store = Store::create(&location)?;
        let own = || Path::new(&plan.store.local).join(plan.run.name.to_string());
        let path = store.directory().map_or_else(own, Path::to_path_buf);
        let io = |path: &Path, error: io::Error| FolderError::Io { path: path.to_path_buf(), error };
        let logs = path.join(paths::LOGS);
        fs::create_dir_all(&logs).map_err(|error| io(&logs, error))?;
        let lock_path = path.join(paths::LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(|error| io(&lock_path, error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FolderError::Locked(path)),
            Err(TryLockError::Error(error)) => return Err(io(&lock_path, error)),
        }
        let folder = Self { path, store, lock: Arc::new(lock) };
        folder.wait_for_disk(plan.checkpoint.oldest()).await?;
        folder.claim(recover).await?;
        Ok(folder)
    }

    /// Waits while the disk cannot be written, up to `most` and only for a run that has begun, whose workers may be
    /// training.
    async fn wait_for_disk(&self, most: Duration) -> Result<(), FolderError> {
        let began = Instant::now();
        let mut told = false;
        let probe = "-".repeat(PROBE_BYTES);
        while let Err(error) = self.write(PROBE, &probe) {
            let may_pass = error.is_disk_error() && self.database().exists() && began.elapsed() < most;
            if !may_pass {
                return Err(error);
            }
            if !std::mem::replace(&mut told, true) {
                let most = humantime::format_duration(most);
                ulmus_process::print(&format!("ALARM: {error}; waiting for it for up to {most}")).ok();
            }
            tokio::time::sleep(DISK_RETRY).await;
        }
        let path = self.path.join(PROBE);
        fs::remove_file(&path).map_err(|error| FolderError::Io { path, error })
    }

    /// Marks an object store as belonging to this folder, or checks that it does.
    async fn claim(&self, recover: bool) -> Result<(), FolderError> {
        let other_store =
            || FolderError::OtherStore { folder: self.path.clone(), store: self.store.to_string() };
        let path = self.path.join(paths::MARK);
        let has_begun = self.path.join(paths::DATABASE).exists();
        let own = match fs::read_to_string(&path) {
            Ok(mark) => Some(mark),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(FolderError::Io { path, error }),
        };
        if self.store.directory().is_some() {
            return match own {
                None => Ok(()),
                Some(_) if has_begun => Err(other_store()),
                // If no run has begun, the mark belongs to a store that was never reached.
                Some(_) => fs::remove_file(&path).map_err(|error| FolderError::Io { path, error }),
            };
        }
        let there = match self.store.get(paths::MARK).await {
            Err(StoreError::NotFound { .. }) => None,
            there => Some(there?),
        };
        match (own, there) {
            (Some(own), Some(there)) if there == own => Ok(()),
            _ if has_begun => Err(other_store()),
            // The coordinator's own files were lost, and it takes over the store.
            (_, Some(there)) if recover => {
                let there = String::from_utf8_lossy(&there).into_owned();
                self.write(paths::MARK, &there)
            }
            (_, Some(_)) => Err(self.elsewhere()),
            (own, None) => {
                let own = own.unwrap_or_else(unguessable);
                self.write(paths::MARK, &own)?;
                // The answer to the write may have been lost, so read the mark back.
                self.store.put_new(paths::MARK, own.clone()).await?;
                if self.store.get(paths::MARK).await? == own { Ok(()) } else { Err(self.elsewhere()) }
            }
        }
    }

    fn elsewhere(&self) -> FolderError {
        FolderError::Elsewhere { store: self.store.to_string(), folder: self.path.clone() }
    }

    /// Checks that a plan is that of the run, once the run has begun. `kept` is the hash of the run's plan in the
    /// database. Returns the tuning stages that have changed, which only those may that have not `begun`.
    ///
    /// # Errors
    /// When it is another plan, with the keys that differ.
    pub(crate) fn check_plan(
        &self,
        plan: &Plan,
        kept: Option<Digest>,
        begun: impl Fn(StageName) -> bool,
    ) -> Result<Vec<StageName>, FolderError> {
        let Some(text) = self.kept_plan()? else {
            let is_another = kept.is_some_and(|kept| !plan.has_digest(kept));
            let changes = || {
                format!("  its hash differs from the one in {}, and {} is lost", paths::DATABASE, paths::PLAN)
            };
            return if is_another { Err(self.plan_changed(changes())) } else { Ok(Vec::new()) };
        };
        let earlier = ulmus_plan::read(&text, &[]).map_err(|problems| {
            FolderError::DamagedPlan(self.path.join(paths::PLAN), problems.to_string())
        })?;
        let keys = earlier.iter().flat_map(|earlier| plan.changed_keys(earlier));
        let keys = keys.map(|(key, old, new)| format!("  {key} was {old} and is now {new}"));
        let changed: Vec<StageName> =
            earlier.iter().flat_map(|earlier| plan.changed_tunings(earlier)).collect();
        let stages = changed.iter().filter(|name| begun(**name)).flat_map(|name| {
            if plan.tuning(*name).is_none() {
                return vec![format!("  [[tune]] {name} has begun, and is left out now")];
            }
            let keys = earlier.iter().flat_map(|earlier| plan.changed_keys_of(earlier, *name));
            let keys: Vec<String> = keys
                .map(|(key, old, new)| {
                    format!("  [[tune]] {name} has begun, and its {key} was {old} and is now {new}")
                })
                .collect();
            if keys.is_empty() {
                vec![format!("  [[tune]] {name} has begun, and what it goes on from is another now")]
            } else {
                keys
            }
        });
        let changes: Vec<String> = keys.chain(stages).collect();
        if changes.is_empty() { Ok(changed) } else { Err(self.plan_changed(changes.join("\n"))) }
    }

    fn plan_changed(&self, changes: String) -> FolderError {
        FolderError::PlanChanged { folder: self.path.clone(), changes }
    }

    fn kept_plan(&self) -> Result<Option<String>, FolderError> {
        let path = self.path.join(paths::PLAN);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(FolderError::Io { path, error }),
        }
    }

    /// Whether the stored plan differs in any key.
    ///
    /// # Errors
    /// When the stored plan cannot be read.
    pub(crate) fn keeps_another(&self, plan: &Plan) -> Result<bool, FolderError> {
        Ok(self.kept_plan()?.is_some_and(|text| text != plan.to_toml()))
    }

    /// Stores the plan where people can see it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn keep_plan(&self, plan: &Plan) -> Result<(), FolderError> {
        self.write(paths::PLAN, &plan.to_toml())
    }

    /// The lock of this process, which no longer holds if its file is deleted.
    pub(crate) fn lock(&self) -> Lock {
        Lock { path: self.path.join(paths::LOCK), file: Arc::clone(&self.lock) }
    }

    /// Where the run is kept, in the form in which workers open it.
    ///
    /// # Errors
    /// When the folder is gone.
    pub(crate) fn location(&self) -> Result<String, FolderError> {
        let Some(directory) = self.store.directory() else { return Ok(self.store.location().to_owned()) };
        let path = fs::canonicalize(directory)
            .map_err(|error| FolderError::Io { path: directory.to_path_buf(), error })?;
        Ok(path.to_string_lossy().into_owned())
    }

    /// Where the run is kept, in the form that people are shown.
    pub(crate) fn shown(&self) -> String {
        match self.store.directory() {
            Some(_) => self.path.display().to_string(),
            None => self.store.to_string(),
        }
    }

    /// The folder of the coordinator's own files.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The store in which the run is kept.
    pub(crate) const fn store(&self) -> &Store {
        &self.store
    }

    /// Writes a small file of the folder atomically and durably.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<(), FolderError> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!("{name}.new"));
        let written = || {
            let mut file = File::create(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.path)?.sync_all()
        };
        written().map_err(|error| FolderError::Io { path: path.clone(), error })
    }

    /// Path of the coordinator's database.
    pub(crate) fn database(&self) -> PathBuf {
        self.path.join(paths::DATABASE)
    }

    /// Makes the coordinator's database accessible to its user alone. Files that `SQLite` later creates beside it get
    /// the same mode.
    ///
    /// # Errors
    /// When the mode cannot be set.
    pub(crate) fn hide_database(&self) -> Result<(), FolderError> {
        for suffix in ["", "-wal", "-shm"] {
            let path = self.path.join(format!("{}{suffix}", paths::DATABASE));
            match fs::set_permissions(&path, fs::Permissions::from_mode(0o600)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(FolderError::Io { path, error });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes the address at which the coordinator listens, for local workers.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn write_address(&self, address: SocketAddr) -> Result<(), FolderError> {
        self.write(paths::ADDRESS, &address.to_string())
    }

    /// Path of the file with that address.
    pub(crate) fn address_file(&self) -> PathBuf {
        self.path.join(paths::ADDRESS)
    }
}
