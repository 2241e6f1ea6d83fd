//! What a tuning stage learns from, as the jobs that made it have kept it.

use serde::de::DeserializeOwned;
use ulmus_run::paths::{self, ExampleSet};
use ulmus_run::results::Examples;
use ulmus_types::{Digest, JobName, StageName};

use super::{Kept, from_bytes};
use crate::WorkerError;
use crate::run::Run;

/// What to do when something that a stage has made is not there any more.
const ACT: &str = "put back a copy of it, or give the stage another name";

/// The result of a job that is done.
pub(crate) fn result<T: DeserializeOwned>(run: &Run, job: &JobName) -> Result<T, WorkerError> {
    let file = paths::result(job);
    let result = serde_json::from_slice(&run.read_own(&file)?);
    result.map_err(|error| WorkerError::Damaged { file, reason: error.to_string(), act: ACT })
}

/// The name of the job that has made what a tuning stage trains on.
pub(crate) fn made_by(run: &Run, tuning: StageName) -> JobName {
    let stage = run.plan.graph().examples_of(tuning);
    let sampled = run.plan.tuning(tuning).filter(|config| config.rso.is_some());
    sampled.map_or_else(|| JobName::stored(stage.to_string()), |config| config.of.job_name(stage))
}

/// A hash of some sets of examples, as they are written.
pub(crate) fn digest_of(files: &[(ExampleSet, Vec<u8>)]) -> Digest {
    let of = |set: ExampleSet| {
        let file = files.iter().find(|(other, _)| *other == set);
        file.map(|(_, bytes)| Digest::of(bytes))
    };
    let trained = of(ExampleSet::Pairs).or(of(ExampleSet::Data)).unwrap_or(Digest::of(b""));
    let evaluated = of(ExampleSet::Eval).unwrap_or(Digest::of(b""));
    let rewarded = of(ExampleSet::Reward).map_or(String::new(), |digest| format!(" {digest}"));
    Digest::of(format!("{trained} {evaluated}{rewarded}").as_bytes())
}

/// The sets of examples that a job was found to have `made`, in this order.
pub(crate) fn stored<const N: usize>(
    run: &Run,
    tuning: StageName,
    sets: [ExampleSet; N],
    made: &Examples,
    job: &JobName,
) -> Result<[Vec<Kept>; N], WorkerError> {
    let is_there = |set: &ExampleSet| *set != ExampleSet::Eval || made.held_out > 0;
    let read = |set| Ok((set, run.read_own(&paths::examples(tuning, set))?));
    let files: Vec<(ExampleSet, Vec<u8>)> =
        sets.into_iter().filter(is_there).map(read).collect::<Result<_, WorkerError>>()?;
    let damaged = |set, reason| WorkerError::Damaged { file: paths::examples(tuning, set), reason, act: ACT };
    // Nothing is made of files before they are known to be those that were written.
    if digest_of(&files) != made.digest {
        return Err(damaged(sets[0], format!("its hash is not the one in the result of {job}")));
    }
    let mut found = [const { Vec::new() }; N];
    for (set, bytes) in &files {
        let kept = from_bytes(bytes).map_err(|reason| damaged(*set, reason))?;
        if kept.is_empty() {
            return Err(damaged(*set, "it has no examples".to_owned()));
        }
        let at = sets.iter().position(|other| other == set).expect("only these were read");
        found[at] = kept;
    }
    Ok(found)
}
