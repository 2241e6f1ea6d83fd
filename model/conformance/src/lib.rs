//! Tests that every backend must pass: [`kernels`] compares kernels with plain implementations in f64, [`inference`]
//! compares inference between backends, and [`reference`] provides the reference's numbers for whole models. The crate
//! is meant for tests, so it panics like tests.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub mod inference;
pub mod kernels;
pub mod reference;

/// The L2 norm of the difference, relative to that of the reference.
pub fn relative_l2(found: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(found.len(), reference.len());
    let square = |x: f64| x * x;
    let difference: f64 =
        found.iter().zip(reference).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = reference.iter().map(|x| square(f64::from(*x))).sum();
    (difference / norm.max(1e-60)).sqrt()
}
