//! Loops that do nothing but reach the processor's limits of arithmetic and of memory.

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

/// About a tenth of a second.
const ITERATIONS: usize = 1 << 24;

/// Does the work and gives its operations, or nothing if the processor has no instruction for it.
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

/// Memory as weights are kept in, to measure how fast it is read and copied.
#[derive(Debug)]
pub struct Memory(Pages);

impl Memory {
    /// That many bytes, rounded up to whole cache lines.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    pub fn new(bytes: usize) -> Result<Self, BackendError> {
        Pages::zeroed(bytes.div_ceil(size_of::<Line>())).map(Self)
    }

    /// Reads all of it.
    pub fn read(&self) {
        std::hint::black_box(add_up(&self.0));
    }

    /// Copies all of another of the same size.
    ///
    /// # Panics
    /// If it has another size.
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
                ask_for(&lines[line]);
                for word in 0..16 {
                    sums[line][word] = sums[line][word].wrapping_add(lines[line].0[word]);
                }
            }
        }
        sums.as_flattened().iter().fold(0, |sum, own| sum.wrapping_add(*own))
    }
}

/// Asks for a line some lines ahead, as far as kernels do.
#[inline(always)]
fn ask_for(line: &Line) {
    let ahead = std::ptr::from_ref(line).wrapping_add(32);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, and it does nothing where there is no such memory.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(ahead.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ahead;
}
