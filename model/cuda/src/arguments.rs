//! The types of kernel arguments, with the layouts that the kernels define.

use super::handle::Address;

/// A value that can be an argument of a kernel.
///
/// # Safety
/// The type must have the same layout as its counterpart in the kernels.
pub(super) unsafe trait Argument {}

// SAFETY: the counterpart is a pointer, which has 8 bytes.
unsafe impl Argument for Address {}
// SAFETY: the counterpart is `int`.
unsafe impl Argument for i32 {}
// SAFETY: the counterpart is `long long`.
unsafe impl Argument for i64 {}
// SAFETY: the counterpart is `float`.
unsafe impl Argument for f32 {}
// SAFETY: the counterpart is `double`.
unsafe impl Argument for f64 {}

/// Rows of heads: `Heads` in attention.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct HeadRows {
    /// Address of the first row of the first head of the first sequence.
    pub base: Address,
    /// Distance from one sequence to the next, in elements.
    pub sequence: i64,
    /// Distance from one head to the next, in elements.
    pub head: i64,
    /// Distance from one row to the next, in elements.
    pub row: i64,
}
// SAFETY: the counterpart has a pointer and three `long long`.
unsafe impl Argument for HeadRows {}

/// A range of columns in a matrix: `Columns` in naive.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct ColumnRows {
    /// Address of the first column of the first row.
    pub base: Address,
    /// Distance from one row to the next, in elements.
    pub stride: i32,
}
// SAFETY: the counterpart has a pointer and an `int`.
unsafe impl Argument for ColumnRows {}

/// A matrix for inference: `Weights` in matvec.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct MatrixData {
    pub values: Address,
    pub scales: Address,
}
// SAFETY: the counterpart has two pointers.
unsafe impl Argument for MatrixData {}

/// The constants of an AdamW step: `AdamW` in optimizer.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AdamWStep {
    pub gradient_scale: f32,
    pub decay: f32,
    pub first_share: f32,
    pub beta2: f32,
    pub second_share: f32,
    pub step_size: f32,
    pub second_correction: f32,
    pub epsilon: f32,
}
// SAFETY: the counterpart has eight `float`.
unsafe impl Argument for AdamWStep {}
