//! Stages: what a run does beside its training, as data, and the jobs that each stage consists of.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::job::{Job, JobName, Subject};
use crate::{CheckpointId, StageName, counted};

impl StageName {
    /// Makes the shards, the tokenizer and the manifest.
    pub const PREPARE: &str = "prepare";
    /// Trains. It is no stage of jobs, and no stage can have its name.
    pub const TRAIN: &str = "train";
    /// Averages the last milestones.
    pub const AVERAGE: &str = "average";
    /// Held-out perplexity of the average.
    pub const EVALUATE_AVERAGE: &str = "evaluate-average";
    /// Held-out perplexity of the last milestone.
    pub const EVALUATE_LAST: &str = "evaluate-last";
    /// Continuations of held-out text.
    pub const CONTINUATIONS: &str = "continuations";
    /// The average in Hugging Face layout.
    pub const EXPORT: &str = "export";
    /// Speed of the average.
    pub const BENCHMARK: &str = "benchmark";
    /// The names of stages that plans do not write.
    pub const IMPLIED: [&str; 8] = [
        Self::PREPARE,
        Self::TRAIN,
        Self::AVERAGE,
        Self::EVALUATE_AVERAGE,
        Self::EVALUATE_LAST,
        Self::CONTINUATIONS,
        Self::EXPORT,
        Self::BENCHMARK,
    ];
}

/// What the jobs of a stage do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StageKind {
    /// Make the shards, the tokenizer and the manifest, before training.
    Prepare,
    /// Average checkpoints.
    Average,
    /// Measure the perplexity of held-out text.
    Perplexity,
    /// Continue held-out text.
    Continuations,
    /// Write a model in Hugging Face layout.
    Export,
    /// Measure a model on tasks.
    Evaluation,
    /// Measure how fast a model reads and writes. Nothing else may run on the machine meanwhile.
    Benchmark,
}

impl StageKind {
    /// What a job of this kind is for, in words for a person.
    pub const fn purpose(self) -> &'static str {
        match self {
            Self::Prepare => "the text to read, its tokenizer and its manifest",
            Self::Average => "mean in float64",
            Self::Perplexity => "held-out perplexity",
            Self::Continuations => "greedy continuations of held-out text",
            Self::Export => "the average in Hugging Face layout",
            Self::Evaluation => "tasks",
            Self::Benchmark => "prompt processing and generation",
        }
    }

    /// Whether a job of this kind has its machine for itself, because anything else there would distort what it measures.
    pub const fn is_exclusive(self) -> bool {
        matches!(self, Self::Benchmark)
    }
}

/// What the jobs of a stage read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reads {
    /// One job that reads no model.
    Nothing,
    /// One job that reads the average.
    Average,
    /// One job that reads the last milestone.
    Last,
    /// One job that reads the last milestones, as many as the plan averages.
    Averaged,
    /// One job that reads the first milestone, the middle one and the last.
    Spread,
    /// A job for each of these models.
    Models(Vec<Of>),
}

/// A model of which a stage of the plan is told, or several of a kind. As text: `average`, `last`, `milestones`, or where
/// the model is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Of {
    /// The average of the last milestones.
    Average,
    /// The last milestone.
    Last,
    /// Each milestone, as soon as it is stored.
    Milestones,
    /// A model in Hugging Face layout, in this folder or at this address.
    Model(String),
}

impl From<String> for Of {
    fn from(text: String) -> Self {
        match &text[..] {
            "average" => Self::Average,
            "last" => Self::Last,
            "milestones" => Self::Milestones,
            _ => Self::Model(text),
        }
    }
}

impl From<Of> for String {
    fn from(of: Of) -> Self {
        match of {
            Of::Average => "average".to_owned(),
            Of::Last => "last".to_owned(),
            Of::Milestones => "milestones".to_owned(),
            Of::Model(place) => place,
        }
    }
}

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from(self.clone()))
    }
}

/// What a worker must have to do the jobs of a stage.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Requirements {
    /// A pattern that what the worker says of its device must match, such as `*4090*`.
    pub device: Option<String>,
    /// Bytes of memory that its device must have.
    pub memory: Option<u64>,
    /// How long the run waits for such a worker when there is nothing else to do; without it, for ever.
    pub wait: Option<Duration>,
}

/// For a person: `with a device like "*4090*" and 20.0 GB of memory`; nothing without requirements.
impl fmt::Display for Requirements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = self.device.as_ref().map(|device| format!("a device like {device:?}"));
        let memory = self.memory.map(|bytes| format!("{:.1} GB of memory", bytes as f64 / 1e9));
        let all: Vec<String> = device.into_iter().chain(memory).collect();
        if all.is_empty() { Ok(()) } else { write!(f, "with {}", all.join(" and ")) }
    }
}

/// A stage of jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Its name.
    pub name: StageName,
    /// What its jobs do.
    pub kind: StageKind,
    /// What its jobs read.
    pub reads: Reads,
    /// What a worker must have to do its jobs.
    pub needs: Requirements,
}

impl Stage {
    /// A stage that plans do not write, which any worker can do.
    fn implied(name: &str, kind: StageKind, reads: Reads) -> Self {
        let name = name.parse().expect("it is a name");
        Self { name, kind, reads, needs: Requirements::default() }
    }

    /// Its jobs, given the milestones that are stored, oldest first, and how many of them are averaged. A job is missing while
    /// there is no checkpoint for it.
    pub fn jobs(&self, milestones: &[CheckpointId], average: u64) -> Vec<Job> {
        let job = |subject| Job::new(self.name.clone(), subject);
        let own = |checkpoints: &[CheckpointId]| match checkpoints {
            [] => Vec::new(),
            some => vec![job(Subject::Stage(some.to_vec()))],
        };
        let last = milestones.last().copied();
        match &self.reads {
            Reads::Nothing | Reads::Average => vec![job(Subject::Stage(Vec::new()))],
            Reads::Last => own(last.as_slice()),
            Reads::Averaged => own(&milestones[milestones.len().saturating_sub(average as usize)..]),
            Reads::Spread => {
                let mut spread: Vec<CheckpointId> =
                    [milestones.first(), milestones.get(milestones.len() / 2), milestones.last()]
                        .into_iter()
                        .flatten()
                        .copied()
                        .collect();
                spread.dedup();
                own(&spread)
            }
            Reads::Models(models) => {
                let jobs = models.iter().flat_map(|of| match of {
                    Of::Average => vec![job(Subject::Average)],
                    Of::Last => last.map(|id| job(Subject::Last(id))).into_iter().collect(),
                    Of::Milestones => milestones.iter().map(|id| job(Subject::Milestone(*id))).collect(),
                    Of::Model(place) => vec![job(Subject::Model(place.clone()))],
                });
                jobs.collect()
            }
        }
    }

    /// Whether it reads milestones, and not only the average of them.
    pub fn reads_milestones(&self) -> bool {
        match &self.reads {
            Reads::Nothing | Reads::Average => false,
            Reads::Last | Reads::Averaged | Reads::Spread => true,
            Reads::Models(models) => models.iter().any(|of| matches!(of, Of::Last | Of::Milestones)),
        }
    }

    /// Whether a job of this stage reads the average.
    pub fn reads_average(&self, job: &Job) -> bool {
        self.reads == Reads::Average || *job.subject() == Subject::Average
    }

    /// What a job of this stage is for and what it reads, in words for a person.
    pub fn describe(&self, job: &Job) -> String {
        let purpose = match (self.kind, &self.reads) {
            (StageKind::Perplexity, Reads::Average) => "held-out perplexity of the average",
            (kind, _) => kind.purpose(),
        };
        match (job.subject(), job.checkpoints()) {
            (Subject::Average, _) => format!("{purpose} (the average)"),
            (Subject::Model(place), _) => format!("{purpose} ({place})"),
            (_, []) => purpose.to_owned(),
            (_, [only]) => format!("{purpose} ({only})"),
            (_, [first, .., last]) => {
                format!("{purpose} ({}, {first} to {last})", counted(job.checkpoints().len(), "checkpoint"))
            }
        }
    }
}

/// The stages of a run, each after those whose output it reads. Training is between the preparation and the rest.
///
/// ```text
///                          ┌─► average ─┬─► evaluate-average
/// prepare ─► (training) ─► │            ├─► export
///                          │            ├─► benchmark
///                          │            └─► evaluations and benchmarks of the average
///                          ├─► evaluate-last
///                          ├─► continuations
///                          └─► evaluations and benchmarks of milestones
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    stages: Vec<Stage>,
    average: u64,
}

impl Graph {
    /// The stages of every run, with or without the export, that averages so many milestones; and those that the plan adds.
    pub fn new(average: u64, export: bool, added: Vec<Stage>) -> Self {
        let stage = Stage::implied;
        let mut stages = vec![
            stage(StageName::PREPARE, StageKind::Prepare, Reads::Nothing),
            stage(StageName::AVERAGE, StageKind::Average, Reads::Averaged),
            stage(StageName::EVALUATE_AVERAGE, StageKind::Perplexity, Reads::Average),
            stage(StageName::EVALUATE_LAST, StageKind::Perplexity, Reads::Last),
            stage(StageName::CONTINUATIONS, StageKind::Continuations, Reads::Spread),
        ];
        if export {
            stages.push(stage(StageName::EXPORT, StageKind::Export, Reads::Average));
        }
        stages.extend(added);
        stages.push(stage(StageName::BENCHMARK, StageKind::Benchmark, Reads::Average));
        Self { stages, average }
    }

    /// All stages.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The stage with this name.
    pub fn stage(&self, name: &StageName) -> Option<&Stage> {
        self.stages.iter().find(|stage| stage.name == *name)
    }

    /// The jobs of a stage, given the milestones that are stored, oldest first.
    pub fn jobs(&self, stage: &Stage, milestones: &[CheckpointId]) -> Vec<Job> {
        stage.jobs(milestones, self.average)
    }

    /// Whether every job of every stage is done, given the milestones of a run that is trained.
    pub fn is_done(&self, milestones: &[CheckpointId], done: impl Fn(&JobName) -> bool) -> bool {
        self.stages.iter().all(|stage| self.stage_is_done(stage, milestones, &done))
    }

    /// Whether every job of a stage is done, given the milestones of a run that is trained.
    pub fn stage_is_done(
        &self,
        stage: &Stage,
        milestones: &[CheckpointId],
        done: impl Fn(&JobName) -> bool,
    ) -> bool {
        let jobs = self.jobs(stage, milestones);
        let is_whole = !stage.reads_milestones() || !milestones.is_empty();
        is_whole && jobs.iter().all(|job| done(&job.name()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{Generation, Step};

    fn id(step: u64) -> CheckpointId {
        CheckpointId::new(Step::new(step), Generation::new(1))
    }

    fn tasks() -> Stage {
        let of = ["average", "last", "milestones", "hf://org/model@v1"].map(|of| Of::from(of.to_owned()));
        Stage {
            name: "tasks".parse().unwrap(),
            kind: StageKind::Evaluation,
            reads: Reads::Models(of.to_vec()),
            needs: Requirements::default(),
        }
    }

    #[test]
    fn stages_have_a_job_for_each_model() {
        let graph = Graph::new(2, true, vec![tasks()]);
        let names = |milestones: &[CheckpointId]| -> Vec<String> {
            let jobs = graph.stages().iter().flat_map(|stage| graph.jobs(stage, milestones));
            jobs.map(|job| job.name().to_string()).collect()
        };
        let always = ["prepare", "evaluate-average", "export", "tasks/average"];
        let all = names(&[]);
        assert!(always.iter().all(|name| all.iter().any(|other| other == name)), "{all:?}");
        assert_eq!(all.len(), always.len() + 2, "{all:?}");
        let more: BTreeSet<String> =
            names(&[id(4), id(8)]).into_iter().filter(|name| !all.contains(name)).collect();
        let expected = [
            "average",
            "continuations",
            "evaluate-last",
            "tasks/last",
            "tasks/step-00000004",
            "tasks/step-00000008",
        ];
        assert_eq!(more.into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_stage_reads_what_its_kind_says() {
        let graph = Graph::new(2, true, Vec::new());
        let milestones = [2, 4, 6, 8].map(id);
        let read = |name: &str| {
            let stage = graph.stage(&name.parse().unwrap()).unwrap();
            graph.jobs(stage, &milestones)[0].checkpoints().to_vec()
        };
        assert_eq!(read("average"), [id(6), id(8)]);
        assert_eq!(read("evaluate-last"), [id(8)]);
        assert_eq!(read("continuations"), [id(2), id(6), id(8)]);
        assert_eq!(read("export"), []);
    }

    #[test]
    fn a_run_without_milestones_is_not_done() {
        let graph = Graph::new(2, false, Vec::new());
        assert!(!graph.is_done(&[], |_| true));
        assert!(graph.is_done(&[id(8)], |_| true));
        assert!(!graph.is_done(&[id(8)], |name| name.as_str() != "benchmark"));
    }

    #[test]
    fn a_job_tells_what_it_is_for() {
        let graph = Graph::new(3, true, vec![tasks()]);
        let told = |name: &str| {
            let stage = graph.stage(&name.parse().unwrap()).unwrap();
            stage.describe(&graph.jobs(stage, &[4, 6, 8].map(id))[0])
        };
        assert_eq!(told("export"), "the average in Hugging Face layout");
        assert_eq!(told("evaluate-last"), format!("held-out perplexity ({})", id(8)));
        assert_eq!(told("average"), format!("mean in float64 (3 checkpoints, {} to {})", id(4), id(8)));
        assert_eq!(told("tasks"), "tasks (the average)");
    }

    #[test]
    fn requirements_are_said_in_words() {
        let needs = |device: Option<&str>, memory| {
            Requirements { device: device.map(str::to_owned), memory, wait: None }.to_string()
        };
        assert_eq!(needs(None, None), "");
        assert_eq!(
            needs(Some("*4090*"), Some(20_000_000_000)),
            "with a device like \"*4090*\" and 20.0 GB of memory"
        );
    }
}
