//! Embedding and linear layers, and rows that are put elsewhere.

use ulmus_backend::LinearShape;
use ulmus_plan::Precision;

use super::matrix::multiply;
use super::simd::{axpy, vectorised};
use super::view::{Matrix, MatrixMut, Output};

/// `out[r] = table[ids[r]]`.
pub(crate) fn embed(out: &mut [f32], table: &[f32], ids: &[u32], width: usize) {
    for (out, id) in out.chunks_exact_mut(width).zip(ids) {
        out.copy_from_slice(&table[*id as usize * width..][..width]);
    }
}

/// `table_gradient[ids[r]] += gradient[r]`, one row after the other, because a token may occur in several rows.
pub(crate) fn embed_backward(table_gradient: &mut [f32], gradient: &[f32], ids: &[u32], width: usize) {
    for (gradient, id) in gradient.chunks_exact(width).zip(ids) {
        add_row(&mut table_gradient[*id as usize * width..][..width], gradient);
    }
}

/// `out[rows[r]] = x[r]`, and 0 in all other rows.
pub(crate) fn scatter(out: &mut [f32], x: &[f32], rows: &[u32], width: usize) {
    out.fill(0.0);
    for (x, row) in x.chunks_exact(width).zip(rows) {
        out[*row as usize * width..][..width].copy_from_slice(x);
    }
}

/// `out[r] += x[rows[r]]`.
pub(crate) fn gather_add(out: &mut [f32], x: &[f32], rows: &[u32], width: usize) {
    for (out, row) in out.chunks_exact_mut(width).zip(rows) {
        add_row(out, &x[*row as usize * width..][..width]);
    }
}

vectorised! {
    fn add_row(y: &mut [f32], x: &[f32]) {
        axpy(y, 1.0, x);
    }
}

/// `out = x · weightᵀ` or `out += x · weightᵀ`, depending on `output`.
pub(crate) fn linear(
    out: &mut [f32],
    x: &[f32],
    weight: &[f32],
    shape: LinearShape,
    output: Output,
    precision: Precision,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    multiply(
        &mut MatrixMut::new(out, rows, outputs, outputs),
        Matrix::new(x, rows, inputs, inputs),
        Matrix::new(weight, outputs, inputs, inputs).transposed(),
        precision,
        output,
    );
}

/// `x_gradient = gradient · weight` or `x_gradient += gradient · weight`, depending on `output`.
pub(crate) fn linear_backward_input(
    x_gradient: &mut [f32],
    gradient: &[f32],
    weight: &[f32],
    shape: LinearShape,
    output: Output,
    precision: Precision,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    multiply(
        &mut MatrixMut::new(x_gradient, rows, inputs, inputs),
        Matrix::new(gradient, rows, outputs, outputs),
        Matrix::new(weight, outputs, inputs, inputs),
        precision,
        output,
    );
}

/// `weight_gradient = gradientᵀ · x` or `weight_gradient += gradientᵀ · x`, depending on `output`.
pub(crate) fn linear_backward_weight(
    weight_gradient: &mut [f32],
    gradient: &[f32],
    x: &[f32],
    shape: LinearShape,
    output: Output,
    precision: Precision,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    multiply(
        &mut MatrixMut::new(weight_gradient, outputs, inputs, inputs),
        Matrix::new(gradient, rows, outputs, outputs).transposed(),
        Matrix::new(x, rows, inputs, inputs),
        precision,
        output,
    );
}
