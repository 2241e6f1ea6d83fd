//! Jobs: the work of stages, each done by one worker alone.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{CheckpointId, Digest, StageName};

/// A piece of work for one worker. Doing it twice on machines of one kind gives the same files, but for measured times.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Job {
    stage: StageName,
    subject: Subject,
    /// Which part of the work it is, if that is shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    part: Option<Part>,
}

/// A part of the work on one model. The job without a part puts the parts together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Part {
    index: u32,
    of: u32,
}

impl Part {
    /// Part `index` of `of`; `None` if there is no such part.
    pub const fn new(index: u32, of: u32) -> Option<Self> {
        if index < of { Some(Self { index, of }) } else { None }
    }

    /// Its number, from 0.
    pub const fn index(self) -> u32 {
        self.index
    }

    /// The number of parts.
    pub const fn of(self) -> u32 {
        self.of
    }

    /// Its share of `len` things in a row.
    pub fn share(self, len: usize) -> Range<usize> {
        let at = |index: u32| (len as u64 * u64::from(index) / u64::from(self.of)) as usize;
        at(self.index)..at(self.index + 1)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "part-{}-of-{}", self.index + 1, self.of)
    }
}

/// What a job works on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// What the stage as a whole reads: these checkpoints, oldest first, or whatever else its kind reads.
    Stage(Vec<CheckpointId>),
    /// The model that the run begins from.
    Base,
    /// The average of the last milestones.
    Average,
    /// The last milestone.
    Last(CheckpointId),
    /// A milestone.
    Milestone(CheckpointId),
    /// The model that a tuning stage has made.
    Tuned(StageName),
    /// A model from elsewhere, in this folder or at this address.
    Model(String),
}

impl Subject {
    /// The checkpoints that are read, oldest first.
    pub fn checkpoints(&self) -> &[CheckpointId] {
        match self {
            Self::Stage(checkpoints) => checkpoints,
            Self::Last(checkpoint) | Self::Milestone(checkpoint) => std::slice::from_ref(checkpoint),
            Self::Base | Self::Average | Self::Tuned(_) | Self::Model(_) => &[],
        }
    }
}

/// The name of a job, by which its result is kept: that of its stage, or `STAGE/MODEL` where the stage has a job for each
/// model, or `STAGE/MODEL/PART`. The same work has the same name in every generation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobName(String);

impl JobName {
    /// A name that was stored.
    pub const fn stored(name: String) -> Self {
        Self(name)
    }

    /// The name as text, which is also the path of a file without its ending.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of the stage.
    pub fn stage(&self) -> &str {
        self.0.split_once('/').map_or(&self.0, |(stage, _)| stage)
    }

    /// The name of the model, where the stage has a job for each and this is the whole of it.
    pub fn model(&self) -> Option<&str> {
        self.0.split_once('/').map(|(_, model)| model).filter(|model| !model.contains('/'))
    }
}

impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Job {
    /// Builds a job.
    pub const fn new(stage: StageName, subject: Subject) -> Self {
        Self { stage, subject, part: None }
    }

    /// A part of this job.
    #[must_use]
    pub fn part_of(self, part: Part) -> Self {
        Self { part: Some(part), ..self }
    }

    /// The job that puts the parts together, or this one if it is no part.
    #[must_use]
    pub fn whole(&self) -> Self {
        Self { part: None, ..self.clone() }
    }

    /// Which part it is, if the work is shared.
    pub const fn part(&self) -> Option<Part> {
        self.part
    }

    /// The stage that the job belongs to.
    pub const fn stage(&self) -> &StageName {
        &self.stage
    }

    /// What the job works on.
    pub const fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The checkpoints that the job reads, oldest first.
    pub fn checkpoints(&self) -> &[CheckpointId] {
        self.subject.checkpoints()
    }

    /// The name of the job.
    pub fn name(&self) -> JobName {
        let stage = &self.stage;
        let name = match &self.subject {
            Subject::Stage(_) => stage.to_string(),
            Subject::Base => format!("{stage}/base"),
            Subject::Average => format!("{stage}/average"),
            Subject::Tuned(tuned) => format!("{stage}/{tuned}"),
            Subject::Last(_) => format!("{stage}/last"),
            Subject::Milestone(id) => format!("{stage}/step-{:08}", id.step().get()),
            Subject::Model(place) => format!("{stage}/{}", file_name(place)),
        };
        JobName(match self.part {
            Some(part) => format!("{name}/{part}"),
            None => name,
        })
    }
}

/// A name for files about a model at a place: what can be read of it, and a hash that tells it from all others.
fn file_name(place: &str) -> String {
    let path = place.split_once("://").map_or(place, |(_, path)| path);
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let readable: String = path.chars().map(allowed).collect();
    let readable = readable.trim_matches(|c: char| !c.is_ascii_alphanumeric());
    let end = readable.len().saturating_sub(60);
    let hash = &Digest::of(place.as_bytes()).to_string()[..8];
    format!("{}-{hash}", readable[end..].trim_start_matches(|c: char| !c.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Generation, Step};

    #[test]
    fn jobs_have_names_that_are_paths() {
        let id = CheckpointId::new(StageName::pretraining(), Step::new(40), Generation::new(3));
        let name = |subject| Job::new("tasks".parse().unwrap(), subject).name();
        assert_eq!(name(Subject::Stage(vec![id])).as_str(), "tasks");
        assert_eq!(name(Subject::Average).as_str(), "tasks/average");
        assert_eq!(name(Subject::Tuned("dpo".parse().unwrap())).as_str(), "tasks/dpo");
        assert_eq!(name(Subject::Last(id)).as_str(), "tasks/last");
        assert_eq!(name(Subject::Milestone(id)).as_str(), "tasks/step-00000040");
        let models = ["hf://apple/OpenELM-270M", "/models/../x", "../é", &"long/".repeat(40)];
        let names = models.map(|place| name(Subject::Model(place.to_owned())));
        assert!(names[0].as_str().starts_with("tasks/apple-OpenELM-270M-"), "{}", names[0]);
        for name in &names {
            let model = name.model().unwrap();
            let is_plain = model.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
            assert!(is_plain && !model.starts_with('.') && model.len() <= 80, "{name}");
            assert_eq!(name.stage(), "tasks");
        }
        assert_ne!(name(Subject::Model("a/b".to_owned())), name(Subject::Model("a-b".to_owned())));
    }

    #[test]
    fn jobs_survive_the_record() {
        let id = CheckpointId::new(StageName::pretraining(), Step::new(8), Generation::new(1));
        for subject in [
            Subject::Stage(Vec::new()),
            Subject::Stage(vec![id]),
            Subject::Base,
            Subject::Average,
            Subject::Tuned("dpo".parse().unwrap()),
            Subject::Last(id),
            Subject::Milestone(id),
            Subject::Model("hf://a/b".to_owned()),
        ] {
            let job = Job::new("tasks".parse().unwrap(), subject);
            let part = job.clone().part_of(Part::new(1, 3).unwrap());
            assert!(part.name().as_str().ends_with("/part-2-of-3"));
            assert_eq!(part.whole(), job);
            let again = serde_json::to_string(&part).unwrap();
            assert_eq!(serde_json::from_str::<Job>(&again).unwrap(), part, "{again}");
            let text = serde_json::to_string(&job).unwrap();
            assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), job, "{text}");
        }
    }
}
