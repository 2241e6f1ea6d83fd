//! What jobs find: the results that workers send, the coordinator keeps, and `results/NAME.json` shows.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use ulmus_types::{CheckpointId, Digest, FileEntry, JobKind};

use crate::{FormatError, paths};

/// What is read, and what of it was prepared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// Text that the run has prepared itself.
    pub prepared: Option<Shards>,
    /// Files of all sources.
    pub files: usize,
    /// Bytes of text, as far as can be told without decoding.
    pub bytes: u64,
    /// Hash of what decides the stream.
    pub manifest: Digest,
    /// Pieces of the tokenizer.
    pub pieces: usize,
    /// Hash of the tokenizer.
    pub tokenizer: Digest,
    /// Whether any document is held out; unknown when none was found in the text that was looked through.
    pub held_out: Option<bool>,
}

/// Text that was prepared from files of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shards {
    /// Shards.
    pub shards: usize,
    /// Documents in them.
    pub documents: usize,
    /// Bytes of text.
    pub bytes: u64,
    /// Hash of all shards in order.
    pub digest: Digest,
    /// Files and folders that were found, whether or not they were taken.
    pub found: usize,
    /// Files that were taken.
    pub taken: usize,
    /// Why the others were not taken.
    pub passed_by: Vec<PassedBy>,
    /// All of it in lines for people.
    pub summary: String,
}

/// What was passed by for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedBy {
    /// Why.
    pub reason: String,
    /// How many.
    pub count: usize,
    /// Name of the first.
    pub first: String,
}

/// The mean of some checkpoints' weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Average {
    /// What it is the mean of.
    pub checkpoints: Vec<CheckpointId>,
    /// The file that holds it, [`paths::WEIGHTS`].
    pub files: BTreeMap<String, FileEntry>,
    /// Hash of its weights.
    pub weights: Digest,
}

/// What is measured on held-out text, or why it was not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Measured<T> {
    /// It was not done.
    Skipped {
        /// Why not.
        skipped: String,
    },
    /// It was done.
    Done {
        /// What was found.
        #[serde(flatten)]
        result: T,
        /// What had to be left out of the text, and why.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        left_out: Vec<String>,
    },
}

impl<T> Measured<T> {
    /// What was found.
    pub fn result(&self) -> Option<&T> {
        match self {
            Self::Skipped { .. } => None,
            Self::Done { result, .. } => Some(result),
        }
    }

    /// Why nothing was found.
    pub fn skipped(&self) -> Option<&str> {
        match self {
            Self::Skipped { skipped } => Some(skipped),
            Self::Done { .. } => None,
        }
    }

    /// What had to be left out, and why.
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
    /// Texts that were scored; empty ones are passed over.
    pub documents: u64,
    /// Their length in UTF-8.
    pub bytes: u64,
    /// Tokens that were predicted, the EOS of every document included.
    pub tokens: u64,
    /// Most tokens of context that a prediction had.
    pub context: usize,
    /// Sum of the negative log-likelihoods of all tokens, in nats.
    pub nll: f64,
    /// Mean of them.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Bits that the model would need per byte of text: `nll / bytes / ln 2`.
    pub bits_per_byte: f64,
    /// What `zstd -19` needs for the same texts in one stream, as a yardstick.
    pub zstd_bits_per_byte: f64,
}

/// What the model wrote at several points of its training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continuations {
    /// The held-out text before it.
    pub prompt: String,
    /// In the order of the checkpoints.
    pub continuations: Vec<Continuation>,
}

/// What the model wrote at one point of its training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continuation {
    /// The model.
    pub checkpoint: CheckpointId,
    /// What it wrote.
    pub text: String,
}

/// The average in Hugging Face layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// Where it is, in the run folder.
    pub folder: String,
    /// Its files.
    pub files: BTreeMap<String, FileEntry>,
}

/// How fast the average is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Benchmark {
    /// Prompt tokens per second, while a prompt is processed.
    pub prompt_tokens_per_second: f64,
    /// New tokens per second, after the first.
    pub generate_tokens_per_second: f64,
    /// As `evaluator bench --json` shows it.
    pub details: Value,
}

/// The results of a run's jobs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Results(BTreeMap<JobKind, Value>);

impl Results {
    /// Those of jobs that were [`check`]ed when they were kept.
    pub fn new(results: BTreeMap<JobKind, Value>) -> Self {
        Self(results)
    }

    /// What the average is of, and where.
    pub fn averaged(&self) -> Option<Average> {
        self.of(JobKind::Average)
    }

    /// What was exported.
    pub fn exported(&self) -> Option<Exported> {
        self.of(JobKind::Export)
    }

    /// How well the average predicts held-out text.
    pub fn average(&self) -> Option<Measured<Perplexity>> {
        self.of(JobKind::EvaluateAverage)
    }

    /// How well the model at the end of training predicts held-out text.
    pub fn last(&self) -> Option<Measured<Perplexity>> {
        self.of(JobKind::EvaluateLast)
    }

    /// What the model wrote.
    pub fn continuations(&self) -> Option<Measured<Continuations>> {
        self.of(JobKind::Continuations)
    }

    /// How fast the average is.
    pub fn benchmark(&self) -> Option<Benchmark> {
        self.of(JobKind::Benchmark)
    }

    fn of<T: DeserializeOwned>(&self, kind: JobKind) -> Option<T> {
        T::deserialize(self.0.get(&kind)?).ok()
    }
}

/// Makes sure that a text is the result of such a job.
///
/// # Errors
/// Says what it lacks.
pub fn check(kind: JobKind, result: &str) -> Result<(), FormatError> {
    fn is<T: DeserializeOwned>(text: &str) -> Result<(), serde_json::Error> {
        serde_json::from_str::<T>(text).map(drop)
    }
    let checked = match kind {
        JobKind::Prepare => is::<Prepared>(result),
        JobKind::Average => is::<Average>(result),
        JobKind::EvaluateAverage | JobKind::EvaluateLast => is::<Measured<Perplexity>>(result),
        JobKind::Continuations => is::<Measured<Continuations>>(result),
        JobKind::Export => is::<Exported>(result),
        JobKind::Benchmark => is::<Benchmark>(result),
    };
    checked.map_err(|error| FormatError::new(paths::result(kind), &error))
}

/// The contents of a file of results: fields in the order of the alphabet, one per line.
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
        assert!(check(JobKind::EvaluateAverage, skipped).is_ok());
        let error = check(JobKind::Benchmark, skipped).unwrap_err().to_string();
        assert!(
            error.starts_with("results/benchmark.json cannot be read") && error.contains("prompt_"),
            "{error}"
        );
        assert!(check(JobKind::EvaluateAverage, r#"{"loss": 1.0}"#).is_err());
        assert!(check(JobKind::Export, "[]").is_err());
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
