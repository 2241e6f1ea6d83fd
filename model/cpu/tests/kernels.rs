//! Tests the CPU's kernels: the conformance tests of every backend, and promises that only the CPU makes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use ulmus_backend::{Heads, LinearShape, TrainingBackend as _};
use ulmus_conformance::kernels::{Device, PackedRows, all, assert_close, conform, pass_norm, random, wide};
use ulmus_cpu::Cpu;
use ulmus_plan::NormKind;
use ulmus_plan::ROW_BLOCK;
use ulmus_types::Digest;

#[test]
fn cpu_with_one_thread_conforms() {
    conform(Cpu::new(1));
}

#[test]
fn cpu_with_three_threads_conforms() {
    conform(Cpu::new(3));
}

/// All results of a kind of norm, on enough rows for several threads, and on heads.
fn all_of_norms(threads: usize, kind: NormKind) -> Vec<f32> {
    let device = Device(Cpu::new(threads));
    let (rows, d) = (5 * ROW_BLOCK + 1, 101);
    let (x, weight, upstream) = (random(rows * d, 1), random(d, 2), random(rows * d, 3));
    let heads = Heads { query: 3, key_value: 1, width: 22 };
    let of_rows = pass_norm(&device, kind, [&x, &weight, &upstream], Some(&x));
    let of_heads = PackedRows::random(heads, 2, 3 * ROW_BLOCK - 1).pass(&device, kind);
    [of_rows, of_heads].concat().concat()
}

/// The digests hold for every instruction set, because the same test runs with `ULMUS_SIMD`.
#[test]
fn norms_have_the_same_bits_for_any_number_of_threads() {
    for (kind, bits) in [
        (NormKind::Rms, "80c77880d546"),
        (NormKind::NaiveRms, "930f5f148305"),
        (NormKind::Layer, "6c6cc619490e"),
    ] {
        for threads in [1, 2, 3] {
            let found = Digest::of(bytemuck::cast_slice(&all_of_norms(threads, kind)));
            assert_eq!(found.short(), bits, "{}, {threads} threads", kind.name());
        }
    }
}

#[test]
fn naive_and_fused_rms_norms_differ_by_rounding_alone() {
    let (naive, fused) = (all_of_norms(2, NormKind::NaiveRms), all_of_norms(2, NormKind::Rms));
    // The tolerance allows for a few operations, each with a relative rounding error of 2^-24.
    assert_close("naive norms", &naive, &wide(&fused), 3e-7);
}

/// NaN makes its row, its row's gradient and the gradient of the weights NaN, and nothing else.
#[test]
fn norms_propagate_nan() {
    let device = Device(Cpu::new(2));
    let (rows, d, bad) = (ROW_BLOCK + 3, 18, ROW_BLOCK + 1);
    let (mut x, weight, upstream) = (random(rows * d, 1), random(d, 2), random(rows * d, 3));
    x[bad * d + 5] = f32::NAN;
    let heads = Heads { query: 2, key_value: 1, width: 18 };
    let mut packed = PackedRows::random(heads, 1, rows);
    let width = heads.packed_width();
    packed.packed[bad * width + heads.width + 5] = f32::NAN;
    for kind in NormKind::ALL {
        let [out, x_gradient, weight_gradient] = pass_norm(&device, kind, [&x, &weight, &upstream], None);
        for values in [out, x_gradient] {
            let wrong = |(row, values): (usize, &[f32])| values.iter().any(|x| x.is_nan() != (row == bad));
            assert!(!values.chunks(d).enumerate().any(wrong), "{}", kind.name());
        }
        assert!(weight_gradient.iter().all(|x| x.is_nan()), "{}", kind.name());

        let [out, gradient, weights_gradient] = packed.pass(&device, kind);
        for values in [out, gradient] {
            let bad = bad * (width / heads.width) + 1;
            let wrong = |(head, values): (usize, &[f32])| values.iter().any(|x| x.is_nan() != (head == bad));
            assert!(!values.chunks(heads.width).enumerate().any(wrong), "heads, {}", kind.name());
        }
        let (queries, keys) = weights_gradient.split_at(heads.width);
        assert!(queries.iter().all(|x| x.is_nan()) && !keys.iter().any(|x| x.is_nan()), "{}", kind.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Products of any shape agree with f64, whichever path they take inside.
    #[test]
    fn linear_of_any_shape(rows in 1usize..70, inputs in 1usize..70, outputs in 1usize..140) {
        let device = Device(Cpu::new(1));
        let (x, weight) = (random(rows * inputs, 1), random(outputs * inputs, 2));
        let (x_, weight_) = (device.put(&x), device.put(&weight));
        let out = device.fill(rows * outputs, |out| {
            let shape = LinearShape { rows, inputs, outputs };
            device.0.linear(out, all(&x_, rows * inputs), all(&weight_, outputs * inputs), shape, false);
        });
        for (row, out) in out.chunks(outputs).enumerate() {
            for (output, found) in out.iter().enumerate() {
                let (x, w) = (&x[row * inputs..][..inputs], &weight[output * inputs..][..inputs]);
                let expected: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                prop_assert!((f64::from(*found) - expected).abs() < 1e-4);
            }
        }
    }
}
