//! Loops that do nothing but saturate the processor's arithmetic or its memory.

#![expect(
    clippy::needless_range_loop,
    reason = "iterator adapters are not always inlined in vectorised code"
)]

use ulmus_backend::BackendError;
use ulmus_plan::Precision;

use super::aligned::Line;
use super::huge_pages::Pages;
use super::portable;
use super::simd::vectorised;
#[cfg(target_arch = "x86_64")]
use super::{avx512, simd::LANES};

/// Iterations that take about a tenth of a second.
const ITERATIONS: usize = 1 << 24;

/// Runs the loop and returns its number of operations, or `None` if the processor has no instruction for this
/// precision.
pub(crate) fn saturate(precision: Precision) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        let operations = |per_lane: usize| Some((per_lane * avx512::CHAINS * LANES * ITERATIONS) as f64);
        match precision {
            Precision::F32 => {
                if let Some(kernel) = avx512::F32::detect() {
                    std::hint::black_box(avx512::saturate_f32(kernel, ITERATIONS));
                    return operations(2);
                }
            }
            Precision::Bf16 => {
                if let Some(kernel) = avx512::Bf16::detect() {
                    std::hint::black_box(avx512::saturate_bf16(kernel, ITERATIONS));
                    return operations(4);
                }
            }
        }
    }
    (precision == Precision::F32).then(|| portable::saturate(ITERATIONS) as f64)
}

/// Memory of the same kind as that of the weights, to measure how fast it is read and copied.
#[derive(Debug)]
pub struct Memory(Pages);

impl Memory {
    /// Allocates `bytes` bytes, rounded up to whole cache lines.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    pub fn new(bytes: usize) -> Result<Self, BackendError> {
        Pages::zeroed(bytes.div_ceil(size_of::<Line>())).map(Self)
    }

    /// Reads all of the memory.
    pub fn read(&self) {
        std::hint::black_box(add_up(&self.0));
    }

    /// Copies the contents of another memory of the same size.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn copy_from(&mut self, other: &Self) {
        self.0.copy_from_slice(&other.0);
    }
}

vectorised! {
    fn add_up(lines: &[Line]) -> u32 {
        const TOGETHER: usize = 4;
        let mut sums = [[0_u32; 16]; TOGETHER];
        for lines in lines.as_chunks::<TOGETHER>().0 {
            for line in 0..TOGETHER {
                prefetch_ahead(&lines[line]);
                for word in 0..16 {
                    sums[line][word] = sums[line][word].wrapping_add(lines[line].0[word]);
                }
            }
        }
        sums.as_flattened().iter().fold(0, |sum, own| sum.wrapping_add(*own))
    }
}

/// Prefetches the line that is as far ahead as in the kernels.
#[inline(always)]
fn prefetch_ahead(line: &Line) {
    let ahead = std::ptr::from_ref(line).wrapping_add(32);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, which does nothing if the address is not valid.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(ahead.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ahead;
}
