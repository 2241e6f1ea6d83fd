//! The training stages of a run, and how far each has got. One trains at a time, in the order of the graph.

use std::collections::{BTreeMap, BTreeSet};

use ulmus_types::{CheckpointId, CheckpointKind, Milestones, Repair, StageName, Step};

/// What the plan says of a training stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingSettings {
    /// Its name.
    pub name: StageName,
    /// Number of updates; `None` if it follows from examples that the run makes first.
    pub updates: Option<u64>,
    /// Micro-batches per update, and so the maximum number of workers in a group.
    pub micro_batches: u64,
    /// Maximum number of tokens in an update.
    pub tokens_per_step: u64,
    /// Updates between two milestones; 0 if only the last state is one.
    pub milestone_every: u64,
    /// Number of the last milestones that other stages read.
    pub needed_milestones: u64,
    /// Files of a checkpoint, in the order in which workers announce them.
    pub checkpoint_files: Vec<String>,
    /// Whether a source can run out before the last update.
    pub may_exhaust: bool,
    /// Names of what its updates measure beside the loss.
    pub measures: BTreeSet<String>,
}

/// What the database remembers of a training stage. The default is one that has not begun.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrainingRecord {
    /// Number of updates, if that follows from examples and they are made.
    pub updates: Option<u64>,
    /// The last update that was reported.
    pub step: Step,
    /// Set when every update is done; training is over once the needed milestones are also stored.
    pub trained: Option<Step>,
    /// Committed checkpoints.
    pub checkpoints: BTreeMap<CheckpointId, CheckpointKind>,
    /// Steps of checkpoints that were committed and found to be damaged since.
    pub damaged: BTreeSet<Step>,
    /// The last update whose milestones may be gone for good, because the database was rebuilt from what was there.
    pub recovered: Step,
    /// Whether a checkpoint was ever committed, even if it is gone since: if so, training never silently starts over.
    pub had_checkpoints: bool,
}

/// A training stage.
#[derive(Debug)]
pub(crate) struct Training {
    pub(crate) settings: TrainingSettings,
    pub(crate) record: TrainingRecord,
}

impl Training {
    /// Resumes a stage from its record.
    pub(crate) fn new(settings: TrainingSettings, mut record: TrainingRecord) -> Self {
        record.updates = settings.updates.or(record.updates);
        record.had_checkpoints |= !record.checkpoints.is_empty();
        Self { settings, record }
    }

    pub(crate) fn name(&self) -> StageName {
        self.settings.name
    }

    /// The last update of the plan; 0 while that is not known.
    pub(crate) fn last_step(&self) -> Step {
        Step::new(self.record.updates.unwrap_or(0))
    }

    /// Whether anything was trained.
    pub(crate) fn has_begun(&self) -> bool {
        self.record.step > Step::default() || self.record.had_checkpoints
    }

    /// Whether the state after a step is a milestone.
    pub(crate) fn is_milestone(&self, step: Step) -> bool {
        let every = self.settings.milestone_every;
        let on_grid = every > 0 && step.get().is_multiple_of(every);
        step.get() > 0 && (on_grid || step == self.last_step())
    }

    /// Whether each milestone is missing although training has passed its step, newest first. One that was never stored
    /// died with the workers that held it: others had taken over a later state. One that was damaged since counts only if
    /// another stage needs it.
    fn milestones_missing(&self) -> impl Iterator<Item = (Step, bool)> {
        let milestones: Milestones = self.record.checkpoints.iter().collect();
        let stored: BTreeSet<Step> =
            milestones.of(self.name()).iter().copied().map(CheckpointId::step).collect();
        let every = self.settings.milestone_every;
        let steps = self.record.trained.into_iter().flat_map(move |trained| {
            let on_grid = trained.get().checked_div(every).unwrap_or(0);
            let grid = (1..=on_grid).rev().map(move |index| Step::new(index * every));
            std::iter::once(trained).chain(grid.filter(move |step| *step != trained))
        });
        steps.enumerate().map(move |(age, step)| {
            let is_needed = (age as u64) < self.settings.needed_milestones;
            let may_be_gone = step <= self.record.recovered || self.record.damaged.contains(&step);
            (step, !stored.contains(&step) && (is_needed || !may_be_gone))
        })
    }

    /// Whether every update is done and every milestone is stored.
    pub(crate) fn is_stored(&self) -> bool {
        self.record.trained.is_some() && !self.milestones_missing().any(|(_, is_missing)| is_missing)
    }

    /// What the next group has to train again, if anything: the newest milestone that is missing, and those that are
    /// missing right before it. Older ones come later, because no member's state is too new for that.
    pub(crate) fn repair(&self) -> Option<Repair> {
        let newest = self.milestones_missing().skip_while(|(_, is_missing)| !is_missing);
        let milestones: BTreeSet<Step> =
            newest.take_while(|(_, is_missing)| *is_missing).map(|(step, _)| step).collect();
        (!milestones.is_empty()).then_some(Repair { milestones })
    }

    /// Takes the recovery checkpoints that newer ones have replaced, all but the newest two.
    pub(crate) fn retire_recovery(&mut self) -> Vec<CheckpointId> {
        let is_recovery = |kind: &CheckpointKind| *kind == CheckpointKind::Recovery;
        let checkpoints = &mut self.record.checkpoints;
        let recovery: Vec<CheckpointId> =
            checkpoints.iter().filter(|(_, kind)| is_recovery(kind)).map(|(id, _)| *id).collect();
        let retired = recovery[..recovery.len().saturating_sub(2)].to_vec();
        checkpoints.retain(|id, _| !retired.contains(id));
        retired
    }
}
