//! Errors of a worker.

use ulmus_backend::BackendError;
use ulmus_checkpoint::{CheckpointError, StoreError};
use ulmus_dataloader::DataError;
use ulmus_evaluator::EvaluatorError;
use ulmus_model::ModelError;
use ulmus_process::with_causes;
use ulmus_tokenizer::TokenizerError;
use ulmus_types::{BadUnit, CheckpointId, ErrorKind, LeaveReason};

use crate::collective::CollectiveError;

/// An error in any part of a worker.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// An error of the data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// An error of the device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An error of the tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// An error of an evaluation.
    #[error(transparent)]
    Evaluation(#[from] EvaluatorError),
    /// An error of a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An error of the run folder.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An error of the group.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A file of this machine cannot be read.
    #[error("{path}: {error}; correct the plan or the file")]
    File {
        /// Path of the file.
        path: String,
        /// The error of the operating system.
        error: std::io::Error,
    },
    /// Settings of the plan do not fit what was found when the data, the tokenizer or the run was opened.
    #[error("{0}")]
    Plan(String),
    /// A file of the run folder is not as it was written.
    #[error("{file} is damaged: {reason}; {act}")]
    Damaged {
        /// Path of the file in the run folder.
        file: String,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        act: &'static str,
    },
    /// The loss is not finite.
    #[error("{0}")]
    Diverged(String),
    /// There were checkpoints, and none of them is intact.
    #[error(
        "no checkpoint in {store} is intact ({faults}); restore one, or start the coordinator with --from-start to start over"
    )]
    NoCheckpoint {
        /// The folder in which they should be.
        store: String,
        /// What is wrong with each.
        faults: String,
    },
    /// The run folder contains checkpoints of another plan.
    #[error(
        "the checkpoints in {0} belong to another plan; give this run another name, or delete the folder"
    )]
    OtherPlan(String),
}

impl From<WorkerError> for LeaveReason {
    /// The reason with which a worker leaves its group after an error.
    fn from(error: WorkerError) -> Self {
        let message = with_causes(&error);
        if let Some(unit) = error.bad_unit() {
            return Self::BadUnit(unit, message);
        }
        match error {
            WorkerError::Collective(error) if error.kind() != ErrorKind::InvalidInput => {
                Self::Lost { suspect: error.blames(), message }
            }
            // A store that does not answer may answer by the time the group is formed again.
            WorkerError::Data(_) | WorkerError::Store(_) | WorkerError::Checkpoint(_)
                if error.kind() == ErrorKind::Retry =>
            {
                Self::Lost { suspect: None, message }
            }
            error => Self::Failed { kind: error.kind(), message },
        }
    }
}

impl WorkerError {
    /// The unit that caused the error, if one did.
    pub(crate) fn bad_unit(&self) -> Option<BadUnit> {
        match self {
            Self::Data(DataError::BadUnit { name, unit, .. }) => {
                Some(BadUnit { source: name.clone(), unit: *unit as u64 })
            }
            _ => None,
        }
    }

    /// The damaged checkpoint that caused the error, if one did.
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
