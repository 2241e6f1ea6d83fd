//! What every backend must compute: its kernels against plain implementations in f64 ([`kernels`]), and inference against
//! another backend's ([`inference`]), whole models against the reference's numbers ([`reference`]). It is equipment of the backends' tests, and panics as tests do.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub mod inference;
pub mod kernels;
pub mod reference;

/// L2 norm of the difference, relative to the norm of the reference.
pub fn relative_l2(found: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(found.len(), reference.len());
    let square = |x: f64| x * x;
    let difference: f64 =
        found.iter().zip(reference).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = reference.iter().map(|x| square(f64::from(*x))).sum();
    (difference / norm.max(1e-60)).sqrt()
}
