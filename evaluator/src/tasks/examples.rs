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
    pool: Vec<Value>,
    count: usize,
    sampler: Choice,
    random: Random,
    /// One more is drawn, as the row itself may be among them.
    one_more: bool,
    /// Whether the row itself is no example of its own.
    drops_row: bool,
    /// Whether too few that are left are replaced.
    replaces: bool,
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
        let one_more = task.sampler == Choice::Random && named == task.test.as_deref();
        let wanted = count + usize::from(one_more);
        if pool.rows.len() < wanted {
            let (have, split) = (pool.rows.len(), pool.name);
            return Err(EvaluatorError::Shots { task: task.name.clone(), split, have, wanted });
        }
        let earlier = revision == Revision::Dc90fec;
        Ok(Self {
            pool: pool.rows,
            count,
            sampler: task.sampler,
            random: Random::new(seed),
            one_more,
            drops_row: one_more || earlier && task.sampler == Choice::Random,
            replaces: !earlier,
        })
    }

    /// The examples of the next row.
    pub(crate) fn draw(&mut self, row: &Value) -> Vec<&Value> {
        if self.sampler == Choice::FirstN {
            return self.pool[..self.count].iter().collect();
        }
        let mut drawn = self.random.sample(self.pool.len(), self.count + usize::from(self.one_more));
        if self.drops_row {
            drawn.retain(|index| self.pool[*index] != *row);
            if drawn.len() < self.count && self.replaces {
                let others: Vec<usize> =
                    (0..self.pool.len()).filter(|index| self.pool[*index] != *row).collect();
                if others.len() >= self.count {
                    let again = self.random.sample(others.len(), self.count);
                    drawn = again.into_iter().map(|index| others[index]).collect();
                }
            }
            drawn.truncate(self.count);
        }
        drawn.into_iter().map(|index| &self.pool[index]).collect()
    }
}
