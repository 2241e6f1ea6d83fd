//! Stages: what a run does, as data, and the jobs that a stage consists of. Groups of workers do the stages that train.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::job::{Job, JobName, Subject};
use crate::{CheckpointId, CheckpointKind, Generation, StageName, Step, counted};

impl StageName {
    /// Makes the shards, the tokenizer and the manifest.
    pub const PREPARE: &str = "prepare";
    /// Pretrains.
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

    /// The stage that pretrains.
    pub fn pretraining() -> Self {
        Self::implied(Self::TRAIN)
    }

    /// A name that plans do not write.
    fn implied(name: &str) -> Self {
        name.parse().expect("it is a name")
    }

    /// The names of all stages beside this tuning stage that may belong to it.
    pub fn of_tuning(&self) -> [Self; 6] {
        [self.examples(), self.reward(), self.candidates(), self.selection(), self.reference(), self.export()]
    }

    /// The stage that makes the examples of this tuning stage.
    #[must_use]
    pub fn examples(&self) -> Self {
        self.with("examples")
    }

    /// The stage that computes the log-probabilities that this tuning stage compares with.
    #[must_use]
    pub fn reference(&self) -> Self {
        self.with("reference")
    }

    /// The stage that learns from preferences how good an answer is, for this tuning stage.
    #[must_use]
    pub fn reward(&self) -> Self {
        self.with("reward")
    }

    /// The stage that samples the answers from which pairs are made for this tuning stage.
    #[must_use]
    pub fn candidates(&self) -> Self {
        self.with("candidates")
    }

    /// The stage that makes pairs of sampled answers for this tuning stage.
    #[must_use]
    pub fn selection(&self) -> Self {
        self.with("selection")
    }

    /// The stage that writes the model that this tuning stage has made.
    #[must_use]
    pub fn export(&self) -> Self {
        self.with("export")
    }
}

/// The longest name of a tuning stage, as other stages are named after it.
pub const LONGEST_TUNING_NAME: usize = 48;

/// What a stage does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StageKind {
    /// Make the shards, the tokenizer and the manifest, before training.
    Prepare,
    /// Make the examples of a tuning stage, before any training: what is wrong with them is found at once.
    Examples,
    /// Train on text, from the seed or from a base model. A group of workers does it.
    Train,
    /// Learn from preferences how good an answer is: a vector on the last hidden state.
    Reward,
    /// Sample answers to prompts.
    Candidates,
    /// Select some of the sampled answers by their scores, and make pairs of them.
    Selection,
    /// Compute the log-probabilities of answers before tuning.
    Reference,
    /// Train on conversations or preferences, from another model. A group of workers does it.
    Tune,
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
            Self::Examples => "the examples to learn from",
            Self::Train => "training on text",
            Self::Reward => "a reward head",
            Self::Candidates => "answers to choose from",
            Self::Selection => "pairs of sampled answers",
            Self::Reference => "log-probabilities of the answers before tuning",
            Self::Tune => "training on examples",
            Self::Average => "mean in float64",
            Self::Perplexity => "held-out perplexity",
            Self::Continuations => "greedy continuations of held-out text",
            Self::Export => "a model in Hugging Face layout",
            Self::Evaluation => "tasks",
            Self::Benchmark => "prompt processing and generation",
        }
    }

    /// Whether a job of this kind has its machine for itself, because anything else there would distort what it measures.
    pub const fn is_exclusive(self) -> bool {
        matches!(self, Self::Benchmark)
    }

    /// Whether a group of workers does the stage, instead of workers that do its jobs.
    pub const fn trains(self) -> bool {
        matches!(self, Self::Train | Self::Tune)
    }

    /// Whether several workers may share a job of this kind.
    pub const fn is_shared(self) -> bool {
        matches!(self, Self::Evaluation | Self::Reference | Self::Candidates)
    }
}

/// What a stage reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reads {
    /// No model; one job.
    Nothing,
    /// One job that reads the average.
    Average,
    /// One job that reads the last milestone.
    Last,
    /// One job that reads the last milestones, as many as the plan averages.
    Averaged,
    /// One job that reads the first milestone, the middle one and the last.
    Spread,
    /// One job that reads the last state of this tuning stage.
    Tuned(StageName),
    /// A job for each of these models. A tuning stage begins from the only one.
    Models(Vec<Of>),
}

/// A model of which a stage of the plan is told, or several of a kind. As text: `base`, `average`, `last`, `milestones`, the
/// name of a tuning stage, or where the model is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Of {
    /// The model that the run begins from.
    Base,
    /// The average of the last milestones.
    Average,
    /// The last milestone.
    Last,
    /// Each milestone, as soon as it is stored.
    Milestones,
    /// The model that a tuning stage has made.
    Tuned(StageName),
    /// A model from elsewhere, in this folder or at this address, which has a `/` or begins with a dot.
    Model(String),
}

impl Of {
    /// The name of the job of a stage that works on this model. It is the same for all checkpoints.
    pub fn job_name(&self, stage: StageName) -> JobName {
        let any = CheckpointId::new(StageName::pretraining(), Step::default(), Generation::default());
        let subject = match self {
            Self::Base => Subject::Base,
            Self::Average => Subject::Average,
            Self::Last | Self::Milestones => Subject::Last(any),
            Self::Tuned(name) => Subject::Tuned(*name),
            Self::Model(place) => Subject::Model(place.clone()),
        };
        Job::new(stage, subject).name()
    }
}

impl From<String> for Of {
    fn from(text: String) -> Self {
        match &text[..] {
            "base" => Self::Base,
            "average" => Self::Average,
            "last" => Self::Last,
            "milestones" => Self::Milestones,
            _ => text.parse().map_or(Self::Model(text), Self::Tuned),
        }
    }
}

impl From<Of> for String {
    fn from(of: Of) -> Self {
        match of {
            Of::Base => "base".to_owned(),
            Of::Average => "average".to_owned(),
            Of::Last => "last".to_owned(),
            Of::Milestones => "milestones".to_owned(),
            Of::Tuned(stage) => stage.into(),
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

/// The milestones of each training stage that are stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Milestones(BTreeMap<StageName, Vec<CheckpointId>>);

impl Milestones {
    /// Those of a training stage, oldest first.
    pub fn of(&self, training: StageName) -> &[CheckpointId] {
        self.0.get(&training).map_or(&[], Vec::as_slice)
    }

    /// Those of pretraining, oldest first.
    pub fn pretraining(&self) -> &[CheckpointId] {
        self.of(StageName::pretraining())
    }
}

/// Of a step that was trained twice, only the newer milestone counts.
impl<'a> FromIterator<(&'a CheckpointId, &'a CheckpointKind)> for Milestones {
    fn from_iter<T: IntoIterator<Item = (&'a CheckpointId, &'a CheckpointKind)>>(checkpoints: T) -> Self {
        let mut newest = BTreeMap::new();
        for (id, kind) in checkpoints {
            if *kind == CheckpointKind::Milestone {
                let known = newest.entry((id.training(), id.step())).or_insert(*id);
                *known = (*known).max(*id);
            }
        }
        let mut milestones = Self::default();
        for ((training, _), id) in newest {
            milestones.0.entry(training).or_default().push(id);
        }
        milestones
    }
}

/// A stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Its name.
    pub name: StageName,
    /// What it does.
    pub kind: StageKind,
    /// What it reads.
    pub reads: Reads,
    /// The stage whose result it needs beside that.
    pub after: Option<StageName>,
    /// What a worker must have to do its jobs.
    pub needs: Requirements,
}

impl Stage {
    /// A stage that any worker can do.
    const fn any(name: StageName, kind: StageKind, reads: Reads) -> Self {
        let needs = Requirements { device: None, memory: None, wait: None };
        Self { name, kind, reads, after: None, needs }
    }

    /// A stage that plans do not write.
    fn implied(name: &str, kind: StageKind, reads: Reads) -> Self {
        Self::any(StageName::implied(name), kind, reads)
    }

    /// Its jobs, given the milestones that are stored, and how many of those of pretraining are averaged. A job is missing while
    /// there is no checkpoint for it; a stage that trains has none.
    pub fn jobs(&self, milestones: &Milestones, average: u64) -> Vec<Job> {
        if self.kind.trains() {
            return Vec::new();
        }
        let subjects = self.subjects(milestones, average).into_iter();
        subjects.map(|subject| Job::new(self.name, subject)).collect()
    }

    /// The model from which a stage that trains begins; `None` for the seed.
    pub fn begins_from(&self, milestones: &Milestones) -> Option<Subject> {
        match &self.reads {
            Reads::Models(_) => self.subjects(milestones, 0).into_iter().next(),
            _ => None,
        }
    }

    fn subjects(&self, milestones: &Milestones, average: u64) -> Vec<Subject> {
        let own = |checkpoints: &[CheckpointId]| match checkpoints {
            [] => Vec::new(),
            some => vec![Subject::Stage(some.to_vec())],
        };
        let stored = milestones.pretraining();
        let last = stored.last().copied();
        match &self.reads {
            Reads::Nothing | Reads::Average => vec![Subject::Stage(Vec::new())],
            Reads::Last => own(last.as_slice()),
            Reads::Averaged => own(&stored[stored.len().saturating_sub(average as usize)..]),
            Reads::Spread => {
                let spread = [stored.first(), stored.get(stored.len() / 2), stored.last()];
                let mut spread: Vec<CheckpointId> = spread.into_iter().flatten().copied().collect();
                spread.dedup();
                own(&spread)
            }
            Reads::Tuned(training) => own(milestones.of(*training).last().copied().as_slice()),
            Reads::Models(models) => models
                .iter()
                .flat_map(|of| match of {
                    Of::Base => vec![Subject::Base],
                    Of::Average => vec![Subject::Average],
                    Of::Last => last.map(Subject::Last).into_iter().collect(),
                    Of::Milestones => stored.iter().copied().map(Subject::Milestone).collect(),
                    Of::Tuned(stage) => vec![Subject::Tuned(*stage)],
                    Of::Model(place) => vec![Subject::Model(place.clone())],
                })
                .collect(),
        }
    }

    /// The training stage whose milestones it reads, and not only the average of them.
    pub fn reads_milestones_of(&self) -> Option<StageName> {
        match &self.reads {
            Reads::Nothing | Reads::Average => None,
            Reads::Last | Reads::Averaged | Reads::Spread => Some(StageName::pretraining()),
            Reads::Tuned(training) => Some(*training),
            Reads::Models(models) => {
                models.iter().any(|of| matches!(of, Of::Last | Of::Milestones)).then(StageName::pretraining)
            }
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
            (StageKind::Export, Reads::Average) => "the average in Hugging Face layout",
            (kind, _) => kind.purpose(),
        };
        match (job.subject(), job.checkpoints()) {
            (Subject::Base, _) => format!("{purpose} (the base)"),
            (Subject::Average, _) => format!("{purpose} (the average)"),
            (Subject::Tuned(stage), _) => format!("{purpose} ({stage})"),
            (Subject::Model(place), _) => format!("{purpose} ({place})"),
            (_, []) => purpose.to_owned(),
            (_, [only]) => format!("{purpose} ({only})"),
            (_, [first, .., last]) => {
                format!("{purpose} ({}, {first} to {last})", counted(job.checkpoints().len(), "checkpoint"))
            }
        }
    }
}

/// A tuning stage of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    /// Its name, of at most [`LONGEST_TUNING_NAME`] characters.
    pub name: StageName,
    /// The model that it begins from.
    pub of: Of,
    /// Whether it compares with log-probabilities before it.
    pub compares: bool,
    /// Where the scores of sampled answers come from, if it learns from such in place of those in its data.
    pub rewards: Option<Rewards>,
}

/// Where the scores of sampled answers come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rewards {
    /// From a file that somebody makes when the answers are sampled.
    Scores,
    /// From a vector on the last hidden state, which is learned from preferences.
    Head,
}

impl Tuning {
    /// What is done between its examples and its training, in this order.
    fn steps(&self) -> Vec<(StageName, StageKind)> {
        let name = &self.name;
        let mut steps = Vec::new();
        if self.rewards == Some(Rewards::Head) {
            steps.push((name.reward(), StageKind::Reward));
        }
        if self.rewards.is_some() {
            steps.push((name.candidates(), StageKind::Candidates));
            steps.push((name.selection(), StageKind::Selection));
        }
        if self.compares {
            steps.push((name.reference(), StageKind::Reference));
        }
        steps
    }
}

/// The stages of a run, each after those whose output it reads.
///
/// ```text
///                                ┌─► average ─┬─► evaluate-average
/// prepare ─► examples ─► train ─►│            ├─► export
///                                │            ├─► benchmark
///                                │            └─► tuning stages, evaluations and benchmarks of the average
///                                ├─► evaluate-last
///                                ├─► continuations
///                                └─► evaluations and benchmarks of milestones
///
/// (a model) ─► NAME-reward ─► NAME-candidates ─► NAME-selection ─► NAME-reference ─► NAME ─► NAME-export
///
/// NAME-export ─► tuning stages, evaluations and benchmarks of it
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    stages: Vec<Stage>,
    average: u64,
}

impl Graph {
    /// The stages of a run that pretrains, from the seed or `from_base`, and averages so many milestones, with or without the export,
    /// and then tunes; and those that the plan adds.
    pub fn new(average: u64, export: bool, from_base: bool, tunings: &[Tuning], added: Vec<Stage>) -> Self {
        let origin = if from_base { Reads::Models(vec![Of::Base]) } else { Reads::Nothing };
        let stage = Stage::implied;
        let mut stages = vec![stage(StageName::PREPARE, StageKind::Prepare, Reads::Nothing)];
        stages.extend(Self::examples(tunings));
        stages.extend([
            stage(StageName::TRAIN, StageKind::Train, origin),
            stage(StageName::AVERAGE, StageKind::Average, Reads::Averaged),
            stage(StageName::EVALUATE_AVERAGE, StageKind::Perplexity, Reads::Average),
            stage(StageName::EVALUATE_LAST, StageKind::Perplexity, Reads::Last),
            stage(StageName::CONTINUATIONS, StageKind::Continuations, Reads::Spread),
        ]);
        if export {
            stages.push(stage(StageName::EXPORT, StageKind::Export, Reads::Average));
        }
        stages.extend(Self::tuning(tunings));
        stages.extend(added);
        stages.push(stage(StageName::BENCHMARK, StageKind::Benchmark, Reads::Average));
        Self { stages, average }
    }

    /// The stages of a run that begins from a base model and does not pretrain.
    pub fn of_base(tunings: &[Tuning], added: Vec<Stage>) -> Self {
        let mut stages = vec![Stage::implied(StageName::PREPARE, StageKind::Prepare, Reads::Nothing)];
        stages.extend(Self::examples(tunings));
        stages.extend(Self::tuning(tunings));
        stages.extend(added);
        Self { stages, average: 0 }
    }

    fn examples(tunings: &[Tuning]) -> impl Iterator<Item = Stage> {
        tunings.iter().map(|tuning| Stage::any(tuning.name.examples(), StageKind::Examples, Reads::Nothing))
    }

    fn tuning(tunings: &[Tuning]) -> impl Iterator<Item = Stage> {
        tunings.iter().flat_map(|tuning| {
            let name = tuning.name;
            let mut stages: Vec<Stage> = Vec::new();
            for (step, kind) in tuning.steps().into_iter().chain([(name, StageKind::Tune)]) {
                let after = stages.last().map(|before| before.name);
                let reads = Reads::Models(vec![tuning.of.clone()]);
                stages.push(Stage { after, ..Stage::any(step, kind, reads) });
            }
            stages.push(Stage::any(name.export(), StageKind::Export, Reads::Tuned(name)));
            stages
        })
    }

    /// The stage that makes what a tuning stage trains on.
    pub fn examples_of(&self, tuning: StageName) -> StageName {
        let selection = tuning.selection();
        if self.stage(&selection).is_some() { selection } else { tuning.examples() }
    }

    /// All stages.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The stage with this name.
    pub fn stage(&self, name: &StageName) -> Option<&Stage> {
        self.stages.iter().find(|stage| stage.name == *name)
    }

    /// The stages that train, in the order in which they do.
    pub fn trainings(&self) -> impl Iterator<Item = &Stage> {
        self.stages.iter().filter(|stage| stage.kind.trains())
    }

    /// The jobs of a stage, given the milestones that are stored.
    pub fn jobs(&self, stage: &Stage, milestones: &Milestones) -> Vec<Job> {
        let jobs = stage.jobs(milestones, self.average);
        let tuning = match &stage.reads {
            Reads::Tuned(tuning) => self.stage(tuning),
            _ => None,
        };
        // What an adapter adds to is read beside it.
        let begins_from = tuning.and_then(|tuning| tuning.begins_from(milestones));
        let Some(Subject::Last(origin)) = begins_from else { return jobs };
        let read = |job: Job| [job.checkpoints(), &[origin]].concat();
        jobs.into_iter().map(|job| Job::new(stage.name, Subject::Stage(read(job)))).collect()
    }

    /// Whether a stage that trains waits for this one.
    pub fn leads_to_training(&self, stage: &Stage) -> bool {
        let begins_from =
            |of: &Of| self.trainings().any(|other| other.reads == Reads::Models(vec![of.clone()]));
        match (stage.kind, &stage.reads) {
            (
                StageKind::Prepare
                | StageKind::Examples
                | StageKind::Reward
                | StageKind::Candidates
                | StageKind::Selection
                | StageKind::Reference,
                _,
            ) => true,
            (StageKind::Average, _) => begins_from(&Of::Average),
            (StageKind::Export, Reads::Tuned(name)) => begins_from(&Of::Tuned(*name)),
            _ => false,
        }
    }

    /// Whether every job of every stage is done, given the milestones of a run that is trained.
    pub fn is_done(&self, milestones: &Milestones, done: impl Fn(&JobName) -> bool) -> bool {
        self.stages.iter().all(|stage| self.stage_is_done(stage, milestones, &done))
    }

    /// Whether every job of a stage is done, given the milestones of a run that is trained.
    pub fn stage_is_done(
        &self,
        stage: &Stage,
        milestones: &Milestones,
        done: impl Fn(&JobName) -> bool,
    ) -> bool {
        let jobs = self.jobs(stage, milestones);
        let is_whole = stage.reads_milestones_of().is_none_or(|training| !milestones.of(training).is_empty());
        (stage.kind.trains() || is_whole) && jobs.iter().all(|job| done(&job.name()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn id(step: u64) -> CheckpointId {
        CheckpointId::new(StageName::pretraining(), Step::new(step), Generation::new(1))
    }

    fn milestones(steps: &[u64]) -> Milestones {
        steps
            .iter()
            .map(|step| id(*step))
            .collect::<Vec<_>>()
            .iter()
            .map(|id| (id, &CheckpointKind::Milestone))
            .collect()
    }

    fn name(text: &str) -> StageName {
        text.parse().unwrap()
    }

    fn tasks() -> Stage {
        let of = ["average", "last", "milestones", "hf://org/model@v1"].map(|of| Of::from(of.to_owned()));
        Stage {
            name: "tasks".parse().unwrap(),
            kind: StageKind::Evaluation,
            reads: Reads::Models(of.to_vec()),
            after: None,
            needs: Requirements::default(),
        }
    }

    #[test]
    fn stages_have_a_job_for_each_model() {
        let graph = Graph::new(2, true, false, &[], vec![tasks()]);
        let names = |steps: &[u64]| -> Vec<String> {
            let milestones = milestones(steps);
            let jobs = graph.stages().iter().flat_map(|stage| graph.jobs(stage, &milestones));
            jobs.map(|job| job.name().to_string()).collect()
        };
        let always = ["prepare", "evaluate-average", "export", "tasks/average"];
        let all = names(&[]);
        assert!(always.iter().all(|name| all.iter().any(|other| other == name)), "{all:?}");
        assert_eq!(all.len(), always.len() + 2, "{all:?}");
        let more: BTreeSet<String> = names(&[4, 8]).into_iter().filter(|name| !all.contains(name)).collect();
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
        let graph = Graph::new(2, true, false, &[], Vec::new());
        let milestones = milestones(&[2, 4, 6, 8]);
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
        let graph = Graph::new(2, false, false, &[], Vec::new());
        assert!(!graph.is_done(&milestones(&[]), |_| true));
        assert!(graph.is_done(&milestones(&[8]), |_| true));
        assert!(!graph.is_done(&milestones(&[8]), |name| name.as_str() != "benchmark"));
    }

    #[test]
    fn of_a_step_that_was_trained_twice_the_newer_milestone_counts() {
        let again = CheckpointId::new(StageName::pretraining(), Step::new(4), Generation::new(2));
        let recovery = CheckpointId::new(StageName::pretraining(), Step::new(5), Generation::new(2));
        let tuned = CheckpointId::new(name("dpo"), Step::new(4), Generation::new(3));
        let stored: std::collections::BTreeMap<_, _> = [
            (id(4), CheckpointKind::Milestone),
            (again, CheckpointKind::Milestone),
            (recovery, CheckpointKind::Recovery),
            (tuned, CheckpointKind::Milestone),
        ]
        .into();
        let milestones: Milestones = stored.iter().collect();
        assert_eq!(milestones.pretraining(), [again]);
        assert_eq!(milestones.of(name("dpo")), [tuned]);
        assert_eq!(milestones.of(name("sft")), []);
    }

    #[test]
    fn tuning_stages_have_examples_and_an_export() {
        let tuning = |name: &str, of: &str, compares| Tuning {
            name: name.parse().unwrap(),
            of: Of::from(of.to_owned()),
            compares,
            rewards: None,
        };
        let tunings = [tuning("sft", "average", false), tuning("dpo", "sft", true)];
        let graph = Graph::new(2, false, false, &tunings, Vec::new());
        let names: Vec<&str> = graph.stages().iter().map(|stage| stage.name.as_str()).collect();
        let before = ["prepare", "sft-examples", "dpo-examples", "train", "average"];
        let after = ["sft", "sft-export", "dpo-reference", "dpo", "dpo-export", "benchmark"];
        assert_eq!(names[..5], before);
        assert_eq!(names[8..], after);
        let trainings: Vec<&str> = graph.trainings().map(|stage| stage.name.as_str()).collect();
        assert_eq!(trainings, ["train", "sft", "dpo"]);
        let leads = |name: &str| graph.leads_to_training(graph.stage(&name.parse().unwrap()).unwrap());
        assert!(["prepare", "dpo-examples", "average", "sft-export", "dpo-reference"].into_iter().all(leads));
        assert!(!["evaluate-average", "dpo-export", "benchmark"].into_iter().any(leads));

        let jobs = |name: &str, milestones: &Milestones| -> Vec<String> {
            let stage = graph.stage(&name.parse().unwrap()).unwrap();
            graph.jobs(stage, milestones).iter().map(|job| job.name().to_string()).collect()
        };
        let tuned: Milestones =
            [(&CheckpointId::new(name("dpo"), Step::new(4), Generation::new(3)), &CheckpointKind::Milestone)]
                .into_iter()
                .collect();
        assert_eq!(jobs("dpo", &tuned), [""; 0]);
        assert_eq!(jobs("dpo-export", &tuned), ["dpo-export"]);
        assert_eq!(jobs("sft-export", &tuned), [""; 0]);
        assert_eq!(jobs("dpo-reference", &tuned), ["dpo-reference/sft"]);
        let based = Graph::of_base(&[tuning("dpo", "base", true)], Vec::new());
        let names: Vec<&str> = based.stages().iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["prepare", "dpo-examples", "dpo-reference", "dpo", "dpo-export"]);
        assert_eq!(based.examples_of(name("dpo")), name("dpo-examples"));

        let sampled = Tuning { rewards: Some(Rewards::Head), ..tuning("rso", "base", true) };
        let sampled = Graph::of_base(&[sampled], Vec::new());
        let steps = sampled.stages()[2..6].iter().map(|stage| (stage.name.as_str(), stage.after));
        let expected = [
            ("rso-reward", None),
            ("rso-candidates", Some(name("rso-reward"))),
            ("rso-selection", Some(name("rso-candidates"))),
            ("rso-reference", Some(name("rso-selection"))),
        ];
        assert_eq!(steps.collect::<Vec<_>>(), expected);
        assert_eq!(sampled.stage(&name("rso")).and_then(|stage| stage.after), Some(name("rso-reference")));
        assert_eq!(sampled.examples_of(name("rso")), name("rso-selection"));
    }

    #[test]
    fn a_job_tells_what_it_is_for() {
        let graph = Graph::new(3, true, false, &[], vec![tasks()]);
        let told = |name: &str| {
            let stage = graph.stage(&name.parse().unwrap()).unwrap();
            stage.describe(&graph.jobs(stage, &milestones(&[4, 6, 8]))[0])
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
