//! The loops of the CPU backend, on slices.
//!
//! Parallel loops are cut into blocks of fixed size, and sums over blocks are joined in the order of the blocks:
//! the number of threads decides who computes a block, never what it contains. This is the only part of the crate
//! with unsafe code: vectorised versions ([`simd`]), tiles of the matrix product ([`tile`]) and disjoint blocks
//! ([`matrix`]).

pub(super) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(super) mod cache;
pub(super) mod head;
pub(super) mod linear;
mod lines;
pub(super) mod matrix;
pub(super) mod norm;
pub(super) mod optimizer;
mod pages;
pub(super) mod peak;
mod product;
mod rows;
#[cfg(target_arch = "x86_64")]
mod rows_avx512;
pub(super) mod simd;
pub(super) mod swiglu;
mod tile;
pub(super) mod weights;
