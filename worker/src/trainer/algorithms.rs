//! One choice of algorithms for all workers of a run: which of several is the fastest, a device finds out by trying, and they
//! differ in the order in which they sum. The first worker of a kind of device keeps its choice in the run's folder.

use ulmus_backend::TrainingBackend;
use ulmus_checkpoint::StoreError;
use ulmus_run::paths;

use crate::WorkerError;
use crate::run::Run;

/// Does `work`, which needs all products of matrices that the run will need, with the run's algorithms for this kind of
/// device. May do it twice.
pub(super) fn measured<B: TrainingBackend, R>(
    run: &Run,
    backend: &B,
    mut work: impl FnMut() -> Result<R, WorkerError>,
) -> Result<R, WorkerError> {
    let path = paths::algorithms(&backend.describe());
    loop {
        let known = match run.read(&path) {
            Err(StoreError::NotFound { .. }) => None,
            known => Some(String::from_utf8_lossy(&known?).into_owned()),
        };
        let (result, names) = backend.choose_algorithms(known.as_deref(), &mut work).map_err(|error| {
            WorkerError::Plan(format!("{path} of the run is damaged: {error}; delete it"))
        })?;
        let result = result?;
        // Another worker of this kind may have been faster: its choice is the run's.
        let ours = names.filter(|_| known.is_none());
        if ours.map_or(Ok(true), |names| run.write_new(&path, names.into_bytes()))? {
            return Ok(result);
        }
    }
}
