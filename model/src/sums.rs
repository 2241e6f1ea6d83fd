//! The exact sums of gradients over micro-batches.

use std::ops::Range;

use ulmus_backend::{Out, TrainingBackend, ViewMut};

use crate::error::ModelError;
use crate::params::Trainable;

/// Exact sums of gradients, one integer per trained parameter.
#[derive(Debug)]
pub struct Sums<B: TrainingBackend> {
    pub(crate) values: B::Buffer<i64>,
    len: usize,
    /// Whether the values are stale, to be overwritten by the next gradient.
    pub(crate) cleared: bool,
}

impl<B: TrainingBackend> Sums<B> {
    /// Allocates sums for these parameters.
    ///
    /// # Errors
    /// [`ModelError::Backend`].
    pub fn new(backend: &B, trainable: &Trainable) -> Result<Self, ModelError> {
        let len = trainable.parameters();
        Ok(Self { values: backend.allocate(len)?, len, cleared: true })
    }

    /// Begins a new sum: the next gradient replaces the values instead of being added.
    pub fn clear(&mut self) {
        self.cleared = true;
    }

    /// All sums, to which at least one gradient has been added.
    ///
    /// # Panics
    /// If no gradient was added.
    pub fn values(&mut self) -> Out<'_, B, i64> {
        self.part(0..self.len)
    }

    /// A range of the sums.
    ///
    /// # Panics
    /// If no gradient was added.
    pub fn part(&mut self, range: Range<usize>) -> Out<'_, B, i64> {
        assert!(!self.cleared, "a gradient was added");
        ViewMut::new(&mut self.values, range)
    }
}
