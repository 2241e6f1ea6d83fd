//! The folder of a run: who may write it, and for which plan.
//!
//! Protects that a run has one coordinator and one plan. The lock is the operating system's, so a killed
//! coordinator leaves none behind.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ulmus_checkpoint::{Store, StoreError};
use ulmus_plan::Plan;
use ulmus_types::ErrorKind;

/// Why a run folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    /// Another coordinator has it.
    #[error(
        "another coordinator is running {0}; stop it, or give this run another name with --set run.name=NAME"
    )]
    Locked(PathBuf),
    /// It holds a run with another plan.
    #[error(
        "{folder} holds a run with another plan:\n{changes}\ngive this run another name with --set run.name=NAME, or delete the folder"
    )]
    PlanChanged {
        /// The folder.
        folder: PathBuf,
        /// The keys that differ, a line each.
        changes: String,
    },
    /// Its plan cannot be read.
    #[error("{0} is damaged: {1}; restore it, or delete the folder")]
    DamagedPlan(PathBuf, String),
    /// Something in it cannot be read or written.
    #[error("{path}: {error}; is the disk full or the folder read-only?")]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The store is not one that this build can use.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl FolderError {
    /// What can be done about it.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Locked(_) => ErrorKind::Refused,
            Self::PlanChanged { .. } => ErrorKind::InvalidInput,
            Self::DamagedPlan(..) => ErrorKind::Corrupt,
            Self::Io { .. } => ErrorKind::Internal,
            Self::Store(error) => error.kind(),
        }
    }
}

/// A run folder that this process holds the lock of.
#[derive(Debug)]
pub(crate) struct RunFolder {
    path: PathBuf,
    store: Store,
    // Held for as long as the value lives.
    _lock: File,
}

impl RunFolder {
    /// Opens the folder of the plan's run, or makes it, and locks it.
    ///
    /// # Errors
    /// When somebody else has it, when it holds another plan's run, or when it cannot be written.
    pub(crate) fn open(plan: &Plan) -> Result<Self, FolderError> {
        let location = format!("{}/{}", plan.store.url.trim_end_matches('/'), plan.run.name);
        let store = Store::create(&location)?;
        let path = store.directory().map_or_else(|| PathBuf::from(&location), Path::to_path_buf);
        let io = |path: &Path, error: io::Error| FolderError::Io { path: path.to_path_buf(), error };
        for folder in ["logs", "results"] {
            let folder = path.join(folder);
            fs::create_dir_all(&folder).map_err(|error| io(&folder, error))?;
        }
        let lock_path = path.join("lock");
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
        let folder = Self { path, store, _lock: lock };
        folder.keep_plan(plan)?;
        Ok(folder)
    }

    fn keep_plan(&self, plan: &Plan) -> Result<(), FolderError> {
        let path = self.path.join("plan.resolved.toml");
        match fs::read_to_string(&path) {
            Ok(text) => {
                let earlier = ulmus_plan::read(&text, &[])
                    .map_err(|problems| FolderError::DamagedPlan(path.clone(), problems.to_string()))?;
                let changes: Vec<String> = earlier
                    .iter()
                    .flat_map(|earlier| plan.changed_keys(earlier))
                    .map(|(key, old, new)| format!("  {key} was {old} and is now {new}"))
                    .collect();
                if !changes.is_empty() {
                    return Err(FolderError::PlanChanged {
                        folder: self.path.clone(),
                        changes: changes.join("\n"),
                    });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(FolderError::Io { path, error }),
        }
        self.write("plan.resolved.toml", &plan.to_toml())
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The handle through which checkpoints are written.
    pub(crate) const fn store(&self) -> &Store {
        &self.store
    }

    /// Writes a small file of the folder whole.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<(), FolderError> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!("{name}.new"));
        fs::write(&temporary, text)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|error| FolderError::Io { path, error })
    }

    /// Tells local workers where the coordinator listens.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn write_address(&self, address: SocketAddr) -> Result<(), FolderError> {
        self.write("coordinator.address", &address.to_string())
    }

    /// The file that tells it.
    pub(crate) fn address_file(&self) -> PathBuf {
        self.path.join("coordinator.address")
    }
}
