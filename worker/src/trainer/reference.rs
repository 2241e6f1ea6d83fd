//! The log-probabilities of answers before tuning: computed once, by the forward pass that also trains, so that no answer is
//! more or less likely than itself before the first update.
//!
//! They are kept under a hash of everything that they follow from, and are used again as long as that is the same. Workers may
//! share the work: each part is a file, and what no part has is computed by whoever puts them together.

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use ulmus_backend::TrainingBackend;
use ulmus_chat::Item;
use ulmus_checkpoint::StoreError;
use ulmus_model::Replica;
use ulmus_plan::Method;
use ulmus_run::paths;
use ulmus_run::results;
use ulmus_types::{Digest, Job, Of, Part, StageName};

use super::feed::examples;
use super::recipe::{Recipe, Tuning};
use crate::WorkerError;
use crate::examples::{Kept, Reference, micro_batch, result};
use crate::run::Run;

/// The file of all log-probabilities, in the folder of their key.
const ALL: &str = "all.safetensors";
/// The only tensor of a file: `[examples, 2]`, float64, in nats.
const TENSOR: &str = "log_probabilities";
/// The hash of its values, in the metadata of the file.
const DIGEST: &str = "digest";

/// A hash of everything on which the log-probabilities of a stage depend; `origin` is that of the weights with which it begins.
fn key(recipe: &Recipe, tuning: &Tuning, origin: Digest) -> Digest {
    let model = serde_json::to_string(recipe.model()).expect("a shape has text keys");
    let precision = recipe.precision().name();
    let examples = tuning.examples.digest;
    // On some devices the bits of a sequence depend on how many go through the model with it.
    let micro_batch = tuning.config.micro_batch;
    let text =
        format!("ulmus reference, form 2\n{origin}\n{model}\n{examples}\n{precision}\n{micro_batch}\n");
    Digest::of(text.as_bytes())
}

/// Computes what a job is asked for. Returns its result as JSON. `replica` is the stage's, in its initial state, whose weights have
/// the hash `origin`.
pub(super) fn compute<B: TrainingBackend>(
    run: &Run,
    recipe: &Recipe,
    replica: &mut Replica<B>,
    origin: Digest,
    job: &Job,
    mut progress: impl FnMut(),
) -> Result<String, WorkerError> {
    let Some(tuning) = recipe.tuning() else {
        return Err(WorkerError::Plan(format!("{} compares with nothing", recipe.training())));
    };
    let folder = paths::references(recipe.training(), key(recipe, tuning, origin));
    let [trained, evaluated] = examples(run, recipe.training(), tuning)?;
    let all: Vec<&Kept> = trained.iter().chain(&evaluated).collect();
    let per_batch = tuning.config.micro_batch as usize;
    let mut scores = |range: std::ops::Range<usize>| -> Result<Vec<Reference>, WorkerError> {
        let mut found = Vec::with_capacity(range.len());
        for kept in all[range].chunks(per_batch) {
            progress();
            let items: Vec<&Item> = kept.iter().map(|kept| &kept.item).collect();
            let scores = replica.score(&micro_batch(&items, None, 0, None))?;
            let (pairs, _) = scores.as_chunks::<2>();
            found.extend(pairs.iter().map(|pair| pair.map(|score| score.log_probability)));
        }
        Ok(found)
    };
    let whole = format!("{folder}/{ALL}");
    let known = load(run, &whole)?.filter(|values| values.len() == all.len());
    let values = match (known, job.part()) {
        (Some(values), _) => values,
        (None, Some(part)) => {
            let path = part_file(&folder, part);
            let range = part.share(all.len());
            let values = match load(run, &path)?.filter(|values| values.len() == range.len()) {
                Some(values) => values,
                None => scores(range)?,
            };
            run.write(&path, encode(&values))?;
            values
        }
        (None, None) => {
            let parts = run.wait(run.store.list(&folder))?;
            // Only those of one division fit together.
            let of = parts.iter().filter_map(|file| divided(&file.path)).max().unwrap_or(1);
            let mut values = Vec::with_capacity(all.len());
            for part in (0..of).filter_map(|index| Part::new(index, of)) {
                let range = part.share(all.len());
                let stored = load(run, &part_file(&folder, part))?;
                values.extend(match stored.filter(|values| values.len() == range.len()) {
                    Some(values) => values,
                    None => scores(range)?,
                });
            }
            run.write(&whole, encode(&values))?;
            values
        }
    };
    let result = results::Reference {
        examples: values.len() as u64,
        folder,
        digest: Digest::of(bytemuck::cast_slice(&values)),
    };
    run.write(&paths::result(&job.name()), results::to_json(&result))?;
    Ok(serde_json::to_string(&result).expect("results have text keys"))
}

/// The log-probabilities of a stage's examples, of which so many are trained and evaluated on.
pub(super) fn read(
    run: &Run,
    recipe: &Recipe,
    of: &Of,
    trained: usize,
    evaluated: usize,
) -> Result<[Vec<Reference>; 2], WorkerError> {
    let training = recipe.training();
    let job = of.job_name(training.reference());
    let results::Reference { folder, digest, .. } = result(run, &job)?;
    let path = format!("{folder}/{ALL}");
    let is_it = |values: &Vec<Reference>| {
        values.len() == trained + evaluated && Digest::of(bytemuck::cast_slice(values)) == digest
    };
    let Some(mut values) = load(run, &path)?.filter(is_it) else { return Err(damaged(training, &path)) };
    let of_evaluated = values.split_off(trained);
    Ok([values, of_evaluated])
}

/// Refuses to begin with other weights than those that the stage's log-probabilities are from.
pub(super) fn must_be_of(run: &Run, recipe: &Recipe, origin: Digest) -> Result<(), WorkerError> {
    let Some(tuning) = recipe.tuning().filter(|tuning| tuning.config.method == Method::Dpo) else {
        return Ok(());
    };
    let training = recipe.training();
    let job = tuning.config.of.job_name(training.reference());
    let results::Reference { folder, .. } = result(run, &job)?;
    // The name of the folder says what they follow from.
    if folder == paths::references(training, key(recipe, tuning, origin)) {
        return Ok(());
    }
    Err(WorkerError::Plan(format!(
        "tune {training}: the weights that it begins with are not those of which {job} has the log-probabilities; put those back, or give the stage another name"
    )))
}

fn damaged(training: StageName, path: &str) -> WorkerError {
    WorkerError::Damaged {
        file: path.to_owned(),
        reason: format!("it is not there, or not what {} has written", training.reference()),
        act: "put back a copy of it, or give the stage another name",
    }
}

fn part_file(folder: &str, part: Part) -> String {
    format!("{folder}/{part}.safetensors")
}

/// The number of parts of which a file has one, by its name.
fn divided(path: &str) -> Option<u32> {
    path.rsplit_once("-of-")?.1.strip_suffix(".safetensors")?.parse().ok()
}

fn encode(values: &[Reference]) -> Vec<u8> {
    let view = TensorView::new(Dtype::F64, vec![values.len(), 2], bytemuck::cast_slice(values))
        .expect("the shape is that of the values");
    let digest = Digest::of(bytemuck::cast_slice(values)).to_string();
    let metadata = [(DIGEST.to_owned(), digest)].into();
    safetensors::serialize([(TENSOR, view)], Some(metadata)).expect("one tensor has a name of its own")
}

/// The log-probabilities in a file, if it is there and whole. One that is damaged is told, and as good as not there.
fn load(run: &Run, path: &str) -> Result<Option<Vec<Reference>>, WorkerError> {
    let bytes = match run.read(path) {
        Err(StoreError::NotFound { .. }) => return Ok(None),
        bytes => bytes?,
    };
    let values = decode(&bytes);
    if values.is_none() {
        tracing::warn!("{path} is damaged; what it held is computed again");
    }
    Ok(values)
}

/// Reads what [`encode`] wrote, if it is whole.
fn decode(bytes: &[u8]) -> Option<Vec<Reference>> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).ok()?;
    let digest = metadata.metadata().as_ref()?.get(DIGEST)?.clone();
    let tensors = SafeTensors::deserialize(bytes).ok()?;
    let tensor = tensors.tensor(TENSOR).ok().filter(|tensor| tensor.dtype() == Dtype::F64)?;
    let (numbers, _) = tensor.data().as_chunks::<8>();
    let numbers: Vec<f64> = numbers.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
    let (pairs, rest) = numbers.as_chunks::<2>();
    let is_whole = rest.is_empty()
        && numbers.iter().all(|number| number.is_finite())
        && Digest::of(bytemuck::cast_slice(pairs)).to_string() == digest;
    is_whole.then(|| pairs.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_one_wrong_bit_or_cut_off_anywhere_is_not_believed() {
        let values = [[-1.5, -2.25], [-0.5, -1e3], [0.0, -7.0]];
        let bytes = encode(&values);
        assert_eq!(decode(&bytes).as_deref(), Some(&values[..]));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_none_or(|found| found == values), "bit {bit}");
        }
        for end in 0..bytes.len() {
            assert_eq!(decode(&bytes[..end]), None, "{end} bytes");
        }
    }
}
