//! Loops that do nothing but reach the processor's limit of arithmetic.

use ulmus_plan::Precision;

use super::portable;
#[cfg(target_arch = "x86_64")]
use super::{avx512, simd::LANES};

/// About a tenth of a second.
const ITERATIONS: usize = 1 << 24;

/// Does the work and gives its operations, or nothing if the processor has no instruction for it.
pub(crate) fn saturate(precision: Precision) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        let operations = |per_lane: usize| Some((per_lane * avx512::CHAINS * LANES * ITERATIONS) as f64);
        match precision {
            Precision::F32 => {
                if let Some(tile) = avx512::F32::detect() {
                    std::hint::black_box(avx512::saturate_f32(tile, ITERATIONS));
                    return operations(2);
                }
            }
            Precision::Bf16 => {
                if let Some(tile) = avx512::Bf16::detect() {
                    std::hint::black_box(avx512::saturate_bf16(tile, ITERATIONS));
                    return operations(4);
                }
            }
        }
    }
    (precision == Precision::F32).then(|| portable::saturate(ITERATIONS) as f64)
}
