//! One choice of algorithms for all workers of a run. Algorithms differ in the order in which they sum, and which is
//! fastest can only be measured; so the first worker with a kind of device stores its choice in the run's folder for
//! all others.

use ulmus_backend::TrainingBackend;
use ulmus_checkpoint::StoreError;
use ulmus_run::paths;

use crate::WorkerError;
use crate::run::Run;

/// Does `work` with the run's algorithms for this kind of device, possibly twice. `work` must need all matrix products
/// that the run will need.
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
        // If another worker was faster, its choice is the run's.
        let ours = names.filter(|_| known.is_none());
        if ours.map_or(Ok(true), |names| run.write_new(&path, names.into_bytes()))? {
            return Ok(result);
        }
    }
}
