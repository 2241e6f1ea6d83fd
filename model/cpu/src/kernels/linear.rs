//! Embedding and linear layers.

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

vectorised! {
    fn add_row(y: &mut [f32], x: &[f32]) {
        axpy(y, 1.0, x);
    }
}

/// `out = x · weightᵀ`.
pub(crate) fn linear(out: &mut [f32], x: &[f32], weight: &[f32], shape: LinearShape, precision: Precision) {
    let LinearShape { rows, inputs, outputs } = shape;
    multiply(
        &mut MatrixMut::new(out, rows, outputs, outputs),
        Matrix::new(x, rows, inputs, inputs),
        Matrix::new(weight, outputs, inputs, inputs).transposed(),
        precision,
        Output::Overwrite,
    );
}

/// `x_gradient = gradient · weight`.
pub(crate) fn linear_backward_input(
    x_gradient: &mut [f32],
    gradient: &[f32],
    weight: &[f32],
    shape: LinearShape,
    precision: Precision,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    multiply(
        &mut MatrixMut::new(x_gradient, rows, inputs, inputs),
        Matrix::new(gradient, rows, outputs, outputs),
        Matrix::new(weight, outputs, inputs, inputs),
        precision,
        Output::Overwrite,
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
