//! The loops of the CPU backend, on slices.
//!
//! Parallel loops are cut into blocks of fixed size, and sums over blocks are added in the order of the blocks. So the
//! number of threads decides which thread computes a block, but never what the block contains. Only this module has
//! unsafe code: for vectorised versions ([`simd`]), kernels of the matrix product ([`panel`]), disjoint blocks
//! ([`view`]) and large pages ([`huge_pages`]).

pub(super) mod adapter;
mod aligned;
pub(super) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(super) mod cache;
mod dispatch;
pub(super) mod head;
mod huge_pages;
pub(super) mod linear;
mod matrix;
pub(super) mod norm;
pub(super) mod optimizer;
mod panel;
mod portable;
mod product;
mod q8;
pub(super) mod roofline;
pub(super) mod simd;
pub(super) mod swiglu;
pub(super) mod view;
pub(super) mod weights;

#[cfg(test)]
mod testing {
    /// Random numbers between -1/2 and 1/2.
    pub(super) fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..len).map(|_| next()).collect()
    }
}
