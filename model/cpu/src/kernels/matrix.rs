//! The matrix product, by the fastest kernel for its precision.

use ulmus_plan::Precision;

#[cfg(target_arch = "x86_64")]
use super::avx2::{self, Rounded};
#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::dispatch::{by_kernel, pack_right};
use super::panel::Kernel;
use super::product;
use super::view::{Matrix, MatrixMut, Output};

/// `c = a · b` or `c += a · b`, depending on `output`.
pub(super) fn multiply(
    c: &mut MatrixMut<'_>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    precision: Precision,
    output: Output,
) {
    assert!(
        c.rows() == a.rows() && a.columns() == b.rows() && b.columns() == c.columns(),
        "[{}, {}] · [{}, {}] is not [{}, {}]",
        a.rows(),
        a.columns(),
        b.rows(),
        b.columns(),
        c.rows(),
        c.columns()
    );
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::Bf16 && avx512::Bf16::detect().is_none() {
        if let Some(kernel) = avx512::F32::detect().and_then(Rounded::detect) {
            return multiply_rounded(kernel, c, a, b, output);
        }
        if let Some(kernel) = avx2::F32::detect().and_then(Rounded::detect) {
            return multiply_rounded(kernel, c, a, b, output);
        }
    }
    by_kernel!(match precision, Precision { F32, Bf16 }, kernel => multiply_by(kernel, c, a, b, output));
}

#[cfg(target_arch = "x86_64")]
fn multiply_rounded<K: Kernel>(
    kernel: Rounded<K>,
    c: &mut MatrixMut<'_>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    output: Output,
) {
    product::multiply(kernel, |to, lanes| kernel.pack_right(to, lanes), c, a, b, output);
}

fn multiply_by<K: Kernel>(kernel: K, c: &mut MatrixMut<'_>, a: Matrix<'_>, b: Matrix<'_>, output: Output) {
    product::multiply(kernel, |to, lanes| pack_right(K::FORMAT, to, lanes), c, a, b, output);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::portable;
    use crate::kernels::testing::values;

    fn product(m: usize, n: usize, k: usize, precision: Precision) -> Vec<f32> {
        let (a, b) = (values(m * k, 1), values(n * k, 2));
        let mut c = vec![f32::NAN; m * n];
        multiply(
            &mut MatrixMut::new(&mut c, m, n, n),
            Matrix::new(&a, m, k, k),
            Matrix::new(&b, n, k, k).transposed(),
            precision,
            Output::Overwrite,
        );
        c
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let threads = |count| rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
        let (one, four) = (threads(1), threads(4));
        for (m, n, k) in
            [(1, 300, 192), (7, 5, 3), (64, 64, 64), (256, 512, 128), (300, 700, 1500), (65, 4096, 192)]
        {
            for precision in [Precision::F32, Precision::Bf16] {
                let one = one.install(|| product(m, n, k, precision));
                let many = four.install(|| product(m, n, k, precision));
                assert!(one.iter().zip(&many).all(|(a, b)| a.to_bits() == b.to_bits()), "{m}x{n}x{k}");
            }
        }
    }

    /// Tests a kernel with operands that are transposed or not, and an output that is part of a larger matrix.
    fn kernel_agrees<K: Kernel>(kernel: K, round: fn(f32) -> f32, tolerance: f64) {
        let shapes =
            [(1, 1, 1), (3, 5, 2), (14, 32, 16), (15, 33, 17), (61, 70, 33), (29, 300, 1030), (200, 40, 513)];
        for (case, (m, n, k)) in shapes.into_iter().enumerate() {
            let (a, b, old) = (values(m * k, 1), values(n * k, 2), values(m * (n + 3), 3));
            for (left_turned, right_turned) in [(false, false), (false, true), (true, false), (true, true)] {
                let view = |data, rows, columns, turned| {
                    if turned {
                        Matrix::new(data, columns, rows, rows).transposed()
                    } else {
                        Matrix::new(data, rows, columns, columns)
                    }
                };
                let (left, right) = (view(&a, m, k, left_turned), view(&b, k, n, right_turned));
                let at = |view: &Matrix<'_>, row, column| {
                    // SAFETY: the loops below stay within the view's rows and columns.
                    f64::from(round(unsafe { *view.at(row, column) }))
                };
                let output = [Output::Overwrite, Output::Accumulate][case % 2];
                let mut c = old.clone();
                let into = &mut MatrixMut::new(&mut c, m, n, n + 3);
                multiply_by(kernel, into, left, right, output);
                for row in 0..m {
                    for column in 0..n + 3 {
                        let (new, old) = (c[row * (n + 3) + column], old[row * (n + 3) + column]);
                        if column >= n {
                            assert_eq!(new.to_bits(), old.to_bits(), "an element outside was written");
                            continue;
                        }
                        let sum: f64 =
                            (0..k).map(|depth| at(&left, row, depth) * at(&right, depth, column)).sum();
                        let before = if output == Output::Accumulate { f64::from(old) } else { 0.0 };
                        let expected = before + sum;
                        let error = (f64::from(new) - expected).abs();
                        assert!(
                            error <= tolerance * (k as f64).sqrt(),
                            "{m}x{n}x{k} at {row}, {column}: {new}, not {expected}"
                        );
                    }
                }
            }
        }
    }

    fn rounded(x: f32) -> f32 {
        half::bf16::from_f32(x).to_f32()
    }

    #[test]
    fn every_kernel_agrees_with_f64() {
        // The tolerance is for sums of k products below 1/4 in float32.
        kernel_agrees(portable::F32, |x| x, 1e-6);
        kernel_agrees(portable::Bf16, rounded, 1e-6);
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(kernel) = avx512::F32::detect() {
                kernel_agrees(kernel, |x| x, 1e-6);
            }
            if let Some(kernel) = avx512::Bf16::detect() {
                kernel_agrees(kernel, rounded, 1e-6);
            }
            if let Some(kernel) = avx2::F32::detect() {
                kernel_agrees(kernel, |x| x, 1e-6);
            }
            if let Some(kernel) = avx2::Bf16::detect() {
                kernel_agrees(kernel, rounded, 1e-6);
            }
        }
    }

    fn product_by(multiply: impl FnOnce(&mut MatrixMut<'_>, Matrix<'_>, Matrix<'_>)) -> Vec<u32> {
        let (m, n, k) = (61, 70, 1031);
        let (a, b) = (values(m * k, 1), values(n * k, 2));
        let mut c = vec![f32::NAN; m * n];
        let (a, b) = (Matrix::new(&a, m, k, k), Matrix::new(&b, n, k, k).transposed());
        multiply(&mut MatrixMut::new(&mut c, m, n, n), a, b);
        c.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn every_float32_kernel_gives_the_same_bits() {
        fn by<K: Kernel>(kernel: K) -> Vec<u32> {
            product_by(|c, a, b| multiply_by(kernel, c, a, b, Output::Overwrite))
        }
        #[cfg(target_arch = "x86_64")]
        fn rounded_by<K: Kernel>(kernel: K) -> Vec<u32> {
            let kernel = Rounded::detect(kernel).unwrap();
            product_by(|c, a, b| multiply_rounded(kernel, c, a, b, Output::Overwrite))
        }
        let plain = by(portable::F32);
        let widest: Vec<u32> = product(61, 70, 1031, Precision::F32).into_iter().map(f32::to_bits).collect();
        assert_eq!(plain, widest);
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = avx2::F32::detect() {
            assert_eq!(by(kernel), plain);
            let rounded = by(portable::Bf16);
            assert_eq!(rounded_by(kernel), rounded);
            if let Some(kernel) = avx2::Bf16::detect() {
                assert_eq!(by(kernel), rounded);
            }
            if let Some(kernel) = avx512::F32::detect() {
                assert_eq!(rounded_by(kernel), rounded);
            }
        }
    }

    #[test]
    fn nan_and_infinity_propagate() {
        for precision in [Precision::F32, Precision::Bf16] {
            for (bad, expected) in [(f32::NAN, f32::NAN), (f32::INFINITY, f32::INFINITY)] {
                let (mut a, b, mut c) = (vec![1.0; 15 * 7], vec![1.0; 7 * 33], vec![0.0; 15 * 33]);
                a[3 * 7 + 6] = bad;
                let view = &mut MatrixMut::new(&mut c, 15, 33, 33);
                let (a, b) = (Matrix::new(&a, 15, 7, 7), Matrix::new(&b, 7, 33, 33));
                multiply(view, a, b, precision, Output::Overwrite);
                for (row, c) in c.chunks_exact(33).enumerate() {
                    let wanted = if row == 3 { expected } else { 7.0 };
                    assert!(c.iter().all(|c| c.total_cmp(&wanted).is_eq() || c.is_nan() && wanted.is_nan()));
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "is not")]
    fn shapes_that_do_not_fit_are_refused() {
        let (a, mut c) = ([0.0; 6], [0.0; 4]);
        let a = Matrix::new(&a, 2, 3, 3);
        let c = &mut MatrixMut::new(&mut c, 2, 2, 2);
        multiply(c, a, a, Precision::F32, Output::Overwrite);
    }
}
