//! Why a worker cannot do what it was asked to.

use ulmus_backend::BackendError;
use ulmus_checkpoint::{CheckpointError, StoreError};
use ulmus_dataloader::DataError;
use ulmus_evaluator::EvaluatorError;
use ulmus_model::ModelError;
use ulmus_process::with_causes;
use ulmus_tokenizer::TokenizerError;
use ulmus_types::{BadUnit, CheckpointId, ErrorKind, LeaveReason};

use crate::collective::CollectiveError;

/// An error of a worker, of whatever part.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Of the data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Of the device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Of the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Of the tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Of an evaluation.
    #[error(transparent)]
    Evaluation(#[from] EvaluatorError),
    /// Of a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Of the run's folder.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Of the group.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A file of this machine.
    #[error("{path}: {error}; correct the plan or the file")]
    File {
        /// Its path.
        path: String,
        /// What the system says.
        error: std::io::Error,
    },
    /// Parts of the plan that do not fit each other, found when they were opened.
    #[error("{0}")]
    Plan(String),
    /// A file of the run's folder is not what was written there.
    #[error("{file} is damaged: {reason}; {act}")]
    Damaged {
        /// Its path in the run's folder.
        file: String,
        /// How it differs.
        reason: String,
        /// What to do.
        act: &'static str,
    },
    /// A loss that is not finite.
    #[error("{0}")]
    Diverged(String),
    /// There were checkpoints, and none is left that holds.
    #[error(
        "no checkpoint of this run holds in {store} ({faults}); restore one, or start the coordinator with --from-start to begin anew"
    )]
    NoCheckpoint {
        /// Where they should be.
        store: String,
        /// What is wrong with those that are there.
        faults: String,
    },
    /// Checkpoints of another plan lie in the run's folder.
    #[error(
        "the checkpoints in {0} belong to another plan; give this run another name, or delete the folder"
    )]
    OtherPlan(String),
}

impl From<WorkerError> for LeaveReason {
    /// Why a worker leaves its group over an error.
    fn from(error: WorkerError) -> Self {
        let message = with_causes(&error);
        if let Some(unit) = error.bad_unit() {
            return Self::BadUnit(unit, message);
        }
        match error {
            WorkerError::Collective(error) if error.kind() != ErrorKind::InvalidInput => {
                Self::Lost { suspect: error.blames(), message }
            }
            // A store that does not answer may do so when the group forms again.
            WorkerError::Data(DataError::Store { .. }) => Self::Lost { suspect: None, message },
            WorkerError::Store(_) | WorkerError::Checkpoint(_) if error.kind() == ErrorKind::Retry => {
                Self::Lost { suspect: None, message }
            }
            error => Self::Failed { kind: error.kind(), message },
        }
    }
}

impl WorkerError {
    /// The unit whose fault it is, if it is one's.
    pub(crate) fn bad_unit(&self) -> Option<BadUnit> {
        match self {
            Self::Data(DataError::BadUnit { name, unit, .. }) => {
                Some(BadUnit { source: name.clone(), unit: *unit as u64 })
            }
            _ => None,
        }
    }

    /// The checkpoint that is damaged, if that is the reason.
    pub(crate) fn damaged_checkpoint(&self) -> Option<CheckpointId> {
        match self {
            Self::Checkpoint(error) => error.damaged(),
            _ => None,
        }
    }

    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Data(error) => error.kind(),
            Self::Backend(error) => error.kind(),
            Self::Model(error) => error.kind(),
            Self::Tokenizer(error) => error.kind(),
            Self::Evaluation(error) => error.kind(),
            Self::Checkpoint(error) => error.kind(),
            Self::Store(error) => error.kind(),
            Self::Collective(error) => error.kind(),
            Self::NoCheckpoint { .. } | Self::Damaged { .. } => ErrorKind::Corrupt,
            Self::Diverged(_) => ErrorKind::Internal,
            Self::File { .. } | Self::Plan(_) | Self::OtherPlan(_) => ErrorKind::InvalidInput,
        }
    }
}
