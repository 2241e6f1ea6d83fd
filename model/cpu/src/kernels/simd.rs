//! Loops that the compiler vectorises, compiled once per instruction set from the same source.
//!
//! There are no intrinsics. Every operation used here is correctly rounded on each instruction set (additions and
//! products are fused only where `mul_add` is written), so all versions of a kernel give the same bits.

#[cfg(target_arch = "x86_64")]
use std::sync::LazyLock;

/// The instruction sets that kernels are compiled for.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Baseline,
    Avx2,
    Avx512,
}

/// The environment variable that limits the level to `baseline`, `avx2` or `avx512`, to test the narrower ones.
#[cfg(target_arch = "x86_64")]
const LIMIT: &str = "ULMUS_SIMD";

/// The widest level that this CPU has, unless the environment limits it.
///
/// # Panics
/// If the limit is unknown, or more than the CPU has.
#[cfg(target_arch = "x86_64")]
pub(crate) fn level() -> Level {
    static LEVEL: LazyLock<Level> = LazyLock::new(|| {
        let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        let widest = match (fma, avx512) {
            (true, true) => Level::Avx512,
            (true, false) => Level::Avx2,
            (false, _) => Level::Baseline,
        };
        let Ok(name) = std::env::var(LIMIT) else { return widest };
        let levels = [("baseline", Level::Baseline), ("avx2", Level::Avx2), ("avx512", Level::Avx512)];
        let asked = levels.iter().find(|(known, level)| *known == name && *level <= widest);
        assert!(
            asked.is_some(),
            "{LIMIT} is `{name}`; set it to baseline, avx2 or avx512, up to {widest:?} on this CPU"
        );
        asked.map_or(widest, |(_, level)| *level)
    });
    *LEVEL
}

/// Defines a function whose body is compiled for each instruction set. A call runs the widest version that the CPU
/// supports. Functions that the body calls must be `#[inline(always)]`.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<const $flag:ident: bool>)?($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<const $flag: bool>)?($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn any $(<const $flag: bool>)?($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::kernels::simd::{Level, level};

                #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<const $flag: bool>)?($($arg: $ty),*) $(-> $ret)? {
                    any $(::<$flag>)?($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<const $flag: bool>)?($($arg: $ty),*) $(-> $ret)? {
                    any $(::<$flag>)?($($arg),*)
                }
                match level() {
                    // SAFETY: `level` has found AVX2, FMA and these parts of AVX-512 on this CPU.
                    Level::Avx512 => unsafe { avx512 $(::<$flag>)?($($arg),*) },
                    // SAFETY: `level` has found AVX2 and FMA on this CPU.
                    Level::Avx2 => unsafe { avx2 $(::<$flag>)?($($arg),*) },
                    Level::Baseline => any $(::<$flag>)?($($arg),*),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            any $(::<$flag>)?($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// Number of partial sums that reductions keep side by side. It is part of the definition of every reduction's bits.
pub(crate) const LANES: usize = 16;

/// The sum of partial sums: the upper half is added to the lower half until one is left.
// The black box keeps the compiler from cutting the loop before it into the pairs that are added here, so that it is
// vectorised on its own.
#[inline(always)]
pub(crate) fn total(sums: [f32; LANES]) -> f32 {
    let mut sums = std::hint::black_box(sums);
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// `Σ f(a[i], b[i])` over [`LANES`] interleaved partial sums, which [`total`] adds.
// There are arrays and indices because iterator adapters are not inlined here, and a call costs more than a chunk.
#[inline(always)]
fn lanes2(a: &[f32], b: &[f32], mut f: impl FnMut(f32, f32, f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let chunks = a_chunks.len().min(b_chunks.len());
    for chunk in 0..chunks {
        let (a, b) = (&a_chunks[chunk], &b_chunks[chunk]);
        for i in 0..LANES {
            sums[i] = f(a[i], b[i], sums[i]);
        }
    }
    let mut sum = total(sums);
    for i in 0..a_rest.len().min(b_rest.len()) {
        sum = f(a_rest[i], b_rest[i], sum);
    }
    sum
}

/// `Σ a[i] · b[i]`.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    lanes2(a, b, f32::mul_add)
}

/// `Σ (x[i] − mean)²`. With a mean of zero, this has the same bits as `dot(x, x)`.
#[inline(always)]
pub(crate) fn squares_about(mean: f32, x: &[f32]) -> f32 {
    lanes2(x, x, |a, b, sum| (a - mean).mul_add(b - mean, sum))
}

/// `Σ x[i]`.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    lanes2(x, x, |x, _, sum| sum + x)
}

/// The largest element, or negative infinity if there is none.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(chunk[i], lanes[i]);
        }
    }
    let mut most = f32::NEG_INFINITY;
    for lane in lanes {
        most = larger(lane, most);
    }
    for x in rest {
        most = larger(*x, most);
    }
    most
}

/// `y += a · x`.
#[inline(always)]
pub(crate) fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

/// `e^x` with a relative error of at most 2e-7 for |x| < 87, and clamped outside. It has no branches, so that loops over it
/// vectorise. NaN stays NaN. (The range is reduced by ln 2 in two parts; then follows a polynomial of degree 7, as in
/// Cephes.)
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Floats between 2^23 and 2^24 are integers, so adding this rounds and leaves the integer in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUNDER;
    let power = shifted - ROUNDER;
    let r = power.mul_add(-LN2_LOW, power.mul_add(-LN2_HIGH, x));
    let mut p = 1.987_569_1e-4_f32;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, coefficient);
    }
    let fraction = (p * r).mul_add(r, r) + 1.0;
    f32::from_bits(fraction.to_bits().wrapping_add(shifted.to_bits() << 23))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    vectorised! {
        fn exp_all(x: &mut [f32]) {
            for x in x {
                *x = exp(*x);
            }
        }
    }

    #[test]
    fn exp_is_close_and_keeps_its_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1000.0) < 2e-38);
        assert!(exp(1000.0) > 1e38);
        assert!(exp(f32::NAN).is_nan());
    }

    proptest! {
        #[test]
        fn exp_agrees_with_f64(x in -86f32..87.0) {
            let reference = f64::from(x).exp();
            prop_assert!((f64::from(exp(x)) - reference).abs() <= 2e-7 * reference);
        }

        /// The version for this CPU's widest vectors gives the same bits as the plain one.
        #[test]
        fn every_level_gives_the_same_bits(x in prop::collection::vec(-50f32..50.0, 0..70)) {
            let mut wide = x.clone();
            exp_all(&mut wide);
            let plain: Vec<f32> = x.iter().map(|x| exp(*x)).collect();
            prop_assert_eq!(wide, plain);
        }

        #[test]
        fn reductions_cover_every_length(x in prop::collection::vec(-4f32..4.0, 1..70)) {
            let y: Vec<f32> = x.iter().map(|x| x + 1.0).collect();
            let reference: f64 = x.iter().zip(&y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            prop_assert!((f64::from(dot(&x, &y)) - reference).abs() < 1e-3);
            prop_assert!((f64::from(sum(&x)) - x.iter().map(|x| f64::from(*x)).sum::<f64>()).abs() < 1e-3);
            prop_assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
