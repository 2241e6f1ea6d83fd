//! Learns a reward head: which answers are good, as a vector on the last hidden state of the model that is tuned.

use ulmus_backend::{Backend, WeightFormat};
use ulmus_chat::{Item, Pair};
use ulmus_model::{Generator, ModelError};
use ulmus_run::paths::{self, ExampleSet};
use ulmus_run::results;
use ulmus_types::{Digest, Job, JobName, StageName};

use super::examples::tuning_of;
use super::subject;
use crate::WorkerError;
use crate::examples::{Kept, result, stored};
use crate::rso::RewardHead;
use crate::run::Run;

/// One pair of so many is not learned from, to see how good the head is.
const HELD_OUT: usize = 10;

/// Learns the reward head of the tuning stage that a job is for.
pub(super) fn learn<B: Backend>(
    run: &Run,
    job: &Job,
    backend: &B,
    say: &dyn Fn(String),
) -> Result<results::RewardHead, WorkerError> {
    let (tuning, config) = tuning_of(run, job, StageName::reward)?;
    let made_by = JobName::stored(tuning.examples().to_string());
    let sets = [ExampleSet::Data, ExampleSet::Eval, ExampleSet::Reward];
    let [_, _, preferences] = stored(run, tuning, sets, &result(run, &made_by)?, &made_by)?;
    let model = subject::model(run, job, backend, WeightFormat::F32)?;
    let width = model.config().model_dim;
    let mut generator = Generator::with_sequences(model, config.max_length as usize, 2)?;
    let (mut learned, mut held_out) = (Vec::new(), Vec::new());
    for (at, Kept { item, .. }) in preferences.iter().enumerate() {
        let Item::Pair(pair) = item else { continue };
        let set = if at % HELD_OUT == HELD_OUT - 1 { &mut held_out } else { &mut learned };
        set.extend(difference(&mut generator, pair)?);
    }
    let head = RewardHead::learn(&learned, width);
    run.write(&paths::reward_head(tuning), head.to_bytes())?;
    let found = results::RewardHead {
        pairs: (learned.len() / width) as u64,
        accuracy: head.accuracy(&learned).unwrap_or_default(),
        held_out: (held_out.len() / width) as u64,
        held_out_accuracy: head.accuracy(&held_out),
        digest: Digest::of(bytemuck::cast_slice(head.values())),
    };
    let of_others = found.held_out_accuracy.map_or(String::new(), |share| {
        format!(", and in {:.1} % of {} that it did not learn from", 100.0 * share, found.held_out)
    });
    say(format!(
        "{tuning}: the reward head finds the chosen answer better in {:.1} % of {} pairs{of_others}",
        100.0 * found.accuracy,
        found.pairs
    ));
    Ok(found)
}

/// The last hidden state after the better answer of a pair, less that after the other.
fn difference<B: Backend>(generator: &mut Generator<B>, pair: &Pair) -> Result<Vec<f32>, ModelError> {
    generator.reset();
    let mut states = Vec::with_capacity(2);
    for (sequence, answer) in [&pair.chosen, &pair.rejected].into_iter().enumerate() {
        let ids = [&pair.prompt[..], &answer.ids].concat();
        let (last, before) = ids.split_last().expect("an answer has a token");
        if !before.is_empty() {
            generator.feed_to(sequence, before)?;
        }
        generator.feed_each(&[(sequence, *last)])?;
        states.push(generator.states(1));
    }
    Ok(states[0].iter().zip(&states[1]).map(|(chosen, rejected)| chosen - rejected).collect())
}
