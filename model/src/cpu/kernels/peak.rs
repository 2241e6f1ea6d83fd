//! Loops that do nothing but reach the processor's limit of arithmetic.

use std::hint::black_box;

use ulmus_plan::Precision;

use super::simd::{LANES, vectorised};

/// About a tenth of a second.
const ITERATIONS: usize = 1 << 24;
/// Independent sums, enough to hide the latency of two multiply-adds per cycle.
pub(super) const CHAINS: usize = 12;

/// Does the work and gives its operations, or nothing if the processor has no instruction for it.
pub(crate) fn saturate(precision: Precision) -> Option<f64> {
    match precision {
        Precision::F32 => {
            black_box(multiply_add(black_box(0.999)));
            Some((2 * CHAINS * LANES * ITERATIONS) as f64)
        }
        Precision::Bf16 => {
            #[cfg(target_arch = "x86_64")]
            if let Some(tile) = super::avx512::Bf16::detect() {
                black_box(super::avx512::saturate(tile, ITERATIONS));
                return Some((4 * CHAINS * LANES * ITERATIONS) as f64);
            }
            None
        }
    }
}

vectorised! {
    fn multiply_add(factor: f32) -> f32 {
        let mut chains = [[1f32; LANES]; CHAINS];
        for _ in 0..ITERATIONS {
            for chain in &mut chains {
                for sum in chain {
                    *sum = sum.mul_add(factor, 0.001);
                }
            }
        }
        let mut total = 0.0;
        for chain in chains {
            for sum in chain {
                total += sum;
            }
        }
        total
    }
}
