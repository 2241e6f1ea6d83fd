//! Checked matrix views over slices, and their product.
//!
//! The one place where pointers are handed to the crate `gemm`. Views check their bounds when made, so everything
//! built on them is safe; only [`Shared`] leaves a duty to its user: blocks in use at one time do not overlap.

use std::marker::PhantomData;

use gemm::Parallelism;

/// A matrix to read, with any strides.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: *const f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    lifetime: PhantomData<&'a [f32]>,
}

impl<'a> Matrix<'a> {
    /// `rows` rows of `columns` elements, `stride` apart, from the start of `data`.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        check(data.len(), rows, columns, stride);
        let data = data.as_ptr();
        Self { data, rows, columns, row_stride: stride, column_stride: 1, lifetime: PhantomData }
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

    /// Sets every element to 0.
    pub(super) fn clear(&mut self) {
        for row in 0..self.rows {
            // SAFETY: `check` proved that row `row` of `columns` elements lies in the borrowed slice.
            unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride), self.columns) }
                .fill(0.0);
        }
    }

    /// The first `rows` rows.
    pub(super) fn first_rows(&mut self, rows: usize) -> MatrixMut<'_> {
        assert!(rows <= self.rows, "{rows} of {} rows", self.rows);
        MatrixMut { rows, lifetime: PhantomData, ..*self }
    }

    /// The rows from `row` on.
    pub(super) fn rows_from(&mut self, row: usize) -> MatrixMut<'_> {
        assert!(row <= self.rows, "row {row} of {}", self.rows);
        // With no row left the pointer may lie behind the slice, but then it is never followed.
        let data = self.data.wrapping_add(row * self.stride);
        MatrixMut { data, rows: self.rows - row, lifetime: PhantomData, ..*self }
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

/// What happens to the old contents of a product's output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    Overwrite,
    Accumulate,
}

/// `c = scale · a · b`, added to or in place of what `c` held.
///
/// `gemm` cuts the inner dimension by shape alone, so the bits are the same for any number of threads.
pub(super) fn multiply(
    c: &mut MatrixMut<'_>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    scale: f32,
    output: Output,
    threads: Parallelism,
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
    // SAFETY: each view was checked against its slice when made, the shapes agree, `c` is exclusively borrowed and
    // cannot overlap `a` or `b`, which are shared borrows. `gemm` reads `c` only if it accumulates.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.data,
            1,
            c.stride as isize,
            output == Output::Accumulate,
            a.data,
            a.column_stride as isize,
            a.row_stride as isize,
            b.data,
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

/// All threads of the current pool.
pub(super) fn all_threads() -> Parallelism {
    match rayon::current_num_threads() {
        1 => Parallelism::None,
        threads => Parallelism::Rayon(threads),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..len).map(|_| next()).collect()
    }

    fn product(m: usize, n: usize, k: usize, threads: Parallelism) -> Vec<f32> {
        let (a, b) = (values(m * k, 1), values(n * k, 2));
        let mut c = vec![f32::NAN; m * n];
        multiply(
            &mut MatrixMut::new(&mut c, m, n, n),
            Matrix::new(&a, m, k, k),
            Matrix::new(&b, n, k, k).transposed(),
            1.0,
            Output::Overwrite,
            threads,
        );
        c
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        for (m, n, k) in
            [(1, 300, 192), (7, 5, 3), (64, 64, 64), (256, 512, 128), (300, 700, 1500), (65, 4096, 192)]
        {
            let one = product(m, n, k, Parallelism::None);
            for threads in 2..=4 {
                let many = pool.install(|| product(m, n, k, Parallelism::Rayon(threads)));
                assert!(
                    one.iter().zip(&many).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{m}x{n}x{k}, {threads} threads"
                );
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
        multiply(&mut MatrixMut::new(&mut c, 2, 2, 2), a, a, 1.0, Output::Overwrite, Parallelism::None);
    }
}
