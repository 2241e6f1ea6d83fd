//! Draws the examples that stand before a question.

use minijinja::value::Value;

use super::definition::{Choice, Definition, Revision};
use super::rows::Split;
use crate::error::EvaluatorError;
use crate::python::random::Random;

/// The examples of a task, drawn row by row in the order of the split.
///
/// One generator serves all rows, so that the examples of a row depend on how many were drawn before, as in the harness
/// on one device.
#[derive(Debug)]
pub(crate) struct Examples {
    pool: Split,
    count: usize,
    sampler: Choice,
    random: Random,
    /// Whether the row itself may be among the examples, so that one more is drawn and the row is dropped.
    may_be_row: bool,
    revision: Revision,
}

impl Examples {
    /// Prepares `count` examples per row from `pool`. `split` is the split of the examples that the user has named.
    ///
    /// # Errors
    /// [`EvaluatorError::Shots`] if the pool is too small.
    pub(crate) fn new(
        task: &Definition,
        pool: Split,
        count: usize,
        split: Option<&str>,
        seed: u64,
        revision: Revision,
    ) -> Result<Self, EvaluatorError> {
        let named = split.or(task.fewshot_split.as_deref());
        // That neither names a split counts as naming the same, even where the examples are from another.
        let may_be_row = named == task.test.as_deref();
        let wanted = count.saturating_add(usize::from(may_be_row));
        if pool.rows.len() < wanted {
            let (have, split) = (pool.rows.len(), pool.name);
            return Err(EvaluatorError::Shots { task: task.name.clone(), split, have, wanted });
        }
        Ok(Self { pool, count, sampler: task.sampler, random: Random::new(seed), may_be_row, revision })
    }

    /// The examples of the next row, by their numbers in the pool.
    pub(crate) fn draw(&mut self, row: &Value) -> Vec<usize> {
        let earlier = self.revision == Revision::Dc90fec;
        let wanted = self.count + usize::from(self.may_be_row);
        let others =
            |pool: &[Value]| -> Vec<usize> { (0..pool.len()).filter(|index| pool[*index] != *row).collect() };
        let mut drawn = match self.sampler {
            Choice::Random => self.random.sample(self.pool.rows.len(), wanted),
            Choice::FirstN if self.may_be_row && !earlier => others(&self.pool.rows),
            Choice::FirstN => (0..wanted).collect(),
        };
        if self.may_be_row || earlier {
            drawn.retain(|index| self.pool.rows[*index] != *row);
        }
        if drawn.len() < self.count && self.may_be_row && !earlier && self.sampler == Choice::Random {
            let others = others(&self.pool.rows);
            if others.len() >= self.count {
                let again = self.random.sample(others.len(), self.count);
                drawn = again.into_iter().map(|index| others[index]).collect();
            }
        }
        drawn.truncate(self.count);
        drawn
    }

    /// A row of the pool.
    pub(crate) fn row(&self, index: usize) -> &Value {
        &self.pool.rows[index]
    }

    /// What the examples are drawn from.
    pub(crate) fn pool(&self) -> &Split {
        &self.pool
    }
}
