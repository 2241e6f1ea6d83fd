//! Checked matrix views over slices, and their product.
//!
//! Views check their bounds when made, so everything built on them is safe; only [`Shared`] and [`SharedMatrix`] leave
//! a duty to their user: blocks in use at one time do not overlap.

use std::marker::PhantomData;
use std::ops::Range;

use ulmus_plan::Precision;

use super::panel::by_kernel;
use super::product;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// A matrix to read, or the transpose of one.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: *const f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    lifetime: PhantomData<&'a [f32]>,
}

// SAFETY: a shared borrow of plain data.
unsafe impl Send for Matrix<'_> {}
// SAFETY: as above.
unsafe impl Sync for Matrix<'_> {}

impl<'a> Matrix<'a> {
    /// `rows` rows of `columns` elements, `stride` apart, from the start of `data`.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        check(data.len(), rows, columns, stride);
        let data = data.as_ptr();
        Self { data, rows, columns, row_stride: stride, column_stride: 1, lifetime: PhantomData }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Elements from one row to the next, and from one column to the next.
    pub(super) fn strides(&self) -> (usize, usize) {
        (self.row_stride, self.column_stride)
    }

    /// Where an element is; valid to read if it is one.
    pub(super) fn at(&self, row: usize, column: usize) -> *const f32 {
        self.data.wrapping_add(row * self.row_stride + column * self.column_stride)
    }

    /// A row whose elements are adjacent.
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        assert!(row < self.rows && self.column_stride == 1, "row {row} of {}", self.rows);
        // SAFETY: `check` proved that row `row` of `columns` elements lies in the borrowed slice.
        unsafe { std::slice::from_raw_parts(self.at(row, 0), self.columns) }
    }

    /// Some rows.
    pub(super) fn rows_of(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        Self { data: self.at(rows.start, 0), rows: rows.len(), ..self }
    }

    /// Some columns.
    pub(super) fn columns_of(self, columns: Range<usize>) -> Self {
        self.transposed().rows_of(columns).transposed()
    }

    /// The transposed view.
    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix to write.
pub(super) struct MatrixMut<'a> {
    data: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// `rows` rows of `columns` elements, `stride` apart, from the start of `data`.
    pub(super) fn new(data: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        check(data.len(), rows, columns, stride);
        Self { data: data.as_mut_ptr(), rows, columns, stride, lifetime: PhantomData }
    }

    /// The whole matrix for several threads, whose parts are disjoint.
    pub(super) fn shared(&mut self) -> SharedMatrix<'_> {
        SharedMatrix(MatrixMut { lifetime: PhantomData, ..*self })
    }

    /// Sets every element to 0.
    pub(super) fn clear(&mut self) {
        for row in 0..self.rows {
            self.row_mut(row).fill(0.0);
        }
    }

    /// The part of these rows and columns.
    pub(super) fn part_mut(&mut self, rows: Range<usize>, columns: Range<usize>) -> MatrixMut<'_> {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        let data = self.data.wrapping_add(rows.start * self.stride + columns.start);
        MatrixMut { data, rows: rows.len(), columns: columns.len(), lifetime: PhantomData, ..*self }
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// A row.
    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: `check` proved that row `row` of `columns` elements lies in the borrowed slice.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride), self.columns) }
    }
}

/// A matrix whose disjoint parts are written by several threads at once.
pub(super) struct SharedMatrix<'a>(MatrixMut<'a>);

// SAFETY: who follows the pointers of `part` promises that no two threads have the same element.
unsafe impl Sync for SharedMatrix<'_> {}

impl SharedMatrix<'_> {
    /// Where the part of `rows` × `columns` from `row` and `column` on begins, and the distance of its rows.
    pub(super) fn part(&self, row: usize, column: usize, rows: usize, columns: usize) -> (*mut f32, usize) {
        assert!(row + rows <= self.0.rows && column + columns <= self.0.columns);
        (self.0.data.wrapping_add(row * self.0.stride + column), self.0.stride)
    }
}

fn check(len: usize, rows: usize, columns: usize, stride: usize) {
    assert!(rows == 0 || columns <= stride || rows == 1, "rows of {columns} overlap at stride {stride}");
    let end = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * stride + columns };
    assert!(end <= len, "a matrix of {rows} x {columns} at stride {stride} does not fit {len} elements");
}

/// A slice whose disjoint blocks are written by several threads at once.
pub(super) struct Shared<'a> {
    data: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: `block` is the only access, and its contract excludes overlap between threads.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(super) fn new(data: &'a mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), lifetime: PhantomData }
    }

    /// The block of `rows` × `columns` that begins at element `offset`, rows `stride` apart.
    ///
    /// # Safety
    /// No element of the block is in another block that lives at the same time.
    pub(super) unsafe fn block(
        &self,
        offset: usize,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> MatrixMut<'_> {
        check(self.len.saturating_sub(offset), rows, columns, stride);
        MatrixMut { data: self.data.wrapping_add(offset), rows, columns, stride, lifetime: PhantomData }
    }

    /// `len` adjacent elements from `offset` on.
    ///
    /// # Safety
    /// As for [`Shared::block`].
    #[expect(clippy::mut_from_ref, reason = "exclusive by the contract of this function")]
    pub(super) unsafe fn slice(&self, offset: usize, len: usize) -> &mut [f32] {
        check(self.len.saturating_sub(offset), 1, len, len);
        // SAFETY: in bounds by the check, exclusive by the caller's promise, alive for the borrow of `self`.
        unsafe { std::slice::from_raw_parts_mut(self.data.wrapping_add(offset), len) }
    }
}

/// Whether work is spread over the threads of the current pool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    One,
    All,
}

/// What happens to the old contents of a product's output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    Overwrite,
    Accumulate,
}

/// `c = a · b`, in place of or added to what `c` held.
pub(super) fn multiply(
    c: &mut MatrixMut<'_>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    precision: Precision,
    output: Output,
) {
    assert!(
        c.rows == a.rows && a.columns == b.rows && b.columns == c.columns,
        "[{}, {}] · [{}, {}] is not [{}, {}]",
        a.rows,
        a.columns,
        b.rows,
        b.columns,
        c.rows,
        c.columns
    );
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::Bf16 && avx512::Bf16::detect().is_none() {
        if let Some(kernel) = avx512::F32::detect().and_then(avx2::Rounded::detect) {
            return product::multiply(kernel, c, a, b, output);
        }
        if let Some(kernel) = avx2::F32::detect().and_then(avx2::Rounded::detect) {
            return product::multiply(kernel, c, a, b, output);
        }
    }
    by_kernel!(match precision, Precision { F32, Bf16 }, kernel => product::multiply(kernel, c, a, b, output));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::panel::Kernel;
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

    /// A product by one kernel, of operands that are stored either way, beside others' elements.
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
                    // SAFETY: within the view.
                    f64::from(round(unsafe { *view.at(row, column) }))
                };
                let output = [Output::Overwrite, Output::Accumulate][case % 2];
                let mut c = old.clone();
                let into = &mut MatrixMut::new(&mut c, m, n, n + 3);
                product::multiply(kernel, into, left, right, output);
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
        // Sums of k products below 1/4 in float32.
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

    fn product_by<K: Kernel>(kernel: K) -> Vec<u32> {
        let (m, n, k) = (61, 70, 1031);
        let (a, b) = (values(m * k, 1), values(n * k, 2));
        let mut c = vec![f32::NAN; m * n];
        let (a, b) = (Matrix::new(&a, m, k, k), Matrix::new(&b, n, k, k).transposed());
        product::multiply(kernel, &mut MatrixMut::new(&mut c, m, n, n), a, b, Output::Overwrite);
        c.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn every_float32_kernel_gives_the_same_bits() {
        let plain = product_by(portable::F32);
        let widest: Vec<u32> = product(61, 70, 1031, Precision::F32).into_iter().map(f32::to_bits).collect();
        assert_eq!(plain, widest);
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = avx2::F32::detect() {
            assert_eq!(product_by(kernel), plain);
            let rounded = product_by(portable::Bf16);
            assert_eq!(product_by(avx2::Rounded::detect(kernel).unwrap()), rounded);
            if let Some(kernel) = avx2::Bf16::detect() {
                assert_eq!(product_by(kernel), rounded);
            }
            if let Some(kernel) = avx512::F32::detect() {
                assert_eq!(product_by(avx2::Rounded::detect(kernel).unwrap()), rounded);
            }
        }
    }

    #[test]
    fn nan_and_infinity_come_through() {
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
    #[should_panic(expected = "does not fit")]
    fn a_view_outside_its_slice_is_refused() {
        let _ = Matrix::new(&[0.0; 7], 2, 4, 4);
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
