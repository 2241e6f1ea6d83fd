//! Immutable, verified checkpoint directories
