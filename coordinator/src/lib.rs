//! The coordinator: one writer of a run's state
