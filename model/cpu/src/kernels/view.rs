//! Checked matrix views over slices.
//!
//! Views check their bounds when they are created, so everything built on them is safe. Only [`Shared`] and
//! [`SharedMatrix`] leave an obligation to their user: blocks in use at the same time must not overlap.

use std::marker::PhantomData;
use std::ops::Range;

/// A read-only matrix, possibly transposed.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: *const f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    lifetime: PhantomData<&'a [f32]>,
}

// SAFETY: a view is a shared borrow of plain data, which threads may hand over.
unsafe impl Send for Matrix<'_> {}
// SAFETY: a view is a shared borrow of plain data, which threads may read at the same time.
unsafe impl Sync for Matrix<'_> {}

impl<'a> Matrix<'a> {
    /// A view of `rows` × `columns` elements from the start of `data`, with rows `stride` elements apart.
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

    /// Distances from one row to the next and from one column to the next, in elements.
    pub(super) fn strides(&self) -> (usize, usize) {
        (self.row_stride, self.column_stride)
    }

    /// Address of an element. It is valid for reads if the element is within the matrix.
    pub(super) fn at(&self, row: usize, column: usize) -> *const f32 {
        self.data.wrapping_add(row * self.row_stride + column * self.column_stride)
    }

    /// A row as a slice. Its elements must be adjacent, so the matrix must not be transposed.
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        assert!(row < self.rows && self.column_stride == 1, "row {row} of {}", self.rows);
        // SAFETY: the view's constructor has checked that each of its rows lies within the borrowed slice.
        unsafe { std::slice::from_raw_parts(self.at(row, 0), self.columns) }
    }

    /// The view of a range of rows.
    pub(super) fn rows_of(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        Self { data: self.at(rows.start, 0), rows: rows.len(), ..self }
    }

    /// The view of a range of columns.
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

/// A mutable row-major matrix.
pub(super) struct MatrixMut<'a> {
    data: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// A view of `rows` × `columns` elements from the start of `data`, with rows `stride` elements apart.
    pub(super) fn new(data: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        check(data.len(), rows, columns, stride);
        Self { data: data.as_mut_ptr(), rows, columns, stride, lifetime: PhantomData }
    }

    /// The matrix for several threads that write to disjoint parts.
    pub(super) fn shared(&mut self) -> SharedMatrix<'_> {
        SharedMatrix(MatrixMut { lifetime: PhantomData, ..*self })
    }

    /// Sets every element to 0.
    pub(super) fn clear(&mut self) {
        for row in 0..self.rows {
            self.row_mut(row).fill(0.0);
        }
    }

    /// The view of a range of rows and a range of columns.
    pub(super) fn part_mut(&mut self, rows: Range<usize>, columns: Range<usize>) -> MatrixMut<'_> {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        let data = self.data.wrapping_add(rows.start * self.stride + columns.start);
        MatrixMut { data, rows: rows.len(), columns: columns.len(), lifetime: PhantomData, ..*self }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// A row as a slice.
    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the view's constructor has checked that each of its rows lies within the borrowed slice.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride), self.columns) }
    }
}

/// A matrix whose disjoint parts several threads write at the same time.
pub(super) struct SharedMatrix<'a>(MatrixMut<'a>);

// SAFETY: `part` only returns a pointer. Code that dereferences it must ensure that no two threads use the same
// element.
unsafe impl Sync for SharedMatrix<'_> {}

impl SharedMatrix<'_> {
    /// Address of the `rows` × `columns` part that begins at `row` and `column`, and the distance between its rows.
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

/// A slice whose disjoint blocks several threads write at the same time.
pub(super) struct Shared<'a> {
    data: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: elements are accessible only through `block` and `slice`, whose contracts exclude overlap between threads.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(super) fn new(data: &'a mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), lifetime: PhantomData }
    }

    /// The block of `rows` × `columns` that begins at element `offset`, with rows `stride` elements apart.
    ///
    /// # Safety
    /// No element of the block may be in another block or slice that lives at the same time.
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

    /// The `len` elements from `offset` on.
    ///
    /// # Safety
    /// None of these elements may be in another block or slice that lives at the same time.
    #[expect(clippy::mut_from_ref, reason = "exclusive by the contract of this function")]
    pub(super) unsafe fn slice(&self, offset: usize, len: usize) -> &mut [f32] {
        check(self.len.saturating_sub(offset), 1, len, len);
        // SAFETY: `check` has verified the bounds, the caller guarantees exclusive access, and the borrowed slice
        // outlives the borrow of `self`.
        unsafe { std::slice::from_raw_parts_mut(self.data.wrapping_add(offset), len) }
    }
}

/// Whether work runs on the current thread or on all threads of the pool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    One,
    All,
}

/// Whether a product replaces the contents of its output or is added to them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    Overwrite,
    Accumulate,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_view_outside_its_slice_is_refused() {
        let _ = Matrix::new(&[0.0; 7], 2, 4, 4);
    }
}
