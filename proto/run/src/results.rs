//! Results of jobs: workers send them, the coordinator keeps them, and `results/NAME.json` shows them.

use std::collections::{BTreeMap, BTreeSet};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use ulmus_types::{CheckpointId, Digest, FileEntry, JobName, StageKind, StageName};

use crate::{FormatError, paths};

/// The data that a run reads, and what of it was prepared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// Text that the run itself has prepared, if any.
    pub prepared: Option<Shards>,
    /// Number of files of all sources.
    pub files: usize,
    /// Bytes of text, as far as known without decoding.
    pub bytes: u64,
    /// Hash of everything that determines the data stream.
    pub manifest: Digest,
    /// Number of pieces of the tokenizer.
    pub pieces: usize,
    /// Hash of the tokenizer.
    pub tokenizer: Digest,
    /// Hash of the weights of the base, if the run begins from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Digest>,
    /// Whether any document is held out; `None` if the part of the text that was searched has none.
    pub held_out: Option<bool>,
}

/// The examples of a tuning stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Examples {
    /// Number of rows in the files, or of pairs of sampled answers.
    pub rows: u64,
    /// Number of them that are trained on.
    pub kept: u64,
    /// Why the others are not.
    pub dropped: Vec<Dropped>,
    /// Number of updates that these give; 0 for prompts, of which it is not known yet what answers they get.
    pub updates: u64,
    /// Number of rows that are evaluated on.
    pub held_out: u64,
    /// The files that were read.
    pub files: Vec<RowsOf>,
    /// Hash of the examples.
    pub digest: Digest,
    /// Hashes of the weights from elsewhere with which the stage begins, by the keys of its plan that name them.
    #[serde(default)]
    pub elsewhere: BTreeMap<String, Digest>,
}

/// A file of rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowsOf {
    /// The file.
    pub file: String,
    /// BLAKE3 of its bytes.
    pub hash: String,
    /// Number of its rows.
    pub rows: u64,
    /// What its columns were recognised as.
    pub form: String,
}

/// Rows that are not trained on for the same reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// The reason.
    pub reason: String,
    /// Number of the rows.
    pub rows: u64,
    /// The file of the first one.
    pub file: String,
    /// Number of the first one in its file, from 0.
    pub row: u64,
}

/// A reward head: how good an answer is, as a vector on the last hidden state of prompt and answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RewardHead {
    /// Number of pairs that it learned from.
    pub pairs: u64,
    /// Share of them whose better answer it finds better.
    pub accuracy: f64,
    /// Number of pairs that it did not learn from.
    pub held_out: u64,
    /// Share of them whose better answer it finds better, if there are any.
    pub held_out_accuracy: Option<f64>,
    /// Hash of the vector.
    pub digest: Digest,
}

/// Sampled answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidates {
    /// Number of prompts.
    pub prompts: u64,
    /// Number of answers, of which no prompt has two equal ones.
    pub answers: u64,
    /// Hash of the answers.
    pub digest: Digest,
}

/// The log-probabilities of answers before tuning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// Number of examples whose answers were scored.
    pub examples: u64,
    /// The folder of the log-probabilities, relative to the run folder.
    pub folder: String,
    /// Hash of the log-probabilities.
    pub digest: Digest,
}

/// Text that was prepared from local files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shards {
    /// Number of shards.
    pub shards: usize,
    /// Number of documents in the shards.
    pub documents: usize,
    /// Bytes of text.
    pub bytes: u64,
    /// Hash of all shards in order.
    pub digest: Digest,
    /// Number of files and folders found, whether or not they were used.
    pub found: usize,
    /// Number of files that were used.
    pub taken: usize,
    /// Why the others were not used.
    pub passed_by: Vec<PassedBy>,
    /// A summary of all this in lines for a person.
    pub summary: String,
}

/// Files that were skipped for the same reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedBy {
    /// Why they were skipped.
    pub reason: String,
    /// Number of files.
    pub count: usize,
    /// Name of the first one.
    pub first: String,
}

/// The mean of some checkpoints' weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Average {
    /// The averaged checkpoints.
    pub checkpoints: Vec<CheckpointId>,
    /// The file that holds the average, [`paths::WEIGHTS`].
    pub files: BTreeMap<String, FileEntry>,
    /// Hash of the averaged weights.
    pub weights: Digest,
}

/// Why the job of a result had nothing to do, if that is so.
pub fn why_skipped(result: &str) -> Option<String> {
    match serde_json::from_str::<Measured<Value>>(result).ok()? {
        Measured::Skipped { skipped } => Some(skipped),
        Measured::Done { .. } => None,
    }
}

/// A measurement on held-out text, or why there is none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Measured<T> {
    /// Nothing was measured.
    Skipped {
        /// Why not.
        skipped: String,
    },
    /// The measurement was done.
    Done {
        /// The result.
        #[serde(flatten)]
        result: T,
        /// Which units of the text had to be skipped, and why.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        left_out: Vec<String>,
    },
}

impl<T> Measured<T> {
    /// The result, if there is one.
    pub fn result(&self) -> Option<&T> {
        match self {
            Self::Skipped { .. } => None,
            Self::Done { result, .. } => Some(result),
        }
    }

    /// Why nothing was measured, if nothing was.
    pub fn skipped(&self) -> Option<&str> {
        match self {
            Self::Skipped { skipped } => Some(skipped),
            Self::Done { .. } => None,
        }
    }

    /// Which units had to be skipped, and why.
    pub fn left_out(&self) -> &[String] {
        match self {
            Self::Skipped { .. } => &[],
            Self::Done { left_out, .. } => left_out,
        }
    }
}

/// How well a model predicts some texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// Number of scored texts, without empty ones.
    pub documents: u64,
    /// Bytes of these texts in UTF-8.
    pub bytes: u64,
    /// Number of predicted tokens, including the EOS of every document.
    pub tokens: u64,
    /// Maximum number of context tokens of a prediction.
    pub context: usize,
    /// Sum of the negative log-likelihoods of all tokens, in nats.
    pub nll: f64,
    /// Mean negative log-likelihood per token, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Bits per byte of text with the model as a compressor: `nll / bytes / ln 2`.
    pub bits_per_byte: f64,
    /// Bits per byte of the same texts as one `zstd -19` stream, for comparison.
    pub zstd_bits_per_byte: f64,
}

/// Continuations of one prompt at several points of training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continuations {
    /// The held-out text that is continued.
    pub prompt: String,
    /// One continuation per checkpoint, in the order of the checkpoints.
    pub continuations: Vec<Continuation>,
}

/// A continuation at one point of training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continuation {
    /// The checkpoint of the model.
    pub checkpoint: CheckpointId,
    /// The text that the model generated.
    pub text: String,
}

/// The average in Hugging Face layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// Its folder, relative to the run folder.
    pub folder: String,
    /// The files in that folder.
    pub files: BTreeMap<String, FileEntry>,
}

/// The speed of the average.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Benchmark {
    /// Prompt tokens processed per second.
    pub prompt_tokens_per_second: f64,
    /// Tokens generated per second, after the first.
    pub generate_tokens_per_second: f64,
    /// The output of `evaluator bench --json`.
    pub details: Value,
}

/// What a part of an evaluation has answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    /// Number of requests; what was answered is in the part's file.
    pub answers: u64,
}

/// What a model was found to be on tasks: the file that `evaluator run --output` writes, in the layout of
/// lm-evaluation-harness.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tasks {
    /// The metrics of each task and group, by names such as `acc,none` and `acc_stderr,none`.
    pub results: BTreeMap<String, BTreeMap<String, Value>>,
    /// The average of a suite, from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average: Option<f64>,
    /// Everything else in the file.
    #[serde(flatten)]
    pub details: BTreeMap<String, Value>,
}

/// The results of a run's jobs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Results(BTreeMap<JobName, Value>);

impl Results {
    /// Wraps results that were [`check`]ed when they were stored.
    pub fn new(results: BTreeMap<JobName, Value>) -> Self {
        Self(results)
    }

    /// What a tuning stage trains on: pairs of sampled answers, or the examples of its data.
    pub fn examples(&self, tuning: StageName) -> Option<Examples> {
        let pairs = self.of_models(&tuning.selection()).pop().map(|(_, pairs)| pairs);
        pairs.or_else(|| self.of(tuning.examples().as_str()))
    }

    /// The number of updates of each tuning stage for which that is known.
    pub fn updates(&self) -> Vec<(StageName, u64)> {
        let tunings = self.0.keys().filter_map(|name| name.as_str().strip_suffix("-examples")?.parse().ok());
        let updates = tunings.filter_map(|tuning| Some((tuning, self.examples(tuning)?.updates)));
        updates.filter(|(_, updates)| *updates > 0).collect()
    }

    /// The average.
    pub fn averaged(&self) -> Option<Average> {
        self.of(StageName::AVERAGE)
    }

    /// The exported model.
    pub fn exported(&self) -> Option<Exported> {
        self.of(StageName::EXPORT)
    }

    /// The perplexity of the average on held-out text.
    pub fn average(&self) -> Option<Measured<Perplexity>> {
        self.of(StageName::EVALUATE_AVERAGE)
    }

    /// The perplexity of the model at the end of training on held-out text.
    pub fn last(&self) -> Option<Measured<Perplexity>> {
        self.of(StageName::EVALUATE_LAST)
    }

    /// The continuations of held-out text.
    pub fn continuations(&self) -> Option<Measured<Continuations>> {
        self.of(StageName::CONTINUATIONS)
    }

    /// The speed of the average.
    pub fn benchmark(&self) -> Option<Benchmark> {
        self.of(StageName::BENCHMARK)
    }

    /// The results of a stage that has a job for each model, by the names of the models. Those of another form are left out.
    pub fn of_models<T: DeserializeOwned>(&self, stage: &StageName) -> Vec<(&str, T)> {
        let of_stage = self.0.iter().filter(|(name, _)| name.stage() == stage.as_str());
        of_stage.filter_map(|(name, result)| Some((name.model()?, T::deserialize(result).ok()?))).collect()
    }

    /// The stages that have a job for each model.
    pub fn stages(&self) -> BTreeSet<StageName> {
        let of_models = self.0.keys().filter(|name| name.model().is_some());
        of_models.filter_map(|name| name.stage().parse().ok()).collect()
    }

    fn of<T: DeserializeOwned>(&self, stage: &str) -> Option<T> {
        let (_, result) = self.0.iter().find(|(name, _)| name.as_str() == stage)?;
        T::deserialize(result).ok()
    }
}

/// The result of a job that was not done, as JSON.
pub fn skipped(why: &str) -> String {
    let skipped = Measured::<Value>::Skipped { skipped: why.to_owned() };
    serde_json::to_string(&skipped).expect("text has a JSON form")
}

/// Checks that a text is a result of this kind of job.
///
/// # Errors
/// When the text has another format; the reason says how it differs.
pub fn check(name: &JobName, kind: StageKind, result: &str) -> Result<(), FormatError> {
    fn is<T: DeserializeOwned>(text: &str) -> Result<(), serde_json::Error> {
        serde_json::from_str::<T>(text).map(drop)
    }
    let checked = match kind {
        StageKind::Prepare => is::<Prepared>(result),
        StageKind::Examples | StageKind::Selection => is::<Examples>(result),
        StageKind::Reward => is::<RewardHead>(result),
        StageKind::Candidates => is::<Candidates>(result),
        StageKind::Reference => is::<Reference>(result),
        // Groups do these.
        StageKind::Train | StageKind::Tune => {
            return Err(FormatError::new(paths::result(name), &"no job does it"));
        }
        StageKind::Average => is::<Average>(result),
        StageKind::Perplexity => is::<Measured<Perplexity>>(result),
        StageKind::Continuations => is::<Measured<Continuations>>(result),
        StageKind::Export => is::<Exported>(result),
        // A part has three names in a row.
        StageKind::Evaluation if name.as_str().split('/').count() == 3 => is::<Answers>(result),
        StageKind::Evaluation => is::<Measured<Tasks>>(result),
        StageKind::Benchmark => is::<Benchmark>(result),
    };
    checked.map_err(|error| FormatError::new(paths::result(name), &error))
}

/// The content of a result file: fields in alphabetical order, one per line.
pub fn to_json(result: &impl Serialize) -> Vec<u8> {
    let value = serde_json::to_value(result).expect("results have text keys");
    format!("{value:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_result_is_one_of_its_job() {
        let skipped = r#"{"skipped": "no text"}"#;
        let check = |name: &str, kind, result| super::check(&JobName::stored(name.to_owned()), kind, result);
        assert!(check("evaluate-average", StageKind::Perplexity, skipped).is_ok());
        let error = check("benchmark", StageKind::Benchmark, skipped).unwrap_err().to_string();
        assert!(
            error.starts_with("results/benchmark.json cannot be read") && error.contains("prompt_"),
            "{error}"
        );
        assert!(check("evaluate-average", StageKind::Perplexity, r#"{"loss": 1.0}"#).is_err());
        assert!(check("export", StageKind::Export, "[]").is_err());
        assert!(
            check("tasks/last", StageKind::Evaluation, r#"{"results": {"a": {"acc,none": 1}}, "n": 2}"#)
                .is_ok()
        );
    }

    #[test]
    fn what_was_left_out_is_beside_what_was_found() {
        let found = json!({
            "documents": 1, "bytes": 2, "tokens": 3, "context": 4, "nll": 5.0, "loss": 6.0, "perplexity": 7.0,
            "bits_per_byte": 8.0, "zstd_bits_per_byte": 9.0, "left_out": ["unit 3"],
        });
        let read: Measured<Perplexity> = serde_json::from_value(found.clone()).unwrap();
        let Measured::Done { result, left_out } = &read else { panic!("{read:?}") };
        assert_eq!((result.loss, &left_out[..]), (6.0, &["unit 3".to_owned()][..]));
        assert_eq!(serde_json::to_value(&read).unwrap(), found);
    }
}
