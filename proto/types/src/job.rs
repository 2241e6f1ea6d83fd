//! Jobs: work that one worker does alone before or after training, and how a run's jobs depend on each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{CheckpointId, counted};

/// A piece of work for one worker. Doing it twice, on any worker, gives the same files.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "Record", try_from = "Record")]
pub struct Job {
    kind: JobKind,
    checkpoints: Vec<CheckpointId>,
}

impl Job {
    /// Builds a job of this kind that reads these checkpoints, oldest first.
    ///
    /// # Errors
    /// When a job of this kind cannot read that number of checkpoints.
    pub fn new(kind: JobKind, checkpoints: Vec<CheckpointId>) -> Result<Self, WrongInputs> {
        if kind.spec().checkpoints.allows(checkpoints.len()) {
            Ok(Self { kind, checkpoints })
        } else {
            Err(WrongInputs { kind, checkpoints: checkpoints.len() })
        }
    }

    /// The kind of the job.
    pub const fn kind(&self) -> JobKind {
        self.kind
    }

    /// The name of the job's kind.
    pub const fn name(&self) -> &'static str {
        self.kind.name()
    }

    /// The checkpoints that the job reads, oldest first.
    pub fn checkpoints(&self) -> &[CheckpointId] {
        &self.checkpoints
    }
}

/// Shows a person what the job is for and what it reads.
impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.spec().purpose)?;
        match &self.checkpoints[..] {
            [] => Ok(()),
            [only] => write!(f, " ({only})"),
            [first, .., last] => write!(f, " ({} checkpoints, {first} to {last})", self.checkpoints.len()),
        }
    }
}

/// A job was given a number of checkpoints that its kind cannot read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("job {} cannot read {}", kind.name(), counted(*checkpoints, "checkpoint"))]
pub struct WrongInputs {
    kind: JobKind,
    checkpoints: usize,
}

/// What a job produces. A run has at most one job of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// Shards, tokenizer and manifest.
    Prepare,
    /// The mean of the last milestones.
    Average,
    /// Held-out perplexity of the average.
    EvaluateAverage,
    /// Held-out perplexity of the last milestone.
    #[serde(rename = "evaluate")]
    EvaluateLast,
    /// Continuations of held-out text.
    #[serde(rename = "continue")]
    Continuations,
    /// The average in Hugging Face layout.
    Export,
    /// Tokens per second of the average.
    Benchmark,
}

/// Properties of all jobs of a kind. Together they form the graph of a run's jobs around its training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobSpec {
    /// A short name, also used for the result file.
    pub name: &'static str,
    /// What the job is for, in words for a person.
    pub purpose: &'static str,
    /// Whether the job is done before or after training.
    pub phase: JobPhase,
    /// The milestones that the job reads.
    pub checkpoints: Milestones,
    /// The jobs whose output the job reads.
    pub reads: &'static [JobKind],
    /// Whether the job runs last and alone, because anything else that runs on the machine would distort its
    /// measurement.
    pub exclusive: bool,
}

/// When a job is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobPhase {
    /// Before training, which needs the job's output.
    BeforeTraining,
    /// After the last update, once the milestones that are averaged are stored.
    AfterTraining,
}

/// Which milestones a job reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Milestones {
    /// None.
    None,
    /// Only the last.
    Last,
    /// The last ones, as many as the plan averages.
    Averaged,
    /// The first, the middle one and the last.
    Spread,
}

impl Milestones {
    /// Whether a job that reads these milestones can read `count` checkpoints.
    const fn allows(self, count: usize) -> bool {
        match self {
            Self::None => count == 0,
            Self::Last => count == 1,
            Self::Averaged => count > 0,
            Self::Spread => 1 <= count && count <= 3,
        }
    }
}

impl JobKind {
    /// Every kind, each after those whose output it reads.
    pub const ALL: [Self; 7] = [
        Self::Prepare,
        Self::Average,
        Self::EvaluateAverage,
        Self::EvaluateLast,
        Self::Continuations,
        Self::Export,
        Self::Benchmark,
    ];

    /// Properties of all jobs of this kind.
    pub const fn spec(self) -> JobSpec {
        /// The properties that most kinds share.
        const AFTER: JobSpec = JobSpec {
            name: "",
            purpose: "",
            phase: JobPhase::AfterTraining,
            checkpoints: Milestones::None,
            reads: &[],
            exclusive: false,
        };
        match self {
            Self::Prepare => JobSpec {
                name: "prepare",
                purpose: "the text to read, its tokenizer and its manifest",
                phase: JobPhase::BeforeTraining,
                ..AFTER
            },
            Self::Average => JobSpec {
                name: "average",
                purpose: "mean in float64",
                checkpoints: Milestones::Averaged,
                ..AFTER
            },
            Self::EvaluateAverage => JobSpec {
                name: "evaluate-average",
                purpose: "held-out perplexity of the average",
                reads: &[Self::Average],
                ..AFTER
            },
            Self::EvaluateLast => JobSpec {
                name: "evaluate-last",
                purpose: "held-out perplexity",
                checkpoints: Milestones::Last,
                ..AFTER
            },
            Self::Continuations => JobSpec {
                name: "continuations",
                purpose: "greedy continuations of held-out text",
                checkpoints: Milestones::Spread,
                ..AFTER
            },
            Self::Export => JobSpec {
                name: "export",
                purpose: "the average in Hugging Face layout",
                reads: &[Self::Average],
                ..AFTER
            },
            Self::Benchmark => JobSpec {
                name: "benchmark",
                purpose: "prompt processing and generation",
                reads: &[Self::Average],
                exclusive: true,
                ..AFTER
            },
        }
    }

    /// A short name, also used for the result file.
    pub const fn name(self) -> &'static str {
        self.spec().name
    }

    /// The kind with this name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The kinds of jobs that a run does, with or without the export.
    pub fn of_run(export: bool) -> BTreeSet<Self> {
        Self::ALL.into_iter().filter(|kind| export || *kind != Self::Export).collect()
    }
}

/// The form of jobs in the record of a run: `"prepare"`, `{"evaluate": id}`, `{"average": [id, …]}`. It must not
/// change, because it is the key under which the record names a job's worker.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Record {
    Plain(JobKind),
    Reads(BTreeMap<JobKind, Inputs>),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Inputs {
    One(CheckpointId),
    Several(Vec<CheckpointId>),
}

impl From<Job> for Record {
    fn from(Job { kind, checkpoints }: Job) -> Self {
        match kind.spec().checkpoints {
            Milestones::None => Self::Plain(kind),
            Milestones::Last => Self::Reads([(kind, Inputs::One(checkpoints[0]))].into()),
            Milestones::Averaged | Milestones::Spread => {
                Self::Reads([(kind, Inputs::Several(checkpoints))].into())
            }
        }
    }
}

impl TryFrom<Record> for Job {
    type Error = String;

    fn try_from(record: Record) -> Result<Self, String> {
        let (kind, checkpoints) = match record {
            Record::Plain(kind) => (kind, Vec::new()),
            Record::Reads(mut kinds) => match (kinds.pop_first(), kinds.is_empty()) {
                (Some((kind, Inputs::One(checkpoint))), true) => (kind, vec![checkpoint]),
                (Some((kind, Inputs::Several(checkpoints))), true) => (kind, checkpoints),
                _ => return Err("a job has one kind".to_owned()),
            },
        };
        Self::new(kind, checkpoints).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Generation, Step};

    #[test]
    fn the_graph_of_jobs_has_names_and_no_circle() {
        let mut names = BTreeSet::new();
        for (index, kind) in JobKind::ALL.into_iter().enumerate() {
            let spec = kind.spec();
            assert!(names.insert(spec.name), "{} is the name of two kinds", spec.name);
            assert_eq!(JobKind::of_name(spec.name), Some(kind));
            assert!(spec.reads.iter().all(|read| JobKind::ALL[..index].contains(read)), "{}", spec.name);
            assert!(!spec.purpose.is_empty());
        }
    }

    #[test]
    fn a_job_keeps_its_place_in_the_record() {
        let id = |step| CheckpointId::new(Step::new(step), Generation::new(1));
        let of = |step| serde_json::to_string(&id(step)).unwrap();
        for (kind, checkpoints, recorded) in [
            (JobKind::Prepare, vec![], "\"prepare\"".to_owned()),
            (JobKind::EvaluateAverage, vec![], "\"evaluate_average\"".to_owned()),
            (JobKind::EvaluateLast, vec![id(8)], format!("{{\"evaluate\":{}}}", of(8))),
            (JobKind::Average, vec![id(8)], format!("{{\"average\":[{}]}}", of(8))),
            (JobKind::Continuations, vec![id(4), id(8)], format!("{{\"continue\":[{},{}]}}", of(4), of(8))),
        ] {
            let job = Job::new(kind, checkpoints).unwrap();
            assert_eq!(serde_json::to_string(&job).unwrap(), recorded);
            assert_eq!(serde_json::from_str::<Job>(&recorded).unwrap(), job);
        }
        for wrong in [
            "\"average\"".to_owned(),
            "\"nothing\"".to_owned(),
            "{}".to_owned(),
            format!("{{\"evaluate\":[{},{}]}}", of(4), of(8)),
            format!("{{\"prepare\":{}}}", of(4)),
            format!("{{\"evaluate\":{},\"average\":[{}]}}", of(4), of(8)),
        ] {
            assert!(serde_json::from_str::<Job>(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_job_tells_what_it_is_for() {
        let id = |step| CheckpointId::new(Step::new(step), Generation::new(1));
        let shown = |kind, steps: &[u64]| {
            Job::new(kind, steps.iter().copied().map(id).collect()).unwrap().to_string()
        };
        assert_eq!(shown(JobKind::Export, &[]), "the average in Hugging Face layout");
        assert_eq!(shown(JobKind::EvaluateLast, &[8]), format!("held-out perplexity ({})", id(8)));
        let averaged = shown(JobKind::Average, &[4, 6, 8]);
        assert_eq!(averaged, format!("mean in float64 (3 checkpoints, {} to {})", id(4), id(8)));
    }
}
